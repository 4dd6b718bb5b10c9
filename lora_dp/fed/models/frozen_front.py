"""The frozen front of a model, whose outputs never change, and the rest, which alone is run in training.

Where the head alone is trained, the front is all before it. Where the last N blocks are adapted, it is all before these
blocks. The front runs in eval mode: without dropout, on each example once (:mod:`lora_dp.fed.data.kept_activations`).
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora_dp.fed.data.encoding import InputSpec
from lora_dp.fed.data.examples import Batch
from lora_dp.fed.models.feature_models import blank_batch
from lora_dp.fed.models.loading import logits
from lora_dp.fed.models.options import Precision
from lora_dp.isolation.trials import modes_kept


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
        handle = self._place.register_forward_pre_hook(take)
        try:
            with modes_kept(self._model), contextlib.suppress(_Found):
                self._model.eval()
                logits(self._model, {name: tensor.to(device) for name, tensor in batch.items()}, self._precision)
        finally:
            handle.remove()
        return found[0]


@torch.no_grad()
def head_is_last(model: nn.Module, heads: Sequence[str], spec: InputSpec) -> bool:
    """Whether a model's logits are what its only head makes of one vector of each example.

    Those of a decoder are not: its head has scores for all tokens, of which the last one's count. Nor are those of a
    head that chooses a token itself.

    Args:
        model: the whole model.
        heads: names of the modules that classify.
        spec: what the model takes.
    """
    if len(heads) != 1:
        return False
    batch, device = blank_batch(spec), next(model.parameters()).device
    given = Front(model, heads[0], "float32")(batch)
    if given.dim() != 2:
        return False
    with modes_kept(model):
        expected = logits(model.eval(), {name: tensor.to(device) for name, tensor in batch.items()})
        alone: Tensor = HeadAlone(model, heads[0])(given)
        return alone.shape == expected.shape and torch.allclose(alone.float(), expected, rtol=1e-4, atol=1e-5)


class _Found(Exception):
    """Ends a forward pass at the place whose input was asked for."""
