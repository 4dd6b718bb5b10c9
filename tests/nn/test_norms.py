"""The norm by which an example is clipped is never below that of what is summed, at any magnitude, on every path."""

import dataclasses
import importlib
import math
import pkgutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_dp.nn
from lora_dp import DPEmbedding, DPLinear, PrivacyEngine
from lora_dp.nn.per_example import Slot
from lora_dp.nn.private_module import PrivateModule
from lora_dp.ops.clipped_sum import clipped_sum_kept, clipped_sum_pairs
from lora_dp.ops.example_norms import example_norms
from lora_dp.ops.example_rows import ExampleRows
from lora_dp.ops.per_example_grad import per_example_grad
from lora_dp.ops.per_example_norm import ghost_sq_norm
from lora_dp.privacy.clip_bounds import LARGEST_BOUND, LEAST_BOUND
from lora_dp.privacy.clipping import make_clip_rule
from tests.norm_paths import (
    LARGEST,
    PATHS,
    Drawn,
    OneLayer,
    contribution,
    drawn,
    norm,
    norm_of_sums,
    record,
    rules,
    subnormals_read_as_zero,
)
from tests.support import make_private, private_gradients

deterministic = settings(max_examples=150, deadline=None, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
@deterministic
@given(case=drawn(), rule=rules, reduction=st.sampled_from(["mean", "sum"]), flush=st.booleans())
def test_one_example_adds_no_more_than_the_bound(path, case, rule, reduction, flush):
    with subnormals_read_as_zero(flush):
        assert contribution(case, PATHS[path], rule, reduction) <= case.bound


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=drawn(), reduction=st.sampled_from(["mean", "sum"]))
def test_nor_less_than_it_may(path, case, reduction):
    """An example that is kept is shrunk to the bound and no further, but where tokens cancel beyond float64."""
    case = dataclasses.replace(case, rest=min(case.rest, 8.0))
    unclipped = contribution(case, PATHS[path], "flat", reduction, clips=False)
    found = contribution(case, PATHS[path], "flat", reduction)
    if found or unclipped < 1e30:  # at the end of float32's range an example may be dropped
        assert found >= min(unclipped, case.bound) * (1 - 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=drawn(), rule=rules, path=st.sampled_from(sorted(PATHS)))
def test_other_precisions(dtype, case, rule, path):
    if dtype == torch.float64 or "regulated" not in path:  # no eigenvalues of half precision
        assert contribution(case, PATHS[path], rule, dtype=dtype) <= case.bound


