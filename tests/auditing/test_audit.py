import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lora_dp import LoRAConfig, PrivacyEngine, inject_lora
from lora_dp.auditing import (
    AuditResult,
    ExampleCanaries,
    GradientCanaries,
    audit,
    gaussian_epsilon,
    one_run_epsilon,
    plot_audits,
)
from lora_dp.privacy import mechanism
from lora_dp.privacy.clipping import FlatClipping
from lora_dp.privacy.mechanism import Mechanism
from lora_dp.privacy.sampling import PoissonSampler
from tests.auditing.tiny import training

DELTA = 1e-5
# One step on everything at σ = 1 (μ = 1 exactly), and eight at a rate of 1/8.
FULL = {"noise_multiplier": 1.0, "steps": 1}
SAMPLED = {"noise_multiplier": 0.8, "batch_size": 8, "steps": 8}


def no_noise(bug: pytest.MonkeyPatch) -> None:
    bug.setattr(Mechanism, "noise_std", lambda self, size: 0.0)


def half_the_noise(bug: pytest.MonkeyPatch) -> None:
    whole = Mechanism.noise_std
    bug.setattr(Mechanism, "noise_std", lambda self, size: whole(self, size) / 2)


def no_clipping(bug: pytest.MonkeyPatch) -> None:
    bug.setattr(mechanism, "_KERNEL_RULES", {})
    bug.setattr(FlatClipping, "coefficients", lambda self, sq_norms, layers, count: torch.ones_like(sq_norms))


def everybody_joins(bug: pytest.MonkeyPatch) -> None:
    bug.setattr(PoissonSampler, "draw", lambda self: list(range(self.size)))


FAULTS: list[Callable[[pytest.MonkeyPatch], None]] = [no_noise, half_the_noise, no_clipping]


SEEDS = range(20)
# At a confidence of 0.95 one of 20 is expected to be called violated; more than three have a probability of 1.6 %.
FALSE_ALARMS = 3


class Noted(GradientCanaries):
    """Gradient canaries whose scores are kept, to be judged under another assumption."""

    scores: list[np.ndarray]

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", [])

    def play(self, train_fn: Any, included: np.ndarray, generator: torch.Generator) -> Any:
        played = super().play(train_fn, included, generator)
        self.scores.append(played.scores)
        return played

    def judged_again(self, claimed: float, **options: Any) -> AuditResult:
        """What :func:`audit` says of the same scores."""
        scores = iter(self.scores)
        return audit(None, Answers(self.count, lambda _: next(scores)), claimed_epsilon=claimed, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=[FULL, SAMPLED, {**FULL, "clipping": "automatic"}])
def played(request: pytest.FixtureRequest) -> tuple[dict[str, Any], list[tuple[Noted, float]]]:
    """Options of a training; of 20 seeds the canaries of a run and the ε that it claims."""
    found = []
    for seed in SEEDS:
        canaries = Noted(1000)
        result = audit(training(first_seed=seed, **request.param), canaries, delta=DELTA, seed=seed)
        assert result.claimed_epsilon is not None
        found.append((canaries, result.claimed_epsilon))
    return request.param, found


@pytest.mark.slow
@pytest.mark.parametrize("assume", ["nothing", "gaussian", "independent", "independent gaussian"])
def test_the_engine_passes_one_run_audits_of_20_seeds(played: Any, assume: Any) -> None:
    options, runs = played
    results = [
        canaries.judged_again(claimed, delta=DELTA, assume=assume, seed=seed)
        for seed, (canaries, claimed) in zip(SEEDS, runs, strict=True)
    ]
    assert sum(result.violated for result in results) <= FALSE_ALARMS
    assert all(result.epsilon > 0 for result in results) or options is SAMPLED
    assert np.mean([result.epsilon for result in results]) < results[0].claimed_epsilon


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "canaries"),
    [({**FULL, "clipping": "per_layer"}, GradientCanaries(400)), (SAMPLED, GradientCanaries(400, direction="random"))],
)
def test_the_engine_passes_with_other_canaries(options: dict[str, Any], canaries: GradientCanaries) -> None:
    violated = [
        audit(training(first_seed=seed, **options), canaries, delta=DELTA, assume="independent", seed=seed).violated
        for seed in SEEDS
    ]
    assert sum(violated) <= FALSE_ALARMS


# What test_planted_faults_are_violations_in_two_worlds finds faults with.
TWO_WORLDS: dict[str, Any] = {"delta": DELTA, "test": "two-world", "runs": 400}


@pytest.mark.long
def test_the_engine_passes_two_world_audits_of_20_seeds() -> None:
    violated = Counter[str]()
    for seed in SEEDS:
        canaries = Noted(1)
        result = audit(training(first_seed=seed, lr=0.0, **FULL), canaries, seed=seed, **TWO_WORLDS)
        assert result.claimed_epsilon is not None
        replayed = canaries.judged_again(result.claimed_epsilon, seed=seed, assume="gaussian", **TWO_WORLDS)
        violated.update(nothing=result.violated, gaussian=replayed.violated)
    assert max(violated.values()) <= FALSE_ALARMS


