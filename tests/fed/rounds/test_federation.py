"""The round loop, with clients that answer what they are told to: draws, what is counted, sent, combined, told."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lora_dp.fed.models.task_losses
import lora_dp.fed.rounds.client
import lora_dp.fed.rounds.federation
from lora_dp.errors import IsolationError, TooFewClients
from lora_dp.fed.methods import WeightedAverage
from lora_dp.fed.origin import Origin
from lora_dp.fed.rounds import server_noise
from lora_dp.fed.rounds.client import Trainer
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.ledgers import Account
from lora_dp.fed.rounds.messages import Reply, Update
from lora_dp.fed.rounds.saved_state import checkpoint, restore
from lora_dp.privacy.accounting import PoissonGaussian, PrivacyBudgetExceeded
from tests.fed.rounds.failing_models import Mixing
from tests.fed.rounds.told_clients import CLIENT, NONE, SERVER, begun, failing
from tests.fed.small import TRAINING, Adapted, federation_generators

# Numbers in the adapters, in B and the head, and in A and the head of the model; all have eight bytes.
ALL, B, A = 81, 45, 57


def moved(federation, start, name="4.weight"):
    """By how much a round has moved a tensor, all of whose numbers moved alike."""
    change = federation.server.state[name] - start[name]
    assert torch.allclose(change, change.flatten()[0].expand_as(change), rtol=0, atol=1e-12)
    return float(change.flatten()[0])


# Draws


def test_a_public_draw_is_of_as_many_as_asked_for_and_follows_the_seed_and_the_round():
    draws = []
    for seed in (0, 0, 1):
        federation = begun(sizes=[10] * 9, seed=seed, clients_per_round=4)
        draws.append([])
        for federation.rounds_done in range(8):
            draws[-1].append(tuple(federation.draw()))
    assert draws[0] == draws[1] != draws[2] and len(set(draws[0])) > 4
    assert all(len(set(draw)) == 4 and set(draw) < set(range(9)) for draw in draws[0])
    assert begun().draw() == [0, 1]


@pytest.mark.slow
def test_the_secret_draw_is_of_all_clients_at_the_planned_rate(monkeypatch):
    even = SimpleNamespace(uniform=lambda count: torch.arange(count) / count)
    monkeypatch.setattr(Trainer, "source", lambda self, *place: even)
    federation = begun(sizes=[1] * 400, privacy={**SERVER, "client_rate": 0.25})
    assert federation.draw() == list(range(100))


@pytest.mark.slow
def test_no_two_sources_of_random_numbers_of_a_run_coincide(monkeypatch):
    """Of the server: its draws of clients, what a round begins with, the noise of each turn."""
    seeds, plain = [], lora_dp.fed.rounds.seeds.derived_seed

    def noted(*path):
        seeds.append(plain(*path))
        return seeds[-1]

    for module in (lora_dp.fed.rounds.client, lora_dp.fed.rounds.federation):
        monkeypatch.setattr(module, "derived_seed", noted)
    federation = begun("deer", privacy={**SERVER, "client_rate": 0.5})
    for _ in range(9):
        federation.run_round(evaluate=False)
    assert len(seeds) == len(set(seeds)) == 9 * 4


def test_a_round_begins_with_its_own_public_generator():
    federation = begun("flora")
    starts = []
    federation.engine.answers = {0: lambda task: starts.append(dict(task.state)) or 1.0}
    expected = []
    for index, generator in enumerate(federation_generators(3)):
        fresh = federation.method.begin(federation.server.state, federation.server.layers, index, generator)
        expected.append({**federation.server.state, **fresh}["1.lora_A"])
        federation.run_round()
    assert all(start["1.lora_A"].equal(wanted) for start, wanted in zip(starts, expected, strict=True))
    assert not expected[1].equal(expected[2])


# What a round counts


@pytest.mark.slow
def test_participants_may_be_named_where_no_secret_draw_of_them_amplifies():
    secret = begun(privacy={**SERVER, "client_rate": 0.5})
    with pytest.raises(ValueError, match="leave participants out, or let all clients take part"):
        secret.run_round([0])
    assert secret.account.releases(0) == secret.rounds_done == 0 and secret.engine.asked == []
    secret.run_round()
    assert secret.account.releases(0) == secret.rounds_done == 1
    for privacy in (SERVER, {**CLIENT, "client_rate": 0.5}, {**NONE, "client_rate": 0.5}):
        federation = begun(privacy=privacy)
        federation.run_round([1])
        assert federation.engine.asked == [(0, 0, 1)]


def test_who_has_spent_its_budget_takes_part_in_no_more_rounds():
    federation = begun(privacy={**CLIENT, "participations": 1})
    assert federation.run_round([0]).participants == [0]
    with pytest.raises(PrivacyBudgetExceeded, match="Client 0 has spent its budget"):
        federation.run_round([0, 1])
    assert [federation.account.releases(client) for client in (0, 1)] == [1, 0]
    assert federation.rounds_done == len(federation.engine.asked) == 1
    assert federation.run_round().participants == [1]
    with pytest.raises(PrivacyBudgetExceeded, match="No client has budget left"):
        federation.draw()


@pytest.mark.parametrize("privacy, shown", [(NONE, [1]), (CLIENT, [1]), (SERVER, [])])
def test_a_round_is_in_the_log_before_any_client_is_asked(privacy, shown):
    written = []
    federation = begun(privacy=privacy)
    federation.log = SimpleNamespace(
        append=lambda *line: written.append((*line, len(federation.engine.asked), federation.account.releases(1)))
    )
    federation.run_round([1])
    federation.run_round([1])
    each = federation.plan.releases_per_round
    assert written == [(1, shown, 0, each), (2, shown, 1, 2 * each)]


def test_the_epsilon_of_a_round_is_a_quick_bound_where_clients_differ_in_many_ways():
    sizes = range(10, 19)
    federation = begun(sizes=sizes, privacy={**CLIENT, "accountant": "pld"})
    federation.account = Account(federation.plan, sizes, events=[PoissonGaussian(5.0 + size, 1.0) for size in range(9)])
    result = federation.run_round()
    assert result.epsilon == federation.account.worst_epsilon(exact=False) > federation.account.epsilon(0) > 0


# What a round tells


def test_a_round_tells_who_took_part_what_was_trained_and_what_it_came_to():
    federation = begun("rolora", answers={1: None})
    for number, factor in enumerate("BAB", 1):
        result = federation.run_round(evaluate=number != 2)
        assert (result.round, result.phases, result.participants) == (number, factor, [0])
        assert result.failed == [{"client": 1, "reason": "sent nothing"}] and result.epsilon == math.inf
        found = (result.loss, result.accuracy, result.balanced_accuracy)
        assert found == ((None,) * 3 if number == 2 else federation.evaluate())
    assert begun("la-lora").run_round().phases == "BA" and begun("deer").run_round().phases == "B A"


@pytest.mark.slow
@pytest.mark.parametrize(
    "privacy, reproducible, told",
    [
        (NONE, True, True),
        (NONE, False, True),
        ({}, True, True),
        ({}, False, False),
        (CLIENT, False, False),
        (SERVER, True, False),
        (SERVER, False, False),
    ],
)
def test_how_long_a_round_takes_is_told_only_where_it_hangs_on_nothing_secret(privacy, reproducible, told, monkeypatch):
    times = iter([100.0, 100.5, 200.0, 200.25])
    monkeypatch.setattr(lora_dp.fed.rounds.federation, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    federation = begun(privacy=privacy, reproducible=reproducible)
    assert federation.start().seconds == 0.5
    assert federation.run_round().seconds == (0.25 if told else None)


def test_the_start_is_round_0_of_nobody():
    federation = begun(privacy=CLIENT)
    result = federation.start()
    assert (result.round, result.phases, result.participants, result.failed) == (0, "", [], [])
    assert (result.loss, result.accuracy, result.balanced_accuracy) == federation.evaluate()
    assert result.epsilon == result.bytes_up == result.bytes_down == 0


def test_bytes_are_those_of_the_tensors_that_went_up_and_of_what_was_news_to_each_client():
    federation = begun("ffa-lora")
    found = [(r.bytes_up, r.bytes_down) for r in map(federation.run_round, ([0], [0, 1], [0, 1], [1]))]
    assert found == [(8 * up, 8 * down) for up, down in ((B, ALL), (2 * B, B + ALL), (2 * B, 2 * B), (B, B))]
    assert federation.seen.tolist() == [2, 3]
    result = begun("deer", answers={1: failing(1)}).run_round()
    assert (result.bytes_up, result.bytes_down) == (8 * (B + A), 8 * (ALL + B))


@pytest.mark.slow
def test_under_a_secret_draw_bytes_are_those_of_the_expected_number_of_clients(monkeypatch):
    drawn = iter([[], [0, 1, 2], [1]])
    monkeypatch.setattr(lora_dp.fed.rounds.federation, "poisson_clients", lambda *_: next(drawn))
    federation = begun("ffa-lora", [10] * 3, privacy={**SERVER, "client_rate": 0.3})
    for news in (ALL, B, B):
        result = federation.run_round()
        found = (result.bytes_up, result.bytes_down)
        assert found == (round(0.9 * 8 * B), round(0.9 * 8 * news)) and {type(n) for n in found} == {int}
        assert result.participants is None and federation.seen.tolist() == [-1] * 3
    other = begun("flexlora", [10] * 3, privacy={**SERVER, "client_rate": 0.3}, ranks=[1, 2, 2])
    monkeypatch.setattr(lora_dp.fed.rounds.federation, "poisson_clients", lambda *_: [])
    result = other.run_round()
    assert result.bytes_up == result.bytes_down == round(0.3 * 8 * ((30 + 21) + 2 * ALL))


def test_a_round_records_the_updates_of_each_of_its_turns():
    federation = begun("deer", answers={1: 0.5})
    for number in (1, 2):
        federation.run_round()
        assert [(line["round"], line["turn"], line["clients"]) for line in federation.recorded] == [
            (number, 0, [0, 1]),
            (number, 1, [0, 1]),
        ]
        for line, count in zip(federation.recorded, (B, A), strict=True):
            assert line["norms"] == pytest.approx([math.sqrt(count), 0.5 * math.sqrt(count)])
    federation.engine.answers = dict.fromkeys((0, 1))
    with pytest.raises(TooFewClients):
        federation.run_round()
    assert federation.recorded == []
    secret = begun(privacy=SERVER)
    secret.run_round()
    assert secret.recorded == []


def test_the_share_of_noise_that_is_recorded_is_that_of_the_planned_noise():
    """By the numbers that the round trains: B in the first, A in the second."""
    federation = begun("rolora", privacy=CLIENT, answers={1: 0.5})
    deviation = federation.plan.event(10).noise_multiplier * federation.plan.max_update_norm
    for _ in range(2):
        federation.run_round()
        assert federation.recorded[0]["noise_share"] == pytest.approx([deviation**2, deviation**2 / 0.25])


# What is combined


def test_the_mean_is_weighted_by_examples_or_by_what_is_given_or_not_at_all():
    for settings, expected in (({}, 2.5), ({"weighting": "equal"}, 2.0), ({"weights": [0.5, 0.75]}, 2.2)):
        federation = begun(answers={0: 1.0, 1: 3.0}, **settings)
        start = dict(federation.server.state)
        federation.run_round()
        assert moved(federation, start) == pytest.approx(expected)


@pytest.mark.parametrize("settings, expected", [({}, [10.0, 30.0]), ({"weighting": "equal"}, [1.0, 1.0])])
def test_an_aggregation_of_one_s_own_is_given_plain_numbers_as_weights(settings, expected, monkeypatch):
    weights = []

    class Noting(WeightedAverage):
        def add(self, contribution, weight):
            weights.append(weight)
            super().add(contribution, weight)

    federation = begun(**settings)
    monkeypatch.setattr(type(federation.method), "aggregation", lambda self: Noting())
    federation.run_round()
    assert weights == expected and {type(weight) for weight in weights} == {float}


def test_the_server_sums_the_changes_of_all_that_answered(monkeypatch):
    """Without its noise: over the expected number of clients."""
    monkeypatch.setattr(server_noise, "client_mechanism", lambda *_: SimpleNamespace(release=lambda sums: sums))
    federation = begun(sizes=[10] * 4, answers={0: 0.5, 1: 0.25, 2: None}, privacy={**SERVER, "max_update_norm": 1e3})
    start = dict(federation.server.state)
    assert federation.run_round([0, 1, 2]).failed == [{"client": 2, "reason": "sent nothing"}]
    assert moved(federation, start) == pytest.approx(0.75 / 4)


def test_the_first_answer_of_a_client_counts_and_no_stranger_s():
    federation = begun(sizes=[10] * 3, answers={0: 1.0, 2: 3.0})
    plain = federation.engine.train

    def more(tasks, on_step):
        for reply in plain(tasks, on_step):
            yield reply
            large = {name: tensor + 50 for name, tensor in reply.update.tensors.items()}
            yield from (Reply(client, Update(large)) for client in (reply.client, 1, 77))

    federation.engine.train = more
    start = dict(federation.server.state)
    result = federation.run_round([0, 2])
    assert (result.participants, result.failed) == ([0, 2], []) and moved(federation, start) == pytest.approx(2.0)


# Trials of the model


def mixing():
    model = Adapted()
    model[1] = Mixing(model[1])
    return model.eval()


@pytest.mark.slow
def test_a_model_that_mixes_is_refused_where_examples_are_protected():
    for count in (2, 3, 5):
        with pytest.raises(IsolationError):
            begun(privacy={}, model=mixing(), validation=count).check_model()
    begun(privacy={}, model=mixing(), validation=1).check_model()
    begun(model=mixing()).check_model()
    for model in (Adapted().train(), Adapted().eval()):
        mode = model.training
        begun(privacy={}, model=model, validation=3).check_model()
        assert model.training == mode


@pytest.mark.parametrize("validation, batch_size, tried", [(3, 8, 3), (5, 8, 4), (5, 2, 2)])
def test_whole_clients_are_tried_on_a_few_examples_and_refused_where_training_fails(
    validation, batch_size, tried, monkeypatch
):
    federation = begun("deer", privacy=CLIENT, validation=validation, training=replace(TRAINING, batch_size=batch_size))
    seen, plain = [], lora_dp.fed.models.task_losses.logits

    def noted(model, batch, *precision):
        seen.append(len(batch["labels"]))
        return plain(model, batch, *precision)

    monkeypatch.setattr(lora_dp.fed.models.task_losses, "logits", noted)
    federation.check_model()
    assert seen == [tried]
    monkeypatch.setattr(lora_dp.fed.models.task_losses, "logits", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=r"fails on validation data \(ZeroDivisionError: .*noise alone"):
        federation.check_model()
    begun("deer").check_model()


# Evaluation


def test_the_global_model_is_evaluated_as_it_is_used_on_all_validation_data():
    model = Adapted()
    model[2] = nn.Dropout(0.9)
    federation = begun(model=model, validation=600)
    federation.server.state = {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1), dtype=tensor.dtype)
        for name, tensor in federation.server.state.items()
    }
    model.train()
    loss, accuracy, _ = federation.evaluate()
    batch = federation.validation.batch(range(600))
    scores = model.eval()(batch["pixel_values"])
    assert type(loss) is type(accuracy) is float
    assert loss == pytest.approx(nn.functional.cross_entropy(scores, batch["labels"]).item(), rel=1e-12)
    assert accuracy == pytest.approx((scores.argmax(1) == batch["labels"]).double().mean().item(), rel=1e-12)
    assert 0.1 < accuracy < 0.9 and model[1].lora_A.equal(federation.server.state["1.lora_A"])


# Beginning and going on


def test_a_federation_of_a_job_has_the_settings_of_its_configuration():
    made = begun(privacy=CLIENT)
    origin = Origin({"seed": 3}, "0" * 64)
    job = SimpleNamespace(
        trainer=made.trainer,
        sizes=[10, 30, 20],
        validation=made.validation,
        ranks=[2, 1, 2],
        origin=lambda config: origin,
        prompts="what to go on from",
    )
    chosen = SimpleNamespace(weighting="equal", client_timeout=7, clients_per_round=2, min_clients=2, fault_norm=5.0)
    config = SimpleNamespace(federation=chosen)
    federation = Federation.of_job(config, job)
    assert federation.engine.trainer is made.trainer and federation.engine.timeout == 7
    assert (federation.weighting, federation.min_clients, federation.fault_norm) == ("equal", 2, 5.0)
    assert federation.clients == 3 and federation.ranks == [2, 1, 2] and len(federation.draw()) == 2
    assert federation.account.sizes.tolist() == [10, 30, 20] and federation.account.origin is origin
    assert federation.prompts == "what to go on from"
    given = Federation.of_job(config, job, made.engine, weights=[1.0, 2.0, 3.0])
    assert given.engine is made.engine and given._weights.tolist() == [1, 2, 3]


def test_a_checkpoint_through_json_is_where_a_fresh_federation_goes_on():
    whole = begun("ffa-lora", [10] * 3, {1: 2.0})
    whole.log = SimpleNamespace(run="digest", append=lambda *_: None)
    whole.run_round([0, 1])
    whole.run_round([1])
    state, numbers = checkpoint(whole)
    assert numbers["run"] == "digest" and checkpoint(begun())[1]["run"] is None
    resumed = begun("ffa-lora", [10] * 3, {1: 2.0})
    restore(resumed, {name: tensor.clone() for name, tensor in state.items()}, json.loads(json.dumps(numbers)))
    assert resumed.rounds_done == 2 and resumed.seen.tolist() == [0, 1, -1]
    assert all(tensor.equal(whole.server.state[name]) for name, tensor in resumed.server.state.items())
    first, second = whole.run_round(), resumed.run_round()
    assert (first.round, first.bytes_down, first.loss) == (second.round, second.bytes_down, second.loss)
    assert first.loss is not None
