"""A bound that follows a quantile: what the count costs, its noise, and how the bound moves."""

import math
from fractions import Fraction

import pytest
import torch

from lora_dp.privacy.adaptive_clipping import AdaptiveClipping, QuantileClipping
from lora_dp.privacy.clip_bounds import LARGEST_BOUND, LEAST_BOUND
from lora_dp.privacy.clipping import make_clip_rule
from lora_dp.privacy.mechanism import Mechanism, make_mechanism
from lora_dp.privacy.randomness import SecureSource, SeededSource
from tests.models import assert_refuses
from tests.support import check_deviation


def rule_of(bound: float = 1.0, noise_multiplier: float = 1.0, seed: int = 0, **options: float) -> QuantileClipping:
    return QuantileClipping(AdaptiveClipping(**options), bound, noise_multiplier, SeededSource(seed))


@pytest.mark.parametrize("share", [1e-6, 0.01, 0.25, 0.9, 0.999])
@pytest.mark.parametrize("noise_multiplier", [1e-3, 0.7, 1.0, 3.3, 200.0])
def test_both_releases_together_have_the_accounted_noise(noise_multiplier, share):
    """z⁻² = z_Δ⁻² + (2σ_b)⁻², in exact arithmetic on what is used."""
    options = AdaptiveClipping(share=share)
    gradient, count = options.gradient_noise(noise_multiplier), options.count_noise(noise_multiplier)
    together = 1 / Fraction(gradient) ** 2 + 1 / (2 * Fraction(count)) ** 2
    assert abs(float(together * Fraction(noise_multiplier) ** 2 - 1)) < 1e-14
    assert gradient > noise_multiplier


def test_the_share_of_the_papers_noise():
    """Andrew et al. take σ_b = L/20: here that is a share of (10 z/L)²."""
    assert AdaptiveClipping(share=(10 * 1.3 / 256) ** 2).count_noise(1.3) == pytest.approx(256 / 20)


