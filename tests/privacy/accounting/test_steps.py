"""Numbers that describe a step: those of every kind are taken, the others refused in one sentence."""

import json
import math

import numpy as np
import pytest

from lora_dp.privacy.accounting import (
    Ledger,
    PoissonGaussian,
    calibrate_noise_multiplier,
    check_delta,
    check_epsilon,
    max_steps,
    planning,
)
from lora_dp.privacy.accounting.epsilon import composed_epsilon
from tests.privacy.accounting.dp_accounting_oracle import DELTA


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


@pytest.mark.slow
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
