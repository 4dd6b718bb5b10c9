"""Membership inference: who was in the training data? The likelihood-ratio attack (LiRA) and how to count its success.

LiRA (Carlini et al. 2022, arXiv 2112.03570) trains *shadow models* on random halves of a pool of examples. Of each
example it then knows how confident models are that have seen it, and models that have not, takes both for Gaussians,
and asks of a new model which of the two its confidence fits better. With few shadow models the variances are shared by
all examples, as the paper advises (section V-C).

An attack's success is a *lower* bound on what leaks: another attack may do better. What (ε, δ)-differential privacy
promises is the ceiling :func:`largest_tpr`, for every attack there is.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp
from scipy.stats import norm

from lora_dp.auditing.bounds import check_confidence, clopper_pearson_upper

Floats = NDArray[np.float64]


def logit_confidence(logits: ArrayLike, labels: ArrayLike) -> Floats:
    """ln(p / (1 − p)) of the probability p of each example's own class (arXiv 2112.03570, section IV-C): near Gaussian.

    Args:
        logits: (N, classes), of a model.
        labels: (N,) int, the examples' classes.

    Returns:
        (N,) float64; finite where the logits are, however sure the model is.
    """
    scores, classes = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    own = np.take_along_axis(scores, classes[:, None], axis=1)
    others = scores.copy()
    np.put_along_axis(others, classes[:, None], -np.inf, axis=1)
    return own[:, 0] - np.asarray(logsumexp(others, axis=1))


def lira_scores(target: ArrayLike, shadows: ArrayLike, members: ArrayLike) -> Floats:
    """ln of the likelihood ratio "was in" to "was not", of each example in one target model (online LiRA).

    Args:
        target: (N,), :func:`logit_confidence` of the examples in the model under attack.
        shadows: (M, N), the same in the shadow models.
        members: (M, N) bool, what each of them was trained on.

    Returns:
        (N,) float64, higher where membership is likelier.

    Raises:
        ValueError: a confidence that is not finite, or an example that all shadow models, or none, were trained on.
    """
    seen, known, inside = (np.asarray(target, np.float64), np.asarray(shadows, np.float64), np.asarray(members, bool))
    if not (np.isfinite(seen).all() and np.isfinite(known).all()):
        raise ValueError("Every confidence must be a finite number: did a training diverge?")
    if not (inside.any(axis=0).all() and (~inside).any(axis=0).all()):
        raise ValueError("Every example must be in some shadow model and out of another: train more of them.")
    ratio = np.zeros_like(seen)
    for sign, chosen in ((1, inside), (-1, ~inside)):
        counts = chosen.sum(axis=0)
        means = (known * chosen).sum(axis=0) / counts
        freedom = (counts - 1).sum()
        if freedom == 0:
            raise ValueError("No example has two shadow models of a kind, to tell a variance from: train more of them.")
        variance = (np.square(known - means) * chosen).sum() / freedom
        # Never 0, for models that are all alike.
        ratio += sign * norm.logpdf(seen, means, np.sqrt(max(variance, 1e-12)))
    return ratio


def leave_out_scores(confidences: ArrayLike, members: ArrayLike, together: int = 1) -> Floats:
    """Each model attacked with others as its shadow models: (M, N) :func:`lira_scores`.

    Args:
        confidences: (M, N), :func:`logit_confidence` of the examples in each model.
        members: (M, N) bool, what each was trained on.
        together: so many models in a row are left out at a time. 2 for pairs that share out all examples between them:
            the other half of a pair would betray by its own membership what it is asked to help to guess.

    Raises:
        ValueError: M is no multiple of ``together``; what :func:`lira_scores` refuses.
    """
    known, inside = np.asarray(confidences, np.float64), np.asarray(members, bool)
    if len(known) % together:
        raise ValueError(f"{len(known)} models cannot be left out {together} at a time.")
    groups = np.arange(len(known)) // together
    return np.stack(
        [lira_scores(known[i], known[rest], inside[rest]) for i, rest in enumerate(groups[:, None] != groups)]
    )


def roc(scores: ArrayLike, members: ArrayLike) -> tuple[Floats, Floats]:
    """False and true positive rates of every threshold, from (0, 0) to (1, 1); equal scores stand or fall together.

    Args:
        scores: any shape, higher where membership is likelier.
        members: bool, of the same shape.

    Raises:
        ValueError: no members, or nothing else.
    """
    values, inside = np.ravel(np.asarray(scores, np.float64)), np.ravel(np.asarray(members, bool))
    if inside.all() or not inside.any():
        raise ValueError("Rates need scores of members and of others.")
    order = np.argsort(-values, kind="stable")
    last = np.flatnonzero(np.append(np.diff(values[order]) != 0, True))
    hits = inside[order]
    false, true = np.cumsum(~hits)[last] / (~hits).sum(), np.cumsum(hits)[last] / hits.sum()
    return np.append(0.0, false), np.append(0.0, true)


@dataclass(frozen=True)
class Rate:
    """A share with its interval (Clopper and Pearson 1934), as if the trials were independent of each other.

    Attributes:
        hits, trials: the share is one over the other.
        low, high: exact bounds, together at the confidence that was asked for.
    """

    hits: int
    trials: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """hits / trials."""
        return self.hits / self.trials


def rate(hits: int, trials: int, confidence: float = 0.95) -> Rate:
    """A share with its two-sided interval.

    Raises:
        ValueError: hits above trials, no trials, or a confidence outside (0, 1).
    """
    check_confidence(confidence)
    if not 0 <= hits <= trials or trials < 1:
        raise ValueError(f"There cannot be {hits} hits in {trials} trials.")
    each = 1 - (1 - confidence) / 2
    low = 1 - float(clopper_pearson_upper(trials - hits, trials, each))
    return Rate(hits, trials, low, float(clopper_pearson_upper(hits, trials, each)))


def tpr_at_fpr(scores: ArrayLike, members: ArrayLike, fpr: float, confidence: float = 0.95) -> Rate:
    """True positive rate at the lowest threshold whose false positive rate does not exceed ``fpr``.

    The threshold is read off the same scores, as is usual for this figure; the interval does not know of that.

    Args:
        scores, members: as for :func:`roc`.
        fpr: in [0, 1].
        confidence: of the interval.
    """
    false, true = roc(scores, members)
    trials = int(np.asarray(members, bool).sum())
    best = true[np.searchsorted(false, fpr, side="right") - 1]
    return rate(round(float(best) * trials), trials, confidence)


def largest_tpr(fpr: ArrayLike, epsilon: float, delta: float) -> Floats:
    """The most that any attack's true positive rate can be under (ε, δ)-DP (Kairouz et al. 2015, arXiv 1311.0776).

    min(e^ε·FPR + δ, 1 − e^(−ε)·(1 − δ − FPR), 1).

    Args:
        fpr: false positive rates, any shape.
        epsilon: inf is a ceiling of 1.
        delta: in [0, 1].
    """
    false = np.asarray(fpr, dtype=np.float64)
    if np.isinf(epsilon):
        return np.ones_like(false)
    return np.minimum(np.minimum(np.exp(epsilon) * false + delta, 1 - np.exp(-epsilon) * (1 - delta - false)), 1.0)
