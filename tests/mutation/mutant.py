"""A mutant: one file of the repository with one small mistake in it."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

# What is shown of a long expression.
_SHOWN = 90


@dataclass(frozen=True)
class Mutant:
    """``after`` in place of ``before``, between two places of the file.

    Attributes:
        path: of the file, from the root of the repository.
        function: qualified name of what surrounds the place, "" at the level of the file.
        operator: the kind of mistake.
        start, end: of what is replaced, in bytes.
        before, after: text.
        line: on which it begins, without indentation.
        ordinal: from 1, among mutants that are alike in all of this but the place.
    """

    path: str
    function: str
    operator: str
    start: int
    end: int
    before: str
    after: str
    line: str
    ordinal: int = 1

    @property
    def id(self) -> str:
        """Its name, which edits elsewhere in the file, or in the function, leave as it is."""
        change = f"{_short(self.before)} → {_short(self.after)}"
        repeated = f" #{self.ordinal}" if self.ordinal > 1 else ""
        within = "" if _short(self.before) == _short(self.line) else f" in: {_short(self.line)}"
        return f"{self.path}::{self.function}::{self.operator}::{change}{within}{repeated}"

    def applied(self, source: str) -> str:
        """The file with the mistake in it.

        Raises:
            ValueError: the file is not the one from which the mutant was made.
        """
        text = source.encode()
        if text[self.start : self.end].decode() != self.before:
            raise ValueError(f"{self.path} has changed since '{self.id}' was made: make the mutants again.")
        return (text[: self.start] + self.after.encode() + text[self.end :]).decode()


def _short(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip()
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def line_at(text: bytes, place: int) -> str:
    """The line of a file on which a place lies."""
    begin, end = text.rfind(b"\n", 0, place) + 1, text.find(b"\n", place)
    return text[begin : end if end >= 0 else len(text)].decode().strip()


def numbered(mutants: Iterable[Mutant]) -> list[Mutant]:
    """The mutants in the order of the file, each with its ordinal; of two with the same text after all, the first."""
    seen: set[tuple[int, int, str]] = set()
    counts: Counter[str] = Counter()
    found = []
    for mutant in sorted(mutants, key=lambda m: (m.start, m.end, m.operator, m.after)):
        place = (mutant.start, mutant.end, mutant.after)
        if place in seen:
            continue
        seen.add(place)
        counts[mutant.id] += 1
        found.append(replace(mutant, ordinal=counts[mutant.id]))
    return found
