"""LA-LoRA: local steps alternate between the factors, and noisy gradients may be filtered (arXiv 2602.19926)."""

from math import inf
from typing import ClassVar

from lora_dp.fed.methods.base import Method, Phases


class LALoRA(Method):
    """Each local step trains one factor: B, A, B, A, …, so that noise in one never multiplies noise in the other.

    The server averages A and B. The filter (--low-pass) and the ratio of learning rates (--lr-ratio) are settable.
    The default filter is a light one: stronger ones cost accuracy on the embedded default.
    """

    name = "la-lora"
    learning_rates: ClassVar = {1: 0.07, 3: 0.3, 8: 0.5, inf: 0.3}
    lr_ratio = 2.0
    low_pass = ("gaussian", 0.5)
    released_mechanism = True

    def phases(self, round_index: int, turn: int = 0) -> Phases:
        return "BA"
