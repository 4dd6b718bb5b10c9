"""Clip rules: cᵢ‖gᵢ‖ never above the sensitivity, and the stated coefficient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_dp.privacy.clipping import AutomaticClipping, FlatClipping, PerLayerClipping, make_clip_rule
from tests.models import assert_refuses

RULES = ["flat", "per_layer", "automatic"]
LAYERS = torch.tensor([0, 0, 2, 1])


def contribution(coefficients: Tensor, sq_norms: Tensor) -> Tensor:
    """‖Σ over parameters of cᵢgᵢ‖ for each example, in float64."""
    return (coefficients.double().square() * sq_norms.double()).sum(0).sqrt()


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    bound=st.floats(1e-6, 1e6),
    norms=st.lists(st.one_of(st.just(0.0), st.floats(1e-18, 1e18)), min_size=4, max_size=4),
    wide=st.booleans(),
)
def test_no_example_exceeds_the_sensitivity(rule, bound, norms, wide):
    """Also where float32 rounds every square."""
    dtype = torch.float64 if wide else torch.float32
    sq_norms = torch.tensor(norms, dtype=torch.float64).square().to(dtype).unsqueeze(1)
    clip = make_clip_rule(rule, bound)
    coefficients = clip.coefficients(sq_norms, LAYERS, 3)
    assert coefficients.shape == sq_norms.shape and torch.isfinite(coefficients).all() and (coefficients >= 0).all()
    assert contribution(coefficients, sq_norms) <= clip.sensitivity


def test_flat():
    sq_norms = torch.tensor([[9.0, 0.09], [16.0, 0.16]], dtype=torch.float64)
    coefficients = FlatClipping(2.0).coefficients(sq_norms, LAYERS[:2], 1)
    assert coefficients[0].tolist() == pytest.approx([0.4, 1.0], rel=1e-5)
    assert torch.equal(coefficients[0], coefficients[1])


@pytest.mark.parametrize("rule", RULES)
def test_what_is_clipped_leaves_the_margin_that_rounding_needs(rule):
    """A few roundings of float32, and the 4.8e-7 that privacy.noise counts for sums in float64: 1.9e-6 of the bound."""
    clip = make_clip_rule(rule, 2.0)
    sq_norms = torch.full((4, 1), 1e20, dtype=torch.float64)
    assert clip.sensitivity == 2.0
    layers = torch.arange(4)
    margin = 1 - float(contribution(clip.coefficients(sq_norms, layers, 4), sq_norms)) / clip.sensitivity
    assert 1.8e-6 < margin < 2e-6


def test_flat_without_a_bound_changes_nothing():
    sq_norms = torch.tensor([[0.0, 1.0, 1e30, math.nan]])
    assert FlatClipping(math.inf).coefficients(sq_norms, LAYERS[:1], 1).tolist() == [[1, 1, 1, 0]]


def test_per_layer():
    """Layer 0 has two parameters; each of three layers keeps C / √3, a layer without a gradient included."""
    sq_norms = torch.tensor([[9.0], [16.0], [1e-4]], dtype=torch.float64)
    coefficients = PerLayerClipping(3.0).coefficients(sq_norms, torch.tensor([0, 0, 2]), 3).flatten()
    assert coefficients.tolist() == pytest.approx([math.sqrt(3) / 5, math.sqrt(3) / 5, 1.0], rel=1e-5)


def test_automatic():
    sq_norms = torch.tensor([[9.0, 0.0], [16.0, 0.0]], dtype=torch.float64)
    coefficients = AutomaticClipping(2.0, gamma=0.5).coefficients(sq_norms, LAYERS[:2], 1)
    assert coefficients[1].tolist() == pytest.approx([2 / 5.5, 4.0], rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rule", RULES)
def test_one_norm_that_is_not_finite_excludes_the_whole_example_and_no_other(rule, bad):
    sq_norms = torch.ones(4, 3)
    clean = make_clip_rule(rule, 0.5).coefficients(sq_norms.clone(), LAYERS, 3)
    sq_norms[2, 1] = bad
    coefficients = make_clip_rule(rule, 0.5).coefficients(sq_norms, LAYERS, 3)
    assert not coefficients[:, 1].any()
    assert torch.equal(coefficients[:, [0, 2]], clean[:, [0, 2]]) and clean.all()


@pytest.mark.parametrize("rule", RULES)
def test_no_examples(rule):
    assert make_clip_rule(rule, 0.5).coefficients(torch.ones(4, 0), LAYERS, 3).shape == (4, 0)


@pytest.mark.parametrize("bound", [1e-42, 1.01e20, 1e37])
@pytest.mark.parametrize("rule", RULES)
def test_bounds_that_float32_cannot_keep_are_refused(rule, bound):
    assert_refuses(ValueError, "must lie within 1e-20 and 1e20", lambda: make_clip_rule(rule, bound))


@pytest.mark.parametrize("bound", [1e-20, 1e20])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [1e-18, 1.0, 1e18])
def test_the_bound_holds_to_the_ends_of_its_range(rule, bound, size):
    gradients = size * torch.randn(4, 50, 30, generator=torch.Generator().manual_seed(0))
    coefficients = make_clip_rule(rule, bound).coefficients(gradients.square().sum(2), LAYERS, 3)
    norms = (coefficients.double()[..., None] * gradients.double()).square().sum((0, 2)).sqrt()
    assert bool(torch.isfinite(norms).all()) and float(norms.max()) <= bound


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan])
def test_bad_bounds_are_refused(bound):
    assert_refuses(ValueError, "max_grad_norm must be above 0", lambda: make_clip_rule("flat", bound))
