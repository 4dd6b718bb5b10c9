"""State dicts of merged layers: those of plain ones, and loaded nowhere where the adapter would count twice."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_FACTORS = ("lora_A", "lora_B", "lora_R", "lora_dA", "lora_dB")


class MergeableLayer(Protocol):
    """What a layer with an adapter shows of itself."""

    weight: nn.Parameter
    lora_B: nn.Parameter
    merged: bool

    def weight_with(self, sign: int) -> Tensor:
        """The weight with the adapter added or taken out."""
        ...


def is_factor(key: str) -> bool:
    """Whether a key of a state dict is a LoRA factor's."""
    return key.rpartition(".")[2] in _FACTORS


def holds_factors(state_dict: Mapping[str, Any], prefix: str) -> bool:
    """Whether a state dict has a factor of the layer at ``prefix``."""
    return any(f"{prefix}{factor}" in state_dict for factor in _FACTORS)


def leave_plain(destination: Any, prefix: str) -> None:
    """Leave in a state dict what a plain layer would hold, with a mark in the metadata that torch keeps beside it."""
    for factor in _FACTORS:
        destination.pop(f"{prefix}{factor}", None)
    if hasattr(destination, "_metadata"):
        destination._metadata[prefix[:-1]]["merged"] = True


def refusal(
    layer: MergeableLayer, state_dict: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any]
) -> str | None:
    """Why a layer must not take a state, in a sentence; None where it may.

    A weight without factors is a plain one, or has the adapter in it: then the state is marked, or, where a file keeps
    no mark, its weight is the layer's own with the adapter added.
    """
    weight, factors = state_dict.get(f"{prefix}weight"), holds_factors(state_dict, prefix)
    name = prefix[:-1] or type(layer).__name__
    if layer.merged:
        if factors == (weight is not None) or (weight is not None and _equal(weight, layer.weight)):
            return None
        return (
            f"'{name}' is merged, and the state holds {'factors' if factors else 'another weight'} alone for it: "
            "call unmerge_adapters first."
        )
    if weight is not None and not factors and (metadata.get("merged") or _counts_in(layer, weight)):
        return (
            f"The state holds a merged weight for '{name}', in which the adapter counts already: load it into the "
            "plain model, or save it again after unmerge_adapters."
        )
    return None


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and not one.is_meta and torch.equal(one.to(other), other)


@torch.no_grad()
def _counts_in(layer: MergeableLayer, weight: Tensor) -> bool:
    """Whether ``weight`` is the layer's own with its adapter added, up to rounding."""
    if weight.shape != layer.weight.shape or weight.is_meta or layer.weight.is_meta or not layer.lora_B.any():
        return False
    merged = layer.weight_with(1).double()
    update = (merged - layer.weight.double()).norm()
    return bool((merged - weight.to(merged)).norm() < 0.1 * update)
