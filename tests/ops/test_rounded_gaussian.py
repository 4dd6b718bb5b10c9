"""The op: which bits each value is made of, and what is refused."""

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_dp import _native
from lora_dp.ops.registry import reference_only
from lora_dp.ops.rounded_gaussian import rounded_gaussian_
from tests.gaussian_oracle import BELOW_MOST, KEY, ONES, SCALES, nearest, pair_of, scaled_by, true_pair
from tests.models import assert_refuses


def native_values(key: int, parameter: int, draw: int, scale: float, n: int, instructions: str = "") -> list[int]:
    """What the native library writes, which must be ``n`` values and nothing beside them."""
    margin = 512  # more than the kernels compute at once
    buffer = np.full(n + 2 * margin, 77, np.int64)
    _native.rounded_gaussians(key, parameter, draw, scale, buffer[margin:].ctypes.data, n, instructions)
    assert (buffer[:margin] == 77).all() and (buffer[margin + n :] == 77).all(), "wrote outside its buffer"
    return buffer[margin : margin + n].tolist()


def stream(purpose: int, parameter: int, draw: int, blocks: int) -> list[int]:
    """Quadwords of the stream that csrc/stream.h lays out: purpose and parameter in word 13, the draw in 14 and 15."""
    out = np.empty(8 * blocks, "<u8")
    nonce = (purpose << 24 | parameter).to_bytes(4, "little") + draw.to_bytes(8, "little")
    _native.keystream(KEY, nonce, 0, out.ctypes.data, 64 * blocks, "portable")
    return out.tolist()


def bits_of(parameter: int, draw: int, blocks: int) -> list[tuple[int, int]]:
    """u and v of all pairs as csrc/gaussian_blocks.h lays them out: leading words from stream 1, the others from 2."""
    leading, rest = (stream(purpose, parameter, draw, blocks) for purpose in (1, 2))
    both = [high << 64 | low for high, low in zip(leading, rest, strict=True)]
    return list(zip(both[::2], both[1::2], strict=True))


