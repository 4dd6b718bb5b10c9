"""``audit``: train with canaries, guess which took part, and say how large ε must at least be."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch

from lora_dp.auditing.bounds import (
    Floats,
    check_confidence,
    choose_threshold,
    count_correct,
    error_bounds,
    gaussian_epsilon,
    one_run_epsilon,
    one_run_mu,
    two_world_epsilon,
    two_world_mu,
)
from lora_dp.auditing.canaries import Canaries
from lora_dp.extras import needing
from lora_dp.privacy.accounting import check_delta

Test = Literal["one-run", "two-world"]
Assumption = Literal["nothing", "gaussian", "independent", "independent gaussian"]
# ε as a function of δ.
Claim = Callable[[float], float]

# Of the canaries, what is tried where the number of guesses is left open; each pays for the others.
_SHARES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
# Where a claim that is known at every δ is tested in two worlds.
_DELTAS = (1e-5, 1e-4, 1e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class AuditResult:
    """What an audit has found.

    Attributes:
        epsilon: lower bound on ε at ``delta``.
        claimed_epsilon: what the run claims at ``delta``.
        delta, confidence: a mechanism that keeps its claim is called violated in at most a share 1 − confidence of
            audits.
        test, assume: as given to :func:`~lora_dp.audit`.
        canaries: how many, in each run.
        runs: how many times was trained.
        guesses, correct: how many guesses the bound rests on, and how many of them were right.
        refuted: (δ, ε claimed there, lower bound there) where the claim fails, or None. Where error rates are measured
            (two worlds, or independent canaries), a claim known at every δ may fail at another than ``delta``.
        largest_epsilon: the bound that this audit would have reached, had it guessed everything right.
        within_reach: whether the claim would then have been refuted. An audit whose claim is out of its reach says
            nothing by not refuting it.
        repeated: two worlds whose trainings gave the same score again and again. Without noise that is as it must be;
            under a seed in ``train_fn`` it is one training counted many times, and the verdict is worth nothing.
        seed: of the coins and of where gradients were planted.

    >>> from lora_dp.auditing import ExampleCanaries
    >>> def train_fn(extra):  # keeps its examples as they are: nothing is private
    ...     return extra
    >>> canaries = ExampleCanaries(range(100), loss=lambda trained, example: float(example not in trained))
    >>> result = audit(train_fn, canaries, delta=1e-5, claimed_epsilon=1.0, seed=0)
    >>> result.verdict, result.guesses, result.correct
    ('violated', 50, 50)
    >>> round(result.epsilon, 2), result.claimed_epsilon
    (2.26, 1.0)
    """

    epsilon: float
    claimed_epsilon: float
    delta: float
    confidence: float
    test: Test
    assume: Assumption
    canaries: int
    runs: int
    guesses: int
    correct: int
    refuted: tuple[float, float, float] | None
    largest_epsilon: float
    within_reach: bool
    repeated: bool
    seed: int

    @property
    def violated(self) -> bool:
        """Whether the claim is refuted at the stated confidence.

        >>> result.violated
        True
        """
        return self.refuted is not None

    @property
    def verdict(self) -> Literal["violated", "not violated"]:
        """:attr:`violated` in words.

        >>> result.verdict
        'violated'
        """
        return "violated" if self.violated else "not violated"

    def __str__(self) -> str:
        words = {"independent": "independent canaries", "gaussian": "a Gaussian trade-off"}
        assumed = " and ".join(text for name, text in words.items() if name in self.assume)
        assuming = f", assuming {assumed}" if assumed else ""
        text = (
            f"{self.verdict}: ε ≥ {self.epsilon:.3g} at δ = {self.delta:g} with confidence {self.confidence:.3g}"
            f"{assuming} ({self.correct} of {self.guesses} guesses right); claimed: ε = {self.claimed_epsilon:.3g}"
        )
        if self.refuted is not None and self.refuted[0] != self.delta:
            text += (
                f", and at δ = {self.refuted[0]:g} ε = {self.refuted[1]:.3g} where it is at least {self.refuted[2]:.3g}"
            )
        if not self.violated and not self.within_reach and np.isfinite(self.claimed_epsilon):
            text += (
                f". That is out of this audit's reach, which is ε = {self.largest_epsilon:.3g}: take more "
                "canaries or more runs"
            )
        if self.repeated:
            text += (
                ". Trainings gave the same score again and again: without noise they must, but if train_fn sets a "
                "seed, leave it out, for then this verdict is worth nothing"
            )
        return text

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the lower bound against the claimed ε; the file's ending gives the format.

        >>> result.plot("audit.png")
        """
        plot_audits({self.test: [self]}, path)


