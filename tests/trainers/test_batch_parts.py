"""A batch in parts: each example in one of them, whatever the values."""

import pytest
import torch

from lora_dp.trainers.batch_parts import parts_of


@pytest.mark.parametrize("n, size, lengths", [(5, 2, [2, 2, 1]), (4, 4, [4]), (3, 10, [3]), (0, 4, [0])])
def test_every_example_is_in_one_part(n: int, size: int, lengths: list[int]) -> None:
    batch = {
        "input_ids": torch.arange(n * 2).reshape(n, 2),
        "labels": torch.arange(n),
        "names": [str(i) for i in range(n)],
    }
    parts = list(parts_of({**batch, "use_cache": False}, size))
    assert [len(part["labels"]) for part in parts] == lengths
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), batch["input_ids"])
    assert [name for part in parts for name in part["names"]] == batch["names"]
    assert all(part["use_cache"] is False for part in parts)


def test_what_cannot_be_split_is_named() -> None:
    batch = {"input_ids": torch.zeros(4, 2), "patches": torch.zeros(9, 3)}
    with pytest.raises(ValueError, match=r"'patches' has the shape \(9, 3\) in a batch of 4 examples"):
        list(parts_of(batch, 2))
    assert len(list(parts_of(batch, 4))) == 1  # one part needs no splitting
