"""The tensors of LoRA adapters in a model, which it exchanges with others."""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_dp.lora.merging import adapters_of, check_unmerged
from lora_dp.ops.registry import wide_dtype


def warn_of_half_precision(model: nn.Module) -> None:
    """Warn where trained parameters were made half precision after :func:`~lora_dp.inject_lora` (it keeps float32)."""
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
            stacklevel=5,
        )


def made_by_peft(model: nn.Module) -> bool:
    """Whether a part of ``model`` is PEFT's; told by name, so as not to import PEFT."""
    return any(type(module).__module__.partition(".")[0] == "peft" for module in model.modules())


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
def load_parameters(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters of the same names.

    Raises:
        ValueError: the names or shapes differ; nothing was copied.
    """
    check_adapter_tensors(state, {name: parameter.shape for name, parameter in parameters.items()}, "The state")
    for name, tensor in state.items():
        copy_whole(parameters[name], tensor)


@torch.no_grad()
def copy_whole(parameter: Tensor, tensor: Tensor) -> None:
    """Copy ``tensor`` without loss: a parameter of half precision becomes float32 before it takes a wider tensor."""
    if torch.promote_types(parameter.dtype, tensor.dtype) != parameter.dtype:
        parameter.data = parameter.data.to(wide_dtype(parameter.dtype))
    parameter.copy_(tensor)


def check_adapter_tensors(given: Mapping[str, Tensor], expected: Mapping[str, torch.Size], what: str) -> None:
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
