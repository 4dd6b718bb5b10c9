"""What server and clients exchange, and the one model on which a process does its work."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_dp.fed.methods import MERGED, Layers, State
from lora_dp.lora.adapters import exchanged_parameters, load_parameters
from lora_dp.nn.feature_head import feature_statistics
from lora_dp.nn.lora_linear import DPLoRALinear


@dataclass(frozen=True)
class Task:
    """What the server asks of a client: train one turn of one round from this state.

    Attributes:
        round, turn: from 0.
        rank: of this client's adapters.
        state: global tensors as this client is to start from them; ``<layer>.merged`` is added to a frozen weight.
        sums: release the sums of features instead, by which the server starts the head.
    """

    round: int
    turn: int
    rank: int
    state: State
    sums: bool = False


@dataclass(frozen=True)
class Update:
    """A client's answer, all of it: the tensors that the turn trains, noised already unless the server adds the noise.

    Attributes:
        tensors: by name.
    """

    tensors: State


@dataclass(frozen=True)
class Reply:
    """What came of a task: an update, or the reason why there is none.

    Attributes:
        failure: in words that tell nothing of the data.
        detail: more, for the eyes of whoever runs the client: it may quote its data.
    """

    client: int
    update: Update | None
    failure: str | None = None
    detail: str = ""


class Workspace:
    """The model of a process: whoever's turn it is loads the state that it starts from.

    Args:
        model: with adapters in place; what batches are given to.
        whole: the model that this is the rest of, where its frozen front is computed apart; names are this one's.

    Attributes:
        layers: the adapted layers.
        beside: names of tensors that are exchanged, and are no part of the model.
        rows_apart: of shapes of batches, whether each row's arithmetic hangs on that row alone
            (:mod:`lora_dp.fed.rounds.fixed_shapes`).
    """

    def __init__(self, model: nn.Module, whole: nn.Module | None = None) -> None:
        self.model, self.whole = model, whole or model
        self._adapted = {name: m for name, m in self.whole.named_modules() if isinstance(m, DPLoRALinear)}
        config = getattr(self.whole, "lora_config", None)
        ranks = {layer.r for layer in self._adapted.values()}
        self.layers = Layers(
            {name: (layer.out_features, layer.in_features) for name, layer in self._adapted.items()},
            max(ranks, default=0),
            config.alpha if config is not None else None,
            config.init_a if config is not None else "kaiming",
        )
        # A change of rank keeps the parameters the same objects.
        self._parameters: dict[str, Tensor] = {**exchanged_parameters(self.whole), **feature_statistics(self.whole)}
        self.beside: frozenset[str] = frozenset()
        self._loaded: dict[str, Tensor] = {}
        self.rows_apart: dict[Hashable, bool] = {}

    def state(self, wanted: Callable[[str], bool] = lambda name: True) -> State:
        """Copies of the adapters and the head; of those names only that are wanted."""
        return {name: parameter.detach().clone() for name, parameter in self._parameters.items() if wanted(name)}

    def keep_beside(self, start: Callable[[State], State]) -> None:
        """Lets tensors be exchanged that are no part of the model; those that are kept already stay as they are.

        Args:
            start: what they begin as, from the tensors of the model.
        """
        mine = {name: tensor.detach() for name, tensor in self._parameters.items() if name not in self.beside}
        wanted = start(mine)
        self._parameters |= {name: tensor for name, tensor in wanted.items() if name not in self._parameters}
        self.beside = frozenset(wanted)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those of :meth:`state` themselves."""
        return dict(self._parameters)

    @property
    def names(self) -> list[str]:
        """Of the tensors of :meth:`state`."""
        return list(self._parameters)

    def load(self, state: Mapping[str, Tensor], rank: int | None = None) -> None:
        """Puts a state into the model, whose adapters take the rank that is given (by default the largest).

        Raises:
            ValueError: names or shapes that are not this model's.
        """
        rank = rank or self.layers.r
        for layer in self._adapted.values():
            if layer.r != rank:
                layer.set_rank(rank, layer.alpha if self.layers.alpha is not None else rank)
        load_parameters(self._parameters, {n: t for n, t in state.items() if not n.endswith(MERGED)})
        for name, layer in self._adapted.items():
            self._load_merged(name, layer, state.get(name + MERGED))

    @contextmanager
    def at_random(self, generator: torch.Generator) -> Iterator[None]:
        """Inside, adapters and head hold random numbers, and frozen weights what they held before any server's word.

        Afterwards all is as it was.
        """
        held: list[tuple[Tensor, Tensor]] = []
        scales = {
            f"{name}.lora_{outer}": 1 / layer.scaling
            for name, layer in self._adapted.items()
            for outer in ("B", "dA", "dB")
        }
        with torch.no_grad():
            for name, layer in self._adapted.items():
                if name in self._loaded:
                    held.append((layer.weight, layer.weight.clone()))
                    layer.weight.copy_(layer.original_weight)  # type: ignore[arg-type]
            for name, parameter in self._parameters.items():
                held.append((parameter, parameter.clone()))
                drawn = torch.randn(parameter.shape, generator=generator)
                # The adapters' output is multiplied by what a server may choose: here by nothing.
                parameter.copy_(drawn * (0.1 * scales.get(name, 1.0)))
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, before in held:
                    tensor.copy_(before)

    @torch.no_grad()
    def _load_merged(self, name: str, layer: DPLoRALinear, merged: Tensor | None) -> None:
        # The same tensor as last time is in the weight already: the usual case, for all clients of a round.
        if merged is self._loaded.get(name):
            return
        if not hasattr(layer, "original_weight"):
            layer.original_weight = layer.weight.detach().clone()
        original: Tensor = layer.original_weight  # type: ignore[assignment]
        if merged is None:
            layer.weight.copy_(original)
            del self._loaded[name]
            return
        layer.weight.copy_(original + (merged.t() if layer.fan_in_fan_out else merged).to(original))
        self._loaded[name] = merged
