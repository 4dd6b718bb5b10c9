"""Random numbers that follow a seed for a while."""

import random

import numpy as np
import torch

from lora_dp.isolation.seeding import seeded


def drawn(seed: int) -> tuple[float, float, float]:
    with seeded(seed):
        return float(torch.rand(())), random.random(), float(np.random.rand())


def test_every_library_follows_the_seed_whatever_was_drawn_before():
    first, other = drawn(1), drawn(2)
    torch.rand(()), random.random(), np.random.rand()
    assert drawn(1) == first
    assert all(left != right for left, right in zip(first, other, strict=True))


def test_a_seed_that_is_too_long_for_numpy_is_shortened():
    """Seeds of 63 bits that end alike in 32 bits are one to NumPy."""
    assert drawn(2**62 + 5)[2] == drawn(5)[2]
