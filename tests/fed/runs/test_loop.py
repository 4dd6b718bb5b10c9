"""The loop of rounds: each counted before it begins, interrupted with its results, ended with the budget."""

import json

import pytest

from lora_dp.fed.launch import run
from lora_dp.fed.rounds.client import Trainer
from lora_dp.fed.rounds.privacy_plan import PrivacyPlan
from tests.fed.tiny_runs import adapter, lines, tiny


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_ends_when_every_budget_is_spent(tmp_path, monkeypatch):
    monkeypatch.setattr(PrivacyPlan, "planned_releases", 2)
    outcome = run(tiny(tmp_path / "run"))
    assert outcome.summary["status"] == "budget spent" and outcome.summary["rounds"] == 1
