"""How every figure of the federation looks."""

from typing import Any

INK, QUIET, BLUE, ORANGE, GREEN, PURPLE = "#1f2430", "#8a90a0", "#2f6fde", "#e0702f", "#1f9d74", "#5b5fc7"
STYLE: Any = {
    "font.size": 10, "axes.edgecolor": QUIET, "axes.labelcolor": INK, "text.color": INK, "xtick.color": QUIET,
    "ytick.color": QUIET, "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlesize": 11, "axes.grid": True, "grid.color": "#e8eaf0",
    "axes.axisbelow": True,
}
