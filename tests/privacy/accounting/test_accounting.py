"""Every epsilon against dp-accounting called directly, planning against its own definition, the file on disk."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import warnings
from types import FrameType
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from lora_dp.privacy.accounting import (
    Ledger,
    PoissonGaussian,
    calibrate_noise_multiplier,
    check_delta,
    check_epsilon,
    max_steps,
    planning,
)
from lora_dp.privacy.accounting.epsilon import ORDERS, composed_epsilon, pld_interval, rdp_of_step
from lora_dp.privacy.accounting.steps import gathered

DELTA = 1e-5
RUNS = [(0.01, 1.0, 1000), (0.1, 1.2, 200), (0.02, 0.6, 50), (0.5, 40.0, 300), (0.001, 1.0, 10_000), (1.0, 20.0, 100)]


def ledger_of(*entries: tuple[float, float, int]) -> Ledger:
    ledger = Ledger()
    for rate, noise, steps in entries:
        ledger.append(PoissonGaussian(noise, rate), steps)
    return ledger


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


def test_hardly_any_noise_takes_no_minutes():
    ledger = ledger_of((0.1, 0.05, 2000))
    assert 100 < ledger.epsilon(DELTA, "pld") <= ledger.epsilon(DELTA, "rdp") < math.inf


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(
    ("epsilon", "rate", "steps"), [(0.5, 0.01, 500), (1, 1.0, 100), (3, 0.01, 1000), (8, 0.25, 200), (30, 0.1, 20)]
)
def test_calibration_is_tight_and_never_above(accountant, epsilon, rate, steps):
    noise = calibrate_noise_multiplier(epsilon, DELTA, rate, steps, accountant)
    reached = ledger_of((rate, noise, steps)).epsilon(DELTA, accountant)
    assert epsilon * (1 - 1e-3) <= reached <= epsilon
    assert ledger_of((rate, noise * 0.998, steps)).epsilon(DELTA, accountant) > reached


def test_pld_needs_less_noise_than_rdp():
    assert calibrate_noise_multiplier(3, DELTA, 0.05, 100) < calibrate_noise_multiplier(3, DELTA, 0.05, 100, "rdp")


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


def test_max_steps_agrees_with_calibration():
    noise = calibrate_noise_multiplier(3, DELTA, 0.1, 50)
    assert max_steps(Ledger(), PoissonGaussian(noise, 0.1), 3, DELTA) == 50


def test_max_steps_at_the_ends():
    assert max_steps(Ledger(), PoissonGaussian(0.0, 0.1), 8, DELTA) == 0
    assert max_steps(ledger_of((0.1, 0.0, 1)), PoissonGaussian(1.0, 0.1), 8, DELTA) == 0
    assert max_steps(Ledger(), PoissonGaussian(1e6, 1e-6), 8, DELTA, "rdp") == 10**9


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


def test_entries_are_run_length_encoded_in_order():
    first, second = PoissonGaussian(1.0, 0.1), PoissonGaussian(2.0, 0.1)
    ledger = Ledger()
    ledger.append(first)
    ledger.append(PoissonGaussian(1, 0.1), 4)
    ledger.append(second, 2)
    ledger.append(second, 0)
    ledger.append(first)
    assert ledger.entries == ((first, 5), (second, 2), (first, 1))
    assert ledger.steps == 8
    with pytest.raises(ValueError, match="only grows"):
        ledger.append(first, -1)
    with pytest.raises(TypeError):
        ledger.append(first, 1.5)
    assert ledger.steps == 8


def test_a_ledger_continues_what_it_begins_with():
    """Whole entries, and at least as many steps of the last one."""
    first, second, third = (0.1, 1.0, 3), (0.1, 2.0, 2), (0.2, 1.0, 1)
    for ledger in ((first,), (first, second), (first, second, third)):
        for earlier in ((), (first,), (first, second), (first, second, third)):
            assert ledger_of(*ledger).continues(ledger_of(*earlier)) == (len(ledger) >= len(earlier))
        assert not ledger_of(*ledger).continues(ledger_of((0.1, 1.0, 4)))
        assert not ledger_of(*ledger).continues(ledger_of((0.1, 1.5, 1)))
        assert ledger_of(*ledger).continues(ledger_of((0.1, 1.0, 2)))
        assert not ledger_of(*ledger).continues(ledger_of((0.1, 1.0, 2), second))
    assert not Ledger().continues(ledger_of(first))


def test_round_trip_through_state_and_file(tmp_path):
    ledger = ledger_of((1 / 3, 0.1 + 0.2, 7), (1.0, 1e-3, 1), (0.25, 5.0, 10**9))
    restored = Ledger()
    restored.load_state_dict(ledger.state_dict())
    assert restored.entries == ledger.entries
    other = Ledger()
    other.append(PoissonGaussian(9.0, 0.9))
    with pytest.raises(ValueError, match="lacks steps that this one has, which cannot be taken back"):
        other.load_state_dict(ledger.state_dict())
    assert other.entries == ((PoissonGaussian(9.0, 0.9), 1),)
    path = tmp_path / "ledger.json"
    ledger.save(path)
    ledger.append(PoissonGaussian(1.0, 0.5))
    ledger.save(str(path))
    assert Ledger.load(path).entries == ledger.entries
    assert os.listdir(tmp_path) == ["ledger.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_crash_while_saving_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "ledger.json"
    ledger = ledger_of((0.1, 1.0, 3))
    ledger.save(path)

    def crash(*args):
        raise OSError("the machine stopped here")

    ledger.append(PoissonGaussian(2.0, 0.1))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="stopped here"):
        patch.setattr(os, call, crash)
        ledger.save(path)
    assert Ledger.load(path).steps == 3
    ledger.save(path)  # what the crash left behind does not stand in the way
    assert Ledger.load(path).steps == 4


def test_the_file_is_on_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    ledger_of((0.1, 1.0, 3)).save(tmp_path / "ledger.json")
    assert calls == ["fsync", "replace", "fsync"]


DAMAGED = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "not text": lambda text: "\udcff",
    "not a ledger": lambda text: "[1, 2]",
    "of another version": lambda text: text.replace('"version": 2', '"version": 3'),
    "without a count": lambda text: text.replace('"count"', '"cuont"'),
    "with a negative count": lambda text: text.replace('"count": 3', '"count": -3'),
    "with another count": lambda text: text.replace('"count": 3', '"count": 2'),
    "with less noise": lambda text: text.replace('"noise_multiplier": 1.0', '"noise_multiplier": 1.5'),
    "of another kind": lambda text: text.replace('"lora-dp ledger"', '"lora-dp log"'),
    "of the version before, which had no digests": lambda text: text.replace('"version": 2', '"version": 1'),
    "with an impossible rate": lambda text: text.replace('"sample_rate": 0.1', '"sample_rate": 1.1'),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_gives_one_clear_error(tmp_path, damage):
    path = tmp_path / "ledger.json"
    ledger_of((0.1, 1.0, 3)).save(path)
    spoilt = DAMAGED[damage](path.read_text())
    assert spoilt != path.read_text()
    path.write_text(spoilt, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=r"privacy ledger .*ledger\.json.* cannot be read"):
        Ledger.load(path)
    with pytest.raises(FileNotFoundError):
        Ledger.load(tmp_path / "elsewhere.json")


def test_a_bad_state_changes_nothing():
    ledger = ledger_of((0.1, 1.0, 3))
    state = json.loads(json.dumps(ledger.state_dict()))
    state["entries"] += [{"noise_multiplier": -1.0, "sample_rate": 0.1, "count": 1}]
    with pytest.raises(ValueError, match="Not a whole ledger of version 2"):
        ledger.load_state_dict(state)
    assert ledger.steps == 3


def test_a_ledger_of_the_version_before_has_no_digests_at_all():
    ledger = ledger_of((0.1, 1.0, 3), (0.1, 2.0, 1))
    state = ledger.state_dict()
    state["version"] = 1
    plain = [{key: value for key, value in entry.items() if key != "digest"} for entry in state["entries"]]
    restored = Ledger()
    for spoilt in (
        state,
        {**state, "entries": plain},
        {**state, "digest": ""},
        {"format": state["format"], "version": 1, "entries": [plain[0], state["entries"][1]]},
    ):
        with pytest.raises(ValueError, match="digests in a version that had none"):
            restored.load_state_dict(spoilt)
    with pytest.raises(ValueError, match="format 'lora-dp log'"):
        restored.load_state_dict({"format": "lora-dp log", "version": 1, "entries": plain})
    restored.load_state_dict({"format": state["format"], "version": 1, "entries": plain})
    assert restored.entries == ledger.entries and restored.state_dict() == ledger.state_dict()
    assert restored.state_dict()["version"] == 2


@pytest.mark.parametrize("epsilon", [0, -1.0, math.nan, math.inf])
def test_bad_epsilon(epsilon):
    for call in (
        lambda: check_epsilon(epsilon),
        lambda: calibrate_noise_multiplier(epsilon, DELTA, 0.1, 10),
        lambda: max_steps(Ledger(), PoissonGaussian(1.0, 0.1), epsilon, DELTA),
    ):
        with pytest.raises(ValueError, match="epsilon must be a positive, finite number.*noise_multiplier=0"):
            call()


@pytest.mark.parametrize("delta", [0, 1, -1e-5, 1.5, math.nan])
def test_bad_delta(delta):
    for call in (
        lambda: check_delta(delta),
        lambda: Ledger().epsilon(delta),
        lambda: calibrate_noise_multiplier(1, delta, 0.1, 10),
        lambda: max_steps(Ledger(), PoissonGaussian(1.0, 0.1), 1, delta),
    ):
        with pytest.raises(ValueError, match=r"delta must lie strictly between 0 and 1.*number of examples"):
            call()


def test_other_bad_values():
    for rate in (0, -0.1, 1.01, math.nan):
        with pytest.raises(ValueError, match=r"sample_rate must lie in \(0, 1\].*batch size"):
            PoissonGaussian(1.0, rate)
        with pytest.raises(ValueError, match="sample_rate"):
            calibrate_noise_multiplier(1, DELTA, rate, 10)
    for noise in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="noise_multiplier must be.*calibrate_noise_multiplier"):
            PoissonGaussian(noise, 0.1)
    for steps in (-1, 0):
        with pytest.raises(ValueError, match="steps must be 1 or more"):
            calibrate_noise_multiplier(1, DELTA, 0.1, steps)
    with pytest.raises(ValueError, match="Unknown accountant 'gdp': choose 'pld'"):
        Ledger().epsilon(DELTA, "gdp")


def test_a_tiny_target_warns_of_nothing(caplog):
    with caplog.at_level("WARNING"):
        calibrate_noise_multiplier(1e-7, 1e-5, 0.2, 10, "rdp")
    assert not caplog.records


WRONG_NUMBERS = ["8", None, True, [1.0], 1j, np.array([1.0]), np.bool_(True)]
WRONG_COUNTS = ["8", None, True, 10.0, np.float64(10), math.nan, [1]]


@pytest.mark.parametrize("wrong", WRONG_NUMBERS, ids=repr)
def test_what_is_no_number_gets_one_clear_sentence(wrong):
    event = PoissonGaussian(1.0, 0.1)
    for name, call in (
        ("epsilon", lambda: check_epsilon(wrong)),
        ("epsilon", lambda: calibrate_noise_multiplier(wrong, DELTA, 0.1, 10)),
        ("epsilon", lambda: max_steps(Ledger(), event, wrong, DELTA)),
        ("delta", lambda: check_delta(wrong)),
        ("delta", lambda: Ledger().epsilon(wrong)),
        ("delta", lambda: calibrate_noise_multiplier(1, wrong, 0.1, 10)),
        ("delta", lambda: max_steps(Ledger(), event, 1, wrong)),
        ("noise_multiplier", lambda: PoissonGaussian(wrong, 0.1)),
        ("sample_rate", lambda: PoissonGaussian(1.0, wrong)),
        ("sample_rate", lambda: calibrate_noise_multiplier(1, DELTA, wrong, 10)),
    ):
        with pytest.raises(TypeError, match=rf"^{name} must be a number, not .* of type {type(wrong).__name__}: \w+"):
            call()


@pytest.mark.parametrize("wrong", WRONG_COUNTS, ids=repr)
def test_what_is_no_whole_number_gets_one_clear_sentence(wrong):
    ledger = Ledger()
    for name, call in (
        ("count", lambda: ledger.append(PoissonGaussian(1.0, 0.1), wrong)),
        ("steps", lambda: calibrate_noise_multiplier(1, DELTA, 0.1, wrong)),
    ):
        with pytest.raises(TypeError, match=rf"^{name} must be a whole number, .* of type {type(wrong).__name__}: "):
            call()
    assert ledger.steps == 0


@pytest.mark.parametrize("wrong", ["x", None, (1.0, 0.1), PoissonGaussian], ids=repr)
def test_what_is_no_step_or_no_ledger_gets_one_clear_sentence(wrong):
    ledger = Ledger()
    for call in (lambda: ledger.append(wrong), lambda: max_steps(ledger, wrong, 1.0, DELTA)):
        with pytest.raises(TypeError, match=r"PoissonGaussian\(noise_multiplier, sample_rate\)"):
            call()
    with pytest.raises(TypeError, match=r"not .*: give Ledger\(\)"):
        max_steps(wrong, PoissonGaussian(1.0, 0.1), 1.0, DELTA)
    with pytest.raises(ValueError, match="choose 'pld'"):
        ledger.epsilon(DELTA, wrong)
    assert ledger.steps == 0


def test_numpy_numbers_are_numbers():
    """Of whatever width: none is computed with in its own."""
    event, narrow = PoissonGaussian(1.5, 0.125), [np.float32(value) for value in (2.9, DELTA, 0.125)]
    ledger = Ledger()
    ledger.append(PoissonGaussian(np.float32(1.5), np.float32(0.125)), np.int64(4))
    assert json.loads(json.dumps(ledger.state_dict()))["entries"][0]["count"] == 4
    found = []
    for target, delta, rate in (narrow, [float(value) for value in narrow]):
        planning._calibrate.cache_clear()  # equal numbers are one key
        composed_epsilon.cache_clear()
        found.append(
            [
                calibrate_noise_multiplier(target, delta, rate, 20, "rdp"),
                ledger.epsilon(delta),
                max_steps(ledger, event, target / 2, delta),
            ]
        )
    assert found[0] == found[1]
    of_a_byte = calibrate_noise_multiplier(*narrow, np.int8(120))
    planning._calibrate.cache_clear()
    composed_epsilon.cache_clear()
    assert of_a_byte == calibrate_noise_multiplier(*[float(value) for value in narrow], 120)


def test_an_interrupt_forgets_no_earlier_step():
    """At any line of what appends, as Ctrl-C may come."""

    def interrupt(frame: FrameType, kind: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code is not Ledger.append.__code__:
            return None
        left -= kind == "line"
        if left < 0:
            raise KeyboardInterrupt
        return interrupt

    before, interrupted = sys.gettrace(), 0
    for event in (PoissonGaussian(1.0, 0.01), PoissonGaussian(2.0, 0.01)):
        for line in range(30):
            ledger, left = Ledger(), line
            ledger.append(PoissonGaussian(1.0, 0.01), 1000)
            sys.settrace(interrupt)
            try:
                ledger.append(event, 5)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                sys.settrace(before)
            assert ledger.steps in (1000, 1005) and ledger.entries[0][1] >= 1000
    assert interrupted > 10
