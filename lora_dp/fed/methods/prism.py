"""PRISM in a federation: clipped, noised and averaged in the tangent space of the matrices of rank r (2606.00944)."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, ClassVar

from lora_dp.fed.methods.base import Contribution, Layers, LocalTurn, Method, Phases, State, factor
from lora_dp.fed.methods.low_rank import LowRank, dense, truncated_svd
from lora_dp.lazy_torch import torch
from lora_dp.nn.adapter_start import Adapter

if TYPE_CHECKING:
    from torch.optim import Optimizer


class PRISM(Method):
    """Clients train dW, coordinates of the tangent space at the round's B·A; the server cuts B·A + dW to rank r.

    The coordinates are orthonormal (:mod:`lora_dp.nn.lora_tangent_linear`). So one factor clips ‖dW‖ of an example over
    all layers, noise is isotropic in the space, and neither hangs on which factors gave the product. The space is
    linear: averaging is exact. The server cuts by the singular values of a core of 2r × 2r numbers, and hands out
    orthonormal A = Vᵀ and B = U·Σ. All of that is done to released numbers.

    With one local step a round it is PRISM's step; with more, a client's steps stay in the space of the round's start.
    """

    name = "prism"
    learning_rates: ClassVar = {1: 0.1, 3: 0.3, 8: 0.5, inf: 0.3}
    adapter: ClassVar[Adapter] = "tangent"

    def phases(self, round_index: int, turn: int = 0) -> Phases:
        """Of no effect: neither A nor B is trained, and the coordinates in every step."""
        return "AB"

    def trains(self, parameter: str, round_index: int, turn: int = 0) -> bool:
        return factor(parameter) is None and super().trains(parameter, round_index, turn)

    def optimizer(self, turn: LocalTurn) -> Optimizer:
        """The run's; moments see noise of the tangent space alone, from which dA's part along A is taken."""
        made = super().optimizer(turn)
        if turn.kind is not torch.optim.SGD:

            def project(*_: object) -> None:
                for name, dA in turn.tensors.items():
                    if name.endswith(".lora_dA") and dA.grad is not None:
                        lora_A = turn.tensors[f"{name.removesuffix('dA')}A"]
                        dA.grad.sub_((dA.grad @ lora_A.t()) @ lora_A)

            made.register_step_pre_hook(project)
        return made

    def combine(
        self, mean: Contribution, state: State, layers: Layers, round_index: int, turn: int = 0
    ) -> Contribution:
        combined = dict(mean)
        for layer in layers.shapes:
            a, b, da, db = (f"{layer}.lora_{name}" for name in ("A", "B", "dA", "dB"))
            moved = retracted(state[a], state[b], dense(mean[da]), dense(mean[db]), layers.r)
            combined[a], combined[b] = moved.right, moved.left
            combined[da], combined[db] = torch.zeros_like(state[da]), torch.zeros_like(state[db])
        return combined


def retracted(lora_A: torch.Tensor, lora_B: torch.Tensor, dA: torch.Tensor, dB: torch.Tensor, rank: int) -> LowRank:
    """The nearest matrix of that rank to B·A + dB·A + U·dA·(I − AᵀA), U the columns of B at unit length.

    Args:
        lora_A, dA: (r, d_in), A of orthonormal rows.
        lora_B, dB: (d_out, r), B of orthogonal columns.
        rank: of the result, in float64.

    >>> a, b = torch.eye(3)[:1], torch.tensor([[2.0], [0.0]])
    >>> retracted(a, b, torch.zeros(1, 3), torch.ones(2, 1), 1).left
    tensor([[3.0000],
            [1.0000]], dtype=torch.float64)
    """
    from lora_dp.nn.lora_tangent_linear import unit_columns  # and torch with it

    a, b, across = lora_A.double(), lora_B.double(), dA.double()
    across = across - (across @ a.t()) @ a
    return truncated_svd(LowRank(torch.cat([b + dB.double(), unit_columns(b)], 1), torch.cat([a, across])), rank)
