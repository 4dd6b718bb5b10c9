"""LoRA adapters in a model: put them in, merge them, exchange their tensors, save and load them as PEFT does."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lora_dp import peft_format
from lora_dp.layers import DPLoRALinear, PrivateModule, linear_features
from lora_dp.ops.registry import wide_dtype
from lora_dp.placement import (
    ALL_LINEAR,
    Modules,
    check_targets,
    check_untied,
    find_roots,
    find_targets,
    has_private_bias,
    is_linear,
    outermost,
    private_kin,
)

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
        TypeError: ``trainable_modules`` is no list of names.
    """

    r: int = 8
    alpha: float | None = None
    target_modules: list[str] | str = ALL_LINEAR
    trainable_modules: list[str] = field(default_factory=list)
    dropout: float = 0.0
    rslora: bool = False
    bias: Bias = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r must be a whole number of at least 1, got {self.r!r}: 4 to 16 is usual.")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha}: leave it out for alpha = r.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}: 0 switches it off.")
        if self.bias not in get_args(Bias):
            raise ValueError(f"bias must be 'none', 'all' or 'lora_only', got {self.bias!r}.")
        if isinstance(self.trainable_modules, str):
            raise TypeError(f"trainable_modules must be a list of names: write [{self.trainable_modules!r}].")
        self.trainable_modules = list(self.trainable_modules)
        if not isinstance(self.target_modules, str):
            self.target_modules = list(self.target_modules)
        if not self.target_modules or not all([*self.target_modules, *self.trainable_modules]):
            raise ValueError("target_modules or a module's name is empty: name the layers, or use 'all-linear'.")
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(
                    f"target_modules {self.target_modules!r} is no regular expression ({error}): "
                    "correct it, or give a list of names.") from error


