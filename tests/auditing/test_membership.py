import math

import mpmath
import numpy as np
import pytest
from scipy.stats import binomtest, norm
from sklearn.metrics import roc_curve

from lora_dp.auditing.bounds import gaussian_epsilon
from lora_dp.auditing.membership import (
    largest_tpr,
    leave_out_scores,
    lira_scores,
    logit_confidence,
    rate,
    roc,
    tpr_at_fpr,
)


def halves(models: int, examples: int, rng: np.random.Generator) -> np.ndarray:
    """Each example in exactly half of the models."""
    return np.argsort(rng.random((models, examples)), axis=0) < models // 2


def synthetic(models: int, examples: int, shift: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Confidences that differ by example, and by ``shift`` deviations between members and others."""
    rng = np.random.default_rng(seed)
    members = halves(models, examples, rng)
    return rng.normal(0, 3, examples) + rng.normal(size=(models, examples)) + shift * members, members


@pytest.mark.parametrize("scale", [1.0, 30.0, 400.0])
def test_confidence_is_the_logit_of_the_softmax(scale: float) -> None:
    rng = np.random.default_rng(0)
    logits, labels = scale * rng.normal(size=(6, 4)), rng.integers(0, 4, 6)
    for found, row, label in zip(logit_confidence(logits, labels), logits, labels, strict=True):
        with mpmath.workdps(800):
            powers = [mpmath.exp(float(z)) for z in row]
            p = powers[label] / mpmath.fsum(powers)
            assert found == pytest.approx(float(mpmath.log(p / (1 - p))), rel=1e-12)


def test_scores_are_log_ratios_of_gaussians_with_common_variances() -> None:
    confidences, members = synthetic(9, 7, 1.5, 1)
    scores = lira_scores(confidences[0], confidences[1:], members[1:])

    def density(x: float, kind: bool, example: int) -> mpmath.mpf:
        groups = [[c for c, m in zip(confidences[1:, n], members[1:, n], strict=True) if m == kind] for n in range(7)]
        means = [math.fsum(group) / len(group) for group in groups]
        squares = math.fsum((c - mean) ** 2 for group, mean in zip(groups, means, strict=True) for c in group)
        deviation = math.sqrt(squares / sum(len(group) - 1 for group in groups))
        return mpmath.npdf(x, means[example], deviation)

    for n in range(7):
        expected = mpmath.log(density(confidences[0, n], True, n) / density(confidences[0, n], False, n))
        assert scores[n] == pytest.approx(float(expected), rel=1e-9)


def test_each_model_is_attacked_with_the_others_alone() -> None:
    confidences, members = synthetic(8, 20, 1.0, 2)
    scores = leave_out_scores(confidences, members)
    changed = members.copy()
    changed[3] = ~changed[3]  # what it was trained on is what is asked: it must not matter
    assert np.array_equal(leave_out_scores(confidences, changed)[3], scores[3])
    others, of_others = np.delete(confidences, 3, 0), np.delete(members, 3, 0)
    assert np.array_equal(scores[3], lira_scores(confidences[3], others, of_others))


def test_chance_is_even_for_pairs_that_share_out_the_examples() -> None:
    """With its other half among the shadow models, a model's own membership would show in their numbers."""
    rng = np.random.default_rng(6)
    first = rng.permuted(np.tile(np.arange(4000) % 2 == 0, (3, 1)), axis=1)
    members = np.stack([part for half in first for part in (half, ~half)])
    confidences = rng.normal(size=members.shape)
    for together, even in ((2, True), (1, False)):
        right = (leave_out_scores(confidences, members, together) > 0) == members
        assert (abs(right.mean() - 0.5) < 0.015) == even
    with pytest.raises(ValueError, match="cannot be left out 4 at a time"):
        leave_out_scores(confidences, members, 4)


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_with_many_shadow_models_it_is_as_good_as_the_best_test(shift: float) -> None:
    """Neyman and Pearson: between N(0, 1) and N(shift, 1), TPR = Φ(Φ⁻¹(FPR) + shift); whatever the examples' means."""
    confidences, members = synthetic(128, 400, shift, 3)
    scores = leave_out_scores(confidences, members)
    for fpr in (0.5, 0.1, 0.01):
        best = float(mpmath.ncdf(math.sqrt(2) * mpmath.erfinv(2 * fpr - 1) + shift))
        assert tpr_at_fpr(scores, members, fpr).share == pytest.approx(best, abs=0.025)


def test_rates_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(4)
    scores, members = rng.integers(0, 30, 500).astype(float), rng.random(500) < 0.4  # with ties
    false, true = roc(scores.reshape(5, 100), members.reshape(5, 100))
    expected = roc_curve(members, scores, drop_intermediate=False)
    assert np.allclose(false, expected[0], rtol=1e-14) and np.allclose(true, expected[1], rtol=1e-14)


def test_the_threshold_keeps_to_the_false_positive_rate() -> None:
    members = np.array([True, True, False, True, False, False, False, False])
    scores = np.arange(8.0)[::-1]
    assert tpr_at_fpr(scores, members, 0.0).hits == 2
    assert tpr_at_fpr(scores, members, 0.19).hits == 2
    assert tpr_at_fpr(scores, members, 0.2).hits == 3
    assert tpr_at_fpr(np.zeros(8), members, 0.9).hits == 0  # all or nothing


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (3, 10), (10, 10), (7, 20000)])
def test_intervals_are_those_of_clopper_and_pearson(hits: int, trials: int) -> None:
    found, expected = rate(hits, trials, 0.9), binomtest(hits, trials).proportion_ci(0.9, "exact")
    assert (found.low, found.high) == (pytest.approx(expected.low, rel=1e-9), pytest.approx(expected.high, rel=1e-9))
    assert found.share == hits / trials


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 8.0])
def test_the_ceiling_is_the_definition_of_privacy(epsilon: float) -> None:
    """P ≤ e^ε·Q + δ for "was in" and, with the worlds exchanged, for "was not"; searched for on a fine grid."""
    delta, grid = 0.01, np.linspace(0, 1, 20001)
    for fpr in (0.0, 0.001, 0.1, 0.5, 0.9, 1.0):
        allowed = (grid <= math.exp(epsilon) * fpr + delta) & (1 - fpr <= math.exp(epsilon) * (1 - grid) + delta)
        assert float(largest_tpr(fpr, epsilon, delta)) == pytest.approx(grid[allowed].max(), abs=1e-4)
    assert float(largest_tpr(0.001, math.inf, 0.0)) == 1


def test_the_gaussian_mechanism_touches_its_ceiling_and_never_crosses_it() -> None:
    fpr = np.logspace(-9, -0.01, 4000)
    tpr, ceiling = norm.sf(norm.isf(fpr) - 1.0), largest_tpr(fpr, gaussian_epsilon(1.0, 1e-5), 1e-5)
    assert (tpr <= ceiling + 1e-9).all() and (tpr / ceiling).max() > 0.999


def test_what_cannot_be_scored_is_refused() -> None:
    confidences, members = synthetic(6, 4, 0.0, 5)
    with pytest.raises(ValueError, match="did a training diverge"):
        lira_scores(np.full(4, np.nan), confidences, members)
    with pytest.raises(ValueError, match="train more of them"):
        lira_scores(confidences[0], confidences, np.ones_like(members))
    with pytest.raises(ValueError, match="two shadow models of a kind"):
        lira_scores(confidences[0], confidences[:2], np.stack([members[0], ~members[0]]))
    with pytest.raises(ValueError, match="members and of others"):
        roc(np.zeros(3), np.ones(3))
    with pytest.raises(ValueError, match="11 hits in 10 trials"):
        rate(11, 10)
