"""The products with few columns or of low rank against float64: shapes, dtypes, layouts, NaN, offsets, and faults."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_dp.kernels import lora_product as lora
from lora_dp.kernels import low_rank_update as update
from lora_dp.kernels import skinny_product as skinny
from lora_dp.kernels.launching import Config
from lora_dp.kernels.lora_product import lora_product
from lora_dp.kernels.low_rank_update import add_low_rank_
from lora_dp.kernels.skinny_product import skinny_product

# NumPy's names for what NaN and infinity do, as they should.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Small blocks: many programs, and many steps in each.
TINY_SKINNY = [Config.of(4, 2, BLOCK_M=16, BLOCK_K=16, SPLIT_K=splits) for splits in (1, 3)]
TINY_UPDATE = Config.of(4, 2, BLOCK_M=16, BLOCK_N=16)
TINY_LORA = Config.of(4, 2, BLOCK_M=16, BLOCK_N=32, BLOCK_K=16, STRIP=16)
ONE_STEP_LORA = Config.of(4, 2, BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, STRIP=16)

examples = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes = st.integers(1, 40)
ranks = st.integers(1, 20) | st.sampled_from([33, 64])
wide_ranks = ranks | st.sampled_from([100, 256])
own_layouts = st.sampled_from(["contiguous", "transposed", "stepped"])
layouts = own_layouts | st.just("expanded")
scalings = st.sampled_from([1.0, 2.0, -1 / 3])
seeds = st.integers(0, 2**16)


@pytest.fixture(autouse=True, scope="module")
def poisoned_outputs():
    """Every torch.empty holds NaN, so that whatever is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal values; where the layout leaves gaps, they hold NaN."""
    values = torch.randn(shape).to(device, dtype)
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout == "stepped":
        memory = torch.full([3 * size + 2 for size in shape], math.nan, device=device, dtype=dtype)
        view = memory[tuple(slice(1, 1 + step * size, step) for size, step in zip(shape, (2, 3), strict=False))]
        return view.copy_(values)
    if layout == "expanded":
        return values[:1].expand(shape)
    return values


def assert_near(actual: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """Within one rounding of the result's dtype, and float32's error of a sum of that magnitude.

    Triton's interpreter cuts bfloat16 off where a device rounds: one whole unit in the last place, not half of one.
    """
    kind = torch.finfo(actual.dtype)
    slack = kind.eps * (expected.abs() + kind.smallest_normal) + 2e-6 * magnitude
    assert actual.shape == expected.shape
    assert bool(((actual.double() - expected).abs() <= slack).all())


def check_skinny(x: Tensor, a: Tensor, config: Config | None) -> None:
    h = skinny_product(x, a, config=config)
    assert h.dtype == x.dtype and h.is_contiguous()
    assert_near(h, x.double() @ a.double().t(), x.double().abs() @ a.double().abs().t())


def check_update(y: Tensor, h: Tensor, b: Tensor, scaling: float, config: Config | None) -> None:
    before = y.double()
    add_low_rank_(y, h, b, scaling, config=config)
    magnitude = before.abs() + abs(scaling) * (h.double().abs() @ b.double().abs().t())
    assert_near(y, before + scaling * (h.double() @ b.double().t()), magnitude)


def check_lora(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, config: Config | None
) -> None:
    y, h = lora_product(x, weight, bias, a, b, scaling, config=config)
    assert y.dtype == h.dtype == x.dtype and y.is_contiguous() and h.is_contiguous()
    assert_near(h, x.double() @ a.double().t(), x.double().abs() @ a.double().abs().t())
    shift = torch.zeros(weight.shape[0], device=x.device).double() if bias is None else bias.double()
    # The rounded h meets b.
    expected = x.double() @ weight.double().t() + shift + scaling * (h.double() @ b.double().t())
    magnitude = (
        x.double().abs() @ weight.double().abs().t()
        + shift.abs()
        + abs(scaling) * (h.double().abs() @ b.double().abs().t())
    )
    assert_near(y, expected, magnitude)


@examples
@given(
    m=sizes,
    k=sizes,
    r=wide_ranks,
    dtype=st.sampled_from(DTYPES),
    x_layout=layouts,
    a_layout=layouts,
    config=st.sampled_from(TINY_SKINNY),
    seed=seeds,
)
def test_skinny_product(m, k, r, dtype, x_layout, a_layout, config, seed, device):
    torch.manual_seed(seed)
    check_skinny(random((m, k), x_layout, dtype, device), random((r, k), a_layout, dtype, device), config)


@examples
@given(
    m=sizes,
    n=sizes,
    r=wide_ranks,
    dtype=st.sampled_from(DTYPES),
    y_layout=own_layouts,
    h_layout=layouts,
    b_layout=layouts,
    scaling=scalings,
    seed=seeds,
)
def test_low_rank_update(m, n, r, dtype, y_layout, h_layout, b_layout, scaling, seed, device):
    torch.manual_seed(seed)
    y = random((m, n), y_layout, dtype, device)
    check_update(
        y, random((m, r), h_layout, dtype, device), random((n, r), b_layout, dtype, device), scaling, TINY_UPDATE
    )


@examples
@given(
    m=sizes,
    n=sizes,
    k=sizes,
    r=ranks,
    dtype=st.sampled_from(DTYPES),
    layout=st.tuples(*[layouts] * 4),
    bias_layout=st.sampled_from(["none", "contiguous", "stepped", "expanded"]),
    scaling=scalings,
    seed=seeds,
)
def test_lora_product(m, n, k, r, dtype, layout, bias_layout, scaling, seed, device):
    torch.manual_seed(seed)
    shapes = [(m, k), (n, k), (r, k), (n, r)]
    x, weight, a, b = (random(shape, name, dtype, device) for shape, name in zip(shapes, layout, strict=True))
    bias = None if bias_layout == "none" else random((n,), bias_layout, dtype, device)
    check_lora(x, weight, bias, a, b, scaling, TINY_LORA)


@pytest.mark.parametrize("name", skinny.CONFIGS)
def test_every_skinny_configuration(name, device):
    config = skinny.CONFIGS[name]
    torch.manual_seed(0)
    m, k = config["BLOCK_M"] + 5, config["BLOCK_K"] * config["SPLIT_K"] + 7
    dtype = torch.float32 if name == "float32" else torch.bfloat16
    for r in (5, 200):
        check_skinny(random((m, k), "contiguous", dtype, device), random((r, k), "transposed", dtype, device), config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", update.CONFIGS)
def test_every_update_configuration(name, dtype, device):
    config = update.CONFIGS[name]
    torch.manual_seed(0)
    m, n = config["BLOCK_M"] + 5, config["BLOCK_N"] + 7
    for r in (5, 200):
        check_update(
            random((m, n), "contiguous", dtype, device),
            random((m, r), "contiguous", dtype, device),
            random((n, r), "contiguous", dtype, device),
            0.5,
            config,
        )


@pytest.mark.parametrize("name", sorted(lora.CONFIGS.keys() - {"tf32"}))
def test_every_lora_configuration(name, device):
    config = lora.CONFIGS[name]
    torch.manual_seed(0)
    m, n, k, r = config["BLOCK_M"] + 5, config["BLOCK_N"] + 7, config["BLOCK_K"] + 3, 20
    dtype = torch.float32 if name == "ieee" else torch.bfloat16
    x, weight, a, b = (random(shape, "contiguous", dtype, device) for shape in [(m, k), (n, k), (r, k), (n, r)])
    check_lora(x, weight, random((n,), "contiguous", dtype, device), a, b, 0.5, config)


def test_tf32_only_where_torch_allows_it(device):
    """Ten bits of mantissa are far from float32's tolerance: the tests above fail if it is used unasked."""
    torch.manual_seed(0)
    m, n, k, r = 70, 140, 40, 20
    x, weight, a, b = (random(shape, "contiguous", torch.float32, device) for shape in [(m, k), (n, k), (r, k), (n, r)])
    torch.set_float32_matmul_precision("high")
    try:
        y, h = lora_product(x, weight, None, a, b, 0.5)
        two_step = x @ weight.t()
        add_low_rank_(two_step, skinny_product(x, a), b, 0.5)
    finally:
        torch.set_float32_matmul_precision("highest")
    expected_h = x.double() @ a.double().t()
    expected = x.double() @ weight.double().t() + 0.5 * expected_h @ b.double().t()
    for actual, want in ((y, expected), (h, expected_h), (two_step, expected)):
        assert (actual.double() - want).norm() <= 2e-3 * want.norm()


