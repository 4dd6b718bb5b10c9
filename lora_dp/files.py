"""Files that a crash leaves either as they were or whole."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by ``text`` (UTF-8): after a crash it is either the old one or the new one.

    When this returns, the new one is on the disk.
    """
    write_bytes_atomically(path, text.encode("utf-8"))


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """As :func:`write_atomically`, for bytes."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if hasattr(os, "O_DIRECTORY"):  # where folders can be opened: the rename itself must reach the disk
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
