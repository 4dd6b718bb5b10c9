"""The server: the global adapter, who takes part, what travels."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from lora_dp.fed.methods import State


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


class Server:
    """Holds the global adapter state and nothing per client, and knows which tensors each round changed.

    Args:
        state: the start, by parameter name; copied.

    Attributes:
        state: current global tensors.
        version: rounds combined so far.
    """

    def __init__(self, state: State) -> None:
        self.state: State = {name: tensor.detach().clone() for name, tensor in state.items()}
        self.version = 0
        self._changed = dict.fromkeys(self.state, 0)

    def news(self, seen: int) -> State:
        """The tensors that a client which last saw version `seen` (-1: none) lacks."""
        return {name: tensor for name, tensor in self.state.items() if self._changed[name] > seen}

    def apply(self, combined: State) -> None:
        """Takes a round's combined tensors as the new global ones.

        Raises:
            ValueError: an unknown name or another shape.
        """
        for name, tensor in combined.items():
            if name not in self.state or tensor.shape != self.state[name].shape:
                raise ValueError(f"The combined update does not fit the global state at {name!r}.")
        self.version += 1
        for name, tensor in combined.items():
            self.state[name] = _like(tensor, self.state[name])
            self._changed[name] = self.version


def _like(tensor: Tensor, reference: Tensor) -> Tensor:
    return tensor.detach().to(device=reference.device, dtype=reference.dtype)
