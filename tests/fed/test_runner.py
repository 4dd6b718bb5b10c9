"""A run from configuration to results, and the care it takes with each client's budget."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from lora_dp.accounting import Ledger, PoissonGaussian, PrivacyBudgetExceeded
from lora_dp.fed.client import Client
from lora_dp.fed.config import RunConfig
from lora_dp.fed.federation import Federation
from lora_dp.fed.methods import METHODS, factor
from lora_dp.fed.runner import run
from lora_dp.fed.server import Server, draw_clients, nbytes

TINY = {"clients": 2, "rounds": 2, "local_steps": 2, "batch_size": 16, "accountant": "rdp", "device": "cpu"}


def tiny(output: Path | None = None, **options) -> RunConfig:
    return RunConfig.from_flat({**TINY, "output": output, **options})


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder: Path) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines(folder)]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_everything_behind(tmp_path, method):
    folder = tmp_path / "run"
    outcome = run(tiny(folder, method=method))
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter", "config.yaml", "curves.png", "ledger.json", "metrics.jsonl", "summary.json",
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


def test_the_ledger_holds_every_step_and_its_epsilon(tmp_path):
    run(tiny(tmp_path / "run", clients=3))
    account = json.loads((tmp_path / "run" / "ledger.json").read_text())
    for client in account["clients"]:
        ledger = Ledger()
        ledger.load_state_dict(client["ledger"])
        [(event, count)] = ledger.entries
        assert count == client["steps"] == 4
        assert event.sample_rate == 16 / client["examples"]
        assert client["epsilon"] == ledger.epsilon(1e-5, "rdp") <= 8
    assert sum(client["examples"] for client in account["clients"]) == 1438
    assert account["worst_epsilon"] == max(client["epsilon"] for client in account["clients"])


def test_the_adapter_on_disk_is_the_one_that_was_evaluated(tmp_path):
    from lora_dp.adapters import load_adapter
    from lora_dp.fed.federation import evaluate

    outcome = run(tiny(tmp_path / "run", lr=1.0))
    fresh = Federation.from_config(tiny())
    before = fresh.evaluate()
    load_adapter(fresh.model, tmp_path / "run" / "adapter")
    after = evaluate(fresh.model, fresh.validation, fresh.device)
    assert after == pytest.approx((outcome.rounds[-1].loss, outcome.rounds[-1].accuracy), rel=1e-5)
    assert after != pytest.approx(before, rel=1e-3)


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


def test_the_seed_fixes_start_and_partition_but_neither_batches_nor_noise():
    one, two, other = (Federation.from_config(tiny(seed=seed)) for seed in (3, 3, 4))
    assert all(tensor.equal(two.server.state[name]) for name, tensor in one.server.state.items())
    assert all(a.examples.labels.equal(b.examples.labels) for a, b in zip(one.clients, two.clients, strict=True))
    assert not all(tensor.equal(other.server.state[name]) for name, tensor in one.server.state.items())
    assert not one.clients[0].examples.labels.equal(other.clients[0].examples.labels)
    one.run_round([0])
    two.run_round([0])
    other_state = two.server.state
    assert not any(tensor.equal(other_state[name]) for name, tensor in one.server.state.items() if factor(name) == "B")


def test_clients_of_a_reproducible_run_draw_different_noise():
    federation = Federation.from_config(tiny(reproducible=True))
    sources = [client._engine.source for client in federation.clients]
    assert not sources[0].uniform_bits(8).equal(sources[1].uniform_bits(8))


def test_the_ledger_on_disk_counts_a_round_before_it_begins(tmp_path, monkeypatch):
    train, seen = Client.train, []

    def watch(client, *args, **kwargs):
        account = json.loads((tmp_path / "run" / "ledger.json").read_text())
        seen.append((client.index, account["clients"][client.index]["steps"], client.ledger.steps))
        return train(client, *args, **kwargs)

    monkeypatch.setattr(Client, "train", watch)
    run(tiny(tmp_path / "run"))
    assert seen == [(0, 2, 0), (1, 2, 0), (0, 4, 2), (1, 4, 2)]


def test_ctrl_c_leaves_the_results_so_far(tmp_path, monkeypatch):
    train = Client.train

    def interrupted(client, *args, **kwargs):
        if client.ledger.steps >= 2 and client.index == 1:
            raise KeyboardInterrupt
        return train(client, *args, **kwargs)

    monkeypatch.setattr(Client, "train", interrupted)
    outcome = run(tiny(tmp_path / "run"))
    assert outcome.interrupted
    assert [line["round"] for line in lines(tmp_path / "run")] == [0, 1]
    account = json.loads((tmp_path / "run" / "ledger.json").read_text())
    # Client 0 had taken its steps of the second round, which count although no round came of them.
    assert [client["steps"] for client in account["clients"]] == [4, 2]
    assert outcome.summary["worst_epsilon"] == account["clients"][0]["epsilon"] > outcome.rounds[-1].epsilon
    assert adapter(tmp_path / "run") and (tmp_path / "run" / "curves.png").exists()


def test_without_privacy_epsilon_is_infinite_and_nothing_is_noised(tmp_path):
    options = {"epsilon": "none", "batch_size": 2000, "clients": 40, "clients_per_round": 1}
    outcome = run(tiny(tmp_path / "run", **options, reproducible=True))
    assert [line["epsilon"] for line in lines(tmp_path / "run")] == [0, None, None]
    assert outcome.summary["worst_epsilon"] is None and outcome.summary["noise_multiplier"]["largest"] == 0
    # Full batches and no noise: the seeds of batches and noise change nothing.
    secret = run(tiny(tmp_path / "other", **options))
    assert [r.loss for r in secret.rounds] == pytest.approx([r.loss for r in outcome.rounds], rel=1e-6)


def test_noise_is_calibrated_to_the_planned_participations():
    federation = Federation.from_config(tiny(clients=4, clients_per_round=2, rounds=5, local_steps=3))
    for client in federation.clients:
        # 5 rounds × 2 places over 4 clients: 2.5, so 3 rounds of 3 steps.
        assert client.planned_steps == 9
        ledger = Ledger()
        ledger.append(client.event, 9)
        assert 8 * 0.998 < ledger.epsilon(1e-5, "rdp") <= 8
        assert client.event.sample_rate == 16 / len(client.examples)


def test_a_client_whose_budget_is_spent_takes_no_more_part():
    federation = Federation.from_config(tiny(clients=3, clients_per_round=1, rounds=3))
    assert federation.training.participations == 1
    for remaining in ({0, 1, 2}, {1, 2}, {2}):
        assert set(federation.draw()) <= remaining
        federation.run_round([min(remaining)])
    assert federation.draw() == []
    assert 0 < federation.worst_epsilon() <= 8
    client, before = federation.clients[0], dict(federation.server.state)
    with pytest.raises(PrivacyBudgetExceeded, match="Client 0 has spent its budget"):
        client.train(federation.model, before, federation.method, 3)
    assert client.ledger.steps == 2
    with pytest.raises(PrivacyBudgetExceeded, match="No client has budget left"):
        federation.run_round([0, 1])
    assert all(tensor.equal(before[name]) for name, tensor in federation.server.state.items())


def test_a_spent_client_does_not_stop_the_others():
    federation = Federation.from_config(tiny(rounds=1))
    federation.run_round([0])
    assert federation.run_round([0, 1]).participants == [1]


def test_a_run_ends_when_every_budget_is_spent(tmp_path, monkeypatch):
    monkeypatch.setattr(Client, "planned_steps", 2)
    outcome = run(tiny(tmp_path / "run"))
    assert outcome.summary["status"] == "budget spent" and outcome.summary["rounds"] == 1


@pytest.mark.parametrize("weighting", ["examples", "equal"])
def test_weights(weighting):
    config = tiny(weighting=weighting, partition="dirichlet", dirichlet_alpha=0.5, reproducible=True, method="ffa-lora")
    federation, twin = Federation.from_config(config), Federation.from_config(config)
    updates = [client.train(twin.model, twin.server.state, twin.method, 0) for client in twin.clients]
    federation.run_round([0, 1])
    sizes = [len(client.examples) for client in federation.clients]
    assert sizes[0] != sizes[1]
    share = sizes[0] / sum(sizes) if weighting == "examples" else 0.5
    for name, update in updates[0].items():
        expected = share * update.double() + (1 - share) * updates[1][name].double()
        torch.testing.assert_close(federation.server.state[name].double(), expected, rtol=1e-5, atol=1e-7)


def test_only_what_changed_travels():
    federation = Federation.from_config(tiny(method="ffa-lora"))
    state = federation.server.state
    whole = nbytes(state)
    trained = nbytes({name: tensor for name, tensor in state.items() if factor(name) != "A"})
    first, second = federation.run_round([0, 1]), federation.run_round([0])
    assert (first.bytes_up, first.bytes_down) == (2 * trained, 2 * whole)
    # The shared A was sent once and for all.
    assert (second.bytes_up, second.bytes_down) == (trained, trained)


def test_the_server_refuses_what_does_not_fit():
    server = Server({"x": torch.zeros(2)})
    for wrong in ({"y": torch.zeros(2)}, {"x": torch.zeros(3)}):
        with pytest.raises(ValueError, match="does not fit"):
            server.apply(wrong)
    assert server.version == 0


def test_clients_are_drawn_uniformly_without_replacement():
    rng = np.random.default_rng(0)
    counts = np.zeros(5)
    for _ in range(2000):
        drawn = draw_clients([0, 1, 2, 4], 2, rng)
        assert len(set(drawn)) == 2
        counts[drawn] += 1
    assert counts[3] == 0
    # Each of four is drawn with probability 1/2: a deviation of 22.4, five of them allowed.
    assert np.all(np.abs(counts[[0, 1, 2, 4]] - 1000) < 5 * math.sqrt(2000 / 4))


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    run(tiny(tmp_path / "run", rounds=1))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="already holds a run"):
        run(tiny(tmp_path / "run", rounds=1))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_configuration_round_trip():
    config = RunConfig.from_flat({
        "method": "rolora", "epsilon": 3, "low_pass": "laplacian", "low_pass_strength": 1.5, "model": "some/model",
        "target_modules": ["qkv", "proj"], "clients_per_round": 2, "seed": 9,
    })
    again = RunConfig.from_flat(yaml.safe_load(config.to_yaml()))
    assert asdict(again) == asdict(config)
    assert again.model.name == "some/model"
    assert again.optimization.lr == METHODS["rolora"].learning_rates[3]


@pytest.mark.parametrize("unlimited", ["none", "inf", math.inf, None])
def test_no_privacy_by_any_name(unlimited):
    assert RunConfig.from_flat({"epsilon": unlimited}).privacy.target is None


def test_default_learning_rates():
    sgd = RunConfig.from_flat({"method": "ffa-lora", "epsilon": 1})
    adamw = RunConfig.from_flat({"method": "ffa-lora", "epsilon": 1, "optimizer": "adamw"})
    assert (sgd.optimization.lr, adamw.optimization.lr) == (METHODS["ffa-lora"].learning_rates[1], 1e-3)


def test_every_option_has_one_name():
    names = list(yaml.safe_load(RunConfig().to_yaml()))
    groups = [group for name, group in asdict(RunConfig()).items()]
    assert len(names) == sum(len(group) for group in groups) - 1  # all but the output folder


def test_the_event_is_what_the_engine_accounts(monkeypatch):
    federation = Federation.from_config(tiny())
    federation.run_round([0])
    assert federation.clients[0].ledger.entries == ((federation.clients[0].event, 2),)
    assert isinstance(federation.clients[0].event, PoissonGaussian)
