"""A small run on Flower: its options, its nodes, and a message to one."""

from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from lora_dp.fed.config import RunConfig
from lora_dp.fed.rounds.messages import Task, Update

TINY = {
    "clients": 3,
    "rounds": 2,
    "local_steps": 2,
    "batch_size": 16,
    "accountant": "rdp",
    "device": "cpu",
    "reproducible": True,
}
STATE = {
    "layer.lora_A": torch.arange(6.0).reshape(2, 3),
    "head.bias": torch.ones(1, dtype=torch.float64),
    "head.weight": torch.tensor([[1.5]], dtype=torch.bfloat16),
}
TASK = Task(3, 1, 2, STATE)


def signed(number: int) -> Update:
    """An update that tells whose it is."""
    return Update({**STATE, "head.bias": torch.tensor([float(number)], dtype=torch.float64)})


def tiny(**options: Any) -> RunConfig:
    return RunConfig.from_flat({**TINY, **options})


def nodes(number: int = 3) -> list[dict[str, Any]]:
    # Not in the clients' order: nodes say themselves who they are.
    return [{"partition-id": client, "num-partitions": number} for client in reversed(range(number))]
