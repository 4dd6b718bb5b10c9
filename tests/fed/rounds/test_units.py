"""The units of privacy: examples, or whole clients with noise by the server or by themselves; what is as released."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import norm

from lora_dp.fed.config import RunConfig
from lora_dp.fed.methods import METHODS, factor
from lora_dp.fed.rounds.messages import Reply, Update
from lora_dp.nn.regulator import Regulator
from lora_dp.privacy.accounting import Ledger, PoissonGaussian, PrivacyBudgetExceeded
from tests.fed.rounds.units import SERVER
from tests.fed.small import TRAINING, make_federation, plan_for, products, updates

CLIENT = {"unit": "client", "noise_by": "client"}


class Scripted:
    """An engine whose clients answer what they are told to: a change of every tensor that the turn trains."""

    def __init__(self, federation, changes):
        self.federation, self.changes = federation, changes

    def train(self, tasks, on_step):
        for client, task in tasks:
            trains = self.federation.method.trains
            names = [n for n in self.federation.workspace.state() if trains(n, task.round, task.turn)]
            generator = torch.Generator().manual_seed(client)
            yield Reply(
                client,
                Update(
                    {
                        name: task.state[name]
                        + self.changes[client]
                        * torch.randn(task.state[name].shape, generator=generator, dtype=torch.float64)
                        for name in names
                    }
                ),
            )


def scripted(method, changes, **options):
    federation = make_federation(method, sizes=[10] * len(changes), weighting="equal", **options)
    federation.engine = Scripted(federation, changes)
    return federation


@pytest.mark.slow
@pytest.mark.parametrize("privacy", [SERVER, CLIENT, {}, {"epsilon": None}])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_under_every_unit(method, privacy):
    federation = make_federation(method, weighting="equal", **privacy)
    results = [federation.run_round() for _ in range(2)]
    spent = [result.epsilon for result in results]
    if privacy.get("epsilon", 8) is None:
        assert spent == [math.inf] * 2
    else:
        assert 0 < spent[0] < spent[1] <= 8
    assert all(tensor.isfinite().all() for tensor in federation.server.state.values())


# The accounting


@pytest.mark.slow
def test_the_server_s_noise_is_accounted_at_the_rate_of_the_draw():
    plan = plan_for(make_federation("deer").method, TRAINING, **SERVER, client_rate=0.25, rounds=6, clients=20)
    event = plan.event(17)
    assert (event.sample_rate, plan.planned_releases, plan.releases_per_round) == (0.25, 6, 1)
    ledger = Ledger()
    ledger.append(event, 6)
    assert 8 * 0.998 < ledger.epsilon(1e-5, "rdp") <= 8


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_turns_that_share_a_draw_of_clients_are_one_release(rate):
    """Privacy of a round, integrated over the outputs of both of deer's turns: all clients of a round are drawn once,
    so that a client is in both sums or in neither."""
    plan = plan_for(make_federation("deer").method, TRAINING, **SERVER, client_rate=rate, rounds=1, clients=20)
    plan = replace(plan, epsilon=2.0)
    sigma, epsilon = plan.turn_noise_multiplier(1), 1.0
    x = np.linspace(-12 * sigma, 12 * sigma + 1, 2401)
    without = norm.pdf(x[:, None], 0, sigma) * norm.pdf(x, 0, sigma)
    both = norm.pdf(x[:, None], 1, sigma) * norm.pdf(x, 1, sigma)
    drawn = (1 - rate) * without + rate * both
    cell = (x[1] - x[0]) ** 2
    deltas = [
        float(np.maximum(p - math.exp(epsilon) * q, 0).sum() * cell) for p, q in ((drawn, without), (without, drawn))
    ]
    ledger = Ledger()
    ledger.append(plan.event(1), plan.releases_per_round)
    assert ledger.epsilon(max(deltas), "pld") == pytest.approx(epsilon, rel=2e-3)
    # Two releases, each amplified by a draw of its own, would claim less.
    apart = Ledger()
    apart.append(PoissonGaussian(sigma, rate), 2)
    assert apart.epsilon(max(deltas), "pld") < 0.97 * epsilon


def test_a_client_s_own_noise_is_not_amplified():
    plan = plan_for(make_federation("la-lora").method, TRAINING, **CLIENT, participations=3, client_rate=0.25)
    event = plan.event(17)
    assert (event.sample_rate, plan.planned_releases, plan.releases_per_round) == (1.0, 3, 1)
    ledger = Ledger()
    ledger.append(event, 3)
    assert 8 * 0.998 < ledger.epsilon(1e-5, "rdp") <= 8


@pytest.mark.slow
def test_deer_s_examples_pay_for_both_turns():
    federation = make_federation("deer")
    federation.run_round()
    assert [federation.account.releases(client) for client in range(3)] == [2 * TRAINING.local_steps] * 3


def test_whole_clients_end_with_their_budget():
    federation = make_federation("la-lora", weighting="equal", **SERVER, rounds=2)
    for _ in range(2):
        federation.run_round()
    with pytest.raises(PrivacyBudgetExceeded, match="No client has budget left"):
        federation.run_round()


# Server noise


def dense_contribution(federation, tensors):
    found = federation.method.contribution(tensors, federation.server.layers)
    return {n: v if isinstance(v, torch.Tensor) else v.left @ v.right for n, v in found.items()}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "deer"])
def test_the_server_clips_each_client_s_whole_change(method, monkeypatch):
    """Without noise, the mean moves by what clipped clients add up to, divided by the expected number."""
    monkeypatch.setattr("lora_dp.fed.rounds.server_noise.client_mechanism", lambda *_: Silent())
    changes = [0.001, 10.0, 300.0]
    federation = scripted(method, changes, **SERVER, max_update_norm=0.5, client_rate=0.75)
    federation.fault_norm = math.inf
    federation.server.begin(0, torch.Generator().manual_seed(0))
    task = federation.server.task(0, 0, 2)
    replies = list(federation.engine.train([(client, task) for client in range(3)], lambda: None))
    names = list(replies[0].update.tensors)
    before = dense_contribution(federation, {n: task.state[n] for n in names})
    seen = {}
    monkeypatch.setattr(type(federation.method), "combine", lambda self, mean, *a: seen.update(mean) or {})
    federation._run_turn(0, 0, [0, 1, 2], lambda: None)
    expected = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    for reply in replies:
        after = dense_contribution(federation, reply.update.tensors)
        change = {name: after[name] - before[name] for name in before}
        norm = math.sqrt(sum(float(c.square().sum()) for c in change.values()))
        for name, c in change.items():
            expected[name] += c * min(1, 0.5 / norm)
    for name, tensor in expected.items():
        torch.testing.assert_close(seen[name] - before[name], tensor / (0.75 * 3), rtol=1e-6, atol=1e-12)


class Silent:
    """A mechanism without noise."""

    def release(self, sums):
        return sums


def test_deer_is_clipped_by_the_product(monkeypatch):
    """One client whose change of B is huge moves s·B·A by no more than C; the head and B share the bound."""
    monkeypatch.setattr("lora_dp.fed.rounds.server_noise.client_mechanism", lambda *_: Silent())
    federation = scripted("deer", [1e3], **SERVER, max_update_norm=0.5)
    federation.fault_norm = math.inf
    before = dict(federation.server.state)
    federation._run_turn(0, 0, [0], lambda: None)
    after = federation.server.state
    moved = sum(float((products(after)[layer] - products(before)[layer]).square().sum()) for layer in products(before))
    moved += sum(float((after[name] - before[name]).square().sum()) for name in ("4.weight", "4.bias"))
    assert 0.4 < math.sqrt(moved) <= 0.5


def product_clipped(changes, state, bound):
    """Each client's change, scaled as a whole to the bound, where ΔB counts by ‖ΔB·A‖ (A as good as of full rank)."""
    kept = []
    for change in changes:
        parts = [
            c @ Regulator.beside("B", state[n[:-1] + "A"]).root if factor(n) == "B" else c for n, c in change.items()
        ]
        norm = math.sqrt(sum(float(part.square().sum()) for part in parts))
        kept.append({n: c * min(1, bound / norm) for n, c in change.items()})
    return kept


