"""Where random values come from: a cryptographic source (the default) and a seeded one for research.

Sampling and noise protect privacy only while nobody can predict them, so the default draws its bits from
ChaCha20 under a key of the operating system. A seeded source repeats a run, and whoever learns the seed can
subtract the noise. Both make their values from 64-bit words in the same way: only the bits differ.
"""

from __future__ import annotations

import itertools
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor

from lora_dp.ops.chacha20 import KEY_BYTES, NONCE_BYTES, chacha20_bits

_MANTISSA_MASK = 2**53 - 1
_MANTISSA_STEP = 2.0**-53


class RandomSource(ABC):
    """A stream of independent random values; every call continues the stream.

    Attributes:
        secure: whether the values are cryptographically unpredictable, as a private release demands.
    """

    secure: ClassVar[bool]

    @abstractmethod
    def uniform_bits(self, n: int) -> Tensor:
        """`n` integers of 64 uniform bits each: int64, shape (n,), on the CPU.

        Raises:
            ValueError: n is negative.
        """

    def uniform(self, n: int) -> Tensor:
        """`n` values uniform on the multiples of 2**-53 in [0, 1): float64, shape (n,), on the CPU.

        Raises:
            ValueError: n is negative.
        """
        return self.uniform_bits(n).bitwise_and_(_MANTISSA_MASK).double().mul_(_MANTISSA_STEP)

    def normal(self, n: int) -> Tensor:
        """`n` independent standard normals: float64, shape (n,), on the CPU.

        Box and Muller (1958): r = sqrt(-2 ln u1), the values r cos(2 pi u2) and r sin(2 pi u2), with u1 in
        (0, 1] and u2 in [0, 1) of 53 bits each. The smallest u1 is 2**-53, so no value lies further out than
        sqrt(106 ln 2) = 8.57 standard deviations; a true normal does with probability 1.0e-17.

        Raises:
            ValueError: n is negative.
        """
        if n < 0:
            raise ValueError(f"n must not be negative, got {n}")
        pairs = (n + 1) // 2
        u1, u2 = self.uniform(2 * pairs).view(2, pairs)
        # 1 - u1 lies in (0, 1], exactly: both are multiples of 2**-53.
        radius = u1.neg_().add_(1.0).log_().mul_(-2.0).sqrt_()
        angle = u2.mul_(2.0 * math.pi)
        values = torch.empty(2, pairs, dtype=torch.float64, device="cpu")
        torch.mul(torch.cos(angle), radius, out=values[0])
        torch.mul(angle.sin_(), radius, out=values[1])
        return values.view(-1)[:n]


class _Stream(NamedTuple):
    """A key, the nonces not yet used under it, and the process that may use it."""

    process: tuple[int, int]
    key: bytes
    nonces: Iterator[int]


_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


# Beside the process id, which a grandchild may get again once its grandparent is gone.
os.register_at_fork(after_in_child=_count_fork)


class SecureSource(RandomSource):
    """Cryptographic random values: ChaCha20 (RFC 8439) under a 256-bit key of the operating system.

    Every draw takes a nonce of its own, so no two values share a block of the keystream. A forked process
    draws a new key before its first value. The key lives in memory only: a source is never printed, copied,
    pickled or saved, and a resumed run starts a new one.
    """

    secure = True

    def __init__(self) -> None:
        self._stream = self._new_stream()

    @staticmethod
    def _new_stream() -> _Stream:
        return _Stream((os.getpid(), _forks), os.urandom(KEY_BYTES), itertools.count())

    def uniform_bits(self, n: int) -> Tensor:
        # Read once: another thread may replace the stream, and `next` on a count is atomic.
        stream = self._stream
        if stream.process != (os.getpid(), _forks):
            stream = self._stream = self._new_stream()
        return chacha20_bits(stream.key, next(stream.nonces).to_bytes(NONCE_BYTES, "little"), n)

    def __repr__(self) -> str:
        return "SecureSource(key hidden)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a SecureSource cannot be pickled or copied, because its key must neither leave this process "
            "nor be used twice; create a new SecureSource() instead"
        )


class SeededSource(RandomSource):
    """Repeatable random values from torch's Mersenne Twister, for research: not for a private release.

    Args:
        seed: any integer that torch.Generator.manual_seed takes.
    """

    secure = False

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._counted_steps = 0

    def uniform_bits(self, n: int) -> Tensor:
        if n < 0:
            raise ValueError(f"n must not be negative, got {n}")
        bits = torch.empty(n, dtype=torch.int64, device="cpu")
        return bits.random_(-(2**63), None, generator=self._generator)

    def next_counter(self) -> tuple[int, int]:
        """Seed, as a signed 64-bit number, and step for a counter-based generator: no two calls give the same step."""
        step = self._counted_steps
        self._counted_steps += 1
        return (self.seed + 2**63) % 2**64 - 2**63, step

    def state_dict(self) -> dict[str, Tensor]:
        """The place in the stream, as a uint8 tensor under "generator"; the values that follow it repeat."""
        return {"generator": self._generator.get_state(), "counted_steps": torch.tensor(self._counted_steps)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continues the stream where `state_dict` was taken."""
        self._generator.set_state(state["generator"])
        self._counted_steps = int(state["counted_steps"])

    def __repr__(self) -> str:
        return f"SeededSource({self.seed})"
