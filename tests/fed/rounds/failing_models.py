"""Models and examples on which training fails or examples mix."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_dp.fed.models.task_losses
from tests.fed.small import TRAINING, Doubles, make_examples

ONE_STEP = replace(TRAINING, local_steps=1, batch_size=1000)
COUNT = 13
ODD = 4  # the example on which training fails


class Unreadable(Doubles):
    """Examples of which one cannot be fetched."""

    def batch(self, indices: Any) -> dict[str, Tensor]:
        if ODD in [int(i) for i in indices]:
            raise OSError("cannot read the photograph of Jane")
        return super().batch(indices)


class Unknown(Doubles):
    """Examples of which one has a class that the model lacks."""

    def batch(self, indices: Any) -> dict[str, Tensor]:
        found = super().batch(indices)
        found["labels"] = torch.where(torch.as_tensor([int(i) == ODD for i in indices]), 77, found["labels"])
        return found


class Twice(Doubles):
    """Examples of which one comes twice wherever it comes: it would count twice."""

    def batch(self, indices: Any) -> dict[str, Tensor]:
        rows = [int(i) for i in indices]
        return super().batch(rows + [ODD] * (ODD in rows))


def same_as(examples: Doubles, kind: type[Doubles]) -> Doubles:
    made = kind.__new__(kind)
    made.__dict__.update(examples.__dict__)
    return made


def in_forward(monkeypatch: pytest.MonkeyPatch, mark: Tensor) -> None:
    """The model raises where it sees the odd example."""
    plain = lora_dp.fed.models.task_losses.logits

    def raising(model: nn.Module, batch: dict[str, Tensor], *precision: Any) -> Tensor:
        if any(row.equal(mark) for row in batch["pixel_values"]):
            raise IndexError("index out of range in self")
        return plain(model, batch, *precision)

    monkeypatch.setattr(lora_dp.fed.models.task_losses, "logits", raising)


def in_backward(monkeypatch: pytest.MonkeyPatch, mark: Tensor) -> None:
    """The gradient of a batch with the odd example cannot be computed."""
    plain = lora_dp.fed.models.task_losses.logits

    def raising(model: nn.Module, batch: dict[str, Tensor], *precision: Any) -> Tensor:
        scores = plain(model, batch, *precision)
        if any(row.equal(mark) for row in batch["pixel_values"]):

            def hook(gradient: Tensor) -> Tensor:
                raise RuntimeError("no gradient for Jane")

            scores.register_hook(hook)
        return scores

    monkeypatch.setattr(lora_dp.fed.models.task_losses, "logits", raising)


def deep_in_backward(monkeypatch: pytest.MonkeyPatch, mark: Tensor) -> None:
    """The same, once the later layers have recorded the gradients of their parameters."""
    plain = lora_dp.fed.models.task_losses.logits

    def raising(model: nn.Module, batch: dict[str, Tensor], *precision: Any) -> Tensor:
        def hook(gradient: Tensor) -> Tensor:
            raise RuntimeError("no gradient for Jane")

        def watch(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if any(row.equal(mark) for row in batch["pixel_values"]):
                output.register_hook(hook)

        handle = model[1].register_forward_hook(watch)  # type: ignore[index]
        try:
            return plain(model, batch, *precision)
        finally:
            handle.remove()

    monkeypatch.setattr(lora_dp.fed.models.task_losses, "logits", raising)


def dropped(monkeypatch: pytest.MonkeyPatch, mark: Tensor) -> None:
    """The model leaves the odd example out of its batch."""
    plain = lora_dp.fed.models.task_losses.logits

    def fewer(model: nn.Module, batch: dict[str, Tensor], *precision: Any) -> Tensor:
        kept = torch.tensor([not row.equal(mark) for row in batch["pixel_values"]])
        for name in batch:
            batch[name] = batch[name][kept]
        return plain(model, batch, *precision)

    monkeypatch.setattr(lora_dp.fed.models.task_losses, "logits", fewer)


Plant = Callable[[pytest.MonkeyPatch, Tensor], None]
FAILURES: dict[str, tuple[type[Doubles], Plant | None]] = {
    "fetch": (Unreadable, None),
    "class": (Unknown, None),
    "forward": (Doubles, in_forward),
    "backward": (Doubles, in_backward),
    "deep": (Doubles, deep_in_backward),
    "batch": (Doubles, dropped),
    "twice": (Twice, None),
}


def failing(kind: str, monkeypatch: pytest.MonkeyPatch) -> Doubles:
    examples = make_examples(COUNT, 1)
    dataset, plant = FAILURES[kind]
    if plant is not None:
        plant(monkeypatch, examples.batch([ODD])["pixel_values"][0])
    return same_as(examples, dataset)


class Mixing(nn.Module):
    """Takes the batch's mean away."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x - x.mean(0, keepdim=True) / 2 if len(x) > 1 else x / 2)


WHOLE: dict[str, Any] = {"unit": "client", "delta": 0.01, "weighting": "equal"}