def assembled(parameter: int, draw: int, scale: float, n: int) -> list[int]:
    return [value for u, v in bits_of(parameter, draw, -(-n // 8)) for value in pair_of(u, v, scale)[1]][:n]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 9, 255, 256, 257, 300, 511, 1000])
def test_values_are_those_of_their_bits(n, scale, key, instructions):
    for parameter, draw in ((0, 0), (1, 0), (2**24 - 1, 0x0123456789ABCDEF)):
        expected = assembled(parameter, draw, scale, n)
        assert native_values(key, parameter, draw, scale, n, instructions) == expected
        out = torch.full((n,), 77)
        assert rounded_gaussian_(out, key, parameter, draw, scale) is out
        assert out.tolist() == expected


def test_values_are_box_and_muller_of_their_bits(key):
    """Nothing between the keystream and the values but the oracle."""
    expected = [nearest(scaled_by(BELOW_MOST, z)) for u, v in bits_of(3, 7, 50) for z in true_pair(u, v)]
    assert native_values(key, 3, 7, BELOW_MOST, 400) == expected


def test_a_long_stream_is_that_of_its_bits(key, instructions):
    """Many blocks, some hundred undecided pairs among them, and an odd end."""
    n = 100_003
    assert native_values(key, 5, 2**32, BELOW_MOST, n, instructions) == assembled(5, 2**32, BELOW_MOST, n)


def test_how_many_are_asked_for_does_not_matter(key, instructions):
    for scale in (3.0, BELOW_MOST):
        whole = native_values(key, 0, 1, scale, 1000, instructions)
        for n in (*range(20), *range(250, 262), 511, 512, 513, 767, 768, 769, 999):
            assert native_values(key, 0, 1, scale, n, instructions) == whole[:n]


# Draws in whose first pair a value is so near to a half that double precision rounds it otherwise, one in 2e5.
HALVES = [593902, 656353, 720651, 1067342, 1374136, 1555526, 1599889, 1636995, 1721933, 1767195, 1787884, 2352844]


@pytest.mark.parametrize("n", [1, 2, 300])
def test_the_first_pair_is_resolved_too(n, key, instructions):
    for draw in HALVES:
        assert pair_of(*bits_of(0, draw, 1)[0], BELOW_MOST)[0] is None, "double precision decides this pair"
        assert native_values(key, 0, draw, BELOW_MOST, n, instructions) == assembled(0, draw, BELOW_MOST, n)


# Parameter, first draw and scale of a search for pairs (draw, element) that the leading 64 bits leave open, one in
# 1.7e8: their values show which other bits were taken.
SEARCHED = (0xABCDEF, 0x0123456789A00000, 2.0**33 - 2.0**-19)
OPEN = [
    (8605, 31988), (30330, 15036), (32414, 1048), (33007, 15638), (38723, 10798), (56764, 2200), (61142, 16752),
    (90202, 8920), (98234, 1626), (103422, 10602), (118050, 9316), (119442, 22874), (134124, 17260), (144069, 9216),
    (147195, 7740), (170780, 688), (175551, 9490), (180526, 4328), (199281, 29858), (212515, 12316), (218653, 21324),
    (218739, 12420), (248560, 21076), (258096, 5824), (260774, 30668), (277271, 21266), (283229, 9640), (289781, 13430),
    (291871, 24792), (295055, 330), (302582, 7194), (303514, 17288), (306109, 18622), (312463, 8660), (334009, 11724),
    (341948, 23736), (346685, 12346), (356238, 13934), (363942, 27884),
]  # fmt: skip


def test_unseen_bits_come_from_their_own_block(key, instructions):
    parameter, first, scale = SEARCHED
    outcomes = []
    for draw, element in OPEN:
        block, word = element // 8, element % 8
        leading, rest = (stream(purpose, parameter, first + draw, block + 1)[8 * block :] for purpose in (1, 2))
        u, v = leading[word], leading[word + 1]
        possible = {_native.gaussian_pair(u, u_low, v, v_low, scale)[1] for u_low in (0, ONES) for v_low in (0, ONES)}
        assert len(possible) > 1, "the leading bits decide this pair"
        z = true_pair(u << 64 | rest[word], v << 64 | rest[word + 1])
        expected = [nearest(scaled_by(scale, value)) for value in z]
        values = native_values(key, parameter, first + draw, scale, element + 2, instructions)
        outcomes.append(values[element:] == expected)
        # As the odd end, too.
        values = native_values(key, parameter, first + draw, scale, element + 1, instructions)
        outcomes.append(values[element:] == expected[:1])
    assert all(outcomes), f"{outcomes.count(False)} of {len(outcomes)} pairs took other bits"


def test_every_parameter_and_draw_has_values_of_its_own(key):
    other = _native.key_from(bytes(31) + b"\x01")
    streams = [
        native_values(which, parameter, draw, BELOW_MOST, 64)
        for which in (key, other)
        for parameter in (0, 1, 2, 255, 256, 65535, 65536, 2**24 - 1)
        for draw in (0, 1, 2, 2**24, 2**31, 2**32 - 1, 2**32, 2**56, 2**63 - 1)
    ]
    _native.drop_key(other)
    values = [value for stream in streams for value in stream]
    # Among 9216 values spread over 2**34, 0.003 repeat.
    assert len(set(values)) == len(values)


def test_deviation_is_the_scale(key):
    ones, small, large = (np.array(native_values(key, 0, 0, scale, 1000)) for scale in (1.0, 1000.0, 2.0**32))
    assert (np.abs(small - 1000 * (large / 2.0**32)) <= 0.5 + 1e-6).all()
    assert (np.abs(ones - large / 2.0**32) <= 0.5 + 1e-9).all()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5, 3), (2, 3, 4)])
def test_any_shape_is_filled_in_the_order_of_its_elements(shape, key):
    expected = native_values(key, 1, 2, 3.0, math.prod(shape))
    assert rounded_gaussian_(torch.empty(shape, dtype=torch.int64), key, 1, 2, 3.0).flatten().tolist() == expected
    with torch.device("meta"):
        out = torch.empty(shape, dtype=torch.int64, device="cpu")
        assert rounded_gaussian_(out, key, 1, 2, 3.0).flatten().tolist() == expected
    with reference_only():
        assert rounded_gaussian_(torch.empty(shape, dtype=torch.int64), key, 1, 2, 3.0).flatten().tolist() == expected


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (torch.zeros(4), "got torch.float32 (1,)."),
        (torch.zeros(4, dtype=torch.int32), "got torch.int32 (1,)."),
        (torch.zeros(4, dtype=torch.uint64), "got torch.uint64 (1,)."),
        (torch.zeros(4, 3, dtype=torch.int64).T, "got torch.int64 (1, 3)."),
        (torch.zeros(8, dtype=torch.int64)[::2], "got torch.int64 (2,)."),
        (torch.zeros(1, dtype=torch.int64).expand(4), "got torch.int64 (0,)."),
    ],
)
def test_other_dtypes_and_layouts_are_refused(out, words, key):
    assert_refuses(
        ValueError,
        f"rounded_gaussian_: out must be contiguous and int64, {words}",
        lambda: rounded_gaussian_(out, key, 0, 0, 3.0),
    )
    assert not out.any()