def test_groups_of_row_blocks(device):
    """More blocks of rows than one group has, the last group short, and several blocks of columns."""
    torch.manual_seed(0)
    x, weight, a, b = (
        random(shape, "contiguous", torch.float32, device) for shape in [(185, 5), (70, 5), (3, 5), (70, 3)]
    )
    check_lora(x, weight, None, a, b, 1.0, TINY_LORA)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_to_the_input(dtype, device):
    """dx = g W + s (g B) A and u = g B, from transposed views."""
    torch.manual_seed(0)
    g, weight, lora_a, lora_b = (
        random(shape, "contiguous", dtype, device) for shape in [(37, 21), (21, 50), (6, 50), (21, 6)]
    )
    check_lora(g, weight.t(), None, lora_b.t(), lora_a.t(), 0.5, None)
    check_skinny(g, lora_b.t(), None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_agrees_with_two_steps(dtype, device):
    torch.manual_seed(0)
    x, weight, a, b = (random(shape, "contiguous", dtype, device) for shape in [(37, 50), (21, 50), (6, 50), (21, 6)])
    bias = random((21,), "contiguous", dtype, device)
    y, h = lora_product(x, weight, bias, a, b, 0.5)
    two_step_h = skinny_product(x, a)
    two_step = (x.double() @ weight.double().t() + bias.double()).to(dtype)
    add_low_rank_(two_step, two_step_h, b, 0.5)
    assert torch.equal(h, two_step_h) or (h - two_step_h).norm() <= torch.finfo(dtype).eps * h.norm()
    assert (y.double() - two_step.double()).norm() <= 2 * torch.finfo(dtype).eps * y.double().norm()


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows, device):
    x, weight, a, b = (torch.randn(shape, device=device) for shape in [(rows, 20), (7, 20), (3, 20), (7, 3)])
    check_skinny(x, a, None)
    check_update(torch.randn(rows, 7, device=device), torch.randn(rows, 3, device=device), b, 1.0, None)
    check_lora(x, weight, None, a, b, 1.0, None)


