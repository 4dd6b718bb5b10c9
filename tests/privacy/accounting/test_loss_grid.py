"""The grid of a privacy loss: how fine, and how its size is bounded; and the orders of Rényi DP.

Any step of the grid, and any order, gives an upper bound. A wrong one costs gigabytes, minutes, or ε.
"""

import logging
import math
import warnings

import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS
from scipy.integrate import quad

from lora_dp.privacy.accounting import Ledger, PoissonGaussian
from lora_dp.privacy.accounting.epsilon import ORDERS, pld_interval, rdp_of_step

FAR = 9.8  # standard deviations of a step's noise: beyond, e⁻⁵⁰ of it lies


def loss_at(x: np.ndarray | float, noise: float, rate: float) -> np.ndarray:
    """Log of the density of N(0, σ²) with N(1, σ²) mixed in at ``rate``, over that of N(0, σ²)."""
    return np.log(1 - rate + rate * np.exp((2 * np.asarray(x) - 1) / (2 * noise**2)))


def fine_enough(noise: float, rate: float) -> float:
    """A twentieth of a step's deviation, which is q·√χ² to first order in q; within 1e-6 and 1e-3."""

    def ratio(x: float) -> float:
        return math.exp(-((x - 1) ** 2 - x**2 / 2) / noise**2) / (noise * math.sqrt(2 * math.pi))

    # The square of N(1, σ²)'s density over N(0, σ²)'s is largest at 2.
    chi = quad(ratio, 2 - 12 * noise, 2 + 12 * noise, epsrel=1e-10)[0] - 1 if noise > 0.1 else math.inf
    return min(1e-3, max(rate * math.sqrt(chi) / 20, 1e-6))


def width_of(noise: float, rate: float, steps: int) -> float:
    """Of the composed loss, but for e⁻⁵⁰ on either side, by Chernoff's bound at dp-accounting's exponents."""
    if rate == 1:
        return 2 * float(loss_at(1 + FAR * noise / math.sqrt(steps), noise / math.sqrt(steps), 1))
    least, most = math.log1p(-rate), float(loss_at(1 + FAR * noise, noise, rate))
    x = np.linspace(-FAR * noise, 1 + FAR * noise, 5001)
    loss = loss_at(x, noise, rate)
    widths = []
    for mass in (np.exp(-((x / noise) ** 2) / 2), np.exp(loss - (x / noise) ** 2 / 2)):
        mass /= mass.sum()
        ends = [
            min(
                (steps * math.log(np.sum(mass * np.exp(sign * k / (most - least) * loss))) + 50) / (k / (most - least))
                for k in range(1, 21)
            )
            for sign in (1, -1)
        ]
        widths.append(sum(ends))
    return min(steps * (most - least), max(widths))


@pytest.mark.parametrize(
    "runs",
    [
        [(1.0, 0.01, 10)],
        [(3.0, 0.1, 100)],
        [(20.0, 1e-5, 7)],
        [(0.5, 0.5, 3)],
        [(0.5, 1e-6, 4)],
        [(0.04, 1e-5, 2)],
        [(0.08, 0.3, 1)],
        [(20.0, 1e-3, 10), (0.3, 1e-3, 10)],
        [(0.3, 1e-3, 10), (20.0, 1e-3, 10)],
        [(4.0, 1.0, 400)],
        [(1.0, 0.01, 10**6)],
        [(0.5, 0.2, 10**5)],
        [(2.0, 0.6, 10**5)],
        [(1.0, 0.98, 4000)],
        [(1.0, 1.0, 4), (1.0, 0.01, 10**7)],
        [(0.5 + i / 1000, 1e-6, 1) for i in range(20)],
    ],
)
def test_the_grids_step(runs):
    """As fine as the finest step needs, unless 100,000 points a step or 2²⁰ altogether would not do."""
    ledger = Ledger()
    for noise, rate, steps in runs:
        ledger.append(PoissonGaussian(noise, rate), steps)
    single = [(noise / math.sqrt(steps), 1.0) if rate == 1 else (noise, rate) for noise, rate, steps in runs]
    expected = max(
        min(fine_enough(*step) for step in single),
        max(loss_at(1 + FAR * noise, noise, rate) for noise, rate in single) / 100_000,
        sum(width_of(*run) for run in runs) / 2**20,
    )
    assert pld_interval(ledger.entries) == pytest.approx(expected, rel=1e-3)


