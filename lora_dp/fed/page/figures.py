"""Curves as SVG to be put into a page."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from lora_dp.fed.compare import plot
from lora_dp.fed.compare.options import Metric
from lora_dp.fed.page.number_format import size
from lora_dp.fed.plot_style import BLUE, GREEN, PURPLE, QUIET, STYLE

# Drawn at the width that a phone shows it in, so that its letters stay as large as the page's.
_SIZE = (4.6, 2.7)
_MOST_DOTS = 60


def curve(
    rounds: Sequence[int],
    values: Sequence[float],
    *,
    kind: str = "number",
    colour: str = BLUE,
    reference: tuple[float, str] | None = None,
    name: str,
) -> Markup:
    """One quantity by round.

    Args:
        rounds, values: of equal length, not empty.
        kind: number, percent or bytes, for the axis.
        reference: a dashed line and its name.
        name: for those who cannot see the picture.
    """
    with matplotlib.rc_context(_style()):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        if reference is not None:
            axes.axhline(reference[0], color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
            # At the end where the curve is further away.
            right = abs(values[-1] - reference[0]) > abs(values[0] - reference[0])
            axes.annotate(
                reference[1],
                (0.98 if right else 0.02, reference[0]),
                xycoords=("axes fraction", "data"),
                xytext=(0, 4),
                textcoords="offset points",
                color=QUIET,
                fontsize=9,
                ha="right" if right else "left",
            )
        dots = "o" if len(rounds) <= _MOST_DOTS else ""
        axes.plot(rounds, values, color=colour, linewidth=2, marker=dots, markersize=3.5, markeredgewidth=0)
        axes.fill_between(rounds, values, min(values), color=colour, alpha=0.08, linewidth=0)
        _finish(axes, rounds, kind)
        return _svg(figure, name)


def traffic(rounds: Sequence[int], up: Sequence[int], down: Sequence[int]) -> Markup:
    """Bytes to and by the server in each round."""
    with matplotlib.rc_context(_style()):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        axes.step(rounds, down, color=PURPLE, where="mid", linewidth=2, label="server to clients")
        axes.step(rounds, up, color=GREEN, where="mid", linewidth=2, linestyle=(0, (5, 2)), label="clients to server")
        axes.set_ylim(0, 1.15 * max(*up, *down, 1))
        _finish(axes, rounds, "bytes")
        figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9)
        return _svg(figure, "Bytes sent in each round")


def curves(lines: Mapping[str, tuple[Sequence[int], Sequence[float]]], name: str, kind: str = "percent") -> Markup:
    """One quantity by round of several methods.

    Args:
        lines: rounds and values by method.
        name: for those who cannot see the picture.
        kind: number or percent, for the axis.
    """
    with matplotlib.rc_context(_style()):
        figure = Figure(figsize=(_SIZE[0], _SIZE[1] + 0.22 * math.ceil(len(lines) / 3)), layout="constrained")
        axes = figure.subplots()
        for index, (method, (rounds, values)) in enumerate(lines.items()):
            colour, marker = plot.mark(index)
            axes.plot(
                rounds,
                values,
                color=colour,
                linewidth=1.6,
                marker=marker if len(rounds) <= _MOST_DOTS else "",
                markersize=3.5,
                markeredgewidth=0,
                label=method,
            )
        _finish(axes, max((rounds for rounds, _ in lines.values()), key=len), kind)
        figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=8.5)
        return _svg(figure, name)


def grid(cells: Any, metric: Metric) -> Markup:
    """The picture of a comparison (:func:`lora_dp.fed.compare.plot.draw`)."""
    with matplotlib.rc_context(_style()):
        return _svg(plot.draw(cells, metric, 8.0), "Results by ε and method; the table has the numbers")


def _finish(axes: Any, rounds: Sequence[int], kind: str) -> None:
    axes.set_xlabel("round")
    axes.set_xlim(0, max(rounds[-1], 1) * 1.04)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    if kind == "percent":
        ticks = axes.get_yticks()
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if ticks[1] - ticks[0] > 0.0099 else 1))
    elif kind == "bytes":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    axes.tick_params(length=0)


def _style() -> Any:
    return {**STYLE, "svg.fonttype": "path", "figure.facecolor": "none", "axes.facecolor": "none"}


def _svg(figure: Figure, name: str) -> Markup:
    file = io.StringIO()
    # Without metadata: the date would make every page differ.
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    opening = Markup('<svg role="img" aria-label="{}"').format(name)
    return Markup(text[text.index("<svg") :].replace("<svg", opening, 1))
