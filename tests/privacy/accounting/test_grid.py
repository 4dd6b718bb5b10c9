"""ε, noise and steps at points drawn at random, against dp-accounting called directly, from above and from below."""

from __future__ import annotations

import contextlib
import math
import random
from dataclasses import dataclass

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from dp_accounting.rdp import RdpAccountant
from scipy.integrate import quad

from lora_dp.privacy.accounting import Ledger, PoissonGaussian, calibrate_noise_multiplier, max_steps
from lora_dp.privacy.accounting.epsilon import ORDERS, pld_interval, rdp_of_step
from tests.tilted_loss import tilted_delta

ORDINARY, LONG = range(5), range(5, 305)
FULL_RATE = 0.1  # share of points at which all examples take part in every step


@dataclass(frozen=True)
class Point:
    noise: float
    rate: float
    steps: int
    delta: float
    target: float

    @property
    def ledger(self) -> Ledger:
        return ledger_of((self.noise, self.rate, self.steps))

    @property
    def rounding(self) -> float:
        """What Fourier transforms may round off of δ."""
        return 1e-15 * (1 if self.rate == 1 else self.steps)


def drawn(number: int) -> Point:
    rng = random.Random(f"accounting {number}")
    rate = 1.0 if rng.random() < FULL_RATE else 10 ** rng.uniform(-5, 0)
    return Point(
        math.exp(rng.uniform(math.log(0.2), math.log(20))),
        rate,
        int(10 ** rng.uniform(0, 5)),
        10 ** rng.uniform(-12, -3),
        10 ** rng.uniform(-2, math.log10(200)),
    )


def ledger_of(*entries: tuple[float, float, int]) -> Ledger:
    ledger = Ledger()
    for noise, rate, steps in entries:
        ledger.append(PoissonGaussian(noise, rate), steps)
    return ledger


def check_epsilon_of(point: Point) -> None:
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    by_rdp, by_pld = (point.ledger.epsilon(point.delta, accountant) for accountant in ("rdp", "pld"))
    assert 0 <= by_pld <= by_rdp < math.inf
    google = RdpAccountant(neighboring_relation=relation).compose(point.ledger.dp_event()).get_epsilon(point.delta)
    assert by_rdp <= google * (1 + 1e-9)
    if point.rounding < point.delta / 2:  # else what is left of δ is mostly the transforms' rounding
        finer = PLDAccountant(relation, value_discretization_interval=pld_interval(point.ledger.entries) / 2)
        finer.compose(point.ledger.dp_event())
        # The grid's step is at least 1e-6: the tiniest ε are upper bounds, and not close ones.
        assert by_pld <= finer.get_epsilon(point.delta - point.rounding) * 1.002 + 1e-5
    # From below: the loss rounded down. δ is what its own transforms may have rounded off larger.
    least = from_gaussian_mechanism(
        point.noise,
        pessimistic_estimate=False,
        sampling_prob=point.rate,
        use_connect_dots=False,
        value_discretization_interval=4 * pld_interval(point.ledger.entries),
    ).self_compose(point.steps)
    with contextlib.suppress(OverflowError):  # dp-accounting's, where that bound is 0
        assert by_pld >= least.get_epsilon_for_delta(point.delta + 1e-15 * point.steps) * (1 - 1e-9)


def check_planning_of(point: Point) -> None:
    noise = calibrate_noise_multiplier(point.target, point.delta, point.rate, point.steps)
    event = PoissonGaussian(noise, point.rate)
    reached = ledger_of((noise, point.rate, point.steps)).epsilon(point.delta)
    assert reached <= point.target
    assert reached >= point.target * (1 - 1e-3) or noise == 0.02
    most = max_steps(Ledger(), event, point.target, point.delta)
    assert point.steps <= most
    within = ledger_of((noise, point.rate, most)).epsilon(point.delta)
    beyond = ledger_of((noise, point.rate, most + 1)).epsilon(point.delta)
    assert within <= point.target < beyond or most == 10**9
    # ε lies within 0.1 %, and grows at least as the root of the steps where it is not tiny. Where the transforms'
    # rounding drowns δ, the Rényi bound is left, which hardly grows with the steps once its largest order is best.
    if noise > 0.02 and point.rounding < point.delta / 2:
        assert most <= 1.01 * point.steps + 1
    assert calibrate_noise_multiplier(point.target * 1.01, point.delta, point.rate, point.steps) <= noise