def test_the_mechanism_is_that_of_the_gradient_and_another_clipping_is_as_it_was():
    mechanism = make_mechanism(AdaptiveClipping(share=0.19), 0.5, 1.8, SeededSource(0))
    assert mechanism.noise_multiplier == pytest.approx(2.0)
    assert mechanism.rule.sensitivity == mechanism.rule.max_grad_norm == 0.5
    plain = make_mechanism("flat", 0.5, 1.8, SeededSource(0))
    assert (plain.noise_multiplier, plain.rule) == (1.8, make_clip_rule("flat", 0.5))
    assert plain.centred_count(torch.ones(2, 3), None, 1.0) == 0.0


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_it_clips_as_flat_clipping_does(scale):
    squares = torch.rand(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * scale**2
    squares[1, 5] = math.inf
    layers = torch.tensor([0, 0, 1])
    found = rule_of(scale).coefficients(squares, layers, 2)
    assert torch.equal(found, make_clip_rule("flat", scale).coefficients(squares, layers, 2))


def test_the_count_is_of_finite_examples_that_no_mask_hides():
    squares = torch.tensor([[0.25, 0.5, 0.0, math.nan, 9.0, 0.1], [0.75, 0.6, 0.0, 0.1, 0.0, 0.1]], dtype=torch.float64)
    # ½ at the bound itself, −½, ½, none, −½, ½
    assert float(rule_of().centred_count(squares, None)) == 0.5
    mask = torch.tensor([True, False, True, True, True, False])
    assert float(rule_of().centred_count(squares, mask)) == 0.5
    assert float(rule_of(2.0).centred_count(squares[:, :3], None)) == 1.5
    assert float(rule_of().centred_count(squares[:, :0], None)) == 0.0


@pytest.mark.parametrize("noise_multiplier, share", [(1.0, 0.01), (0.4, 0.3), (30.0, 0.002)])
@pytest.mark.parametrize("count", [0.0, -7.5])
def test_the_released_count_has_the_stated_noise(noise_multiplier, share, count):
    rule = QuantileClipping(AdaptiveClipping(share=share), 3.0, noise_multiplier, SecureSource())
    found = torch.tensor([rule.released(count) for _ in range(3000)], dtype=torch.float64) - count
    check_deviation(found, noise_multiplier / (2 * math.sqrt(share)))


def test_the_released_count_is_on_a_grid():
    """As the sums: else its low bits tell it. The step is a power of two, at most 2⁻³² of the noise."""
    rule = rule_of(share=0.25)
    assert rule.count_noise == 1.0
    released = [rule.released(torch.tensor(2.5)) for _ in range(20)]
    assert all((value * 2**33).is_integer() for value in released) and not all(value.is_integer() for value in released)


def test_every_release_draws_anew():
    rule = rule_of()
    assert len({rule.released(0.0) for _ in range(50)}) == 50


@pytest.mark.parametrize("count, expected", [(3.0, 8), (-2.5, 5), (0.0, 1), (400.0, 8)])
def test_the_bound_moves_by_the_part_that_is_within(count, expected):
    rule = rule_of(0.7, 0.0, quantile=0.3, rate=0.4)
    rule.follow(count, expected)
    moved = 0.7 * math.exp(-0.4 * (0.5 + count / expected - 0.3))
    assert rule.max_grad_norm == rule.sensitivity == pytest.approx(moved, rel=1e-14)


def test_the_bound_stays_within_those_that_there_are():
    low, high = rule_of(1e-19, 0.0), rule_of(1e19, 0.0)
    low.follow(1e9, 1)
    high.follow(-1e9, 1)
    assert (low.max_grad_norm, high.max_grad_norm) == (LEAST_BOUND, LARGEST_BOUND)


def test_each_set_of_factors_has_a_bound_of_its_own():
    rule = rule_of(1.0, 0.0, rate=1.0)
    rule.choose("B")
    rule.follow(1.0, 1)
    moved = rule.max_grad_norm
    rule.choose("A")
    assert rule.max_grad_norm == 1.0 != moved
    rule.choose("B")
    assert rule.max_grad_norm == moved
    again = rule_of(5.0)
    again.load_state_dict(rule.state_dict())
    again.choose("B")
    assert again.max_grad_norm == moved
    again.choose("A")
    assert again.max_grad_norm == 5.0


def test_a_bound_is_moved_by_releases_alone():
    rule = rule_of()
    with pytest.raises(AttributeError):
        rule.max_grad_norm = 2.0
    rule.state_dict()[""] = 7.0
    assert rule.max_grad_norm == 1.0
    assert isinstance(make_mechanism(AdaptiveClipping(), 1.0, 1.0, SeededSource(0)), Mechanism)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantile": 0.0}, "quantile must lie between 0 and 1"),
        ({"quantile": math.nan}, "quantile must lie between 0 and 1"),
        ({"share": 1.0}, "share must lie between 0 and 1"),
        ({"rate": 0.0}, "rate must be positive and finite"),
        ({"rate": math.inf}, "rate must be positive and finite"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    assert_refuses(ValueError, words, lambda: AdaptiveClipping(**options))


def test_other_values_are_refused():
    assert_refuses(TypeError, "quantile must be a number", lambda: AdaptiveClipping(quantile="0.5"))
    assert_refuses(ValueError, "inf is no bound to begin with", lambda: rule_of(math.inf))
    assert_refuses(ValueError, "max_grad_norm must lie within", lambda: rule_of(1e-30))
    assert_refuses(ValueError, "saved bound of 'B' is 0.0", lambda: rule_of().load_state_dict({"B": 0.0}))
    assert_refuses(ValueError, "saved bound of 'B' is nan", lambda: rule_of().load_state_dict({"B": math.nan}))
    assert_refuses(TypeError, "saved bound of 'B' must be a number", lambda: rule_of().load_state_dict({"B": "1"}))