def audit(
    train_fn: Callable[..., Any],
    canaries: Canaries,
    *,
    delta: float,
    claimed_epsilon: float | Claim | None = None,
    confidence: float = 0.95,
    test: Test = "one-run",
    assume: Assumption = "nothing",
    guesses: int | None = None,
    runs: int = 400,
    seed: int | None = None,
) -> AuditResult:
    """Test a training's claim of (ε, δ)-differential privacy, for one example added or removed.

    Args:
        train_fn: trains from scratch, with fresh randomness each time: no seed. Called with what ``canaries`` hands to
            it: ``plant`` for :class:`~lora_dp.auditing.GradientCanaries`, a list of examples to train on beside
            the data for :class:`~lora_dp.auditing.ExampleCanaries`.
        canaries: what to plant. "two-world" plants one.
        delta: δ of the claim, in (0, 1).
        claimed_epsilon: ε, or ε as a function of δ. None takes the ledger of the planted optimizer.
        confidence: of the lower bound and of the verdict, in (0, 1).
        test: "one-run": one training run with many canaries; "two-world": ``runs`` training runs, with and without the
            one canary by turns, the threshold chosen on one half of them and tested on the other.
        assume: "nothing"; "gaussian": that the trade-off curve is Gaussian, exact for full batches; "independent"
            (one-run): that canaries leak independently of each other, as coordinates under independent noise and
            draws do, so that one run is as good as many (as in Andrew et al. 2023, arXiv 2302.03098); or "independent
            gaussian". A bound under an assumption is far tighter, and worth as much as the assumption.
        guesses: one-run: how many canaries to guess, fixed before looking. None tries seven numbers and pays for it
            (Bonferroni).
        runs: two-world: a multiple of 4.
        seed: of the coins and of where gradients are planted; None draws one.

    Raises:
        ValueError: a number out of range, no claim to test, or scores that are not finite.

    >>> from lora_dp import DPLinear, PrivacyEngine
    >>> from lora_dp.auditing import GradientCanaries
    >>> def train_fn(plant):
    ...     model = DPLinear(20, 5)
    ...     model, optimizer, loader = PrivacyEngine().make_private(
    ...         model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
    ...         data_loader=torch.utils.data.DataLoader(torch.randn(32, 20), batch_size=32),
    ...         noise_multiplier=2.0, max_grad_norm=1.0)
    ...     plant(optimizer, loader)  # the one line that an audit needs
    ...     for x in loader:
    ...         optimizer.backward(model(x).square().sum(1))
    ...         optimizer.step()
    >>> result = audit(train_fn, GradientCanaries(count=100), delta=1e-5)
    >>> result.verdict, round(result.claimed_epsilon, 2)
    ('not violated', 1.99)
    """
    check_delta(delta)
    check_confidence(confidence)
    if test not in get_args(Test) or assume not in get_args(Assumption):
        raise ValueError(
            f"Unknown audit '{test}' assuming '{assume}': choose one of {', '.join(get_args(Test))}, and of "
            f"{', '.join(get_args(Assumption))}."
        )
    if "independent" in assume and (test == "two-world" or guesses is not None):
        raise ValueError("Independent canaries are an assumption on one run, in which every canary is guessed.")
    if claimed_epsilon is not None and not callable(claimed_epsilon) and not claimed_epsilon >= 0:
        raise ValueError(f"claimed_epsilon must be 0 or more, not {claimed_epsilon}.")
    generator = torch.Generator()
    seed = generator.seed() if seed is None else generator.manual_seed(seed).initial_seed()
    game = _Game(train_fn, canaries, claimed_epsilon, generator, np.random.default_rng(seed % 2**63), seed)
    if test == "two-world":
        return _two_world(game, delta, confidence, assume, runs)
    if "independent" in assume:
        return _independent(game, delta, confidence, assume)
    return _one_run(game, delta, confidence, assume, guesses)


