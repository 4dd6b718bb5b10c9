"""The configuration of a run: typed groups of options, flat on the command line and in a YAML file."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from lora_dp.fed.data import DataConfig
from lora_dp.fed.methods import get_method
from lora_dp.fed.models import ModelConfig

# A common starting point, not tuned.
ADAMW_LEARNING_RATE = 1e-3


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass
class FederationConfig:
    """The federation"""

    method: str = "la-lora"
    """How clients train and the server combines: la-lora, dp-lora, ffa-lora or rolora."""
    clients: int = 5
    """Number of clients that the training data are spread over."""
    clients_per_round: int | None = None
    """Clients drawn at random for each round; by default all take part."""
    rounds: int = 20
    """Rounds of training and averaging."""
    local_steps: int = 10
    """Private optimizer steps that a client takes in a round."""
    batch_size: int = 64
    """Expected size of a Poisson-sampled batch: each of a client's n examples joins with probability batch_size / n."""
    partition: Literal["iid", "dirichlet"] = "iid"
    """How examples are spread: alike everywhere, or with label shares drawn from a Dirichlet distribution."""
    dirichlet_alpha: float = 1.0
    """Concentration of that Dirichlet distribution: the smaller, the more the clients differ."""
    weighting: Literal["examples", "equal"] = "examples"
    """Clients' weights in the average: by their number of examples (which is taken to be public), or equal."""

    def __post_init__(self) -> None:
        get_method(self.method)
        for name in ("clients", "rounds", "local_steps", "batch_size"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be at least 1, not {value}.")
        if self.clients_per_round is not None:
            _require(
                1 <= self.clients_per_round <= self.clients,
                f"clients_per_round must be from 1 to the number of clients ({self.clients}), "
                f"not {self.clients_per_round}.",
            )
        _require(self.dirichlet_alpha > 0, f"dirichlet_alpha must be positive, not {self.dirichlet_alpha}.")

    @property
    def participations(self) -> int:
        """Rounds that each client budgets for: its even share of all places, rounded up."""
        return math.ceil(self.rounds * (self.clients_per_round or self.clients) / self.clients)


@dataclass
class PrivacyConfig:
    """Privacy of each client's examples"""

    epsilon: float | Literal["none", "inf"] | None = 8.0
    """Budget of every client for the whole run (add or remove one example); none switches privacy off."""
    delta: float = 1e-5
    """Probability with which that guarantee may fail; well below 1 / (examples of a client)."""
    max_grad_norm: float = 1.0
    """Largest norm of one example's gradient after clipping."""
    clipping: Literal["automatic", "flat", "per_layer"] = "automatic"
    """automatic: normalise every example's gradient; flat: shrink the long ones; per_layer: shrink layer by layer."""
    accountant: Literal["pld", "rdp"] = "pld"
    """How steps are composed: privacy loss distributions (tight), or Rényi (faster)."""

    def __post_init__(self) -> None:
        if self.epsilon in ("none", "inf", math.inf):
            self.epsilon = None
        if self.epsilon is not None:
            _require(float(self.epsilon) > 0, f"epsilon must be positive (or none), not {self.epsilon}.")
        _require(0 < self.delta < 1, f"delta must lie between 0 and 1, not {self.delta}: try 1e-5.")
        _require(
            0 < self.max_grad_norm < math.inf, f"max_grad_norm must be positive and finite, not {self.max_grad_norm}."
        )

    @property
    def target(self) -> float | None:
        """The budget, or None without privacy."""
        return None if self.epsilon is None else float(self.epsilon)


@dataclass
class OptimizationConfig:
    """Local optimisation"""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """A client's optimizer; its state starts anew in every round."""
    lr: float | None = None
    """Learning rate of A and the head; by default sgd's was tuned for method and epsilon, adamw's is 0.001."""
    lr_ratio: float | None = None
    """Learning rate of B as a multiple of A's; by default 2 for la-lora, else 1."""
    low_pass: Literal["none", "gaussian", "laplacian"] | None = None
    """Low-pass filter of the noisy adapter gradients, which costs no privacy; by default the method's own."""
    low_pass_strength: float | None = None
    """Strength of that filter; 0 is no filter."""

    def __post_init__(self) -> None:
        for name in ("lr", "lr_ratio"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} must be positive, not {value}.")
        strength = self.low_pass_strength
        _require(strength is None or strength >= 0, f"low_pass_strength must not be negative, not {strength}.")
        _require(
            not (strength and self.low_pass == "none"),
            "low_pass_strength has no effect with low_pass none: choose gaussian or laplacian.",
        )


@dataclass
class RunOptions:
    """The run"""

    seed: int = 0
    """Fixes initialisation, partition and which clients are drawn; batches and noise stay secret and unpredictable."""
    reproducible: bool = False
    """Let batches and noise follow the seed too: for research only, such a run must not be released."""
    evaluate_every: int = 1
    """Rounds from one evaluation on the validation data to the next; the last round is always evaluated."""
    output: Path | None = None
    """Folder for the results; by default runs/<time>-<method>-<epsilon>."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, …"""

    def __post_init__(self) -> None:
        _require(self.seed >= 0, f"seed must not be negative, not {self.seed}.")
        _require(self.evaluate_every >= 1, f"evaluate_every must be at least 1, not {self.evaluate_every}.")


@dataclass
class RunConfig:
    """Everything that defines a run.

    Options have unique names over all groups, so they are flat on the command line and in a YAML file (the model's
    name is `model` there).
    """

    federation: FederationConfig = field(default_factory=FederationConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        """Fills what the method decides, so that the written configuration is complete."""
        method = get_method(self.federation.method)
        chosen = self.optimization
        if chosen.lr is None:
            sgd = chosen.optimizer == "sgd"
            chosen.lr = method.learning_rate(self.privacy.target) if sgd else ADAMW_LEARNING_RATE
        if chosen.lr_ratio is None:
            chosen.lr_ratio = method.lr_ratio
        own_filter, own_strength = method.low_pass or ("none", 0.0)
        if chosen.low_pass is None:
            _require(
                not chosen.low_pass_strength or own_filter != "none",
                f"low_pass_strength needs low_pass: {method.name} filters nothing by default.",
            )
            chosen.low_pass = own_filter
        if chosen.low_pass_strength is None:
            same = chosen.low_pass == own_filter
            _require(
                same or chosen.low_pass == "none",
                f"low_pass {chosen.low_pass} needs low_pass_strength, for example 1.",
            )
            chosen.low_pass_strength = own_strength if same else 0.0

    @classmethod
    def from_flat(cls, options: Mapping[str, Any]) -> "RunConfig":
        """From flat options, as on the command line; those left out keep their defaults.

        Raises:
            ValueError: an option out of its range, or unknown.
        """
        given = dict(options)
        if "model" in given:
            given["name"] = given.pop("model")
        groups: dict[str, Any] = {}
        for group in dataclasses.fields(cls):
            kind: Any = group.default_factory
            names = [f.name for f in dataclasses.fields(kind)]
            groups[group.name] = kind(**{name: given.pop(name) for name in names if name in given})
        _require(not given, f"Unknown options: {', '.join(sorted(given))}.")
        return cls(**groups)

    def to_yaml(self) -> str:
        """The flat YAML file that runs the same again with --config; the output folder is left out."""
        parts = ["# python -m lora_dp.fed --config config.yaml"]
        for group in dataclasses.fields(self):
            values = dataclasses.asdict(getattr(self, group.name))
            if group.name == "model":
                values = {"model": values.pop("name"), **values}
            values.pop("output", None)
            title = heading(type(getattr(self, group.name)))
            parts.append(f"\n# {title}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip()}")
        return "\n".join(parts) + "\n"


def heading(group: type) -> str:
    """The title of a group of options: the first line of its docstring."""
    return (group.__doc__ or group.__name__).strip().splitlines()[0].rstrip(".")
