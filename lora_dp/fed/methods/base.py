"""The interface of a federated method: what a client trains in a round, and how the server combines the updates."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

Phases = Literal["B", "A", "AB", "BA"]
State = dict[str, Tensor]


def factor(name: str) -> Literal["A", "B"] | None:
    """Which factor of an adapter a parameter is, by its name; None for the head and other full-rank parameters."""
    last = name.rpartition(".")[2]
    return "A" if last == "lora_A" else "B" if last == "lora_B" else None


class Aggregation(ABC):
    """One round's combination of updates, fed one client at a time: memory does not depend on how many there are."""

    @abstractmethod
    def add(self, update: State, weight: float) -> None:
        """Takes in one client's trained tensors; `weight` is its public, unnormalised share."""

    @abstractmethod
    def result(self) -> State:
        """The combined tensors, in the dtypes of the updates.

        Raises:
            RuntimeError: nothing was added.
        """


class WeightedAverage(Aggregation):
    """Σ wₖ xₖ / Σ wₖ (FedAvg, McMahan et al. 2017, arXiv 1602.05629), accumulated in float64."""

    def __init__(self) -> None:
        self._sums: State = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._weight = 0.0

    def add(self, update: State, weight: float) -> None:
        """Adds one update.

        Raises:
            ValueError: the weight is not positive, or the tensors are not those of the updates before.
        """
        if not weight > 0:
            raise ValueError(f"An update's weight must be positive, not {weight}.")
        if not self._sums:
            self._dtypes = {name: tensor.dtype for name, tensor in update.items()}
            self._sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in update.items()}
        if update.keys() != self._sums.keys():
            odd = sorted(update.keys() ^ self._sums.keys())
            raise ValueError(f"Updates of one round must hold the same tensors; these differ: {', '.join(odd)}.")
        for name, tensor in update.items():
            self._sums[name].add_(tensor.to(torch.float64), alpha=weight)
        self._weight += weight

    def result(self) -> State:
        if not self._weight:
            raise RuntimeError("No update was added: a round needs at least one client.")
        return {name: (total / self._weight).to(self._dtypes[name]) for name, total in self._sums.items()}


class Method(ABC):
    """A federated method. A subclass is one file; its instance holds no client's state.

    Attributes:
        name: what --method takes.
        learning_rates: SGD's learning rates of A and the head by ε (inf: no privacy), tuned for this method by itself
            on the embedded default run.
        lr_ratio: default learning rate of B as a multiple of A's.
        low_pass: default filter of the noisy gradients and its strength, or None.
    """

    name: ClassVar[str]
    learning_rates: ClassVar[Mapping[float, float]]
    lr_ratio: ClassVar[float] = 1.0
    low_pass: ClassVar[tuple[Literal["gaussian", "laplacian"], float] | None] = None

    @abstractmethod
    def phases(self, round_index: int) -> Phases:
        """What the local steps of a round (from 0) train: one factor ("B", "A"), both ("AB"), or B, A, B, … ("BA")."""

    def learning_rate(self, epsilon: float | None) -> float:
        """SGD's default learning rate: that of the nearest ε (in ratio) at which the method was tuned."""
        tuned = self.learning_rates
        if epsilon is None:
            return tuned[math.inf]
        return tuned[min((e for e in tuned if e < math.inf), key=lambda e: abs(math.log(e / epsilon)))]

    def trains(self, parameter: str, round_index: int) -> bool:
        """Whether a round changes this parameter, so that it is sent up: the round's factors, and the head always."""
        which = factor(parameter)
        return which is None or which in self.phases(round_index)

    def aggregation(self, round_index: int) -> Aggregation:
        """A fresh combination for one round."""
        return WeightedAverage()
