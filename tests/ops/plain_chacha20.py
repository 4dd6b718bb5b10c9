"""ChaCha20 of RFC 8439, word by word, and what the library writes."""

import re
from collections.abc import Callable

import numpy as np
import pytest

KEY = bytes(range(32))

ROUND = [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]
ROUND += [(0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]


def refuses(message: str, action: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        action()


def reference_block(key: bytes, nonce: bytes, counter: int) -> bytes:
    """RFC 8439, 2.3, word by word."""

    def add_xor_rotate(a: int, b: int, d: int, bits: int) -> tuple[int, int]:
        a = (a + b) & 0xFFFFFFFF
        d ^= a
        return a, (d << bits | d >> (32 - bits)) & 0xFFFFFFFF

    words = np.frombuffer(b"expand 32-byte k" + key + counter.to_bytes(4, "little") + nonce, "<u4").tolist()
    x = list(words)
    for _ in range(10):
        for a, b, c, d in ROUND:
            x[a], x[d] = add_xor_rotate(x[a], x[b], x[d], 16)
            x[c], x[b] = add_xor_rotate(x[c], x[d], x[b], 12)
            x[a], x[d] = add_xor_rotate(x[a], x[b], x[d], 8)
            x[c], x[b] = add_xor_rotate(x[c], x[d], x[b], 7)
    return b"".join(((u + v) & 0xFFFFFFFF).to_bytes(4, "little") for u, v in zip(x, words, strict=True))


def reference_keystream(key: bytes, nonce: bytes, counter: int, n_bytes: int) -> bytes:
    blocks = range(counter, counter + -(-n_bytes // 64))
    return b"".join(reference_block(key, nonce, block) for block in blocks)[:n_bytes]


def written(n_bytes: int, offset: int, write: Callable[[int], None]) -> bytes:
    """What `write` puts at `offset` bytes into a buffer, whose every other byte must stay as it was."""
    margin = 2048  # more than the widest kernels compute at once
    buffer = np.full(margin + offset + n_bytes + margin, 0xA5, np.uint8)
    start = margin + offset
    write(buffer.ctypes.data + start)
    untouched = np.concatenate([buffer[:start], buffer[start + n_bytes :]])
    assert (untouched == 0xA5).all(), "wrote outside its buffer"
    return buffer[start : start + n_bytes].tobytes()