def test_deer_s_changes_keep_their_direction_at_the_server(monkeypatch):
    """Clipped as a whole or, below the bound, as they came: the basis of the noise is left again."""
    monkeypatch.setattr("lora_dp.fed.rounds.server_noise.client_mechanism", lambda *_: Silent())
    federation = scripted("deer", [1e-3, 10.0], **SERVER, max_update_norm=0.5)
    federation.fault_norm = math.inf
    before = dict(federation.server.state)
    federation.server.begin(0, torch.Generator().manual_seed(0))
    task = federation.server.task(0, 0, 2)
    replies = list(federation.engine.train([(client, task) for client in range(2)], lambda: None))
    federation._run_turn(0, 0, [0, 1], lambda: None)
    changes = [{n: t - before[n] for n, t in reply.update.tensors.items()} for reply in replies]
    kept = product_clipped(changes, before, 0.5)
    assert all(torch.equal(kept[0][n], changes[0][n]) and not torch.equal(kept[1][n], changes[1][n]) for n in kept[0])
    for name in kept[0]:
        torch.testing.assert_close(
            federation.server.state[name] - before[name], (kept[0][name] + kept[1][name]) / 2, rtol=1e-6, atol=1e-9
        )


def noise_of_empty_rounds(method, rounds, **options):
    """Changes of every trained tensor in rounds that nobody was drawn for."""
    drawn = []
    for seed in range(rounds):
        federation = make_federation(method, weighting="equal", seed=seed, **options)
        start = dict(federation.server.state)
        federation._run_turn(0, 0, [], lambda: None)
        drawn.append({n: federation.server.state[n] - start[n] for n in start})
    return drawn


