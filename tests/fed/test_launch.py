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

from lora_dp.errors import TooFewClients
from lora_dp.fed.config import RunConfig
from lora_dp.fed.launch import run
from lora_dp.fed.methods import METHODS, Layers, factor, get_method
from lora_dp.fed.rounds.client import Trainer
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.messages import Task
from lora_dp.fed.rounds.privacy_plan import PrivacyPlan
from lora_dp.fed.rounds.server import Server, draw_clients, nbytes
from lora_dp.privacy.accounting import Ledger, PoissonGaussian, PrivacyBudgetExceeded

MERGING = ("flora", "rac-lora", "galore")

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


def test_what_updates_say_is_recorded_where_single_ones_are_released(tmp_path):
    run(tiny(tmp_path / "deer", method="deer", clients=3))
    recorded = [json.loads(line) for line in (tmp_path / "deer" / "updates.jsonl").read_text().splitlines()]
    assert [(line["round"], line["turn"]) for line in recorded] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert all(line["clients"] == [0, 1, 2] and 0 < min(line["noise_share"]) < 2 for line in recorded)
    run(tiny(tmp_path / "secret", unit="client", clients=3))
    assert not (tmp_path / "secret" / "updates.jsonl").exists()


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


@pytest.mark.parametrize("method", ["la-lora", "galore", "flexlora"])
def test_the_result_on_disk_is_what_was_evaluated(tmp_path, method):
    from lora_dp.fed.rounds.federation import evaluate
    from lora_dp.fed.runs.results import load_result

    outcome = run(tiny(tmp_path / "run", lr=1.0, method=method))
    fresh = Federation.from_config(tiny())
    before = fresh.evaluate()
    load_result(fresh.model, tmp_path / "run")
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


def test_the_log_on_disk_counts_a_round_before_it_begins(tmp_path, monkeypatch):
    train, seen = Trainer.train, []

    def watch(trainer, client, examples, task, on_step):
        entries = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
        entries[-1].pop("digest")
        seen.append((client, task.round, entries[-1]))
        return train(trainer, client, examples, task, on_step)

    monkeypatch.setattr(Trainer, "train", watch)
    run(tiny(tmp_path / "run"))
    expected = [(client, index, {"round": index + 1, "clients": [0, 1]}) for index in range(2) for client in range(2)]
    assert seen == expected


def test_ctrl_c_leaves_the_results_so_far(tmp_path, monkeypatch):
    train = Trainer.train

    def interrupted(trainer, client, examples, task, on_step):
        if task.round == 1 and client == 1:
            raise KeyboardInterrupt
        return train(trainer, client, examples, task, on_step)

    monkeypatch.setattr(Trainer, "train", interrupted)
    outcome = run(tiny(tmp_path / "run"))
    assert outcome.interrupted
    assert [line["round"] for line in lines(tmp_path / "run")] == [0, 1]
    account = json.loads((tmp_path / "run" / "ledger.json").read_text())
    # The second round had begun: it counts although nothing came of it.
    assert [client["steps"] for client in account["clients"]] == [4, 4]
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
    account = Federation.from_config(tiny(clients=4, clients_per_round=2, rounds=5, local_steps=3)).account
    # 5 rounds × 2 places over 4 clients: 2.5, so 3 rounds of 3 steps.
    assert account.plan.planned_releases == 9
    for client, size in enumerate(account.sizes):
        ledger = Ledger()
        ledger.append(account.event(client), 9)
        assert 8 * 0.998 < ledger.epsilon(1e-5, "rdp") <= 8
        assert 1 <= account.event(client).sample_rate * size / 16 < 1.03


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


def test_a_run_ends_when_every_budget_is_spent(tmp_path, monkeypatch):
    monkeypatch.setattr(PrivacyPlan, "planned_releases", 2)
    outcome = run(tiny(tmp_path / "run"))
    assert outcome.summary["status"] == "budget spent" and outcome.summary["rounds"] == 1


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
    server = Server({"x": torch.zeros(2)}, Layers({}, 1), get_method("la-lora"))
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
    config = RunConfig.from_flat(
        {
            "method": "rolora",
            "epsilon": 3,
            "low_pass": "laplacian",
            "low_pass_strength": 1.5,
            "model": "some/model",
            "target_modules": ["qkv", "proj"],
            "clients_per_round": 2,
            "seed": 9,
        }
    )
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


def test_steps_that_are_not_accounted_for_are_an_error(monkeypatch):
    """The engine's own ledger is compared with the plan after every turn: here the loader slips in one more draw."""
    from lora_dp.engine.data_loader import PrivateDataLoader

    take = PrivateDataLoader.take
    monkeypatch.setattr(PrivateDataLoader, "take", lambda loader, steps: take(loader, steps + 1))
    federation = Federation.from_config(tiny())
    with pytest.raises(TooFewClients) as caught:
        federation.run_round()
    assert "not those that the budget was planned for" in caught.value.in_full


def test_all_private_steps_are_in_the_account():
    federation = Federation.from_config(tiny())
    federation.run_round([0])
    assert (federation.account.releases(0), federation.account.releases(1)) == (2, 0)
    assert isinstance(federation.account.event(0), PoissonGaussian)
