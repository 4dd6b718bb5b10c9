"""What an update kernel knows of a parameter's optimizer: a row of numbers. Needs no Triton."""

import math


def sgd_row(
    lr: float,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    first_step: bool = False,
) -> list[float]:
    """For "sgd" and "momentum": learning rate, weight decay, momentum, 1 − dampening, whether Nesterov's, and whether
    the momentum buffer holds nothing yet (``first_step``)."""
    return [lr, weight_decay, momentum, 1 - dampening, float(nesterov), float(first_step)]


def adam_row(
    lr: float, *, step: int, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> list[float]:
    """For "adam" and "adamw": learning rate, weight decay, 1 − β₁, β₂, 1 − β₂, ε, learning rate / (1 − β₁ᵗ),
    √(1 − β₂ᵗ) with t = ``step``, counted from 1. The differences would lose digits in float32."""
    beta1, beta2 = betas
    return [lr, weight_decay, 1 - beta1, beta2, 1 - beta2, eps, lr / (1 - beta1**step), math.sqrt(1 - beta2**step)]
