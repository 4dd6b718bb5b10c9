"""Adapters on disk, loaded in PEFT's format: into a model that has them, or that gets them first."""

import os
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lora_dp.argument_checks import check_kind, check_path
from lora_dp.lora import peft_format
from lora_dp.lora.adapters import check_adapter_tensors, copy_whole, exchanged_parameters
from lora_dp.lora.config import LoRAConfig
from lora_dp.lora.injection import check_without_adapters, inject_into
from lora_dp.lora.merging import adapters_of, check_unmerged
from lora_dp.lora.saving import injected_with, stored_shapes, tensors_of
from lora_dp.lora.targets import Modules, is_linear, outermost
from lora_dp.nn.lora_linear import DPLoRALinear
from lora_dp.nn.lora_tangent_linear import DPLoRATangentLinear, check_tangent_point
from lora_dp.nn.lora_xs_linear import DPLoRAXSLinear


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Load what :func:`save_adapter` or PEFT saved; a plain model first gets the adapters that the folder describes.

    Embeddings and output layers that the folder carries, as PEFT's does after ``resize_token_embeddings``, take the
    place of the model's.

    Args:
        model: the plain model, or one with the same adapters (rank, scaling, bias, layers).
        folder: with adapter_config.json and adapter_model.safetensors.

    Returns:
        The same model, changed in place.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: not a LoRA adapter, an unsupported option, an adapter for another model, other adapters than the
            model has, or tensors that are not floating-point or not finite. The model is then unchanged.
        TypeError: no model, or no path.

    >>> from lora_dp import inject_lora, save_adapter
    >>> trained = inject_lora(nn.Sequential(nn.Linear(8, 8)), LoRAConfig(r=2, target_modules=["0"]))
    >>> save_adapter(trained, "adapter")
    >>> model = load_adapter(nn.Sequential(nn.Linear(8, 8)), "adapter")
    >>> torch.equal(model[0].lora_A, trained[0].lora_A)
    True
    """
    check_kind("model", model, nn.Module, "give the plain model, or the one that inject_lora returned")
    check_path("folder", folder)
    stored = peft_format.read(folder)
    modules = Modules.of(model)
    adapters = adapters_of(model)
    if adapters:
        config, roots = injected_with(model)
        check_unmerged(model)
        _check_same(config, stored)
        targets = list(adapters)
    else:
        check_without_adapters(model)
        targets, roots = _stored_places(modules, stored)
        config = LoRAConfig(
            r=stored.r,
            alpha=stored.alpha,
            target_modules=stored.target_modules,
            trainable_modules=roots,
            dropout=stored.dropout,
            rslora=stored.rslora,
            bias=stored.bias,  # type: ignore[arg-type]
        )
    shapes = stored_shapes(model, targets, roots, config.bias, config.r)
    embeddings = _carried_embeddings(model, stored, targets, shapes)
    keys = {peft_format.peft_key(name, targets): name for name in [*shapes, *embeddings]}
    expected = {key: (shapes | embeddings)[name] for key, name in keys.items()}
    check_adapter_tensors(stored.tensors, expected, "The stored adapter")
    _check_values(stored.tensors)
    cores = _cores(adapters, stored.tensors)
    _check_points(adapters, stored.tensors)
    if not adapters:
        inject_into(model, modules, config, targets, roots)
    model.lora_embeddings = sorted(embeddings)  # type: ignore[assignment]
    state, trained = tensors_of(model), exchanged_parameters(model)
    for key, name in keys.items():
        if name in cores:
            layer, core = cores[name]
            layer.lora_R.copy_(core)
        elif name in trained:
            copy_whole(trained[name], stored.tensors[key])
        else:
            state[name].copy_(stored.tensors[key])
    for adapter in adapters.values():
        if isinstance(adapter, DPLoRATangentLinear):
            adapter.lora_dA.zero_()
            adapter.lora_dB.zero_()
    return model


def _cores(
    adapters: Mapping[str, DPLoRALinear], tensors: Mapping[str, Tensor]
) -> dict[str, tuple[DPLoRAXSLinear, Tensor]]:
    """For the name of each B that has a core in its place: the layer and that core.

    Raises:
        ValueError: a stored B has none; by name.
    """
    found = {}
    for name, layer in adapters.items():
        if isinstance(layer, DPLoRAXSLinear):
            try:
                core = layer.core_of(tensors[peft_format.peft_key(f"{name}.lora_B", adapters)])
            except ValueError as error:
                raise ValueError(f"'{name}': {error}") from None
            found[f"{name}.lora_B"] = (layer, core)
    return found


def _check_points(adapters: Mapping[str, DPLoRALinear], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for stored factors at which a layer has no tangent space; by name."""
    for name, layer in adapters.items():
        if isinstance(layer, DPLoRATangentLinear):
            keys = (peft_format.peft_key(f"{name}.{factor}", adapters) for factor in ("lora_A", "lora_B"))
            try:
                check_tangent_point(*(tensors[key] for key in keys))
            except ValueError as error:
                raise ValueError(f"'{name}': {error}") from None


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a stored tensor that holds whole numbers, or any that is not finite; by name."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"The stored adapter has '{name}' in {tensor.dtype}, which is not floating-point: save the adapter "
                "without quantisation."
            )
        if not bool(torch.isfinite(tensor.float()).all()):
            raise ValueError(
                f"The stored adapter has NaN or infinite numbers in '{name}': the training that saved it had diverged, "
                "so take an earlier one."
            )


