"""What the processes of a comparison make of a cell: begun anew only where nothing was released, and resumed."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml
from rich.console import Console

from lora_dp.fed import launch
from lora_dp.fed.compare import workers
from lora_dp.fed.config import RunConfig
from tests.fed.breaking import interrupt_before_round
from tests.fed.compare.small_grids import SMALL, grid_config, quietly


@pytest.mark.slow
def test_what_a_client_s_exception_said_is_in_no_file(tmp_path, monkeypatch):
    """It may quote a patient; it is for the console of whoever runs the client."""
    from lora_dp.fed.cli import main
    from lora_dp.fed.rounds.client import Trainer

    def failing(*_: Any) -> Any:
        raise KeyError("patient Jane Roe")

    monkeypatch.setattr(Trainer, "train", failing)
    written = tmp_path / "common.yaml"
    written.write_text(yaml.safe_dump(SMALL))
    told = io.StringIO()
    monkeypatch.setattr(sys, "stderr", told)
    assert main(["run", "--config", str(written), "--output", str(tmp_path / "run")]) == 2
    assert "client 0 raised KeyError: 'patient Jane Roe'" in told.getvalue()
    config = RunConfig.from_flat({**SMALL, "output": tmp_path / "cell"})
    path, reason = workers.run_one(config)
    assert reason is not None and "client 0 raised KeyError;" in reason.said and "Jane" not in reason.said
    assert not any(b"Jane" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


@pytest.mark.slow
def test_a_cell_whose_log_of_releases_is_damaged_is_not_begun_anew(tmp_path, monkeypatch):
    """Its data would pay a second budget, and its ledger tell of one."""
    config = RunConfig.from_flat({**SMALL, "rounds": 3, "output": tmp_path / "cell"})
    interrupt_before_round(monkeypatch, 3)
    assert workers.run_one(config)[1] is not None
    log = tmp_path / "cell" / "ledger.jsonl"
    log.write_text(log.read_text().replace('"round":2', '"round":7'))
    _, reason = workers.run_one(config)
    assert reason is not None and "is not whole" in reason.said and "do not go on with this run" in reason.said
    assert [path.name for path in tmp_path.iterdir()] == ["cell"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_jobs_may_be_added_and_cleared_while_others_run(tmp_path, monkeypatch, processes):
    pools: list[int] = []
    pool = workers.ProcessPoolExecutor
    monkeypatch.setattr(
        workers, "ProcessPoolExecutor", lambda count, *a, **k: pools.append(count) or pool(count, *a, **k)
    )
    jobs = [RunConfig.from_flat({"dataset": "/none", "output": tmp_path / str(index)}) for index in range(6)]
    waiting, ended = deque(jobs[:1]), []
    for path, reason in workers.run_all(waiting, processes):
        assert reason is not None and "no folder" in reason.in_full
        ended.append(path.name)
        if len(ended) == 1:
            waiting.extend(jobs[1:])
        if len(ended) == 3:
            waiting.clear()
    # With two processes one more may have begun.
    assert 3 <= len(ended) <= 2 + processes and len(set(ended)) == len(ended)
    assert pools == [2] * (processes - 1)


def spoil(cell: Path, how: str) -> None:
    if how == "checkpoints":
        for path in (cell / "checkpoints").glob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:100])
    elif how == "configuration":
        (cell / "config.yaml").write_text("{")
    else:
        (cell / "config.yaml").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["checkpoints", "configuration", "no configuration"])
def test_a_cell_whose_rounds_have_begun_is_not_begun_anew(tmp_path, monkeypatch, how):
    """Its data would pay a second budget, and its ledger tell of one."""
    config = RunConfig.from_flat({**SMALL, "rounds": 3, "output": tmp_path / "cell"})
    with monkeypatch.context() as patch:
        interrupt_before_round(patch, 3)
        assert workers.run_one(config)[1] is not None
    spoil(tmp_path / "cell", how)
    before = (tmp_path / "cell" / "ledger.jsonl").read_bytes()
    for _ in range(2):
        _, reason = workers.run_one(config)
        assert reason is not None and reason.said == reason.in_full
        assert "says why), and is not begun anew, since its rounds have spent a budget: restore it" in reason.said
        assert [path.name for path in tmp_path.iterdir()] == ["cell"]
        assert (tmp_path / "cell" / "ledger.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"epsilon": "none"}, {"reproducible": True}, {"mechanism": "as-released"}])
def test_a_cell_that_spends_nothing_is_begun_anew(tmp_path, monkeypatch, options):
    config = RunConfig.from_flat({**SMALL, **options, "rounds": 3, "output": tmp_path / "cell"})
    with monkeypatch.context() as patch:
        interrupt_before_round(patch, 3)
        assert workers.run_one(config)[1] is not None
    spoil(tmp_path / "cell", "checkpoints")
    assert workers.run_one(config)[1] is None
    assert {path.name for path in tmp_path.iterdir()} == {"cell", "cell.aside-1"}


@pytest.mark.slow
def test_a_cell_that_stopped_before_its_first_round_is_begun_anew(tmp_path, monkeypatch):
    config = RunConfig.from_flat({**SMALL, "rounds": 3, "output": tmp_path / "cell"})
    with monkeypatch.context() as patch:
        interrupt_before_round(patch, 1)
        assert workers.run_one(config)[1] is not None
    (tmp_path / "cell" / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "cell" / "checkpoints" / "round-000001.json").write_text("{")
    assert workers.run_one(config)[1] is None
    assert {path.name for path in tmp_path.iterdir()} == {"cell", "cell.aside-1"}


SCRIPT = """
import os, signal, sys
from pathlib import Path
from rich.console import Console
from lora_dp.fed import launch
from lora_dp.fed.compare.comparison import compare
from lora_dp.fed.compare.options import CompareConfig

