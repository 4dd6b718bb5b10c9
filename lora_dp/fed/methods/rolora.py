"""RoLoRA: whole rounds alternate between the factors (arXiv 2502.01755)."""

from math import inf
from typing import ClassVar

from lora_dp.fed.methods.base import Method, Phases


class RoLoRA(Method):
    """B is trained in even rounds, A in odd ones, the other frozen at the global value: averaging is exact.

    B comes first because it starts at zero, where A's gradient vanishes.
    """

    name = "rolora"
    learning_rates: ClassVar = {1: 0.15, 3: 0.3, 8: 0.5, inf: 0.3}

    def phases(self, round_index: int, turn: int = 0) -> Phases:
        return "B" if round_index % 2 == 0 else "A"
