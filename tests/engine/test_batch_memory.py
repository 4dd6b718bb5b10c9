"""A batch in parts: each example in one of them, whatever the batch is made of."""

from typing import Any

import pytest
import torch

from lora_dp import BatchMemoryManager
from lora_dp.engine.batch_memory import parts_of
from tests.models import mlp
from tests.support import make_private


@pytest.mark.parametrize("n, size, lengths", [(5, 2, [2, 2, 1]), (4, 4, [4]), (3, 10, [3]), (0, 4, [0])])
def test_every_example_is_in_one_part(n: int, size: int, lengths: list[int]) -> None:
    numbers = torch.arange(n * 2).reshape(n, 2)
    batch = {"input_ids": numbers, "labels": torch.arange(n), "names": [str(i) for i in range(n)]}
    parts = list(parts_of({**batch, "use_cache": False}, size))
    assert [len(part["labels"]) for part in parts] == lengths
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), batch["input_ids"])
    assert [name for part in parts for name in part["names"]] == batch["names"]
    assert all(part["use_cache"] is False for part in parts)


@pytest.mark.parametrize("kind", [tuple, list, lambda pair: pair[0], lambda pair: {"x": {"inner": pair[0]}}])
def test_whatever_the_batch_is_made_of(kind: Any) -> None:
    batch = kind([torch.arange(5), torch.arange(5) * 2])
    parts = list(parts_of(batch, 2))
    assert len(parts) == 3
    assert all(type(part) is type(batch) for part in parts)
    first = [part["x"]["inner"] if isinstance(part, dict) else part for part in parts]
    flat = torch.cat([part if isinstance(part, torch.Tensor) else part[0] for part in first])
    assert flat.tolist() == [0, 1, 2, 3, 4]


def test_what_cannot_be_split_is_named() -> None:
    batch = {"input_ids": torch.zeros(4, 2), "patches": torch.zeros(9, 3)}
    with pytest.raises(ValueError, match=r"'patches' has the shape \(9, 3\) in a batch of 4 examples"):
        list(parts_of(batch, 2))
    assert len(list(parts_of(batch, 4))) == 1  # one part needs no splitting
    with pytest.raises(ValueError, match="holds no tensor"):
        list(parts_of({"names": ["a"]}, 2))


def test_parts_have_at_least_one_example() -> None:
    optimizer = make_private(mlp(), batch_size=4)
    with pytest.raises(TypeError, match="data_loader"):
        BatchMemoryManager(data_loader=[1], max_physical_batch_size=1, optimizer=optimizer)  # type: ignore[arg-type]
