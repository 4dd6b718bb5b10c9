"""ChaCha20 against the test vectors of RFC 8439 and against a plain implementation, on every instruction set."""

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_dp import _native
from tests.ops.plain_chacha20 import KEY, reference_block, reference_keystream, refuses, written

NONCE = bytes(range(100, 112))
LAST_BLOCK = 2**32 - 1

# From the widest on: the first that a machine runs is the one it chooses.
INSTRUCTIONS = ["avx512", "avx2", "portable"]


def missing(name: str) -> str | None:
    """Why this machine does not run the kernels called so."""
    try:
        _native.keystream(KEY, NONCE, 0, 0, 0, name)
    except ValueError as error:
        assert str(error) == f"this machine runs no kernels called '{name}'"
        return str(error)
    return None


@pytest.fixture(scope="module", params=INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest) -> str:
    why = missing(request.param)
    if why is not None:
        assert request.param != "portable"
        pytest.skip(why)
    return request.param


@pytest.fixture
def key() -> Iterator[int]:
    number = _native.key_from(KEY)
    yield number
    _native.drop_key(number)


def native_keystream(
    key: bytes, nonce: bytes, counter: int, n_bytes: int, instructions: str = "", offset: int = 0
) -> bytes:
    return written(n_bytes, offset, lambda out: _native.keystream(key, nonce, counter, out, n_bytes, instructions))


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
def test_block_vectors_of_the_rfc(name: str, instructions: str) -> None:
    key, nonce, counter, expected = BLOCKS[name]
    key, nonce = bytes.fromhex(key), bytes.fromhex(nonce)
    assert native_keystream(key, nonce, counter, 64, instructions).hex() == expected
    assert reference_block(key, nonce, counter).hex() == expected


def test_keystream_vector_of_the_rfc(instructions: str) -> None:
    nonce = bytes.fromhex(KEYSTREAM_NONCE)
    assert native_keystream(KEY, nonce, 1, 114, instructions).hex() == KEYSTREAM


@settings(max_examples=40, deadline=None)
@given(
    key=st.binary(min_size=32, max_size=32),
    nonce=st.binary(min_size=12, max_size=12),
    counter=st.one_of(st.integers(0, 40), st.integers(2**31 - 20, 2**31 + 20), st.integers(2**32 - 80, 2**32 - 48)),
    n_bytes=st.integers(0, 3000),
    offset=st.integers(0, 70),
)
def test_keystream_equals_the_reference(
    instructions: str, key: bytes, nonce: bytes, counter: int, n_bytes: int, offset: int
) -> None:
    actual = native_keystream(key, nonce, counter, n_bytes, instructions, offset)
    assert actual == reference_keystream(key, nonce, counter, n_bytes)


def test_every_length_up_to_a_few_vectors_of_blocks(instructions: str) -> None:
    """The widest kernels write 16 blocks at once, and what is left by itself."""
    whole = reference_keystream(KEY, NONCE, 7, 64 * 35)
    for blocks in range(35):
        for n_bytes in (64 * blocks, 64 * blocks + 1, 64 * blocks + 63):
            assert native_keystream(KEY, NONCE, 7, n_bytes, instructions) == whole[:n_bytes]


def test_a_longer_stream_continues_a_shorter_one(instructions: str) -> None:
    whole = native_keystream(KEY, NONCE, 0, 32768, instructions)
    assert native_keystream(KEY, NONCE, 0, 8001, instructions) == whole[:8001]
    assert native_keystream(KEY, NONCE, 100, 26368, instructions) == whole[6400:]


def test_the_widest_kernels_are_chosen() -> None:
    assert _native.instructions() == next(name for name in INSTRUCTIONS if missing(name) is None)
    assert missing("portable") is None
    for name in ("", _native.instructions()):
        assert native_keystream(KEY, NONCE, 5, 999, name) == reference_keystream(KEY, NONCE, 5, 999)
    for name in ("sse2", "Portable", " avx2", "avx512f"):
        assert missing(name) is not None


