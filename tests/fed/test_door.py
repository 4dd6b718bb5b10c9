"""The door opens at once: what is answered before the slow imports, and what is said while they go on."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from lora_dp.fed import cli
from lora_dp.fed.commands import COMMANDS
from lora_dp.fed.interrupts import INTERRUPTED

HEAVY = ("torch", "numpy", "scipy", "timm", "datasets", "sklearn", "matplotlib", "transformers", "pandas", "flwr")
ANSWERED_AT_ONCE = {
    "help": ["--help"],
    "help of compare": ["compare", "--help"],
    "help of audit": ["audit", "--help"],
    "version": ["--version"],
    "a command that is none": ["comapre"],
    "an option that is none": ["--epslon", "1"],
    "a value of another type": ["--rounds", "many"],
    "a value out of range": ["--epsilon", "0"],
    "a method that is none": ["--method", "la_lora"],
    "options that do not go together": ["--method", "dp-lora", "--low_pass_strength", "1"],
    "an option that the method lacks": ["--method_options.rho", "1"],
    "layers by names": ["--target_modules", "[qkv,proj]", "--rounds", "0"],
    "a grid with an empty list": ["compare", "--methods", "[]"],
    "a grid with a method that is none": ["compare", "--methods", "la-lora,der"],
    "a data set that is not there": ["--dataset", "missing.csv"],
    "an audit of nothing": ["audit", "missing"],
    "nothing to resume": ["resume", "missing"],
    "nothing to inspect": ["inspect", "missing"],
    "nothing to report": ["report", "missing"],
}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("words", ANSWERED_AT_ONCE.values(), ids=ANSWERED_AT_ONCE)
def test_it_is_answered_before_anything_slow_is_imported(words):
    code = (
        "import contextlib, io, json, sys\n"
        "from lora_dp.fed.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        f"    main({words!r})\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    assert json.loads(python(code)) == []


def test_a_wrong_value_is_answered_within_a_second_of_cpu_time():
    process = psutil.Popen([sys.executable, "-m", "lora_dp.fed", "--epsilon", "0"], stderr=subprocess.PIPE)
    before = os.times()
    assert process.wait(60) == 2
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1


def test_importing_the_package_imports_nothing_slow():
    assert python(f"import lora_dp, sys; print([name for name in {HEAVY!r} if name in sys.modules])") == "[]"
    assert python(f"import lora_dp.fed, sys; print([name for name in {HEAVY!r} if name in sys.modules])") == "[]"


def test_each_command_of_the_door_is_there():
    assert tuple(COMMANDS) == cli.COMMANDS


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "lora-dp 0.1.0\n"


# While the slow imports go on


@pytest.fixture
def started(tmp_path):
    process = psutil.Popen(
        [sys.executable, "-m", "lora_dp.fed", "--rounds", "1", "--output", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell may have started the tests with interrupts ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    yield process
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
    process.communicate()


def test_the_first_line_comes_before_the_slow_imports(started):
    assert started.stdout.readline() == "opening digits and the model default …\n"
    assert sum(started.cpu_times()[:2]) < 1


def test_ctrl_c_while_modules_are_imported_is_quiet(started, tmp_path):
    started.stdout.readline()
    started.send_signal(signal.SIGINT)
    assert started.wait(60) == INTERRUPTED
    assert started.stderr.read() == "" and not (tmp_path / "out").exists()
