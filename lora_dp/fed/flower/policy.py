"""A node's policy: in which runs its owner lets it take part, whatever a server sends.

Every option of a run has a rule. Those below are a node's if its owner writes nothing: what could turn a run against
the node is held at its default, what is harmless within bounds is the server's to choose. The owner's own rules are a
YAML file in the words of a run's config.yaml: an option that stands there must have that very value, ``allow`` says
what else it may be. A run's config.yaml is such a file.
"""

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from lora_dp.fed.config import RunConfig
from lora_dp.fed.flower.ledger import Refused, own_path
from lora_dp.fed.methods import METHODS
from lora_dp.fed.origin import SERVERS_OWN, flat, plain_options
from lora_dp.fed.safe_text import described, harmless
from lora_dp.hash_chain import canonical
from lora_dp.privacy.accounting import check_delta, check_epsilon

_LOG = logging.getLogger(__name__)
_MOST_POLICY = 2**16


class Rule(Protocol):
    """What an option may be; ``str`` of it says so."""

    def admits(self, value: Any) -> bool: ...


@dataclass(frozen=True)
class OneOf:
    """One of these values, of the very type (numbers by value)."""

    values: tuple[Any, ...]

    def admits(self, value: Any) -> bool:
        return any(_same(value, wanted) for wanted in self.values)

    def __str__(self) -> str:
        listed = " or ".join("none" if value is None else str(value) for value in self.values[:8])
        return harmless(listed + (" or …" if len(self.values) > 8 else ""))


@dataclass(frozen=True)
class Between:
    """A finite number within these bounds, a whole one if ``whole``; None too if ``optional``."""

    low: float
    high: float
    whole: bool = False
    optional: bool = False

    def admits(self, value: Any) -> bool:
        if value is None:
            return self.optional
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        return self.low <= value <= self.high and abs(value) != math.inf

    def __str__(self) -> str:
        return f"{'a whole number ' if self.whole else ''}from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class AtMost:
    """A list of at most so many: each of its entries costs time and memory."""

    count: int

    def admits(self, value: Any) -> bool:
        return isinstance(value, list) and len(value) <= self.count

    def __str__(self) -> str:
        return f"a list of at most {self.count}"


@dataclass(frozen=True)
class Anything:
    """Whatever it is."""

    def admits(self, value: Any) -> bool:
        return True

    def __str__(self) -> str:
        return "anything"


def _count(most: int) -> Between:
    return Between(1, most, whole=True)


