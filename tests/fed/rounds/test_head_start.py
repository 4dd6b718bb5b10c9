"""Feature sums before the first round: of whom they are, what noise they have, who counts them and when."""

import json
import math
from typing import Any

import pytest
import torch

from lora_dp.errors import TooFewClients
from lora_dp.fed.rounds.head_start import start_head
from lora_dp.fed.rounds.ledgers import LOG, AheadLog
from lora_dp.fed.rounds.messages import Reply, Task
from lora_dp.fed.rounds.server import nbytes
from lora_dp.nn.feature_head import started_head
from lora_dp.privacy.accounting import PrivacyBudgetExceeded
from tests.fed.rounds import summed
from tests.fed.rounds.failing_models import ODD, Unknown, Unreadable, same_as
from tests.fed.rounds.summed import EXAMPLE, NONE, SERVER, SIZES, WAYS, WEIGHTS, sent
from tests.fed.rounds.told_clients import Told, failing
from tests.fed.small import PLAIN, Adapted, make_examples, make_federation

BOUND = WEIGHTS.sensitivity
WIDE = 400


def told(way: dict[str, Any], answers: dict[int, Any], **settings: Any) -> Any:
    """A federation whose clients answer with sums of zero, or what is said of them."""
    federation = summed.summed(way, **settings)
    federation.engine = Told(federation, {client: sent(client) for client in range(3)} | answers)
    return federation


def flat(moments: Any) -> torch.Tensor:
    """All numbers that were released, as they were."""
    parts = (moments.class_sums, moments.shares * WEIGHTS.counts, moments.first, moments.second)
    return torch.cat([part.flatten() for part in parts])


# Without noise


@pytest.mark.parametrize(
    ("settings", "weights"),
    [({}, SIZES), ({"weighting": "equal"}, (1, 1, 1)), ({"weights": [5.0, 1.0, 2.5]}, (5.0, 1.0, 2.5))],
)
@pytest.mark.parametrize("use", [{}, {"balanced": True, "warm_start": True}, {"warm_start": True}])
def test_without_noise_the_head_starts_from_all_clients_features(settings, weights, use):
    """As if they lay in one place; dropout in front of the head is off."""
    federation = summed.summed(NONE, training=use, **settings)
    exact = summed.pooled(federation, weights)
    before = dict(federation.server.state)
    moments = summed.released(federation)
    assert moments.noise == 0
    for name in ("class_sums", "shares", "first", "second"):
        torch.testing.assert_close(getattr(moments, name), getattr(exact, name), rtol=1e-9, atol=1e-12)
    balanced, warm = use.get("balanced", False), use.get("warm_start", False)
    expected = started_head(federation.model[4], exact, balanced=balanced, warm=warm)
    parts = {"feature_mean", "feature_scale", "linear.weight", "linear.bias"}
    assert set(expected) == parts | ({"class_prior"} if balanced else set())
    for name, tensor in federation.server.state.items():
        if (part := name.removeprefix("4.")) in expected:
            torch.testing.assert_close(tensor, expected[part], rtol=1e-9, atol=1e-9)
            assert not tensor.equal(before[name])
        else:
            assert tensor.equal(before[name]), name


def test_sums_of_many_parts_are_those_of_all_examples():
    """A client's batch is given to the model in several parts."""
    federation = summed.summed(NONE, training={"batch_size": 3})
    torch.testing.assert_close(flat(summed.released(federation)), flat(summed.pooled(federation, SIZES)))


# With noise


@pytest.mark.parametrize(
    ("way", "weighting"), [*((way, "equal") for way in WAYS), ("example", "examples"), ("client", "examples")]
)
def test_each_number_has_the_noise_that_is_told_and_the_sensitivity_asks_for(way, weighting):
    squares: dict[str, list[torch.Tensor]] = {}
    for seed in range(2):
        federation = summed.summed(WAYS[way], width=WIDE, weighting=weighting, seed=seed)
        weights = SIZES if weighting == "examples" else (1, 1, 1)
        exact, moments = summed.pooled(federation, weights), summed.released(federation)
        for name, z in summed.scores(moments, exact).items():
            squares.setdefault(name, []).append(z)
    sigma = federation.plan.sums_event.noise_multiplier
    deviation = sigma * BOUND / 3
    if way != "server":
        own = [1 / size if way == "example" else 1.0 for size in SIZES]
        squared = sum((weight * one) ** 2 for weight, one in zip(weights, own, strict=True))
        deviation = sigma * BOUND * math.sqrt(squared) / sum(weights)
    assert moments.noise == pytest.approx(deviation, rel=1e-9)
    for name, parts in squares.items():
        z = torch.cat(parts)
        # Four deviations of the estimates, and of the mean.
        assert abs(float(z.square().mean()) - 1) < 4 * math.sqrt(2 / z.numel()), name
        assert abs(float(z.mean())) < 4 / math.sqrt(z.numel()), name