@dataclass
class _Game:
    """Training runs with canaries, and the claim that they make."""

    train_fn: Callable[..., Any]
    canaries: Canaries
    claimed: float | Claim | None
    generator: torch.Generator
    coins: np.random.Generator
    seed: int

    def play(self, included: np.ndarray) -> Floats:
        scores, ledger = self.canaries.play(self.train_fn, included, self.generator)
        if not np.isfinite(scores).all():
            raise ValueError("A canary's score is not a finite number: did the training diverge?")
        if self.claimed is None:
            if ledger is None:
                raise ValueError("There is no ledger to take the claim from: give claimed_epsilon.")
            self.claimed = ledger.epsilon
        return scores

    def claim(self, delta: float) -> float:
        assert self.claimed is not None
        return float(self.claimed(delta) if callable(self.claimed) else self.claimed)


def _one_run(game: _Game, delta: float, confidence: float, assume: Assumption, guesses: int | None) -> AuditResult:
    m = game.canaries.count
    if guesses is not None and not 1 <= guesses <= m:
        raise ValueError(f"guesses must lie between 1 and the {m} canaries, not {guesses}.")
    tried = sorted({max(1, round(share * m)) for share in _SHARES}) if guesses is None else [guesses]
    included = game.coins.random(m) < 0.5
    scores = game.play(included)
    each = 1 - (1 - confidence) / len(tried)

    def bound_of(number: int, correct: int) -> float:
        if "gaussian" in assume:
            return gaussian_epsilon(one_run_mu(m, number, correct, each), delta)
        return one_run_epsilon(m, number, correct, delta, each)

    found = [(number, count_correct(scores, included, number)) for number in tried]
    bound, number, correct = max((bound_of(*guessed), *guessed) for guessed in found)
    largest, claimed = max(bound_of(number, number) for number in tried), game.claim(delta)
    return AuditResult(
        bound,
        claimed,
        delta,
        confidence,
        "one-run",
        assume,
        m,
        1,
        number,
        correct,
        (delta, claimed, bound) if bound > claimed else None,
        largest,
        largest > claimed,
        False,
        game.seed,
    )


