"""What the page of a comparison shows, from its folder."""

from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import yaml

from lora_dp.fed.compare import tables
from lora_dp.fed.compare.caption import caption
from lora_dp.fed.compare.grid import Grid
from lora_dp.fed.compare.measures import MEASURES
from lora_dp.fed.compare.options import Metric
from lora_dp.fed.compare.outcomes import Outcomes
from lora_dp.fed.page import figures
from lora_dp.fed.runs.folder import ENDED, read_results
from lora_dp.fed.runs.report import notes

# Of language models, and of classifiers.
_BY_ROUND = {True: "Perplexity by round", False: "Accuracy by round"}


def content(folder: Path) -> dict[str, Any]:
    """The variables of comparison.html.j2, of a grid that may still be running.

    Raises:
        ValueError: the definition is damaged, or does not fit this version.
    """
    grid = Grid.read(folder)
    outcomes = Outcomes(grid, folder)
    cells, trials = outcomes.cells_frame(), outcomes.trials_frame()
    ended, kept = cells["status"].isin(ENDED), tables.are_kept(cells)
    config = grid.example
    budgets = sorted(cells["epsilon"].unique(), key=lambda budget: float("inf") if budget == "none" else budget)
    return {
        "title": f"Comparison on {config.data.dataset}",
        "folder": folder.resolve().name,
        "methods": list(cells["method"].unique()),
        "budgets": [tables.budget_name(budget, kept=kept) for budget in budgets],
        "kept": kept,
        "seeds": sorted(cells["seed"].unique()),
        "count": len(cells),
        "finished": int(ended.sum()),
        "warnings": [text for text in notes(config).values() if text],
        "private": (cells["epsilon"] != "none").any() and config.privacy.mechanism == "sound",
        "metric": MEASURES[grid.metric].name,
        "table": _table(cells, grid.metric),
        "caption": caption(outcomes, cells),
        "plot": figures.grid(cells, grid.metric) if ended.any() else None,
        "curves": _curves(folder, cells[ended], budgets, grid.metric),
        "by_round": _BY_ROUND[grid.metric == "perplexity"],
        "cells": [_cell(folder, row, list(grid.searched)) for row in cells.to_dict("records")],
        "trials": [_cell(folder, row, list(grid.searched)) for row in trials.to_dict("records")],
        "failures": [
            {**row, "trial": of is trials}
            for of in (trials, cells)
            for row in of.to_dict("records")
            if row["status"] == "failed"
        ],
        "budget_name": tables.budget_name,
        "settings": yaml.safe_dump(grid.definition(), sort_keys=False, allow_unicode=True),
    }


def _curves(folder: Path, cells: Any, budgets: list[Any], metric: Metric) -> list[tuple[str, Any]]:
    """A figure a budget: the metric by round of every method, mean over seeds, where rounds between were evaluated."""
    found, causal = [], metric == "perplexity"
    for budget in budgets:
        lines: dict[str, tuple[list[int], list[float]]] = {}
        for method, rows in cells[cells["epsilon"] == budget].groupby("method", sort=False):
            runs = [
                {
                    result.round: result.perplexity if causal else result.accuracy
                    for result in read_results(folder / row)
                    if result.accuracy is not None
                }
                for row in rows["folder"]
            ]
            rounds = sorted(set.intersection(*(set(run) for run in runs)))
            lines[str(method)] = rounds, [float(np.mean([run[at] for run in runs])) for at in rounds]
        if any(len(rounds) > 2 for rounds, _ in lines.values()):
            name = tables.budget_name(budget, kept=tables.are_kept(cells))
            kind = "number" if causal else "percent"
            found.append((name, figures.curves(lines, f"{_BY_ROUND[causal]}, {name}", kind)))
    return found


def _table(cells: Any, metric: Metric) -> dict[str, Any]:
    """Column heads and rows (method, [(text, best)]); the best of a column is told by a mark that no text has."""
    mark = "\0"
    shown = tables.table(cells, metric, lambda entry: entry + mark)
    return {
        "head": list(shown.columns),
        "rows": [
            (method, [(entry.rstrip(mark), entry.endswith(mark)) for entry in row])
            for method, row in zip(shown.index, shown.to_numpy().tolist(), strict=True)
        ],
    }


def _cell(folder: Path, row: dict[str, Any], searched: list[str]) -> dict[str, Any]:
    """One cell with what was searched in words, and a link to its folder, or to its own page where it has one."""
    tuned = ", ".join(f"{name} {row[name]:g}" for name in searched if name != "lr" and row[name] is not None)
    page = Path(row["folder"]) / "report.html"
    target = page.as_posix() if (folder / page).exists() else f"{row['folder']}/"
    return {**row, "tuned": tuned, "link": quote(target), "exists": (folder / row["folder"]).exists()}
