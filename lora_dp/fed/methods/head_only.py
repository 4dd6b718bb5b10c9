"""The head alone, on frozen features: the private linear probe, which every method with adapters must beat."""

from math import inf
from typing import ClassVar

from lora_dp.fed.methods.base import Method, Phases


class HeadOnly(Method):
    """Clients train the head alone; the server averages it, which is exact. The model has no adapters."""

    name = "head-only"
    learning_rates: ClassVar = {1: 0.1, 3: 0.3, 8: 0.5, inf: 0.3}
    has_adapters = False

    def phases(self, round_index: int, turn: int = 0) -> Phases:
        return "AB"
