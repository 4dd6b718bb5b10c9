"""Cyclic Poisson sampling: each example in the turns of its group alone, there at the stated rate."""

import pytest
import torch
from torch import Tensor

from lora_dp.privacy.cyclic_sampling import CyclicSampler, split_into_groups
from lora_dp.privacy.randomness import SecureSource, SeededSource


@pytest.mark.parametrize(("size", "count"), [(12, 3), (13, 3), (5, 5)])
def test_groups_hold_each_example_once(size, count):
    groups = split_into_groups(size, count, SecureSource())
    assert sorted(torch.cat(groups).tolist()) == list(range(size))
    assert {len(group) for group in groups} <= {size // count, -(-size // count)}
    assert all(group.tolist() == sorted(group.tolist()) for group in groups)


def test_groups_are_drawn_at_random():
    found = {tuple(split_into_groups(30, 2, SeededSource(seed))[0].tolist()) for seed in range(20)}
    assert len(found) == 20


@pytest.mark.slow
def test_an_example_is_drawn_in_the_turns_of_its_group_alone_at_the_rate():
    """χ² over 40 examples, 1,500 turns each: a right sampler passes 110 with probability below 2e-8."""
    groups, counts = split_into_groups(40, 4, SeededSource(1)), torch.zeros(40, dtype=torch.float64)
    for step, batch in enumerate(CyclicSampler(groups, 0.3, 6000, SeededSource(2), first=3)):
        assert batch == sorted(set(batch)) and set(batch) <= set(groups[(3 + step) % 4].tolist())
        counts[batch] += 1
    assert ((counts - 450).square() / (450 * 0.7)).sum() < 110


def test_a_uniform_value_below_the_rate_takes_part_and_no_other():
    class Given:
        def uniform(self, n: int) -> Tensor:
            return torch.tensor([0.25, 0.25 - 2.0**-53, 0.0, 0.25 + 2.0**-53], dtype=torch.float64)[:n]

    assert CyclicSampler([torch.tensor([5, 7, 8, 9])], 0.25, 1, Given(), first=0).draw() == [7, 8]


def test_a_sampler_has_as_many_batches_as_steps():
    groups = split_into_groups(10, 2, SeededSource(0))
    assert len(CyclicSampler(groups, 0.5, 7, SeededSource(0), first=0)) == 7