def _two_world(game: _Game, delta: float, confidence: float, assume: Assumption, runs: int) -> AuditResult:
    if game.canaries.count != 1:
        raise ValueError(f"The two-world test needs exactly one canary, not {game.canaries.count}.")
    if runs < 8 or runs % 4:
        raise ValueError(f"runs must be a multiple of 4 and at least 8, not {runs}: half of them choose the threshold.")
    out, inside = np.empty(runs // 2), np.empty(runs // 2)
    for i in range(runs // 2):
        out[i] = game.play(np.array([False]))[0]
        inside[i] = game.play(np.array([True]))[0]
    return _judge(out, inside, game, delta, confidence, "two-world", assume, runs)


def _independent(game: _Game, delta: float, confidence: float, assume: Assumption) -> AuditResult:
    m = game.canaries.count
    included = game.coins.random(m) < 0.5
    scores = game.play(included)
    if min(included.sum(), m - included.sum()) < 2:
        raise ValueError(f"{m} canaries are too few to measure how often they are told apart: take a hundred or more.")
    return _judge(scores[~included], scores[included], game, delta, confidence, "one-run", assume, 1)


def _judge(
    out: Floats, inside: Floats, game: _Game, delta: float, confidence: float, test: Test, assume: Assumption, runs: int
) -> AuditResult:
    """From the scores of independent trials in both worlds; the first half of each chooses the threshold."""
    # A claim that is known at every δ is tested at many: the same bounds on the error rates hold for all.
    gaussian = "gaussian" in assume
    known = callable(game.claimed) and not gaussian
    deltas = np.array(sorted({delta, *_DELTAS}) if known else [delta])
    claims = np.array([game.claim(d) for d in deltas])

    def strength(positive: Floats, negative: Floats) -> Floats:
        if gaussian:
            return two_world_mu(positive, negative)
        if not known:
            return two_world_epsilon(positive, negative, delta) + 1e-3 * two_world_mu(positive, negative)
        excess = _excess(positive, negative, deltas, claims)
        # Where the claim stands on these scores, the clearest separation of the two worlds.
        return excess if excess.max() > 0 else two_world_mu(positive, negative)

    (choose_out, test_out), (choose_in, test_in) = (np.split(part, [part.size // 2]) for part in (out, inside))
    threshold = choose_threshold(choose_out, choose_in, strength, confidence)

    def bounds_of(without: Floats, present: Floats, cut: float) -> Floats:
        positive, negative = error_bounds(without, present, np.array([cut]), confidence)
        if gaussian:
            return np.array([gaussian_epsilon(float(two_world_mu(positive, negative)[0]), delta)])
        return two_world_epsilon(positive, negative, deltas)

    found = bounds_of(test_out, test_in, threshold)
    largest = bounds_of(np.zeros(test_out.size), np.ones(test_in.size), 0.5)
    refuted, refuting = None, np.flatnonzero(found > claims)
    if refuting.size:
        at = refuting[int(np.argmax((found - claims)[refuting]))]
        refuted = (float(deltas[at]), float(claims[at]), float(found[at]))
    here = deltas.tolist().index(delta)
    return AuditResult(
        float(found[here]),
        float(claims[here]),
        delta,
        confidence,
        test,
        assume,
        game.canaries.count,
        runs,
        test_out.size + test_in.size,
        int((test_out < threshold).sum() + (test_in >= threshold).sum()),
        refuted,
        float(largest[here]),
        bool((largest > claims).any()),
        test == "two-world" and max(np.unique(out).size, np.unique(inside).size) <= len(out) // 2,
        game.seed,
    )


def _excess(positive: Floats, negative: Floats, deltas: Floats, claims: Floats) -> Floats:
    """By how much the claim's own inequalities fail at most, over all δ: above 0 where two such rates refute it."""
    factors = np.exp(np.minimum(claims, 700.0))[:, None]
    return cast(
        Floats,
        (np.maximum(1 - negative - factors * positive, 1 - positive - factors * negative) - deltas[:, None]).max(0),
    )


def plot_audits(audits: dict[str, Sequence[AuditResult]], path: str | os.PathLike[str]) -> None:
    """Draw lower bounds against claimed ε, one series for each name; above the diagonal a claim is refuted.

    Args:
        audits: results by the name of their series.
        path: of the picture; its ending gives the format.

    Raises:
        ValueError: nothing to draw: no result with a finite claim.

    >>> from lora_dp.auditing import ExampleCanaries
    >>> canaries = ExampleCanaries(range(100), loss=lambda trained, example: float(example not in trained))
    >>> result = audit(list, canaries, delta=1e-5, claimed_epsilon=1.0)
    >>> plot_audits({"nothing is private": [result]}, "audit.png")
    """
    with needing("plot_audits", "fed"):
        from matplotlib.figure import Figure

    results = [result for series in audits.values() for result in series if np.isfinite(result.claimed_epsilon)]
    if not results:
        raise ValueError("There is nothing to draw: no audit has a finite claimed ε.")
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axes = figure.add_subplot(xlabel="claimed ε", ylabel=f"lower bound on ε, confidence {results[0].confidence:g}")
    right = 1.08 * max(result.claimed_epsilon for result in results)
    top = max(right, 1.08 * max(result.epsilon for result in results))
    axes.plot([0, right], [0, right], color="0.4", linewidth=1)
    axes.fill_between([0, right], [0, right], top, color="#c44e52", alpha=0.08, linewidth=0)
    axes.text(0.03 * right, 0.96 * top, "claim refuted", color="#a03a3e", va="top")
    for number, (name, series) in enumerate(audits.items()):
        drawn = [result for result in series if np.isfinite(result.claimed_epsilon)]
        axes.plot(
            [result.claimed_epsilon for result in drawn],
            [result.epsilon for result in drawn],
            marker="os^DvP"[number % 6],
            linewidth=1,
            label=name,
        )
        violated = [result for result in drawn if result.violated]
        axes.plot(
            [result.claimed_epsilon for result in violated],
            [result.epsilon for result in violated],
            "o",
            markersize=13,
            fillstyle="none",
            color="#c44e52",
        )
    axes.set(xlim=(0, right), ylim=(0, top))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(Path(path), dpi=150)
