"""The table of a comparison, methods × ε, as Markdown, CSV and LaTeX, and its plot."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from pandas import DataFrame

from lora_dp.atomic_files import write_atomically, write_bytes_atomically
from lora_dp.extras import require
from lora_dp.fed.config import RunConfig
from lora_dp.fed.plot_style import INK, QUIET, STYLE, marks_of
from lora_dp.fed.rounds.privacy_plan import UNITS
from lora_dp.fed.runs.folder import ENDED

# What pandas asks for at the end, for tables in Markdown and LaTeX.
for _package in ("tabulate", "jinja2"):
    require("lora_dp.fed", _package, "fed")

# Told apart by shape too, for print in grey and for eyes that do not see the colours.
_COLOURS = ("#2f6fde", "#e0702f", "#1f9d74", "#b0489a", "#8a6d1f", "#5b5fc7", "#c23b4b", "#2b8fa8", "#6b7280")
_MARKERS = "osD^vPX<>*h"
_NUMBERS = (
    "rounds",
    "accuracy_before",
    "accuracy_after",
    "loss_before",
    "loss_after",
    "target_epsilon",
    "worst_epsilon",
    "delta",
    "bytes_up",
    "bytes_down",
    "failed_clients",
    "seconds",
)
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "ε": r"$\varepsilon$",
        "δ": r"$\delta$",
        "∞": r"$\infty$",
        "–": "--",
        "σ": r"$\sigma$",
        "×": r"$\times$",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': "''",
    }
)


def mark(index: int) -> tuple[str, str]:
    """Colour and marker of the method at this place."""
    return _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]


def budget_name(epsilon: float | Literal["none"], *, kept: bool = True) -> str:
    """As in the head of a column; where ε is not kept, it only sets the noise."""
    if epsilon == "none":
        return "no privacy"
    return f"ε = {epsilon:g}" if kept else f"ε = ∞ (set for {epsilon:g})"


def are_kept(cells: DataFrame) -> bool:
    """Whether the ε of the budgets are: not of what is as released."""
    return not bool(cells["guarantee"].notna().any())


def row(
    method: str,
    epsilon: float | Literal["none"],
    seed: int,
    rate: float | None,
    status: str,
    reason: str | None,
    path: Path,
    summary: Mapping[str, Any],
) -> dict[str, Any]:
    """One cell: what defines it, what became of it, and all numbers of its summary."""
    noise = summary.get("noise_multiplier") or {}
    return {
        "method": method,
        "epsilon": epsilon,
        "seed": seed,
        "lr": rate,
        "status": status,
        **{name: summary.get(name) for name in _NUMBERS},
        "noise_multiplier_smallest": noise.get("smallest"),
        "noise_multiplier_largest": noise.get("largest"),
        "guarantee": summary.get("guarantee"),
        "release": summary.get("release"),
        "folder": path.as_posix(),
        "reason": reason,
    }


def frame(rows: Sequence[Mapping[str, Any]]) -> DataFrame:
    """The cells in long form, one row each; what is not known stays None."""
    return DataFrame(list(rows), dtype=object)


def statistics(cells: DataFrame) -> DataFrame:
    """Over the seeds of each method and budget, in the order of the grid and budgets ascending.

    Returns:
        Columns method, epsilon, mean and spread of the final accuracy in percent, n of the cells that ended, planned.
        The spread is the sample standard deviation, NaN for one seed.
    """
    found = []
    for method in cells["method"].unique():
        for epsilon in sorted(cells["epsilon"].unique(), key=lambda e: np.inf if e == "none" else e):
            group = cells[(cells["method"] == method) & (cells["epsilon"] == epsilon)]
            ended = 100 * group.loc[group["status"].isin(ENDED), "accuracy_after"].astype(float)
            found.append(
                {
                    "method": method,
                    "epsilon": epsilon,
                    "mean": ended.mean(),
                    "spread": ended.std(ddof=1),
                    "n": len(ended),
                    "planned": len(group),
                }
            )
    return DataFrame(found)


def table(
    cells: DataFrame, bold: Callable[[str], str], text: Callable[[str], str] = str, name: Callable[[str], str] = str
) -> DataFrame:
    """Methods × ε as text: mean ± spread in percent, a dash where no seed ended.

    Args:
        bold: marks the best of a column (where several methods ended; all that are equal as printed).
        text: escapes everything else.
        name: marks a method's name, which was escaped.
    """
    numbers, kept = statistics(cells), are_kept(cells)
    methods = numbers["method"].unique()
    shown: dict[str, list[str]] = {}
    for epsilon in numbers["epsilon"].unique():
        column, group = [], numbers[numbers["epsilon"] == epsilon]
        contested, best = (group["n"] > 0).sum() > 1, f"{group['mean'].max():.1f}"
        for _, each in group.iterrows():
            if not each["n"]:
                column.append(text("–"))
                continue
            entry = f"{each['mean']:.1f}" + (f" ± {each['spread']:.1f}" if each["n"] > 1 else "")
            entry += f" (n = {each['n']})" if each["n"] < each["planned"] else ""
            wins = contested and f"{each['mean']:.1f}" == best
            column.append(bold(text(entry)) if wins else text(entry))
        shown[text(budget_name(epsilon, kept=kept))] = column
    return DataFrame(shown, index=[name(text(method)) for method in methods]).rename_axis(text("method"))


def caption(example: RunConfig, cells: DataFrame, trials: DataFrame, common_rate: float | None) -> str:
    """What the table shows and what must be known to read it.

    Args:
        example: the configuration of one cell.
        cells: all of them.
        trials: of learning rates.
        common_rate: the learning rate where one was given for all cells.
    """
    federation, privacy, seeds = example.federation, example.privacy, sorted(cells["seed"].unique())
    drawn = f", {federation.clients_per_round} of them a round" if federation.clients_per_round else ""
    among = "" if federation.partition == "iid" else f" (Dirichlet {federation.dirichlet_alpha:g})"
    listed = ", ".join(map(str, seeds)) if len(seeds) <= 10 else f"{seeds[0]} to {seeds[-1]}"
    parts = [
        f"Accuracy after the last round, in percent of the validation data of {example.data.dataset}; model "
        f"{example.model.name}, {federation.clients} clients{among}{drawn}, {federation.rounds} rounds of "
        f"{federation.local_steps} local steps.",
        f"Mean ± sample standard deviation over n = {len(seeds)} seeds ({listed})."
        if len(seeds) > 1
        else f"One run each (n = 1, seed {listed}), so that nothing is known of the spread.",
    ]
    if cells["method"].nunique() > 1:
        parts.append("Best mean of a column in bold, which says nothing of significance.")
    if (cells["epsilon"] != "none").any():
        if privacy.mechanism == "as-released":
            parts.append(
                "No privacy guarantee (ε = ∞): this is what the authors' released code does; the ε of a column is what "
                "its noise is set for, and does not keep."
            )
        else:
            parts.append(f"ε at δ = {privacy.delta:g} for {UNITS[privacy.unit]}, of each run by itself.")
    if example.run.reproducible:
        parts.append(
            "Research only: batches and noise follow the seed, so that the guarantee does not hold; do not release."
        )
    before = 100 * cells.loc[cells["status"].isin(ENDED), "accuracy_before"].astype(float)
    if len(before):
        low, high = f"{before.min():.1f}", f"{before.max():.1f}"
        parts.append(f"Before training: {low if low == high else f'{low} to {high}'}.")
    parts.append(f"Learning rates: {_rates(cells, trials, common_rate)}.")
    if missing := int((~cells["status"].isin(ENDED)).sum()):
        parts.append(f"{missing} of {len(cells)} runs are missing.")
    if spent := int((cells["status"] == "budget spent").sum()):
        parts.append(f"In {spent} runs the budget was spent before the last planned round, after an interruption.")
    return " ".join(parts)


def _rates(cells: DataFrame, trials: DataFrame, common: float | None) -> str:
    if common is not None:
        return f"{common:g} for all"
    if not len(trials):
        return "each method's default for its ε"
    tried = sorted(trials["lr"].unique())
    chosen = cells.drop_duplicates(["method", "epsilon"])["lr"].dropna()
    words = (
        f"for each method at each ε the best of {', '.join(f'{rate:g}' for rate in tried)} by accuracy on these "
        f"validation data, one trial each with seed {trials['seed'].iloc[0]}"
    )
    ends = [
        f"{int((chosen == rate).sum())} of {len(chosen)} chose the {name}"
        for rate, name in ((tried[0], "smallest"), (tried[-1], "largest"))
    ]
    return words + (f" ({', '.join(ends)})" if len(tried) > 1 and len(chosen) else "")


def markdown(cells: DataFrame) -> str:
    """The table for a Markdown page."""
    shown = table(cells, lambda entry: f"**{entry}**", name=lambda entry: f"`{entry}`")
    return str(shown.to_markdown(disable_numparse=True))


def plain(cells: DataFrame) -> str:
    """The table for a console."""
    return str(table(cells, lambda entry: entry).to_markdown(disable_numparse=True, tablefmt="simple"))


def latex(cells: DataFrame, words: str) -> str:
    """The table for a paper; needs \\usepackage{booktabs}."""
    shown = table(cells, lambda entry: rf"\textbf{{{entry}}}", _escaped)
    text = shown.reset_index().to_latex(
        index=False,
        escape=False,
        column_format="l" + "c" * shown.shape[1],
        caption=_escaped(words),
        label="tab:comparison",
        position="t",
    )
    return "% \\usepackage{booktabs}\n" + text.replace("\\begin{table}[t]", "\\begin{table}[t]\n\\centering", 1)


def _escaped(text: str) -> str:
    return text.translate(_LATEX)


def write(folder: Path, cells: DataFrame, trials: DataFrame, words: str, failures: Mapping[str, str]) -> None:
    """Writes comparison.md, .csv (one row a cell), .tex and, where a cell has ended, .png; trials.csv where there are
    trials."""
    failed = "".join(f"- {cell}: {reason}\n" for cell, reason in failures.items())
    failed = f"\nFailed:\n\n{failed}" if failed else ""
    write_atomically(folder / "comparison.md", f"{markdown(cells)}\n\n{words}\n{failed}")
    write_atomically(folder / "comparison.csv", cells.to_csv(index=False))
    write_atomically(folder / "comparison.tex", latex(cells, words))
    if len(trials):
        write_atomically(folder / "trials.csv", trials.to_csv(index=False))
    if cells["status"].isin(ENDED).any():
        image = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            draw(cells).savefig(image, format="png", dpi=160)
        write_bytes_atomically(folder / "comparison.png", image.getvalue())


def draw(cells: DataFrame, size: tuple[float, float] = (8.0, 4.4)) -> Figure:
    """Mean accuracy against ε by method, with the spread over seeds; the caller sets the style.

    Budgets are drawn at equal distances. No line leads to "no privacy", which is no point on the axis of ε.
    """
    numbers = statistics(cells)
    budgets, methods = list(numbers["epsilon"].unique()), list(numbers["method"].unique())
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    before = 100 * cells.loc[cells["status"].isin(ENDED), "accuracy_before"].astype(float)
    axes.axhline(before.mean(), color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"before\n{before.mean():.1f} %",
        (1, before.mean()),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        color=QUIET,
        fontsize=9,
        annotation_clip=True,
    )
    step = min(0.1, 0.6 / len(methods))
    places_of: dict[str, np.ndarray] = {}
    for index, method in enumerate(methods):
        own = numbers[numbers["method"] == method]
        places = places_of[method] = np.arange(len(budgets)) + step * (index - (len(methods) - 1) / 2)
        mean, spread = own["mean"].to_numpy(float), np.nan_to_num(own["spread"].to_numpy(float))
        colour, marker = mark(index)
        axes.errorbar(
            places,
            mean,
            spread,
            color=colour,
            linestyle="none",
            marker=marker,
            markersize=6,
            markeredgewidth=0,
            elinewidth=1.6,
            label=method,
        )
        private = [place for place, budget in enumerate(budgets) if budget != "none"]
        axes.plot(places[private], mean[private], color=colour, linewidth=1.6, alpha=0.75)
    kept = are_kept(cells)
    axes.set_xticks(range(len(budgets)), [budget_name(budget, kept=kept) for budget in budgets], color=INK)
    axes.set_xlim(-0.5, len(budgets) - 0.5)
    axes.xaxis.grid(False)
    axes.tick_params(length=0)
    axes.margins(y=0.12)
    _keep_outliers_out(axes, numbers, budgets, places_of)
    most = int(numbers["n"].max())
    spread_words = f", mean ± standard deviation of {most} seeds" if most > 1 else ", one run each"
    marks = "".join(f"\n{words}" for words in marks_of(not kept, cells["release"].notna().any()))
    axes.set_title(f"Accuracy (%){spread_words}{marks}", fontsize=10)
    figure.legend(loc="outside lower left", ncols=min(len(methods), 4), frameon=False, fontsize=9.5)
    return figure


def _keep_outliers_out(axes: Any, numbers: DataFrame, budgets: list[Any], places_of: Mapping[str, np.ndarray]) -> None:
    """Where a few means lie far below all others, the axis ends above them and arrows say where they are."""
    means = numbers["mean"].dropna().to_numpy(float)
    low, high = np.quantile(means, (0.25, 0.75)) if len(means) else (0.0, 0.0)
    fence = low - 5 * max(high - low, 0.5)
    far = numbers[numbers["mean"] < fence]
    if not 0 < len(far) <= len(means) / 10:
        return
    near = numbers[numbers["mean"] >= fence]
    spread = np.nan_to_num(near["spread"].to_numpy(float))
    bottom, top = (near["mean"] - spread).min(), (near["mean"] + spread).max()
    bottom -= 0.25 * (top - bottom)
    axes.set_ylim(bottom, top + 0.1 * (top - bottom))
    for each in far.to_dict("records"):
        place = places_of[each["method"]][budgets.index(each["epsilon"])]
        axes.annotate(
            f"{each['mean']:.0f} ± {np.nan_to_num(each['spread']):.0f}",
            (place, bottom),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color=INK,
            fontsize=8,
        )
        axes.plot(place, bottom, marker="v", color=INK, markersize=6, clip_on=False)
