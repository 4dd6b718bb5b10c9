"""Options of a comparison: its grid."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass
class CompareConfig:
    """The grid"""

    methods: list[str] = field(default_factory=lambda: ["la-lora", "dp-lora", "ffa-lora", "rolora"])
    """Methods to compare: the rows of the table."""
    epsilons: list[float | Literal["none"]] = field(default_factory=lambda: [1.0, 3.0, 8.0, "none"])
    """Budgets of every client, none for no privacy: the columns."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Each cell is run once with each of these; the table has mean and spread over them."""
    learning_rates: list[float] | None = None
    """Learning rates to try: each method at each ε is run once with each, on tuning_seed, and its cells take the rate
    with the best accuracy (with the lower loss where equal). By default lr, or the method's own."""
    tuning_seed: int = 100
    """Seed of those trials; none of seeds."""
    processes: int = 1
    """Runs at the same time, each in a process of its own with one thread for the CPU."""
    output: Path | None = None
    """Folder of the comparison, the same again to go on with it; by default runs/<time>-compare."""

    def __post_init__(self) -> None:
        self.epsilons = ["none" if e in ("none", "inf", None, float("inf")) else float(e) for e in self.epsilons]
        if self.processes < 1:
            raise ValueError(f"processes must be at least 1, not {self.processes}.")
        for name in ("methods", "epsilons", "seeds", "learning_rates"):
            values = getattr(self, name)
            if values is None:
                continue
            if not values:
                raise ValueError(f"{name} is empty: give at least one.")
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has {max(values, key=values.count)} twice: leave one out.")
        if self.learning_rates and self.tuning_seed in self.seeds:
            raise ValueError(
                f"tuning_seed {self.tuning_seed} is one of seeds: choose another, so that no run of the "
                "table has chosen its own learning rate."
            )
