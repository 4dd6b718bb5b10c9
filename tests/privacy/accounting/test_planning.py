"""The searches of planning, on functions whose answer is known: it is found, and in few evaluations, which are dear."""

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant

from lora_dp.privacy.accounting import Ledger, PoissonGaussian, calibrate_noise_multiplier, max_steps, planning
from lora_dp.privacy.accounting.planning import _most_steps, _smallest_noise
from tests.privacy.accounting.dp_accounting_oracle import DELTA, ledger_of

EVENT = PoissonGaussian(1.0, 0.5)


def counted(function: Callable[[Any], float]) -> tuple[Callable[[Any], float], list[Any]]:
    asked: list[Any] = []

    def asking(value: Any) -> float:
        asked.append(value)
        assert len(asked) < 100, f"a search without an end: {asked}"
        return function(value)

    return asking, asked


# ε of the noise, and the most evaluations of a search from 1: ordinary ones, one that jumps, and a bound that is void.
FALLING = {
    "inverse": (lambda noise: 3 / noise, 6),
    "square": (lambda noise: 2 / noise**2, 5),
    "gaussian": (lambda noise: 1 / (2 * noise**2) + 5 / noise, 8),
    "steep": (lambda noise: math.expm1(1 / noise), 12),
    "void below": (lambda noise: math.inf if noise < 0.7 else 4 / noise, 33),
    "nothing above": (lambda noise: max(4 / noise - 1, 0), 18),
    "stairs": (lambda noise: math.ceil(10 / noise) / 3 if noise < 1000 else 0.0, 42),
    "cliff": (lambda noise: 100.0 if noise < 3.3 else 1e-3, 46),
}


@pytest.mark.parametrize("name", FALLING)
@pytest.mark.parametrize(("guess", "factor", "tolerance"), [(1.0, 2.0, 1e-3), (1.0, 2.0, 0.02), (40.0, 1.1, 1e-3)])
def test_the_smallest_noise(name, guess, factor, tolerance):
    """The target is reached to the tolerance, or less noise goes beyond it."""
    function, most = FALLING[name]
    for target in (1e-3, 0.05, 1, 2.9, 8, 100, 1e4):
        epsilon_of, asked = counted(function)
        noise = _smallest_noise(epsilon_of, target, guess, factor, tolerance)
        assert function(noise) <= target
        assert function(noise) >= target * (1 - tolerance) or noise == 0.02 or function(noise * (1 - 2e-9)) > target
        assert min(asked) >= 0.02 and len(asked) == len(set(asked))
        assert len(asked) <= (most if guess == 1 else most + 6), (target, asked)


def test_an_answer_at_the_guess_is_taken_at_once():
    for target in (3.0, 3.0029):
        epsilon_of, asked = counted(lambda noise: 3 / noise)
        assert _smallest_noise(epsilon_of, target, 1.0, 2.0, 1e-3) == 1.0
        assert asked == [1.0]


def test_a_line_in_the_logarithms_takes_one_probe_inside_its_bracket():
    """Half the tolerance below the target."""
    epsilon_of, asked = counted(lambda noise: 30 / noise**1.5)
    noise = _smallest_noise(epsilon_of, 1.0, 1.0, 2.0, 1e-3)
    assert 30 / noise**1.5 == pytest.approx(1 - 5e-4, rel=1e-9)
    assert len(asked) == 5 and asked[-1] == noise


def test_no_noise_is_enough():
    epsilon_of, asked = counted(lambda noise: 5.0)
    with pytest.raises(ValueError, match="No noise keeps epsilon = 1 "):
        _smallest_noise(epsilon_of, 1.0, 1.0, 2.0, 1e-3)
    assert 1e9 < max(asked) < 1e14 and len(asked) <= 6


