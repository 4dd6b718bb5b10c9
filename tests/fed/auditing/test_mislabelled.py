"""Mislabelled examples among a client's own: found where they are not protected, and kept out of a run's folder."""

import numpy as np
import pytest
import torch
import yaml

from lora_dp.fed import cli
from lora_dp.fed.auditing.mislabelled import MislabelledExamples
from lora_dp.fed.rounds.client import Trainer
from tests.fed.auditing.small_runs import SMALL, SURE, opened


@pytest.mark.slow
def test_mislabelled_examples_that_are_not_protected_are_found(configuration, monkeypatch):
    """The final model, replaced by one that has learnt every example by heart."""
    train = MislabelledExamples.train

    def by_heart(self, included):
        losses = train(self, included)
        return {index: 0.0 if index in included else 1.0 + loss for index, loss in losses.items()}

    options = {**SMALL, "rounds": 1, "local_steps": 1, "epsilon": 0.5}
    assert cli.main(["audit", configuration(options), "--canaries", "examples", *SURE]) == 0
    monkeypatch.setattr(MislabelledExamples, "train", by_heart)
    assert cli.main(["audit", configuration(options), "--canaries", "examples", *SURE]) == 1


@pytest.mark.slow
def test_losses_of_private_examples_stay_out_of_the_folder_of_a_run(configuration, tmp_path, capsys, monkeypatch):
    """All that lies there is covered by the run's ε; a planted canary's results come out of noised releases."""
    folder = tmp_path / "run"
    monkeypatch.setattr(
        MislabelledExamples, "train", lambda self, included: {int(index): float(index % 3) for index in self.indices}
    )
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({**SMALL, "rounds": 1, "local_steps": 1}))
    (folder / "ledger.jsonl").touch()
    command_line = ["audit", str(folder), "--canaries", "examples", *SURE]
    assert cli.main(command_line) == 0
    assert sorted(file.name for file in folder.iterdir()) == ["config.yaml", "ledger.jsonl"]
    assert (tmp_path / "run-audit" / "audit.json").exists()
    assert cli.main([*command_line, "--output", str(folder)]) == 2
    assert "is a run's folder, whose files its ε covers" in capsys.readouterr().err
    assert cli.main([*command_line, "--output", str(tmp_path / "mine")]) == 0
    assert (tmp_path / "mine" / "audit.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"features": "unit", "sums_share": 0.5}], ids=["rounds", "sums"])
def test_the_coin_decides_which_mislabelled_examples_train(monkeypatch, more):
    """Each client is asked once for its sums, if they are released, and once to train: with the same examples."""
    game = opened({**SMALL, "rounds": 1, "local_steps": 1, **more})
    seen, asked = [], []
    train = Trainer.train

    def noted(self, client, examples, task, on_step=lambda: None):
        seen.append((client, examples.labels))
        asked.append((client, task.sums))
        return train(self, client, examples, task, on_step)

    monkeypatch.setattr(Trainer, "train", noted)
    canaries = MislabelledExamples(game, 20, np.random.default_rng(0))
    losses = canaries.train(canaries.indices[:5].tolist())
    assert set(losses) == set(canaries.indices.tolist())
    labels = dict(seen)
    assert all(torch.equal(held, labels[client]) for client, held in seen)
    assert sorted(asked) == [(client, sums) for client in range(2) for sums in ([False, True] if more else [False])]
    part = game.job.parts[game.client]
    assert len(labels[game.client]) == len(part) - 15
    assert len(labels[1 - game.client]) == len(game.job.parts[1 - game.client])
    kept = np.setdiff1d(part, canaries.indices[5:])
    wrong = labels[game.client].numpy() != game.job.train.labels.numpy()[kept]
    assert set(kept[wrong]) == set(canaries.indices[:5])
