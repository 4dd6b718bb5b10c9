"""LoRA adapters: their settings, and the tensors that they exchange."""

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lora_dp.argument_checks import check_flag, check_number
from lora_dp.lora.merging import adapters_of, check_unmerged
from lora_dp.lora.targets import ALL_LINEAR
from lora_dp.nn.layers import check_alpha
from lora_dp.ops.registry import wide_dtype

Bias = Literal["none", "all", "lora_only"]


@dataclass
class LoRAConfig:
    """What to train in a model.

    Args:
        r: rank of the adapters, at least 1.
        alpha: scaling is alpha / r; None means alpha = r.
        target_modules: layers to adapt (``nn.Linear``, and Transformers' ``Conv1D``): a list of names or name endings
            ("query", "attn.qkv"), a regular expression for the whole name, or "all-linear": every one outside
            ``trainable_modules`` and the output head.
        trainable_modules: names or name endings of modules to train whole, such as the head: themselves and all
            beneath must be Linear, Conv1D, LayerNorm or Embedding.
        dropout: probability on the adapters' input, in [0, 1).
        rslora: scale by alpha / √r instead (Kalajdzievski 2023, arXiv 2312.03732).
        bias: biases to train besides: "none", "lora_only" (those of adapted layers) or "all" (those of every
            linear layer and LayerNorm; others, such as a convolution's, stay frozen).

    Raises:
        ValueError: a value out of range.
        TypeError: ``target_modules`` or ``trainable_modules`` is no list of names, or a value of another type.
    """

    r: int = 8
    alpha: float | None = None
    target_modules: list[str] | str = ALL_LINEAR
    trainable_modules: list[str] = field(default_factory=list)
    dropout: float = 0.0
    rslora: bool = False
    bias: Bias = "none"

    def __post_init__(self) -> None:
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
        if isinstance(self.trainable_modules, str):
            raise TypeError(f"trainable_modules must be a list of names: write [{self.trainable_modules!r}].")
        self.trainable_modules = _names("trainable_modules", self.trainable_modules, "[] trains none whole")
        if not isinstance(self.target_modules, str):
            self.target_modules = _names(
                "target_modules", self.target_modules, "'all-linear' adapts every linear layer but the head"
            )
        if not self.target_modules or not all([*self.target_modules, *self.trainable_modules]):
            raise ValueError("target_modules or a module's name is empty: name the layers, or use 'all-linear'.")
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(
                    f"target_modules {self.target_modules!r} is no regular expression ({error}): "
                    "correct it, or give a list of names."
                ) from error


def _names(setting: str, given: object, remedy: str) -> list[str]:
    if (
        isinstance(given, Collection)
        and not isinstance(given, torch.Tensor)
        and all(isinstance(name, str) for name in given)
    ):
        return list(given)
    raise TypeError(f"{setting} must be a list of names, got {given!r}: {remedy}.")


def warn_of_half_precision(model: nn.Module) -> None:
    """Warn where what is trained was made half precision after :func:`inject_lora`, which keeps it in float32."""
    half = [
        name
        for name, parameter in exchanged_parameters(model).items()
        if parameter.requires_grad and parameter.dtype != wide_dtype(parameter.dtype)
    ]
    if half and adapters_of(model):
        warnings.warn(
            f"{len(half)} trained parameters are in half precision, '{half[0]}' the first: most of their values never "
            "change at small learning rates. Convert the model before inject_lora, which keeps what is trained in "
            "float32.",
            stacklevel=4,
        )


def exchanged_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Both LoRA factors of each layer and all else that requires grad, named as the model does: what travels."""
    factors = {id(factor) for layer in adapters_of(model).values() for factor in (layer.lora_A, layer.lora_B)}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or id(parameter) in factors
    }


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of :func:`exchanged_parameters`."""
    return {name: parameter.detach().clone() for name, parameter in exchanged_parameters(model).items()}


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy what :func:`adapter_state` returned into a model with the same adapters.

    Raises:
        ValueError: the names or shapes differ, or an adapter is merged; the model is then unchanged.
    """
    check_unmerged(model)
    load_parameters(exchanged_parameters(model), state)


@torch.no_grad()
def load_parameters(parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters of the same names.

    Raises:
        ValueError: the names or shapes differ; nothing was copied.
    """
    check_tensors(state, {name: parameter.shape for name, parameter in parameters.items()}, "The state")
    for name, tensor in state.items():
        copy_whole(parameters[name], tensor)


@torch.no_grad()
def copy_whole(parameter: Tensor, tensor: Tensor) -> None:
    """Copy ``tensor`` without loss: a parameter of half precision becomes float32 before it takes a wider tensor."""
    if torch.promote_types(parameter.dtype, tensor.dtype) != parameter.dtype:
        parameter.data = parameter.data.to(wide_dtype(parameter.dtype))
    parameter.copy_(tensor)


def check_tensors(given: Mapping[str, Tensor], expected: Mapping[str, torch.Size], what: str) -> None:
    """Raise ValueError for tensors whose names or shapes are not those expected; ``what`` begins the sentence."""
    missing, unexpected = expected.keys() - given.keys(), given.keys() - expected.keys()
    for names, problem in ((missing, "lacks"), (unexpected, "has what the model's adapters lack:")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"{what} {problem} {', '.join(repr(n) for n in sorted(names)[:3])}{more}: it was made for other "
                "adapters or another model."
            )
    for name, tensor in given.items():
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{what} has '{name}' with shape {tuple(tensor.shape)} where the model needs {tuple(expected[name])}: "
                "it was made for another rank or another model."
            )
