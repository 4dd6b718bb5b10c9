"""From guesses to a lower bound on ε: the mathematics of an audit, apart from what was trained.

An audit plays a game with a mechanism: a coin decides whether something (a *canary*) takes part, the auditor sees what
is released and guesses the coin. (ε, δ)-differential privacy limits how often guesses can be right; guesses that are
right more often than that, by more than luck allows, refute the claim. A *lower bound at confidence 1 − p* exceeds the
true ε in at most a share p of audits.

*One run* (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846): m canaries with a fair coin each in a single run; the
auditor guesses r of them and abstains from the others. For (ε, δ)-DP the number W of correct guesses keeps

    P[W ≥ v] ≤ P[B ≥ v] + 2mδ · max_{1 ≤ i ≤ v} P[v − i ≤ B < v] / i        B ~ Binomial(r, e^ε / (1 + e^ε))

(their theorem with δ, its maximum over i ≤ v: further ones are smaller). Nothing is assumed, and the price is that the
bound stays well below ε for mechanisms such as the Gaussian, whose leak is spread over many small hints. Where the
trade-off curve may be assumed to be Gaussian, :func:`~lora_dp.auditing.one_run_mu` is far tighter (Mahloujifar, Melis
and Chaudhuri 2024, arXiv 2410.22235).

*Two worlds*: many runs, half of them with the canary. A rule that says "it took part" errs with the rates α (false
positives) and β (false negatives), and (ε, δ)-DP demands α + e^ε β ≥ 1 − δ and β + e^ε α ≥ 1 − δ (Kairouz, Oh and
Viswanath 2015, arXiv 1311.0776). Both rates are bounded from above by Clopper and Pearson (1934), exactly, at half of
the error probability each. One pair of bounds serves every δ at once.

*Gaussian trade-off*: μ-GDP (Dong, Roth and Su 2019, arXiv 1905.02383) demands Φ⁻¹(1 − α) − Φ⁻¹(β) ≤ μ (as an audit:
Nasr et al. 2023, arXiv 2302.07956). It holds exactly for full batches with Gaussian noise, where it is what the engine
claims, and in the limit for many subsampled steps. The result is a bound *under that assumption*.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaln, log_expit, logsumexp, ndtr, ndtri
from scipy.stats import beta, binom

Floats = NDArray[np.float64]
_TOLERANCE = 1e-6
# No audit of fewer than 10¹⁰⁰ guesses says more; keeps a search finite.
_LARGEST = 250.0


def check_confidence(confidence: float) -> None:
    """Raises ValueError outside (0, 1)."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), not {confidence}: 0.95 lets one audit in twenty err.")


def _check_guesses(canaries: int, guesses: int, correct: int) -> None:
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"There cannot be {correct} correct ones among {guesses} guesses on {canaries} canaries.")


