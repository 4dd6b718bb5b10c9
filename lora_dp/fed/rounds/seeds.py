"""Seeds of a reproducible run: one for each place in it, from streams that never coincide."""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What a seed is for. The numbers are part of what a seed means: a new purpose takes a new one."""

    CLIENT_DRAWS = 1
    TRAINING = 2
    NOISE = 3
    PERTURBATION = 4
    RANKS = 5
    BEGIN = 6
    SERVER_NOISE = 7
    SUMS = 8
    SUMS_NOISE = 9


def derived_seed(*path: int) -> int:
    """A seed of its own for each place in a run, 63 bits: its seed, a :class:`Stream`, and where in the run."""
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0] >> 1)