if __name__ == "__mp_main__" and os.environ.get("DIE"):
    whole = launch.run
    def run(config, console):
        if config.run.seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(config, console)
    launch.run = run

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
    common = {"clients": 2, "rounds": rounds, "local_steps": 1, "batch_size": 16, "accountant": "rdp", "device": "cpu",
              "reproducible": True}
    grid = CompareConfig(methods=["la-lora"], epsilons=[8], seeds=[0, 1, 2], processes=2, output=folder)
    try:
        compare(grid, common, Console())
    except KeyboardInterrupt:
        sys.exit(130)
"""


def start(tmp_path: Path, rounds: int, **variables: str) -> subprocess.Popen[str]:
    (tmp_path / "script.py").write_text(SCRIPT)
    words = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "grid"), str(rounds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.slow
def test_ctrl_c_with_several_processes_can_be_resumed(tmp_path):
    process = start(tmp_path, 300)
    cells = [tmp_path / "grid" / "cells" / "la-lora" / "eps8" / f"seed{seed}" for seed in range(3)]
    deadline = time.monotonic() + 120
    while not all(list((cell / "checkpoints").glob("round-*.json")) for cell in cells[:2]):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in output
    for cell in cells[:2]:
        assert json.loads((cell / "summary.json").read_text())["status"] == "interrupted"
        assert list((cell / "checkpoints").glob("round-*.json"))
    assert not cells[2].exists()
    assert "3 of 3 runs are missing" in (tmp_path / "grid" / "comparison.md").read_text()


@pytest.mark.slow
def test_a_process_that_dies_costs_its_own_cell_only(tmp_path):
    """And the others, from two processes, are the runs that this process makes."""
    output, _ = start(tmp_path, 2, DIE="1").communicate(timeout=240)
    assert "failed: la-lora, ε = 8, seed 1: its process died" in output
    before = pandas.read_csv(tmp_path / "grid" / "comparison.csv")
    assert list(before["status"]) == ["finished", "failed", "finished"]
    config = grid_config(tmp_path / "grid", methods=["la-lora"], epsilons=[8])
    quietly(config, reproducible=True)
    after = pandas.read_csv(tmp_path / "grid" / "comparison.csv")
    assert list(after["status"]) == ["finished"] * 3
    options = {**SMALL, "reproducible": True, "method": "la-lora", "epsilon": 8.0, "seed": 0}
    alone = launch.run(RunConfig.from_flat({**options, "output": tmp_path / "alone"}), Console(quiet=True))
    for name in ("accuracy_after", "loss_after", "worst_epsilon"):
        assert after[name][0] == before[name][0] == alone.summary[name]