@pytest.mark.parametrize("way", WAYS)
def test_noise_is_of_its_own_by_client_and_seed_and_a_reproducible_run_repeats_it(way):
    first, again, other = (
        flat(summed.released(summed.summed(WAYS[way], weighting="equal", seed=seed))) for seed in (0, 0, 1)
    )
    assert first.equal(again) and not first.equal(other)
    secret = flat(summed.released(summed.summed(WAYS[way], weighting="equal", reproducible=False)))
    assert not secret.equal(first)


@pytest.mark.parametrize("way", ["example", "client"])
def test_two_clients_draw_different_noise(way):
    """The difference of what two with the same examples send has noise."""
    same = [make_examples(12, 0)] * 2
    federation = summed.summed(WAYS[way], sizes=(12, 12), parts=same)
    task = Task(0, 0, 2, federation.server.state, sums=True)
    one, two = (federation.trainer.train(client, same[0], task).tensors for client in (0, 1))
    sigma = federation.plan.sums_event.noise_multiplier * BOUND / (12 if way == "example" else 1)
    z = torch.cat([(one[name] - two[name]).flatten() for name in one]) / (sigma * math.sqrt(2))
    assert abs(float(z.square().mean()) - 1) < 4 * math.sqrt(2 / z.numel())


# One client's part


@pytest.mark.parametrize("way", ["client", "server"])
def test_a_clients_whole_contribution_is_clipped(monkeypatch, way):
    """Before noise: where its features are longer than they should be, its sums are cut to the bound. Where the server
    adds the noise, a client sends what is too long, and is left out."""
    monkeypatch.setattr("lora_dp.nn.feature_head.unit_length", lambda x: x * 100)
    monkeypatch.setattr("lora_dp.privacy.mechanism.add_noise", lambda values, *_: [value.double() for value in values])
    federation = summed.summed(WAYS[way], weighting="equal")
    task = Task(0, 0, 2, federation.server.state, sums=True)
    update = federation.trainer.train(0, make_examples(12, 0), task)
    norm = math.sqrt(sum(float(tensor.square().sum()) for tensor in update.tensors.values()))
    if way == "client":
        assert BOUND * (1 - 2**-18) < norm <= BOUND
    else:
        assert norm > 2 * BOUND and not flat(summed.released(federation)).any()


def test_an_example_adds_what_it_should_and_no_more_than_the_bound(monkeypatch):
    """Beneath the noise they are the means; features that are longer than they should be are cut to the bound."""
    monkeypatch.setattr("lora_dp.privacy.mechanism.add_noise", lambda values, *_: [value.double() for value in values])
    monkeypatch.setattr("lora_dp.engine.optimizer.find_fused_step", lambda *_: None)
    federation = summed.summed(EXAMPLE, sizes=(12, 20))
    exact = summed.pooled(federation, (12, 20))
    torch.testing.assert_close(flat(summed.released(federation)), flat(exact), rtol=1e-6, atol=1e-9)
    monkeypatch.setattr("lora_dp.nn.feature_head.unit_length", lambda x: x * 100)
    alone = summed.summed(EXAMPLE, sizes=(1, 1), parts=[make_examples(1, 0)] * 2)
    norm = float(flat(summed.released(alone)).norm())
    assert BOUND * (1 - 2**-18) < norm <= BOUND


def test_what_the_server_takes_from_one_client_is_clipped_to_the_bound(monkeypatch):
    """Within a rounding of the bound it is no fault, and cut all the same."""
    monkeypatch.setattr("lora_dp.privacy.mechanism.add_noise", lambda values, *_: [value.double() for value in values])
    long = torch.zeros(3, 9, dtype=torch.float64)
    long[0, 0] = BOUND * (1 + 2.0**-11)
    federation = told(SERVER, {1: sent(1, by_class__weight=long)}, weighting="equal")
    norm = float(flat(summed.released(federation)).norm())
    assert BOUND * (1 - 1e-9) < norm * 3 <= BOUND


@pytest.mark.parametrize("way", [NONE, EXAMPLE])
def test_sums_as_long_as_the_bound_are_taken(way):
    """All features on one axis, in float32, where a rounding may make them longer."""
    federation = told(way, {})
    value = torch.zeros(3, 9, dtype=torch.float64)
    value[0, 0] = BOUND * (1 + 1e-6)
    federation.engine.answers = {client: sent(client, by_class__weight=value) for client in range(3)}
    assert float(summed.released(federation).class_sums[0, 0]) == pytest.approx(BOUND, rel=1e-5)


