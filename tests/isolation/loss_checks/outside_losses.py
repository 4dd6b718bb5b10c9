"""Losses outside of the model, and steps by them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models import examples, mlp
from tests.support import make_private

OutsideLoss = Callable[[Any, Tensor], Tensor]
N = 6


def step(loss: OutsideLoss, *, reduction: str = "mean", n: int = N, optimizer=None, model=None):
    """One private step, without noise, with a loss outside the model; the optimizer, to go on with."""
    model = model or mlp()
    optimizer = optimizer or make_private(model, batch_size=N, max_grad_norm=0.3, loss_reduction=reduction)
    x, y = examples(n)
    optimizer.batch.expect(n)
    loss(model(x), y).backward()
    optimizer.step()
    return model, optimizer


def soft(y: Tensor) -> Tensor:
    return F.one_hot(y, 3).float() * 0.8 + 0.2 / 3


MEANS: dict[str, OutsideLoss] = {
    "cross entropy": F.cross_entropy,
    "smoothed": lambda out, y: F.cross_entropy(out, y, label_smoothing=0.1),
    "probabilities": lambda out, y: F.cross_entropy(out, soft(y)),
    "mean of a vector": lambda out, y: F.cross_entropy(out, y, reduction="none").mean(),
    "sum by hand": lambda out, y: F.cross_entropy(out, y, reduction="sum") / len(y),
    "focal": lambda out, y: (1 - (-F.cross_entropy(out, y, reduction="none")).exp()).square().mean(),
    "squares over outputs": lambda out, y: F.mse_loss(out, soft(y)),
    "binary": lambda out, y: F.binary_cross_entropy_with_logits(out, soft(y)),
    "absolute": lambda out, y: F.l1_loss(out, soft(y)),
    "Huber": lambda out, y: F.smooth_l1_loss(out, soft(y)),
    "divergence": lambda out, y: F.kl_div(out.log_softmax(1), soft(y), reduction="batchmean"),
    "two terms": lambda out, y: 0.7 * F.cross_entropy(out, y) + 0.3 * out.square().mean(),
    "half of it": lambda out, y: F.cross_entropy(out, y) / 2,
    "margin": lambda out, y: F.multi_margin_loss(out, y),
    "one less a mean": lambda out, y: 1 - out.tanh().mean(),
    "mean of tasks": lambda out, y: torch.stack([F.cross_entropy(out, y), out.square().mean(), out.mean()]).mean(),
    "sum of tasks": lambda out, y: torch.stack([F.cross_entropy(out, y), out.square().mean()]).sum(),
}
SUMS: dict[str, OutsideLoss] = {
    "cross entropy": lambda out, y: F.cross_entropy(out, y, reduction="sum"),
    "weighted": lambda out, y: F.cross_entropy(out, y, weight=torch.tensor([1.0, 2.0, 3.0]).to(out), reduction="sum"),
    "ignoring": lambda out, y: F.cross_entropy(out, torch.where(y == 0, -100, y), reduction="sum"),
    "over all dimensions": lambda out, y: out.square().sum((0, 1)),
    "mean times N": lambda out, y: F.cross_entropy(out, y) * len(y),
}