def test_nobody_drawn_is_noise_alone_of_the_right_size():
    options = {**SERVER, "max_update_norm": 0.5, "client_rate": 0.5, "clients": 6}
    drawn = noise_of_empty_rounds("ffa-lora", 60, **options)
    federation = make_federation("ffa-lora", **options)
    sigma = federation.plan.event(1).noise_multiplier * 0.5 / (0.5 * 6)
    values = torch.stack([torch.cat([d["1.lora_B"].flatten(), d["4.weight"].flatten()]) for d in drawn])
    assert abs(float(values.std()) / sigma - 1) < 5 / math.sqrt(2 * values.numel())
    assert abs(float(values.mean())) < 5 * sigma / math.sqrt(values.numel())
    assert all(not d["1.lora_A"].any() for d in drawn)


def test_deer_s_server_noise_is_regulated():
    options = {**SERVER, "max_update_norm": 0.5}
    drawn = noise_of_empty_rounds("deer", 60, **options)
    federation = make_federation("deer", **options)
    rule = Regulator.beside("B", federation.server.state["1.lora_A"])
    sigma = federation.plan.event(1).noise_multiplier * math.sqrt(2) * 0.5 / 3  # both turns together are one release
    values = torch.stack([rule.measured(d["1.lora_B"]) for d in drawn])
    assert abs(float(values.std()) / sigma - 1) < 5 / math.sqrt(2 * values.numel())


# Client noise