WRONG = {
    "nan": sent(1, math.nan),
    "inf": sent(1, by_class__weight=torch.full((3, 9), math.inf, dtype=torch.float64)),
    "shape": sent(1, by_class__weight=torch.zeros(9, 3, dtype=torch.float64)),
    "dtype": sent(1, by_class__weight=torch.zeros(3, 9)),
    "missing": sent(1, by_class__weight=None),
    "more": sent(1, secret=torch.zeros(1, dtype=torch.float64)),
    "huge": sent(1, 1e6),
    "nothing": Reply(1, None),
    "no update": Reply(1, "sums"),  # type: ignore[arg-type]
    "failure": failing(1),
    "silent": None,
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("way", ["none", "example", "client", "server"])
def test_a_client_that_sends_what_cannot_be_used_is_left_out(way, wrong):
    """The others' mean is of them alone, and has their noise; under the server's noise neither it nor the divisor
    changes."""
    value = 0.05
    settings = {**WAYS, "none": NONE}[way]
    answers = {0: sent(0, value), 1: WRONG[wrong], 2: sent(2, value)}
    federation = told(settings, answers, weighting="equal")
    moments = summed.released(federation)
    if way == "server":
        whole = told(settings, {0: sent(0, value), 2: sent(2, value)}, weighting="equal")
        assert flat(moments).equal(flat(summed.released(whole))) and moments.noise > 0
        return
    torch.testing.assert_close(flat(moments), torch.full_like(flat(moments), value))
    sigma = federation.plan.sums_event.noise_multiplier * BOUND
    own = {"none": (0, 0), "example": (sigma / 12, sigma / 9), "client": (sigma, sigma)}[way]
    assert moments.noise == pytest.approx(math.hypot(*own) / 2)


def test_an_answer_that_nobody_asked_for_counts_nothing():
    """A second one of the same client, and one of a client that there is not."""
    value = 0.05
    federation = told(NONE, {})
    federation.engine.train = lambda tasks, on_step: iter(
        [sent(0, value), sent(0, 0.09), sent(7, 0.09), sent(1, value), sent(2, value), sent(2, -0.09)]
    )
    moments = summed.released(federation)
    torch.testing.assert_close(flat(moments), torch.full_like(flat(moments), value))


@pytest.mark.parametrize("way", ["none", "example", "client"])
def test_too_few_clients_stop_the_run(way):
    federation = told({**WAYS, "none": NONE}[way], {0: failing(0, "is\nout"), 1: None}, min_clients=2)
    before = dict(federation.server.state)
    with pytest.raises(TooFewClients, match=r"sums: 1 of 3, min_clients is 2 \(client 0 is.?.?out; client 1 sent noth"):
        start_head(federation)
    assert all(tensor is before[name] for name, tensor in federation.server.state.items())
    assert federation.account._sums.tolist() == [1, 1, 1]
    nobody = told(NONE, dict.fromkeys(range(3)), min_clients=0)
    with pytest.raises(TooFewClients, match="0 of 3"):
        start_head(nobody)


def test_under_the_servers_noise_nobody_is_noise_alone():
    """That a run stopped would tell who had answered."""
    federation = told(SERVER, dict.fromkeys(range(3)), weighting="equal", min_clients=3)
    moments = summed.released(federation)
    assert float(flat(moments).std()) == pytest.approx(moments.noise, rel=0.5)


@pytest.mark.parametrize("way", ["example", "client", "server"])
@pytest.mark.parametrize("kind", [Unreadable, Unknown])
def test_an_example_on_which_it_fails_adds_nothing(way, kind):
    """With the example as unit, the others' sums are as without it, to the bit. With the client as unit the whole
    client adds nothing."""
    plain, broken = make_examples(12, 0), same_as(make_examples(12, 0), kind)
    federation = summed.summed(WAYS[way], sizes=(12, 12), parts=[broken, broken], weighting="equal")
    exact = summed.summed({**NONE}, sizes=(12, 12), parts=[plain, plain], weighting="equal")
    units, labels = summed.features(exact, 0)
    kept = torch.arange(12) != ODD
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_dp.privacy.mechanism.add_noise", lambda values, *_: [value.double() for value in values])
        patch.setattr("lora_dp.engine.optimizer.find_fused_step", lambda *_: None)
        moments = summed.released(federation)
    if way == "example":
        torch.testing.assert_close(moments.first, units[kept].sum(0) / 12, rtol=1e-6, atol=1e-9)
        shares = torch.bincount(labels[kept], minlength=3).double() / 12
        torch.testing.assert_close(moments.shares, shares, rtol=1e-6, atol=1e-9)
    else:
        assert not flat(moments).any()


@pytest.mark.parametrize("way", ["none", *WAYS])
def test_the_bytes_are_those_of_all_who_answered(way):
    """Under the server's noise, of all: who answered is not told."""
    federation = told({**WAYS, "none": NONE}[way], {1: None}, weighting="equal")
    down, up = start_head(federation)
    clients = 3 if way == "server" else 2
    assert up == clients * 8 * (3 * 9 + 16)
    assert down == clients * nbytes(summed.summed(NONE).server.state)


# The ledger


@pytest.mark.parametrize("way", WAYS)
def test_the_ledger_counts_the_sums_before_anybody_is_asked(tmp_path, way):
    federation = told(WAYS[way], {}, weighting="equal", reproducible=False)
    federation.log = AheadLog(tmp_path / LOG)
    federation.log.begin(federation.account, reproducible=False)

    def asked(task: Task) -> None:
        ledger = federation.account.ledger(0)
        assert ledger.entries == ((federation.plan.sums_event, 1),) and task.sums
        last = json.loads((tmp_path / LOG).read_text().splitlines()[-1])
        assert (last["round"], last["clients"]) == (0, [] if way == "server" else [0, 1, 2])
        raise ZeroDivisionError

    federation.engine.answers = dict.fromkeys(range(3), asked)
    with pytest.raises(ZeroDivisionError):
        start_head(federation)
    counted = AheadLog(tmp_path / LOG).counted(federation.plan)
    assert counted is not None and counted.worst_epsilon() == federation.account.worst_epsilon() > 0


@pytest.mark.parametrize(
    "place",
    ["lora_dp.fed.rounds.head_start.nbytes", "lora_dp.fed.rounds.head_start.started_head", "fault", "weight", "apply"],
)
def test_what_fails_later_has_been_counted(monkeypatch, place):
    federation = told(EXAMPLE, {})
    before = dict(federation.server.state)

    def fails(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    if place == "fault":
        place = "lora_dp.fed.rounds.head_start.fault"
    if place == "weight":
        federation.weight = fails
    elif place == "apply":
        federation.server.apply = fails
    else:
        monkeypatch.setattr(place, fails)
    with pytest.raises(KeyboardInterrupt):
        start_head(federation)
    assert federation.account.ledger(2).entries == ((federation.plan.sums_event, 1),)
    assert all(tensor is before[name] for name, tensor in federation.server.state.items())


def test_a_log_that_cannot_be_written_lets_nobody_release(tmp_path):
    federation = told(EXAMPLE, {}, reproducible=False)
    federation.log = AheadLog(tmp_path / LOG)
    federation.log.append = lambda *_: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        start_head(federation)
    assert federation.engine.asked == []


@pytest.mark.parametrize("way", WAYS)
def test_sums_that_would_lead_above_the_budget_are_not_released_again(way):
    """After a crash: two releases of six tenths of the budget are more than all of it."""
    federation = told({**WAYS[way], "sums_share": 0.6}, {}, weighting="equal")
    start_head(federation)
    asked = list(federation.engine.asked)
    with pytest.raises(PrivacyBudgetExceeded, match="Feature sums were released before"):
        start_head(federation)
    assert federation.engine.asked == asked and federation.account.worst_epsilon() <= 8
    small = told({**WAYS[way], "sums_share": 0.3}, {}, weighting="equal")
    start_head(small)
    start_head(small)
    assert small.account.worst_epsilon() <= 8


@pytest.mark.parametrize("way", ["example", "client"])
def test_a_whole_run_is_within_its_budget_and_spends_it(way):
    federation = summed.summed({**WAYS[way], "rounds": 2, "participations": 2}, weighting="equal")
    start_head(federation)
    while federation.account.eligible():
        federation.run_round()
    assert federation.rounds_done == 2
    assert 8 * 0.998 < federation.account.worst_epsilon() <= 8


# The model


@pytest.mark.parametrize("way", [NONE, *WAYS.values()])
def test_afterwards_the_model_is_as_it_was(way):
    federation = summed.summed(way, weighting="equal")
    federation.model.eval()
    federation.model[1].train()
    modes = [module.training for module in federation.model.modules()]
    trained = {name: parameter.requires_grad for name, parameter in federation.model.named_parameters()}
    start_head(federation)
    assert [module.training for module in federation.model.modules()] == modes
    assert {name: parameter.requires_grad for name, parameter in federation.model.named_parameters()} == trained
    federation.run_round()


def test_a_model_without_a_feature_head_releases_nothing():
    federation = make_federation("dp-lora", PLAIN, **EXAMPLE)
    assert isinstance(federation.model, Adapted)
    with pytest.raises(ValueError, match="need a head on features of unit length"):
        start_head(federation)
    assert federation.account.ledger(0).steps == 0
