"""The generators' states around a test."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture
def callers_state() -> Iterator[None]:
    """Every test begins with a public seed, and leaves the generators as they were."""
    by_python, by_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        yield
    random.setstate(by_python)
    np.random.set_state(by_numpy)
