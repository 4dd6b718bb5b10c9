"""The picture of a comparison: a panel for each budget, a row for each method."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from pandas import DataFrame, Series

from lora_dp.fed.compare import tables
from lora_dp.fed.compare.measures import MEASURES, Measure
from lora_dp.fed.compare.options import Metric
from lora_dp.fed.plot_style import BLUE, INK, ORANGE, PURPLE, QUIET, marks_of
from lora_dp.fed.runs.folder import ENDED

# Told apart by shape too, for print in grey and for eyes that do not see the colours.
_COLOURS = ("#2f6fde", "#e0702f", "#1f9d74", "#b0489a", "#8a6d1f", "#5b5fc7", "#c23b4b", "#2b8fa8", "#6b7280")
_MARKERS = "osD^vPX<>*h"
PROBE = "head-only"
# How far apart rows may start, in points, for one line to tell of all.
_ONE_START = 5.0


def mark(index: int) -> tuple[str, str]:
    """Colour and marker of the method at this place, where methods are lines.

    >>> mark(0)
    ('#2f6fde', 'o')
    """
    return _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]


def draw(cells: DataFrame, metric: Metric, width: float = 10.0) -> Figure:
    """Means with 95 % confidence intervals and the single seeds, methods sorted by their mean at the smallest ε.

    A dashed line is the model before training, a line of dots and dashes the private probe. The axis fits the seeds;
    who lies far below the others has an arrow. The caller sets the style.

    Args:
        cells: one row a cell, of which at least one has ended.
        metric: that is drawn.
        width: of the figure, in inches.
    """
    measure = MEASURES[metric]
    numbers = tables.statistics(cells, metric)
    # Turned round where less is better, so that better is always to the right.
    numbers["mean"] = measure.sign * numbers["mean"]
    budgets = list(numbers["epsilon"].unique())
    first = numbers[numbers["epsilon"] == budgets[0]].set_index("method")["mean"]
    order = list(first.sort_values(ascending=True, na_position="first").index)
    rows = {method: place for place, method in enumerate(order)}
    figure = Figure(figsize=(width, 1.5 + 0.27 * len(order)), layout="constrained")
    panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    kept = tables.are_kept(cells)
    for axes, budget in zip(panels, budgets, strict=True):
        column = numbers[numbers["epsilon"] == budget].dropna(subset="mean")
        runs = cells[(cells["epsilon"] == budget) & cells["status"].isin(ENDED)]
        axes.set_title(tables.budget_name(budget, kept=kept), fontsize=10, pad=16)
        _panel(axes, column, runs, measure, rows)
    panels[0].set_yticks(range(len(order)), order, color=INK)
    panels[0].set_ylim(-0.6, len(order) - 0.4)
    seeds = int(numbers["n"].max())
    spread = f", mean and 95 % interval of {seeds} seeds" if seeds > 1 else ", one run each"
    marks = "".join(f"\n{said}" for said in marks_of(not kept, cells["release"].notna().any()))
    figure.supxlabel(f"{measure.axis}{spread}{marks}", fontsize=9.5, color=INK)
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines() if line.get_label()[0] != "_"}
    figure.legend(
        lines.values(),
        lines.keys(),
        loc="outside upper right",
        ncols=min(len(lines), 6 if width > 9 else 3),
        frameon=False,
        fontsize=8.5,
        handletextpad=0.4,
        columnspacing=1.4,
    )
    return figure


def _panel(axes: Any, column: DataFrame, runs: DataFrame, measure: Measure, rows: dict[str, int]) -> None:
    """One budget: its methods in their rows, in the axis that fits them."""
    axes.yaxis.grid(False)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    if not len(column):
        axes.set_xticks([])
        return
    factor = measure.sign * measure.factor
    values = factor * runs[measure.after].astype(float).to_numpy()
    before = _start(factor * runs[measure.before].astype(float), runs["method"])
    left, right = _limits(column, values, before, ceiling=100.0 if measure.sign > 0 else 0.0)
    if measure.sign < 0:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):g}"))
    axes.set_xlim(left, right)
    if left <= before <= right:
        axes.axvline(before, color=QUIET, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1, label="before training")
    elif not np.isnan(before):
        said = measure.number(abs(before))
        way = f"◂ {said} before training" if before < left else f"before training {said} ▸"
        axes.annotate(
            way, (0, 1), (0, 4), "axes fraction", textcoords="offset points", va="bottom", fontsize=8, color=QUIET
        )
    probe = column.loc[column["method"] == PROBE, "mean"]
    if len(probe) and len(column) > 1 and left <= probe.iloc[0]:
        line = (0, (6, 2, 1, 2))
        axes.axvline(probe.iloc[0], color=PURPLE, linewidth=1.2, linestyle=line, zorder=1, label=PROBE)
    places = runs["method"].map(rows).to_numpy(float)
    shown = values >= left
    axes.plot(values[shown], places[shown], ".", color=INK, markersize=3.5, alpha=0.45, zorder=3, label="one seed")
    best = column["mean"].max()
    for each in column.to_dict("records"):
        place, mean = rows[each["method"]], each["mean"]
        if mean < left:
            axes.annotate(
                f"◂ {measure.number(abs(mean))}",
                (left, place),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color=BLUE,
            )
            continue
        worse = each["pairs"] is not None and not np.isnan(each["pairs"]) and not each["tied"]
        colour = ORANGE if mean == best and len(column) > 1 else BLUE
        name = "best mean" if colour == ORANGE else "worse than the best at 5 %" if worse else "mean"
        half = np.nan_to_num(each["half_width"])
        ends = max(mean - half, left), min(mean + half, right)
        axes.plot(ends, (place, place), color=colour, linewidth=2, alpha=0.55, solid_capstyle="butt", zorder=2)
        face = "white" if worse else colour
        axes.plot(
            mean,
            place,
            "o",
            color=colour,
            markerfacecolor=face,
            markersize=7,
            markeredgewidth=1.6,
            zorder=4,
            label=name,
        )


def _start(before: Series, methods: Series) -> float:
    """The mean start; NaN where rows start so far apart that no line tells of all."""
    starts = before.groupby(methods).mean()
    return float(before.mean()) if starts.max() - starts.min() <= _ONE_START else float("nan")


def _limits(column: DataFrame, values: np.ndarray, before: float, ceiling: float) -> tuple[float, float]:
    """Ends of the axis: around the seeds of all methods but those far below, with intervals and the start as far as
    these do not squeeze them."""
    means, halves = column["mean"].to_numpy(float), np.nan_to_num(column["half_width"].to_numpy(float))
    low, high = np.quantile(means, (0.25, 0.75))
    fence = low - 5 * max(high - low, 0.5)
    near = means >= fence if np.sum(means < fence) <= max(1, len(means) / 5) else np.full(len(means), True)
    least, most = means[near].min(), means[near].max()
    inside = values[values >= least - max(most - least, 1.0)]
    least, most = min(least, inside.min()), max(most, inside.max())
    span = max(most - least, 1.0)
    least = max(min(least, (means - halves)[near].min()), least - span)
    most = min(max(most, (means + halves)[near].max()), most + span)
    if least - span <= before <= most + span:
        least, most = min(least, before), max(most, before)
    margin = 0.12 * max(most - least, 1.0)
    return least - margin, min(most + margin, ceiling + margin / 2)
