"""FlexLoRA: full products are averaged and decomposed anew for each client's rank (arXiv 2402.11505)."""

from math import inf
from typing import ClassVar

from lora_dp.fed.lowrank import truncated_svd
from lora_dp.fed.methods.base import Contribution, Layers, Method, Phases, State, factor, products
from lora_dp.fed.methods.flora import leading


class FlexLoRA(Method):
    """Σ pₖsₖBₖAₖ is cut to the server's rank by a singular value decomposition: B = U·S / s, A = Vᵀ.

    Singular values come in order, so the leading components of that are the decomposition for each smaller rank.
    """

    name = "flexlora"
    learning_rates: ClassVar = {1: 0.05, 3: 0.1, 8: 0.25, inf: 0.3}
    ranks_may_differ = True

    def phases(self, round_index: int, turn: int = 0) -> Phases:
        return "AB"

    def for_client(self, state: State, layers: Layers, rank: int) -> State:
        return leading(state, layers, rank)

    def contribution(self, update: State, layers: Layers) -> Contribution:
        return {**{n: t for n, t in update.items() if factor(n) is None}, **products(update, layers)}

    def combine(
        self, mean: Contribution, state: State, layers: Layers, round_index: int, turn: int = 0
    ) -> Contribution:
        combined = {name: value for name, value in mean.items() if not name.endswith(".product")}
        for layer in layers.shapes:
            cut = truncated_svd(mean[f"{layer}.product"], layers.r)
            combined[f"{layer}.lora_B"] = cut.left / layers.scaling(layers.r)
            combined[f"{layer}.lora_A"] = cut.right
        return combined
