"""RAC-LoRA: a chain of adapters, each with one random frozen factor, merged round by round (arXiv 2410.08305)."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal

from lora_dp.fed.methods.base import MERGED, Contribution, Layers, Method, Phases, State
from lora_dp.fed.methods.low_rank import LowRank, dense
from lora_dp.lazy_torch import torch


@dataclass(frozen=True)
class RACLoRA(Method):
    """Each round draws a fresh A, frozen, and trains B from zero; B̄A is merged: the next link of the chain.

    Averaging is exact, and over the rounds the update is not bound to one random subspace as FFA-LoRA's is.

    Args:
        trained: the factor that is trained: "B" beside a random A, or "A" beside a random B.
    """

    trained: Literal["A", "B"] = "B"

    name: ClassVar[str] = "rac-lora"
    learning_rates: ClassVar = {1: 0.2, 3: 0.3, 8: 0.5, inf: 0.3}

    def __post_init__(self) -> None:
        if self.trained not in ("A", "B"):
            raise ValueError(f"rac-lora's trained factor must be A or B, not {self.trained!r}.")

    def phases(self, round_index: int, turn: int = 0) -> Phases:
        return self.trained

    def begin(self, state: State, layers: Layers, round_index: int, generator: torch.Generator) -> State:
        fresh: State = {}
        for layer in layers.shapes:
            lora_A, lora_B = state[f"{layer}.lora_A"], state[f"{layer}.lora_B"]
            if self.trained == "B":
                fresh[f"{layer}.lora_A"] = layers.fresh(lora_A, generator)
                fresh[f"{layer}.lora_B"] = torch.zeros_like(lora_B)
            else:
                fresh[f"{layer}.lora_A"] = torch.zeros_like(lora_A)
                fresh[f"{layer}.lora_B"] = layers.fresh(lora_B.t(), generator).t()
        return fresh

    def combine(
        self, mean: Contribution, state: State, layers: Layers, round_index: int, turn: int = 0
    ) -> Contribution:
        combined = merged(mean, state, layers)
        for layer in layers.shapes:
            name = f"{layer}.lora_{self.trained}"
            combined[name] = torch.zeros_like(state[name])
        return combined


def merged(mean: Contribution, state: State, layers: Layers) -> Contribution:
    """The mean with s·B·A of every layer to be merged, where one factor is in the mean and the other in the state."""
    combined = dict(mean)
    for layer in layers.shapes:
        lora_A, lora_B = (
            dense(mean.get(name, state[name])).double() for name in (f"{layer}.lora_A", f"{layer}.lora_B")
        )
        combined[layer + MERGED] = LowRank(lora_B * layers.scaling(layers.r), lora_A)
    return combined
