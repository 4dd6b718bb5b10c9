"""``python -m lora_dp.fed audit``: finds planted faults, leaves what is sound alone, refuses the rest."""

import json

import numpy as np
import pytest
import yaml

from lora_dp.fed import cli
from lora_dp.fed.auditing import command
from lora_dp.fed.auditing.clients import ClientCanaries
from lora_dp.fed.auditing.examples import MislabelledExamples
from lora_dp.fed.auditing.game import Game, largest_ledger, most_exposed
from lora_dp.fed.auditing.gradients import most_gradients
from lora_dp.fed.auditing.options import AuditConfig
from lora_dp.fed.config import RunConfig
from lora_dp.fed.rounds.client import Trainer
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.setup import open_job
from lora_dp.privacy.mechanism import Mechanism

SMALL = {"clients": 2, "rounds": 2, "local_steps": 2, "accountant": "rdp", "method": "dp-lora", "epsilon": 2.0}
CLIENTS = {**SMALL, "unit": "client", "delta": 0.01}
FEW = ["--count", "160"]
# Of 1000 sound audits, one is called violated.
SURE = ["--confidence", "0.999"]


@pytest.fixture
def configuration(tmp_path):
    def write(options):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
        return str(tmp_path)

    return write


@pytest.fixture
def little_noise(monkeypatch):
    """The noise is a fiftieth of what it is accounted for."""
    true = Mechanism.noise_std
    monkeypatch.setattr(Mechanism, "noise_std", lambda self, size: true(self, size) / 50)


def few(options):
    return FEW if "unit" in options else []


def opened(options):
    config = RunConfig.from_flat(options)
    job = open_job(config)
    return Game(config, job, most_exposed(config, job))


@pytest.mark.parametrize(
    "options",
    [
        {**SMALL, "method": "deer"},
        {**CLIENTS, "method": "deer", "clients": 10, "clients_per_round": 4},
        {**CLIENTS, "noise_by": "client"},
    ],
    ids=["gradients", "server", "client"],
)
def test_what_is_sound_is_not_violated(configuration, options, tmp_path, capsys):
    assert cli.main(["audit", configuration(options), *SURE, *few(options)]) == 0
    report = json.loads((tmp_path / "audit.json").read_text())
    assert report["verdict"] == "not violated" and not report["violated"]
    assert report["claimed_epsilon"] == pytest.approx(2, abs=0.02)
    assert report["assume"] == "independent"
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")
    assert "not violated: ε ≥" in capsys.readouterr().out


SHORT = {"rounds": 1, "local_steps": 1}


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({**SMALL, **SHORT}, []),
        ({**CLIENTS, **SHORT, "clients": 10, "clients_per_round": 9}, FEW),
        ({**CLIENTS, **SHORT, "noise_by": "client"}, FEW),
        ({**SMALL, **SHORT}, ["--canaries", "examples", "--count", "40"]),
    ],
    ids=["gradients", "server", "client", "examples"],
)
def test_what_is_sound_is_not_violated_over_20_seeds(configuration, options, more):
    """Noise is secret: at a confidence of 0.999 two false alarms of 20 have a probability of 0.0002."""
    path = configuration(options)
    codes = [cli.main(["audit", path, *SURE, *more, "--seed", str(seed)]) for seed in range(20)]
    assert set(codes) <= {0, 1} and sum(codes) <= 1


@pytest.mark.parametrize("text", ["clients: five", "clients: [1]", "epsilon: {a: 1}", "method: [x]", "1: 2"])
def test_a_value_of_the_wrong_kind_is_an_error_in_a_sentence(tmp_path, text, capsys):
    (tmp_path / "config.yaml").write_text(text)
    assert cli.main(["audit", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_seed_is_kept_and_no_canary_is_refused(configuration, tmp_path, capsys):
    path = configuration({**SMALL, **SHORT})
    assert cli.main(["audit", path, *SURE, "--seed", "7", "--count", "160"]) == 0
    assert json.loads((tmp_path / "audit.json").read_text())["seed"] == 7
    assert cli.main(["audit", path, "--count", "0"]) == 2
    assert "count must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {**SMALL, "method": "la-lora"},
        {**CLIENTS, "method": "deer", "clients": 10, "clients_per_round": 9},
        {**CLIENTS, "noise_by": "client"},
    ],
    ids=["gradients", "server", "client"],
)
def test_a_fiftieth_of_the_noise_is_violated(configuration, options, tmp_path, little_noise, capsys):
    assert cli.main(["audit", configuration(options), "--output", str(tmp_path / "out"), *SURE, *few(options)]) == 1
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["violated"]
    assert "violated: ε ≥" in capsys.readouterr().out


