"""The interface of a federated method: what a client trains in a round, and how the server combines the updates."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from lora_dp.engine.phases import Phases
from lora_dp.fed.methods.low_rank import LowRank, LowRankSum, Matrix, orthonormal
from lora_dp.lazy_torch import torch
from lora_dp.nn.adapter_start import Adapter, InitA

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

State: TypeAlias = "dict[str, Tensor]"
# What the server sums: tensors, and matrices of low rank that need not be formed.
Contribution: TypeAlias = "dict[str, Matrix]"
# What methods that merge have added to a layer's frozen weight: its name with this at the end.
MERGED = ".merged"
# What the server sets from statistics, and no turn trains (lora_dp.nn.feature_head).
_SET_BY_SERVER = (".feature_mean", ".feature_scale", ".class_prior")


def factor(name: str) -> Literal["A", "B"] | None:
    """Which factor of an adapter a parameter is, by its name; None for the head, and for the core of LoRA-XS."""
    last = name.rpartition(".")[2]
    return "A" if last == "lora_A" else "B" if last == "lora_B" else None


def nearest_rate(rates: Mapping[float, float], epsilon: float | None) -> float:
    """Of rates by ε (inf: no privacy), that of the nearest in ratio; None is no privacy.

    >>> nearest_rate({1: 0.1, 8: 0.5, math.inf: 0.3}, 2.0)
    0.1
    """
    if epsilon is None:
        return rates[math.inf]
    return rates[min((e for e in rates if e < math.inf), key=lambda e: abs(math.log(e / epsilon)))]


@dataclass(frozen=True)
class Layers:
    """The adapted layers of the model.

    Attributes:
        shapes: (d_out, d_in) of each adapted weight, by the layer's name.
        r: rank of the server's adapters, the largest of all clients'.
        alpha: LoRA's alpha; None means alpha = r at every rank.
        init_a: how a fresh A is drawn.
    """

    shapes: Mapping[str, tuple[int, int]]
    r: int
    alpha: float | None = None
    init_a: InitA = "kaiming"

    def scaling(self, rank: int) -> float:
        """s of an adapter of that rank: the weight is W0 + s·B·A."""
        return 1.0 if self.alpha is None else self.alpha / rank

    def fresh(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """LoRA's start of A, (r, d_in) and of the dtype of ``like``, as ``init_a`` of the adapters says.

        Uniform within ±1/√d_in, as ``nn.init.kaiming_uniform_(a=√5)``; or orthonormal rows times 1/√3, which have the
        same mean square.
        """
        r, d_in = like.shape
        if self.init_a == "orthonormal":
            drawn = torch.randn(d_in, r, generator=generator, dtype=torch.float64)
            return (orthonormal(drawn).t() / math.sqrt(3)).to(like)
        uniform = torch.rand(r, d_in, generator=generator, dtype=torch.float64) * 2 - 1
        return (uniform / math.sqrt(d_in)).to(like)


@dataclass(frozen=True)
class LocalTurn:
    """What a turn's optimizer is made from, at a client.

    Attributes:
        kind: that of the run, SGD or AdamW, which takes the groups alone.
        groups: of the trained parameters, with their learning rates.
        tensors: by name: all that is trained or exchanged, and what the method keeps beside it. They are the very ones
            of the model, and hold what the server sent.
        first: number of the first of the turn's steps in the run, from 0.
        steps: of the turn.
    """

    kind: Callable[[list[dict[str, Any]]], Optimizer]
    groups: list[dict[str, Any]]
    tensors: Mapping[str, Tensor]
    first: int
    steps: int


class Aggregation(ABC):
    """One round's combination of updates, fed one client at a time: memory does not depend on how many there are."""

    @abstractmethod
    def add(self, contribution: Contribution, weight: float) -> None:
        """Takes in what one client contributes; ``weight`` is its public, unnormalised share."""

    @abstractmethod
    def result(self) -> Contribution:
        """The mean.

        Raises:
            RuntimeError: nothing was added.
        """


