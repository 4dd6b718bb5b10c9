"""The frozen front of a model, whose outputs never change, and the rest, which alone is run in training.

Where the head alone is trained, the front is all before it. Where the last N blocks are adapted, it is all before these
blocks. The front runs in eval mode: without dropout, on each example once (:mod:`lora_dp.fed.data.kept_activations`).
"""

import contextlib

import torch
from torch import Tensor, nn

from lora_dp.fed.data.examples import Batch
from lora_dp.fed.models.loading import logits
from lora_dp.fed.models.options import Precision


class Rest(nn.Module):
    """What comes after the front: takes ``activations`` beside the model's own inputs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def get_input_embeddings(self) -> nn.Module | None:
        """The model's, for whoever makes inputs up."""
        getter = getattr(self.model, "get_input_embeddings", None)
        return None if getter is None else getter()


class HeadAlone(Rest):
    """The head of a model on what it is given.

    Args:
        model: the whole model.
        head: one of its modules, which takes one tensor.
    """

    def __init__(self, model: nn.Module, head: str):
        super().__init__(model.get_submodule(head))

    def forward(self, activations: Tensor) -> Tensor:
        logits: Tensor = self.model(activations)
        return logits


class Front:
    """Activations of a batch: what a module of the model is given, the model in eval mode.

    Args:
        model: the whole model.
        place: name of the module, whose first argument is wanted.
        precision: in which the model runs.
    """

    def __init__(self, model: nn.Module, place: str, precision: Precision):
        self._model, self._place, self._precision = model, model.get_submodule(place), precision

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        found: list[Tensor] = []

        def take(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.append(args[0])
            raise _Found

        device = next(self._model.parameters()).device
        modes = [(module, module.training) for module in self._model.modules()]
        handle = self._place.register_forward_pre_hook(take)
        try:
            self._model.eval()
            with contextlib.suppress(_Found):
                logits(self._model, {name: tensor.to(device) for name, tensor in batch.items()}, self._precision)
        finally:
            handle.remove()
            for module, mode in modes:
                module.training = mode
        return found[0]


class _Found(Exception):
    """Ends a forward pass at the place whose input was asked for."""
