"""What has become of the runs of a grid, read from their folders: what is to be run next, and what the search chose."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pandas import DataFrame

from lora_dp.fed.compare import tables
from lora_dp.fed.compare.grid import Budget, Cell, Grid
from lora_dp.fed.compare.measures import MEASURES
from lora_dp.fed.compare.search import DIVERGED, Places, Score, Standing
from lora_dp.fed.runs.folder import ENDED

FAILURES = "failures.json"
OTHER_SETTING = (
    "its folder holds a run with another setting than the search has chosen by now: move the folder away, and go on"
)
NO_SETTING = "every setting of its search diverged: search smaller ones in a new comparison"
NOT_COMPLETE = "its search is not complete: a trial failed, or is still to be run"


class Outcomes:
    """The runs of a grid as their folders tell of them; each is read once, and again after :meth:`refresh`.

    Args:
        grid: the comparison.
        folder: of it; need not exist.

    >>> from lora_dp.fed.compare.options import CompareConfig
    >>> search = {"lr": [0.1, 1.0]}
    >>> grid = Grid(CompareConfig(methods=["la-lora"], epsilons=[8.0], seeds=[0], search=search), {})
    >>> [str(cell) for cell, _ in Outcomes(grid, Path("none")).ready()][:2]
    ['la-lora, ε = 8, trial s0, seed 100', 'la-lora, ε = 8, trial s1, seed 100']
    """

    def __init__(self, grid: Grid, folder: Path) -> None:
        self.grid, self.folder = grid, folder
        self._known: dict[Cell, dict[str, Any]] = {}
        self._standings: dict[tuple[str, Budget], Standing] = {}

    def refresh(self, cell: Cell) -> None:
        """Reads a run's folder again when it is next asked for."""
        self._known.pop(cell, None)
        self._standings.pop((cell.method, cell.epsilon), None)

    def summary(self, cell: Cell) -> dict[str, Any]:
        """summary.json of a run; empty where there is none that can be read."""
        if cell not in self._known:
            self._known[cell] = _read_summary(self.folder / cell.path)
        return self._known[cell]

    def ended(self, cell: Cell) -> bool:
        """Whether a run has its result."""
        return self.summary(cell).get("status") in ENDED

    def diverged(self, cell: Cell) -> bool:
        """Whether a run stopped for want of usable updates, which is a result, too: it is not run again."""
        return self.summary(cell).get("status") == "stopped"

    def standing(self, method: str, epsilon: Budget) -> Standing:
        """How far the search of a method at a budget has come.

        Raises:
            KeyError: nothing is searched.
        """
        if (method, epsilon) not in self._standings:
            search, scores = self.grid.searches[method, epsilon], dict[str, Score]()
            before = -1
            while len(scores) > before:
                before, standing = len(scores), search.standing(scores)
                for setting in standing.settings:
                    if setting.name not in scores and (score := self._score(method, epsilon, setting.name)):
                        scores[setting.name] = score
            self._standings[method, epsilon] = standing
        return self._standings[method, epsilon]

    def _score(self, method: str, epsilon: Budget, setting: str) -> Score | None:
        found = []
        for seed in self.grid.tuning_seeds:
            cell = Cell(method, epsilon, seed, setting)
            if self.diverged(cell):
                return DIVERGED
            if self.ended(cell):
                summary = self.summary(cell)
                measure = MEASURES[self.grid.metric]
                found.append((measure.sign * summary[measure.after], summary["loss_after"]))
        if len(found) < len(self.grid.tuning_seeds):
            return None
        return -sum(metric for metric, _ in found) / len(found), sum(loss for _, loss in found) / len(found)

    def trials(self) -> list[tuple[Cell, Places]]:
        """All trials that are known by now with the places of their settings, in the order of the grid."""
        return [
            (Cell(method, epsilon, seed, setting.name), setting.places)
            for method, epsilon in self.grid.searches
            for setting in self.standing(method, epsilon).settings
            for seed in self.grid.tuning_seeds
        ]

    def left_out(self, cell: Cell) -> bool:
        """Whether a trial is not needed: with another seed its setting has diverged."""
        return not self.ended(cell) and any(
            self.diverged(Cell(cell.method, cell.epsilon, seed, cell.trial)) for seed in self.grid.tuning_seeds
        )

    def ready(self) -> Iterator[tuple[Cell, Places | None]]:
        """Runs that can be run and have no result, with their places: of a setting one seed after the other."""
        for method, epsilon in self.grid.searches:
            for setting in self.standing(method, epsilon).settings:
                seeds = [Cell(method, epsilon, seed, setting.name) for seed in self.grid.tuning_seeds]
                missing = [cell for cell in seeds if not self.ended(cell)]
                if missing and not any(self.diverged(cell) for cell in seeds):
                    yield missing[0], setting.places
        for cell in self.grid.cells:
            if not self.ended(cell) and not self.diverged(cell) and self.why_not(cell) is None:
                yield cell, self.places(cell)

    def places(self, cell: Cell) -> Places | None:
        """Of the setting that was chosen for a run of the table; None where nothing is searched, or chosen yet."""
        if (cell.method, cell.epsilon) not in self.grid.searches:
            return None
        best = self.standing(cell.method, cell.epsilon).best
        return None if best is None else best.places

    def why_not(self, cell: Cell) -> str | None:
        """Why a run of the table cannot be run or used as things stand; None where it can."""
        if (cell.method, cell.epsilon) not in self.grid.searches:
            return None
        standing = self.standing(cell.method, cell.epsilon)
        if standing.best is None:
            return NO_SETTING if standing.complete else NOT_COMPLETE
        has_result = self.ended(cell) or self.diverged(cell)
        return OTHER_SETTING if has_result and not self._as_chosen(cell, standing.best.places) else None

    def _as_chosen(self, cell: Cell, places: Places) -> bool:
        """Whether the run in a cell's folder had the setting that is chosen by now; more trials may choose another."""
        try:
            text = (self.folder / cell.path / "config.yaml").read_text(encoding="utf-8")
            written = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            chosen = self.grid.values(cell.method, cell.epsilon, places)
            return all(written[name] == value for name, value in chosen.items())
        except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
            return False

    def left(self) -> int:
        """How many runs have no result yet, as far as is known: widened ranges may bring more."""
        trials = [cell for cell, _ in self.trials() if not self.diverged(cell) and not self.left_out(cell)]
        return sum(not self.ended(cell) for cell in trials) + sum(
            not self.ended(cell) and not self.diverged(cell) for cell in self.grid.cells
        )

    def cells_frame(self) -> DataFrame:
        """One row a cell, in the order of the grid: its definition, its status, and all numbers of its summary."""
        return self._frame([(cell, self.places(cell)) for cell in self.grid.cells])

    def trials_frame(self) -> DataFrame:
        """The same of the trials."""
        return self._frame(self.trials())

    def _frame(self, runs: Sequence[tuple[Cell, Places | None]]) -> DataFrame:
        failures = read_failures(self.folder)
        rows = []
        for cell, places in runs:
            status, reason = self._status(cell, failures.get(cell.path.as_posix()))
            summary = self.summary(cell) if status in ENDED else {}
            known = {
                "method": cell.method,
                "epsilon": cell.epsilon,
                "seed": cell.seed,
                **self._setting(cell, places),
                "status": status,
            }
            rows.append(tables.row(known, reason, cell.path, summary))
        return tables.frame(rows)

    def _status(self, cell: Cell, failure: str | None) -> tuple[str, str | None]:
        """What has become of a run, in a word, and the reason where it failed."""
        has_result = self.ended(cell) or self.diverged(cell)
        if cell.trial is None and has_result and (other := self.why_not(cell)):
            return "failed", other
        if has_result:
            return (self.summary(cell)["status"] if self.ended(cell) else "diverged"), None
        if failure is not None:
            return "failed", failure
        return ("left out" if cell.trial is not None and self.left_out(cell) else "not finished"), None

    def _setting(self, cell: Cell, places: Places | None) -> dict[str, Any]:
        """The setting's name and the values of what is searched, and lr in any case; None where none is chosen yet."""
        if not self.grid.searches:
            return {"lr": self.grid.config(cell, None).optimization.lr}
        best = self.standing(cell.method, cell.epsilon).best
        config = None if places is None else self.grid.config(cell, places)
        values = {} if places is None else self.grid.values(cell.method, cell.epsilon, places)
        return {
            "setting": cell.trial or (best and best.name),
            "lr": config and config.optimization.lr,
            **{name: values.get(name) for name in self.grid.searched if name != "lr"},
        }


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def read_failures(folder: Path) -> dict[str, str]:
    """Why runs failed in the last call, by their folder within that of the comparison.

    >>> read_failures(Path("none"))
    {}
    """
    try:
        entries = json.loads((folder / FAILURES).read_text(encoding="utf-8"))
        return {entry["folder"]: entry["reason"] for entry in entries}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
