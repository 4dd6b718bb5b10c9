"""A grid of runs, rows × ε × seeds: its cells, the trials of settings before them, and how each is configured."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from lora_dp.fed.compare import tables
from lora_dp.fed.compare.options import CompareConfig, Metric
from lora_dp.fed.compare.search import MOST_OPTIONS, Places, Search
from lora_dp.fed.config import RunConfig
from lora_dp.fed.did_you_mean import closest
from lora_dp.fed.models.options import ModelConfig
from lora_dp.fed.run_options import FederationConfig, OptimizationConfig, PrivacyConfig

DEFINITION = "compare.yaml"
LR_FACTOR = "lr_factor"
_OWN = ("methods", "variants", "epsilons", "seeds", "metric", "search", "search_trials", "search_seed", "tuning_seeds")
_BY_GRID = ("method", "epsilon", "seed", "output")
# What they say is the problem, not how a method solves it.
_PROBLEM = ("epsilon", "delta", "clients", "dirichlet_alpha", "client_timeout")
Budget = float | Literal["none"]


@dataclass(frozen=True)
class Cell:
    """One run of a comparison, or a trial before it.

    Attributes:
        method: or the name of a variant.
        trial: name of the setting that is tried; None for a run of the table.

    >>> Cell("la-lora", 8.0, 100, "s3").path.as_posix()
    'trials/la-lora/eps8/s3/seed100'
    """

    method: str
    epsilon: Budget
    seed: int
    trial: str | None = None

    @property
    def path(self) -> Path:
        """Its folder, within that of the comparison."""
        budget = "none" if self.epsilon == "none" else f"{self.epsilon:.12g}"
        place = Path(self.method.replace(":", "-")) / f"eps{budget}"
        if self.trial is None:
            return "cells" / place / f"seed{self.seed}"
        return "trials" / place / self.trial / f"seed{self.seed}"

    def __str__(self) -> str:
        what = f"seed {self.seed}" if self.trial is None else f"trial {self.trial}, seed {self.seed}"
        return f"{self.method}, {tables.budget_name(self.epsilon)}, {what}"


class Grid:
    """All cells of a comparison, and what they have in common.

    Args:
        config: methods, variants, budgets, seeds and what is searched.
        common: options of a run as :meth:`~lora_dp.fed.RunConfig.from_flat` takes them, without those that
            the grid sets.

    Attributes:
        cells: the runs of the table.
        searches: of each method and budget; empty where nothing is searched.
        common: as given: what is left out, each method may choose.
        variants: as given, by name.

    Raises:
        ValueError: an option that the grid sets, one that cannot be searched, or one that does not fit a cell, which
            is named.

    >>> grid = Grid(CompareConfig(epsilons=[8.0], search={"lr_factor": [0.1, 10]}, search_trials=4), {"rounds": 5})
    >>> len(grid.cells), sorted(grid.searches)[0]
    (12, ('dp-lora', 8.0))
    >>> grid.values("dp-lora", 8.0, {"lr_factor": 1.0})  # ten times its own rate, which is 0.5
    {'lr': 5.0}
    """

    def __init__(self, config: CompareConfig, common: Mapping[str, Any]) -> None:
        if found := [name for name in _BY_GRID if name in common]:
            raise ValueError(f"The grid sets {found[0]} of its cells: leave it out of the common options.")
        self.variants, rows = config.variants, [*config.methods, *config.variants]
        self.cells = [Cell(row, e, s) for row in rows for e in config.epsilons for s in config.seeds]
        self.common = dict(common)
        self.tuning_seeds, self._ranges = list(config.tuning_seeds), config.search
        writes = common.get("task") == "causal-lm"
        self.metric: Metric = config.metric or ("perplexity" if writes else "accuracy")
        if (self.metric == "perplexity") != writes and self.metric != "accuracy":
            raise ValueError(
                f"metric {self.metric} is for task {'causal-lm' if self.metric == 'perplexity' else 'classification'}: "
                "set task, or choose accuracy, which a language model has of its tokens."
            )
        self._whole = _searchable()
        self._check_search()
        self._own = {name: getattr(config, name) for name in _OWN} | {"metric": self.metric}
        groups = [(row, e) for row in rows for e in config.epsilons] if self._ranges else []
        self.searches = {
            (method, epsilon): Search(
                list(self._ranges),
                config.search_trials,
                config.search_seed,
                functools.partial(self._fits, method, epsilon),
            )
            for method, epsilon in groups
        }
        self._check_cells()

    def _check_search(self) -> None:
        for name in self._ranges:
            if name != LR_FACTOR and name not in self._whole:
                meant = closest(name, [*self._whole, LR_FACTOR])
                raise ValueError(
                    f"search cannot have {name}{f' (did you mean {meant}?)' if meant else ''}: give numeric options "
                    "of training, or lr_factor."
                )
            given = "lr" if name == LR_FACTOR else name
            if given in self.common:
                raise ValueError(f"{given} and search's {name} were both given: leave one out.")
        if LR_FACTOR in self._ranges and "lr" in self._ranges:
            raise ValueError("search has both lr and lr_factor: leave one out.")
        if len(self._ranges) > MOST_OPTIONS:
            raise ValueError(f"search has {len(self._ranges)} options: leave some out, {MOST_OPTIONS} are the most.")

    def _check_cells(self) -> None:
        """All that can be known before the first run is checked before it."""
        # A disk may tell no capitals from small letters.
        paths = {cell.path.as_posix().lower() for cell in self.cells}
        if len(paths) < len(self.cells):
            raise ValueError(
                "Two cells of the grid would share a folder: rename a variant, or leave out methods or budgets nearly "
                "alike."
            )
        refused = []
        for cell in self.cells:
            try:
                self._check(cell, None)
            except ValueError as error:
                refused.append((cell, error))
        if refused:
            first = refused[0][1]
            named = dict.fromkeys(f"{cell.method}, {tables.budget_name(cell.epsilon)}" for cell, _ in refused)
            others = list(named)[1:] if len(refused) < len(self.cells) else []
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            raise ValueError(f"{first} Nor can {'; '.join(others[:3])}{more}." if others else str(first)) from first
        for (method, epsilon), search in self.searches.items():
            for setting in search.standing({}).settings:
                for seed in self.tuning_seeds:
                    self._check(Cell(method, epsilon, seed, setting.name), setting.places)

    def _check(self, cell: Cell, places: Places | None) -> None:
        try:
            self.config(cell, places)
        except ValueError as error:
            raise ValueError(f"The cell {cell} cannot be run: {error}") from error

    def _fits(self, method: str, epsilon: Budget, places: Places) -> bool:
        try:
            self.config(Cell(method, epsilon, 0), places)
        except ValueError:
            return False
        return True

    def values(self, method: str, epsilon: Budget, places: Places) -> dict[str, Any]:
        """The options that stand at some places of the search, four digits each.

        Args:
            places: by option, 0 and 1 at the ends of its range.
        """
        found: dict[str, Any] = {}
        for name, place in places.items():
            low, high = self._ranges[name]
            value = low * (high / low) ** place
            if name == LR_FACTOR:
                own = self._run(method, epsilon, 0, {}).optimization.lr
                assert own is not None
                found["lr"] = float(f"{value * own:.4g}")
            else:
                found[name] = round(value) if self._whole[name] else float(f"{value:.4g}")
        return found

    def config(self, cell: Cell, places: Places | None) -> RunConfig:
        """The configuration of a cell or a trial at some places of the search; None where nothing is searched.

        Raises:
            ValueError: an option does not fit.
        """
        tuned = {} if places is None else self.values(cell.method, cell.epsilon, places)
        return self._run(cell.method, cell.epsilon, cell.seed, tuned)

    def _run(self, method: str, epsilon: Budget, seed: int, tuned: Mapping[str, Any]) -> RunConfig:
        own = self.variants.get(method, {"method": method})
        return RunConfig.from_flat({**self.common, **own, "epsilon": epsilon, "seed": seed, **tuned})

    @property
    def example(self) -> RunConfig:
        """The configuration of one cell, for what all have in common."""
        return self._run(self.cells[0].method, self.cells[0].epsilon, self.cells[0].seed, {})

    @property
    def searched(self) -> dict[str, tuple[str, list[float]]]:
        """For each option of a run that is searched, its name in search, and the range."""
        return {"lr" if name == LR_FACTOR else name: (name, list(ends)) for name, ends in self._ranges.items()}

    def definition(self) -> dict[str, Any]:
        """Everything that defines the results, as plain values."""
        plain = json.loads(json.dumps({**self._own, **self.common}, default=str))
        return {str(name): value for name, value in plain.items()}

    @classmethod
    def read(cls, folder: Path) -> "Grid":
        """The grid of an existing comparison.

        Raises:
            ValueError: there is none, or its definition is damaged or of an earlier version.
        """
        given = read_definition(folder)
        own = {name: given.pop(name) for name in _OWN if name in given}
        return cls(CompareConfig(**own), given)


def _searchable() -> dict[str, bool]:
    """Numeric options that are a method's to choose, and whether each takes whole numbers alone."""
    found = {}
    for kind in (FederationConfig, PrivacyConfig, OptimizationConfig, ModelConfig):
        for name, hint in get_type_hints(kind).items():
            kinds = set(get_args(hint) or (hint,))
            if kinds & {int, float} and get_origin(hint) is not list and name not in _PROBLEM:
                found[name] = float not in kinds
    return found


def own_defaults() -> dict[str, Any]:
    """The same of the grid's own options.

    >>> own_defaults()["search_trials"]
    8
    """
    config = CompareConfig()
    return {name: getattr(config, name) for name in _OWN}


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
