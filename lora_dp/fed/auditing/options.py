"""Options of an audit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from lora_dp.fed.config import RunConfig
from lora_dp.fed.option_types import check_types

TRAININGS = 100


@dataclass
class AuditConfig:
    """The audit

    Attributes:
        target: the configuration: a run's config.yaml, its folder, or any YAML file of a run's options.
    """

    target: Path
    canaries: Literal["planted", "examples"] = "planted"
    """planted (white box): gradients in every private step of the client with the largest ε, or with whole clients
    protected, clients' updates. examples (black box): mislabelled examples, scored by the final model's loss."""
    count: int | None = None
    """Canaries in each training; by default 1000 gradients, 200 clients or 100 examples (or as many as fit), and one
    for two-world."""
    test: Literal["one-run", "two-world"] = "one-run"
    """one-run: one training with many canaries; two-world: many trainings, with and without one canary."""
    assume: Literal["nothing", "gaussian", "independent", "independent gaussian"] | None = None
    """What the bound takes for granted (docs/how-to/auditing.md); by default that canaries leak independently where
    gradients or clients are planted in one run, else nothing."""
    confidence: float = 0.95
    """Of the lower bound and of the verdict."""
    runs: int = TRAININGS
    """Trainings of two-world, a multiple of 4. A hundred reach ε = 1.8 at most, four hundred 3.3."""
    seed: int | None = None
    """Of which canaries take part and where gradients are planted; batches and noise are secret all the same."""
    output: Path | None = None
    """Folder for audit.json and audit.png; by default that of the configuration. With examples as canaries they are
    private, and go beside a run's folder."""

    def __post_init__(self) -> None:
        check_types(self)
        self.target = Path(self.target)
        if self.target.is_dir():
            self.target /= "config.yaml"
        if self.assume is None:
            sharp = self.canaries == "planted" and self.test == "one-run"
            self.assume = "independent" if sharp else "nothing"
        if self.count is not None and self.count < 1:
            raise ValueError(f"count must be at least 1, not {self.count}.")
        if self.test == "two-world" and self.count not in (None, 1):
            raise ValueError(f"two-world has one canary, not {self.count}: leave count out, or take one-run.")


def read_options(path: Path) -> RunConfig:
    """The configuration in a YAML file of a run's options, with secret noise: that is what keeps the claim.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} cannot be read: name a run's folder, its config.yaml, or a YAML file of options."
        ) from error
    if not isinstance(options, dict | None):
        raise ValueError(f'{path} holds no options of a run: write them as "name: value", one a line.')
    options = {str(name): value for name, value in (options or {}).items() if name != "output"}
    try:
        return RunConfig.from_flat({**options, "reproducible": False})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} holds a value of the wrong kind ({error}): compare it with a run's config.yaml."
        ) from error