_BOOLS = OneOf((False, True))
_RATE = Between(1e-12, 1e6)
_BOUND = Between(1e-3, 1e3)
# A node does nothing with them.
_SERVERS = dict.fromkeys(("engine", *SERVERS_OWN), Anything())
# What a node with data of its own does not read either: all of its folder is trained on, by its own columns.
_OF_SHARED_DATA = (
    "dataset",
    "subset",
    "input_column",
    "pair_column",
    "label_column",
    "prompt_column",
    "prompt_template",
    "completion_column",
    "validation_split",
    "validation_fraction",
    "split_seed",
    "partition",
    "dirichlet_alpha",
)
RULES: Mapping[str, Rule] = {
    **_SERVERS,
    # Code, weights and files that a node opens: the embedded model and data set, nothing from anywhere else.
    "model": OneOf(("default",)),
    "pretrained": OneOf((True,)),
    "adapt_last": Anything(),
    "feature_blocks": AtMost(16),
    "contrast": OneOf(("as-is", "model")),
    "whitening": OneOf(("none", "made-up")),
    "features": OneOf(("auto", "own", "unit", "mean")),
    "class_texts": OneOf((None,)),
    "target_modules": OneOf(("all-linear",)),
    "precision": OneOf(("float32",)),
    "dataset": OneOf(("digits",)),
    "subset": OneOf((None,)),
    "input_column": OneOf((None,)),
    "pair_column": OneOf((None,)),
    "label_column": OneOf((None,)),
    "prompt_column": OneOf((None,)),
    "prompt_template": OneOf((None,)),
    "completion_column": OneOf((None,)),
    "task": OneOf(("auto", "classification", "causal-lm")),
    "chat": _BOOLS,
    "validation_split": OneOf((None,)),
    "validation_fraction": Between(0.01, 0.99),
    "split_seed": Between(0, 2**32 - 1, whole=True),
    "partition": OneOf(("iid", "dirichlet")),
    "dirichlet_alpha": Between(1e-6, 1e6),
    "max_length": _count(512),
    "init_a": OneOf(("kaiming", "orthonormal")),
    "r": _count(256),
    "alpha": Between(1e-6, 1e6, optional=True),
    "dropout": Between(0, 0.9),
    # The mechanism. What a ledger is about, it decides itself (flower_ledger).
    "mechanism": OneOf(("sound",)),
    "reproducible": OneOf((False,)),
    "epsilon": Between(1e-6, 8),
    "delta": Between(1e-15, 1e-5),
    "unit": OneOf(("example", "client")),
    "noise_by": OneOf(("server", "client")),
    "sums_share": Between(0, 1),
    "accountant": OneOf(("pld", "rdp")),
    "clipping": OneOf(("automatic", "flat", "per_layer", "adaptive")),
    "clip_quantile": Between(0.01, 0.99),
    "max_grad_norm": _BOUND,
    "max_update_norm": _BOUND,
    # How long and how training goes: noised steps, whatever these are; bounds are for time and memory.
    "method": OneOf((*METHODS, *(f"flat-lora:{name}" for name in METHODS))),
    "method_options": OneOf(({},)),
    "clients": _count(10**6),
    "clients_per_round": Between(1, 10**6, whole=True, optional=True),
    "rounds": _count(10**6),
    "local_steps": _count(10**4),
    "batch_size": _count(4096),
    "ranks": Anything(),
    "optimizer": OneOf(("sgd", "adamw")),
    "lr": _RATE,
    "lr_ratio": _RATE,
    "views": _count(64),
    "mirror": _BOOLS,
    "low_pass": OneOf(("none", "gaussian", "laplacian")),
    "low_pass_strength": Between(0, 1000),
    "seed": Between(0, 2**63 - 1, whole=True),
}
# Where its owner has declared that a node needs no privacy of its own.
_OPEN: Mapping[str, Rule] = {
    "epsilon": Between(1e-6, 1e9, optional=True),
    "delta": Between(1e-300, 0.999),
    "mechanism": OneOf(("sound", "as-released")),
    "reproducible": _BOOLS,
}
# Where the node's ledger has a budget, which no run can exceed whatever it claims.
_BUDGETED: Mapping[str, Rule] = {"epsilon": Between(1e-6, 1e6), "delta": Between(1e-300, 0.1)}


@dataclass(frozen=True)
class Policy:
    """The rules of one node.

    Attributes:
        rules: one for every option of a run.
        private: False where its owner has declared that it needs no privacy of its own: then it may take part in runs
            without any, and in those where the server, which is trusted with its updates, adds the noise.
        unread: options with which the node does nothing.
    """

    rules: Mapping[str, Rule]
    private: bool = True
    unread: frozenset[str] = frozenset(_SERVERS)

    @classmethod
    def of_node(cls, node_config: Mapping[str, Any], *, budget: bool) -> "Policy":
        """The policy that a node's configuration names as ``policy``, with its ``private``.

        Args:
            node_config: the node's.
            budget: its ledger has one.

        Raises:
            Refused: a file that is none, or named by a path that is not absolute; what is not true or false.
        """
        path = own_path(node_config, "policy")
        written = {} if path is None else _read(path)
        declared = [source["private"] for source in (node_config, written) if source.get("private") is not None]
        if any(not isinstance(value, bool) for value in declared):
            raise Refused("has a setting private that is neither true nor false")
        private = False not in declared
        written.pop("private", None)
        rules = {**RULES, **({} if private else _OPEN), **(_BUDGETED if private and budget else {})}
        try:
            rules.update(_own_rules(written))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            _LOG.error("This node's policy is none: %s", described(error))
            raise Refused("has a policy that is none: its log says why") from error
        unread = frozenset(_SERVERS)
        if node_config.get("data") is not None:
            rules.update(dict.fromkeys(_OF_SHARED_DATA, Anything()))
            unread |= set(_OF_SHARED_DATA)
        return cls(rules, private, unread)

    def check(self, config: RunConfig) -> None:
        """Raises Refused for a run that the owner does not want, naming the option."""
        for name, value in flat(config).items():
            rule = self.rules[name]
            if not rule.admits(value):
                raise Refused(_no_such_run(name, value, rule))

    def budget(self) -> tuple[float, float]:
        """The largest ε and δ that it admits: those of all runs together, where the node's ledger has no budget.

        Raises:
            Refused: it has no bound on one of them.
        """
        epsilon, delta = _most(self.rules["epsilon"]), _most(self.rules["delta"])
        try:
            check_epsilon(epsilon)
            check_delta(delta)
        except ValueError as error:
            raise Refused(
                "has a ledger without a budget, and a policy without a bound on epsilon or delta: write epsilon and "
                "delta into its node-config"
            ) from error
        return epsilon, delta

    def run_digest(self, config: RunConfig) -> str:
        """What tells one run from another: SHA-256 of all options that the node reads, 64 hexadecimal digits.

        The same values in other words are the same run, as is one with other options of the server's own.
        """
        return hashlib.sha256(canonical(plain_options(config, self.unread)).encode()).hexdigest()


