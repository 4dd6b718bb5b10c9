"""Silent ways to break differential privacy: an account that is behind, or of another run.

Each promise is a check that passes on the real engine. Beside it a bug is planted, and the same check must fail.

Statistical checks reject at |z| > 5.4, which a right implementation does with probability below 1e-7 for each.
"""

import pytest

import lora_dp.engine.engine
from lora_dp import Ledger, PrivacyEngine, PrivateOptimizer
from lora_dp.privacy.mechanism import Mechanism
from tests.models import examples, loader_of, mlp, private_run, pure_noise, take_step
from tests.support import check_deviation, make_private

# The ledger is never behind


class Crash(Exception):
    pass


def check_ledger_is_never_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(self: Mechanism, size: int) -> float:
        raise Crash

    for step in (lambda m, o: take_step(m, o, examples(4)), lambda m, o: o.step_on_empty_batch()):
        model = mlp()
        optimizer = make_private(model, batch_size=4, noise_multiplier=1.0)
        step(model, optimizer)
        assert optimizer.ledger.steps == 1
        with monkeypatch.context() as during:
            during.setattr(Mechanism, "noise_std", crash)
            with pytest.raises(Crash):
                step(model, optimizer)
        assert optimizer.ledger.steps == 2


def test_ledger_is_never_behind(monkeypatch):
    check_ledger_is_never_behind(monkeypatch)


def test_entering_a_step_after_its_release_is_caught(bug):
    release = PrivateOptimizer._release

    def planted(self: PrivateOptimizer) -> None:
        real, vars(self)["_ledger"] = self.ledger, Ledger()
        try:
            release(self)
        finally:
            vars(self)["_ledger"] = real
        self.ledger.append(self.event)

    bug.setattr(PrivateOptimizer, "_release", planted)
    with pytest.raises(AssertionError):
        check_ledger_is_never_behind(bug)


# What the account says is what was done


def check_ledger_describes_the_run() -> None:
    engine = PrivacyEngine("rdp", reproducible_seed=1)
    model, optimizer, loader = private_run(engine, size=40, batch_size=8, noise_multiplier=1.5, max_grad_norm=0.4, lr=0)
    optimizer.batch._drawn.clear()
    noise = pure_noise(model, optimizer, 300)
    ((event, count),) = engine.ledger.entries
    assert count == 300
    assert event.sample_rate == 8 / 40
    check_deviation(noise, event.noise_multiplier * 0.4)


def test_ledger_describes_the_run():
    check_ledger_describes_the_run()


def test_an_account_of_more_noise_than_there_is_is_caught(bug):
    std = Mechanism.noise_std
    bug.setattr(Mechanism, "noise_std", lambda self, size: std(self, size) / 1.1)
    with pytest.raises(AssertionError, match="deviation"):
        check_ledger_describes_the_run()


def test_a_wrong_sample_rate_is_caught(bug):
    event = lora_dp.engine.engine.PoissonGaussian
    bug.setattr(lora_dp.engine.engine, "PoissonGaussian", lambda sigma, rate: event(sigma, rate / 2))
    with pytest.raises(AssertionError):
        check_ledger_describes_the_run()


def test_loader_of_its_own_rate():
    """The data set's size is the one thing about the data that the account uses."""
    _, optimizer, loader = private_run(PrivacyEngine("rdp", reproducible_seed=1), size=33, batch_size=11)
    assert optimizer.event.sample_rate == loader.sample_rate == 11 / 33
    assert loader_of(33, 11).batch_size == optimizer.expected_batch_size == 11