def test_no_columns(device):
    x, a, b = (torch.randn(shape, device=device) for shape in [(4, 20), (3, 20), (0, 3)])
    add_low_rank_(torch.randn(4, 0, device=device), x[:, :3], b, 1.0)
    y, h = lora_product(x, torch.randn(0, 20, device=device), None, a, b, 1.0)
    assert y.shape == (4, 0)
    assert_near(h, x.double() @ a.double().t(), x.double().abs() @ a.double().abs().t())


def test_splits_give_the_same_bits_each_time(device):
    x, a = torch.randn(20, 100, device=device), torch.randn(3, 100, device=device)
    first = skinny_product(x, a, config=TINY_SKINNY[1])
    assert all(torch.equal(skinny_product(x, a, config=TINY_SKINNY[1]), first) for _ in range(3))


@pytest.mark.parametrize("config", TINY_SKINNY)
def test_skinny_product_keeps_non_finite_rows_apart(config, device):
    torch.manual_seed(0)
    x, a = torch.randn(40, 30, device=device), torch.rand(3, 30, device=device)
    clean = skinny_product(x, a, config=config)
    x[5, 29], x[17, 0] = math.nan, math.inf
    h = skinny_product(x, a, config=config)
    assert bool(h[5].isnan().all()) and bool((h[17] == math.inf).all())
    others = [i for i in range(40) if i not in (5, 17)]
    assert torch.equal(h[others], clean[others])


def test_lora_product_keeps_non_finite_rows_apart(device):
    """Also from its own padding: infinity times the padding's zeros would be NaN."""
    torch.manual_seed(0)
    x = torch.randn(40, 30, device=device)
    weight, a, b = (torch.rand(shape, device=device) for shape in [(50, 30), (3, 30), (50, 3)])
    clean = lora_product(x, weight, None, a, b, 1.0, config=TINY_LORA)
    x[5, 29], x[17, 0] = math.nan, math.inf
    results = lora_product(x, weight, None, a, b, 1.0, config=TINY_LORA)
    others = [i for i in range(40) if i not in (5, 17)]
    for actual, want in zip(results, clean, strict=True):
        assert bool(actual[5].isnan().all()) and bool((actual[17] == math.inf).all())
        assert torch.equal(actual[others], want[others])


