"""Feature sums are audited beside the rounds: scores add up, sound runs pass, faults of the sums do not."""

import math

import pytest

from lora_dp.auditing import GradientCanaries
from lora_dp.fed.auditing import command
from lora_dp.fed.auditing.clients import ClientCanaries, most_clients
from lora_dp.fed.auditing.gradients import most_gradients, train_with_gradients
from lora_dp.fed.auditing.options import AuditConfig
from lora_dp.fed.rounds.client import Trainer
from tests.faults.fed_plants import sums_barely_noised, sums_not_counted
from tests.faults.planting import Planting
from tests.fed.auditing.small_runs import CLIENTS, SMALL, SUMS, audited, opened

WAYS = {
    "example": {**SMALL, **SUMS},
    "client": {**CLIENTS, **SUMS, "noise_by": "client"},
    "server": {**CLIENTS, **SUMS, "method": "deer"},
}
COUNT = 200
each_way = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)


@pytest.mark.slow
@each_way
def test_scores_are_the_likelihood_ratio_of_sums_and_steps_and_what_is_sound_is_not_violated(options, monkeypatch):
    """Everybody in every release: scores are normal around ±μ²/2 with variance μ² = Σ 1/σ²."""
    game = opened({**options, "epsilon": 20.0, "sums_share": 0.7, "batch_size": 1000})
    kind = GradientCanaries if "unit" not in options else ClientCanaries
    play, played = kind.play, []

    def noted(self, train_fn, included, generator):
        found = play(self, train_fn, included, generator)
        played.append((found.scores, included))
        return found

    monkeypatch.setattr(kind, "play", noted)
    asked, steps = AuditConfig("a.yaml", confidence=0.999, count=COUNT), []
    game.on_step = lambda: steps.append(1)
    result = command._play(game, asked, COUNT)
    assert not result.violated and result.claimed_epsilon == pytest.approx(20, abs=0.02)
    assert len(steps) == command._steps(game, asked, COUNT)
    (sums, once), (event, rounds) = game.ledger.entries
    assert once == rounds == 1 and sums.noise_multiplier < 0.8 * event.noise_multiplier
    [(scores, included)] = played
    mu = math.sqrt(1 / sums.noise_multiplier**2 + 1 / event.noise_multiplier**2)
    for chosen, mean in ((included, 0.5 * mu**2), (~included, -0.5 * mu**2)):
        centred = (scores[chosen] - mean) / mu
        assert abs(centred.mean()) < 4.5 / math.sqrt(chosen.sum())
        assert centred.std() == pytest.approx(1, abs=4.5 / math.sqrt(2 * chosen.sum()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "epsilon", "fault"), [("client", 8.0, sums_not_counted), ("server", 1.5, sums_barely_noised)]
)
def test_faults_of_the_sums_are_violations(way, epsilon, fault, monkeypatch):
    """Those of the other ways are found in tests/faults."""
    planting = Planting(monkeypatch)
    fault(planting)
    assert audited({**WAYS[way], "epsilon": epsilon}).violated
    assert planting.calls


@pytest.mark.slow
def test_each_training_starts_afresh(monkeypatch):
    """Otherwise the second would begin with a head that the first has started, and count its sums twice."""
    game, starts = opened(WAYS["example"]), []
    train = Trainer.train

    def noted(self, client, examples, task, on_step=lambda: None):
        if task.sums:
            starts.append(float(task.state["head.feature_mean"].norm()))
        return train(self, client, examples, task, on_step)

    monkeypatch.setattr(Trainer, "train", noted)
    trained, ledgers = train_with_gradients(game), []
    for _ in range(2):
        trained(lambda optimizer, loader: None)
        ledgers.append(game.ledger.entries)
    assert starts == [0.0, 0.0]
    assert ledgers[0] == ledgers[1] and [count for _, count in ledgers[0]] == [1, 1]


@pytest.mark.slow
def test_canaries_have_numbers_of_their_own_in_the_sums_too():
    """10 classes with 64 features and a count, and two moments: fewer numbers than a step trains."""
    numbers = 10 * 65 + 2 * 64
    assert most_gradients(opened(WAYS["example"])) == numbers
    assert most_clients(opened(WAYS["client"])) == numbers
