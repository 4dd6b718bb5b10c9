"""The frozen front of a model, whose outputs never change, and the rest, which alone is run in training.

Where the head alone is trained, the front is all before it. Where the last N blocks are adapted, it is all before these
blocks. The front runs in eval mode: without dropout, on each example once (:mod:`lora_dp.fed.data.kept_activations`).
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_dp.fed.data.content_digest import content_digest
from lora_dp.fed.data.encoding import InputSpec
from lora_dp.fed.data.examples import Batch
from lora_dp.fed.data.kept_activations import model_inputs
from lora_dp.fed.models.feature_models import blank_batch
from lora_dp.fed.models.loading import logits
from lora_dp.fed.models.options import ModelConfig, Precision
from lora_dp.isolation.trials import modes_kept


class HeadAlone(nn.Module):
    """The head of a model on what it is given.

    Args:
        model: the whole model.
        head: name of the module that classifies, which takes one tensor.
    """

    def __init__(self, model: nn.Module, head: str):
        super().__init__()
        self.head = model.get_submodule(head)

    def forward(self, activations: Tensor) -> Tensor:
        """Logits (N, K) of what the front has made of N examples."""
        scores: Tensor = self.head(activations)
        return scores


class LastBlocks(nn.Module):
    """A model whose first blocks are passed over: their outputs come as ``activations``, beside the model's inputs.

    Args:
        model: the whole model.
        front: makes these activations.
    """

    def __init__(self, model: nn.Module, front: "Front"):
        super().__init__()
        self.model, self._front = model, front

    def forward(self, activations: Tensor, **inputs: Tensor) -> Any:
        """What the whole model returns."""
        kept = dict(zip(self._front.kept, activations.chunk(len(self._front.kept), -1), strict=True))
        with passed_over(self._front.blocks, kept, self._front.as_tuple):
            args, named = model_inputs(inputs)
            return self.model(*args, **named)


class Front:
    """Activations of a batch, the model in eval mode: what its head is given, or what blocks return.

    Args:
        model: the whole model.
        precision: in which it runs.
        head: name of the module whose first argument is wanted; None for outputs of blocks.
        blocks: names of the frozen blocks, in order.
        kept: indices of those whose outputs are wanted, ascending, the last block's among them.

    Attributes:
        blocks: the modules.
        as_tuple: whether they return a tuple, whose first entry is meant.
    """

    def __init__(
        self,
        model: nn.Module,
        precision: Precision,
        *,
        head: str | None = None,
        blocks: Sequence[str] = (),
        kept: Sequence[int] = (),
    ):
        self._model, self._precision = model, precision
        self._head = None if head is None else model.get_submodule(head)
        self.blocks, self.kept = [model.get_submodule(name) for name in blocks], list(kept)
        self.as_tuple = False

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        found: list[Tensor] = []

        def take_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.append(args[0])
            raise _Found

        def take_output(module: nn.Module, _: Any, output: Any) -> None:
            self.as_tuple = isinstance(output, tuple)
            found.append(output[0] if self.as_tuple else output)
            if module is self.blocks[-1]:
                raise _Found

        device = next(self._model.parameters()).device
        if self._head is not None:
            handles = [self._head.register_forward_pre_hook(take_input)]
        else:
            handles = [self.blocks[place].register_forward_hook(take_output) for place in self.kept]
        try:
            with modes_kept(self._model), contextlib.suppress(_Found):
                self._model.eval()
                logits(self._model, {name: tensor.to(device) for name, tensor in batch.items()}, self._precision)
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat(found, -1)

    def digest(self, heads: Sequence[str], config: ModelConfig) -> str:
        """Of all that the activations of a batch follow from: frozen weights, and the options of the model.

        Heads and adapters are left out, which come after what is kept.

        Args:
            heads: names of the modules that are trained in full.
            config: that the model was loaded by.
        """
        names = {id(module): name for name, module in self._model.named_modules()}
        inside = tuple(f"{names[id(block)]}." for block in self.blocks)
        frozen = {
            name: tensor
            for name, tensor in self._model.state_dict().items()
            if name.startswith(inside)
            or not name.startswith(tuple(f"{head}." for head in heads))
            and not name.rpartition(".")[2].startswith("lora_")
        }
        options = replace(config, r=ModelConfig.r, alpha=None, dropout=0.0, init_a="kaiming", class_texts=None)
        return f"{content_digest(frozen)} {options} {inside} {self.kept}"


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
    given = Front(model, "float32", head=heads[0])(batch)
    if given.dim() != 2:
        return False
    with modes_kept(model):
        expected = logits(model.eval(), {name: tensor.to(device) for name, tensor in batch.items()})
        alone: Tensor = HeadAlone(model, heads[0])(given)
        return alone.shape == expected.shape and torch.allclose(alone.float(), expected, rtol=1e-4, atol=1e-5)


class _Found(Exception):
    """Ends a forward pass where all that was asked for is there."""


@contextlib.contextmanager
def passed_over(blocks: Sequence[nn.Module], kept: Mapping[int, Tensor], as_tuple: bool) -> Iterator[None]:
    """Inside, blocks return what is kept of them, and those of which nothing is kept what they are given.

    Args:
        blocks: of a model, in order.
        kept: outputs by index.
        as_tuple: whether blocks return a tuple.
    """

    def passing(place: int) -> Any:
        def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
            passed = kept.get(place, hidden_states)
            return (passed,) if as_tuple else passed

        return forward

    for place, block in enumerate(blocks):
        block.forward = passing(place)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own is there again
