"""Adapters added into the weights beneath them, for inference and for files that plain models read."""

import torch
from torch import nn

from lora_dp.argument_checks import check_kind
from lora_dp.nn.lora_linear import DPLoRALinear
from lora_dp.nn.private_module import PrivateModule, pass_recorder_of, replace_modules


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


@torch.no_grad()
def merge_and_unload(model: nn.Module) -> nn.Module:
    """Make a trained model an ordinary one, in place: adapters added into their weights, plain layers everywhere.

    What :func:`lora_dp.inject_lora` and :meth:`lora_dp.PrivacyEngine.make_private` put into the model is gone, their
    hooks too. What was trained in float32 gets the dtype of the frozen part. Everything requires grad again, as in a
    new model.

    Returns:
        The model; a plain layer in its place where the model is a private layer itself.

    Raises:
        ValueError: as of :func:`lora_dp.merge_adapters`.
        TypeError: no model, or PEFT's, which has a ``merge_and_unload`` of its own.

    >>> from lora_dp import LoRAConfig, inject_lora
    >>> model = inject_lora(nn.Sequential(nn.Linear(8, 8)), LoRAConfig(r=2, target_modules=["0"]))
    >>> merge_and_unload(model)
    Sequential(
      (0): Linear(in_features=8, out_features=8, bias=True)
    )
    """
    check_kind("model", model, nn.Module, "give the one with adapters")
    if hasattr(model, "peft_config"):
        raise TypeError("This model is PEFT's: call model.merge_and_unload().")
    merge_adapters(model)
    if (recorder := pass_recorder_of(model)) is not None:
        for leave in recorder.on_leave:
            leave()
    frozen = next((p.dtype for p in model.parameters() if not p.requires_grad), None)
    private = {id(module): module for module in model.modules() if isinstance(module, PrivateModule)}
    plain = {key: module.plain() for key, module in private.items()}
    for layer in plain.values():
        for parameter in layer.parameters():
            if frozen is not None and torch.promote_types(frozen, parameter.dtype) != frozen:
                parameter.data = parameter.data.to(frozen)
    replace_modules(model, plain)
    for parent in model.modules():
        for mark in ("lora_config", "lora_trained_modules", "lora_embeddings", "save_pretrained"):
            parent.__dict__.pop(mark, None)
    return plain.get(id(model), model).requires_grad_(True)


def check_unmerged(model: nn.Module) -> None:
    """Raise ValueError for a merged adapter, whose factors may not change."""
    for name, layer in adapters_of(model).items():
        if layer.merged:
            raise ValueError(f"The adapter of '{name}' is merged: call unmerge_adapters before loading another.")