def test_without_clipping_of_updates_clients_are_violated(configuration, monkeypatch):
    from lora_dp.fed.rounds import client

    monkeypatch.setattr(client, "clipped", lambda change, bound: {n: t.double() for n, t in change.items()})
    assert cli.main(["audit", configuration({**CLIENTS, "noise_by": "client"}), *SURE, *FEW]) == 1


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


def test_the_coin_decides_which_mislabelled_examples_train(monkeypatch):
    game = opened({**SMALL, "rounds": 1, "local_steps": 1})
    seen = []
    train = Trainer.train

    def noted(self, client, examples, task, on_step=lambda: None):
        seen.append((client, examples.labels))
        return train(self, client, examples, task, on_step)

    monkeypatch.setattr(Trainer, "train", noted)
    canaries = MislabelledExamples(game, 20, np.random.default_rng(0))
    losses = canaries.train(canaries.indices[:5].tolist())
    assert set(losses) == set(canaries.indices.tolist())
    labels = dict(seen)
    part = game.job.parts[game.client]
    assert len(labels[game.client]) == len(part) - 15
    assert len(labels[1 - game.client]) == len(game.job.parts[1 - game.client])
    kept = np.setdiff1d(part, canaries.indices[5:])
    wrong = labels[game.client].numpy() != game.job.train.labels.numpy()[kept]
    assert set(kept[wrong]) == set(canaries.indices[:5])


def test_the_client_with_the_largest_claim_is_audited():
    game = opened({**SMALL, "clients": 5, "clients_per_round": 2, "seed": 1})
    federation = Federation.of_job(game.config, game.job)
    for index in range(2):
        federation.rounds_done = index
        federation.account.add_round(federation.draw())
    epsilons = [federation.account.epsilon(client) for client in range(5)]
    client, ledger = largest_ledger(federation.account, range(5))
    assert game.client == client
    assert epsilons[client] == max(epsilons) == ledger.epsilon(1e-5, "rdp") > min(epsilons)


def test_canaries_have_numbers_of_their_own():
    game = opened(SMALL)
    shapes = {name: value.numel() for name, value in game.job.trainer.workspace.state().items()}
    head = sum(n for name, n in shapes.items() if "lora_" not in name)
    a = sum(n for name, n in shapes.items() if name.endswith("lora_A"))
    b = sum(n for name, n in shapes.items() if name.endswith("lora_B"))
    assert most_gradients(game) == head + min(a, b)
    with pytest.raises(ValueError, match="count must lie between 1 and"):
        ClientCanaries(opened(CLIENTS), 10**6)


@pytest.mark.parametrize(
    "options, words, message",
    [
        ({"epsilon": "none"}, [], "epsilon none claims nothing"),
        ({"mechanism": "as-released"}, [], "claims nothing that could be refuted"),
        ({"engine": "flower"}, [], "set engine local"),
        ({**CLIENTS, "method": "flora"}, [], "audit it with noise_by client"),
        (CLIENTS, ["--canaries", "examples"], "examples are not what is protected"),
        (SMALL, ["--test", "two-world", "--count", "5"], "two-world has one canary"),
        (SMALL, ["--canaries", "examples", "--count", "100000"], "count must lie between 1 and"),
        (SMALL, ["--count", "100000"], "canaries"),
        ({"epsilonn": 3}, [], "Unknown options: epsilonn"),
        (["epsilon"], [], "holds no options"),
    ],
)
def test_refusals(configuration, options, words, message, capsys):
    assert cli.main(["audit", configuration(options), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_file_is_refused(tmp_path, capsys):
    assert cli.main(["audit", str(tmp_path / "nowhere.yaml")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_reproducible_configurations_are_audited_with_secret_noise(configuration, tmp_path):
    configuration({**SMALL, "reproducible": True, "output": "somewhere"})
    config = command.read_options(AuditConfig(tmp_path).target)
    assert not config.run.reproducible and config.run.output is None