def test_low_rank_update_keeps_non_finite_rows_apart(device):
    torch.manual_seed(0)
    y, h, b = torch.randn(40, 50, device=device), torch.randn(40, 3, device=device), torch.rand(50, 3, device=device)
    clean = y.clone()
    add_low_rank_(clean, h, b, 1.0, config=TINY_UPDATE)
    h[5, 2], h[17, 0], y[20, 7] = math.nan, math.inf, math.nan
    add_low_rank_(y, h, b, 1.0, config=TINY_UPDATE)
    assert bool(y[5].isnan().all()) and bool((y[17] == math.inf).all()) and int(y[20].isnan().sum()) == 1
    others = [i for i in range(40) if i not in (5, 17, 20)]
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_beside_the_views_stays_out(dtype, device):
    """Every view has NaN between and after its elements, and no block divides it."""
    torch.manual_seed(0)
    m, n, k, r = 19, 37, 21, 3
    x, weight, a, b, y, h = (
        random(shape, "stepped", dtype, device) for shape in [(m, k), (n, k), (r, k), (n, r), (m, n), (m, r)]
    )
    for config in TINY_SKINNY:
        check_skinny(x, a, config)
    check_update(y, h, b, 0.5, TINY_UPDATE)
    check_lora(x, weight, random((n,), "stepped", dtype, device), a, b, 0.5, TINY_LORA)


def test_low_rank_update_writes_its_view_alone(device):
    memory = torch.randn(40, 60, device=device)
    before = memory.clone()
    view = memory[3:37:2, 1:50:3]
    outside = torch.ones_like(memory, dtype=torch.bool)
    outside[3:37:2, 1:50:3] = False
    h, b = torch.randn(view.shape[0], 3, device=device), torch.randn(view.shape[1], 3, device=device)
    add_low_rank_(view, h, b, 1.0, config=TINY_UPDATE)
    assert torch.equal(memory[outside], before[outside]) and not torch.equal(memory, before)


def far_apart(values: Tensor, dim: int) -> Tensor:
    """The same values with 2²⁷ elements from one to the next along ``dim``: from the 17th on they lie past 2³¹.

    The memory between is never touched, so that a CPU never provides it.
    """
    strides = [1, 1]
    strides[dim] = 2**27
    size = 2**27 * (values.shape[dim] - 1) + values.shape[1 - dim]
    return values.new_empty(size).as_strided(values.shape, strides).copy_(values)


