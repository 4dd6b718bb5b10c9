"""Draws from random sources and keys, and what a forked process makes of them."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lora_dp.ops.native import native
from lora_dp.privacy.randomness import RandomSource

CPU = torch.device("cpu")
WIDE = 2.0**32 * 1.7

forks = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
locks = pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer turns mlock into nothing"
)


def gaussians(source: RandomSource, n: int, scale: float = WIDE) -> torch.Tensor:
    return source.rounded_gaussians([(n,)], scale, CPU)[0]


def draw_from(key: int) -> list[int]:
    out = np.zeros(8, np.int64)
    native.sampling_bits(key, 0, out.ctypes.data, 64)
    return out.tolist()


def gaussians_of(key: int) -> list[int]:
    out = np.zeros(8, np.int64)
    native.rounded_gaussians(key, 0, 0, 3.0, out.ctypes.data, 8)
    return out.tolist()


def in_child(action: Callable[[], Any]) -> Any:
    """What ``action`` returns, or the exception that it raises, in a forked process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            result = action()
        except BaseException as error:
            result = error
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(result, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        content = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return pickle.loads(content)