class WeightedAverage(Aggregation):
    """Σ wₖ xₖ / Σ wₖ (FedAvg, McMahan et al. 2017, arXiv 1602.05629), accumulated in float64.

    The mean has the dtypes of the updates; that of matrices of low rank is in float64.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | LowRankSum] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._weight = 0.0

    def add(self, contribution: Contribution, weight: float) -> None:
        """Adds one contribution.

        Raises:
            ValueError: the weight is not positive, or the names are not those of the contributions before.
        """
        if not weight > 0:
            raise ValueError(f"An update's weight must be positive, not {weight}.")
        if not self._sums:
            for name, value in contribution.items():
                if isinstance(value, LowRank):
                    self._sums[name] = LowRankSum()
                else:
                    self._sums[name] = torch.zeros_like(value, dtype=torch.float64)
                    self._dtypes[name] = value.dtype
        if contribution.keys() != self._sums.keys():
            odd = sorted(contribution.keys() ^ self._sums.keys())
            raise ValueError(f"Updates of one round must hold the same tensors; these differ: {', '.join(odd)}.")
        for name, value in contribution.items():
            total = self._sums[name]
            if isinstance(total, LowRankSum):
                total.add(value, weight)
            else:
                assert isinstance(value, torch.Tensor)
                total.add_(value.to(torch.float64), alpha=weight)
        self._weight += weight

    def result(self) -> Contribution:
        if not self._weight:
            raise RuntimeError("No update was added: a round needs at least one client.")
        return {
            name: total.value(1 / self._weight)
            if isinstance(total, LowRankSum)
            else (total / self._weight).to(self._dtypes[name])
            for name, total in self._sums.items()
        }


class Method(ABC):
    """A federated method. A subclass is one file, a frozen dataclass if it has options; it holds no client's state.

    A round of a method has one turn, or several: in each, clients start from the global state, train, and their
    updates are combined. What a subclass must say is :meth:`phases`; the rest has defaults that average the trained
    factors (FedAvg).

    Tensors are named as the model's parameters: ``<layer>.lora_A`` (r, d_in), ``<layer>.lora_B`` (d_out, r), the
    head's.
    ``<layer>.merged`` (d_out, d_in) is what methods that merge have added to a frozen weight so far.

    Attributes:
        name: what --method takes.
        learning_rates: SGD's learning rates of A and the head by ε (inf: no privacy), tuned for this method by itself
            on the embedded default run.
        lr_ratio: default learning rate of B as a multiple of A's.
        low_pass: default filter of the noisy gradients and its strength, or None.
        turns: exchanges of a round.
        ranks_may_differ: whether clients may have adapters of different ranks.
        regulates_noise: whether noise and clipping follow the product B·A (:mod:`lora_dp.nn.regulator`).
        adapter: the adapters that the method trains: "lora", "xs" (:mod:`lora_dp.nn.lora_xs_linear`), or "tangent"
            (:mod:`lora_dp.nn.lora_tangent_linear`).
        released_mechanism: whether --mechanism as-released has what the authors' code does for this method.
        has_adapters: whether the model gets adapters; else its head alone is trained.
        adapts_last: the last so many blocks alone are adapted, where the model is a list of blocks and no option says
            otherwise; None for all.
        recipe: values of a run's options where they are left out; for a head on features of unit length.
        recipe_rates: learning rates with that recipe, as ``learning_rates``.
        own_optimizer: whether :meth:`optimizer` makes one of the method's own, whatever the run's is.

    >>> class WarmUp(Method):
    ...     name = "warm-up"
    ...     def phases(self, round_index, turn=0):
    ...         return "B" if round_index < 5 else "AB"
    >>> method = WarmUp()
    >>> method.trains("layer.lora_A", round_index=0), method.trains("layer.lora_A", round_index=5)
    (False, True)
    """

    name: ClassVar[str]
    learning_rates: ClassVar[Mapping[float, float]] = {1: 0.1, 3: 0.3, 8: 0.5, math.inf: 0.3}
    lr_ratio: ClassVar[float] = 1.0
    low_pass: ClassVar[tuple[Literal["gaussian", "laplacian"], float] | None] = None
    turns: ClassVar[int] = 1
    ranks_may_differ: ClassVar[bool] = False
    regulates_noise: ClassVar[bool] = False
    adapter: ClassVar[Adapter] = "lora"
    released_mechanism: ClassVar[bool] = False
    has_adapters: ClassVar[bool] = True
    adapts_last: ClassVar[int | None] = None
    recipe: ClassVar[Mapping[str, Any]] = {}
    recipe_rates: ClassVar[Mapping[float, float]] = {}
    own_optimizer: ClassVar[bool] = False

    @abstractmethod
    def phases(self, round_index: int, turn: int = 0) -> Phases:
        """What the local steps of a turn train: one factor ("B", "A"), both ("AB"), or B, A, B, … ("BA")."""

    @property
    def averages_factors(self) -> bool:
        """Whether the server's average is the next global state, so that a server optimizer may step in its place."""
        return type(self).combine is Method.combine and type(self).begin is Method.begin

    def learning_rate(self, epsilon: float | None) -> float:
        """SGD's default learning rate: that of the nearest ε (in ratio) at which the method was tuned."""
        return nearest_rate(self.learning_rates, epsilon)

    def trains(self, parameter: str, round_index: int, turn: int = 0) -> bool:
        """Whether a turn changes this parameter, so that it is sent up: its factors, and the head always.

        What centres and scales the head's features is the server's to set.
        """
        which = factor(parameter)
        if which is None:
            return not parameter.endswith(_SET_BY_SERVER)
        return which in self.phases(round_index, turn)

    def beside(self, state: State, whole_clients: bool) -> State:
        """Tensors that are exchanged beside those of the model, as they start; by names that the model has not.

        :meth:`trains` says which of them a client sends. What it sends is clipped and noised with the rest where whole
        clients are protected; else it must be a function of noised gradients alone.

        Args:
            state: the tensors of the model.
            whole_clients: whether the client is the unit of privacy, so that its steps carry no noise.
        """
        return {}

    def optimizer(self, turn: LocalTurn) -> Optimizer:
        """The optimizer of a client's turn, which sees noised gradients alone where examples are protected."""
        return turn.kind(turn.groups)

    def begin(self, state: State, layers: Layers, round_index: int, generator: torch.Generator) -> State:
        """Tensors that the server replaces before a round: fresh factors, for example. Public: it sees no client.

        Args:
            state: the global state.
            layers: the adapted layers.
            generator: seeded by the run's seed and the round.
        """
        return {}

    def for_client(self, state: State, layers: Layers, rank: int) -> State:
        """What a client with adapters of this rank starts from."""
        return state

    def local_step(
        self, model: nn.Module, step: int, steps: int, generator: torch.Generator
    ) -> AbstractContextManager[None]:
        """Surrounds forward and backward of local step ``step`` (from 0) of all ``steps`` that the run plans."""
        return contextlib.nullcontext()

    def contribution(self, update: State, layers: Layers) -> Contribution:
        """What of a client's update the server sums: linear, so that noise on the sum protects it."""
        return dict(update)

    def aggregation(self) -> Aggregation:
        """A fresh combination for one turn."""
        return WeightedAverage()

    def combine(
        self, mean: Contribution, state: State, layers: Layers, round_index: int, turn: int = 0
    ) -> Contribution:
        """The global tensors after a turn.

        Args:
            mean: mean contribution; matrices of low rank may be dense here.
            state: the global state that the clients started from.

        Returns:
            New values by name; a value of ``<layer>.merged`` is added to what was merged before.
        """
        return mean
