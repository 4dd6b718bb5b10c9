"""Sharpness of a model: the top eigenvalue of its loss's Hessian, and the loss along random directions.

By default both move the adapted weights W = W0 + s·B·A themselves, and the head. Factors would mislead: B·c and A/c
are the same model for any c ≠ 0, but their Hessians are not the same, and methods differ in which factor they train, so
in how the norm is shared between the two. In the space of weights the same function has the same sharpness, whichever
method and whichever rank it comes from.

The model is never written to: what is moved are copies that stand in for its parameters during a forward.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_dp.fed.data.examples import Batch
from lora_dp.fed.diagnostics.intruder import adapted_layers, weight_and_update
from lora_dp.fed.methods import factor
from lora_dp.fed.models.task_losses import task_losses

Space = Literal["weights", "factors"]

# Lanczos: Krylov vectors held at a time, restarts at most, and the relative accuracy at which it stops.
_KRYLOV, _RESTARTS, _TOLERANCE = 8, 40, 1e-3


@dataclass(frozen=True)
class LossCurves:
    """The loss along several directions.

    Attributes:
        alpha: how far, in units of each filter's own norm; symmetric about 0, ascending.
        losses: mean cross-entropy (nats) by direction and α; not finite where the model overflows.
    """

    alpha: list[float]
    losses: list[list[float]]

    @property
    def mean(self) -> list[float]:
        """The mean over directions, by α."""
        return [math.fsum(column) / len(column) for column in zip(*self.losses, strict=True)]

    @property
    def rise(self) -> float:
        """How much the mean loss is higher at the two ends than in the middle."""
        mean = self.mean
        return (mean[0] + mean[-1]) / 2 - mean[len(mean) // 2]


def top_eigenvalue(
    model: nn.Module, batches: Sequence[Batch], *, space: Space = "weights", seed: int = 0
) -> float | None:
    """The largest eigenvalue of the Hessian of the mean cross-entropy, by Lanczos on Hessian-vector products.

    Each product is a forward and two backwards over all batches (Pearlmutter 1994), in the parameters' own dtype;
    Lanczos is ARPACK's, in that precision, to a relative accuracy of 1e-3; it holds ten vectors of all weights that
    move. Everything runs in evaluation mode, so without dropout, and leaves model, gradients and random state as they
    were.

    Args:
        model: with adapters, not merged.
        batches: encoded *public* examples with "labels", on the model's device; at least one example.
        space: what the Hessian is taken with respect to: "weights" (adapted weights and head), or "factors" (A, B and
            head), which depends on how a product is split into factors.
        seed: of Lanczos' first vector.

    Returns:
        The eigenvalue (nats per squared unit of weight), or None where it was not found. Then Lanczos did not converge
        within some 300 products, or the loss is not finite.
    """
    start = _parameters(model, space)
    sizes = [tensor.numel() for tensor in start.values()]
    precision = np.float64 if any(tensor.dtype == torch.float64 for tensor in start.values()) else np.float32

    def product(vector: np.ndarray) -> np.ndarray:
        flat = torch.from_numpy(np.ascontiguousarray(vector, dtype=precision).reshape(-1))
        parts = [
            part.view(tensor.shape).to(tensor) for part, tensor in zip(flat.split(sizes), start.values(), strict=True)
        ]
        return _hessian_vector_product(loss, start, parts, batches).astype(precision)

    drawn = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    first = drawn.numpy().astype(precision)
    with _frozen_in_evaluation(model) as loss:
        if not np.isfinite(product(first)).all():
            return None
        operator = LinearOperator((len(first), len(first)), matvec=product, dtype=precision)
        try:
            values = eigsh(
                operator,
                k=1,
                which="LA",
                v0=first,
                ncv=min(_KRYLOV, len(first)),
                maxiter=_RESTARTS,
                tol=_TOLERANCE,
                return_eigenvectors=False,
            )
        except ArpackNoConvergence:
            return None
    return float(values[0])


@torch.no_grad()
def loss_curves(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    directions: int = 5,
    points: int = 11,
    reach: float = 0.5,
    space: Space = "weights",
    seed: int = 0,
) -> LossCurves:
    """The mean cross-entropy along filter-normalised random directions (Li et al. 2018, arXiv 1712.09913).

    A direction is Gaussian; each row of a weight matrix is a filter, and the direction's row is scaled to the norm of
    the weight's row, d ← d/‖d‖·‖w‖. Biases and other vectors do not move, as in the paper's plots. Evaluation mode;
    leaves the model as it was.

    Args:
        model, batches, space: as for :func:`top_eigenvalue`.
        directions: number of directions, at least 1.
        points: on each, odd, at least 3.
        reach: largest α.
        seed: of the directions, which are the same on every device.

    Raises:
        ValueError: numbers out of range.
    """
    if directions < 1 or points < 3 or points % 2 == 0 or not 0 < reach < math.inf:
        raise ValueError(
            f"Loss curves need at least 1 direction, an odd number of points from 3 on and a positive reach, not "
            f"{directions}, {points} and {reach}."
        )
    start = _parameters(model, space)
    filters = _filters(model, space)
    generator = torch.Generator().manual_seed(seed)
    alpha = np.linspace(-reach, reach, points).tolist()
    losses = []
    with _frozen_in_evaluation(model) as loss:
        for _ in range(directions):
            moves = {name: _direction(start[name], each, generator) for name, each in filters.items()}
            losses.append(
                [
                    _mean_loss(loss, {n: t + step * moves[n] if n in moves else t for n, t in start.items()}, batches)
                    for step in alpha
                ]
            )
    return LossCurves(alpha, losses)


# The summed cross-entropy of a batch with these tensors in the places of the model's.
Loss = Callable[[Mapping[str, Tensor], Batch], Tensor]


class _SummedLoss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        return task_losses(self.model, batch).sum()


@contextlib.contextmanager
def _frozen_in_evaluation(model: nn.Module) -> Iterator[Loss]:
    """The model's loss as a function of parameters, in evaluation mode; every module's own mode comes back."""
    summed = _SummedLoss(model)
    modes = {module: module.training for module in model.modules()}

    def loss(parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        inside = {f"model.{name}": tensor for name, tensor in parameters.items()}
        # Tied names stay apart: only the place that carries the adapter moves.
        total: Tensor = functional_call(summed, inside, (batch,), tie_weights=False)
        return total

    try:
        model.eval()
        # The fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            yield loss
    finally:
        for module, mode in modes.items():
            module.training = mode


def _parameters(model: nn.Module, space: Space) -> dict[str, Tensor]:
    """What moves, by name. Adding to a frozen weight moves W = W0 + s·B·A by as much."""
    adapted = {f"{name}.weight" for name in adapted_layers(model)}
    chosen = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if (
            (name in adapted or (parameter.requires_grad and factor(name) is None))
            if space == "weights"
            else (parameter.requires_grad or factor(name) is not None)
        )
    }
    if not chosen:
        raise ValueError("The model has neither adapters nor a head to move: inject adapters with inject_lora first.")
    return chosen


class _Filters(NamedTuple):
    """The filters of a weight: which norm each has, and whether they are its columns, as it is stored."""

    norms: Tensor
    columns: bool


def _filters(model: nn.Module, space: Space) -> dict[str, _Filters]:
    """The filters of all that moves but vectors. Those of an adapted weight have the norms of W0 + s·B·A."""
    adapted = {f"{name}.weight": layer for name, layer in adapted_layers(model).items()}
    found: dict[str, _Filters] = {}
    for name, tensor in _parameters(model, space).items():
        if tensor.ndim < 2:
            continue
        module, _, last = name.rpartition(".")
        columns = last == "weight" and bool(getattr(model.get_submodule(module), "fan_in_fan_out", False))
        rows = tensor.t() if columns else tensor
        if name in adapted:
            before, change = weight_and_update(adapted[name])
            rows = before + change
        found[name] = _Filters(rows.flatten(1).double().norm(dim=1), columns)
    return found


def _direction(like: Tensor, filters: _Filters, generator: torch.Generator) -> Tensor:
    """A random direction in the layout and dtype of a tensor, with its filters' norms."""
    drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    rows = (drawn.t() if filters.columns else drawn).flatten(1)
    rows = rows * (filters.norms.cpu() / rows.norm(dim=1)).unsqueeze(1)
    return (rows.t() if filters.columns else rows).reshape(like.shape).to(like)


def _mean_loss(loss: Loss, parameters: Mapping[str, Tensor], batches: Sequence[Batch]) -> float:
    return math.fsum(float(loss(parameters, batch)) for batch in batches) / _examples(batches)


def _hessian_vector_product(
    loss: Loss, start: Mapping[str, Tensor], vector: Sequence[Tensor], batches: Sequence[Batch]
) -> np.ndarray:
    """H·v of the mean loss, float64 (n,)."""
    total = torch.zeros(sum(tensor.numel() for tensor in start.values()), dtype=torch.float64)
    for batch in batches:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in start.items()}
        with torch.enable_grad():
            gradients = torch.autograd.grad(
                loss(leaves, batch), list(leaves.values()), create_graph=True, materialize_grads=True
            )
            slope = torch.stack([(g * v).sum() for g, v in zip(gradients, vector, strict=True)]).sum()
            curved = torch.autograd.grad(slope, list(leaves.values()), materialize_grads=True)
        total += torch.cat([part.detach().flatten().double().cpu() for part in curved])
    return (total / _examples(batches)).numpy()


def _examples(batches: Sequence[Batch]) -> int:
    return sum(len(batch["labels"]) for batch in batches)
