"""What was meant by a word that is none of those known."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """The remedy: the one that was meant, or else all of them."""
    words = list(known)
    if found := closest(word, words):
        return f"did you mean {found}?"
    *others, last = words
    return f"choose {', '.join(others)} or {last}"


def closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The word that was meant, if one is as near as ``cutoff``, by difflib's ratio."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)
