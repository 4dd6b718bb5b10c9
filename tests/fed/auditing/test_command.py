"""``lora-dp audit``: finds planted faults, leaves what is sound alone, refuses the rest."""

import json

import pytest

from lora_dp.fed import cli
from lora_dp.fed.auditing import command
from lora_dp.fed.auditing.options import AuditConfig
from tests.fed.auditing.small_runs import CLIENTS, FEW, SMALL, SURE


def few(options):
    return FEW if "unit" in options else []


@pytest.mark.slow
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


@pytest.mark.long
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


@pytest.mark.slow
def test_a_seed_is_kept_and_no_canary_is_refused(configuration, tmp_path, capsys):
    path = configuration({**SMALL, **SHORT})
    assert cli.main(["audit", path, *SURE, "--seed", "7", "--count", "160"]) == 0
    assert json.loads((tmp_path / "audit.json").read_text())["seed"] == 7
    assert cli.main(["audit", path, "--count", "0"]) == 2
    assert "count must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
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