@pytest.mark.slow
def test_lower_bounds_come_close_to_the_engines_claim() -> None:
    """The tighter, the more is assumed: on average above a quarter, two fifths and three fifths of the truth."""
    assumptions: list[Any] = ["nothing", "gaussian", "independent gaussian"]
    bounds = np.array(
        [
            [
                audit(
                    training(first_seed=seed, **FULL), GradientCanaries(1400), delta=DELTA, assume=assume, seed=seed
                ).epsilon
                for assume in assumptions
            ]
            for seed in range(5)
        ]
    )
    share = bounds / gaussian_epsilon(1.0, DELTA)
    assert (share < 1).all() and (share.mean(0) > [0.25, 0.4, 0.6]).all()


@pytest.mark.slow
@pytest.mark.parametrize("options", [FULL, SAMPLED])
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_violations(
    fault: Callable[[pytest.MonkeyPatch], None], options: dict[str, Any], bug: pytest.MonkeyPatch
) -> None:
    fault(bug)
    for seed in range(3):
        result = audit(
            training(first_seed=seed, **options), GradientCanaries(1400), delta=DELTA, assume="independent", seed=seed
        )
        assert result.verdict == "violated", str(result)


@pytest.mark.parametrize("fault", [no_noise, no_clipping])
def test_gross_faults_are_violations_without_any_assumption(
    fault: Callable[[pytest.MonkeyPatch], None], bug: pytest.MonkeyPatch
) -> None:
    fault(bug)
    result = audit(training(**FULL), GradientCanaries(1400), delta=DELTA, seed=0)
    assert result.verdict == "violated" and result.correct == result.guesses, str(result)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_violations_in_two_worlds(
    fault: Callable[[pytest.MonkeyPatch], None], bug: pytest.MonkeyPatch
) -> None:
    """Nothing assumed; half the noise shows where δ is large, not at δ = 1e-5."""
    fault(bug)
    result = audit(training(lr=0.0, **FULL), GradientCanaries(1), seed=0, **TWO_WORLDS)
    assert result.violated, str(result)
    assert result.refuted is not None and result.refuted[2] > result.refuted[1] and result.refuted[0] > DELTA


def test_sampling_that_is_none_is_a_violation(bug: pytest.MonkeyPatch) -> None:
    everybody_joins(bug)
    result = audit(training(**SAMPLED), GradientCanaries(1000), delta=DELTA, assume="independent", seed=0)
    assert result.violated, str(result)


class Answers:
    """Canaries whose scores are made by a formula: μ-GDP noise on the coins, or any other."""

    def __init__(self, count: int, score: Callable[[np.ndarray], np.ndarray]):
        self.count, self.score = count, score

    def play(self, train_fn: Any, included: np.ndarray, generator: torch.Generator) -> Any:
        return self.score(included), None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("test", "count", "assume"),
    [
        ("one-run", 100, "nothing"),
        ("one-run", 100, "gaussian"),
        ("one-run", 100, "independent"),
        ("one-run", 100, "independent gaussian"),
        ("two-world", 1, "nothing"),
        ("two-world", 1, "gaussian"),
    ],
)
def test_a_true_claim_is_called_violated_as_seldom_as_stated(test: Any, count: int, assume: Any) -> None:
    """Scores of a mechanism that is exactly μ-GDP: whatever is chosen on data, guesses or thresholds, is paid for."""
    rng, mu, audits = np.random.default_rng(5), 1.0, 100
    canaries = Answers(count, lambda coins: coins * mu + rng.standard_normal(coins.size))
    violated = sum(
        audit(
            None,
            canaries,
            delta=DELTA,
            claimed_epsilon=lambda delta: gaussian_epsilon(mu, delta),  # type: ignore[arg-type]
            confidence=0.8,
            test=test,
            assume=assume,
            runs=100,
            seed=seed,
        ).violated
        for seed in range(audits)
    )
    assert violated <= 0.2 * audits + 3 * math.sqrt(audits * 0.16)


@pytest.mark.slow
def test_scores_without_information_never_fool_the_threshold() -> None:
    """ε = 0 is claimed and true: a threshold tested on the scores that chose it would find a violation often."""
    rng = np.random.default_rng(6)
    canaries = Answers(60, lambda coins: rng.standard_normal(coins.size))
    violated = sum(
        audit(None, canaries, delta=DELTA, claimed_epsilon=0.0, confidence=0.7, assume=assume, seed=seed).violated  # type: ignore[arg-type]
        for seed in range(150)
        for assume in ("nothing", "independent")
    )
    assert violated <= 0.3 * 300 + 3 * math.sqrt(300 * 0.21)


