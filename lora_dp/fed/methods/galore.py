"""GaLore: no lasting adapter; the weight itself moves by low-rank gradients (arXiv 2410.23111)."""

from __future__ import annotations

from math import inf
from typing import ClassVar

from lora_dp.fed.methods.base import Contribution, Layers, Method, Phases, State
from lora_dp.fed.methods.low_rank import dense, orthonormal
from lora_dp.fed.methods.rac_lora import merged
from lora_dp.lazy_torch import torch


class GaLore(Method):
    """Gradients are projected to rank r on one side, and the averaged weights move within that subspace.

    A gradient projected by an orthonormal P is that of A beside a frozen B = P, Gᵢ = Σₜ (Pᵀgₜ) ⊗ xₜ; with A starting at
    zero and merged after each round, any optimizer on A is GaLore's on the projected gradient. GaLore finds P by
    decomposing a gradient, which would have to be paid for; here it comes from what has been released: even rounds
    project on the left and move by P·R, odd ones on the right by L·Qᵀ, with Q the row space of the R just averaged and
    P the column space of that L: each round a step of subspace iteration on the mean gradient. The first P is random.
    """

    name = "galore"
    learning_rates: ClassVar = {1: 0.1, 3: 0.2, 8: 0.5, inf: 0.3}

    def phases(self, round_index: int, turn: int = 0) -> Phases:
        return "A" if round_index % 2 == 0 else "B"

    def begin(self, state: State, layers: Layers, round_index: int, generator: torch.Generator) -> State:
        fresh: State = {}
        if round_index == 0:
            for layer in layers.shapes:
                lora_A, lora_B = state[f"{layer}.lora_A"], state[f"{layer}.lora_B"]
                drawn = torch.randn(lora_B.shape, generator=generator, dtype=torch.float64)
                fresh[f"{layer}.lora_B"] = orthonormal(drawn).to(lora_B)
                fresh[f"{layer}.lora_A"] = torch.zeros_like(lora_A)
        return fresh

    def combine(
        self, mean: Contribution, state: State, layers: Layers, round_index: int, turn: int = 0
    ) -> Contribution:
        combined = merged(mean, state, layers)
        left = self.phases(round_index) == "A"
        for layer in layers.shapes:
            a, b = f"{layer}.lora_A", f"{layer}.lora_B"
            if left:
                combined[a] = orthonormal(dense(mean[a]).t()).t().contiguous()
                combined[b] = torch.zeros_like(state[b])
            else:
                combined[b] = orthonormal(dense(mean[b]))
                combined[a] = torch.zeros_like(state[a])
        return combined