def one_run_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The most probable that so many correct guesses can be under (ε, δ)-DP (arXiv 2305.08846; see the module).

    Args:
        canaries: m, each included by a fair coin of its own.
        guesses: r, how many of them were guessed.
        correct: the number v of right guesses.
        epsilon, delta: the claim.

    Raises:
        ValueError: not 0 ≤ v ≤ r ≤ m.

    >>> round(one_run_p_value(canaries=100, guesses=100, correct=60, epsilon=0.1, delta=1e-5), 3)
    0.08
    """
    _check_guesses(canaries, guesses, correct)
    if correct == 0:
        return 1.0
    # Logarithms throughout: with thousands of guesses the tails are far below the smallest float.
    hit, miss = log_expit(epsilon), log_expit(-epsilon)
    below = np.arange(correct - 1, -1, -1.0)
    tail = float(binom.logsf(correct - 1, guesses, math.exp(hit)))
    if delta == 0:
        return min(math.exp(tail), 1.0)
    # scipy's logpmf takes the rate itself, whose complement is lost where e^ε is large.
    coefficients = -np.log(guesses + 1) - betaln(guesses - below + 1, below + 1)
    windows = np.logaddexp.accumulate(coefficients + below * hit + (guesses - below) * miss)
    worst = float(np.max(windows - np.log(np.arange(1.0, correct + 1))))
    return min(math.exp(min(float(logsumexp([tail, math.log(2 * canaries * delta) + worst])), 0.0)), 1.0)


def _first_crossing(p_value: Callable[[float], float], limit: float) -> float:
    """Where a p-value that grows with ε (or μ) first reaches ``limit``, from below; 0 if it starts above."""
    if p_value(0.0) > limit:
        return 0.0
    low, high = 0.0, 0.25
    while p_value(high) <= limit:
        low, high = high, min(high * 1.25, high + 1)
        if low >= _LARGEST:
            return low
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle) <= limit else (low, middle)
    return low


def one_run_epsilon(canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """The largest ε that one run refutes at ``delta``: every smaller one has a p-value of at most 1 − confidence.

    The number of guesses must have been fixed before looking.

    Args:
        canaries, guesses, correct: as for :func:`one_run_p_value`.
        delta: of the claim, in [0, 1).
        confidence: in (0, 1).

    Raises:
        ValueError: impossible counts, or a confidence outside (0, 1).

    >>> round(one_run_epsilon(canaries=100, guesses=100, correct=100, delta=1e-5, confidence=0.95), 2)
    3.49
    """
    check_confidence(confidence)
    return _first_crossing(lambda epsilon: one_run_p_value(canaries, guesses, correct, epsilon, delta), 1 - confidence)


def one_run_mu(canaries: int, guesses: int, correct: int, confidence: float) -> float:
    """The largest μ that one run refutes, *assuming a Gaussian trade-off curve* (arXiv 2410.22235, algorithm 3).

    With pᵢ the probability of exactly i correct guesses, rⱼ = Σ_{i ≥ j} (i / m)·pᵢ and hⱼ = Σ_{i ≥ j} ((r − i) / m)·pᵢ,
    μ-GDP demands that rⱼ₊₁ ≤ Φ(Φ⁻¹(hⱼ) + μ). From the tail at ``correct`` of probability 1 − confidence, the least
    h that this allows is followed down to j = 0, where r₀ + h₀ is the share of canaries guessed: more is impossible.

    Args:
        canaries, guesses, correct: as for :func:`one_run_p_value`.
        confidence: in (0, 1).

    Raises:
        ValueError: impossible counts, or a confidence outside (0, 1).

    >>> round(one_run_mu(canaries=100, guesses=100, correct=100, confidence=0.95), 2)
    1.7
    """
    check_confidence(confidence)
    _check_guesses(canaries, guesses, correct)
    if correct == 0:
        return 0.0
    tail = 1 - confidence

    def possible(mu: float) -> bool:
        right, wrong = tail * correct / canaries, tail * (guesses - correct) / canaries
        for i in range(correct - 1, -1, -1):
            least = float(ndtr(ndtri(min(right, 1.0)) - mu))
            if least > wrong:
                right, wrong = right + i / (guesses - i) * (least - wrong), least
        return right + wrong <= guesses / canaries

    return _first_crossing(lambda mu: float(possible(mu)), 0.5)


def count_correct(scores: ArrayLike, included: ArrayLike, guesses: int) -> int:
    """How many guesses are right: the highest scores are guessed to have taken part, the lowest not, as many of each.

    Args:
        scores: (m,), higher where participation is likelier.
        included: (m,) bool, the coins.
        guesses: r; of an odd number one more is guessed to have taken part.

    Raises:
        ValueError: a score that is not a number, or more guesses than canaries.
    """
    values, coins = np.asarray(scores, dtype=np.float64), np.asarray(included, dtype=bool)
    if values.shape != coins.shape or np.isnan(values).any():
        raise ValueError("Every canary needs one coin and one score that is a number: did the training diverge?")
    if not 0 <= guesses <= values.size:
        raise ValueError(f"{guesses} guesses cannot be made on {values.size} canaries.")
    order = np.argsort(values, kind="stable")
    low = guesses // 2
    return int((~coins[order[:low]]).sum() + coins[order[values.size - (guesses - low) :]].sum())


def clopper_pearson_upper(errors: ArrayLike, trials: int, confidence: float) -> Floats:
    """Upper bound on an error rate after ``errors`` in ``trials``, exact at ``confidence`` (Clopper and Pearson 1934).

    Args:
        errors: any shape.
        trials: at least 1.
        confidence: in (0, 1), one-sided.

    >>> clopper_pearson_upper([0, 5, 100], trials=100, confidence=0.95).round(3)
    array([0.03 , 0.102, 1.   ])
    """
    check_confidence(confidence)
    k = np.asarray(errors, dtype=np.float64)
    return np.where(k < trials, beta.ppf(confidence, k + 1, np.maximum(trials - k, 1e-9)), 1.0)


def two_world_epsilon(false_positive: ArrayLike, false_negative: ArrayLike, delta: ArrayLike) -> Floats:
    """The least ε ≥ 0 at which error rates no larger than these are possible at ``delta`` (arXiv 1311.0776).

    Args:
        false_positive, false_negative: α and β, upper bounds, of any shapes that broadcast.
        delta: likewise.

    >>> round(float(two_world_epsilon(false_positive=0.05, false_negative=0.05, delta=1e-5)), 2)
    2.94
    """
    a, b, d = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (false_positive, false_negative, delta)))
    with np.errstate(divide="ignore", invalid="ignore"):  # not a number where the rates exclude nothing
        one, other = np.log((1 - d - b) / a), np.log((1 - d - a) / b)
    return cast(Floats, np.fmax(np.fmax(one, other), 0.0))


def two_world_mu(false_positive: ArrayLike, false_negative: ArrayLike) -> Floats:
    """The least μ at which such error rates are possible, *assuming a Gaussian trade-off curve* (arXiv 1905.02383).

    >>> round(float(two_world_mu(false_positive=0.05, false_negative=0.05)), 2)
    3.29
    """
    a, b = np.asarray(false_positive, dtype=np.float64), np.asarray(false_negative, dtype=np.float64)
    return cast(Floats, np.maximum(-ndtri(a) - ndtri(b), 0.0))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """ε at ``delta`` of a μ-GDP mechanism, that is of Gaussian noise with deviation 1 / μ (arXiv 1805.06530).

    >>> round(gaussian_epsilon(mu=1.0, delta=1e-5), 2)  # one step on all examples, noise multiplier 1
    4.38
    """
    from dp_accounting import get_epsilon_gaussian

    return float(get_epsilon_gaussian(1 / mu, delta)) if mu > 0 else 0.0


def choose_threshold(
    out: ArrayLike, inside: ArrayLike, strength: Callable[[Floats, Floats], Any], confidence: float
) -> float:
    """The threshold with the strongest bound on these scores; what it is tested on must be others.

    Args:
        out, inside: scores of runs without and with the canary.
        strength: of upper bounds on α and β, arrays of equal shape; larger is better.
        confidence: of the test to come.

    Returns:
        The threshold t. "It took part" is said where a score is at least t.
    """
    without, present = np.sort(np.asarray(out, dtype=np.float64)), np.sort(np.asarray(inside, dtype=np.float64))
    # Between neighbours, so that scores to come fall on either side of a gap.
    values = np.unique(np.concatenate([without, present]))
    thresholds = (values[1:] + values[:-1]) / 2 if values.size > 1 else values
    # Stricter than the test, so that of thousands of thresholds none wins by luck.
    positives, negatives = error_bounds(without, present, thresholds, 1 - (1 - confidence) / 100)
    return float(thresholds[int(np.argmax(strength(positives, negatives)))])


def error_bounds(out: ArrayLike, inside: ArrayLike, threshold: ArrayLike, confidence: float) -> tuple[Floats, Floats]:
    """Upper bounds on α and β that hold together at ``confidence``, for thresholds not chosen on these scores.

    Args:
        out, inside: scores of independent runs without and with the canary.
        threshold: any shape.
        confidence: in (0, 1); each bound takes half of what is left.
    """
    without, present = np.sort(np.asarray(out, dtype=np.float64)), np.sort(np.asarray(inside, dtype=np.float64))
    each = 1 - (1 - confidence) / 2
    positives = without.size - np.searchsorted(without, threshold, side="left")
    negatives = np.searchsorted(present, threshold, side="left")
    return (clopper_pearson_upper(positives, without.size, each), clopper_pearson_upper(negatives, present.size, each))
