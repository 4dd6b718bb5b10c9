"""The federated methods, by name: ours, and those that other packages offer as entry points of ``lora_dp.methods``."""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from lora_dp.fed.did_you_mean import closest
from lora_dp.fed.methods.base import (
    MERGED,
    Aggregation,
    Contribution,
    Layers,
    LocalTurn,
    Method,
    Phases,
    State,
    WeightedAverage,
    factor,
)
from lora_dp.fed.methods.deer import DEeR
from lora_dp.fed.methods.dp_fedadamw import DPFedAdamW
from lora_dp.fed.methods.dp_lora import DPLoRA
from lora_dp.fed.methods.fedask import FedASK
from lora_dp.fed.methods.fedsvd import FedSVD
from lora_dp.fed.methods.ffa_lora import FFALoRA
from lora_dp.fed.methods.flat_lora import FlatLoRA
from lora_dp.fed.methods.flexlora import FlexLoRA
from lora_dp.fed.methods.flora import FLoRA
from lora_dp.fed.methods.galore import GaLore
from lora_dp.fed.methods.head_only import HeadOnly
from lora_dp.fed.methods.la_lora import LALoRA
from lora_dp.fed.methods.lora_fair import LoRAFAIR
from lora_dp.fed.methods.lora_xs import LoRAXS
from lora_dp.fed.methods.prism import PRISM
from lora_dp.fed.methods.quiet_lora import QuietLoRA
from lora_dp.fed.methods.rac_lora import RACLoRA
from lora_dp.fed.methods.rolora import RoLoRA

METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        LALoRA,
        DPLoRA,
        FFALoRA,
        RoLoRA,
        DEeR,
        FLoRA,
        FlexLoRA,
        LoRAFAIR,
        RACLoRA,
        GaLore,
        FedSVD,
        LoRAXS,
        PRISM,
        FedASK,
        DPFedAdamW,
        FlatLoRA,
        HeadOnly,
        QuietLoRA,
    )
}
ENTRY_POINTS = "lora_dp.methods"


def available() -> list[str]:
    """Names of all methods: the ones here, and those that installed packages add.

    >>> available()[:4]
    ['la-lora', 'dp-lora', 'ffa-lora', 'rolora']
    """
    return [*METHODS, *(point.name for point in entry_points(group=ENTRY_POINTS) if point.name not in METHODS)]


def _method_class(name: str) -> type[Method]:
    """The class of an available method; a package's is loaded when it is asked for, and its own alone."""
    if name in METHODS:
        return METHODS[name]
    [point, *_] = entry_points(group=ENTRY_POINTS, name=name)
    try:
        cls = point.load()
    except Exception as error:
        raise ValueError(
            f"The method {name!r} of {point.value} cannot be loaded ({type(error).__name__}: {error}): mend or "
            "uninstall its package."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise ValueError(f"The method {name!r} ({point.value}) must be a subclass of lora_dp.fed.methods.Method.")
    if reason := _incomplete(cls, name):
        raise ValueError(f"The method {name!r} ({point.value}) cannot be used: {reason}.")
    return cls


def _incomplete(cls: type[Method], name: str) -> str | None:
    """What a class from elsewhere lacks of what :class:`Method` asks for, and the remedy."""
    if missing := sorted(cls.__abstractmethods__):
        return f"it has no {' and no '.join(missing)}, which every method must say"
    if getattr(cls, "name", None) != name:
        return f"its name must be what its entry point says: put name: ClassVar[str] = {name!r} into the class"
    try:
        inspect.signature(cls.phases).bind(None, 0, turn=0)
    except TypeError:
        return "its phases must take (self, round_index, turn=0)"
    rates = cls.learning_rates
    if math.inf not in rates or len(rates) < 2 or not all(0 < rate < math.inf for rate in rates.values()):
        return 'its learning_rates need a positive rate for one ε at least, and one for float("inf"), no privacy'
    options: Any = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    for option in options:
        if option.default is dataclasses.MISSING and option.default_factory is dataclasses.MISSING:
            return f"its option {option.name} needs a default"
    return None


def get_method(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """The method of that name; ``flat-lora:NAME`` is Flat-LoRA over another (dp-lora if left out).

    Args:
        name: as --method takes it.
        options: of the method itself, by name.

    Raises:
        ValueError: there is no such method (the message names the nearest) or option, or an option's value is wrong.

    >>> get_method("lora-fair", {"regularisation": 0.1})
    LoRAFAIR(regularisation=0.1, objective='ridge')
    >>> get_method("la-lora").phases(round_index=0)
    'BA'
    >>> get_method("lalora")
    Traceback (most recent call last):
    ValueError: There is no method 'lalora': ... Did you mean la-lora?
    """
    given = dict(options or {})
    first, colon, base = name.partition(":")
    if colon and (not base or base.partition(":")[0] == FlatLoRA.name):
        raise ValueError(f"{name!r} lacks a method to smooth: write {FlatLoRA.name}:dp-lora, for example.")
    # Entry points are read from every installed package: not where one of ours is meant.
    if first not in METHODS and first not in available() or colon and first != FlatLoRA.name:
        known = available()
        near = closest(name, known, cutoff=0.4)
        hint = f" Did you mean {near}?" if near else ""
        raise ValueError(f"There is no method {name!r}: choose {', '.join(known)}.{hint}")
    cls: Any = _method_class(first)
    if cls is FlatLoRA:
        rho = {key: _checked(name, key, given.pop(key), 0.0) for key in ("rho",) if key in given}
        return FlatLoRA(get_method(base or DPLoRA.name, given), **rho)
    allowed = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    for key in given:
        if key not in allowed:
            there = f"it has {', '.join(allowed)}" if allowed else "it has none"
            raise ValueError(f"The method {name} has no option {key!r}: {there}.")
    if dataclasses.is_dataclass(cls):
        given |= {
            f.name: _checked(name, f.name, given[f.name], f.default) for f in dataclasses.fields(cls) if f.name in given
        }
    method: Method = cls(**given)
    return method


def _checked(method: str, option: str, value: Any, default: Any) -> Any:
    """An option's value, which must be of the kind of its default."""
    kinds: dict[type, tuple[str, tuple[type, ...]]] = {
        float: ("a number", (int, float)),
        int: ("a whole number", (int,)),
        bool: ("true or false", (bool,)),
        str: ("a word", (str,)),
    }
    kind, types = kinds.get(type(default), ("", (object,)))
    number = type(default) in (int, float)
    odd = number and (isinstance(value, bool) or isinstance(value, float) and not math.isfinite(value))
    if odd or not isinstance(value, types):
        raise ValueError(f"The option {option} of {method} must be {kind}, not {value!r}.")
    return type(default)(value) if number else value


__all__ = [
    "MERGED",
    "METHODS",
    "PRISM",
    "Aggregation",
    "Contribution",
    "DEeR",
    "DPFedAdamW",
    "DPLoRA",
    "FFALoRA",
    "FLoRA",
    "FedASK",
    "FedSVD",
    "FlatLoRA",
    "FlexLoRA",
    "GaLore",
    "HeadOnly",
    "LALoRA",
    "Layers",
    "LoRAFAIR",
    "LoRAXS",
    "LocalTurn",
    "Method",
    "Phases",
    "QuietLoRA",
    "RACLoRA",
    "RoLoRA",
    "State",
    "WeightedAverage",
    "available",
    "factor",
    "get_method",
]
