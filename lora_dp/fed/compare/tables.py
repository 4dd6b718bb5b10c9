"""The table of a comparison, methods × ε, as Markdown, CSV and LaTeX."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pandas import DataFrame

from lora_dp.atomic_files import write_atomically
from lora_dp.extras import require
from lora_dp.fed.compare.measures import MEASURES
from lora_dp.fed.compare.options import Metric
from lora_dp.fed.compare.significance import against_best, half_width
from lora_dp.fed.runs.folder import ENDED

# What pandas asks for at the end, for tables in Markdown and LaTeX.
for _package in ("tabulate", "jinja2"):
    require("lora_dp.fed", _package, "fed")

# Behind what cannot be told from the best.
TIED = "†"
_NUMBERS = (
    "rounds",
    "accuracy_before",
    "accuracy_after",
    "balanced_accuracy_before",
    "balanced_accuracy_after",
    "loss_before",
    "loss_after",
    "perplexity_before",
    "perplexity_after",
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
        "†": r"$\dagger$",
        "σ": r"$\sigma$",
        "×": r"$\times$",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': "''",
    }
)


def budget_name(epsilon: float | Literal["none"], *, kept: bool = True) -> str:
    """As in the head of a column; where ε is not kept, it only sets the noise."""
    if epsilon == "none":
        return "no privacy"
    return f"ε = {epsilon:g}" if kept else f"ε = ∞ (set for {epsilon:g})"


def are_kept(cells: DataFrame) -> bool:
    """Whether the ε of the budgets are: not of what is as released."""
    return not bool(cells["guarantee"].notna().any())


def row(known: Mapping[str, Any], reason: str | None, path: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """One run: what defines it, what became of it, and all numbers of its summary.

    Args:
        known: method, epsilon, seed, setting and status.
        reason: why it failed, if it did.
        path: of its folder.
        summary: of a run that ended; else empty.

    >>> row({"method": "deer"}, None, Path("cells/deer"), {"rounds": 20})["rounds"]
    20
    """
    noise = summary.get("noise_multiplier") or {}
    return {
        **known,
        **{name: summary.get(name) for name in _NUMBERS if name not in known},
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


def statistics(cells: DataFrame, metric: Metric) -> DataFrame:
    """Over the seeds of each method and budget, in the order of the grid and budgets ascending.

    Returns:
        Columns method, epsilon; mean and half the width of its 95 % confidence interval, as shown; n of the cells that
        ended, planned; p of the paired test against the best of the budget and its pairs, None where there is no
        test. The interval is NaN for one seed.
    """
    found, measure = [], MEASURES[metric]
    methods = list(cells["method"].unique())
    for epsilon in sorted(cells["epsilon"].unique(), key=lambda e: np.inf if e == "none" else e):
        column = cells[cells["epsilon"] == epsilon]
        results = {
            method: dict(zip(group["seed"], measure.factor * group[measure.after].astype(float), strict=True))
            for method, group in column[column["status"].isin(ENDED)].groupby("method", sort=False)
        }
        # By how good they are, with the best on top.
        goodness = {method: {s: measure.sign * value for s, value in own.items()} for method, own in results.items()}
        tests = against_best(goodness)
        for method in methods:
            values = list(results.get(method, {}).values())
            test = tests.get(method)
            found.append(
                {
                    "method": method,
                    "epsilon": epsilon,
                    "mean": np.mean(values) if values else np.nan,
                    "half_width": half_width(values),
                    "n": len(values),
                    "planned": int((column["method"] == method).sum()),
                    "p": test and test.p,
                    "pairs": test and test.pairs,
                    "tied": test is not None and not test.distinguishable,
                }
            )
    order = {method: place for place, method in enumerate(methods)}
    return DataFrame(found).sort_values("method", key=lambda names: names.map(order), kind="stable", ignore_index=True)


def table(
    cells: DataFrame,
    metric: Metric,
    bold: Callable[[str], str],
    text: Callable[[str], str] = str,
    name: Callable[[str], str] = str,
) -> DataFrame:
    """Methods × ε as text: mean ± half of its 95 % confidence interval, a dash where no seed ended.

    Args:
        bold: marks the best of a column (where several methods ended; all that are equal as printed).
        text: escapes everything else.
        name: marks a method's name, which was escaped.
    """
    numbers, kept, measure = statistics(cells, metric), are_kept(cells), MEASURES[metric]
    methods = numbers["method"].unique()
    shown: dict[str, list[str]] = {}
    for epsilon in numbers["epsilon"].unique():
        column, group = [], numbers[numbers["epsilon"] == epsilon]
        contested = (group["n"] > 0).sum() > 1
        best = measure.number(group["mean"].max() if measure.sign > 0 else group["mean"].min())
        for _, each in group.iterrows():
            if not each["n"]:
                column.append(text("–"))
                continue
            mean, half = measure.number(each["mean"]), measure.number(each["half_width"])
            entry = mean + (f" ± {half}" if each["n"] > 1 else "")
            entry += TIED if each["tied"] else ""
            entry += f" (n = {each['n']})" if each["n"] < each["planned"] else ""
            wins = contested and mean == best
            column.append(bold(text(entry)) if wins else text(entry))
        shown[text(budget_name(epsilon, kept=kept))] = column
    return DataFrame(shown, index=[name(text(method)) for method in methods]).rename_axis(text("method"))


def markdown(cells: DataFrame, metric: Metric) -> str:
    """The table for a Markdown page."""
    shown = table(cells, metric, lambda entry: f"**{entry}**", name=lambda entry: f"`{entry}`")
    return str(shown.to_markdown(disable_numparse=True))


def plain(cells: DataFrame, metric: Metric) -> str:
    """The table for a console."""
    return str(table(cells, metric, lambda entry: entry).to_markdown(disable_numparse=True, tablefmt="simple"))


def latex(cells: DataFrame, metric: Metric, words: str) -> str:
    """The table for a paper; needs \\usepackage{booktabs}."""
    shown = table(cells, metric, lambda entry: rf"\textbf{{{entry}}}", _escaped)
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


def with_intervals(cells: DataFrame, metric: Metric) -> DataFrame:
    """The cells, each with the mean of its method and budget, the ends of its 95 % confidence interval, and p of the
    paired test against the best."""
    numbers, factor = statistics(cells, metric), MEASURES[metric].factor
    added = numbers[["method", "epsilon"]].assign(
        mean=numbers["mean"] / factor,
        interval_low=(numbers["mean"] - numbers["half_width"]) / factor,
        interval_high=(numbers["mean"] + numbers["half_width"]) / factor,
        p_against_best=numbers["p"],
    )
    return cells.merge(added, on=["method", "epsilon"], how="left")


def write(
    folder: Path, cells: DataFrame, trials: DataFrame, metric: Metric, words: str, failures: Mapping[str, str]
) -> None:
    """Writes comparison.md, .csv (one row a cell) and .tex; trials.csv where there are trials."""
    failed = "".join(f"- {cell}: {reason}\n" for cell, reason in failures.items())
    failed = f"\nFailed:\n\n{failed}" if failed else ""
    write_atomically(folder / "comparison.md", f"{markdown(cells, metric)}\n\n{words}\n{failed}")
    write_atomically(folder / "comparison.csv", with_intervals(cells, metric).to_csv(index=False))
    write_atomically(folder / "comparison.tex", latex(cells, metric, words))
    if len(trials):
        write_atomically(folder / "trials.csv", trials.to_csv(index=False))
