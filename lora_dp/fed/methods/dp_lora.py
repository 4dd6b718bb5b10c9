"""DP-LoRA: both factors in every step, FedIT (arXiv 2305.05644) with DP-SGD; the baseline of arXiv 2602.19926."""

from math import inf
from typing import ClassVar

from lora_dp.fed.methods.base import Method, Phases


class DPLoRA(Method):
    """Every local step trains A and B together. The server averages each: the product of the averages is not the
    average of the products."""

    name = "dp-lora"
    learning_rates: ClassVar = {1: 0.07, 3: 0.3, 8: 0.5, inf: 0.3}

    def phases(self, round_index: int, turn: int = 0) -> Phases:
        return "AB"
