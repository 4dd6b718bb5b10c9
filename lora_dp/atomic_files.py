"""Files that a crash leaves either as they were or whole."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by ``text`` (UTF-8): after a crash it is either the old one or the new one.

    When this returns, the new one is on the disk.
    """
    write_bytes_atomically(path, text.encode("utf-8"))


class KeptFile:
    """A file that one process alone writes, again and again.

    Args:
        path: of the file.
        content: what to write.
    """

    def __init__(self, path: Path, content: Callable[[], str]):
        self._path, self._content = path, content
        self._last: str | None = None

    def write(self) -> None:
        """Replace the file by what it is to hold now.

        Raises:
            RuntimeError: somebody else has written to it since, or removed it.
        """
        if self._last is not None and (not self._path.exists() or self._path.read_text(encoding="utf-8") != self._last):
            raise RuntimeError(
                f"'{self._path}' is not as it was written last, so another run writes to it, or it was removed: give "
                "each run a file of its own."
            )
        text = self._content()
        write_atomically(self._path, text)
        self._last = text


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """As :func:`write_atomically`, for bytes."""
    path = path.resolve()  # at the end of a symbolic link, which stays one
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def append_durably(path: Path, lines: bytes, mode: int = 0o666) -> None:
    """Append lines, each of which ends with its line break; on the disk when this returns.

    A part of a line that a crash left at the end is cut off first.

    Args:
        path: of the file.
        lines: with their line breaks.
        mode: who may use the file if it is made here, less the process's umask.
    """
    new = not path.exists()
    with open(path, "ab+", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        end = file.seek(0, os.SEEK_END)
        whole = end
        while whole and (file.seek(whole - 1), file.read(1))[1] != b"\n":
            whole -= 1
        if whole < end:
            file.truncate(whole)
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())
    if new:
        _sync_folder(path.parent)


def remove_durably(paths: Iterable[Path]) -> None:
    """Remove files, whether they are there or not; when this returns, none of them comes back after a crash."""
    folders = set()
    for path in paths:
        path.unlink(missing_ok=True)
        folders.add(path.parent)
    for folder in folders:
        _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Names in a folder reach the disk with the folder, where folders can be opened."""
    if hasattr(os, "O_DIRECTORY"):
        number = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