def inject_lora(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Put LoRA adapters into ``model``, in place: everything is frozen but them and ``config.trainable_modules``.

    Layers are replaced by private ones that share their parameters and keep their names, device and mode; a layer that
    stands in several places is replaced by one. All that is trained (factors, biases, modules trained whole) is kept in
    float32 where the model is in half precision, and computes in the model's dtype. Where a name in a list matches layers of another kind as
    well (timm's "proj" is also the patch embedding's convolution) these stay as they are. "all-linear" leaves the
    output head frozen unless it is in ``trainable_modules``: Transformers' output embeddings, timm's classifier, or a
    child called score, classifier or qa_outputs. It also passes over linear layers whose forward is bypassed or
    overridden, such as ``nn.MultiheadAttention.out_proj``; named explicitly they are an error.

    Returns:
        The same model, with ``model.lora_config`` set.

    Raises:
        ValueError: it has adapters already; a name matches nothing (with the nearest ones); the rank is above a
            layer's size; a layer cannot be adapted or trained in private; tied weights. The model is then unchanged.
    """
    _check_plain(model)
    modules = Modules.of(model)
    roots = find_roots(modules, config.trainable_modules)
    whole = modules.beneath(modules.names[root] for root in roots)
    _inject(model, modules, config, find_targets(model, modules, config.target_modules, whole), roots)
    return model


def _check_plain(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            raise ValueError(
                f"The model has adapters already (at '{name}'): start from the plain model (PEFT's merge_and_unload "
                "gives it).")


def _inject(model: nn.Module, modules: Modules, config: LoRAConfig, targets: list[str], roots: list[str]) -> None:
    """Replace ``targets`` and what lies beneath ``roots``, once all is known to fit."""
    check_targets(targets, modules, config.r)
    replacements: dict[int, PrivateModule] = {}
    trained: set[int] = set()
    for key, name in modules.beneath(modules.names[root] for root in roots).items():
        module = modules.names[name]
        if any(parameter is not None for parameter in module._parameters.values()):
            replacements[key] = private_kin(name, module, modules)
            trained.update(id(parameter) for parameter in module.parameters(recurse=False))
    adapted = {id(modules.names[name]) for name in targets}
    for key, name in modules.own.items() if config.bias != "none" else ():
        module = modules.names[name]
        bias = module._parameters.get("bias")
        if bias is None or key in replacements:
            continue
        if key in adapted:
            trained.add(id(bias))
        elif config.bias == "all" and has_private_bias(module, modules):
            replacements[key] = private_kin(name, module, modules)
            trained.add(id(bias))
    check_untied(model, trained)

    model.requires_grad_(False)
    for name in targets:
        module = modules.names[name]
        replacements[id(module)] = DPLoRALinear.from_linear(
            module, r=config.r, alpha=config.alpha, dropout=config.dropout, rslora=config.rslora)
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if child is not None and id(child) in replacements:
                setattr(parent, child_name, replacements[id(child)])
    for parameter in model.parameters():
        if id(parameter) in trained:
            parameter.requires_grad_(True)
            _widen(parameter)
    model.lora_config = config  # type: ignore[assignment]
    model.lora_trained_modules = roots  # type: ignore[assignment]


def _widen(parameter: nn.Parameter) -> None:
    """Keep a parameter of half precision in float32 from now on; it stays the same object."""
    parameter.data = parameter.data.to(wide_dtype(parameter.dtype))


def _adapters(model: nn.Module) -> dict[str, DPLoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, DPLoRALinear)}


def merge_adapters(model: nn.Module) -> None:
    """Add every adapter into its layer's weight: the model then runs at the plain one's speed, for inference.

    Raises:
        ValueError: an adapted weight is tied to another module, which merging would change too.
    """
    adapters = _adapters(model)
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
    """Take every adapter out of its layer's weight again, up to rounding."""
    for layer in _adapters(model).values():
        layer.unmerge()


def _check_unmerged(model: nn.Module) -> None:
    for name, layer in _adapters(model).items():
        if layer.merged:
            raise ValueError(f"The adapter of '{name}' is merged: call unmerge_adapters before loading another.")


def exchanged_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Both LoRA factors of each layer and all else that requires grad, named as the model does: what travels."""
    factors = {id(factor) for layer in _adapters(model).values() for factor in (layer.lora_A, layer.lora_B)}
    return {
        name: parameter for name, parameter in model.named_parameters()
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
    _check_unmerged(model)
    load_parameters(exchanged_parameters(model), state)


@torch.no_grad()
def load_parameters(parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters of the same names.

    Raises:
        ValueError: the names or shapes differ; nothing was copied.
    """
    _check_tensors(state, {name: parameter.shape for name, parameter in parameters.items()}, "The state")
    for name, tensor in state.items():
        _copy_whole(parameters[name], tensor)


@torch.no_grad()
def _copy_whole(parameter: Tensor, tensor: Tensor) -> None:
    """Copy ``tensor`` without loss: a parameter of half precision becomes float32 before it takes a wider tensor."""
    if torch.promote_types(parameter.dtype, tensor.dtype) != parameter.dtype:
        parameter.data = parameter.data.to(wide_dtype(parameter.dtype))
    parameter.copy_(tensor)


def _check_tensors(given: Mapping[str, Tensor], expected: Mapping[str, torch.Size], what: str) -> None:
    missing, unexpected = expected.keys() - given.keys(), given.keys() - expected.keys()
    for names, problem in ((missing, "lacks"), (unexpected, "has what the model's adapters lack:")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"{what} {problem} {', '.join(repr(n) for n in sorted(names)[:3])}{more}: it was made for other "
                "adapters or another model.")
    for name, tensor in given.items():
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{what} has '{name}' with shape {tuple(tensor.shape)} where the model needs {tuple(expected[name])}: "
                "it was made for another rank or another model.")


