"""The picture of docs/reports/membership.md: guesses as dots, and the whole trade-off on logarithmic axes."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from lora_dp.auditing.membership import largest_tpr, roc
from lora_dp.fed.plot_style import BLUE, GREEN, INK, ORANGE, QUIET, STYLE

COLOURS = (ORANGE, BLUE, GREEN)
PALE = "#dfe2ea"


def _dots(axes: Any, share: float, colour: str) -> None:
    """A hundred guesses, the right ones filled, row by row from below."""
    right = round(100 * share)
    for number in range(100):
        axes.add_patch(
            Rectangle(
                (number % 10 + 0.09, number // 10 + 0.09),
                0.82,
                0.82,
                color=colour if number < right else PALE,
                linewidth=0,
            )
        )
    axes.axhline(5, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set(xlim=(0, 10), ylim=(0, 10), aspect="equal")
    axes.axis("off")


def _percent(value: float, position: object = None) -> str:
    return f"{100 * value:g} %"


def draw(
    found: Mapping[str, Mapping[str, Any]],
    members: np.ndarray,
    ceilings: Mapping[str, tuple[float, float, float]],
    path: Path,
) -> None:
    """Draws what :func:`benchmarks.membership.attack` found.

    Args:
        found: by setting.
        members: (models, examples) bool.
        ceilings: by setting, (ε, δ) of what the attacker tells apart, and the largest share of right answers.
        path: of the PNG.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.2, 9.4), layout="constrained", dpi=150)
        above, below = figure.subfigures(2, 1, height_ratios=(1, 1.25))
        above.suptitle(
            "“Was this picture in the training data?”  Of 100 of the attacker's surest answers, so many are right",
            fontsize=12,
            weight="bold",
            x=0.01,
            ha="left",
        )
        for axes, (name, row), colour in zip(above.subplots(1, len(found)), found.items(), COLOURS, strict=True):
            right, most = row["surest right"], 100 * ceilings[name][2]
            _dots(axes, right.share, colour)
            words = f"at most {most:.3g}" if most < 99.9 else "hardly anything"
            limit = "nothing is promised" if most == 100 else f"promised, against any attack: {words}"
            axes.set_title(f"{name}: {100 * right.share:.0f} of 100", color=colour, fontsize=13, loc="center", pad=8)
            axes.text(
                5,
                -0.35,
                f"95 % interval {100 * right.low:.0f} to {100 * right.high:.0f}\n{limit}\n"
                f"accuracy of the model {row['accuracy']:.1%}",
                ha="center",
                va="top",
                color=INK,
                fontsize=9.5,
            )
            axes.text(10.1, 5, "coin\ntoss", ha="left", va="center", color=QUIET, fontsize=8)
        axes = below.subplots()
        _curves(axes, found, members, ceilings)
        figure.savefig(path)


def _curves(
    axes: Any,
    found: Mapping[str, Mapping[str, Any]],
    members: np.ndarray,
    ceilings: Mapping[str, tuple[float, float, float]],
) -> None:
    least = 10 / float((~members).sum())
    rates = np.logspace(math.log10(least), 0, 400)
    axes.plot(rates, rates, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(rates[60], rates[60] * 0.62, "coin toss", color=QUIET, rotation=25, fontsize=9)
    for (name, row), colour in zip(found.items(), COLOURS, strict=True):
        false, true = roc(row["scores"], members)
        kept = false >= least
        axes.plot(false[kept], true[kept], color=colour, linewidth=2, label=f"{name}, measured")
        epsilon, delta, _ = ceilings[name]
        if math.isfinite(epsilon):
            axes.plot(
                rates,
                largest_tpr(rates, epsilon, delta),
                color=colour,
                linewidth=1.3,
                linestyle=(0, (2, 2)),
                label=f"{name}, ceiling for any attack",
            )
        for fpr in (0.001, 0.01, 0.1):
            at = row[f"TPR at FPR {fpr:g}"]
            axes.plot([fpr, fpr], [at.low, at.high], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(least, 1),
        ylim=(least, 1.15),
        xlabel="false alarms: share of the pictures that were not in the training data, but are said to have been",
        ylabel="found: share of those that were",
    )
    axes.set_title("The same attack, from its surest answers (left) to all of them (right)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_percent))
    axes.tick_params(length=0)
    axes.legend(frameon=False, loc="lower right", fontsize=9)
