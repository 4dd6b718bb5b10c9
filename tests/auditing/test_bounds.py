import math

import mpmath
import numpy as np
import pytest
from scipy.special import expit, ndtr
from scipy.stats import binom, binomtest

from lora_dp.auditing import bounds
from lora_dp.auditing.bounds import (
    choose_threshold,
    clopper_pearson_upper,
    count_correct,
    error_bounds,
    gaussian_epsilon,
    one_run_epsilon,
    one_run_mu,
    one_run_p_value,
    two_world_epsilon,
    two_world_mu,
)


def p_value_by_definition(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """The theorem word for word, every probability a sum of 60-digit numbers, all i up to m."""
    with mpmath.workdps(60):
        hit = 1 / (1 + mpmath.exp(-mpmath.mpf(epsilon)))
        mass = [mpmath.binomial(r, k) * hit**k * (1 - hit) ** (r - k) for k in range(r + 1)]
        worst = max(mpmath.fsum(mass[max(v - i, 0) : v]) / i for i in range(1, m + 1))
        return float(min(mpmath.fsum(mass[v:]) + 2 * m * mpmath.mpf(delta) * worst, 1))


@pytest.mark.parametrize(("m", "r", "v"), [(60, 60, 45), (60, 20, 20), (200, 50, 10), (200, 100, 97), (7, 1, 1)])
@pytest.mark.parametrize("epsilon", [0.0, 0.7, 3.0, 8.0])
@pytest.mark.parametrize("delta", [0.0, 1e-9, 1e-5, 1e-2])
def test_one_run_p_value_is_the_theorem(m: int, r: int, v: int, epsilon: float, delta: float) -> None:
    expected = p_value_by_definition(m, r, v, epsilon, delta)
    assert one_run_p_value(m, r, v, epsilon, delta) == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_one_run_p_value_of_many_canaries_keeps_its_digits() -> None:
    p = one_run_p_value(1500, 1500, 1250, 0.5, 1e-12)
    assert 0 < p == pytest.approx(p_value_by_definition(1500, 1500, 1250, 0.5, 1e-12), rel=1e-9)


@pytest.mark.parametrize(
    ("counts", "delta", "confidence", "epsilon", "gaussian"),
    [
        ((1000, 100, 95), 1e-5, 0.95, 2.165176, 3.323300),
        ((1000, 1000, 620), 1e-5, 0.95, 0.380339, 0.736354),
        ((5000, 250, 248), 1e-6, 0.99, 3.356295, 4.952473),
        ((1000, 20, 20), 1e-5, 0.95, 1.791284, 2.363368),
        ((2000, 2000, 1800), 1e-5, 0.95, 2.072653, 3.779516),
        ((1000, 50, 20), 1e-5, 0.95, 0.0, 0.0),
    ],
)
def test_one_run_bounds_are_those_of_jax_privacy(
    counts: tuple[int, int, int], delta: float, confidence: float, epsilon: float, gaussian: float
) -> None:
    """Numbers from jax-privacy 2.0.0 (arXiv 2305.08846 and 2410.22235), an independent implementation."""
    assert one_run_epsilon(*counts, delta, confidence) == pytest.approx(epsilon, abs=2e-6)
    assert gaussian_epsilon(one_run_mu(*counts, confidence), delta) == pytest.approx(gaussian, abs=2e-5)


@pytest.mark.slow
def test_one_run_p_values_grow_with_epsilon_where_they_matter() -> None:
    grid = np.linspace(0, 9, 400)
    for m, r, v, delta in [(1000, 1000, 620, 1e-3), (1000, 50, 50, 1e-2), (300, 100, 90, 1e-5), (50, 40, 39, 0.001)]:
        values = np.array([one_run_p_value(m, r, v, epsilon, delta) for epsilon in grid])
        below = values < 0.5
        assert (np.diff(values[below]) >= -1e-12).all() and not below[np.argmin(below) :].any()


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 4.0])
def test_one_run_on_randomised_response_errs_as_often_as_stated_and_comes_close(epsilon: float) -> None:
    """Every canary's coin is answered by randomised response: the right guesses are exactly Binomial(m, σ(ε))."""
    m, rate = 400, float(expit(epsilon))
    correct = np.arange(m + 1)
    too_high = np.array([one_run_epsilon(m, m, int(v), 0.0, 0.95) > epsilon for v in correct])
    false_alarm = float(binom.pmf(correct, m, rate) @ too_high)
    assert 0.02 < false_alarm <= 0.05
    many = 10**6
    assert 0.97 * epsilon < one_run_epsilon(many, many, int(many * rate), 0.0, 0.95) < epsilon


def gaussian_scores(rng: np.random.Generator, m: int, mu: float) -> tuple[np.ndarray, np.ndarray]:
    """Many coins at once, each hidden by Gaussian noise of its own: every one is μ-GDP and no more private."""
    coins = rng.random(m) < 0.5
    return coins * mu + rng.standard_normal(m), coins


@pytest.mark.slow
@pytest.mark.parametrize("mu", [0.5, 2.0])
def test_one_run_bounds_stay_below_the_gaussian_mechanism(mu: float) -> None:
    rng = np.random.default_rng(0)
    true, audits = gaussian_epsilon(mu, 1e-5), 150
    above = {"nothing": 0, "gaussian": 0}
    for _ in range(audits):
        scores, coins = gaussian_scores(rng, 300, mu)
        for guesses in (30, 300):
            correct = count_correct(scores, coins, guesses)
            above["nothing"] += one_run_epsilon(300, guesses, correct, 1e-5, 0.9) > true
            above["gaussian"] += one_run_mu(300, guesses, correct, 0.9) > mu
    # Twice 150 audits at 0.9, each to err in at most a tenth; four deviations of either count on top.
    assert above["nothing"] <= above["gaussian"] <= 2 * (0.1 * audits + 4 * math.sqrt(audits * 0.09))


