"""Options of a comparison: its grid, and the search of settings before it."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Metric = Literal["accuracy", "balanced-accuracy", "perplexity"]
# What the guarantee below a table is about.
_GUARANTEE = ("delta", "unit", "noise_by", "mechanism", "reproducible")


@dataclass
class CompareConfig:
    """The grid"""

    methods: list[str] = field(default_factory=lambda: ["la-lora", "dp-lora", "ffa-lora", "rolora"])
    """Methods to compare: the rows of the table."""
    epsilons: list[float | Literal["none"]] = field(default_factory=lambda: [1.0, 3.0, 8.0, "none"])
    """Budgets of every client, none for no privacy: the columns."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Each cell is run once with each of these; the table has mean and confidence interval over them."""
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further rows: by a name of your own, the options that differ from the others', as in
    --variants "{plain-mean: {method: head-only, averaging: none}}"."""
    metric: Metric | None = None
    """What settings are chosen by and the table shows: accuracy (of tokens, for language models), its mean over
    classes, or perplexity, which is the default with task causal-lm."""
    search: dict[str, list[float]] = field(default_factory=dict)
    """Ranges of numeric options to search at random, on a log scale, for each method at each ε by itself, as in
    --search.lr 0.3,10; lr_factor is in multiples of the method's own lr. By default nothing is searched."""
    search_trials: int = 8
    """Settings drawn for each method at each ε, a third more where the best is at the edge of a range."""
    search_seed: int = 0
    """Seed of these draws, which are the same for all methods."""
    tuning_seeds: list[int] = field(default_factory=lambda: [100, 101])
    """Every setting is run with each of these; none of seeds."""
    processes: int = 1
    """Runs at the same time, each in a process of its own with one thread for the CPU."""
    minutes: float | None = None
    """No run begins after so many minutes; the next call goes on. By default no limit."""
    output: Path | None = None
    """Folder of the comparison, the same again to go on with it; by default runs/<time>-compare."""

    def __post_init__(self) -> None:
        self.epsilons = ["none" if e in ("none", "inf", None, float("inf")) else float(e) for e in self.epsilons]
        for name in ("processes", "search_trials"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.search_seed < 0:
            raise ValueError(f"search_seed must not be negative, not {self.search_seed}.")
        if self.minutes is not None and not self.minutes >= 0:
            raise ValueError(f"minutes must not be negative, not {self.minutes}.")
        for name in ("methods", "epsilons", "seeds", "tuning_seeds"):
            values = getattr(self, name)
            if not values and not (name == "methods" and self.variants):
                raise ValueError(f"{name} is empty: give at least one.")
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has {max(values, key=values.count)} twice: leave one out.")
        for name, options in self.variants.items():
            self._check_variant(name, options)
        for name, ends in self.search.items():
            if len(ends) != 2 or not 0 < ends[0] < ends[1] < float("inf"):
                raise ValueError(
                    f"search gives {name} as {ends}: give the two ends of its range, as in [0.1, 10], both positive."
                )
        if self.search and (shared := set(self.tuning_seeds) & set(self.seeds)):
            raise ValueError(
                f"tuning_seeds and seeds both have {min(shared)}: leave it out of one, so that no run of the table has "
                "chosen its own setting."
            )

    def _check_variant(self, name: str, options: dict[str, Any]) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name) or name in self.methods:
            raise ValueError(
                f"variants has {name!r}: give a name of letters, digits and ._+- alone, which is none of methods, and "
                "put what looks like a number or a truth value in quotes."
            )
        if not isinstance(options, dict) or "method" not in options:
            raise ValueError(
                f"variants gives {name} no method: give it its options, as in {{method: head-only, rounds: 10}}."
            )
        searched = {"lr" if option == "lr_factor" else option for option in self.search}
        if found := options.keys() & {"epsilon", "seed", "output", *searched}:
            raise ValueError(f"The grid sets {min(found)} of its cells: leave it out of the variant {name}.")
        if found := options.keys() & set(_GUARANTEE):
            raise ValueError(
                f"The variant {name} has a {min(found)} of its own, but a table has one guarantee: give it for all "
                "rows, or compare in another table."
            )
