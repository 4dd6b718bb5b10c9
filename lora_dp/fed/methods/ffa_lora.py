"""FFA-LoRA: A stays frozen at one random start shared by all (arXiv 2403.12313)."""

from math import inf
from typing import ClassVar

from lora_dp.fed.methods.base import Method, Phases


class FFALoRA(Method):
    """Clients train B only. With A shared, averaging B averages the products exactly, and half the bytes travel."""

    name = "ffa-lora"
    learning_rates: ClassVar = {1: 0.15, 3: 0.3, 8: 1, inf: 0.3}

    def phases(self, round_index: int, turn: int = 0) -> Phases:
        return "B"
