"""Collate functions that stack, pad, draw or join, and a trial of them."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from lora_dp.isolation.collation.trial import check_collation
from tests.models import examples

Collate = Callable[[list[Any]], Any]


class Texts(Dataset[Tensor]):
    """Sequences of 3 to 9 numbers above 0."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Tensor:
        return torch.arange(1, 4 + index % 7) + index


def stacked(items: list[Any]) -> Tensor:
    return torch.stack([item[0] for item in items])


def mixup(items: list[Any]) -> Tensor:
    x = stacked(items)
    return 0.5 * x + 0.5 * x.roll(1, 0)


def padded(items: list[Any]) -> dict[str, Tensor]:
    ids = pad_sequence(items, True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def padded_left(items: list[Any]) -> dict[str, Tensor]:
    return {name: tensor.flip(1) for name, tensor in padded([item.flip(0) for item in items]).items()}


def check(dataset: Dataset[Any], collate: Collate, n: int = 8) -> bool:
    indices = list(range(n))
    return check_collation(dataset, collate, indices, collate([dataset[i] for i in indices]))


def labelled(n: int = 24, rare: int = 17) -> list[tuple[Tensor, int]]:
    return [(x, int(i == rare)) for i, x in enumerate(examples(n)[0])]


CLOCK = itertools.count()

SHARED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "the mean": lambda x, y: x.mean(0),
    "the mean of halves": lambda x, y: x.half().mean(0),
    "as a row": lambda x, y: x.var(0, correction=0, keepdim=True),
    "one number": lambda x, y: x.abs().mean(),
    "of NumPy": lambda x, y: x.mean(0).numpy(),
    "one of NumPy": lambda x, y: x.numpy().mean(),
    "a plain number": lambda x, y: float(x.abs().mean()),
    "in an object": lambda x, y: SimpleNamespace(mean=x.mean(0)),
    "a kernel": lambda x, y: x.t() @ x,
    "as many as a trial has": lambda x, y: x.mean(0)[:4],
    "of each class": lambda x, y: 1 / torch.bincount(y, minlength=3).clamp(min=1).float(),
    "missing at times": lambda x, y: torch.where(x.mean(0) > 0, x.mean(0), torch.nan),
    "beyond float32": lambda x, y: 1e100 * float(x.abs().mean()),
    "in a list with a number that changes": lambda x, y: [float(x.abs().mean()), float(next(CLOCK))],
    "with a number that changes": lambda x, y: [x.mean(0), float(next(CLOCK))],
}


def beside(statistic: Callable[[Tensor, Tensor], Any]) -> Collate:
    def collate(items: list[Any]) -> Any:
        x, y = torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])
        return {"x": x, "y": y, "it": statistic(x, y)}

    return collate
