"""Every epsilon against dp-accounting called directly."""

import logging
import math
import warnings

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from lora_dp.privacy.accounting import Ledger, PoissonGaussian, calibrate_noise_multiplier
from lora_dp.privacy.accounting.epsilon import ORDERS, pld_interval, rdp_of_step
from lora_dp.privacy.accounting.steps import gathered
from tests.privacy.accounting.dp_accounting_oracle import DELTA, ledger_of

RUNS = [(0.01, 1.0, 1000), (0.1, 1.2, 200), (0.02, 0.6, 50), (0.5, 40.0, 300), (0.001, 1.0, 10_000), (1.0, 20.0, 100)]


def described(rate: float, noise: float, steps: int) -> dp_accounting.DpEvent:
    gaussian = dp_accounting.GaussianDpEvent(noise)
    step = gaussian if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, gaussian)
    return dp_accounting.SelfComposedDpEvent(step, steps)


def direct_pld(interval: float, *runs: tuple[float, float, int]) -> float:
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = PLDAccountant(relation, value_discretization_interval=interval)
    for run in runs:
        accountant.compose(described(*run))
    # What Fourier transforms may round off of delta is taken off before: 1e-15 for each step composed by them.
    return accountant.get_epsilon(DELTA - 1e-15 * sum(1 if rate == 1 else steps for rate, _, steps in runs))


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_pld_epsilon_is_dp_accountings(run):
    interval = pld_interval(ledger_of(run).entries)
    ours = ledger_of(run).epsilon(DELTA, "pld")
    assert ours == pytest.approx(direct_pld(interval, run), rel=1e-12)
    # A finer grid can only be a little tighter: ours stays an upper bound, and a close one.
    finer = direct_pld(interval / 4, run)
    assert finer - 1e-9 <= ours <= finer * 1.002


@pytest.mark.parametrize("run", RUNS)
def test_rdp_epsilon_is_dp_accountings(run):
    ours = ledger_of(run).epsilon(DELTA, "rdp")
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    same_orders = RdpAccountant([float(order) for order in ORDERS if order == 2 or order >= 3], relation)
    default_orders = RdpAccountant(neighboring_relation=relation)
    assert ours <= same_orders.compose(described(*run)).get_epsilon(DELTA) * (1 + 1e-12)
    assert ours == pytest.approx(default_orders.compose(described(*run)).get_epsilon(DELTA), rel=1e-3)


@pytest.mark.slow
def test_heterogeneous_runs_compose():
    runs = [(0.01, 1.0, 300), (0.1, 2.0, 40), (1.0, 30.0, 20), (0.01, 1.0, 200)]
    ledger = ledger_of(*runs)
    interval = pld_interval(gathered(ledger.entries))
    assert ledger.epsilon(DELTA, "pld") == pytest.approx(direct_pld(interval, *runs), rel=1e-9)
    rdp = RdpAccountant().compose(ledger.dp_event())
    assert ledger.epsilon(DELTA, "rdp") == pytest.approx(rdp.get_epsilon(DELTA), rel=1e-3)
    assert ledger.epsilon(DELTA) > max(ledger_of(run).epsilon(DELTA) for run in runs)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_nothing_released_and_no_noise(accountant):
    ledger = Ledger()
    assert ledger.epsilon(DELTA, accountant) == 0
    ledger.append(PoissonGaussian(1.0, 0.1), 10)
    assert 0 < ledger.epsilon(DELTA, accountant) < math.inf
    ledger.append(PoissonGaussian(0.0, 0.1))
    assert ledger.epsilon(DELTA, accountant) == math.inf
    assert RdpAccountant().compose(ledger.dp_event()).get_epsilon(DELTA) == math.inf
    assert ledger_of((0.1, 1e-3, 1)).epsilon(DELTA, accountant) == math.inf


@pytest.mark.slow
def test_hardly_any_noise_takes_no_minutes():
    ledger = ledger_of((0.1, 0.05, 2000))
    assert 100 < ledger.epsilon(DELTA, "pld") <= ledger.epsilon(DELTA, "rdp") < math.inf


@pytest.mark.slow
def test_rdp_warns_and_logs_nothing(caplog, capfd):
    rdp_of_step.cache_clear()
    with warnings.catch_warnings(), caplog.at_level(logging.DEBUG):
        warnings.simplefilter("error")
        for rate in (1e-6, 0.1, 0.39, 0.5, 0.501, 0.61, 0.999):
            for noise in (0.01, 0.3, 5.0, 300.0, 1e4):
                assert ledger_of((rate, noise, 3)).epsilon(DELTA, "rdp") >= 0
        for rate, epsilon in ((0.1, 80.0), (0.5, 0.3)):
            calibrate_noise_multiplier(epsilon, DELTA, rate, 7, "rdp")
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")
    # The check can fail: dp-accounting's default orders do log on the same step.
    RdpAccountant().compose(described(0.5, 300.0, 1))
    assert "failed to converge" in caplog.text + capfd.readouterr().err