def _carried_embeddings(
    model: nn.Module, stored: peft_format.StoredAdapter, targets: Collection[str], known: Mapping[str, torch.Size]
) -> dict[str, torch.Size]:
    """Names and shapes of the embeddings and output layers that a stored adapter brings with it, frozen.

    Raises:
        ValueError: one is adapted itself, or has another number of rows than the model's.
    """
    ends = [getattr(model, getter, lambda: None)() for getter in ("get_input_embeddings", "get_output_embeddings")]
    parameters = {
        f"{prefix}.{leaf}": parameter
        for prefix, module in model.named_modules(remove_duplicate=False)
        if any(module is end for end in ends)
        for leaf, parameter in module.named_parameters(recurse=False)
    }
    carried: dict[str, torch.Size] = {}
    for key, tensor in stored.tensors.items():
        module, _, factor = peft_format.parameter_name(key).partition(".lora_embedding_")
        if factor:
            raise ValueError(
                f"The stored adapter adapts the embedding '{module}', which is not supported: train it whole "
                "(modules_to_save in PEFT), or leave it out."
            )
        name = peft_format.parameter_name(key)
        if name not in parameters or peft_format.peft_key(name, targets) != key:
            continue
        mine = parameters[name]
        if tensor.shape != mine.shape:
            raise ValueError(
                f"The stored adapter carries '{name}' with shape {tuple(tensor.shape)} where the model has "
                f"{tuple(mine.shape)}: call model.resize_token_embeddings({tensor.shape[0]}) before load_adapter, or "
                "start from the base model that it was trained on."
            )
        if name not in known:
            carried[name] = mine.shape
    return carried


def _stored_places(modules: Modules, stored: peft_format.StoredAdapter) -> tuple[list[str], list[str]]:
    """The layers that a stored adapter adapts and the modules that it trains whole, by full name."""
    roots = outermost(
        name
        for name in modules.own.values()
        if peft_format.matches_saved_module(name, stored.modules_to_save) and modules.names[name].state_dict()
    )
    whole = modules.beneath(modules.names[root] for root in roots)
    targets = [
        name
        for key, name in modules.own.items()
        if key not in whole
        and is_linear(modules.names[name])
        and peft_format.matches_target(name, stored.target_modules)
    ]
    if not targets and stored.target_modules:
        raise ValueError(
            f"No linear layer of the model answers to {stored.target_modules!r}: the adapter is for another model."
        )
    return targets, roots


def _check_same(config: LoRAConfig, stored: peft_format.StoredAdapter) -> None:
    alpha = float(config.r if config.alpha is None else config.alpha)
    for name, mine, theirs in (
        ("r", config.r, stored.r),
        ("alpha", alpha, stored.alpha),
        ("rslora", config.rslora, stored.rslora),
        ("bias", config.bias, stored.bias),
    ):
        if mine != theirs:
            raise ValueError(
                f"The stored adapter has {name} = {theirs} but the model's has {mine}: load it onto the plain model."
            )
