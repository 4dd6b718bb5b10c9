"""Sampling and mask bits: keystreams of their own draws, and what the op refuses."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_dp import _native
from lora_dp.ops.sampling_bits import sampling_bits_
from tests.ops.plain_chacha20 import KEY, reference_keystream, refuses, written


def sampling_nonce(draw: int) -> bytes:
    """Words 13 to 15 as csrc/stream.h lays them out: purpose 0 above parameter 0, and the draw, low word first."""
    purpose, parameter = 0, 0
    return b"".join(word.to_bytes(4, "little") for word in (purpose << 24 | parameter, draw % 2**32, draw >> 32))


@pytest.mark.parametrize("draw", [0, 1, 255, 2**31, 2**32 - 1, 2**32, 0x0123456789ABCDEF, 2**63 - 1])
def test_sampling_bits_are_the_keystream_of_their_draw(draw: int, key: int) -> None:
    for n_bytes in (0, 1, 8, 63, 64, 65, 1000, 4097):
        actual = written(n_bytes, 3, lambda out, n=n_bytes: _native.sampling_bits(key, draw, out, n))
        assert actual == reference_keystream(KEY, sampling_nonce(draw), 0, n_bytes)


@settings(max_examples=40, deadline=None)
@given(
    secret=st.binary(min_size=32, max_size=32).filter(any), draw=st.integers(0, 2**63 - 1), n_bytes=st.integers(0, 700)
)
def test_sampling_bits_under_any_key(secret: bytes, draw: int, n_bytes: int) -> None:
    key = _native.key_from(secret)
    actual = written(n_bytes, 0, lambda out: _native.sampling_bits(key, draw, out, n_bytes))
    _native.drop_key(key)
    assert actual == reference_keystream(secret, sampling_nonce(draw), 0, n_bytes)


@settings(max_examples=40, deadline=None)
@given(parameter=st.integers(0, 2**24 - 1), draw=st.integers(0, 2**63 - 1), n_bytes=st.integers(0, 700))
def test_mask_bits_are_a_keystream_of_their_own(parameter: int, draw: int, n_bytes: int) -> None:
    key, purpose = _native.key_from(KEY), 3
    nonce = b"".join(word.to_bytes(4, "little") for word in (purpose << 24 | parameter, draw % 2**32, draw >> 32))
    actual = written(n_bytes, 0, lambda out: _native.mask_bits(key, parameter, draw, out, n_bytes))
    assert actual == reference_keystream(KEY, nonce, 0, n_bytes)
    refuses(f"parameter must lie in [0, 2**24), got {2**24}", lambda: _native.mask_bits(key, 2**24, draw, 0, 0))
    _native.drop_key(key)


def test_bad_sampling_draws_are_refused(key: int) -> None:
    buffer = np.zeros(64, np.uint8)
    out = buffer.ctypes.data
    gone = _native.key_from(KEY)
    _native.drop_key(gone)
    for arguments, message in (
        ((gone, 0, out, 8), f"there is no key {gone}"),
        ((-1, 0, out, 8), "there is no key -1"),
        ((key, -1, out, 8), "draw must not be negative, got -1"),
        ((key, 0, out, -8), "n_bytes must not be negative, got -8"),
        ((key, 0, 0, 8), "out is null: pass the address of its data"),
        (
            (key, 0, out, 2**38 + 1),
            "the block counter would pass 2**32: 274877906945 bytes from block 0; draw less, or use another nonce",
        ),
    ):
        refuses(message, lambda given=arguments: _native.sampling_bits(*given))
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _native.sampling_bits(key, 2**63, out, 8)
    assert not buffer.any()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (9,), (3, 5)])
def test_the_op_fills_a_tensor_with_sampling_bits(shape: tuple[int, ...], key: int) -> None:
    expected = reference_keystream(KEY, sampling_nonce(2**40), 0, 8 * math.prod(shape))
    out = torch.zeros(shape, dtype=torch.int64)
    assert sampling_bits_(out, key, 2**40) is out
    assert out.numpy().tobytes() == expected
    with torch.device("meta"):
        assert sampling_bits_(torch.zeros_like(out, device="cpu"), key, 2**40).equal(out)
    meta = torch.zeros(shape, dtype=torch.int64, device="meta")
    assert sampling_bits_(meta, -1, 2**40) is meta  # -1 is no key: the native library is not asked


@pytest.mark.parametrize(
    "out",
    [
        torch.zeros(4),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(4, dtype=torch.uint64),
        torch.zeros(4, 3, dtype=torch.int64).T,
        torch.zeros(8, dtype=torch.int64)[::2],
    ],
)
def test_the_op_refuses_other_dtypes_and_layouts(out: torch.Tensor, key: int) -> None:
    refuses(
        f"sampling_bits_: out must be contiguous and int64, got {out.dtype} {out.stride()}.",
        lambda: sampling_bits_(out, key, 0),
    )
    assert not out.any()


@pytest.mark.slow
def test_the_op_is_one_that_torch_knows(key: int) -> None:
    torch.library.opcheck(torch.ops.lora_dp.sampling_bits_.default, (torch.zeros(3, 4, dtype=torch.int64), key, 0))
    gone = _native.key_from(KEY)
    _native.drop_key(gone)
    out = torch.zeros(4, dtype=torch.int64)
    refuses(f"there is no key {gone}", lambda: sampling_bits_(out, gone, 0))
    refuses("draw must not be negative, got -1", lambda: sampling_bits_(out, key, -1))
    assert not out.any()