def test_last_block_is_reachable_and_nothing_beyond_it(instructions: str) -> None:
    assert native_keystream(KEY, NONCE, LAST_BLOCK, 64, instructions) == reference_block(KEY, NONCE, LAST_BLOCK)
    # Lanes beyond the last block are computed with it, and dropped.
    for blocks in (2, 3, 5, 9, 17, 33):
        counter = 2**32 - blocks
        expected = reference_keystream(KEY, NONCE, counter, 64 * blocks)
        assert native_keystream(KEY, NONCE, counter, 64 * blocks, instructions) == expected
    buffer = np.zeros(2048, np.uint8)
    for counter, n_bytes in ((LAST_BLOCK, 65), (0, 2**38 + 1), (1, 2**38), (1, 2**63 - 1), (2**32 - 16, 64 * 16 + 1)):
        refuses(
            f"the block counter would pass 2**32: {n_bytes} bytes from block {counter}; "
            "draw less, or use another nonce",
            lambda c=counter, n=n_bytes: _native.keystream(KEY, NONCE, c, buffer.ctypes.data, n, instructions),
        )
    assert not buffer.any()


@pytest.mark.parametrize(
    ("key", "nonce", "counter", "n_bytes", "message"),
    [
        (KEY[:31], NONCE, 0, 8, "key must be 32 bytes long, got 31"),
        (KEY + b"x", NONCE, 0, 8, "key must be 32 bytes long, got 33"),
        (KEY, NONCE[:8], 0, 8, "nonce must be 12 bytes long, got 8"),
        (KEY, b"", 0, 8, "nonce must be 12 bytes long, got 0"),
        (KEY, NONCE, -1, 8, "counter must lie in [0, 2**32), got -1"),
        (KEY, NONCE, 2**32, 8, "counter must lie in [0, 2**32), got 4294967296"),
        (KEY, NONCE, 2**32, 0, "counter must lie in [0, 2**32), got 4294967296"),
        (KEY, NONCE, 0, -1, "n_bytes must not be negative, got -1"),
        (KEY, NONCE, 0, -(2**63), "n_bytes must not be negative, got -9223372036854775808"),
    ],
)
def test_bad_values_are_refused(key: bytes, nonce: bytes, counter: int, n_bytes: int, message: str) -> None:
    buffer = np.zeros(64, np.uint8)
    refuses(message, lambda: _native.keystream(key, nonce, counter, buffer.ctypes.data, n_bytes))
    assert not buffer.any()


def test_null_address_and_wrong_types_are_refused(instructions: str) -> None:
    refuses("out is null: pass the address of its data", lambda: _native.keystream(KEY, NONCE, 0, 0, 8, instructions))
    _native.keystream(KEY, NONCE, 0, 0, 0, instructions)  # an empty tensor has no address
    for arguments in (
        ("k" * 32, NONCE, 0, 0, 8),
        (KEY, NONCE, 0.0, 0, 8),
        (KEY, NONCE, 2**63, 0, 8),
        (bytearray(KEY), NONCE, 0, 0, 8),
        (KEY, NONCE, 0, -1, 8),
        (KEY, NONCE, 0, 0, 8, None),
    ):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            _native.keystream(*arguments)


def check_other_threads_run(call: Callable[[], None]) -> None:
    """While one thread is in `call`, a native call of a tenth of a second or more, this one goes on."""
    finished = threading.Event()
    worker = threading.Thread(target=lambda: (call(), finished.set()))
    longest_pause, previous = 0.0, time.perf_counter()
    started = previous
    worker.start()
    while not finished.is_set():
        now = time.perf_counter()
        longest_pause, previous = max(longest_pause, now - previous), now
    worker.join()
    # With the interpreter lock held, the one native call would be one pause as long as the whole run.
    assert longest_pause < 0.8 * (time.perf_counter() - started)


def test_other_threads_run_meanwhile(key: int) -> None:
    buffer = np.empty(2**26, np.uint8)
    out, n_bytes = buffer.ctypes.data, buffer.size
    check_other_threads_run(lambda: _native.keystream(KEY, NONCE, 0, out, n_bytes, "portable"))
    check_other_threads_run(lambda: _native.sampling_bits(key, 0, out, n_bytes))
    check_other_threads_run(lambda: _native.rounded_gaussians(key, 0, 0, 3.0, out, n_bytes // 8))


def test_a_call_that_holds_the_interpreter_is_noticed() -> None:
    # One call in C that never lets go of the lock.
    with pytest.raises(AssertionError):
        check_other_threads_run(lambda: sum(range(10**7)))
