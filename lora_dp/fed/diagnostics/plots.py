"""The figure of an inspected run."""

from collections.abc import Sequence
from typing import Any, BinaryIO

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lora_dp.fed.plot_style import BLUE, INK, ORANGE, QUIET, STYLE, marks_of

_OPPOSITE_TO_ALIKE = LinearSegmentedColormap.from_list("cosine", [ORANGE, "#ffffff", BLUE])
# Beyond these, names of layers and numbers in cells could not be read.
_MOST_NAMES, _MOST_NUMBERS = 32, 8


def draw_inspection(report: dict[str, Any], file: BinaryIO) -> None:
    """Draws a report of :func:`lora_dp.fed.diagnostics.inspect.inspect_run` into a PNG file.

    Panels: the strongest directions by layer, the loss along random directions; where updates were recorded, their
    cosines in the last round and by round, and the share of noise in them where there was any.
    """
    rounds = report["updates"]["rounds"] if report["updates"] else []
    noisy = any(entry["noise_share"] is not None for entry in rounds)
    layers = report["intruder_dimensions"]["layers"]
    top = max(3.6, 0.19 * min(len(layers), _MOST_NAMES) + 1.0)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.0, top + (3.4 if rounds else 0.0)), layout="constrained", dpi=160)
        grid = GridSpec(2 if rounds else 1, 6, figure=figure, height_ratios=[top, 3.4] if rounds else None)
        _draw_directions(figure.add_subplot(grid[0, :3]), report["intruder_dimensions"])
        _draw_losses(figure.add_subplot(grid[0, 3:]), report["sharpness"])
        if rounds:
            _draw_matrix(figure.add_subplot(grid[1, :2]), report["updates"]["last"])
            _draw_cosines(figure.add_subplot(grid[1, 2:4] if noisy else grid[1, 2:]), rounds)
            if noisy:
                _draw_noise(figure.add_subplot(grid[1, 4:]), rounds)
        marks = marks_of(report["guarantee"], report["release"])
        if not report["guarantee"]:
            marks.insert(0, "no privacy" if report["epsilon"] is None else f"ε = {report['epsilon']:g}")
        figure.suptitle(
            f"{' · '.join([report['method'], *marks])} · {report['model']} on {report['dataset']} · loss on "
            f"{report['examples']} validation examples",
            fontsize=10,
            color=QUIET,
            x=0.01,
            ha="left",
        )
        figure.savefig(file, format="png")


def _draw_directions(axis: Any, found: dict[str, Any]) -> None:
    layers, threshold = found["layers"], found["threshold"]
    for row, layer in enumerate(layers.values()):
        cosines = np.asarray(layer["cosines"])
        intruders = cosines < threshold
        axis.plot(
            cosines[~intruders],
            [row] * int((~intruders).sum()),
            "o",
            color=BLUE,
            markersize=4,
            alpha=0.45,
            markeredgewidth=0,
        )
        axis.plot(
            cosines[intruders], [row] * int(intruders.sum()), "o", color=ORANGE, markersize=5.5, markeredgewidth=0
        )
    axis.axvline(threshold, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    axis.set_xlim(0, 1.02)
    axis.set_ylim(len(layers) - 0.4, -0.6)
    if len(layers) <= _MOST_NAMES:
        axis.set_yticks(range(len(layers)), list(layers), fontsize=8, color=INK)
    else:
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylabel("adapted layer, from the input")
    axis.set_xlabel(f"largest cosine with a pretrained direction (intruder: below {threshold:g})")
    axis.set_title(f"Intruder dimensions: {found['total']} of {found['looked_at']}")
    axis.tick_params(length=0)


def _draw_losses(axis: Any, sharpness: dict[str, Any]) -> None:
    alpha = sharpness["alpha"]
    losses = np.array(sharpness["losses"], dtype=float)  # what is null becomes NaN, a gap
    for each in losses:
        axis.plot(alpha, each, color=BLUE, linewidth=1, alpha=0.3)
    axis.plot(alpha, losses.mean(0), color=BLUE, linewidth=2.2, marker="o", markersize=3.5, markeredgewidth=0)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("distance along random directions, in norms of each filter")
    axis.set_ylabel("loss (nats)")
    value = sharpness["top_eigenvalue"]
    curvature = "top Hessian eigenvalue not found" if value is None else f"top Hessian eigenvalue {value:.3g}"
    axis.annotate(curvature, (0.5, 0.97), xycoords="axes fraction", ha="center", va="top", color=BLUE, weight="bold")
    axis.set_title("Loss around the aggregated model")
    axis.tick_params(length=0)


def _draw_matrix(axis: Any, last: dict[str, Any]) -> None:
    cosine = np.array(last["cosine"], dtype=float)
    image = axis.imshow(np.ma.masked_invalid(cosine), cmap=_OPPOSITE_TO_ALIKE, vmin=-1, vmax=1)
    clients = [str(client) for client in last["clients"]]
    if len(clients) <= _MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(cosine):
            if np.isfinite(value):
                axis.text(
                    column,
                    row,
                    f"{value:z.2f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="#ffffff" if abs(value) > 0.6 else INK,
                )
    step = max(1, -(-len(clients) // 12))
    axis.set_xticks(range(0, len(clients), step), clients[::step])
    axis.set_yticks(range(0, len(clients), step), clients[::step])
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("client")
    axis.set_ylabel("client")
    axis.set_title(f"Cosine of updates, round {last['round']}")
    axis.tick_params(length=0)
    bar = axis.figure.colorbar(image, ax=axis, shrink=0.9, ticks=[-1, 0, 1])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def _draw_cosines(axis: Any, rounds: Sequence[dict[str, Any]]) -> None:
    x, mean = _by_round(rounds, "mean_cosine")
    axis.axhline(0, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    axis.plot(x, mean, color=BLUE, linewidth=2, marker="o", markersize=3.5, markeredgewidth=0)
    axis.set_title("Alignment: mean cosine")
    _finish_rounds(axis, rounds)


def _draw_noise(axis: Any, rounds: Sequence[dict[str, Any]]) -> None:
    x, share = _by_round(rounds, "noise_share")
    _, low = _by_round(rounds, "least_noise_share")
    _, high = _by_round(rounds, "most_noise_share")
    axis.fill_between(x, low, high, color=ORANGE, alpha=0.15, linewidth=0)
    axis.plot(x, share, color=ORANGE, linewidth=2, marker="o", markersize=3.5, markeredgewidth=0)
    axis.axhline(1, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    axis.set_ylim(0, max(1.08, float(np.nanmax(high)) * 1.05))
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set_title("Share of noise in an update")
    _finish_rounds(axis, rounds)


def _by_round(rounds: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    turns = 1 + max(entry["turn"] for entry in rounds)
    x = [entry["round"] - 1 + (entry["turn"] + 1) / turns for entry in rounds]
    return np.array(x), np.array([entry[name] for entry in rounds], dtype=float)


def _finish_rounds(axis: Any, rounds: Sequence[dict[str, Any]]) -> None:
    axis.set_xlabel("round")
    axis.set_xlim(0, max(entry["round"] for entry in rounds) * 1.04)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axis.tick_params(length=0)
