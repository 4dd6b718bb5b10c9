"""ChaCha20 (RFC 8439) as a source of cryptographic random bits, computed by the native library."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from lora_dp import _native
except ImportError as error:
    raise ImportError(
        "the native library of lora_dp is not built: run `pip install -e .` in the repository"
    ) from error

KEY_BYTES = 32
NONCE_BYTES = 12


def chacha20_bits(key: bytes, nonce: bytes, n: int, counter: int = 0) -> Tensor:
    """The first `8 * n` keystream bytes from block `counter` on, as `n` 64-bit integers.

    The bytes lie in memory in the order of RFC 8439, 2.4, on every machine. A (key, nonce, block counter)
    used twice gives the same bits twice: the caller keeps them apart.

    Args:
        key: 32 bytes.
        nonce: 12 bytes.
        n: number of values, at least 0.
        counter: index of the first 64-byte block, in [0, 2**32).

    Returns:
        int64 tensor of shape (n,) on the CPU.

    Raises:
        ValueError: wrong length of key or nonce, negative `n`, or blocks past 2**32 (256 GiB a nonce).
        TypeError: an argument of another type.
    """
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    out = torch.empty(n, dtype=torch.int64, device="cpu")
    _native.chacha20_keystream(key, nonce, counter, out.data_ptr(), 8 * n)
    return out
