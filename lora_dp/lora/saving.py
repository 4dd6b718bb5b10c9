"""Adapters on disk, saved in PEFT's format: by themselves, or beside what a model saves."""

import importlib.util
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_dp.argument_checks import check_kind, check_path
from lora_dp.lora import peft_format
from lora_dp.lora.config import LoRAConfig
from lora_dp.lora.merging import adapters_of
from lora_dp.nn.lora_linear import DPLoRALinear
from lora_dp.nn.private_module import linear_features


def stored_shapes(
    model: nn.Module, targets: Iterable[str], roots: Iterable[str], bias: str, r: int
) -> dict[str, torch.Size]:
    """Names and shapes of what PEFT stores of ``model``, before or after the adapters are in it."""
    shapes: dict[str, torch.Size] = {}
    for name in targets:
        layer = model.get_submodule(name)
        if isinstance(layer, DPLoRALinear):
            in_features, out_features = layer.in_features, layer.out_features
        else:
            in_features, out_features = linear_features(layer)
        shapes[f"{name}.lora_A"] = torch.Size((r, in_features))
        shapes[f"{name}.lora_B"] = torch.Size((out_features, r))
        if bias == "lora_only" and isinstance(layer.bias, Tensor):
            shapes[f"{name}.bias"] = layer.bias.shape
    for root in roots:
        shapes |= {f"{root}.{name}": tensor.shape for name, tensor in model.get_submodule(root).state_dict().items()}
    if bias == "all":
        shapes |= {n: p.shape for n, p in model.named_parameters() if n.rpartition(".")[2] == "bias"}
    return shapes


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer itself, by each of its names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def injected_with(model: nn.Module) -> tuple[LoRAConfig, list[str]]:
    config, roots = getattr(model, "lora_config", None), getattr(model, "lora_trained_modules", None)
    if not isinstance(config, LoRAConfig) or not isinstance(roots, list):
        raise ValueError("The model itself has no adapters: give the very model that inject_lora returned.")
    return config, roots


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save adapters, modules trained whole and trained biases in PEFT's format; PEFT loads them onto the plain model.

    The core of an "xs" adapter goes into its B, so that the file is that of a LoRA adapter. A "tangent" one is saved
    where its coordinates are zero, as after each round. Neither file is ever seen half-written. As in PEFT,
    ``bias="all"`` stores every bias of the model. Embeddings that came with a loaded adapter go on with it.

    Raises:
        ValueError: the model did not come from :func:`inject_lora` or :func:`load_adapter`; or the adapter stands
            beside its point in the tangent space, so that its product has rank 2r.
        TypeError: no model, or no path.

    >>> from lora_dp import inject_lora
    >>> model = inject_lora(nn.Sequential(nn.Linear(8, 8)), LoRAConfig(r=2, target_modules=["0"]))
    >>> save_adapter(model, "adapter")
    >>> sorted(path.name for path in Path("adapter").iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    check_kind("model", model, nn.Module, "give the one that inject_lora returned")
    check_path("folder", folder)
    config, roots = injected_with(model)
    adapters = adapters_of(model)
    names = [name for name, _ in model.named_modules() if name]
    state = tensors_of(model)
    shapes = stored_shapes(model, adapters, roots, config.bias, config.r)
    for name, adapter in adapters.items():
        state[f"{name}.lora_B"], state[f"{name}.lora_A"] = adapter.factors()
        if state[f"{name}.lora_A"].shape[0] != config.r:
            raise ValueError(
                f"'{name}' stands beside its point in the tangent space, and so has rank {2 * config.r}: merge it, or "
                f"cut B and A of its factors() to rank {config.r} and zero its coordinates."
            )
    tensors = {peft_format.peft_key(name, adapters): state[name] for name in shapes}
    for name in getattr(model, "lora_embeddings", []):
        layer = adapters.get(name.rpartition(".")[0])
        merged = layer is not None and layer.merged and name.endswith(".weight")
        tensors[peft_format.peft_key(name, adapters)] = layer.weight_with(-1) if layer and merged else state[name]
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or getattr(model, "name_or_path", None)
    peft_format.write(
        folder,
        peft_format.StoredAdapter(
            r=config.r,
            alpha=float(config.r if config.alpha is None else config.alpha),
            target_modules=peft_format.target_modules_for(list(adapters), names),
            modules_to_save=peft_format.modules_to_save_for(roots, names),
            dropout=config.dropout,
            rslora=config.rslora,
            bias=config.bias,
            fan_in_fan_out=any(layer.fan_in_fan_out for layer in adapters.values()),
            base_model=base or None,
            tensors=tensors,
        ),
    )


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
                    "more: give another folder."
                )
        elif merged:
            if not (hasattr(self.model, "lora_config") and _is_transformers(self.model)):
                raise ValueError(
                    "What save_pretrained writes here would lose the adapters when opened again: call merge_adapters "
                    "first, or save_adapter with the whole model."
                )
            if options.get("is_main_process", args[0] if args else True):
                if importlib.util.find_spec("peft") is None:
                    warnings.warn(
                        "from_pretrained adds this model's adapters only where PEFT is installed: pip install peft "
                        "there, or call merge_adapters before save_pretrained.",
                        stacklevel=2,
                    )
                save_adapter(self.model, save_directory)
        return type(self.model).save_pretrained(  # type: ignore[attr-defined]
            self.model, save_directory, *args, **options
        )


def keep_adapters_when_saved(model: nn.Module) -> None:
    """Give every module in ``model`` that holds adapters and has a ``save_pretrained`` a :class:`SavePretrained`."""
    for module in model.modules():
        if hasattr(type(module), "save_pretrained") and adapters_of(module):
            module.save_pretrained = SavePretrained(module)  # type: ignore[assignment]
