"""A run from configuration to results, and the care it takes with each client's budget."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from lora_dp.errors import TooFewClients
from lora_dp.fed.config import RunConfig
from lora_dp.fed.launch import run
from lora_dp.fed.methods import METHODS, factor
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.messages import Task
from lora_dp.privacy.accounting import Ledger, PoissonGaussian, PrivacyBudgetExceeded
from tests.fed.tiny_runs import adapter, lines, tiny

MERGING = ("flora", "rac-lora", "galore")


def timeless(folder: Path) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_everything_behind(tmp_path, method):
    folder = tmp_path / "run"
    outcome = run(tiny(folder, method=method))
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "adapter",
        "checkpoints",
        "config.yaml",
        "curves.png",
        "ledger.json",
        "ledger.jsonl",
        "ledger.jsonl.heads",
        *(["merged.safetensors"] if method in MERGING else []),
        "metrics.jsonl",
        "server-only.sha256",
        "summary.json",
        "updates.jsonl",
    ]
    metrics = lines(folder)
    assert [line["round"] for line in metrics] == [0, 1, 2]
    assert metrics[0]["epsilon"] == 0 < metrics[1]["epsilon"] < metrics[2]["epsilon"] <= 8
    assert [line["participants"] for line in metrics] == [[], [0, 1], [0, 1]]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == outcome.summary
    assert (summary["status"], summary["rounds"], summary["release"]) == ("finished", 2, None)
    assert summary["worst_epsilon"] == metrics[2]["epsilon"]
    assert summary["accuracy_before"] == metrics[0]["accuracy"] and summary["accuracy_after"] == metrics[2]["accuracy"]
    assert "number of each client's examples" in summary["public"]


@pytest.mark.slow
def test_what_updates_say_is_recorded_where_single_ones_are_released(tmp_path):
    run(tiny(tmp_path / "deer", method="deer", clients=3))
    recorded = [json.loads(line) for line in (tmp_path / "deer" / "updates.jsonl").read_text().splitlines()]
    assert [(line["round"], line["turn"]) for line in recorded] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert all(line["clients"] == [0, 1, 2] and 0 < min(line["noise_share"]) < 2 for line in recorded)
    run(tiny(tmp_path / "secret", unit="client", clients=3))
    assert not (tmp_path / "secret" / "updates.jsonl").exists()


@pytest.mark.slow
def test_the_ledger_holds_every_step_and_its_epsilon(tmp_path):
    run(tiny(tmp_path / "run", clients=3))
    account = json.loads((tmp_path / "run" / "ledger.json").read_text())
    for client in account["clients"]:
        ledger = Ledger()
        ledger.load_state_dict(client["ledger"])
        [(event, count)] = ledger.entries
        assert count == client["steps"] == 4
        # Rates are accounted on a ladder of 2 %, never below the true one.
        assert 1 <= event.sample_rate * client["examples"] / 16 < 1.03
        assert client["epsilon"] == ledger.epsilon(1e-5, "rdp") <= 8
    assert sum(client["examples"] for client in account["clients"]) == 1438
    assert account["worst_epsilon"] == max(client["epsilon"] for client in account["clients"])


@pytest.mark.slow
def test_the_written_configuration_runs_the_same_again_bit_for_bit(tmp_path):
    run(tiny(tmp_path / "first", reproducible=True, partition="dirichlet", clients=3, clients_per_round=2, seed=5))
    options = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())
    assert "output" not in options
    again = RunConfig.from_flat({**options, "output": tmp_path / "second"})
    run(again)
    assert timeless(tmp_path / "second") == timeless(tmp_path / "first")
    first, second = adapter(tmp_path / "first"), adapter(tmp_path / "second")
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
    assert (tmp_path / "second" / "config.yaml").read_text() == (tmp_path / "first" / "config.yaml").read_text()
    assert "research only" in json.loads((tmp_path / "second" / "summary.json").read_text())["release"]


@pytest.mark.slow
def test_the_seed_fixes_start_and_partition_but_neither_batches_nor_noise():
    one, two, other = (Federation.from_config(tiny(seed=seed)) for seed in (3, 3, 4))
    assert all(tensor.equal(two.server.state[name]) for name, tensor in one.server.state.items())
    parts = [[part.labels for part in federation.engine.parts] for federation in (one, two, other)]
    assert all(a.equal(b) for a, b in zip(parts[0], parts[1], strict=True))
    assert not all(tensor.equal(other.server.state[name]) for name, tensor in one.server.state.items())
    assert not parts[0][0].equal(parts[2][0])
    one.run_round([0])
    two.run_round([0])
    other_state = two.server.state
    assert not any(tensor.equal(other_state[name]) for name, tensor in one.server.state.items() if factor(name) == "B")


def test_clients_and_rounds_of_a_reproducible_run_draw_different_noise():
    trainer = Federation.from_config(tiny(reproducible=True)).trainer
    places = [(client, index, turn) for client in range(2) for index in range(2) for turn in range(2)]
    drawn = [tuple(trainer.source(3, *place).uniform_bits(4).tolist()) for place in places]
    assert len(set(drawn)) == len(places)
    assert drawn[0] == tuple(trainer.source(3, *places[0]).uniform_bits(4).tolist())


@pytest.mark.slow
def test_without_privacy_epsilon_is_infinite_and_nothing_is_noised(tmp_path):
    options = {"epsilon": "none", "batch_size": 2000, "clients": 40, "clients_per_round": 1}
    outcome = run(tiny(tmp_path / "run", **options, reproducible=True))
    assert [line["epsilon"] for line in lines(tmp_path / "run")] == [0, None, None]
    assert outcome.summary["worst_epsilon"] is None and outcome.summary["noise_multiplier"]["largest"] == 0
    # Full batches and no noise: the seeds of batches and noise change nothing.
    secret = run(tiny(tmp_path / "other", **options))
    assert [r.loss for r in secret.rounds] == pytest.approx([r.loss for r in outcome.rounds], rel=1e-6)


@pytest.mark.slow
def test_noise_is_calibrated_to_the_planned_participations():
    account = Federation.from_config(tiny(clients=4, clients_per_round=2, rounds=5, local_steps=3)).account
    # 5 rounds × 2 places over 4 clients: 2.5, so 3 rounds of 3 steps.
    assert account.plan.planned_releases == 9
    for client, size in enumerate(account.sizes):
        ledger = Ledger()
        ledger.append(account.event(client), 9)
        assert 8 * 0.998 < ledger.epsilon(1e-5, "rdp") <= 8
        assert 1 <= account.event(client).sample_rate * size / 16 < 1.03


@pytest.mark.slow
def test_a_client_whose_budget_is_spent_takes_no_more_part():
    federation = Federation.from_config(tiny(clients=3, clients_per_round=1, rounds=3))
    assert federation.plan.participations == 1
    for remaining in ({0, 1, 2}, {1, 2}, {2}):
        assert set(federation.draw()) <= remaining
        federation.run_round([min(remaining)])
    before, counts = dict(federation.server.state), [federation.account.releases(client) for client in range(3)]
    assert 0 < federation.account.worst_epsilon() <= 8
    with pytest.raises(PrivacyBudgetExceeded, match="No client has budget left"):
        federation.draw()
    with pytest.raises(PrivacyBudgetExceeded, match="Client 0 has spent its budget"):
        federation.run_round([0])
    assert all(tensor.equal(before[name]) for name, tensor in federation.server.state.items())
    assert counts == [federation.account.releases(client) for client in range(3)] == [2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["examples", "equal"])
def test_weights(weighting):
    config = tiny(weighting=weighting, partition="dirichlet", dirichlet_alpha=0.5, reproducible=True, method="ffa-lora")
    federation, twin = Federation.from_config(config), Federation.from_config(config)
    task = Task(0, 0, 4, twin.server.state)
    updates = [twin.trainer.train(client, twin.engine.parts[client], task).tensors for client in range(2)]
    federation.run_round([0, 1])
    sizes = federation.account.sizes.tolist()
    assert sizes[0] != sizes[1]
    share = sizes[0] / sum(sizes) if weighting == "examples" else 0.5
    for name, update in updates[0].items():
        expected = share * update.double() + (1 - share) * updates[1][name].double()
        torch.testing.assert_close(federation.server.state[name].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    run(tiny(tmp_path / "run", rounds=1))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="already holds a run"):
        run(tiny(tmp_path / "run", rounds=1))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_steps_that_are_not_accounted_for_are_an_error(monkeypatch):
    """The engine's own ledger is compared with the plan after every turn: here the loader slips in one more draw."""
    from lora_dp.engine.data_loader import PrivateDataLoader

    take = PrivateDataLoader.take
    monkeypatch.setattr(PrivateDataLoader, "take", lambda loader, steps: take(loader, steps + 1))
    federation = Federation.from_config(tiny())
    with pytest.raises(TooFewClients) as caught:
        federation.run_round()
    assert "not those that the budget was planned for" in caught.value.in_full


@pytest.mark.slow
def test_all_private_steps_are_in_the_account():
    federation = Federation.from_config(tiny())
    federation.run_round([0])
    assert (federation.account.releases(0), federation.account.releases(1)) == (2, 0)
    assert isinstance(federation.account.event(0), PoissonGaussian)
