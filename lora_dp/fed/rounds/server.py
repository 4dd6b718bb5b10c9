"""The server: the global state, who takes part, what travels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_dp.fed.methods import MERGED, Contribution, Layers, Method, State
from lora_dp.fed.methods.low_rank import LowRank, dense
from lora_dp.fed.rounds.messages import Task
from lora_dp.privacy.randomness import RandomSource


def nbytes(state: State) -> int:
    """Bytes of all tensors, as they would travel uncompressed."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def draw_clients(eligible: Sequence[int], number: int, rng: np.random.Generator) -> list[int]:
    """Draws `number` of the clients uniformly without replacement, all if there are no more.

    The draw is public and amplifies nothing.
    """
    if number >= len(eligible):
        return list(eligible)
    return sorted(int(i) for i in rng.choice(np.asarray(eligible), size=number, replace=False))


def poisson_clients(clients: int, rate: float, source: RandomSource) -> list[int]:
    """Each client joins with probability ``rate``, independently: the draw that amplifies, as long as it is secret."""
    return torch.nonzero(source.uniform(clients) < rate).flatten().tolist()


class Server:
    """Holds the global state and nothing per client, and knows which tensors each round changed.

    Args:
        state: the start, by parameter name; copied.
        layers: the adapted layers.
        method: how rounds begin and combine.

    Attributes:
        state: current global tensors; ``<layer>.merged`` of layers whose frozen weight has moved.
        version: changes so far.
    """

    def __init__(self, state: State, layers: Layers, method: Method) -> None:
        self.state: State = {name: tensor.detach().clone() for name, tensor in state.items()}
        self.layers, self.method = layers, method
        self.version = 0
        self._changed = dict.fromkeys(self.state, 0)
        # The last addition to each merged tensor: its bytes, and the version before it.
        self._additions: dict[str, tuple[int, int]] = {}
        self._starts: dict[int, State] = {}

    def begin(self, round_index: int, generator: torch.Generator) -> None:
        """Lets the method replace tensors before a round."""
        fresh = self.method.begin(self.state, self.layers, round_index, generator)
        if fresh:
            self.apply(dict(fresh))

    def task(self, round_index: int, turn: int, rank: int) -> Task:
        """What a client with adapters of that rank is asked to do."""
        if rank not in self._starts:
            self._starts[rank] = self.method.for_client(self.state, self.layers, rank)
        return Task(round_index, turn, rank, self._starts[rank])

    def news_bytes(self, seen: int, rank: int) -> int:
        """Bytes that a client needs which last saw version ``seen`` (-1: none) and has merged all until then."""
        start = self._starts.get(rank) or self.method.for_client(self.state, self.layers, rank)
        total = 0
        for name, tensor in start.items():
            if self._changed[name] > seen:
                whole = tensor.numel() * tensor.element_size()
                addition, before = self._additions.get(name, (whole, 0))
                total += min(whole, addition) if seen >= before else whole
        return total

    def apply(self, combined: Contribution) -> None:
        """Takes combined tensors as the new global ones; what is merged is added to what was.

        Raises:
            ValueError: an unknown name or another shape.
        """
        for name, value in combined.items():
            if tuple(value.shape) != self._shape(name):
                raise ValueError(f"The combined update does not fit the global state at {name!r}.")
        self.version += 1
        for name, value in combined.items():
            if name.endswith(MERGED):
                value = self._merge(name, value)
            assert isinstance(value, Tensor)
            self.state[name] = self._like(value, name)
            self._changed[name] = self.version
        self._starts = {}

    def snapshot(self) -> tuple[Any, ...]:
        """All there is, for :meth:`go_back`; tensors are replaced and never changed, so nothing is copied."""
        return dict(self.state), self.version, dict(self._changed), dict(self._additions)

    def go_back(self, snapshot: tuple[Any, ...]) -> None:
        """Is as it was at :meth:`snapshot`."""
        self.state, self.version, self._changed, self._additions = snapshot
        self._starts = {}

    def bookkeeping(self) -> dict[str, Any]:
        """Versions and sizes, ready for JSON; the tensors are ``state``."""
        return {"version": self.version, "changed": self._changed, "additions": self._additions}

    def restore(self, state: State, bookkeeping: dict[str, Any]) -> None:
        """Takes back a state with what :meth:`bookkeeping` said of it.

        Raises:
            ValueError: other names or shapes than this model's.
        """
        for name, tensor in state.items():
            if tuple(tensor.shape) != self._shape(name):
                raise ValueError(f"The checkpoint was made for another model: {name!r} does not fit.")
        if missing := self.state.keys() - state.keys():
            raise ValueError(f"The checkpoint was made for another model: it lacks {min(missing)!r}.")
        # In the order of an uninterrupted run: random draws follow it.
        order = [*self.state, *(layer + MERGED for layer in self.layers.shapes if layer + MERGED in state)]
        self.state = {name: self._like(state[name], name) for name in order}
        self.version = int(bookkeeping["version"])
        self._changed = {name: int(version) for name, version in bookkeeping["changed"].items()}
        self._additions = {name: (int(size), int(before)) for name, (size, before) in bookkeeping["additions"].items()}
        self._starts = {}

    def _shape(self, name: str) -> tuple[int, ...] | None:
        """The shape that a tensor of that name must have; None for an unknown name."""
        if name.endswith(MERGED):
            return self.layers.shapes.get(name.removesuffix(MERGED))
        return tuple(self.state[name].shape) if name in self.state else None

    def _merge(self, name: str, addition: Tensor | LowRank) -> Tensor:
        size = self._reference.element_size()
        numbers = addition.left.numel() + addition.right.numel() if isinstance(addition, LowRank) else addition.numel()
        self._additions[name] = numbers * size, self._changed.get(name, 0)
        before = self.state.get(name)
        return dense(addition) if before is None else before.double() + dense(addition).double()

    @property
    def _reference(self) -> Tensor:
        return next(iter(self.state.values()))

    def _like(self, tensor: Tensor, name: str) -> Tensor:
        reference = self.state.get(name, self._reference)
        return tensor.detach().to(device=reference.device, dtype=reference.dtype).contiguous()
