"""Prose of the documentation is short: a sentence has at most 25 words, a paragraph at most 60, a line 120 columns.

    python -m tests.test_prose [PAGE ...]      # what is too long, and where

Code, tables, headings and the targets of links are not counted.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST_SENTENCE, LONGEST_PARAGRAPH, LONGEST_LINE = 25, 60, 120
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *(ROOT / "docs").rglob("*.md")])

_FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\](?:\([^)]*\)|\[[^\]]*\])")
_ITEM = re.compile(r"^(?:[-*]|\d\.) ")
_NO_PROSE = re.compile(r"^(?:#|\||\[[\w-]+\]: |<!--| {4})")
# A full stop ends a sentence where a capital, a symbol or code follows.
_END = re.compile(r"(?<=[.!?])[\"”*)_]* +(?=[\"“*(_`\[]*[A-ZΑ-ΩÀ-Þ0-9ε-ωα-δ`])")


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Paragraphs and items of lists with their line numbers, as running text."""
    text = _FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)
    begin, lines = 0, []
    for number, line in enumerate([*text.splitlines(), ""], 1):
        stripped = line.strip()
        item = _ITEM.match(stripped)
        ends = not stripped or (_NO_PROSE.match(line) and not lines) or stripped.startswith(("|", "#")) or item
        if ends and lines:
            yield begin, _LINK.sub(r"\1", " ".join(lines))
            lines = []
        if not stripped or (_NO_PROSE.match(line) and not lines and not item):
            continue
        if not lines:
            begin = number
        lines.append(_ITEM.sub("", stripped))


def unwrapped(text: str) -> list[str]:
    """Lines of prose that are too wide, each with its number; a link that stands alone may be."""
    text = _FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)
    return [
        f"{number}: a line of {len(line)} columns: {line[:60]}…"
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > LONGEST_LINE and not _NO_PROSE.match(line) and " " in line.strip()
    ]


def words(text: str) -> int:
    """Words of running text; a piece of code is one."""
    text = re.sub(r"`[^`]*`", "code", text)
    return sum(bool(re.search(r"\w", word)) for word in text.split())


def sentences(paragraph: str) -> list[str]:
    """Its sentences, as they end with a full stop, a question mark or an exclamation mark."""
    return [part for part in _END.split(paragraph) if part.strip()]


def too_long(text: str) -> list[str]:
    """What is too long, each with its line."""
    found = []
    for line, paragraph in paragraphs(text):
        if (count := words(paragraph)) > LONGEST_PARAGRAPH:
            found.append(f"{line}: a paragraph of {count} words: {paragraph[:60]}…")
        for sentence in sentences(paragraph):
            if (count := words(sentence)) > LONGEST_SENTENCE:
                found.append(f"{line}: a sentence of {count} words: {sentence[:60]}…")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_prose_is_short(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = too_long(text) + unwrapped(text)
    assert not found, "\n".join(found)


def test_long_prose_is_found() -> None:
    long = "word " * 26 + "end. Short one."
    assert [entry.partition(":")[2][:24] for entry in too_long(f"# Title\n\n{long}\n")] == [" a sentence of 27 words:"]
    assert len(too_long("A few words only here. " * 13)) == 1
    code = "| " + "cell " * 99 + "|\n\n```python\n" + "code " * 99 + "\n```\n\n    " + "block " * 99
    assert unwrapped(f"{long}\n\n`short`\n{code}") == [f"1: a line of {len(long)} columns: {long[:60]}…"]
    assert not too_long(code + f"\n\n- [{'a ' * 5}](https://host/{'x/' * 99})\n- item {'b ' * 20}\n")


if __name__ == "__main__":
    for page in [Path(name) for name in sys.argv[1:]] or PAGES:
        text = page.read_text(encoding="utf-8")
        for entry in too_long(text) + unwrapped(text):
            print(f"{page}:{entry}")