@pytest.mark.parametrize(
    ("parameter", "draw", "scale", "words"),
    [
        (-1, 0, 3.0, "parameter must lie in [0, 2**24), got -1"),
        (2**24, 0, 3.0, "parameter must lie in [0, 2**24), got 16777216"),
        (2**32, 0, 3.0, "parameter must lie in [0, 2**24), got 4294967296"),
        (0, -1, 3.0, "draw must not be negative, got -1"),
        (0, -(2**63), 3.0, "draw must not be negative, got -9223372036854775808"),
        (0, 0, 0.0, "scale must lie in [1, 2**33), got 0.000000"),
        (0, 0, 0.5, "scale must lie in [1, 2**33), got 0.500000"),
        (0, 0, -3.0, "scale must lie in [1, 2**33), got -3.000000"),
        (0, 0, 2.0**33, "scale must lie in [1, 2**33), got 8589934592.000000"),
        (0, 0, math.inf, "scale must lie in [1, 2**33), got inf"),
        (0, 0, math.nan, "scale must lie in [1, 2**33), got "),
    ],
)
def test_numbers_out_of_range_are_refused(parameter, draw, scale, words, key):
    for n in (0, 5):
        out = torch.zeros(n, dtype=torch.int64)
        assert_refuses(ValueError, words, lambda out=out: rounded_gaussian_(out, key, parameter, draw, scale))
        assert not out.any()


def test_unknown_keys_are_refused():
    gone = _native.key_from(KEY)
    _native.drop_key(gone)
    out = torch.zeros(5, dtype=torch.int64)
    for number in (gone, 0, -1, 2**62):
        assert_refuses(ValueError, f"there is no key {number}", lambda n=number: rounded_gaussian_(out, n, 0, 0, 3.0))
    assert not out.any()


def test_addresses_and_counts_are_checked(key):
    out = np.zeros(8, np.int64)
    draw = _native.rounded_gaussians
    assert_refuses(ValueError, "out is null: pass the address of its data", lambda: draw(key, 0, 0, 3.0, 0, 1))
    draw(key, 0, 0, 3.0, 0, 0)  # an empty tensor has no address
    for n in (-1, 2**35 + 1, 2**63 - 1):
        assert_refuses(
            ValueError, f"n must lie in [0, 2**35], got {n}", lambda n=n: draw(key, 0, 0, 3.0, out.ctypes.data, n)
        )
    assert_refuses(
        ValueError,
        "this machine runs no kernels called 'sse9'",
        lambda: draw(key, 0, 0, 3.0, out.ctypes.data, 8, "sse9"),
    )
    assert not out.any()


def test_the_op_is_one_that_torch_knows(key):
    op = torch.ops.lora_dp.rounded_gaussian_.default
    for out in (torch.zeros(5, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int64)):
        torch.library.opcheck(op, (out, key, 0, 0, 3.0))


def test_fake_tensors_draw_nothing():
    with FakeTensorMode():
        out = torch.empty(3, 4, dtype=torch.int64)
        assert rounded_gaussian_(out, -1, 0, 0, 3.0) is out  # -1 is no key: the native library is not asked
    meta = torch.empty(3, dtype=torch.int64, device="meta")
    assert rounded_gaussian_(meta, -1, 0, 0, 3.0) is meta


def test_compiled_code_draws_the_same_values(key):
    @torch.compile(backend="aot_eager", fullgraph=True)
    def noise(values):
        return values + rounded_gaussian_(torch.empty_like(values), key, 1, 2, 1000.0)

    values = torch.arange(12).view(3, 4)
    expected = native_values(key, 1, 2, 1000.0, 12)
    assert (noise(values) - values).flatten().tolist() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("scale", SCALES)
def test_cpu_and_gpu_give_the_same_values(scale, key):
    if not _native.cuda:
        pytest.skip("installed without a CUDA compiler")
    for n in (0, 1, 2, 7, 8, 9, 255, 256, 257, 1000, 300_001):
        cpu, gpu = (torch.empty(n, dtype=torch.int64, device=device) for device in ("cpu", "cuda"))
        for out in (cpu, gpu):
            rounded_gaussian_(out, key, 5, 2**40 + 3, scale)
        assert torch.equal(gpu.cpu(), cpu)
