"""ChaCha20 against the test vectors of RFC 8439 and against a plain implementation."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_dp import _native
from lora_dp.ops.chacha20 import chacha20_bits

KEY = bytes(range(32))
NONCE = bytes(range(100, 112))
ROUND = [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]
ROUND += [(0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]


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


def native_keystream(key: bytes, nonce: bytes, counter: int, n_bytes: int, offset: int = 0) -> bytes:
    """The native keystream at `offset` bytes into a buffer, whose every other byte must stay as it was."""
    margin = 128
    buffer = np.full(margin + n_bytes + margin, 0xA5, np.uint8)
    start = margin + offset
    _native.chacha20_keystream(key, nonce, counter, buffer.ctypes.data + start, n_bytes)
    untouched = np.concatenate([buffer[:start], buffer[start + n_bytes :]])
    assert (untouched == 0xA5).all(), "wrote outside its buffer"
    return buffer[start : start + n_bytes].tobytes()


# RFC 8439, 2.3.2 and appendix A.1, test vectors 1 to 5: key, nonce, block counter, block.
ZEROS = "00" * 32
BLOCKS = {
    "2.3.2": (
        KEY.hex(), "000000090000004a00000000", 1,
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    "A.1 #1": (
        ZEROS, "00" * 12, 0,
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    "A.1 #2": (
        ZEROS, "00" * 12, 1,
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    "A.1 #3": (
        "00" * 31 + "01", "00" * 12, 1,
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    "A.1 #4": (
        "00ff" + "00" * 30, "00" * 12, 2,
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
    "A.1 #5": (
        ZEROS, "00" * 11 + "02", 0,
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
    ),
}  # fmt: skip

# RFC 8439, 2.4.2: the keystream from block 1 on.
KEYSTREAM_NONCE = "000000000000004a00000000"
KEYSTREAM = (
    "224f51f3401bd9e12fde276fb8631ded8c131f823d2c06e27e4fcaec9ef3cf788a3b0aa372600a92b57974cded2b9334"
    "794cba40c63e34cdea212c4cf07d41b769a6749f3f630f4122cafe28ec4dc47e26d4346d70b98c73f3e9c53ac40c5945"
    "398b6eda1a832c89c167eacd901d7e2bf363"
)


@pytest.mark.parametrize("name", BLOCKS)
def test_block_vectors_of_the_rfc(name: str) -> None:
    key, nonce, counter, expected = BLOCKS[name]
    key, nonce = bytes.fromhex(key), bytes.fromhex(nonce)
    assert native_keystream(key, nonce, counter, 64).hex() == expected
    assert reference_block(key, nonce, counter).hex() == expected


def test_keystream_vector_of_the_rfc() -> None:
    key, nonce = KEY, bytes.fromhex(KEYSTREAM_NONCE)
    assert native_keystream(key, nonce, 1, 114).hex() == KEYSTREAM


@settings(max_examples=60, deadline=None)
@given(
    key=st.binary(min_size=32, max_size=32),
    nonce=st.binary(min_size=12, max_size=12),
    counter=st.one_of(st.integers(0, 40), st.integers(2**31 - 20, 2**31 + 20), st.just(2**32 - 64)),
    n_bytes=st.integers(0, 3000),
    offset=st.integers(0, 70),
)
def test_keystream_equals_the_reference(
    key: bytes, nonce: bytes, counter: int, n_bytes: int, offset: int
) -> None:
    actual = native_keystream(key, nonce, counter, n_bytes, offset)
    assert actual == reference_keystream(key, nonce, counter, n_bytes)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 129, 1000])
def test_bits_are_the_keystream_in_memory_order(n: int) -> None:
    bits = chacha20_bits(KEY, NONCE, n, counter=3)
    assert bits.dtype == torch.int64 and bits.shape == (n,) and bits.device.type == "cpu"
    assert bits.numpy().tobytes() == reference_keystream(KEY, NONCE, 3, 8 * n)


def test_a_longer_stream_continues_a_shorter_one() -> None:
    whole = chacha20_bits(KEY, NONCE, 4096)
    assert torch.equal(whole[:1000], chacha20_bits(KEY, NONCE, 1000))
    assert torch.equal(whole[800:], chacha20_bits(KEY, NONCE, 3296, counter=100))


def test_default_device_of_torch_does_not_matter() -> None:
    expected = chacha20_bits(KEY, NONCE, 5)
    with torch.device("meta"):
        assert torch.equal(chacha20_bits(KEY, NONCE, 5), expected)


def test_last_block_is_reachable_and_nothing_beyond_it() -> None:
    last = 2**32 - 1
    assert native_keystream(KEY, NONCE, last, 64) == reference_block(KEY, NONCE, last)
    with pytest.raises(ValueError, match=r"block counter would pass 2\*\*32"):
        native_keystream(KEY, NONCE, last, 65)
    with pytest.raises(ValueError, match=r"block counter would pass 2\*\*32"):
        _native.chacha20_keystream(KEY, NONCE, 0, 64, 2**38 + 1)
    with pytest.raises(ValueError, match=r"block counter would pass 2\*\*32"):
        _native.chacha20_keystream(KEY, NONCE, 1, 64, 2**63 - 1)


@pytest.mark.parametrize(
    ("key", "nonce", "counter", "n_bytes", "message"),
    [
        (KEY[:31], NONCE, 0, 8, "key must be 32 bytes long, got 31"),
        (KEY + b"x", NONCE, 0, 8, "key must be 32 bytes long, got 33"),
        (KEY, NONCE[:8], 0, 8, "nonce must be 12 bytes long, got 8"),
        (KEY, b"", 0, 8, "nonce must be 12 bytes long, got 0"),
        (KEY, NONCE, -1, 8, r"counter must lie in \[0, 2\*\*32\), got -1"),
        (KEY, NONCE, 2**32, 8, r"counter must lie in \[0, 2\*\*32\)"),
        (KEY, NONCE, 0, -1, "n_bytes must not be negative, got -1"),
    ],
)
def test_bad_values_are_refused(key: bytes, nonce: bytes, counter: int, n_bytes: int, message: str) -> None:
    buffer = np.zeros(64, np.uint8)
    with pytest.raises(ValueError, match=message):
        _native.chacha20_keystream(key, nonce, counter, buffer.ctypes.data, n_bytes)
    assert not buffer.any()


def test_null_address_and_wrong_types_are_refused() -> None:
    with pytest.raises(ValueError, match="out_ptr is null"):
        _native.chacha20_keystream(KEY, NONCE, 0, 0, 8)
    _native.chacha20_keystream(KEY, NONCE, 0, 0, 0)  # an empty tensor has no address
    with pytest.raises(TypeError):
        chacha20_bits("k" * 32, NONCE, 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n must not be negative, got -3"):
        chacha20_bits(KEY, NONCE, -3)


def test_other_threads_run_meanwhile() -> None:
    finished = threading.Event()
    worker = threading.Thread(target=lambda: (chacha20_bits(KEY, NONCE, 2**25), finished.set()))
    longest_pause, previous = 0.0, time.perf_counter()
    started = previous
    worker.start()
    while not finished.is_set():
        now = time.perf_counter()
        longest_pause, previous = max(longest_pause, now - previous), now
    worker.join()
    # With the interpreter lock held, the one native call would be one pause as long as the whole run.
    assert longest_pause < 0.8 * (time.perf_counter() - started)