def read_sent_config(text: str, methods: Rule | None = None) -> RunConfig:
    """The configuration that a server has sent.

    Args:
        text: YAML.
        methods: those that may be named: before a name makes anything load, since methods may be other packages' code.

    Raises:
        Refused: it is none, or names another method.
    """
    try:
        options = read_yaml(text)
        method = options.get("method", "la-lora")
        if methods is not None and not methods.admits(method):
            raise Refused(_no_such_run("method", method, methods))
        return RunConfig.from_flat(options)
    except Refused:
        raise
    except Exception as error:  # what it says is the server's own, and no data have been opened
        raise Refused(f"was sent a configuration that is none ({described(error, 200)})") from error


def _no_such_run(name: str, value: Any, rule: Rule) -> str:
    return f"takes part in no such run: {name} is {harmless(str(value), 80)}, and by its policy must be {rule}"


def read_yaml(text: str) -> dict[str, Any]:
    """A YAML mapping of plain values, without aliases: a few of them can stand for more than any memory holds.

    Raises:
        ValueError: it is something else.
        yaml.YAMLError: it is no YAML.
    """
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
        raise ValueError("it has YAML aliases")
    found = yaml.safe_load(text)
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError("it is no mapping of options")
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST_POLICY + 1)
        if len(text) > _MOST_POLICY:
            raise ValueError(f"it is longer than {_MOST_POLICY} characters")
        return read_yaml(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        _LOG.error("This node's policy cannot be read: %s", described(error))
        raise Refused("has a policy that cannot be read: its log says why") from error


def _own_rules(written: dict[str, Any]) -> dict[str, Rule]:
    allowed = written.pop("allow", None) or {}
    if unknown := sorted((written.keys() | allowed.keys()) - RULES.keys()):
        raise ValueError(f"it has options that no run has: {', '.join(map(str, unknown[:3]))}")
    # As a run would read them: none is None, and defaults that hang on others are filled in.
    # With another data set than the digits, which are no texts.
    values = flat(RunConfig.from_flat({"dataset": "any", **written}))
    rules: dict[str, Rule] = {name: OneOf((values[name],)) for name in written if name not in _SERVERS}
    for name, said in allowed.items():
        rules[name] = _rule(said, RULES[name])
    return rules


def _rule(said: Any, usual: Rule) -> Rule:
    """What stands under ``allow``: "any", a list of values, or {min: …, max: …}."""
    if said == "any":
        return Anything()
    if isinstance(said, list) and said:
        number = isinstance(usual, Between)
        return OneOf(tuple(None if number and value in ("none", "inf") else value for value in said))
    if isinstance(said, dict) and said and said.keys() <= {"min", "max"}:
        low, high = (float(said.get(name, edge)) for name, edge in (("min", -math.inf), ("max", math.inf)))
        return Between(low, high, whole=isinstance(usual, Between) and usual.whole)
    raise ValueError(f"allow takes a list of values, min and max, or any, not {harmless(str(said), 80)}")


def _most(rule: Rule) -> float:
    """The largest number that a rule admits; infinite where it has no bound."""
    if isinstance(rule, Between):
        return rule.high
    values = rule.values if isinstance(rule, OneOf) else ()
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return max(numbers, default=math.inf)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and bool(one == other)
