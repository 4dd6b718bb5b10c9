"""Collate functions by the form in which their rows come, and a trial of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_dp.isolation.collation.trial import check_collation
from tests.models import examples

Collate = Callable[[list[Any]], Any]


def mixup(x: Tensor) -> Tensor:
    return 0.5 * x + 0.5 * x.roll(1, 0)


def normalised(x: Tensor) -> Tensor:
    return x / (1 + x.square().mean(0))


def data(n: int) -> list[Tensor]:
    return list(examples(12 * n)[0].view(-1, 2, 6)[:n] + 1)


def check(items: list[Any], collate: Collate) -> bool:
    return check_collation(items, collate, range(len(items)), collate(items))


def texts(n: int) -> list[Tensor]:
    """The longest come last."""
    return sorted([torch.arange(1, 4 + place * 5 % 7) + place for place in range(n)], key=len)