def test_the_orders_are_dp_accountings_and_more():
    assert set(DEFAULT_RDP_ORDERS) <= set(ORDERS)
    steps = ORDERS[1:] / ORDERS[:-1]
    assert np.all(steps > 1) and np.all(steps[ORDERS[:-1] >= 63] < 1.6)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_epsilon_is_a_plain_float(accountant):
    """NumPy's would be shown as np.float64(…)."""
    ledger = Ledger()
    ledger.append(PoissonGaussian(2.0, 0.1), 3)
    assert type(ledger.epsilon(1e-5, accountant)) is float


@pytest.mark.slow
def test_only_while_it_computes_is_dp_accounting_quiet(caplog):
    logger = logging.getLogger("absl")
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.INFO, "absl"):
        rdp_of_step.cache_clear()
        rdp_of_step(PoissonGaussian(300.0, 0.5))
        assert logger.level == logging.INFO and not caplog.records
        # The check can fail: this is a step of which it would speak.
        RdpAccountant(ORDERS).compose(PoissonGaussian(300.0, 0.5).dp_event())
        assert caplog.records


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_less_noise_than_a_hundredth_is_none(accountant):
    for noise, finite in ((0.0101, True), (0.0099, False)):
        ledger = Ledger()
        ledger.append(PoissonGaussian(noise, 1.0))
        assert math.isfinite(ledger.epsilon(1e-5, accountant)) == finite


@pytest.mark.parametrize(("noise", "rate"), [(300.0, 1e-9), (300.0, 1e-8), (300.0, 3e-8), (100.0, 1e-9)])
def test_rounding_takes_nothing_off_a_tiny_divergence(noise, rate):
    """To first order in q² it is α·q²·χ²/2; dp-accounting's own lies below that at some order."""
    true = ORDERS * rate**2 * math.expm1(1 / noise**2) / 2
    event = PoissonGaussian(noise, rate)
    assert np.all(rdp_of_step(event) >= 0.999 * true)


@pytest.mark.parametrize(("noise", "rate"), [(30.0, 1e-4), (1.0, 0.1), (5.0, 1.0)])
def test_a_divergence_above_rounding_is_dp_accountings_or_less(noise, rate):
    event = PoissonGaussian(noise, rate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        google = RdpAccountant(ORDERS).compose(event.dp_event()).rdp
    assert np.all(rdp_of_step(event) <= np.asarray(google) * (1 + 1e-9))


@pytest.mark.parametrize(("noise", "rate", "high"), [(330.0, 1.0, False), (2000.0, 1.0, True)])
def test_higher_orders_are_taken_where_they_prove_more(noise, rate, high):
    ledger = Ledger()
    ledger.append(PoissonGaussian(noise, rate))
    orders = [*ORDERS, 2048.0, 4096.0, 8192.0]
    ordinary, all_of_them = (
        RdpAccountant(each).compose(ledger.dp_event()).get_epsilon(1e-5) for each in (ORDERS, orders)
    )
    assert ledger.epsilon(1e-5, "rdp") == pytest.approx(all_of_them, rel=1e-6)
    assert (all_of_them < 0.5 * ordinary) == high


def test_where_a_grid_would_be_too_coarse_renyis_bound_is_taken():
    ledger = Ledger()
    ledger.append(PoissonGaussian(0.011, 0.5), 100_000)
    assert pld_interval(ledger.entries) > 50
    assert ledger.epsilon(1e-5) == ledger.epsilon(1e-5, "rdp") < math.inf


def test_where_rounding_leaves_little_of_delta_renyis_bound_is_taken():
    ledger = Ledger()
    ledger.append(PoissonGaussian(1.0, 0.01), 1000)
    for delta in (1.001e-12, 0.9e-12):
        assert ledger.epsilon(delta) == ledger.epsilon(delta, "rdp")
    assert ledger.epsilon(1e-10) < ledger.epsilon(1e-10, "rdp")