@pytest.mark.slow
@pytest.mark.parametrize("path", ["full rank, direct", "full rank, ghost", "adapter AB, direct", "lookups"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=drawn(), rule=rules, backwards=st.integers(2, 3))
def test_several_backward_passes_count_as_one_example(path, case, rule, backwards):
    assert contribution(case, PATHS[path], rule, backwards=backwards) <= case.bound


class Twice(nn.Module):
    """One layer used at two places, whose gradients may cancel."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) - (1 - 2.0**-20) * self.layer(x)


@pytest.mark.parametrize("method", ["direct", "ghost"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=drawn())
def test_several_uses_of_one_parameter_add_up(method, case):
    model = Twice(DPLinear(24, 20, bias=False))
    optimizer = make_private(model, batch_size=1, max_grad_norm=case.bound, norm_method=method)
    power = math.log2(case.bound) + case.excess + 20
    x, g = torch.ones(1, 2, 24), torch.full((1, 2, 20), min(2.0 ** min(power, 127), LARGEST))
    assert norm_of_sums(optimizer, record(model, optimizer, x, g)) <= case.bound


# What came to light


@pytest.mark.parametrize(("big", "small", "bound"), [(1e12, 1e4, 1.0), (1e6, 2e-2, 2e-5), (1e5, 3e-3, 3e-6)])
def test_lookups_of_one_token_that_cancel(big, small, bound):
    """In float32 the small one would be lost in the norm, and found again in the sum."""
    model = OneLayer(DPEmbedding(4, 2))
    optimizer = make_private(model, batch_size=2, max_grad_norm=bound, loss_reduction="sum")
    ids, weights = torch.tensor([[0, 0, 0], [1, 1, 1]]), torch.tensor([[small, big, -big], [0.0, 0.0, 0.0]])
    finished = record(model, optimizer, ids, weights.unsqueeze(2).expand(2, 3, 2))
    (found,) = optimizer.clip(finished, None).sums.values()
    assert bound * (1 - 1e-5) < float(found.norm()) <= bound


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("tokens", [1, 64])
def test_the_least_bound_where_squares_vanish_in_float32(tokens, clipping):
    """A whole step, the mean of 300 losses: squares of 2.5e-23 are below the least float32."""
    n = 300
    model = OneLayer(DPLinear(256, 64, bias=False))
    optimizer = make_private(
        model,
        batch_size=n,
        max_grad_norm=LEAST_BOUND,
        clipping=clipping,
        norm_method="direct",
        lr=0.0,
        engine=PrivacyEngine("rdp"),
    )
    x = torch.zeros(n, tokens, 256)
    x[0] = 1.0
    optimizer.take(optimizer.clip(record(model, optimizer, x, torch.full((n, tokens, 64), 2.5e-23 * n)), None), n, n)
    optimizer.batch.expect(n)
    optimizer.release()
    (gradient,) = private_gradients(model).values()
    assert LEAST_BOUND * (1 - 1e-5) < float(gradient.double().norm()) * n <= LEAST_BOUND


@deterministic
@given(
    rule=rules,
    power=st.floats(-20, 20),
    norms=st.lists(st.floats(-48, 45), min_size=4, max_size=4),
    layer_count=st.integers(3, 9),
)
def test_the_rules_keep_any_bound_at_any_norm(rule, power, norms, layer_count):
    bound = min(max(10.0**power, LEAST_BOUND), LARGEST_BOUND)
    sq_norms = (10.0 ** torch.tensor(norms, dtype=torch.float64)).square().unsqueeze(1)
    coefficients = make_clip_rule(rule, bound).coefficients(sq_norms, torch.tensor([0, 0, 2, 1]), layer_count)
    assert coefficients.dtype == torch.float64 and bool((coefficients > 0).all())
    assert float((coefficients.square() * sq_norms).sum().sqrt()) <= bound


@deterministic
@given(
    left=st.floats(-300, 300), right=st.floats(-300, 300), tokens=st.integers(1, 3), scale=st.sampled_from([1.0, 1e-3])
)
def test_ghost_norms_of_float64_factors_whose_squares_leave_its_range(left, right, tokens, scale):
    factors = torch.ones(1, tokens, 3).double() * 10.0**left, torch.ones(1, tokens, 2).double() * 10.0**right
    clipped = torch.tensor([1.0], dtype=torch.float64)
    summed = norm([clipped_sum_pairs(*factors, clipped, scale)])
    found = float(ghost_sq_norm(*factors, scale).sqrt())
    if 1e-150 < summed < 1e150:
        assert summed * (1 - 1e-12) <= found <= summed * (1 + 1e-6)
    else:
        assert found < 1e-149 or found > 1e149


def test_lookups_are_summed_as_they_were_measured():
    """Bit by bit: terms that cancel leave other values when they are added up in another order."""
    torch.manual_seed(0)
    ids, gradient = torch.randint(3, (5, 40)), torch.randn(5, 40, 2) * 10.0 ** torch.randint(-20, 20, (5, 40, 1))
    rows = ExampleRows.of(ids, gradient, torch.Size((3, 2)))
    for i in range(5):
        alone = rows.weighted_sum(torch.eye(5)[i])
        assert torch.equal(alone[rows.rows[rows.examples == i]], rows.values[rows.examples == i])
        torch.testing.assert_close(float(alone.norm()), float(rows.norms()[i]), rtol=1e-14, atol=0)


def test_finite_gradients_whose_sum_is_not_exclude_the_example():
    """Two backward passes through one graph add up in float32, their norms in float64."""
    slot = Slot("weight", nn.Parameter(torch.zeros(2, 3)), 2, "direct")
    left, right = torch.ones(2, 1, 2), torch.full((2, 1, 3), 1.0)
    left[0] = 3e38
    _, first, second = slot.receive(left, 2, 3)
    for _ in range(2):
        torch.autograd.backward([first, second], list(per_example_grad(left, right)))
    assert slot.kept is not None and torch.isfinite(slot.kept).flatten(1).all(1).tolist() == [False, True]
    assert torch.isfinite(slot.norms()).tolist() == [False, True]


def test_the_largest_float32_is_clipped_like_any_other():
    gradients = torch.full((1, 2, 3), LARGEST)
    sq_norms = example_norms(gradients).square().unsqueeze(0)
    for bound in (LEAST_BOUND, 1.0, LARGEST_BOUND):
        coefficients = make_clip_rule("flat", bound).coefficients(sq_norms, torch.tensor([0]), 1)
        assert bound * (1 - 1e-5) < norm([clipped_sum_kept(gradients, coefficients[0])]) <= bound


def test_the_paths_are_those_that_a_gradient_can_take():
    """A layer that is new shall not be forgotten here."""
    kinds = set()
    for found in pkgutil.iter_modules(lora_dp.nn.__path__, "lora_dp.nn."):
        for kind in vars(importlib.import_module(found.name)).values():
            if isinstance(kind, type) and issubclass(kind, PrivateModule) and kind is not PrivateModule:
                kinds.add(kind)
    assert kinds == {type(path.layer()) for path in PATHS.values()}


@pytest.mark.slow
def test_a_case_has_every_magnitude():
    """The strategy reaches both ends of float32, and bounds at both ends; a fortieth of its draws reach the least."""
    seen: list[Drawn] = []

    # What is drawn depends on the modules that are imported: so many that none of them can miss an end.
    @settings(deterministic, max_examples=1000)
    @given(case=drawn())
    def draw(case: Drawn) -> None:
        seen.append(case)

    draw()
    powers = [case.errors(PATHS["full rank, direct"]) for case in seen]
    assert min(powers) < -140 and max(powers) > 127
    assert {LEAST_BOUND, LARGEST_BOUND} <= {case.bound for case in seen}
