"""FLoRA: the clients' factors are stacked, so that nothing is lost in averaging (arXiv 2409.05976)."""

from math import inf
from typing import ClassVar

import torch

from lora_dp.fed.methods.base import Contribution, Layers, Method, Phases, State, factor, kaiming, products


class FLoRA(Method):
    """The stacks [p₁s₁B₁ … pₘsₘBₘ] and [A₁; …; Aₘ] have the exact product Σ pₖsₖBₖAₖ, whatever the ranks.

    It is merged into the frozen weights, and every round starts fresh adapters: A random, B zero.
    """

    name = "flora"
    learning_rates: ClassVar = {1: 0.1, 3: 0.2, 8: 0.5, inf: 0.3}
    ranks_may_differ = True

    def phases(self, round_index: int, turn: int = 0) -> Phases:
        return "AB"

    def begin(self, state: State, layers: Layers, round_index: int, generator: torch.Generator) -> State:
        if round_index == 0:
            return {}
        return {name: kaiming(tensor.shape, tensor, generator)  # type: ignore[arg-type]
                for name, tensor in state.items() if factor(name) == "A"}

    def for_client(self, state: State, layers: Layers, rank: int) -> State:
        return leading(state, layers, rank)

    def contribution(self, update: State, layers: Layers) -> Contribution:
        return {**{n: t for n, t in update.items() if factor(n) is None}, **products(update, layers)}

    def combine(
        self, mean: Contribution, state: State, layers: Layers, round_index: int, turn: int = 0
    ) -> Contribution:
        combined = {name: value for name, value in mean.items() if not name.endswith(".product")}
        for layer in layers.shapes:
            combined[f"{layer}.merged"] = mean[f"{layer}.product"]
            combined[f"{layer}.lora_B"] = torch.zeros_like(state[f"{layer}.lora_B"])
        return combined


def leading(state: State, layers: Layers, rank: int) -> State:
    """The state with the first ``rank`` components of every adapter: the same product, were the rest zero."""
    if rank == layers.r:
        return state
    cut = dict(state)
    ratio = layers.scaling(layers.r) / layers.scaling(rank)
    for layer in layers.shapes:
        cut[f"{layer}.lora_A"] = state[f"{layer}.lora_A"][:rank].contiguous()
        cut[f"{layer}.lora_B"] = (state[f"{layer}.lora_B"][:, :rank] * ratio).contiguous()
    return cut
