"""FedSVD: B is trained beside an orthonormal A, and both are factored anew after each round (arXiv 2505.12805)."""

from __future__ import annotations

from math import inf
from typing import ClassVar

from lora_dp.fed.methods.base import Contribution, Layers, Method, Phases, State
from lora_dp.fed.methods.low_rank import LowRank, dense, truncated_svd
from lora_dp.lazy_torch import torch


class FedSVD(Method):
    """Clients train B beside a frozen A with orthonormal rows; the server refactors B̄·A = U·Σ·Vᵀ: B = U·Σ, A = Vᵀ.

    Averaging is exact and nothing is lost: the product stays what it was. Its columns of B are orthogonal then, and
    come in the order of their size. Noise on B reaches the product as it is, for A has unit length in every direction.
    Only what has been released is decomposed, so it costs no privacy.

    A's rows always span the same subspace: where B̄ has lost rank, or is zero, the missing rows of Vᵀ are those rows of
    that subspace that are left, and B's columns beside them are zero.
    """

    name = "fedsvd"
    learning_rates: ClassVar = {1: 0.1, 3: 0.3, 8: 0.5, inf: 0.3}

    def phases(self, round_index: int, turn: int = 0) -> Phases:
        return "B"

    def begin(self, state: State, layers: Layers, round_index: int, generator: torch.Generator) -> State:
        """At first the orthonormal rows that are nearest to A's, beside B of zero."""
        fresh: State = {}
        for layer in layers.shapes if round_index == 0 else ():
            lora_A = state[f"{layer}.lora_A"]
            u, _, vh = torch.linalg.svd(lora_A.double(), full_matrices=False)
            fresh[f"{layer}.lora_A"] = (u @ vh).to(lora_A)
        return fresh

    def combine(
        self, mean: Contribution, state: State, layers: Layers, round_index: int, turn: int = 0
    ) -> Contribution:
        combined = dict(mean)
        for layer in layers.shapes:
            a, b = f"{layer}.lora_A", f"{layer}.lora_B"
            product = truncated_svd(LowRank(dense(mean[b]), state[a]), layers.r)
            combined[a], combined[b] = product.right, product.left
        return combined