def _stored_shapes(
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


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer itself, by each of its names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _injected_with(model: nn.Module) -> tuple[LoRAConfig, list[str]]:
    config, roots = getattr(model, "lora_config", None), getattr(model, "lora_trained_modules", None)
    if not isinstance(config, LoRAConfig) or not isinstance(roots, list):
        raise ValueError("The model itself has no adapters: give the very model that inject_lora returned.")
    return config, roots


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save adapters, modules trained whole and trained biases in PEFT's format; PEFT loads them onto the plain model.

    Neither file is ever seen half-written. As in PEFT, ``bias="all"`` stores every bias of the model.

    Raises:
        ValueError: the model did not come from :func:`inject_lora` or :func:`load_adapter`.
    """
    config, roots = _injected_with(model)
    adapters = _adapters(model)
    names = [name for name, _ in model.named_modules() if name]
    state = _tensors(model)
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or getattr(model, "name_or_path", None)
    peft_format.write(folder, peft_format.StoredAdapter(
        r=config.r,
        alpha=float(config.r if config.alpha is None else config.alpha),
        target_modules=peft_format.target_modules_for(list(adapters), names),
        modules_to_save=peft_format.modules_to_save_for(roots, names),
        dropout=config.dropout,
        rslora=config.rslora,
        bias=config.bias,
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in adapters.values()),
        base_model=base or None,
        tensors={
            peft_format.peft_key(name, adapters): state[name]
            for name in _stored_shapes(model, adapters, roots, config.bias, config.r)
        },
    ))


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Load what :func:`save_adapter` or PEFT saved; a plain model first gets the adapters that the folder describes.

    Args:
        model: the plain model, or one with the same adapters (rank, scaling, bias, layers).
        folder: with adapter_config.json and adapter_model.safetensors.

    Returns:
        The same model, changed in place.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: not a LoRA adapter, an unsupported option, an adapter for another model, or other adapters than
            the model has. The model is then unchanged.
    """
    stored = peft_format.read(folder)
    modules = Modules.of(model)
    adapters = _adapters(model)
    if adapters:
        config, roots = _injected_with(model)
        _check_unmerged(model)
        _check_same(config, stored)
        targets = list(adapters)
    else:
        _check_plain(model)
        targets, roots = _stored_places(modules, stored)
        config = LoRAConfig(
            r=stored.r, alpha=stored.alpha, target_modules=stored.target_modules, trainable_modules=roots,
            dropout=stored.dropout, rslora=stored.rslora, bias=stored.bias)  # type: ignore[arg-type]
    shapes = _stored_shapes(model, targets, roots, config.bias, config.r)
    keys = {peft_format.peft_key(name, targets): name for name in shapes}
    _check_tensors(stored.tensors, {key: shapes[name] for key, name in keys.items()}, "The stored adapter")
    if not adapters:
        _inject(model, modules, config, targets, roots)
    state, trained = _tensors(model), exchanged_parameters(model)
    for key, name in keys.items():
        if name in trained:
            _copy_whole(trained[name], stored.tensors[key])
        else:
            state[name].copy_(stored.tensors[key])
    return model


def _stored_places(modules: Modules, stored: peft_format.StoredAdapter) -> tuple[list[str], list[str]]:
    """The layers that a stored adapter adapts and the modules that it trains whole, by full name."""
    roots = outermost(
        name for name in modules.own.values()
        if peft_format.matches_saved_module(name, stored.modules_to_save) and modules.names[name].state_dict())
    whole = modules.beneath(modules.names[root] for root in roots)
    targets = [
        name for key, name in modules.own.items()
        if key not in whole and is_linear(modules.names[name])
        and peft_format.matches_target(name, stored.target_modules)
    ]
    if not targets:
        raise ValueError(
            f"No linear layer of the model answers to {stored.target_modules!r}: the adapter is for another model.")
    return targets, roots


def _check_same(config: LoRAConfig, stored: peft_format.StoredAdapter) -> None:
    alpha = float(config.r if config.alpha is None else config.alpha)
    for name, mine, theirs in (
        ("r", config.r, stored.r), ("alpha", alpha, stored.alpha), ("rslora", config.rslora, stored.rslora),
        ("bias", config.bias, stored.bias),
    ):
        if mine != theirs:
            raise ValueError(
                f"The stored adapter has {name} = {theirs} but the model's has {mine}: load it onto the plain model.")
