"""Adapters added into the weights beneath them, for inference and for files that plain models read."""

from torch import nn

from lora_dp.argument_checks import check_kind
from lora_dp.nn.lora_linear import DPLoRALinear


def adapters_of(model: nn.Module) -> dict[str, DPLoRALinear]:
    """The adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DPLoRALinear)}


def merge_adapters(model: nn.Module) -> None:
    """Add every adapter into its layer's weight: the model then runs at the plain one's speed, for inference.

    The state dict, and so ``save_pretrained``, is then that of the plain model, with merged weights and no factors.
    Sums are float32 and are rounded once to the weight's dtype: in bfloat16 a change below 1/256 of an entry may be
    lost, so merge a float32 copy of the model where that matters.

    Raises:
        ValueError: an adapted weight is tied to another module, which merging would change too.
        TypeError: no model.

    >>> from lora_dp import LoRAConfig, inject_lora
    >>> model = inject_lora(nn.Sequential(nn.Linear(8, 8)), LoRAConfig(r=2, target_modules=["0"]))
    >>> merge_adapters(model)
    >>> list(model.state_dict())
    ['0.weight', '0.bias']
    """
    check_kind("model", model, nn.Module, "give the one with adapters")
    adapters = adapters_of(model)
    weights = {id(layer.weight): name for name, layer in adapters.items()}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            adapted = weights.get(id(parameter))
            if adapted is not None and adapted != name:
                raise ValueError(
                    f"'{adapted}' shares its weight with '{name}', which merging would change as well: untie them, or "
                    "use the model unmerged."
                )
    for layer in adapters.values():
        layer.merge()


def unmerge_adapters(model: nn.Module) -> None:
    """Take every adapter out of its layer's weight again, up to the rounding of its dtype.

    Raises:
        TypeError: no model.

    >>> from lora_dp import LoRAConfig, inject_lora
    >>> model = inject_lora(nn.Sequential(nn.Linear(8, 8)), LoRAConfig(r=2, target_modules=["0"]))
    >>> merge_adapters(model)
    >>> unmerge_adapters(model)
    >>> list(model.state_dict())
    ['0.weight', '0.bias', '0.lora_A', '0.lora_B']
    """
    check_kind("model", model, nn.Module, "give the one with adapters")
    for layer in adapters_of(model).values():
        layer.unmerge()


def check_unmerged(model: nn.Module) -> None:
    """Raise ValueError for a merged adapter, whose factors may not change."""
    for name, layer in adapters_of(model).items():
        if layer.merged:
            raise ValueError(f"The adapter of '{name}' is merged: call unmerge_adapters before loading another.")