# ε of the number of steps, and the most evaluations of a search from 1 step.
GROWING = {
    "root": (lambda steps: math.sqrt(steps) / 10, 12),
    "line": (lambda steps: steps / 100, 15),
    "square": (lambda steps: steps**2 / 1e6, 20),
    "logarithm": (math.log1p, 17),
    "cliff": (lambda steps: steps / 1000 if steps < 777 else 50.0, 32),
    "void": (lambda steps: math.inf if steps > 500 else steps / 1e4, 18),
    "stairs": (lambda steps: steps // 100 / 3, 34),
    "flat": (lambda steps: 0.5, 21),
}


@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize(("guess", "stride"), [(1, 1), (0, 1), (1000, 126), (1000, 2)])
def test_the_most_steps(name, guess, stride):
    """So many fit, one more does not; 10⁹ stands for more."""
    function, most = GROWING[name]
    for target in (1e-2, 0.4, 1, 3, 8):
        epsilon_after, asked = counted(function)
        steps = _most_steps(epsilon_after, target, guess, stride)
        assert isinstance(steps, int) and (steps == 0 or function(steps) <= target)
        assert steps == 10**9 or function(steps + 1) > target
        assert all(isinstance(each, int) and 0 <= each <= 10**9 for each in asked)
        assert len(asked) == len(set(asked)) <= most + 6, (target, asked)
        assert guess != 1 or len(asked) <= most, (target, asked)


def test_a_root_of_the_steps_takes_one_probe_inside_its_bracket():
    """And one more, which tells that one step more is too many."""
    epsilon_after, asked = counted(math.sqrt)
    assert _most_steps(epsilon_after, math.sqrt(5000.3), 1, 1) == 5000
    assert asked[-2:] == [5000, 5001]


@pytest.mark.parametrize("by_rdp", [1.25, 1e3], ids=["rdp near", "rdp out of reach"])
@pytest.mark.parametrize("target", [0.01, 0.5, 8.0, 100.0])
def test_calibration_takes_each_search_from_a_cheaper_one(monkeypatch, target, by_rdp):
    """Only the last one looks at the finest grid, a few times; its ε is what counts."""
    asked: dict[tuple[str, int], list[float]] = {}

    def composed(entries: Any, delta: float, accountant: str, coarsening: int = 1) -> float:
        ((event, steps),) = entries
        assert (event.sample_rate, steps, delta) == (0.25, 300, 1e-6)
        asked.setdefault((accountant, coarsening), []).append(event.noise_multiplier)
        assert sum(map(len, asked.values())) < 100, f"a search without an end: {asked}"
        epsilon = 3 / event.noise_multiplier
        if accountant == "rdp":
            return by_rdp + epsilon if by_rdp > 100 else by_rdp * epsilon
        return epsilon * (1 + 0.005 * (coarsening - 1))

    monkeypatch.setattr(planning, "composed_epsilon", composed)
    planning._calibrate.cache_clear()
    noise = calibrate_noise_multiplier(target, 1e-6, 0.25, 300)
    planning._calibrate.cache_clear()
    assert target * (1 - 1e-3) <= 3 / noise <= target
    assert {key[0]: key[1] > 1 for key in asked if key != ("pld", 1)} == {"rdp": False, "pld": True}
    assert len(asked["pld", 1]) <= 5
    assert by_rdp > 100 or sum(len(found) for (name, _), found in asked.items() if name == "pld") <= 10


@pytest.mark.slow
def test_one_step_is_a_run():
    noise = calibrate_noise_multiplier(1.0, 1e-5, 0.1, 1, "rdp")
    ledger = Ledger()
    ledger.append(PoissonGaussian(noise, 0.1))
    assert 0.999 <= ledger.epsilon(1e-5, "rdp") <= 1


def test_another_accountant_is_refused():
    for call in (
        lambda: calibrate_noise_multiplier(1.0, 1e-5, 0.1, 10, "gdp"),
        lambda: max_steps(Ledger(), EVENT, 1.0, 1e-5, "gdp"),
    ):
        with pytest.raises(ValueError, match="Unknown accountant 'gdp'"):
            call()


@pytest.fixture
def epsilon_is(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    def planted(function: Callable[[int], float]) -> list[int]:
        asked: list[int] = []
        every: list[int] = []

        def composed(entries: Any, delta: float, accountant: str, coarsening: int = 1) -> float:
            steps = sum(count for _, count in entries)
            every.append(steps)
            assert len(every) < 200, f"a search without an end: {every}"
            assert type(delta) is float  # with NumPy's all would be computed in its own width
            if accountant == "pld" and coarsening == 1:
                asked.append(steps)
            return function(steps) * (1.25 if accountant == "rdp" else 1 + 0.01 * (coarsening - 1))

        monkeypatch.setattr(planning, "composed_epsilon", composed)
        return asked

    return planted


@pytest.mark.parametrize(
    ("hole", "expected"), [((1001, 1004), 1009), ((1001, 1009), 1012), ((1001, 1019), 1022), ((1001, 1030), 1000)]
)
def test_max_steps_looks_beyond_a_jump(epsilon_is, hole, expected):
    """Rounding makes ε jump: 0.5, 1 and 2 % more steps are tried, and what fits from there on."""
    asked = epsilon_is(lambda steps: 2.0 if hole[0] <= steps <= hole[1] or steps > expected else steps / 2000)
    found = max_steps(Ledger(), EVENT, 1.0, 1e-5)
    assert found == expected and isinstance(found, int)
    assert len(asked) <= 14 and all(isinstance(steps, int) for steps in asked)


def test_max_steps_looks_nowhere_beyond_its_end(epsilon_is):
    asked = epsilon_is(lambda steps: 1e-3)
    assert max_steps(Ledger(), EVENT, 1.0, 1e-5) == 10**9
    assert max(asked) == 10**9 and len(asked) <= 2


def test_max_steps_at_its_target_exactly(epsilon_is):
    epsilon_is(lambda steps: steps / 100)
    ledger = Ledger()
    assert max_steps(ledger, EVENT, 0.5, np.float32(1e-5)) == 50
    assert max_steps(ledger, EVENT, 0.5, 1e-5, "rdp") == 40
    ledger.append(EVENT, 50)
    assert max_steps(ledger, EVENT, 0.5, 1e-5) == 0
    ledger.append(EVENT)
    assert max_steps(ledger, EVENT, 0.5, 1e-5) == 0


@pytest.mark.slow
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(
    ("epsilon", "rate", "steps"), [(0.5, 0.01, 500), (1, 1.0, 100), (3, 0.01, 1000), (8, 0.25, 200), (30, 0.1, 20)]
)
def test_calibration_is_tight_and_never_above(accountant, epsilon, rate, steps):
    noise = calibrate_noise_multiplier(epsilon, DELTA, rate, steps, accountant)
    reached = ledger_of((rate, noise, steps)).epsilon(DELTA, accountant)
    assert epsilon * (1 - 1e-3) <= reached <= epsilon
    assert ledger_of((rate, noise * 0.998, steps)).epsilon(DELTA, accountant) > reached


@pytest.mark.slow
def test_pld_needs_less_noise_than_rdp():
    assert calibrate_noise_multiplier(3, DELTA, 0.05, 100) < calibrate_noise_multiplier(3, DELTA, 0.05, 100, "rdp")


@pytest.mark.slow
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("spent", [[], [(0.1, 2.0, 20)], [(0.1, 2.0, 20), (0.02, 1.0, 10)]])
def test_max_steps_fit_and_one_more_does_not(accountant, spent):
    ledger, event, target = ledger_of(*spent), PoissonGaussian(1.1, 0.05), 2.0
    steps = max_steps(ledger, event, target, DELTA, accountant)
    assert steps > 1
    assert ledger.entries == ledger_of(*spent).entries  # planning spends nothing
    ledger.append(event, steps)
    assert ledger.epsilon(DELTA, accountant) <= target
    ledger.append(event)
    assert ledger.epsilon(DELTA, accountant) > target
    assert max_steps(ledger, event, target, DELTA, accountant) == 0


@pytest.mark.slow
def test_max_steps_agrees_with_calibration():
    noise = calibrate_noise_multiplier(3, DELTA, 0.1, 50)
    assert max_steps(Ledger(), PoissonGaussian(noise, 0.1), 3, DELTA) == 50


def test_max_steps_at_the_ends():
    assert max_steps(Ledger(), PoissonGaussian(0.0, 0.1), 8, DELTA) == 0
    assert max_steps(ledger_of((0.1, 0.0, 1)), PoissonGaussian(1.0, 0.1), 8, DELTA) == 0
    assert max_steps(Ledger(), PoissonGaussian(1e6, 1e-6), 8, DELTA, "rdp") == 10**9


@pytest.mark.slow
def test_planning_takes_few_dear_evaluations(monkeypatch):
    built = []

    class Counted(PLDAccountant):
        def __init__(self, relation, value_discretization_interval):
            built.append(value_discretization_interval)
            super().__init__(relation, value_discretization_interval)

    monkeypatch.setattr("dp_accounting.pld.PLDAccountant", Counted)
    noise = calibrate_noise_multiplier(4.321, DELTA, 0.0123, 789)
    assert 0 < len(built) <= 12
    built.clear()
    max_steps(Ledger(), PoissonGaussian(noise, 0.0123), 4.0, DELTA)
    assert 0 < len(built) <= 20


@pytest.mark.slow
def test_a_tiny_target_warns_of_nothing(caplog):
    with caplog.at_level("WARNING"):
        calibrate_noise_multiplier(1e-7, 1e-5, 0.2, 10, "rdp")
    assert not caplog.records


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(("rate", "steps"), [(0.1, 50), (1.0, 20)])
def test_noise_on_top_of_what_was_spent_keeps_the_target_with_it(
    accountant: Literal["pld", "rdp"], rate: float, steps: int
) -> None:
    before = Ledger()
    before.append(PoissonGaussian(4.0, 1.0))
    noise = calibrate_noise_multiplier(3, DELTA, rate, steps, accountant, spent=before)
    before.append(PoissonGaussian(noise, rate), steps)
    assert 3 * (1 - 1.5e-3) <= before.epsilon(DELTA, accountant) <= 3
    assert noise > calibrate_noise_multiplier(3, DELTA, rate, steps, accountant)


def test_noise_on_top_of_a_spent_budget_is_refused() -> None:
    before = Ledger()
    before.append(PoissonGaussian(1.0, 1.0))
    with pytest.raises(ValueError, match="leaves nothing of 3"):
        calibrate_noise_multiplier(3, DELTA, 0.1, 10, spent=before)
    with pytest.raises(TypeError, match="spent must be a Ledger"):
        calibrate_noise_multiplier(3, DELTA, 0.1, 10, spent=[(PoissonGaussian(1.0, 1.0), 1)])  # type: ignore[arg-type]
