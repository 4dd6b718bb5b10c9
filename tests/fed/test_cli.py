"""The command line, as a user meets it."""

import json
import re
import signal
import subprocess
import sys

import pytest
import yaml

from lora_dp.fed import cli
from lora_dp.fed.config import RunConfig
from lora_dp.fed.rounds.client import Trainer

SMALL = ["--clients", "2", "--rounds", "1", "--local-steps", "1", "--batch_size", "8", "--accountant", "rdp"]


@pytest.mark.slow
def test_compare_tells_the_shell_that_a_run_failed(monkeypatch, tmp_path, capsys):
    import lora_dp.fed.launch

    def broken(config, console, began=None):
        raise RuntimeError("no memory")

    monkeypatch.setattr(lora_dp.fed.launch, "run", broken)
    options = ["--methods", "la-lora", "--epsilons", "8", "--search.lr", "0.1,0.3", "--seeds", "0"]
    assert cli.main(["compare", *options, "--output", str(tmp_path / "grid")]) == 1
    shown = capsys.readouterr().out
    assert "trial s7, seed 100   failed: RuntimeError: no memory" in shown


@pytest.mark.parametrize("command", ["resume", "report", "inspect"])
def test_a_command_on_a_folder_that_is_no_run(command, tmp_path, capsys):
    assert cli.main([command, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.strip().splitlines()) == 1 and str(tmp_path) in error


@pytest.mark.parametrize("command", [[], ["run"], ["pretrain"], ["compare"], ["resume"], ["report"], ["inspect"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert max(map(len, text.splitlines())) <= 118
    assert not any(word in text for word in ("==", "<class", "null", "[[", "python -m"))
    shown = re.findall(r"^  --([\w-]+)", text, flags=re.MULTILINE)
    options = {name.replace("-", "_") for name in shown}
    if command in (["resume"], ["report"], ["inspect"]):
        assert "RUN" in text
    elif command == ["compare"]:
        assert {"methods", "epsilons", "seeds", "local_steps"} <= options and not {"method", "epsilon"} & options
    elif command == ["pretrain"]:
        assert {"dataset", "output", "epochs"} <= options
    else:
        assert options >= set(yaml.safe_load(RunConfig().to_yaml())) | {"output", "config"}
        assert "The federation:\n" in text and "Privacy:\n" in text
    # Every option is shown in one spelling, and explained.
    assert not re.search(r"--\w*_", text)
    for option in shown:
        assert re.search(rf"--{option}\b[^\n]*\n? +\S", text)


@pytest.mark.slow
def test_a_whole_run_in_a_pipe_is_plain_text(tmp_path):
    command = [sys.executable, "-m", "lora_dp.fed", *SMALL, "--reproducible", "--output", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    text = done.stdout
    assert "\x1b" not in text and "\r" not in text and "━" not in text
    [line] = re.findall(r"^round 1/1 .*$", text, flags=re.MULTILINE)
    assert re.fullmatch(r"round 1/1   loss \d\.\d{4}   accuracy +\d+\.\d %   worst ε +\d\.\d{3}   sent [\d.]+ kB", line)
    for word in ("accuracy before", "accuracy after", "worst ε at δ = 1e-05", "research only", "out"):
        assert word in text
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_the_folder_is_named_after_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*SMALL, "--method", "ffa-lora"]) == 0
    [folder] = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-ffa-lora-eps8", folder.name)
    assert str(folder.relative_to(tmp_path)) in capsys.readouterr().out


@pytest.fixture
def interruptible():
    """A shell may have started the tests with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_a_run_with_its_results(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train = Trainer.train

    def press(trainer, client, examples, task, on_step):
        if task.round:
            signal.raise_signal(signal.SIGINT)
        return train(trainer, client, examples, task, on_step)

    monkeypatch.setattr(Trainer, "train", press)
    assert cli.main([*SMALL, "--rounds", "3", "--output", "out"]) == 130
    assert "interrupted" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("interrupted", 1)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_the_data_load(monkeypatch, capsys):
    monkeypatch.setattr("lora_dp.fed.launch.run", lambda *_: signal.raise_signal(signal.SIGINT))
    assert cli.main(SMALL) == 130
    assert capsys.readouterr().err == ""
