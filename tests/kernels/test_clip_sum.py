"""Coefficients and clipped sums against the clip rules in float64: rules, masks, scales, layouts, NaN, overflow."""

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import lora_dp.kernels.clip_sum as module
from lora_dp.kernels.clip_sum import CONFIGS, clip_sum
from lora_dp.kernels.launching import INTERPRETED, Config
from lora_dp.privacy.clip_bounds import LARGEST_BOUND, LEAST_BOUND
from lora_dp.privacy.clipping import AutomaticClipping, FlatClipping, PerLayerClipping

RULES = {"flat": FlatClipping, "per_layer": PerLayerClipping, "automatic": AutomaticClipping}
# NumPy's name for C / 0 = inf, as it should be.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
TINY = Config.of(1, 1, BLOCK_N=2, BLOCK_E=16)  # many programs, and many steps in each

examples = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
shapes = st.lists(st.sampled_from([(), (1,), (16,), (3, 5), (17, 3), (2, 3, 4), (0,), (64, 2)]), max_size=5)


@pytest.fixture(autouse=True, scope="module")
def poisoned_outputs():
    """Every torch.empty holds NaN, so that whatever is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclasses.dataclass
class Case:
    gradients: list[Tensor]
    rows: list[int]
    sq_norms: Tensor
    layers: Tensor
    layer_count: int
    mask: Tensor | None

    def run(self, rule: str, bound: float, scale: float = 1.0, **others) -> tuple[Tensor, list[Tensor]]:
        return clip_sum(
            self.gradients,
            self.rows,
            self.sq_norms,
            self.layers,
            self.layer_count,
            rule,
            bound,
            0.01,
            self.mask,
            scale,
            **others,
        )

    def expected(self, rule: str, bound: float, scale: float = 1.0) -> tuple[Tensor, list[Tensor]]:
        coefficients = (
            RULES[rule](bound).coefficients(self.sq_norms * scale**2, self.layers.long(), self.layer_count) * scale
        )
        if self.mask is not None:
            coefficients = torch.where(self.mask, coefficients, 0.0)
        return coefficients, self.sums_by(coefficients)

    def sums_by(self, coefficients: Tensor) -> list[Tensor]:
        return [
            sum(
                (c * g.double() for c, g in zip(coefficients[row], gradient, strict=True) if c != 0),
                torch.zeros(gradient.shape[1:], dtype=torch.float64, device=gradient.device),
            )
            for row, gradient in zip(self.rows, self.gradients, strict=True)
        ]

    def agrees(self, rule: str, bound: float, scale: float = 1.0, **others) -> None:
        coefficients, sums = self.run(rule, bound, scale, **others)
        want_coefficients, want_sums = self.expected(rule, bound, scale)
        assert coefficients.dtype == torch.float64
        torch.testing.assert_close(coefficients, want_coefficients, rtol=1e-6, atol=0)
        assert len(sums) == len(self.gradients)
        for actual, want in zip(sums, want_sums, strict=True):
            assert actual.dtype == torch.float64 and actual.shape == want.shape
            assert (actual - want).norm() <= 1e-5 * want.norm()
        # Beyond the rounding of the coefficients, the sums are those of float64.
        for actual, want in zip(sums, self.sums_by(coefficients), strict=True):
            assert (actual - want).norm() <= 1e-13 * want.norm()


def make_case(device, sizes, n, kept_elsewhere=1, masked=False, seed=0) -> Case:
    """Gradients of these shapes, and as many norms again as ``kept_elsewhere``, in a mixed order of rows."""
    torch.manual_seed(seed)
    parameters = len(sizes) + kept_elsewhere
    return Case(
        [torch.randn(n, *size, device=device) for size in sizes],
        torch.randperm(parameters)[: len(sizes)].tolist(),
        torch.randn(parameters, n, dtype=torch.float64, device=device).square(),
        torch.randint(0, 3, (parameters,), device=device),
        3,
        torch.rand(n, device=device) < 0.5 if masked else None,
    )


@examples
@given(
    sizes=shapes,
    n=st.integers(0, 7),
    kept_elsewhere=st.integers(0, 3),
    masked=st.booleans(),
    rule=st.sampled_from(list(RULES)),
    bound=st.floats(1e-3, 1e3),
    scale=st.sampled_from([1.0, 7.0, 0.3]),
    config=st.sampled_from([TINY, None]),
    seed=st.integers(0, 2**16),
)
def test_agrees_with_the_definition(device, sizes, n, kept_elsewhere, masked, rule, bound, scale, config, seed):
    make_case(device, sizes, n, kept_elsewhere, masked, seed).agrees(rule, bound, scale, config=config)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("rule", RULES)
def test_every_configuration(device, rule, config):
    case = make_case(device, [(33, 40), (8, 4), (5,)], 19, 30, masked=True)
    case.agrees(rule, 0.7, config=config)
    case.gradients = [gradient[:, :4].contiguous() for gradient in case.gradients[:2]]  # sizes that 4 divides
    case.rows = case.rows[:2]
    case.agrees(rule, 0.7, config=config)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad, masked", [(math.nan, False), (math.inf, True)])
def test_a_norm_that_is_not_finite_excludes_its_example_whatever_it_holds(device, rule, bad, masked):
    """In every parameter, also where the norm is one that is kept elsewhere; and no other example changes."""
    case = make_case(device, [(5, 4), (7,)], 5, 2)
    clean, _ = case.run(rule, 0.5)
    case.sq_norms[next(row for row in range(4) if row not in case.rows), 1] = bad
    case.sq_norms[case.rows[0], 3] = bad
    for gradient in case.gradients:
        gradient[1], gradient[3] = math.nan, math.inf
    case.mask = torch.ones(5, dtype=torch.bool, device=device) if masked else None
    coefficients, _ = case.run(rule, 0.5)
    assert not coefficients[:, [1, 3]].any()
    assert torch.equal(coefficients[:, [0, 2, 4]], clean[:, [0, 2, 4]])
    case.agrees(rule, 0.5)
    case.agrees(rule, 0.5, config=TINY)


def test_masked_examples_may_hold_anything(device):
    case = make_case(device, [(5, 4), (7,)], 4)
    case.mask = torch.tensor([True, False, True, False], device=device)
    case.gradients[0][1], case.gradients[1][3] = math.nan, math.inf
    case.agrees("flat", 0.5)


def test_a_sum_of_norms_beyond_float64_excludes_the_example(device):
    case = make_case(device, [(3,), (3,)], 2, 0)
    case.sq_norms[:, 0] = 1.7e308
    coefficients, _ = case.run("per_layer", 1.0)
    assert coefficients[:, 0].tolist() == [0, 0] and coefficients[:, 1].all()


def test_without_a_bound(device):
    case = make_case(device, [(2,)], 4, 0)
    case.sq_norms[0] = torch.tensor([0.0, 1.0, 1e30, math.nan])
    assert case.run("flat", math.inf)[0].tolist() == [[1, 1, 1, 0]]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bound", [LEAST_BOUND, 1e-6, 1.0, 3.7e5, LARGEST_BOUND])
def test_no_example_exceeds_the_bound(device, rule, bound):
    """Norms of all that float32 can hold, in many rows."""
    case = make_case(device, [], 64, 70)
    case.sq_norms = (10 ** torch.empty(70, 64, dtype=torch.float64, device=device).uniform_(-45, 39)).square()
    case.sq_norms[:, :16] = case.sq_norms[0, :16]  # equal rows: the most roundings
    coefficients, _ = case.run(rule, bound, config=Config.of(4, 1, BLOCK_N=64, BLOCK_E=16))
    assert torch.isfinite(coefficients).all() and (coefficients >= 0).all()
    assert ((coefficients.square() * case.sq_norms).sum(0).sqrt() <= bound).all()


def test_layouts(device):
    """Gradients far apart, unaligned or one repeated; norms transposed; layers, mask strided; int32 layers."""
    case = make_case(device, [(6, 8), (6, 8), (6, 8)], 5, 1, masked=True)
    buffer = torch.full((5, 100_001), math.nan, device=device)
    buffer[:, 3:51] = case.gradients[0].flatten(1)
    case.gradients[0] = buffer[:, 3:51].view(5, 6, 8)
    case.gradients[1] = case.gradients[1][:1].expand(5, 6, 8)
    case.gradients[2] = case.gradients[2].flip(0)[::2].repeat_interleave(2, 0)[1:].flip(0)
    case.sq_norms = case.sq_norms.T.contiguous().T
    case.layers = torch.stack([case.layers.int(), case.layers.int()], 1)[:, 0]
    case.mask = torch.stack([case.mask, ~case.mask], 1)[:, 0]
    for rule in RULES:
        case.agrees(rule, 0.5, config=TINY)


def test_examples_past_32_bit_offsets(device):
    """The last example lies more than 2³¹ elements away; the pages in between are never touched."""
    if not INTERPRETED and torch.cuda.get_device_properties(device).total_memory < 2**34:
        pytest.skip("needs 9 GB of GPU memory")
    case = make_case(device, [(4,)], 3, 0)
    torch.utils.deterministic.fill_uninitialized_memory = False
    far = torch.empty(2**31 + 8, device=device).as_strided((3, 4), (2**30, 1))
    torch.utils.deterministic.fill_uninitialized_memory = True
    far.copy_(case.gradients[0])
    case.gradients = [far]
    case.agrees("flat", 0.5)


def test_sums_are_views_of_one_buffer_by_one_launch(device, monkeypatch):
    case = make_case(device, [(33, 40), (7,), (0,), (2, 2)], 5)
    launches = []

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    kernel = module._clip_sum_kernel
    monkeypatch.setattr(module, "_clip_sum_kernel", Counted())
    _, sums = case.run("flat", 0.5)
    assert len(launches) == 1
    assert len({total.untyped_storage().data_ptr() for total in sums if total.numel()}) == 1
    assert sums[0].untyped_storage().nbytes() == 8 * sum(total.numel() for total in sums)


def test_same_inputs_give_the_same_bits(device):
    case = make_case(device, [(33, 40), (7,)], 21)
    first, second = case.run("per_layer", 0.5), case.run("per_layer", 0.5)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_no_examples_give_zeros_without_a_launch(device, monkeypatch):
    monkeypatch.setattr(module, "_clip_sum_kernel", None)
    coefficients, sums = make_case(device, [(3, 2), ()], 0).run("flat", 0.5)
    assert coefficients.shape == (3, 0)
    assert [total.tolist() for total in sums] == [[[0, 0]] * 3, 0]


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"gradients": [torch.ones(3, 2, device="meta")]}, ValueError, r"gradients\[0\] must be on"),
        ({"gradients": [torch.ones(3, 2).half()]}, TypeError, r"gradients\[0\] must be float32"),
        ({"gradients": [torch.ones(4, 2)]}, ValueError, r"gradients\[0\] must have the shape \(3, 2\)"),
        ({"gradients": [torch.ones(3, 2, 2).mT]}, ValueError, r"gradients\[0\] must be contiguous after its first"),
        ({"gradients": [torch.tensor(1.0)]}, ValueError, r"gradients\[0\] must have the shape"),
        ({"gradients": [None]}, TypeError, r"gradients\[0\] must be a tensor"),
        ({"rows": [2]}, ValueError, "rows must name one of the 2 rows"),
        ({"rows": [0, 1]}, ValueError, "rows must name"),
        ({"sq_norms": torch.ones(2, 3)}, TypeError, "sq_norms must be float64, got float32"),
        ({"sq_norms": torch.ones(2, 3, dtype=torch.float64, device="meta")}, ValueError, "sq_norms must be on"),
        ({"layers": torch.zeros(3, dtype=torch.int64)}, ValueError, r"layers must have the shape \(2\)"),
        ({"layers": torch.zeros(2)}, TypeError, "layers must be int64 or int32"),
        ({"mask": torch.ones(3)}, TypeError, "mask must be bool"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, ValueError, r"mask must have the shape \(3\)"),
        ({"mask": torch.ones(3, dtype=torch.bool, device="meta")}, ValueError, "mask must be on"),
        ({"layer_count": 0}, ValueError, "layer_count must be at least 1"),
    ],
)
def test_wrong_tensors_are_refused(device, change, error, match):
    right = {
        "gradients": [torch.ones(3, 2)],
        "rows": [0],
        "sq_norms": torch.ones(2, 3, dtype=torch.float64),
        "layers": torch.zeros(2, dtype=torch.int64),
        "layer_count": 1,
        "mask": None,
    }
    with pytest.raises(error, match="clip_sum: " + match):
        Case(**{key: _to(value, device) for key, value in {**right, **change}.items()}).run("flat", 1.0)


def _to(value, device):
    if isinstance(value, list):
        return [_to(each, device) for each in value]
    return value.to(device) if isinstance(value, Tensor) and not value.is_meta else value


@pytest.mark.parametrize(
    "arguments, match",
    [
        (("other", 1.0, 0.01, None, 1.0), "rule must be"),
        (("flat", 0.0, 0.01, None, 1.0), "max_grad_norm must be above"),
        (("flat", math.nan, 0.01, None, 1.0), "max_grad_norm must be above 0"),
        (("per_layer", math.inf, 0.01, None, 1.0), "max_grad_norm must be above 0, and finite"),
        (("automatic", 1.0, 0.0, None, 1.0), "gamma must be above 0"),
        (("flat", 1.0, 0.01, None, math.inf), "scale must be finite"),
    ],
)
def test_wrong_numbers_are_refused(device, arguments, match):
    case = make_case(device, [(2,)], 3)
    with pytest.raises(ValueError, match="clip_sum: " + match):
        clip_sum(case.gradients, case.rows, case.sq_norms, case.layers, 3, *arguments)
