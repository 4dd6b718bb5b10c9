"""Where random values come from: a cryptographic source (the default) and a seeded one for research.

Both draw their bits from ChaCha20 (RFC 8439) under a 256-bit key, and differ in the key alone: the operating system's,
or one made of a seed. Sampling and noise protect privacy only while nobody can predict them: whoever learns the seed
can subtract the noise.

Every call takes the source's next draw number. That number, what the bits are for, and the parameter that they belong
to are the nonce of their stream (``csrc/stream.h``), and blocks are counted within it: no two values of a source ever
share a block of bits. Nor do sources share keys: each secure one has its own, also after a fork and in a resumed run; a
seeded one continues its draw numbers when it resumes.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor

from lora_dp.ops.native import native
from lora_dp.ops.rounded_gaussian import rounded_gaussian_
from lora_dp.ops.sampling_bits import sampling_bits_

_MANTISSA_MASK = 2**53 - 1
_MANTISSA_STEP = 2.0**-53


class Draw(NamedTuple):
    """Names the bits of one call: the number of a key of the native library, and the number of the draw."""

    key: int
    number: int


class RandomSource(ABC):
    """A stream of independent random values; every call continues the stream.

    Attributes:
        secure: whether the values are cryptographically unpredictable, as a private release demands.
    """

    secure: ClassVar[bool]

    @abstractmethod
    def next_draw(self) -> Draw:
        """Bits that nothing has used: the caller uses them for one purpose, once."""

    def uniform_bits(self, n: int) -> Tensor:
        """`n` integers of 64 uniform bits each: int64, shape (n,), on the CPU.

        Raises:
            ValueError: n is negative.
        """
        if n < 0:
            raise ValueError(f"n must not be negative, got {n}")
        draw = self.next_draw()
        return sampling_bits_(torch.empty(n, dtype=torch.int64, device="cpu"), draw.key, draw.number)

    def uniform(self, n: int) -> Tensor:
        """`n` values uniform on the multiples of 2**-53 in [0, 1): float64, shape (n,), on the CPU.

        Raises:
            ValueError: n is negative.
        """
        return self.uniform_bits(n).bitwise_and_(_MANTISSA_MASK).double().mul_(_MANTISSA_STEP)

    def rounded_gaussians(self, shapes: Sequence[Sequence[int]], scale: float, device: torch.device) -> list[Tensor]:
        """Independent rounded Gaussians of deviation `scale`, one int64 tensor of each shape, in one draw.

        Raises:
            ValueError: scale outside [1, 2³³).
        """
        draw = self.next_draw()
        return [
            rounded_gaussian_(
                torch.empty(torch.Size(shape), dtype=torch.int64, device=device), draw.key, p, draw.number, scale
            )
            for p, shape in enumerate(shapes)
        ]


class _Stream(NamedTuple):
    """A key, the draws not yet taken under it, and the process that may use it."""

    process: tuple[int, int]
    key: int
    numbers: Iterator[int]


_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


# Beside the process id, which a grandchild may get again once its grandparent is gone.
os.register_at_fork(after_in_child=_count_fork)


class SecureSource(RandomSource):
    """Cryptographic random values: ChaCha20 (RFC 8439) under a 256-bit key of the operating system.

    A forked process draws a new key before its first value. The key lives in locked memory of the native library alone,
    left out of core dumps; Python never sees it. A source is never copied, pickled or saved, and a resumed run
    starts a new one.
    """

    secure = True

    def __init__(self) -> None:
        self._stream = self._new_stream()

    def _new_stream(self) -> _Stream:
        key = native.new_key()
        weakref.finalize(self, native.drop_key, key)
        return _Stream((os.getpid(), _forks), key, itertools.count())

    def next_draw(self) -> Draw:
        # Read once: another thread may replace the stream, and `next` on a count is atomic.
        stream = self._stream
        if stream.process != (os.getpid(), _forks):
            stream = self._stream = self._new_stream()
        return Draw(stream.key, next(stream.numbers))

    def __repr__(self) -> str:
        return "SecureSource(key hidden)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a SecureSource cannot be pickled or copied, because its key must neither leave this process "
            "nor be used twice; create a new SecureSource() instead"
        )


class SeededSource(RandomSource):
    """Repeatable random values under a key made of a seed, for research: not for a private release.

    Args:
        seed: any integer; processes and clients that run side by side need seeds of their own.
    """

    secure = False

    def __init__(self, seed: int) -> None:
        self.seed = int(seed)
        self._next = 0
        self._key: tuple[tuple[int, int], int] = ((-1, -1), -1)

    def next_draw(self) -> Draw:
        process = (os.getpid(), _forks)
        if self._key[0] != process:  # a forked process holds no keys
            key = native.key_from(hashlib.sha256(f"lora-dp seed {self.seed}".encode()).digest())
            weakref.finalize(self, native.drop_key, key)
            self._key = (process, key)
        number = self._next
        self._next += 1
        return Draw(self._key[1], number)

    def next_counter(self) -> tuple[int, int]:
        """Seed, as a signed 64-bit number, and step for a counter-based generator: no two calls give the same step."""
        number = self._next
        self._next += 1
        return (self.seed + 2**63) % 2**64 - 2**63, number

    def state_dict(self) -> dict[str, int]:
        """The place in the stream, under "draws", and which stream it is; the values that follow it repeat."""
        return {"draws": self._next, "seed": self.seed % 2**62}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the stream where `state_dict` was taken; an earlier version gave tensors of one whole number.

        Raises:
            ValueError: a state of another kind, or of another seed.
        """
        held = {name: _whole_number(value) for name, value in state.items()} if isinstance(state, dict) else {}
        if set(held) != {"draws", "seed"} or any(number is None or number < 0 for number in held.values()):
            raise ValueError("Not the state of a seeded source: it must hold the integers 'draws' and 'seed'.")
        if held["seed"] != self.seed % 2**62:
            raise ValueError("The saved source had another seed: make this one with the same.")
        assert held["draws"] is not None
        self._next = held["draws"]

    def __repr__(self) -> str:
        return f"SeededSource({self.seed})"

    def __reduce__(self) -> tuple[object, ...]:
        return _continued, (self.seed, self._next)


def _whole_number(value: Any) -> int | None:
    if isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() == 0:
        value = value.item()
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _continued(seed: int, draws: int) -> SeededSource:
    source = SeededSource(seed)
    source._next = draws
    return source
