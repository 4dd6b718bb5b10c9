"""Adapters added into the weights beneath them, for inference and for files that plain models read."""

import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from lora_dp import peft_format
from lora_dp.arguments import check_kind
from lora_dp.layers import DPLoRALinear


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
                    "use the model unmerged.")
    for layer in adapters.values():
        layer.merge()


def unmerge_adapters(model: nn.Module) -> None:
    """Take every adapter out of its layer's weight again, up to the rounding of its dtype.

    Raises:
        TypeError: no model.
    """
    check_kind("model", model, nn.Module, "give the one with adapters")
    for layer in adapters_of(model).values():
        layer.unmerge()


def check_unmerged(model: nn.Module) -> None:
    """Raise ValueError for a merged adapter, whose factors may not change."""
    for name, layer in adapters_of(model).items():
        if layer.merged:
            raise ValueError(f"The adapter of '{name}' is merged: call unmerge_adapters before loading another.")


def _is_transformers(model: nn.Module) -> bool:
    return any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__)


class SavePretrained:
    """``save_pretrained`` for a model with adapters: what is opened again computes what was saved.

    Merged, the folder is that of a plain model. Unmerged, PEFT's two files are written beside the weights, where
    Transformers' ``from_pretrained`` finds and loads them if PEFT is installed.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> Any:
        """As the class's own.

        Raises:
            ValueError: merged weights beside an older adapter, which would count twice; adapters some of which are
                merged; or unmerged ones of a larger model, or of a class that is not Transformers'.
        """
        merged = {layer.merged for layer in adapters_of(self.model).values()}
        if len(merged) == 2:
            raise ValueError("Some adapters of the model are merged: call merge_adapters or unmerge_adapters for all.")
        if merged == {True}:
            if (Path(save_directory) / peft_format.CONFIG_NAME).exists():
                raise ValueError(
                    f"{save_directory} holds an adapter, which from_pretrained would add to the merged weights once "
                    "more: give another folder.")
        elif merged:
            if not (hasattr(self.model, "lora_config") and _is_transformers(self.model)):
                raise ValueError(
                    "What save_pretrained writes here would lose the adapters when opened again: call merge_adapters "
                    "first, or save_adapter with the whole model.")
            if options.get("is_main_process", args[0] if args else True):
                from lora_dp.adapter_files import save_adapter

                if importlib.util.find_spec("peft") is None:
                    warnings.warn(
                        "from_pretrained adds this model's adapters only where PEFT is installed: pip install peft "
                        "there, or call merge_adapters before save_pretrained.", stacklevel=2)
                save_adapter(self.model, save_directory)
        return type(self.model).save_pretrained(  # type: ignore[attr-defined]
            self.model, save_directory, *args, **options)


def keep_adapters_when_saved(model: nn.Module) -> None:
    """Give every module in ``model`` that holds adapters and has a ``save_pretrained`` a :class:`SavePretrained`."""
    for module in model.modules():
        if hasattr(type(module), "save_pretrained") and adapters_of(module):
            module.save_pretrained = SavePretrained(module)  # type: ignore[assignment]
