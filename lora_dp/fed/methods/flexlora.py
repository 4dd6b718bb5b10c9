"""FlexLoRA: full products are averaged and decomposed anew for each client's rank (arXiv 2402.11505)."""

from math import inf
from typing import ClassVar

from lora_dp.fed.methods.base import Contribution, Layers, State
from lora_dp.fed.methods.by_product import ByProduct, without_products
from lora_dp.fed.methods.low_rank import truncated_svd


class FlexLoRA(ByProduct):
    """Σ pₖsₖBₖAₖ is cut to the server's rank by a singular value decomposition: B = U·S / s, A = Vᵀ.

    Singular values come in order, so the leading components of that are the decomposition for each smaller rank.
    """

    name = "flexlora"
    learning_rates: ClassVar = {1: 0.05, 3: 0.1, 8: 0.25, inf: 0.3}

    def combine(
        self, mean: Contribution, state: State, layers: Layers, round_index: int, turn: int = 0
    ) -> Contribution:
        combined = without_products(mean)
        for layer in layers.shapes:
            cut = truncated_svd(mean[f"{layer}.product"], layers.r)
            combined[f"{layer}.lora_B"] = cut.left / layers.scaling(layers.r)
            combined[f"{layer}.lora_A"] = cut.right
        return combined
