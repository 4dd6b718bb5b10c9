"""LoRA-XS in a federation: r² numbers a layer between frozen singular vectors (arXiv 2405.17604)."""

from math import inf
from typing import ClassVar

from lora_dp.fed.methods.base import Method, Phases, factor
from lora_dp.nn.adapter_start import Adapter


class LoRAXS(Method):
    """Clients train the core R of ΔW = s·U·R·Σ·Vᵀ, where U·Σ·Vᵀ is the public weight cut to rank r.

    The product is linear in R, so that averaging R is exact. r² numbers a layer carry noise, and travel, whatever the
    layer's width. The server sends U and Σ·Vᵀ once: every client then has the same basis to the last bit.

    U and V have to be public: Fed-SB (arXiv 2502.15436) takes them from a gradient on private examples, without noise.
    """

    name = "lora-xs"
    learning_rates: ClassVar = {1: 0.1, 3: 0.2, 8: 0.3, inf: 0.3}
    adapter: ClassVar[Adapter] = "xs"

    def phases(self, round_index: int, turn: int = 0) -> Phases:
        """Of no effect: neither A nor B is trained, and the core in every step."""
        return "AB"

    def trains(self, parameter: str, round_index: int, turn: int = 0) -> bool:
        return factor(parameter) is None and super().trains(parameter, round_index, turn)