@pytest.mark.parametrize("shape, dim", [((18, 5), 0), ((5, 18), 1)])
def test_offsets_past_32_bits(shape, dim, device, monkeypatch):
    """Strides that fit 32 bits, multiples that do not: across blocks of rows, and from step to step along K."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.manual_seed(0)
    rows, columns = shape

    def near(*size: int) -> Tensor:
        return torch.randn(size, device=device).bfloat16()

    far = far_apart(near(*shape), dim)
    check_skinny(far, near(3, columns), TINY_SKINNY[0])
    check_skinny(near(4, columns), far, TINY_SKINNY[0])
    check_skinny(far, far, TINY_SKINNY[1])
    check_update(near(rows, 7), far, near(7, columns), 0.5, TINY_UPDATE)
    check_update(near(7, rows), near(7, columns), far, 0.5, TINY_UPDATE)
    for config in (TINY_LORA, ONE_STEP_LORA):
        check_lora(far, near(4, columns), None, near(3, columns), near(4, 3), 0.5, config)
    check_lora(near(4, columns), far, None, near(3, columns), near(rows, 3), 0.5, TINY_LORA)
    check_lora(near(4, columns), near(6, columns), None, far, near(6, rows), 0.5, TINY_LORA)
    check_lora(near(4, 6), near(rows, 6), None, near(columns, 6), far, 0.5, TINY_LORA)
    if dim == 0:
        check_lora(near(4, 6), near(18, 6), far[:, 0], near(3, 6), near(18, 3), 0.5, TINY_LORA)
    check_update(far, near(rows, 2), near(columns, 2), 0.5, TINY_UPDATE)


X, W, BIAS, A, B = (torch.zeros(shape) for shape in [(4, 6), (5, 6), (5,), (2, 6), (5, 2)])
Y, H = torch.zeros(4, 5), torch.zeros(4, 2)


@pytest.mark.parametrize(
    "launcher, arguments, position, bad, error, message",
    [
        (skinny_product, (X, A), 0, X.double(), TypeError, "x must be float32 or bfloat16 or float16, got float64"),
        (skinny_product, (X, A), 0, X[0], ValueError, "x must have the shape"),
        (skinny_product, (X, A), 0, X.to("meta"), ValueError, "x must be on"),
        (skinny_product, (X, A), 0, None, TypeError, "x must be a tensor"),
        (skinny_product, (X, A), 1, A[:, :5], ValueError, "a must have the shape"),
        (skinny_product, (X, A), 1, A.half(), TypeError, "a must be float32, got float16"),
        (skinny_product, (X, A), 1, A.to("meta"), ValueError, "a must be on"),
        (skinny_product, (X, A), 1, X.new_zeros(257, 6), ValueError, "rank must be from 1 to 256, got 257"),
        (skinny_product, (X, A), 1, A[:0], ValueError, "rank must be from 1 to 256, got 0"),
        (add_low_rank_, (Y, H, B, 1.0), 0, Y.long(), TypeError, "y must be"),
        (add_low_rank_, (Y, H, B, 1.0), 1, H[:3], ValueError, "h must have the shape"),
        (add_low_rank_, (Y, H, B, 1.0), 1, H.to("meta"), ValueError, "h must be on"),
        (add_low_rank_, (Y, H, B, 1.0), 2, B[:, :1], ValueError, "b must have the shape"),
        (add_low_rank_, (Y, H, B, 1.0), 2, B.half(), TypeError, "b must be float32"),
        (lora_product, (X, W, BIAS, A, B, 1.0), 0, X.double(), TypeError, "x must be"),
        (lora_product, (X, W, BIAS, A, B, 1.0), 1, W[:, :5], ValueError, "weight must have the shape"),
        (lora_product, (X, W, BIAS, A, B, 1.0), 1, W.half(), TypeError, "weight must be float32"),
        (lora_product, (X, W, BIAS, A, B, 1.0), 2, BIAS[:4], ValueError, "bias must have the shape"),
        (lora_product, (X, W, BIAS, A, B, 1.0), 2, BIAS.to("meta"), ValueError, "bias must be on"),
        (lora_product, (X, W, BIAS, A, B, 1.0), 3, A[:, :5], ValueError, "a must have the shape"),
        (lora_product, (X, W, BIAS, A, B, 1.0), 4, B[:, :1], ValueError, "b must have the shape"),
    ],
)
def test_faults(launcher, arguments, position, bad, error, message, device):
    given = [value.to(device) if isinstance(value, Tensor) else value for value in arguments]
    given[position] = bad.to(device) if isinstance(bad, Tensor) and not bad.is_meta else bad
    with pytest.raises(error, match=f"{launcher.__name__}: .*{message}"):
        launcher(*given)


def test_expanded_output(device):
    y, h, b = (torch.zeros(shape, device=device) for shape in [(1, 5), (4, 2), (5, 2)])
    with pytest.raises(ValueError, match="add_low_rank_: y is expanded"):
        add_low_rank_(y.expand(4, 5), h, b, 1.0)


def test_rank_above_the_fused_one(device):
    x, weight, a, b = (torch.zeros(shape, device=device) for shape in [(4, 6), (5, 6), (65, 6), (5, 65)])
    with pytest.raises(ValueError, match="rank must be at most 64, got 65: use the two-step path"):
        lora_product(x, weight, None, a, b, 1.0)


@pytest.mark.parametrize(
    "m, k, n, r, narrow, fused",
    [
        (100_352, 128, 128, 8, "tall", "square"),
        (12_544, 512, 512, 8, "rows", "square"),
        (4_096, 768, 768, 64, "short", "small"),
        (4_096, 768, 768, 8, "short", "wide"),
        (32, 4_096, 768, 8, "split", "small"),
        (16_384, 2_048, 2_048, 64, "rows", "square_k32"),
    ],
)
def test_default_configurations(m, k, n, r, narrow, fused, monkeypatch):
    """Without measurements, on a device of 132 multiprocessors."""
    monkeypatch.setattr("lora_dp.kernels.launching._table", dict)
    x = torch.zeros(1, dtype=torch.bfloat16).expand(m, k)
    assert skinny._choose(x, m, k, r) == skinny.CONFIGS[narrow]
    assert lora._choose(x, m, k, n, r) == lora.CONFIGS[fused]
