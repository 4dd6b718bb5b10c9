"""What is compared: each variant makes a function that takes one whole training step.

A step is forward, backward, clipping, noise and AdamW on the adapters; the head is frozen for all alike.
"""

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.models import RANK, Shape, batch, build, logits, loss, targets
from lora_dp import LoRAConfig, PrivacyEngine, inject_lora
from lora_dp.engine.cuda_graphs import GraphedStep
from lora_dp.engine.optimizer import PrivateOptimizer

Step = Callable[[], None]

NOISE_MULTIPLIER = 1.0
MAX_GRAD_NORM = 1.0
LEARNING_RATE = 1e-4


class NotInstalled(RuntimeError):
    """The library of a variant is missing."""


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise NotInstalled(f"{package} is not installed: pip install '.[bench]'")


def _loader(shape: Shape) -> DataLoader[Any]:
    # The steps are fed by hand: the loader only tells the sizes.
    return DataLoader(TensorDataset(torch.zeros(100 * shape.examples)), batch_size=shape.examples)


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


def _nonzero_B(model: nn.Module) -> nn.Module:
    """B starts at zero, which would leave A without a gradient."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def _private(shape: Shape, phases: Any, seed: int | None = None) -> tuple[nn.Module, PrivateOptimizer]:
    model = _nonzero_B(inject_lora(build(shape), LoRAConfig(r=RANK, target_modules=targets(shape))))
    model, optimizer, _ = PrivacyEngine(reproducible_seed=seed).make_private(
        model=model,
        optimizer=_adamw(model),
        data_loader=_loader(shape),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=MAX_GRAD_NORM,
        phases=phases,
    )
    return model, optimizer


def _lora_dp(shape: Shape, phases: Any, *, seed: int | None = None, compiled: bool = False) -> Step:
    model, optimizer = _private(shape, phases, seed)
    inputs, labels = batch(shape)
    run = _compiled(model) if compiled else model

    def step() -> None:
        optimizer.batch.expect(shape.examples)
        loss(run, inputs, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _graphed(shape: Shape) -> Step:
    model, optimizer = _private(shape, "B")
    inputs, labels = batch(shape)
    graphed = GraphedStep(model, optimizer, loss, batch_size=shape.examples)

    def step() -> None:
        optimizer.batch.expect(shape.examples)
        graphed(inputs, labels)

    return step


def _compiled(model: nn.Module) -> Any:
    # Models before this one ran the same code: theirs would count towards the compiler's limit.
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True)


def _peft_model(shape: Shape, factors: str) -> nn.Module:
    _need("peft")
    from peft import LoraConfig, get_peft_model

    plain: Any = build(shape)
    # Adapters in the model's precision, as ours: by default PEFT would keep them in float32 under a bfloat16 model.
    model = _nonzero_B(
        get_peft_model(
            plain, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets(shape)), autocast_adapter_dtype=False
        )
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(f"lora_{factor}" in name for factor in factors))
    return model.train()


def _peft(shape: Shape, factors: str, *, compiled: bool = False) -> Step:
    model = _peft_model(shape, factors)
    optimizer = _adamw(model)
    inputs, labels = batch(shape)
    run = _compiled(model) if compiled else model

    def step() -> None:
        loss(run, inputs, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _opacus(shape: Shape, factors: str, mode: str) -> Step:
    _need("opacus")
    from opacus import PrivacyEngine as OpacusEngine

    def criterion(output: Any, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits(output), labels, reduction=criterion.reduction)  # type: ignore[attr-defined]

    criterion.reduction = "mean"  # type: ignore[attr-defined]
    plain = _peft_model(shape, factors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = OpacusEngine().make_private(
            module=plain,
            optimizer=_adamw(plain),
            data_loader=_loader(shape),
            noise_multiplier=NOISE_MULTIPLIER,
            max_grad_norm=MAX_GRAD_NORM,
            poisson_sampling=False,
            grad_sample_mode=mode,
            **({"criterion": criterion} if mode == "ghost" else {}),
        )
    model, optimizer = made[0], made[1]
    joined = made[2] if mode == "ghost" else criterion
    inputs, labels = batch(shape)

    def step() -> None:
        joined(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


YARDSTICK = "PEFT plain, A and B"

VARIANTS: dict[str, Callable[[Shape], Step]] = {
    YARDSTICK: lambda shape: _peft(shape, "AB"),
    "PEFT plain, B only": lambda shape: _peft(shape, "B"),
    "lora-dp, B phase": lambda shape: _lora_dp(shape, "B"),
    "lora-dp, A phase": lambda shape: _lora_dp(shape, "A"),
    "lora-dp, A and B": lambda shape: _lora_dp(shape, "AB"),
    "lora-dp, B phase, reproducible": lambda shape: _lora_dp(shape, "B", seed=0),
    "lora-dp, B phase, graphed": _graphed,
    "Opacus hooks, B only": lambda shape: _opacus(shape, "B", "hooks"),
    "Opacus hooks, A and B": lambda shape: _opacus(shape, "AB", "hooks"),
    "Opacus ghost, B only": lambda shape: _opacus(shape, "B", "ghost"),
    "Opacus ghost, A and B": lambda shape: _opacus(shape, "AB", "ghost"),
    "PEFT plain, A and B, compiled": lambda shape: _peft(shape, "AB", compiled=True),
    "lora-dp, B phase, compiled": lambda shape: _lora_dp(shape, "B", compiled=True),
}
CUDA_ONLY = [name for name in VARIANTS if name.endswith(("reproducible", "graphed", "compiled"))]
