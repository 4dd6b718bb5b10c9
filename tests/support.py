"""What several tests share: the brute-force oracle, a private run without any noise, and statistical tests."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lora_dp import PrivacyEngine, PrivateOptimizer
from lora_dp.nn.private_module import PrivateModule

RULES = ["flat", "per_layer", "automatic"]
Z_LIMIT = 5.4

Loss = Callable[[nn.Module, Any], Tensor]


def plain_copy(model: nn.Module) -> nn.Module:
    """The model in float64, unknown to any engine."""
    twin = copy.deepcopy(model).double()
    twin._forward_pre_hooks.clear()
    twin._forward_hooks.clear()
    twin._forward_pre_hooks_with_kwargs.clear()
    twin._forward_hooks_always_called.clear()
    for module in twin.modules():
        if isinstance(module, PrivateModule):
            module.recorder = None
    return twin


def brute_force(
    model: nn.Module, loss: Loss, examples: list[Any], trained: set[str], dtype: torch.dtype = torch.float64
) -> list[dict[str, Tensor]]:
    """Per-example gradients, by default in float64, one ordinary backward for each example."""
    twin = plain_copy(model).to(dtype)
    gradients = []
    for example in examples:
        twin.zero_grad()
        loss(twin, example).backward()
        gradients.append(
            {
                name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for name, p in twin.named_parameters()
                if name in trained
            }
        )
    return gradients


def clip_and_sum(
    gradients: list[dict[str, Tensor]], rule: str, bound: float, layer_of: Callable[[str], str], gamma: float = 0.01
) -> dict[str, Tensor]:
    """Σᵢ cᵢ gᵢ straight from the definitions."""
    names = list(gradients[0])
    layers = sorted({layer_of(name) for name in names})
    total = {name: torch.zeros_like(gradients[0][name]) for name in names}
    for gradient in gradients:
        whole = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
        for name in names:
            if rule == "flat":
                c = min(1.0, bound / whole) if whole else 1.0
            elif rule == "automatic":
                c = bound / (whole + gamma)
            else:
                mine = math.sqrt(sum(float(gradient[k].square().sum()) for k in names if layer_of(k) == layer_of(name)))
                c = min(1.0, bound / math.sqrt(len(layers)) / mine) if mine else 1.0
            total[name] += c * gradient[name]
    return total


def make_private(
    model: nn.Module,
    *,
    batch_size: int,
    noise_multiplier: float = 0.0,
    max_grad_norm: float = 1.0,
    size: int | None = None,
    lr: float = 1.0,
    engine: PrivacyEngine | None = None,
    **options: Any,
) -> PrivateOptimizer:
    """A private optimizer for hand-made batches: SGD, and a data set of ``size`` dummies behind it."""
    engine = engine or PrivacyEngine(accountant="rdp", reproducible_seed=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    loader = DataLoader(TensorDataset(torch.zeros(size or batch_size)), batch_size=batch_size)
    _, optimizer, _ = engine.make_private(
        model=model,
        optimizer=torch.optim.SGD(parameters, lr=lr),
        data_loader=loader,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        **options,
    )
    return optimizer


def training_forwards(model: nn.Module, batch_size: int = 8) -> Callable[..., None]:
    """Makes a model private; calls of what is returned are training forwards, each forgotten afterwards."""
    optimizer = make_private(model.train(), batch_size=batch_size)

    def call(*args: Any, **kwargs: Any) -> None:
        model(*args, **kwargs)
        optimizer.recorder.discard()

    return call


def private_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients that the last private step gave to the wrapped optimizer."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(actual: Tensor, expected: Tensor, relative: float = 1e-5, scale: float | None = None) -> None:
    """Distance relative to ``scale``, by default the norm of what is expected.

    Where large terms cancel, no sum in float32 is exact relative to the little that is left: give the terms' norm.
    """
    scale = float(expected.double().norm()) if scale is None else scale
    distance = float((actual.double() - expected.double()).norm())
    assert distance <= relative * scale + 1e-12, f"relative distance {distance / max(scale, 1e-300):.3g}"


def check_deviation(values: Tensor, expected: float) -> None:
    """Mean zero and deviation ``expected`` of independent normals: two z-tests, false alarm below 2e-7."""
    n = values.numel()
    assert abs(float(values.mean())) < Z_LIMIT * expected / math.sqrt(n)
    z = (float(values.square().mean()) / expected**2 - 1) * math.sqrt(n / 2)
    assert abs(z) < Z_LIMIT, f"deviation {float(values.std()):.4g} instead of {expected:.4g}"