@pytest.mark.slow
@pytest.mark.parametrize("number", ORDINARY)
def test_epsilon_at_points_drawn_at_random(number):
    check_epsilon_of(drawn(number))


@pytest.mark.long
@pytest.mark.parametrize("part", range(6))
def test_epsilon_at_many_points(part):
    for number in LONG[part::6]:
        check_epsilon_of(drawn(number))


@pytest.mark.slow
@pytest.mark.parametrize("number", ORDINARY[:2])
def test_planning_at_points_drawn_at_random(number):
    check_planning_of(drawn(number))


@pytest.mark.long
@pytest.mark.parametrize("part", range(10))
def test_planning_at_many_points(part):
    for number in LONG[part:40:10]:
        check_planning_of(drawn(number))


# Where one of the bounds alone is far off


@pytest.mark.slow
@pytest.mark.parametrize("delta", [1e-3, 1e-9, 1e-13, 1e-14, 1e-15, 1e-18, 1e-40, 1e-300])
def test_pld_is_never_above_rdp(delta):
    for run in ((1.0, 0.01, 1000), (0.5, 1.0, 30), (8.0, 0.3, 40)):
        ledger = ledger_of(run)
        assert 0 < ledger.epsilon(delta, "pld") <= ledger.epsilon(delta, "rdp") < math.inf
    assert ledger_of((1.0, 0.01, 1000), (2.0, 0.1, 50)).epsilon(delta) < math.inf


@pytest.mark.slow
def test_a_pld_where_the_rdp_bound_is_above_a_hundred():
    ledger = ledger_of((0.2616, 3.1e-4, 22_675))
    assert ledger.epsilon(1.3e-4, "pld") == pytest.approx(39.5, rel=2e-3)
    assert RdpAccountant(ORDERS[ORDERS >= 2]).compose(ledger.dp_event()).get_epsilon(1.3e-4) > 4000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "rate", "steps"),
    [
        (0.01, 0.01, 1000),
        pytest.param(20.0, 1e-4, 300, marks=pytest.mark.long),
        (32.5, 0.01, 1000),
        pytest.param(50.0, 0.01, 1000, marks=pytest.mark.long),
        (99.0, 1.0, 3),
        pytest.param(200.0, 1e-4, 300, marks=pytest.mark.long),
    ],
)
def test_calibration_has_no_gap_at_any_epsilon(target, rate, steps):
    noise = calibrate_noise_multiplier(target, 1e-5, rate, steps)
    reached = ledger_of((noise, rate, steps)).epsilon(1e-5)
    assert target * (1 - 1e-3) <= reached <= target
    assert max_steps(Ledger(), PoissonGaussian(noise, rate), target, 1e-5) >= steps


@pytest.mark.slow
def test_a_target_that_rdp_cannot_prove_says_so():
    with pytest.raises(ValueError, match="No noise keeps epsilon = 1e-06 .*take a larger epsilon"):
        calibrate_noise_multiplier(1e-6, 1e-12, 0.01, 10, "rdp")
    assert ledger_of((calibrate_noise_multiplier(0.01, 1e-12, 0.01, 10), 0.01, 10)).epsilon(1e-12) <= 0.01


@pytest.mark.slow
def test_the_size_of_a_grid_is_bounded(monkeypatch):
    """Steps that lie far apart, many steps, hardly any noise: no gigabytes, no minutes."""
    sizes = []
    compose = PLDAccountant.compose

    def watched(self: PLDAccountant, *args: object) -> PLDAccountant:
        compose(self, *args)
        sizes.append(max(self._pld._pmf_remove.size, self._pld._pmf_add.size))
        return self

    monkeypatch.setattr(PLDAccountant, "compose", watched)
    for runs in (
        [(0.1, 0.5, 100_000)],
        [(0.0101, 1.0, 3)],
        [(0.02, 1e-5, 10**6)],
        [(20.0, 1e-3, 10), (0.3, 1e-3, 10)],
        [(1.0, 1.0, 10**6)],
        [(0.2, 0.9, 1), (100.0, 1e-5, 10**6)],
    ):
        assert ledger_of(*runs).epsilon(1e-5) <= ledger_of(*runs).epsilon(1e-5, "rdp") < math.inf
    assert len(sizes) == 8 and max(sizes) < 2**21