@pytest.mark.slow
@pytest.mark.parametrize("method", ["la-lora", "deer", "flora"])
def test_a_client_s_update_is_noised_as_a_whole(method):
    """Twins with and without noise: the difference has the deviation that the plan says, as the method measures it."""
    options = {"weighting": "equal", **CLIENT, "max_update_norm": 0.25}
    silent = make_federation(method, epsilon=None)
    rules = {}
    if method == "deer":
        rules = {n: Regulator.beside("B", silent.server.state[n[:-1] + "A"]) for n in ("1.lora_B", "3.lora_B")}
    noise = []
    for seed in range(30):
        federation = make_federation(method, sizes=(12,), seed=seed, **options)
        twin = make_federation(method, sizes=(12,), epsilon=None, seed=seed)
        noised, plain = updates(federation)[0], updates(twin)[0]
        start = federation.server.state
        change = {n: rules[n].measured(plain[n] - start[n]) if n in rules else plain[n] - start[n] for n in plain}
        norm = math.sqrt(sum(float(c.square().sum()) for c in change.values()))
        for name, c in change.items():
            released = noised[name] - start[name]
            released = rules[name].measured(released) if name in rules else released
            noise.append((released - c * min(1, 0.25 / norm)).flatten())
    values = torch.cat(noise)
    sigma = federation.plan.event(12).noise_multiplier * 0.25
    assert abs(float(values.std()) / sigma - 1) < 5 / math.sqrt(2 * len(values))
    assert abs(float(values.mean())) < 5 * sigma / math.sqrt(len(values))


@pytest.mark.parametrize("bound", [1e-3, 1e3])
@pytest.mark.parametrize("method", ["la-lora", "deer"])
def test_a_client_s_change_keeps_its_direction(method, bound, monkeypatch):
    """Without its noise: clipped as a whole or, below the bound, as training made it."""
    monkeypatch.setattr("lora_dp.fed.rounds.client.client_mechanism", lambda *_: Silent())
    federation = make_federation(method, sizes=(12,), weighting="equal", **CLIENT, max_update_norm=bound)
    silent = make_federation(method, sizes=(12,), epsilon=None)
    for name in ("1.lora_B", "3.lora_B"):  # no change is the whole factor
        begin = torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        federation.server.state[name] = silent.server.state[name] = begin
    sent, start, trained = updates(federation)[0], federation.server.state, updates(silent)[0]
    change = {n: trained[n] - start[n] for n in trained}
    if method == "deer":
        expected = product_clipped([change], start, bound)[0]
    else:
        norm = math.sqrt(sum(float(c.square().sum()) for c in change.values()))
        expected = {n: c * min(1, bound / norm) for n, c in change.items()}
    assert (bound == 1e3) == all(torch.equal(expected[n], change[n]) for n in change)
    for name, c in expected.items():
        torch.testing.assert_close(sent[name] - start[name], c, rtol=1e-6, atol=1e-9)


def test_clients_draw_noise_of_their_own():
    federation = make_federation("la-lora", weighting="equal", sizes=(12, 12), **CLIENT)
    federation.engine.parts[1] = federation.engine.parts[0]
    first, second = updates(federation)
    assert not any(first[name].equal(second[name]) for name in first)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mechanism": "as-released", "method": "rolora"}, "is there for la-lora and deer, not for rolora"),
        ({"mechanism": "as-released", "epsilon": "none"}, "needs the epsilon that its noise is set for"),
        ({"mechanism": "as-released", "unit": "client"}, "leave unit out"),
        ({"unit": "client", "weighting": "examples"}, "unit client needs weighting equal"),
        ({"ranks": [2, 4, 4, 4, 4]}, "take flora, flexlora or fedask"),
        ({"method": "flora", "ranks": [2, 4]}, "one rank of at least 1 for each of the 5 clients"),
        ({"method": "flora", "ranks": {"2": -1.0}}, "a positive share"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message, tmp_path):
    from lora_dp.fed.launch import run

    with pytest.raises(ValueError, match=message):
        run(RunConfig.from_flat({"output": tmp_path / "run", "device": "cpu", **options}))
    assert not (tmp_path / "run").exists()


def test_ranks_by_shares():
    shares = {"2": 0.5, "4": 0.3, "8": 0.2}
    federation = RunConfig.from_flat({"method": "flora", "clients": 10, "ranks": shares}).federation
    ranks = federation.client_ranks(4, seed=1)
    assert sorted(ranks) == [2] * 5 + [4] * 3 + [8] * 2
    assert ranks == federation.client_ranks(4, seed=1) != federation.client_ranks(4, seed=2)
