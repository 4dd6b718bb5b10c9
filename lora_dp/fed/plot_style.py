"""How every figure of the federation looks."""

from typing import Any

INK, QUIET, BLUE, ORANGE, GREEN, PURPLE = "#1f2430", "#8a90a0", "#2f6fde", "#e0702f", "#1f9d74", "#5b5fc7"
STYLE: Any = {
    "font.size": 10,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.grid": True,
    "grid.color": "#e8eaf0",
    "axes.axisbelow": True,
}


def marks_of(guarantee: object, release: object) -> list[str]:
    """What a figure must say of its runs, in a few words: where they have no guarantee, and where none may be released.

    Args:
        guarantee, release: of a summary; anything true is a note.
    """
    words = {"no privacy guarantee (as released)": guarantee, "research only, not for release": release}
    return [text for text, said in words.items() if said]
