"""A chain's files as a crash, or somebody's hands, leave them."""

from pathlib import Path
from typing import Any

from lora_dp.hash_chain import START, Heads, canonical, link


def hold(path: Path, count: int) -> None:
    """Cuts the file that holds the end of ``path``'s chain back to ``count`` entries."""
    with Heads(path).path.open("r+b") as file:
        file.truncate(count * (len(START) + 1))


def forget(path: Path) -> None:
    """Removes a chain and the file that holds its end: as if it had never been."""
    for left in (path, Heads(path).path):
        left.unlink(missing_ok=True)


def forge(path: Path, entries: list[dict[str, Any]]) -> None:
    """Writes a whole chain of these entries, as the owner of the disk can."""
    digest, lines, heads = START, [], []
    for entry in entries:
        digest = link(digest, entry)
        lines.append(canonical({**entry, "digest": digest}) + "\n")
        heads.append(digest + "\n")
    path.write_text("".join(lines))
    Heads(path).path.write_text("".join(heads))
