"""A grid of runs, methods × ε × seeds: which cells there are, what tunes them, and what has become of them."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pandas import DataFrame

from lora_dp.fed.compare import tables
from lora_dp.fed.compare.options import CompareConfig
from lora_dp.fed.config import RunConfig
from lora_dp.fed.runs.folder import ENDED

DEFINITION = "compare.yaml"
FAILURES = "failures.json"
_OWN = ("methods", "epsilons", "seeds", "learning_rates", "tuning_seed")
_BY_GRID = ("method", "epsilon", "seed", "output")
Budget = float | Literal["none"]


@dataclass(frozen=True)
class Cell:
    """One run of a comparison, or a trial of a learning rate before it."""

    method: str
    epsilon: Budget
    seed: int
    trial: float | None = None

    @property
    def path(self) -> Path:
        """Its folder, within that of the comparison."""
        budget = "none" if self.epsilon == "none" else f"{self.epsilon:.12g}"
        place = Path(self.method.replace(":", "-")) / f"eps{budget}"
        if self.trial is None:
            return "cells" / place / f"seed{self.seed}"
        return "trials" / place / f"lr{self.trial:.12g}"

    def __str__(self) -> str:
        what = f"seed {self.seed}" if self.trial is None else f"trial of lr {self.trial:g}"
        return f"{self.method}, {tables.budget_name(self.epsilon)}, {what}"


class Grid:
    """All cells of a comparison, and what they have in common.

    Args:
        config: methods, budgets and seeds.
        common: options of a run as :meth:`~lora_dp.fed.RunConfig.from_flat` takes them, without those that
            the grid sets.

    Raises:
        ValueError: an option that the grid sets, or one that does not fit a cell, which is named.
    """

    def __init__(self, config: CompareConfig, common: Mapping[str, Any]) -> None:
        if found := [name for name in _BY_GRID if name in common]:
            raise ValueError(f"The grid sets {found[0]} of its cells: leave it out of the common options.")
        self.rates = config.learning_rates or []
        if self.rates and common.get("lr") is not None:
            raise ValueError("lr and learning_rates were both given: leave one out.")
        self.cells = [Cell(m, e, s) for m in config.methods for e in config.epsilons for s in config.seeds]
        self.trials = [
            Cell(m, e, config.tuning_seed, rate) for m in config.methods for e in config.epsilons for rate in self.rates
        ]
        self.common = {**defaults(), **common}
        self._own = {name: getattr(config, name) for name in _OWN}
        for cell in self.trials + self.cells:
            try:
                self.config(cell, cell.trial)
            except ValueError as error:
                raise ValueError(f"The cell {cell} cannot be run: {error}") from error
        everything = self.trials + self.cells
        if len({cell.path for cell in everything}) < len(everything):
            raise ValueError("Two cells of the grid would share a folder: leave out methods or budgets nearly alike.")

    def config(self, cell: Cell, rate: float | None) -> RunConfig:
        """The configuration of a cell or a trial, at a learning rate, or at that of the common options or the method.

        Raises:
            ValueError: an option does not fit.
        """
        tuned = {} if rate is None else {"lr": rate}
        return RunConfig.from_flat(
            {**self.common, "method": cell.method, "epsilon": cell.epsilon, "seed": cell.seed, **tuned}
        )

    def chosen_rate(self, folder: Path, cell: Cell) -> float | None:
        """What the trials of a cell's method and budget chose, or None: nothing was to be tried, or not all trials
        have ended. One that stopped for want of usable updates has diverged, and is not chosen."""
        found = []
        for trial in self.trials:
            if (trial.method, trial.epsilon) == (cell.method, cell.epsilon):
                summary = _summary(folder / trial.path)
                if summary.get("status") in ENDED:
                    found.append((-summary["accuracy_after"], summary["loss_after"], trial.trial))
                elif summary.get("status") != "stopped":
                    return None
        return min(found)[2] if found else None

    @property
    def example(self) -> RunConfig:
        """The configuration of one cell, for what all have in common."""
        return self.config(self.cells[0], None)

    def definition(self) -> dict[str, Any]:
        """Everything that defines the results, as plain values."""
        plain = json.loads(json.dumps({**self._own, **self.common}, default=str))
        return {str(name): value for name, value in plain.items()}

    @classmethod
    def read(cls, folder: Path) -> "Grid":
        """The grid of an existing comparison.

        Raises:
            ValueError: there is none, or its definition is damaged.
        """
        given = read_definition(folder)
        own = {name: given.pop(name) for name in _OWN if name in given}
        return cls(CompareConfig(**own), given)


def ended_summary(path: Path) -> dict[str, Any] | None:
    """The summary of a cell that has ended, else None."""
    summary = _summary(path)
    return summary if summary.get("status") in ENDED else None


def _summary(path: Path) -> dict[str, Any]:
    """summary.json of a run's folder; empty where there is none that can be read."""
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def read_failures(folder: Path) -> dict[str, str]:
    """Why cells failed in the last call, by their folder within that of the comparison."""
    try:
        entries = json.loads((folder / FAILURES).read_text(encoding="utf-8"))
        return {entry["folder"]: entry["reason"] for entry in entries}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def read_cells(grid: Grid, folder: Path) -> DataFrame:
    """One row a cell, in the order of the grid: its definition, its status, and all numbers of its summary."""
    return _read(grid, grid.cells, folder)


def read_trials(grid: Grid, folder: Path) -> DataFrame:
    """The same of the trials of learning rates."""
    return _read(grid, grid.trials, folder)


def _read(grid: Grid, cells: Sequence[Cell], folder: Path) -> DataFrame:
    failures = read_failures(folder)
    rows = []
    for cell in cells:
        summary = ended_summary(folder / cell.path)
        reason = failures.get(cell.path.as_posix()) if summary is None else None
        status = summary["status"] if summary else "failed" if reason else "not finished"
        rate = grid.chosen_rate(folder, cell) if cell.trial is None else cell.trial
        if rate is None and not grid.rates:
            rate = grid.config(cell, None).optimization.lr
        rows.append(tables.row(cell.method, cell.epsilon, cell.seed, rate, status, reason, cell.path, summary or {}))
    return tables.frame(rows)


def grid_caption(grid: Grid, cells: DataFrame, trials: DataFrame) -> str:
    """What the table shows, and what must be known to read it.

    Args:
        cells: of :func:`read_cells`.
        trials: of :func:`read_trials`.
    """
    return tables.caption(grid.example, cells, trials, common_rate=grid.common.get("lr"))


def defaults() -> dict[str, Any]:
    """The options of a run that cells have in common, as flat options."""
    found: dict[str, Any] = {}
    for group in dataclasses.fields(RunConfig):
        kind: Any = group.default_factory
        values = vars(kind())
        found |= {"model": values.pop("name"), **values} if group.name == "model" else values
    return {name: value for name, value in found.items() if name not in _BY_GRID}


def read_definition(folder: Path) -> dict[str, Any]:
    """What compare.yaml holds.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        given = yaml.safe_load((folder / DEFINITION).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{folder} holds no comparison ({DEFINITION} is missing or cannot be read): name another."
        ) from error
    if not isinstance(given, dict):
        raise ValueError(f"{folder / DEFINITION} is no definition of a comparison: restore it from a backup.")
    return given
