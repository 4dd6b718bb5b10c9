"""The configuration of a run: all its options, flat on the command line and in a YAML file, and what a method chooses
where they are left out."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lora_dp.fed.data.options import OF_LANGUAGE_MODELS, DataConfig, Task
from lora_dp.fed.did_you_mean import closest
from lora_dp.fed.methods import Method, get_method
from lora_dp.fed.methods.base import nearest_rate
from lora_dp.fed.models.options import ModelConfig
from lora_dp.fed.run_options import FederationConfig, OptimizationConfig, PrivacyConfig, RunOptions, require_that

# A common starting point, not tuned.
ADAMW_LEARNING_RATE = 1e-3


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
            require_that(
                isinstance(given, kind),
                f"{group.name} must be a {kind.__name__}, not a {type(given).__name__}: RunConfig.from_flat takes "
                "options by their names.",
            )
        method, chosen, federation = self.method, self.optimization, self.federation
        whole_clients = self.privacy.unit == "client" and self.privacy.target is not None
        if federation.weighting is None:
            federation.weighting = "equal" if whole_clients else "examples"
        require_that(
            not whole_clients or federation.weighting == "equal",
            "unit client needs weighting equal: the number of a client's examples is not public there.",
        )
        if self.privacy.mechanism == "as-released":
            require_that(
                method.released_mechanism,
                f"mechanism as-released is there for la-lora and deer, not for {method.name}: leave it out for the "
                "sound one.",
            )
        require_that(
            self.privacy.mechanism == "sound" or chosen.views == 1,
            "mechanism as-released takes each image as it is: leave views out.",
        )
        require_that(
            not (self.privacy.mechanism == "as-released" and federation.engine != "local"),
            "mechanism as-released runs on engine local only.",
        )
        require_that(
            federation.min_clients == 1 or not (whole_clients and self.privacy.noise_by == "server"),
            "min_clients has no meaning with noise by the server, where a round that stops would tell who was drawn: "
            "set it to 1.",
        )
        require_that(
            federation.largest_rank is None or self.model.r in (ModelConfig.r, federation.largest_rank),
            f"r = {self.model.r} and ranks were both given: leave r out.",
        )
        if federation.largest_rank is not None:
            self.model.r = federation.largest_rank
        require_that(
            not method.own_optimizer or chosen.optimizer == "sgd",
            f"{method.name} has an optimizer of its own: leave optimizer out.",
        )
        if chosen.lr is None:
            sgd = chosen.optimizer == "sgd"
            # A client that is protected as a whole trains without noise of its own.
            budget = None if whole_clients else self.privacy.target
            chosen.lr = method.learning_rate(budget) if sgd else ADAMW_LEARNING_RATE
        require_that(
            self.privacy.sums_share > 0 or not (chosen.balanced or chosen.warm_start),
            "balanced and warm_start need the release of feature sums: set sums_share, for example to 0.1.",
        )
        require_that(
            not chosen.warm_start or self.model.class_texts is None,
            "warm_start and class_texts both say where the head begins: leave one of them out.",
        )
        require_that(
            method.averages_factors
            or (chosen.server_optimizer, chosen.averaging) == ("average", "none")
            and chosen.server_lr in (None, 1),
            f"{method.name} does more than average, so that no server optimizer or averaging fits: leave "
            "server_optimizer, server_lr and averaging out.",
        )
        require_that(
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
            require_that(
                not chosen.low_pass_strength or own_filter != "none",
                f"low_pass_strength needs low_pass: {method.name} filters nothing by default.",
            )
            chosen.low_pass = own_filter
        if chosen.low_pass_strength is None:
            same = chosen.low_pass == own_filter
            require_that(
                same or chosen.low_pass == "none", f"low_pass {chosen.low_pass} needs low_pass_strength, for example 1."
            )
            chosen.low_pass_strength = own_strength if same else 0.0

        self._check_task()

    def _check_task(self) -> None:
        """Raises ValueError where an option is for another task than the data's."""
        if self.data.task != "causal-lm":
            return
        model, method = self.model, self.method
        require_that(
            method.has_adapters,
            f"{method.name} trains a head that classifies, which no language model has: choose another method.",
        )
        of_classes = {
            "features": model.features not in ("auto", "own"),
            "feature_blocks": model.feature_blocks != [-1],
            "contrast": model.contrast != "as-is",
            "whitening": model.whitening != "none",
            "class_texts": model.class_texts is not None,
            "sums_share": self.privacy.sums_share > 0,
            "views": self.optimization.views > 1,
        }
        if found := [name for name, given in of_classes.items() if given]:
            raise ValueError(
                f"{found[0]} is for classification: leave it out"
                + f", or, where {method.name}'s recipe sets it, name task causal-lm, for which it does not"
                * bool(method.recipe)
                + "."
            )
        require_that(
            self.federation.partition == "iid" or self.data.label_column is not None,
            "partition dirichlet shares out classes, of which these data have none: name a label_column, or leave it "
            "out.",
        )

    def settle_task(self, task: Task) -> None:
        """Writes down what is learned, found out when the data were opened.

        Raises:
            ValueError: an option is for another task.

        >>> opened = RunConfig.from_flat({"dataset": "texts.csv"})
        >>> opened.settle_task("causal-lm")
        >>> opened.data.task
        'causal-lm'
        """
        self.data = dataclasses.replace(self.data, task=task)
        self._check_task()

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

        >>> opened = RunConfig.from_flat({"method": "head-only"})
        >>> opened.settle(ModelConfig(features="unit"), head_is_new=False)
        >>> opened.model.features, opened.privacy.sums_share
        ('unit', 0.0)
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
        settled: dict[str, list[str]] = {name: [] for name in mine}
        if self.model.adapt_last is None:
            settled["model"].append("adapt_last")
        if self.data.task == "auto":
            settled["data"].append("task")
        if self.model.features in ("fitting", "auto"):
            settled["model"].append("features")
        if self.model.class_texts == "names" and isinstance(other.model.class_texts, list):
            settled["model"].append("class_texts")
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
        require_that(not given, f"Unknown options: {', '.join(told)}.")
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

    It is for a head on features of unit length: with features own or auto, and for language models, there is none.

    >>> recipe({"method": "quiet-lora"})["server_optimizer"]
    'momentum'
    >>> recipe({"method": "la-lora"})
    {}
    """
    name, of_method = options.get("method", FederationConfig.method), options.get("method_options", {})
    own = options.get("features", "fitting") in ("own", "auto")
    own |= options.get("task") == "causal-lm" or any(options.get(name) for name in OF_LANGUAGE_MODELS)
    # What has the wrong type is refused where it is checked.
    if (
        not isinstance(name, str)
        or not isinstance(of_method, Mapping)
        or own
        or options.get("mechanism") == "as-released"
    ):
        return {}
    method = get_method(name, of_method)
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
