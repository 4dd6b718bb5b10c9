"""PEFT's adapted layers, made private where they stand: a PeftModel stays one, with all that PEFT does to it."""

from collections.abc import Iterable
from typing import Any, cast

import torch.nn.functional as F
from peft import PeftType
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lora_dp.lora.targets import Modules, check_untied, is_linear, private_kin
from lora_dp.nn import functional
from lora_dp.nn.per_example import Slot
from lora_dp.nn.private_module import PrivateModule, is_transposed, replace_modules


class DPPeftLinear(PrivateModule, lora.Linear):
    """PEFT's ``lora.Linear`` whose trained factors, and bias, a private step can train.

    A layer becomes one by :func:`adopt_peft_layers`. Without an engine, and in evaluation, it is PEFT's to the last
    bit. While a private step is recorded it computes the same in the dtype of its input, factors cast to it.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), LoraConfig(r=2, target_modules=["0"]))
    >>> adopt_peft_layers(model)
    >>> layer = model.base_model.model[0]
    >>> isinstance(layer, lora.Linear), [name for name in layer.private_parameters()]
    (True, ['lora_A.default.weight', 'lora_B.default.weight'])
    """

    def private_parameters(self) -> dict[str, nn.Parameter]:
        """Both factors of every adapter and the frozen layer's bias, where they require grad, by name from here.

        >>> [tuple(factor.shape) for factor in layer.private_parameters().values()]
        [(2, 6), (4, 2)]
        """
        found = {
            f"{factor}.{adapter}.weight": linear.weight
            for factor in ("lora_A", "lora_B")
            for adapter, linear in getattr(self, factor).items()
        }
        bias = self.get_base_layer().bias
        named = found if bias is None else {**found, "base_layer.bias": bias}
        return {name: parameter for name, parameter in named.items() if parameter.requires_grad}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's.

        Raises:
            RuntimeError: while recording, adapters that are merged, or of a kind that :func:`adopt_peft_layers`
                refuses.
            ValueError: while recording, an adapter chosen for each example.
        """
        slots = self._slots_of(self.private_parameters())
        if slots is None:
            return lora.Linear.forward(self, x, *args, **kwargs)
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names choose among adapters for inference: leave them out of private training.")
        if self.merged:
            raise RuntimeError("A merged adapter cannot be trained: call unmerge_adapter() first.")
        base: Any = self.get_base_layer()
        weight = base.weight.t() if is_transposed(base) else base.weight
        bias_slot = slots.get("base_layer.bias")
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        if len(active) == 1 and not self._dropout(active[0]):
            factors = self._factors(active[0], slots)
            return functional.lora_linear(x, weight, base.bias, *factors[:3], slots={**factors[3], "bias": bias_slot})
        result = functional.linear(x, weight, base.bias, slots={"weight": None, "bias": bias_slot})
        for name in active:
            lora_A, lora_B, scaling, own = self._factors(name, slots)
            dropped = F.dropout(x, rate) if (rate := self._dropout(name)) else x
            result = result + functional.lora_linear(
                dropped, None, None, lora_A, lora_B, scaling, slots={**own, "bias": None}
            )
        return result

    def _dropout(self, adapter: str) -> float:
        return float(getattr(self.lora_dropout[adapter], "p", 0.0)) if self.training else 0.0

    def _factors(self, adapter: str, slots: dict[str, Slot | None]) -> tuple[Tensor, Tensor, float, dict[str, Any]]:
        if what := _special(self, adapter):
            raise RuntimeError(f"The adapter '{adapter}' {what}, which no private layer computes: leave it inactive.")
        own = {factor: slots.get(f"{factor}.{adapter}.weight") for factor in ("lora_A", "lora_B")}
        lora_A, lora_B = (cast(Tensor, factor[adapter].weight) for factor in (self.lora_A, self.lora_B))
        return lora_A, lora_B, float(self.scaling[adapter]), own


# Each gives a whole batch one row of virtual tokens.
_OF_WHOLE_BATCHES = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)


def adopt_peft_layers(model: nn.Module) -> None:
    """Make all that a model with PEFT's adapters trains private, in place; parameters stay the same objects.

    LoRA's linear layers become :class:`DPPeftLinear`. What is trained whole (``modules_to_save``, biases) gets the
    private layers that :func:`lora_dp.inject_lora` would give it.

    Raises:
        ValueError: something that is trained has no private layer: DoRA and LoRA's other variants, other tuners, LoRA
            on embeddings, convolutions or quantised layers; or it is tied to another module; by name, and the model is
            as it was.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), LoraConfig(r=2, target_modules=["0"], use_dora=True))
    >>> adopt_peft_layers(model)
    Traceback (most recent call last):
    ValueError: 'base_model.model.0' has PEFT's DoRA, ...
    """
    modules = Modules.of(model)
    for name, module in model.named_modules():
        if getattr(module, "peft_type", None) in _OF_WHOLE_BATCHES:
            raise ValueError(
                f"{repr(name) if name else 'The model'} has PEFT's {module.peft_type.value}, whose tokens are looked "
                "up once for a whole batch, so that no gradient belongs to one example: take PrefixTuningConfig, or "
                "LoraConfig."
            )
    adapted: list[Any] = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and any(p.requires_grad for p in _adapter_parameters(module)):
            _check_adapted(name, module, modules)
            adapted.append(module)
    inside = {id(part) for layer in adapted for part in layer.modules()}
    replacements = {
        id(module): private_kin(name, module, modules)
        for name, module in modules.names.items()
        if id(module) not in inside and any(p.requires_grad for p in module.parameters(recurse=False))
    }
    check_untied(model, {id(parameter) for parameter in model.parameters() if parameter.requires_grad})
    for layer in adapted:
        layer.__class__ = DPPeftLinear
        layer.recorder = getattr(layer, "recorder", None)
    replace_modules(model, replacements)


def _adapter_parameters(layer: Any) -> Iterable[nn.Parameter]:
    base = {id(parameter) for parameter in layer.get_base_layer().parameters()}
    return (parameter for parameter in layer.parameters() if id(parameter) not in base)


def _check_adapted(name: str, layer: BaseTunerLayer, modules: Modules) -> None:
    if type(layer) not in (lora.Linear, DPPeftLinear):
        raise ValueError(
            f"'{name}' is PEFT's {type(layer).__module__.rpartition('peft.tuners.')[2]}.{type(layer).__name__}, whose "
            "gradients no private layer clips: leave it out of target_modules, or train LoRA on linear layers "
            "(peft.LoraConfig)."
        )
    base = layer.get_base_layer()
    obstacle = modules.obstacles.get(id(base)) or (None if is_linear(base) else f"it wraps a {type(base).__name__}")
    if obstacle:
        raise ValueError(f"'{name}' cannot be trained in private, since {obstacle}: leave it out of target_modules.")
    for adapter in layer.active_adapters:
        if what := _special(layer, adapter):
            raise ValueError(
                f"'{name}' {what}, which no private layer computes: make its adapter without (peft.LoraConfig)."
            )


def _special(layer: Any, adapter: str) -> str:
    """What an adapter has beside two factors."""
    if adapter in layer.lora_variant:
        kind = type(layer.lora_variant[adapter]).__name__
        return f"has PEFT's {kind.removesuffix('Variant').removesuffix('Linear').replace('Dora', 'DoRA')}"
    if layer.lora_bias.get(adapter):
        return "has a bias on lora_B (lora_bias=True)"
    return ""
