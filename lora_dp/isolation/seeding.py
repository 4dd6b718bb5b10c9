"""Random numbers that follow a seed for a while: torch's, NumPy's and Python's."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def torch_states() -> tuple[bytes, ...]:
    """Of torch's default generators: equal before and after what drew nothing by them."""
    return tuple(generator.get_state().numpy().tobytes() for generator in _generators())


def other_states() -> tuple[object, ...]:
    """The same of NumPy's and Python's."""
    kind, words, place, *_ = np.random.get_state()
    return random.getstate(), kind, np.asarray(words).tobytes(), place


def _generators() -> list[torch.Generator]:
    # CUDA's once CUDA is in use: a process that may still fork must not start it.
    return [torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else ())]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All default generators begin with this seed inside, and are afterwards as they were before."""
    by_python, by_numpy, generators = random.getstate(), np.random.get_state(), _generators()
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(by_python)
        np.random.set_state(by_numpy)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
