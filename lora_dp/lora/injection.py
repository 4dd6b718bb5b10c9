"""LoRA adapters and private layers put into a model."""

from typing import Any

from torch import nn

from lora_dp.argument_checks import check_kind
from lora_dp.lora import peft_format
from lora_dp.lora.config import LoRAConfig
from lora_dp.lora.saving import keep_adapters_when_saved
from lora_dp.lora.targets import (
    Modules,
    check_rank_fits,
    check_targets,
    check_untied,
    find_roots,
    find_targets,
    has_private_bias,
    private_kin,
)
from lora_dp.nn.adapter_start import Adapter
from lora_dp.nn.lora_linear import DPLoRALinear
from lora_dp.nn.lora_tangent_linear import DPLoRATangentLinear
from lora_dp.nn.lora_xs_linear import DPLoRAXSLinear
from lora_dp.nn.private_module import PrivateModule, replace_modules
from lora_dp.ops.registry import wide_dtype

_KINDS: dict[Adapter, type[DPLoRALinear]] = {"lora": DPLoRALinear, "xs": DPLoRAXSLinear, "tangent": DPLoRATangentLinear}


def inject_lora(model: nn.Module, config: Any) -> nn.Module:
    """Put LoRA adapters into ``model``, in place: everything is frozen but them and ``config.trainable_modules``.

    Layers are replaced by private ones that share their parameters and keep their names, device and mode; a layer that
    stands in several places is replaced by one. All that is trained (factors, biases, modules trained whole) is kept in
    float32 where the model is in half precision, and computes in the model's dtype. Where a name in a list matches
    layers of another kind as well (timm's "proj" is also the patch embedding's convolution) these stay as they are.
    "all-linear" leaves the output head frozen unless it is in ``trainable_modules``: Transformers' output embeddings,
    timm's classifier, or a child called score, classifier or qa_outputs. It also passes over linear layers whose
    forward is bypassed or overridden, such as ``nn.MultiheadAttention.out_proj`` or Mamba's dt_proj; named explicitly
    they are an error. Those that are bypassed by some kernels only, such as Mamba's out_proj, have to be named.
    Nor does it adapt what runs on a table of positions once for a whole batch, such as Swin V2's cpb_mlp.

    Args:
        model: the plain model.
        config: a :class:`LoRAConfig`, or a ``peft.LoraConfig`` of plain LoRA. For PEFT's other kinds give
            ``get_peft_model(model, config)`` to :meth:`lora_dp.PrivacyEngine.make_private`.

    Returns:
        The same model, with ``model.lora_config`` set.

    Raises:
        TypeError: no module, or no LoRAConfig.
        ValueError: it has adapters already; a name matches nothing (with the nearest ones); the rank is above a
            layer's size; a layer cannot be adapted or trained in private; tied weights. The model is then unchanged.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> model = inject_lora(model, LoRAConfig(r=2, target_modules=["0"], trainable_modules=["2"]))
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['0.lora_A', '0.lora_B', '2.weight', '2.bias']
    """
    check_kind("model", model, nn.Module, "give the plain model")
    if type(config).__module__.startswith("peft."):
        config = LoRAConfig(**peft_format.settings_of(config))
    check_kind("config", config, LoRAConfig, "LoRAConfig() adapts all linear layers but the head")
    check_without_adapters(model)
    modules = Modules.of(model)
    roots = find_roots(modules, config.trainable_modules)
    whole = modules.beneath(modules.names[root] for root in roots)
    targets = find_targets(model, modules, config, whole)
    check_rank_fits(targets, modules, config.r)
    inject_into(model, modules, config, targets, roots)
    return model


def check_without_adapters(model: nn.Module) -> None:
    """Raise ValueError for a model with adapters."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            raise ValueError(
                f"The model has adapters already (at '{name}'): start from the plain model (PEFT's merge_and_unload "
                "gives it)."
            )


def inject_into(model: nn.Module, modules: Modules, config: LoRAConfig, targets: list[str], roots: list[str]) -> None:
    """Replace ``targets`` and what lies beneath ``roots``, once all is known to fit."""
    check_targets(targets, modules)
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
    kind = _KINDS[config.adapter]
    for name in targets:
        module = modules.names[name]
        replacements[id(module)] = kind.from_linear(
            module,
            r=config.r,
            alpha=config.alpha,
            dropout=config.dropout,
            rslora=config.rslora,
            init_a=config.init_a,
            any_rank=True,  # inject_lora has looked; what others have trained is loaded as it is
        )
    replace_modules(model, replacements)
    for parameter in model.parameters():
        if id(parameter) in trained:
            parameter.requires_grad_(True)
            _widen(parameter)
    model.lora_config = config  # type: ignore[assignment]
    model.lora_trained_modules = roots  # type: ignore[assignment]
    keep_adapters_when_saved(model)


def _widen(parameter: nn.Parameter) -> None:
    """Keep a parameter of half precision in float32 from now on; it stays the same object."""
    parameter.data = parameter.data.to(wide_dtype(parameter.dtype))