def test_the_runs_that_choose_the_threshold_are_not_those_that_test_it() -> None:
    """Two worlds that are told apart in the first half of the runs alone, which must not count."""
    played = iter(range(400))
    canaries = Answers(1, lambda coins: coins * float(next(played) < 200))
    result = audit(None, canaries, delta=DELTA, claimed_epsilon=0.0, test="two-world", runs=400, seed=0)  # type: ignore[arg-type]
    assert result.epsilon == 0 and not result.violated and (result.correct, result.guesses) == (100, 200)


def test_seven_numbers_of_guesses_are_paid_for_and_one_is_not() -> None:
    canaries = Answers(200, lambda coins: coins.astype(float))
    for guesses, error in ((None, 0.05 / 7), (100, 0.05)):
        result = audit(None, canaries, delta=DELTA, claimed_epsilon=9.0, guesses=guesses, seed=0)  # type: ignore[arg-type]
        assert result.guesses >= 100 and result.guesses == (guesses or result.guesses)
        assert result.epsilon == one_run_epsilon(200, result.guesses, result.correct, DELTA, 1 - error) > 2


Example = tuple[Tensor, Tensor]


def black_box(noise_multiplier: float) -> tuple[Callable[[Sequence[Example]], nn.Module], ExampleCanaries]:
    """A user's own training on own data, and canaries of random images with random labels."""
    torch.manual_seed(1)
    inputs, targets = torch.randn(40, 64), torch.randint(0, 4, (40,))
    canaries = list(zip(2 * torch.randn(80, 64), torch.randint(0, 4, (80,)), strict=True))

    def train_fn(extra: Sequence[Example]) -> nn.Module:
        torch.manual_seed(2)
        model = inject_lora(
            nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)),
            LoRAConfig(r=8, alpha=8, target_modules=["0"], trainable_modules=["2"]),
        )
        data = TensorDataset(
            torch.stack([*inputs, *(x for x, _ in extra)]), torch.stack([*targets, *(y for _, y in extra)])
        )
        model, optimizer, loader = PrivacyEngine(reproducible_seed=3).make_private(
            model=model,
            optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=2.0),
            data_loader=DataLoader(data, batch_size=len(data)),
            noise_multiplier=noise_multiplier,
            max_grad_norm=1.0,
        )
        model.train()
        for x, y in loader.take(60):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return model.eval()

    def loss(model: nn.Module, example: Example) -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(example[0][None]), example[1][None]))

    return train_fn, ExampleCanaries(canaries, loss)


@pytest.mark.slow
def test_examples_in_the_data_betray_a_training_without_noise_and_not_one_with_it() -> None:
    claimed = 1.0
    train_fn, canaries = black_box(noise_multiplier=0.0)
    caught = audit(train_fn, canaries, delta=DELTA, claimed_epsilon=claimed, seed=0)
    assert caught.violated and caught.epsilon > claimed, str(caught)
    train_fn, canaries = black_box(noise_multiplier=30.0)
    assert not audit(train_fn, canaries, delta=DELTA, claimed_epsilon=claimed, seed=0).violated


LEFT: dict[str, Any] = {"largest_epsilon": 4.0, "within_reach": True, "repeated": False, "seed": 0}


def test_a_result_says_what_was_found() -> None:
    result = AuditResult(1.25, 1.0, DELTA, 0.95, "one-run", "nothing", 100, 1, 50, 46, (DELTA, 1.0, 1.25), **LEFT)
    assert str(result) == (
        "violated: ε ≥ 1.25 at δ = 1e-05 with confidence 0.95 (46 of 50 guesses right); claimed: ε = 1"
    )
    other = AuditResult(
        0.5, 1.0, DELTA, 0.95, "one-run", "independent gaussian", 100, 1, 50, 46, (0.1, 0.2, 0.4), **LEFT
    )
    assert "independent canaries and a Gaussian trade-off" in str(other)
    assert str(other).endswith("claimed: ε = 1, and at δ = 0.1 ε = 0.2 where it is at least 0.4")


def test_an_audit_that_could_refute_nothing_says_so() -> None:
    def perfect(coins: np.ndarray) -> np.ndarray:
        return coins + 0.1 * np.random.default_rng(7).random(coins.size)

    for count, test, assume, runs in (
        (100, "one-run", "nothing", 400),
        (100, "one-run", "gaussian", 400),
        (200, "one-run", "independent", 400),
        (1, "two-world", "nothing", 100),
    ):
        settings: Any = {"delta": DELTA, "test": test, "assume": assume, "runs": runs, "seed": 0}
        found = audit(None, Answers(count, perfect), claimed_epsilon=0.5, **settings)  # type: ignore[arg-type]
        assert found.violated and found.within_reach
        # Coins that do not fall half and half leave a little out of reach.
        assert 0.6 * found.largest_epsilon < found.epsilon <= found.largest_epsilon
        far = audit(None, Answers(count, perfect), claimed_epsilon=60.0, **settings)  # type: ignore[arg-type]
        assert not far.violated and not far.within_reach and far.largest_epsilon == found.largest_epsilon
        assert f"out of this audit's reach, which is ε = {far.largest_epsilon:.3g}" in str(far)


