"""What to train in a model: settings of its adapters."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

from lora_dp.argument_checks import check_alpha, check_flag, check_number
from lora_dp.nn.adapter_start import Adapter, InitA, check_init_a
from lora_dp.opacus_names import tells_users_of

ALL_LINEAR = "all-linear"
Bias = Literal["none", "all", "lora_only"]


# PEFT's names for some of these settings.
_PEFT_NAMES = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "modules_to_save": "trainable_modules",
    "use_rslora": "rslora",
}


_OWN_CONFIG = "give inject_lora, or get_peft_model and make_private, a peft.LoraConfig that has it"
# What only PEFT's configuration has.
_OF_PEFT = {
    "task_type": "leave it out, for all tasks are alike here",
    "inference_mode": "leave it out, for adapters are trained",
    "fan_in_fan_out": "leave it out, for it is read off the layer",
    "init_lora_weights": f"leave it out, or {_OWN_CONFIG}",
    "rank_pattern": _OWN_CONFIG,
    "alpha_pattern": _OWN_CONFIG,
    "layers_pattern": _OWN_CONFIG,
    "use_dora": "leave it out, for it is not offered in private training",
    "target_parameters": "leave it out, for it is not offered in private training",
}


@dataclass(init=False)
class LoRAConfig:
    """What to train in a model.

    PEFT's names are taken as well: ``lora_alpha``, ``lora_dropout``, ``modules_to_save`` and ``use_rslora``, for
    ``alpha``, ``dropout``, ``trainable_modules`` and ``rslora``.

    Args:
        r: rank of the adapters, at least 1; or a ``peft.LoraConfig``, alone, for all settings.
        alpha: scaling is alpha / r; None means alpha = r.
        target_modules: layers to adapt (``nn.Linear``, and Transformers' ``Conv1D``): a list of names or name endings
            ("query", "attn.qkv"), a regular expression for the whole name, or "all-linear": every one outside
            ``trainable_modules`` and the output head. [] adapts none: ``trainable_modules`` alone are trained.
        trainable_modules: names or name endings of modules to train whole, such as the head: themselves and all
            beneath must be Linear, Conv1D, LayerNorm or Embedding.
        dropout: probability on the adapters' input, in [0, 1).
        rslora: scale by alpha / √r instead (Kalajdzievski 2023, arXiv 2312.03732).
        bias: biases to train besides: "none", "lora_only" (those of adapted layers) or "all" (those of every
            linear layer and LayerNorm; others, such as a convolution's, stay frozen).
        init_a: how A starts: "kaiming", or "orthonormal" with rows at right angles and of the same mean square
            (:class:`~lora_dp.DPLoRALinear`).
        adapter: "lora", two factors; "xs", a trained core (r, r) between frozen singular vectors of each weight
            (LoRA-XS, arXiv 2405.17604); or "tangent", coordinates of the tangent space at a frozen product (PRISM,
            arXiv 2606.00944). The starts of the last two leave no choice to ``init_a``.
        exclude_modules: layers that ``target_modules`` names and that are left alone, as it names them.
        layers_to_transform: numbers of the blocks whose layers are adapted, as [10, 11] of twelve; None for all. The
            number is the last in a layer's name.

    Raises:
        ValueError: a value out of range, or a setting that is given by both its names.
        TypeError: ``target_modules`` or ``trainable_modules`` is no list of names, or a value of another type.

    >>> config = LoRAConfig(r=16, target_modules=["query", "value"], trainable_modules=["classifier"])
    >>> config.r, config.alpha, config.dropout
    (16, None, 0.0)
    >>> LoRAConfig(r=16, lora_alpha=32, modules_to_save=["classifier"]).alpha
    32
    >>> LoRAConfig(r=0)
    Traceback (most recent call last):
    ValueError: r must be a whole number of at least 1, got 0: 4 to 16 is usual.
    """

    r: int
    alpha: float | None
    target_modules: list[str] | str
    trainable_modules: list[str]
    dropout: float
    rslora: bool
    bias: Bias
    init_a: InitA
    adapter: Adapter
    exclude_modules: list[str] | str
    layers_to_transform: list[int] | None

    @tells_users_of("PEFT", _OF_PEFT)
    def __init__(
        self,
        r: int = 8,
        alpha: float | None = None,
        target_modules: list[str] | str = ALL_LINEAR,
        trainable_modules: list[str] | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        bias: Bias = "none",
        init_a: InitA = "kaiming",
        adapter: Adapter = "lora",
        exclude_modules: list[str] | str | None = None,
        layers_to_transform: list[int] | int | None = None,
        *,
        lora_alpha: float | None = None,
        lora_dropout: float | None = None,
        modules_to_save: list[str] | None = None,
        use_rslora: bool | None = None,
    ):
        if hasattr(r, "peft_type"):
            from lora_dp.lora.peft_format import settings_of  # which imports torch

            self.__init__(**settings_of(r))  # type: ignore[misc]
            return
        self.r, self.target_modules, self.bias, self.init_a, self.adapter = r, target_modules, bias, init_a, adapter
        self.alpha = _one_of(alpha, lora_alpha, None, "lora_alpha")
        self.dropout = _one_of(dropout, lora_dropout, 0.0, "lora_dropout")
        self.trainable_modules = _one_of(trainable_modules, modules_to_save, None, "modules_to_save")
        self.rslora = _one_of(rslora, use_rslora, False, "use_rslora")
        self.trainable_modules = [] if self.trainable_modules is None else self.trainable_modules
        self.exclude_modules = [] if exclude_modules is None else exclude_modules
        self.layers_to_transform = (
            [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
        )
        self._check()

    def _check(self) -> None:
        check_alpha(self.alpha)
        check_number("dropout", self.dropout)
        check_flag("rslora", self.rslora)
        if not isinstance(self.r, Integral) or isinstance(self.r, bool) or self.r < 1:
            raise ValueError(f"r must be a whole number of at least 1, got {self.r!r}: 4 to 16 is usual.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}: 0 switches it off.")
        self.r, self.dropout = int(self.r), float(self.dropout)  # JSON has no NumPy numbers
        if self.bias not in get_args(Bias):
            raise ValueError(f"bias must be 'none', 'all' or 'lora_only', got {self.bias!r}.")
        check_init_a(self.init_a)
        if self.adapter not in get_args(Adapter):
            raise ValueError(f"adapter must be 'lora', 'xs' or 'tangent', got {self.adapter!r}.")
        if self.adapter != "lora" and self.init_a != "kaiming":
            whose = "comes from the weight" if self.adapter == "xs" else "is orthonormal anyway"
            raise ValueError(f"init_a = {self.init_a!r} has no effect with adapter {self.adapter!r}, whose A {whose}.")
        if isinstance(self.trainable_modules, str):
            raise TypeError(f"trainable_modules must be a list of names: write [{self.trainable_modules!r}].")
        self.trainable_modules = _names("trainable_modules", self.trainable_modules, "[] trains none whole")
        if not isinstance(self.target_modules, str):
            self.target_modules = _names(
                "target_modules", self.target_modules, "'all-linear' adapts every linear layer but the head"
            )
        if not isinstance(self.exclude_modules, str):
            self.exclude_modules = _names("exclude_modules", self.exclude_modules, "[] leaves none out")
        _check_layers(self.layers_to_transform)
        if self.target_modules == "" or not all([*self.target_modules, *self.trainable_modules]):
            raise ValueError("target_modules or a module's name is empty: name the layers, or use 'all-linear'.")
        if not self.target_modules and not self.trainable_modules:
            raise ValueError("Neither target_modules nor trainable_modules name anything to train: use 'all-linear'.")
        if self.target_modules != ALL_LINEAR:
            _check_pattern("target_modules", self.target_modules)
        _check_pattern("exclude_modules", self.exclude_modules)


def _check_pattern(setting: str, names: list[str] | str) -> None:
    if isinstance(names, str):
        try:
            re.compile(names)
        except re.error as error:
            raise ValueError(
                f"{setting} {names!r} is no regular expression ({error}): correct it, or give a list of names."
            ) from error


def _names(setting: str, given: object, remedy: str) -> list[str]:
    if (
        isinstance(given, Collection)
        and not hasattr(given, "dtype")  # a tensor or an array
        and all(isinstance(name, str) for name in given)
    ):
        return list(given)
    raise TypeError(f"{setting} must be a list of names, got {given!r}: {remedy}.")


def _one_of(ours: Any, theirs: Any, default: Any, name: str) -> Any:
    """What was given under either name of a setting."""
    if theirs is None:
        return ours
    if ours != default:
        raise ValueError(f"{name} is PEFT's name of {_PEFT_NAMES[name]}: give one of the two.")
    return theirs


def _check_layers(numbers: object) -> None:
    if numbers is not None and not (
        isinstance(numbers, list)
        and numbers
        and all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers)
    ):
        raise ValueError(
            f"layers_to_transform must be numbers of blocks, from 0 on, such as [10, 11], got {numbers!r}: None adapts "
            "those of all blocks."
        )


def _under(name: str) -> property:
    return property(lambda self: getattr(self, _PEFT_NAMES[name]), doc=f"PEFT's name of ``{_PEFT_NAMES[name]}``.")


for _name in _PEFT_NAMES:
    setattr(LoRAConfig, _name, _under(_name))
