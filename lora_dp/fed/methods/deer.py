"""DEeR: alternating aggregation and regulated noise (doi 10.1109/TMI.2024.3518539), made sound."""

from math import inf
from typing import ClassVar

from lora_dp.fed.methods.base import Method, Phases


class DEeR(Method):
    """Each round has two turns: B with A frozen, averaged; then A with B frozen, averaged. Averaging is exact.

    Clipping and noise follow what a change does to the product B·A (:mod:`lora_dp.nn.regulator`): the paper's noise
    hides that, not the plain norm which its released code clips.
    """

    name = "deer"
    learning_rates: ClassVar = {1: 0.05, 3: 0.15, 8: 0.5, inf: 0.3}
    turns = 2
    regulates_noise = True
    released_mechanism = True

    def phases(self, round_index: int, turn: int = 0) -> Phases:
        return "B" if turn == 0 else "A"
