"""The configuration of a run: typed groups of options, flat on the command line and in a YAML file."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from lora_dp.fed.data.options import DataConfig
from lora_dp.fed.did_you_mean import closest
from lora_dp.fed.methods import Method, get_method
from lora_dp.fed.methods.base import nearest_rate
from lora_dp.fed.models.options import ModelConfig
from lora_dp.fed.option_types import check_types
from lora_dp.fed.server_options import Averaging, ServerOptimizerName
from lora_dp.privacy.clip_bounds import BOUNDS, LARGEST_BOUND, LEAST_BOUND

# A common starting point, not tuned.
ADAMW_LEARNING_RATE = 1e-3


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass
class FederationConfig:
    """The federation"""

    method: str = "la-lora"
    """How clients train and the server combines: la-lora, dp-lora, ffa-lora, rolora, deer, flora, flexlora, lora-fair,
    rac-lora, galore, fedsvd, lora-xs, prism, fedask, dp-fedadamw, head-only, quiet-lora; or flat-lora:NAME, Flat-LoRA
    over another."""
    method_options: dict[str, Any] = field(default_factory=dict)
    """Options of the method itself, for example --method-options.objective cosine (lora-fair)."""
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
    weighting: Literal["examples", "equal"] | None = None
    """Clients' weights in the average: by their number of examples (which is taken to be public), or equal; by default
    examples, and equal where whole clients are protected."""
    ranks: list[int] | dict[str, float] | None = None
    """Ranks of the clients' adapters where they differ: one a client, or shares by rank as in {4: 0.75, 8: 0.25}; for
    flora, flexlora and fedask."""
    min_clients: int = 1
    """Fewest updates a round is combined from (fewer clients drawn need only as many as were drawn); with less, the run
    stops. Not with noise by the server, whose rounds go on with noise alone."""
    client_timeout: float | None = None
    """Seconds after which a client is left out of the round; no limit by default."""
    fault_norm: float = 1000.0
    """Norm above which a client's change, its own noise aside, is taken for an accident, and left out."""
    engine: Literal["local", "flower", "deployed"] = "local"
    """Where clients work: in this process, or in Flower's simulation; deployed is what flwr run makes of it."""

    def __post_init__(self) -> None:
        check_types(self)
        get_method(self.method, self.method_options)
        for name in ("clients", "rounds", "local_steps", "batch_size", "min_clients"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be at least 1, not {value}.")
        if self.clients_per_round is not None:
            _require(
                1 <= self.clients_per_round <= self.clients,
                f"clients_per_round must be from 1 to the number of clients ({self.clients}), "
                f"not {self.clients_per_round}.",
            )
        _require(
            self.min_clients <= self.clients,
            f"min_clients must not be above the number of clients ({self.clients}), but it is {self.min_clients}.",
        )
        _require(self.dirichlet_alpha > 0, f"dirichlet_alpha must be positive, not {self.dirichlet_alpha}.")
        for name in ("client_timeout", "fault_norm"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} must be positive, not {value}.")
        self._check_ranks()

    def _check_ranks(self) -> None:
        if self.ranks is None:
            return
        _require(
            get_method(self.method, self.method_options).ranks_may_differ,
            f"{self.method} averages factors, so that all clients need one rank: leave ranks out, or take flora, "
            "flexlora or fedask.",
        )
        if isinstance(self.ranks, dict):
            _require(
                bool(self.ranks)
                and all(str(r).isdigit() and int(r) >= 1 for r in self.ranks)
                and all(0 < share < math.inf for share in self.ranks.values()),
                f"ranks must give each rank (at least 1) a positive share, not {self.ranks}.",
            )
        else:
            _require(
                len(self.ranks) == self.clients and min(self.ranks) >= 1,
                f"ranks must be one rank of at least 1 for each of the {self.clients} clients, not {self.ranks}.",
            )

    @property
    def largest_rank(self) -> int | None:
        """Of the ranks that were given."""
        return None if self.ranks is None else max(int(rank) for rank in self.ranks)

    def client_ranks(self, default: int, seed: int) -> list[int]:
        """The rank of each client; shares are dealt out as evenly as numbers allow, in an order that the seed fixes."""
        if self.ranks is None:
            return [default] * self.clients
        if not isinstance(self.ranks, dict):
            return list(self.ranks)
        import numpy as np  # here alone

        ranks = [int(rank) for rank in self.ranks]
        ends = np.cumsum(list(self.ranks.values())) / sum(self.ranks.values())
        places = (np.arange(self.clients) + 0.5) / self.clients
        dealt = np.asarray(ranks)[np.minimum(np.searchsorted(ends, places), len(ranks) - 1)]
        return [int(rank) for rank in np.random.default_rng(seed).permutation(dealt)]

    @property
    def client_rate(self) -> float:
        """Share of the clients that a round draws."""
        return (self.clients_per_round or self.clients) / self.clients

    @property
    def participations(self) -> int:
        """Rounds that each client budgets for: its even share of all places, rounded up."""
        return math.ceil(self.rounds * (self.clients_per_round or self.clients) / self.clients)


@dataclass
class PrivacyConfig:
    """Privacy"""

    epsilon: float | Literal["none", "inf"] | None = 8.0
    """Budget of every client for the whole run; none switches privacy off."""
    delta: float = 1e-5
    """Probability with which that guarantee may fail; well below 1 / (examples of a client), or 1 / clients."""
    unit: Literal["example", "client"] = "example"
    """What may be added or removed without notice: one example of a client, or a client with all its examples."""
    noise_by: Literal["server", "client"] = "server"
    """With the client as unit: the server is trusted with the updates, and adds noise to their sum; or each client adds
    its own."""
    max_grad_norm: float = 1.0
    """Largest norm of one example's gradient after clipping (unit example)."""
    max_update_norm: float = 1.0
    """Largest norm of a client's whole update after clipping (unit client)."""
    clipping: Literal["automatic", "flat", "per_layer", "adaptive"] = "automatic"
    """automatic: normalise every example's gradient; flat: shrink the long ones; per_layer: shrink layer by layer;
    adaptive: as flat, at a bound that follows a quantile of the norms from max_grad_norm on, anew in each turn."""
    clip_quantile: float = 0.5
    """With clipping adaptive: the part of a client's examples that should lie within the bound."""
    sums_share: float = 0.0
    """Part of the budget for one release of class sums and moments of the features before the first round, which start
    and scale the head; 0 for none, 0.1 is usual. With features fitting, for a new head alone."""
    accountant: Literal["pld", "rdp"] = "pld"
    """How steps are composed: privacy loss distributions (tight), or Rényi (faster)."""
    mechanism: Literal["sound", "as-released"] = "sound"
    """as-released does what the authors' code of la-lora or deer does, which guarantees nothing (ε = ∞)."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.epsilon in ("none", "inf", math.inf):
            self.epsilon = None
        if self.epsilon is not None:
            _require(float(self.epsilon) > 0, f"epsilon must be positive (or none), not {self.epsilon}.")
        _require(0 < self.delta < 1, f"delta must lie between 0 and 1, not {self.delta}: try 1e-5.")
        for name in ("max_grad_norm", "max_update_norm"):
            bound = getattr(self, name)
            _require(0 < bound < math.inf, f"{name} must be positive and finite, not {bound}.")
            _require(
                LEAST_BOUND <= bound <= LARGEST_BOUND,
                f"{name} must lie within {BOUNDS}, not {bound}: 1.0 is a usual start.",
            )
        _require(
            0 <= self.sums_share < 1, f"sums_share must be from 0 to below 1, not {self.sums_share}: 0.1 is usual."
        )
        _require(
            not (self.sums_share and self.mechanism == "as-released"),
            "sums_share has no meaning with mechanism as-released, whose noise is not accounted: leave it out.",
        )
        by_client = {"noise_by": "server", "max_update_norm": 1.0}
        by_example = {"max_grad_norm": 1.0, "clipping": "automatic", "clip_quantile": 0.5}
        _require(
            0 < self.clip_quantile < 1, f"clip_quantile must lie between 0 and 1, not {self.clip_quantile}: try 0.5."
        )
        if self.mechanism == "as-released":  # DEeR's bounds whole updates, LA-LoRA's reads its bound off the data
            idle, where = {**by_example, "noise_by": "server"}, "mechanism as-released"
        else:
            idle, where = (by_client if self.unit == "example" else by_example), f"unit {self.unit}"
        for name, usual in idle.items():
            _require(getattr(self, name) == usual, f"{name} has no effect with {where}: leave it out.")
        _require(
            self.clipping == "adaptive" or self.clip_quantile == 0.5,
            f"clip_quantile has no effect with clipping {self.clipping}: choose adaptive.",
        )
        _require(
            self.mechanism == "sound" or self.epsilon is not None,
            "mechanism as-released needs the epsilon that its noise is set for: leave epsilon none out.",
        )
        _require(
            self.mechanism == "sound" or self.unit == "example",
            "mechanism as-released has no unit of privacy, since it guarantees none: leave unit out.",
        )

    @property
    def target(self) -> float | None:
        """The budget, or None without privacy."""
        return None if self.epsilon is None else float(self.epsilon)

    @property
    def kept(self) -> float | None:
        """The budget that the run keeps; None where it guarantees nothing."""
        return self.target if self.mechanism == "sound" else None


@dataclass
class OptimizationConfig:
    """Local optimisation"""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """A client's optimizer; its state starts anew in every round. dp-fedadamw has its own."""
    lr: float | None = None
    """Learning rate of A and the head; by default sgd's was tuned for method and epsilon, adamw's is 0.001."""
    lr_ratio: float | None = None
    """Learning rate of B as a multiple of A's; by default 2 for la-lora, else 1."""
    low_pass: Literal["none", "gaussian", "laplacian"] | None = None
    """Low-pass filter of the noisy adapter gradients, which costs no privacy; by default the method's own."""
    low_pass_strength: float | None = None
    """Strength of that filter; 0 is no filter."""
    balanced: bool = False
    """With sums_share: judge as if classes were equally common, by the class shares that were released."""
    warm_start: bool = False
    """With sums_share: begin with the head of the nearest class mean."""
    views: int = 1
    """Randomly shifted copies of each image in a step, whose gradients are averaged before they are clipped."""
    mirror: bool = False
    """With views: mirror each copy, left for right, by chance; not for digits or letters."""
    server_optimizer: ServerOptimizerName = "average"
    """The server's step from the mean of a round: average takes it as it is, momentum adds 0.9 of the last step, adam
    scales each number, with the known variance of the noise taken out."""
    server_lr: float | None = None
    """Learning rate of that step; by default 1, for adam 0.03."""
    averaging: Averaging = "none"
    """The global model is the average of all rounds of the second half (tail) or of those so far, later ones more
    (ema): noise averages out."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("lr", "lr_ratio", "server_lr"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} must be positive, not {value}.")
        for name in ("lr", "lr_ratio", "server_lr", "low_pass_strength"):
            _require(getattr(self, name) != math.inf, f"{name} must be finite, not inf.")
        _require(self.views >= 1, f"views must be at least 1, not {self.views}.")
        _require(self.views > 1 or not self.mirror, "mirror has no effect without views: set views, for example to 4.")
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
    checkpoint_every: int = 1
    """Rounds from one checkpoint to the next, from which resume goes on."""
    output: Path | None = None
    """Folder for the results; by default runs/<time>-<method>-<epsilon>."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, …"""

    def __post_init__(self) -> None:
        check_types(self)
        if self.output is not None:
            self.output = Path(self.output)
        _require(0 <= self.seed < 2**63, f"seed must be from 0 to 2^63 - 1, not {self.seed}.")
        for name in ("evaluate_every", "checkpoint_every"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}.")


@dataclass
class RunConfig:
    """Everything that defines a run.

    Options have unique names over all groups, so they are flat on the command line and in a YAML file (the model's
    name is `model` there).

    >>> config = RunConfig.from_flat({"method": "ffa-lora", "epsilon": 1.0, "rounds": 10, "model": "default"})
    >>> config.federation.rounds, config.privacy.target, config.optimization.lr
    (10, 1.0, 0.15)
    >>> print(config.to_yaml())
    # lora-dp --config config.yaml
    ...
    method: ffa-lora
    ...
    """

    federation: FederationConfig = field(default_factory=FederationConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        """Fills what the method decides, so that the written configuration is complete."""
        for group in dataclasses.fields(self):
            kind: Any = group.default_factory
            given = getattr(self, group.name)
            _require(
                isinstance(given, kind),
                f"{group.name} must be a {kind.__name__}, not a {type(given).__name__}: RunConfig.from_flat takes "
                "options by their names.",
            )
        method, chosen, federation = self.method, self.optimization, self.federation
        whole_clients = self.privacy.unit == "client" and self.privacy.target is not None
        if federation.weighting is None:
            federation.weighting = "equal" if whole_clients else "examples"
        _require(
            not whole_clients or federation.weighting == "equal",
            "unit client needs weighting equal: the number of a client's examples is not public there.",
        )
        if self.privacy.mechanism == "as-released":
            _require(
                method.released_mechanism,
                f"mechanism as-released is there for la-lora and deer, not for {method.name}: leave it out for the "
                "sound one.",
            )
        _require(
            self.privacy.mechanism == "sound" or chosen.views == 1,
            "mechanism as-released takes each image as it is: leave views out.",
        )
        _require(
            not (self.privacy.mechanism == "as-released" and federation.engine != "local"),
            "mechanism as-released runs on engine local only.",
        )
        _require(
            federation.min_clients == 1 or not (whole_clients and self.privacy.noise_by == "server"),
            "min_clients has no meaning with noise by the server, where a round that stops would tell who was drawn: "
            "set it to 1.",
        )
        _require(
            federation.largest_rank is None or self.model.r in (ModelConfig.r, federation.largest_rank),
            f"r = {self.model.r} and ranks were both given: leave r out.",
        )
        if federation.largest_rank is not None:
            self.model.r = federation.largest_rank
        _require(
            not method.own_optimizer or chosen.optimizer == "sgd",
            f"{method.name} has an optimizer of its own: leave optimizer out.",
        )
        if chosen.lr is None:
            sgd = chosen.optimizer == "sgd"
            # A client that is protected as a whole trains without noise of its own.
            budget = None if whole_clients else self.privacy.target
            chosen.lr = method.learning_rate(budget) if sgd else ADAMW_LEARNING_RATE
        _require(
            self.privacy.sums_share > 0 or not (chosen.balanced or chosen.warm_start),
            "balanced and warm_start need the release of feature sums: set sums_share, for example to 0.1.",
        )
        _require(
            method.averages_factors
            or (chosen.server_optimizer, chosen.averaging) == ("average", "none")
            and chosen.server_lr in (None, 1),
            f"{method.name} does more than average, so that no server optimizer or averaging fits: leave "
            "server_optimizer, server_lr and averaging out.",
        )
        _require(
            chosen.server_optimizer != "adam"
            or not method.regulates_noise
            and self.privacy.mechanism != "as-released"
            and self.privacy.clipping != "adaptive"
            and (chosen.optimizer == "sgd" or whole_clients or self.privacy.target is None),
            "server_optimizer adam must know the noise in a mean: choose momentum, or optimizer sgd, mechanism "
            "sound, a bound that stays, and a method whose noise is not regulated.",
        )
        if chosen.server_lr is None:
            chosen.server_lr = 0.03 if chosen.server_optimizer == "adam" else 1.0
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
                same or chosen.low_pass == "none", f"low_pass {chosen.low_pass} needs low_pass_strength, for example 1."
            )
            chosen.low_pass_strength = own_strength if same else 0.0

    @property
    def method(self) -> Method:
        """The method with its options.

        >>> config.method.turns
        1
        """
        return get_method(self.federation.method, self.federation.method_options)

    def settle(self, model: ModelConfig, *, head_is_new: bool) -> None:
        """Writes down what was found out when the model was opened, so that the same is opened again.

        Args:
            model: its options, with none left that the model is to decide.
            head_is_new: whether the head knows nothing of the classes. One that does needs no feature sums.
        """
        if self.model.features == "fitting" and not head_is_new:
            self.privacy.sums_share = 0.0
            self.optimization.balanced = self.optimization.warm_start = False
        self.model = model

    def settled_as(self, other: "RunConfig") -> "RunConfig":
        """This one with what another, of the same run, has settled (:meth:`settle`): what this one leaves open, alone.

        >>> opened = RunConfig.from_flat({"features": "own", "adapt_last": 1})
        >>> RunConfig.from_flat({"features": "auto"}).settled_as(opened) == opened
        True
        >>> RunConfig.from_flat({"features": "unit", "adapt_last": 2}).settled_as(opened).model.adapt_last
        2
        """
        mine, its = dataclasses.asdict(self), dataclasses.asdict(other)
        settled = {"model": ["adapt_last"] if self.model.adapt_last is None else [], "privacy": [], "optimization": []}
        if self.model.features in ("fitting", "auto"):
            settled["model"].append("features")
        if self.model.features == "fitting":
            settled["model"] += ["feature_blocks"] if other.model.features == "unit" else ["contrast", "whitening"]
            if not other.privacy.sums_share:
                settled |= {"privacy": ["sums_share"], "optimization": ["balanced", "warm_start"]}
        for group, names in settled.items():
            mine[group] |= {name: its[group][name] for name in names}
        return RunConfig(**{f.name: f.default_factory(**mine[f.name]) for f in dataclasses.fields(self)})  # type: ignore

    @classmethod
    def from_flat(cls, options: Mapping[str, Any]) -> "RunConfig":
        """From flat options, as on the command line; those left out are the method's recipe's, or keep their defaults.

        Raises:
            ValueError: an option out of its range, or unknown.

        >>> RunConfig.from_flat({"ephsilon": 1.0})
        Traceback (most recent call last):
        ValueError: Unknown options: ephsilon (did you mean epsilon?).
        """
        given = {**recipe(options), **options}
        if "model" in given:
            given["name"] = given.pop("model")
        groups: dict[str, Any] = {}
        known = ["model"]
        for group in dataclasses.fields(cls):
            kind: Any = group.default_factory
            names = [f.name for f in dataclasses.fields(kind)]
            known += names
            groups[group.name] = kind(**{name: given.pop(name) for name in names if name in given})
        near = {name: closest(name.replace("-", "_"), known) for name in sorted(given)}
        told = [f"{name} (did you mean {meant}?)" if meant else name for name, meant in near.items()]
        _require(not given, f"Unknown options: {', '.join(told)}.")
        return cls(**groups)

    def to_yaml(self) -> str:
        """The flat YAML file that runs the same again with --config; the output folder is left out.

        >>> import yaml
        >>> RunConfig.from_flat(yaml.safe_load(config.to_yaml())) == config
        True
        """
        parts = ["# lora-dp --config config.yaml"]
        for group in dataclasses.fields(self):
            values = dataclasses.asdict(getattr(self, group.name))
            if group.name == "model":
                values = {"model": values.pop("name"), **values}
            values.pop("output", None)
            title = heading(type(getattr(self, group.name)))
            parts.append(f"\n# {title}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip()}")
        return "\n".join(parts) + "\n"


def recipe(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the method of these flat options chooses for those that are left out, as far as it fits the others.

    It is for a head on features of unit length: with features own or auto there is none.

    >>> recipe({"method": "quiet-lora"})["server_optimizer"]
    'momentum'
    >>> recipe({"method": "la-lora"})
    {}
    """
    name = options.get("method", FederationConfig.method)
    own = options.get("features", "fitting") in ("own", "auto")
    if not isinstance(name, str) or own or options.get("mechanism") == "as-released":
        return {}
    method = get_method(name, options.get("method_options"))
    chosen = dict(method.recipe)
    whole_clients = options.get("unit") == "client"
    if whole_clients:
        for of_examples in ("clipping", "max_grad_norm"):
            chosen.pop(of_examples, None)
    if options.get("sums_share") == 0:
        chosen.pop("balanced", None)
    if options.get("features") == "unit":
        chosen.pop("feature_blocks", None)
    if method.recipe_rates and options.get("optimizer", "sgd") == "sgd":
        budget = PrivacyConfig(epsilon=options.get("epsilon", PrivacyConfig.epsilon)).target
        chosen["lr"] = nearest_rate(method.recipe_rates, None if whole_clients else budget)
    return chosen


def heading(group: type) -> str:
    """The title of a group of options: the first line of its docstring."""
    return (group.__doc__ or group.__name__).strip().splitlines()[0].rstrip(".")


def read_config(path: Path) -> RunConfig:
    """The configuration of a run's folder, with that folder as output.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        options = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} holds no run (config.yaml is missing or cannot be read): name a run's folder."
        ) from error
    if not isinstance(options, dict):
        raise ValueError(f"{path / 'config.yaml'} is no configuration of a run: restore it from a backup.")
    return RunConfig.from_flat({**options, "output": path})
