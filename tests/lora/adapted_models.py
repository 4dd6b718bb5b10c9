"""Models with adapters, and what is looked up in them."""

from torch import nn

from lora_dp import DPLoRALinear


def adapted(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, DPLoRALinear)}


def linear(model: nn.Module) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def of(model: nn.Module, *endings: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.endswith(endings)}
