"""What methods share whose server sums the products of the clients' factors, at whatever ranks these have."""

from typing import ClassVar

from lora_dp.fed.methods.base import Contribution, Layers, Method, Phases, State, factor
from lora_dp.fed.methods.low_rank import LowRank


def products(update: State, layers: Layers) -> Contribution:
    """s·B·A of every adapted layer of an update, as ``<layer>.product``, at the rank that the update has."""
    found: Contribution = {}
    for layer in layers.shapes:
        lora_A, lora_B = update[f"{layer}.lora_A"], update[f"{layer}.lora_B"]
        found[f"{layer}.product"] = LowRank(lora_B * layers.scaling(lora_A.shape[0]), lora_A)
    return found


def without_products(mean: Contribution) -> Contribution:
    """All but the products."""
    return {name: value for name, value in mean.items() if not name.endswith(".product")}


class ByProduct(Method):
    """Both factors are trained, at ranks that may differ, and only their products and the head are summed."""

    ranks_may_differ: ClassVar[bool] = True

    def phases(self, round_index: int, turn: int = 0) -> Phases:
        return "AB"

    def for_client(self, state: State, layers: Layers, rank: int) -> State:
        """The first ``rank`` components of every adapter, scaled for the same product, were the rest zero."""
        if rank == layers.r:
            return state
        cut = dict(state)
        ratio = layers.scaling(layers.r) / layers.scaling(rank)
        for layer in layers.shapes:
            cut[f"{layer}.lora_A"] = state[f"{layer}.lora_A"][:rank].contiguous()
            cut[f"{layer}.lora_B"] = (state[f"{layer}.lora_B"][:, :rank] * ratio).contiguous()
        return cut

    def contribution(self, update: State, layers: Layers) -> Contribution:
        return {**{name: tensor for name, tensor in update.items() if factor(name) is None}, **products(update, layers)}