@pytest.mark.slow
def test_a_training_under_a_seed_is_one_training_and_that_is_said() -> None:
    """A sound training whose noise is the same each time looks as if it had none."""
    train_fn, canaries = black_box(noise_multiplier=10.0)
    one = ExampleCanaries(canaries.examples[:1], canaries.loss)
    result = audit(train_fn, one, delta=DELTA, claimed_epsilon=8.0, test="two-world", runs=16, seed=0)
    assert result.repeated and "if train_fn sets a seed, leave it out" in str(result)
    fresh = audit(training(lr=0.0, **FULL), GradientCanaries(1), delta=DELTA, test="two-world", runs=16, seed=0)
    assert not fresh.repeated and "seed" not in str(fresh)


@pytest.mark.slow
def test_a_plot_has_every_result_against_its_claim(tmp_path: Path) -> None:
    kept = AuditResult(0.5, 1.0, DELTA, 0.95, "one-run", "nothing", 100, 1, 50, 40, None, **LEFT)
    broken = AuditResult(3.0, 1.0, DELTA, 0.95, "one-run", "nothing", 100, 1, 50, 50, (DELTA, 1.0, 3.0), **LEFT)
    kept.plot(tmp_path / "one.png")
    plot_audits({"engine": [kept], "broken": [broken]}, tmp_path / "both.svg")
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "both.svg").read_text()
    unclaimed = AuditResult(3.0, math.inf, DELTA, 0.95, "one-run", "nothing", 100, 1, 50, 50, None, **LEFT)
    with pytest.raises(ValueError, match="nothing to draw"):
        unclaimed.plot(tmp_path / "none.png")


@pytest.mark.slow
def test_a_run_that_claims_nothing_violates_nothing() -> None:
    result = audit(training(noise_multiplier=0.0, steps=1), GradientCanaries(500), delta=DELTA, seed=0)
    assert result.claimed_epsilon == math.inf and not result.violated and result.epsilon > 3
    worlds = audit(
        training(noise_multiplier=0.0, steps=1), GradientCanaries(1), delta=DELTA, test="two-world", runs=16, seed=0
    )
    assert worlds.claimed_epsilon == math.inf and not worlds.violated


def test_wrong_audits_are_refused() -> None:
    def nothing(plant: Any) -> None: ...

    canaries = GradientCanaries(10)
    cases: list[tuple[str, type[Exception], dict[str, Any]]] = [
        ("No canary was planted", RuntimeError, {}),
        ("exactly one canary, not 10", ValueError, {"test": "two-world"}),
        ("multiple of 4", ValueError, {"test": "two-world", "canaries": GradientCanaries(1), "runs": 10}),
        ("between 1 and the 10 canaries", ValueError, {"guesses": 11}),
        ("assumption on one run", ValueError, {"test": "two-world", "assume": "independent"}),
        ("Unknown audit 'three-world'", ValueError, {"test": "three-world"}),
        ("confidence must lie", ValueError, {"confidence": 95}),
        ("delta", ValueError, {"delta": 0.0}),
        ("give claimed_epsilon", ValueError, {"canaries": ExampleCanaries([1, 2], lambda trained, example: 0.0)}),
        (
            "not a finite number",
            ValueError,
            {"canaries": ExampleCanaries([1, 2], lambda trained, example: math.nan), "claimed_epsilon": 1.0},
        ),
        (
            "not a finite number",
            ValueError,
            {"canaries": ExampleCanaries([1, 2], lambda trained, example: math.inf), "claimed_epsilon": 1.0},
        ),
        ("0 or more, not nan", ValueError, {"claimed_epsilon": math.nan}),
        ("0 or more, not -1", ValueError, {"claimed_epsilon": -1.0}),
        (
            "too few",
            ValueError,
            {
                "canaries": ExampleCanaries([1, 2], lambda trained, example: 0.0),
                "claimed_epsilon": 1.0,
                "assume": "independent",
            },
        ),
    ]
    for message, error, changed in cases:
        with pytest.raises(error, match=message):
            audit(nothing, **{"canaries": canaries, "delta": DELTA, "seed": 0, **changed})


def test_another_direction_is_refused() -> None:
    with pytest.raises(ValueError, match="coordinate or random, not 'rnd'"):
        GradientCanaries(10, direction="rnd")  # type: ignore[arg-type]
