"""Entries chained by digests: a damaged, edited, missing or moved one is told from a true one.

Each entry has the SHA-256 digest of itself and of the digest before it. A second file holds the last digest and how
many there are, by its length; it is written after the entry, and nothing is released before both are on the disk. So a
crash leaves at most one entry more than is held, and whatever is missing at the end is noticed.

This is against damage, not against the owner of the disk: who can write both files can begin a chain anew, or put both
back to an earlier day. A secret key beside them would not change that, since who owns the files owns the key; and a
node's ledger protects its own owner.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dp.atomic_files import append_durably

START = "0" * 64  # the digest before the first entry
_LINE = len(START) + 1


def canonical(value: Any) -> str:
    """The one JSON text of a value: keys in order, no spaces, ASCII, floats to the last bit."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def link(before: str, entry: Any) -> str:
    """The digest of an entry that follows the digest ``before``: 64 hexadecimal digits."""
    return hashlib.sha256((before + canonical(entry)).encode()).hexdigest()


class Heads:
    """The file that holds the end of a chain: a line for each digest, of which the last one counts.

    Args:
        path: of the chain's own file; this one has ``.heads`` after its name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.with_name(path.name + ".heads")

    def last(self) -> tuple[int, str]:
        """How many digests are held, and the last one; ``(0, START)`` where there is none."""
        try:
            with self.path.open("rb") as file:
                count = file.seek(0, os.SEEK_END) // _LINE  # what is over was cut off by a crash
                if count == 0:
                    return 0, START
                file.seek((count - 1) * _LINE)
                return count, file.read(_LINE).decode("ascii", errors="replace").removesuffix("\n")
        except FileNotFoundError:
            return 0, START

    def append(self, digest: str) -> None:
        """Holds one more; on the disk when this returns."""
        append_durably(self.path, digest.encode() + b"\n")


class BrokenChain(ValueError):
    """An entry that is not what was written; the words say which."""


class ChainedLog:
    """A file of JSON objects, one a line, each with the ``digest`` that chains it to those before.

    Args:
        path: of the file; made with the first entry, as is the one that holds its end.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._heads = path, Heads(path)
        self._last: tuple[int, str] | None = None

    def read(self) -> list[dict[str, Any]]:
        """All entries, without their digests. A part of a line at the end was cut off by a crash, and is none.

        Raises:
            BrokenChain: a line is damaged, or lines at the end are gone.
        """
        # Before the file: whoever reads while another process appends finds at most one line more than is held.
        held, head = self._heads.last()
        entries: list[dict[str, Any]] = []
        digests = [START]
        for line in (self.path.read_bytes() if self.path.exists() else b"").split(b"\n")[:-1]:
            try:
                entry = json.loads(line)
                entry.pop("digest")
                digests.append(link(digests[-1], entry))
                whole = _line(entry, digests[-1]) == line + b"\n"
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise BrokenChain(f"line {len(digests)} is damaged") from error
            if not whole:
                raise BrokenChain(f"line {len(digests) - 1} is damaged")
            entries.append(entry)
        if held > len(entries):
            raise BrokenChain(f"it ends before line {len(entries) + 1} of {held}")
        if digests[held] != head or held < len(entries) - 1:
            raise BrokenChain(f"{self._heads.path.name} beside it is damaged, or of another day")
        self._last = len(entries), digests[-1]
        return entries

    def append(self, entry: Mapping[str, Any]) -> None:
        """Adds an entry; on the disk, and held, when this returns.

        Raises:
            BrokenChain: as :meth:`read`, where it was not read before.
        """
        if self._last is None:
            self.read()
        assert self._last is not None
        count, before = self._last
        self._last = None  # what an interrupted append leaves is read again
        if self._heads.last()[0] < count:  # a crash came before the last line was held
            self._heads.append(before)
        digest = link(before, dict(entry))
        append_durably(self.path, _line(entry, digest))
        self._heads.append(digest)
        self._last = count + 1, digest


def _line(entry: Mapping[str, Any], digest: str) -> bytes:
    return (canonical({**entry, "digest": digest}) + "\n").encode()