# What floats round off


@pytest.mark.long
def test_what_a_fourier_transform_rounds_off_is_not_taken_for_privacy():
    """At δ = 1e-12 the true δ of dp-accounting's own answer may be several times as large; of ours it never is."""
    relation, unsound = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, 0
    for steps in (21_000, 24_000, 27_000, 30_000):
        run = (0.5, 1e-4, steps)
        ledger = ledger_of(run)
        interval = pld_interval(ledger.entries)
        plain = PLDAccountant(relation, value_discretization_interval=interval).compose(ledger.dp_event())
        unsound += tilted_delta(*run, plain.get_epsilon(1e-12), interval) > 1.1e-12
        for delta in (1e-12, 1e-10):
            assert tilted_delta(*run, ledger.epsilon(delta), interval) <= delta
    assert unsound  # or there is nothing to be careful of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runs", "delta", "rounded"),
    [
        ([(1.0, 1e-3, 600), (2.0, 1e-2, 400)], 2e-12, 1e-12),
        ([(20.0, 1.0, 100)], 1e-14, 1e-15),
        ([(20.0, 1.0, 100), (30.0, 1.0, 100)], 1e-14, 2e-15),
    ],
)
def test_what_is_rounded_off_adds_up(runs, delta, rounded):
    """1e-15 for each step; steps on all examples are one, in closed form."""
    ledger = ledger_of(*runs)
    accountant = PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=pld_interval(ledger.entries)
    )
    accountant.compose(ledger.dp_event())
    expected = accountant.get_epsilon(delta - rounded)
    assert expected < ledger.epsilon(delta, "rdp")
    assert ledger.epsilon(delta) == pytest.approx(expected, rel=1e-9)


def true_divergence(order: float, noise: float, rate: float) -> float:
    """Rényi divergence of N(0, σ²) with N(1, σ²) mixed in at ``rate``, from N(0, σ²); by quadrature."""

    def integrand(x: float) -> float:
        ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * x - 1) / (2 * noise**2))
        return math.exp(order * ratio - x**2 / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi))

    middle = noise**2 * math.log(1 / rate - 1) + 0.5
    limits = (-40 * noise, 40 * noise + order)
    value, _ = quad(
        integrand, *limits, points=[0, order, min(max(middle, 0), limits[1])], limit=2000, epsabs=0, epsrel=1e-11
    )
    return math.log(value) / (order - 1)


@pytest.mark.parametrize(
    ("noise", "rate"), [(0.2616, 3.1e-4), (0.3, 0.01), (0.5, 1e-3), (1.0, 0.1), (2.0, 0.5), (5.0, 0.05), (0.4, 0.9)]
)
def test_orders_between_whole_ones_are_upper_bounds(noise, rate):
    kept = rdp_of_step(PoissonGaussian(noise, rate))
    assert np.all(np.diff(kept) >= 0)
    for order in (1.1, 1.2, 1.5, 1.9, 2.0, 2.5, 4.2):
        found, true = kept[np.argmin(abs(ORDERS - order))], true_divergence(order, noise, rate)
        assert true * (1 - 1e-6) - 1e-9 <= found
        if noise < 0.4:  # there all series converge, and the terms that count as positive are few
            assert found <= true * 1.03


def test_low_orders_help_where_noise_is_little():
    ledger, event = ledger_of((0.2616, 3.1e-4, 22_675)), PoissonGaussian(0.2616, 3.1e-4)
    without = RdpAccountant(ORDERS[ORDERS >= 2]).compose(ledger.dp_event()).get_epsilon(1.3e-4)
    assert ledger.epsilon(1.3e-4, "rdp") < 0.5 * without
    assert rdp_of_step(event)[0] < rdp_of_step(event)[ORDERS == 2]


def test_a_divergence_below_rounding_proves_nothing():
    """dp-accounting reads a divergence that rounding has made negative as one of 0, and so as an ε of 0."""
    event = PoissonGaussian(30.0, 1e-7)
    assert np.all(rdp_of_step(event) > 0)
    ledger = Ledger()
    ledger.append(event, 10**9)
    assert ledger.epsilon(1e-5, "rdp") > 0