def test_one_run_bounds_find_most_of_the_gaussian_mechanism() -> None:
    scores, coins = gaussian_scores(np.random.default_rng(1), 20_000, 2.0)
    true = gaussian_epsilon(2.0, 1e-5)
    correct = count_correct(scores, coins, 400)
    plain = one_run_epsilon(20_000, 400, correct, 1e-5, 0.95)
    assuming = gaussian_epsilon(one_run_mu(20_000, 400, correct, 0.95), 1e-5)
    assert 0.35 * true < plain < assuming < true and assuming > 0.5 * true


def test_clopper_pearson_is_scipys_exact_interval_and_covers() -> None:
    for errors, trials in [(0, 10), (3, 10), (10, 10), (17, 250)]:
        interval = binomtest(errors, trials, alternative="less").proportion_ci(0.975, method="exact")
        assert float(clopper_pearson_upper(errors, trials, 0.975)) == pytest.approx(interval.high, rel=1e-9)
    counts = np.arange(41)
    upper = clopper_pearson_upper(counts, 40, 0.95)
    for rate in np.linspace(0.01, 0.99, 50):
        assert binom.pmf(counts, 40, rate) @ (upper < rate) <= 0.05 + 1e-12


def test_both_error_rates_share_the_error_probability() -> None:
    out, inside = [0.0, 1.0, 2.0, 3.0], [2.0, 3.0, 4.0, 5.0, 1.0]
    positive, negative = error_bounds(out, inside, np.array([2.0]), 0.9)
    assert positive == clopper_pearson_upper(2, 4, 0.95) and negative == clopper_pearson_upper(1, 5, 0.95)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 5.0])
def test_two_worlds_of_randomised_response_give_epsilon_exactly(epsilon: float) -> None:
    error = float(expit(-epsilon))
    assert float(two_world_epsilon(error, error, 0.0)) == pytest.approx(epsilon, rel=1e-12)
    # The mirror image: a mechanism that is told apart on the other side alone.
    assert float(two_world_epsilon(0.5, 0.01, 0.0)) == float(two_world_epsilon(0.01, 0.5, 0.0))


@pytest.mark.parametrize("mu", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-2])
def test_two_worlds_of_the_gaussian_mechanism_give_its_curve(mu: float, delta: float) -> None:
    thresholds = np.linspace(-6, 12, 20_001)
    false_positive, false_negative = ndtr(-thresholds), ndtr(thresholds - mu)
    best = float(two_world_epsilon(false_positive, false_negative, delta).max())
    assert best == pytest.approx(gaussian_epsilon(mu, delta), rel=1e-4)
    middle = np.abs(thresholds) < 3
    assert two_world_mu(false_positive[middle], false_negative[middle]) == pytest.approx(mu, rel=1e-9)


@pytest.mark.slow
def test_two_world_bounds_err_as_seldom_as_stated_and_come_close() -> None:
    rng, mu, runs, confidence = np.random.default_rng(2), 1.5, 60, 0.8
    true = gaussian_epsilon(mu, 1e-5)
    above = {"epsilon": 0, "mu": 0}
    for _ in range(1000):
        out, inside = rng.standard_normal(2 * runs), mu + rng.standard_normal(2 * runs)
        threshold = choose_threshold(out[:runs], inside[:runs], two_world_mu, confidence)
        rates = error_bounds(out[runs:], inside[runs:], threshold, confidence)
        above["epsilon"] += float(two_world_epsilon(*rates, 1e-5)) > true
        above["mu"] += float(two_world_mu(*rates)) > mu
    assert above["epsilon"] <= above["mu"] <= 0.2 * 1000 + 4 * math.sqrt(1000 * 0.16)
    assert above["mu"] >= 5, "a test of 80 % confidence that never errs is not tight"
    many = 100_000
    out, inside = rng.standard_normal(2 * many), mu + rng.standard_normal(2 * many)
    threshold = choose_threshold(out[:many], inside[:many], two_world_mu, 0.95)
    assert 0.97 * mu < float(two_world_mu(*error_bounds(out[many:], inside[many:], threshold, 0.95))) < mu


def test_bounds_at_no_separation_are_zero() -> None:
    assert one_run_epsilon(100, 100, 50, 1e-5, 0.95) == 0 == one_run_mu(100, 100, 50, 0.95)
    assert float(two_world_epsilon(1.0, 1.0, 1e-5)) == 0 == float(two_world_mu(1.0, 1.0))
    assert one_run_epsilon(100, 100, 0, 1e-5, 0.95) == 0 == gaussian_epsilon(0.0, 1e-5)


def test_guesses_are_the_extreme_scores() -> None:
    scores, coins = [0.0, 5.0, 1.0, 4.0, 2.0, 3.0], [False, True, True, False, True, False]
    assert [count_correct(scores, coins, r) for r in range(7)] == [0, 1, 2, 2, 2, 2, 2]
    with pytest.raises(ValueError, match="not|number"):
        count_correct([math.nan, 1.0], [True, False], 1)
    with pytest.raises(ValueError, match="7 guesses"):
        count_correct(scores, coins, 7)


def test_impossible_counts_and_confidences_are_refused() -> None:
    with pytest.raises(ValueError, match="5 correct ones among 4 guesses"):
        one_run_p_value(10, 4, 5, 1.0, 0.0)
    with pytest.raises(ValueError, match="11 guesses"):
        bounds.one_run_mu(10, 11, 5, 0.95)
    for confidence in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="confidence must lie"):
            one_run_epsilon(10, 4, 2, 0.0, confidence)
