"""The grid of runs, its tables and its plot."""

import io
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml
from PIL import Image
from rich.console import Console

from lora_dp.fed import launch
from lora_dp.fed.compare import grid as module
from lora_dp.fed.compare import tables, workers
from lora_dp.fed.compare.comparison import Cell, Grid, compare
from lora_dp.fed.compare.options import CompareConfig
from lora_dp.fed.config import RunConfig
from lora_dp.fed.rounds.privacy_plan import AS_RELEASED
from lora_dp.fed.runs import loop
from lora_dp.fed.runs.folder import read_config
from tests.fed.breaking import interrupt_before_round

SMALL = {"clients": 2, "rounds": 2, "local_steps": 1, "batch_size": 16, "accountant": "rdp", "device": "cpu"}
ACCURACY = {
    ("la-lora", 1.0): (0.9011, 0.9123, 0.8876),
    ("la-lora", 8.0): (0.95, 0.96, 0.97),
    ("dp-lora", 1.0): (0.7, 0.8, 0.9),
    ("dp-lora", 8.0): (0.95, 0.97, 0.96),
}


def grid_config(folder: Path, **options: Any) -> CompareConfig:
    return CompareConfig(
        **{"methods": ["la-lora", "dp-lora"], "epsilons": [1, 8], "seeds": [0, 1, 2], "output": folder, **options}
    )


def summary(config: RunConfig, accuracy: float) -> dict[str, Any]:
    target = config.privacy.target
    released = config.privacy.mechanism == "as-released"
    return {
        "status": "finished",
        "guarantee": AS_RELEASED if released else None,
        "release": None,
        "accuracy_before": 0.5,
        "accuracy_after": accuracy,
        "rounds": 2,
        "worst_epsilon": target and target * 0.99,
        "seconds": 1.5,
        "delta": 1e-5,
    }


class Runner:
    """Stands in for the runner: writes what a run would, or fails as told; notes what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        self.resumed: list[str] = []
        self.broken: dict[str, BaseException] = {}
        self.stuck: set[str] = set()
        monkeypatch.setattr(launch, "run", self.run)
        monkeypatch.setattr(launch, "resume", self.resume)

    def run(self, config: RunConfig, console: Console) -> loop.Outcome:
        path = config.run.output
        assert path is not None and not (path / "config.yaml").exists()
        name = "/".join(path.parts[-3:])
        self.ran.append(name)
        path.mkdir(parents=True, exist_ok=True)
        if name not in self.broken:
            return self._end(config, path)
        (path / "config.yaml").write_text(config.to_yaml())
        raise self.broken[name]

    def resume(self, path: Path, console: Console) -> loop.Outcome:
        name = "/".join(path.parts[-3:])
        self.resumed.append(name)
        if name in self.stuck:
            raise ValueError("No checkpoint is whole.")
        return self._end(read_config(path), path)

    def _end(self, config: RunConfig, path: Path) -> loop.Outcome:
        accuracy = ACCURACY.get((config.federation.method, config.privacy.target or 0.0), (0.5,) * 3)[config.run.seed]
        (path / "config.yaml").write_text(config.to_yaml())
        (path / "summary.json").write_text(json.dumps(summary(config, accuracy)))
        return loop.Outcome(path, {"status": "finished"}, [])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Runner:
    return Runner(monkeypatch)


def quietly(config: CompareConfig, **common: Any) -> str:
    stream = io.StringIO()
    compare(config, {**SMALL, **common}, Console(file=stream, width=200))
    return stream.getvalue()


def test_the_table_has_mean_and_sample_deviation(tmp_path, fake):
    shown = quietly(grid_config(tmp_path / "grid"))
    text = (tmp_path / "grid" / "comparison.md").read_text(encoding="utf-8")
    rows = {
        line.split("|")[1].strip(" `"): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    }
    assert rows["method"] == ["ε = 1", "ε = 8"]
    for (method, epsilon), values in ACCURACY.items():
        entry = f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"
        assert rows[method][0 if epsilon == 1 else 1].strip("*") == entry
    # At ε = 8 both are equal as printed.
    bold = {method: [cell.startswith("**") for cell in rows[method]] for method in rows}
    assert bold["la-lora"] == [True, True] and bold["dp-lora"] == [False, True]
    for words in (
        "digits",
        "model default",
        "2 clients",
        "2 rounds",
        "δ = 1e-05",
        "one example of one client",
        "n = 3 seeds (0, 1, 2)",
        "sample standard deviation",
        "Before training: 50.0",
    ):
        assert words in text, words
    assert "90.0 ± 1.2" in shown and len(fake.ran) == 12
    assert "la-lora, ε = 1, seed 1   accuracy 91.2 %" in shown.splitlines()


def test_csv_has_a_row_a_cell(tmp_path, fake):
    quietly(grid_config(tmp_path / "grid", epsilons=[8, "none"]))
    cells = pandas.read_csv(tmp_path / "grid" / "comparison.csv", keep_default_na=False)
    assert len(workers) == 12 and list(cells["epsilon"].unique()) == ["8.0", "none"]
    one = cells[(cells["method"] == "dp-lora") & (cells["epsilon"] == "8.0") & (cells["seed"] == 1)].iloc[0]
    assert float(one["accuracy_after"]) == 0.97 and float(one["worst_epsilon"]) == 8 * 0.99
    assert one["folder"] == "cells/dp-lora/eps8/seed1" and one["status"] == "finished"


def test_latex_is_balanced_and_plain_ascii(tmp_path, fake):
    quietly(grid_config(tmp_path / "grid"), dataset="my_data & 100% {#}")
    text = (tmp_path / "grid" / "comparison.tex").read_text()
    assert text.isascii()
    assert r"my\_data \& 100\% \{\#\}" in text and r"\textbf{90.0 $\pm$ 1.2}" in text
    for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}{lcc}", r"\label{tab:comparison}"):
        assert text.count(rule) == 1
    assert re.findall(r"\\begin{(\w+)}", text) == re.findall(r"\\end{(\w+)}", text)[::-1]
    bare = re.sub(r"\\[{}$&%#_]", "", text)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
    rows = [line for line in text.splitlines() if line.endswith(r"\\") and "lora" in line]
    assert len(rows) == 2 and all(line.count("&") == 2 for line in rows)


def test_the_plot_has_every_method(tmp_path, fake):
    quietly(grid_config(tmp_path / "grid", epsilons=[1, 8, "none"]))
    with Image.open(tmp_path / "grid" / "comparison.png") as image:
        assert image.size[0] > 1000
    grid = Grid.read(tmp_path / "grid")
    axes = tables.draw(module.read_cells(grid, tmp_path / "grid")).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["ε = 1", "ε = 8", "no privacy"]
    bars = {container.get_label(): container.lines[0].get_ydata() for container in axes.containers}
    assert bars["la-lora"][0] == pytest.approx(100 * statistics.mean(ACCURACY["la-lora", 1.0]))
    assert bars["dp-lora"][1] == pytest.approx(96.0)


def test_a_mean_far_below_all_others_does_not_squeeze_them(tmp_path, fake, monkeypatch):
    monkeypatch.setitem(ACCURACY, ("rolora", 1.0), (0.1, 0.97, 0.96))
    for method in ("la-lora", "dp-lora", "ffa-lora", "deer", "galore", "rolora"):
        for epsilon in (1.0, 8.0):
            if (method, epsilon) != ("rolora", 1.0):
                monkeypatch.setitem(ACCURACY, (method, epsilon), (0.96, 0.97, 0.98))
    methods = ["la-lora", "dp-lora", "ffa-lora", "deer", "galore", "rolora"]
    quietly(grid_config(tmp_path / "grid", methods=methods))
    grid = Grid.read(tmp_path / "grid")
    axes = tables.draw(module.read_cells(grid, tmp_path / "grid")).axes[0]
    assert axes.get_ylim()[0] > 90 and "68 ± 50" in [text.get_text() for text in axes.texts]


def test_one_seed_has_no_spread(tmp_path, fake):
    quietly(grid_config(tmp_path / "grid", seeds=[1]))
    text = (tmp_path / "grid" / "comparison.md").read_text()
    assert "±" not in text and "n = 1, seed 1" in text and "91.2" in text


def test_a_failed_cell_is_a_dash_and_the_others_go_on(tmp_path, fake):
    fake.broken = {
        "dp-lora/eps1/seed0": RuntimeError("no\nmemory"),
        "dp-lora/eps8/seed0": ValueError("bad"),
        "dp-lora/eps8/seed1": ValueError("bad"),
        "dp-lora/eps8/seed2": ValueError("bad"),
    }
    shown = quietly(grid_config(tmp_path / "grid"))
    text = (tmp_path / "grid" / "comparison.md").read_text()
    assert re.search(r"`dp-lora` +\| 85.0 ± 7.1 \(n = 2\) +\| – +\|", text)
    assert "- dp-lora, ε = 1, seed 0: RuntimeError, in words that the console alone shows" in text
    assert "4 of 12 runs are missing" in text
    assert "failed: dp-lora, ε = 8, seed 2: bad" in shown
    assert "failed: dp-lora, ε = 1, seed 0: RuntimeError: no memory" in shown
    assert not any(b"no memory" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    # The next call tries what failed, and nothing else.
    fake.ran.clear()
    names, fake.broken = set(fake.broken), {}
    assert "8 of them finished before" in quietly(grid_config(tmp_path / "grid"))
    assert set(fake.resumed) == names and fake.ran == []
    text = (tmp_path / "grid" / "comparison.md").read_text()
    assert "Failed" not in text and "–" not in text and not (tmp_path / "grid" / "failures.json").exists()


def test_a_finished_grid_runs_nothing(tmp_path, fake):
    quietly(grid_config(tmp_path / "grid"))
    fake.ran.clear()
    assert "12 runs, 12 of them finished before" in quietly(grid_config(tmp_path / "grid"))
    assert fake.ran == fake.resumed == []


def test_what_cannot_be_resumed_is_moved_aside(tmp_path, fake):
    fake.broken = {"la-lora/eps1/seed0": RuntimeError("crash")}
    quietly(grid_config(tmp_path / "grid"))
    fake.broken, fake.stuck = {}, {"la-lora/eps1/seed0"}
    quietly(grid_config(tmp_path / "grid"))
    seeds = tmp_path / "grid" / "cells" / "la-lora" / "eps1"
    assert (seeds / "seed0" / "summary.json").exists()
    assert (seeds / "seed0.aside-1" / "config.yaml").exists()
    assert not (seeds / "seed0.aside-1" / "summary.json").exists()


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


def spoil(cell: Path, how: str) -> None:
    if how == "checkpoints":
        for path in (cell / "checkpoints").glob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:100])
    elif how == "configuration":
        (cell / "config.yaml").write_text("{")
    else:
        (cell / "config.yaml").unlink()


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


@pytest.mark.parametrize("options", [{"epsilon": "none"}, {"reproducible": True}, {"mechanism": "as-released"}])
def test_a_cell_that_spends_nothing_is_begun_anew(tmp_path, monkeypatch, options):
    config = RunConfig.from_flat({**SMALL, **options, "rounds": 3, "output": tmp_path / "cell"})
    with monkeypatch.context() as patch:
        interrupt_before_round(patch, 3)
        assert workers.run_one(config)[1] is not None
    spoil(tmp_path / "cell", "checkpoints")
    assert workers.run_one(config)[1] is None
    assert {path.name for path in tmp_path.iterdir()} == {"cell", "cell.aside-1"}


def test_a_cell_that_stopped_before_its_first_round_is_begun_anew(tmp_path, monkeypatch):
    config = RunConfig.from_flat({**SMALL, "rounds": 3, "output": tmp_path / "cell"})
    with monkeypatch.context() as patch:
        interrupt_before_round(patch, 1)
        assert workers.run_one(config)[1] is not None
    (tmp_path / "cell" / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "cell" / "checkpoints" / "round-000001.json").write_text("{")
    assert workers.run_one(config)[1] is None
    assert {path.name for path in tmp_path.iterdir()} == {"cell", "cell.aside-1"}


def test_what_no_new_run_can_replace_stays(tmp_path, fake, monkeypatch):
    """A data set that is missing today stops resuming and a new run alike: the checkpoints are worth keeping."""
    fake.broken = {"la-lora/eps1/seed0": RuntimeError("crash")}
    quietly(grid_config(tmp_path / "grid"))
    fake.stuck = {"la-lora/eps1/seed0"}

    def missing(config: RunConfig, console: Console) -> loop.Outcome:
        raise ValueError("no such data set")

    monkeypatch.setattr(launch, "run", missing)
    assert "failed: la-lora, ε = 1, seed 0: no such data set" in quietly(grid_config(tmp_path / "grid"))
    seeds = tmp_path / "grid" / "cells" / "la-lora" / "eps1"
    assert (seeds / "seed0" / "config.yaml").exists() and not list(seeds.glob("*.aside-*"))


def test_a_run_with_other_settings_is_not_taken_for_a_cell(tmp_path, fake):
    fake.broken = {"la-lora/eps1/seed0": RuntimeError("crash")}
    quietly(grid_config(tmp_path / "grid"))
    path = tmp_path / "grid" / "cells" / "la-lora" / "eps1" / "seed0" / "config.yaml"
    path.write_text(path.read_text().replace("local_steps: 1", "local_steps: 3"))
    assert "holds a run with other settings" in quietly(grid_config(tmp_path / "grid"))
    assert "local_steps: 3" in path.read_text() and fake.resumed == []


def test_ctrl_c_leaves_tables_and_goes_on(tmp_path, fake):
    fake.broken = {"la-lora/eps8/seed0": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        quietly(grid_config(tmp_path / "grid"))
    assert len(fake.ran) == 4
    text = (tmp_path / "grid" / "comparison.md").read_text()
    assert "90.0 ± 1.2" in text and "9 of 12 runs are missing" in text and "Failed" not in text
    fake.broken = {}
    quietly(grid_config(tmp_path / "grid"))
    assert fake.resumed == ["la-lora/eps8/seed0"] and len(fake.ran) == 12


def test_another_definition_is_refused(tmp_path, fake):
    quietly(grid_config(tmp_path / "grid", epsilons=[8]))
    fake.ran.clear()
    with pytest.raises(ValueError, match=r"another comparison \(rounds, seeds differ\)"):
        quietly(grid_config(tmp_path / "grid", epsilons=[8], seeds=[0]), rounds=3)
    assert fake.ran == []
    quietly(grid_config(tmp_path / "grid", epsilons=[8.0], processes=1), max_grad_norm=1.0)  # a default, written out
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(ValueError, match="holds a run"):
        quietly(grid_config(tmp_path / "run"))


def test_compare_yaml_defines_the_same_grid(tmp_path, fake):
    config = grid_config(tmp_path / "grid", epsilons=[8, "none"], methods=["flora"])
    compare(config, {**SMALL, "ranks": {4: 0.5, 8: 0.5}}, Console(quiet=True))
    grid = Grid.read(tmp_path / "grid")
    same = Grid(config, {**SMALL, "ranks": {"4": 0.5, "8": 0.5}})
    assert grid.cells == same.cells
    assert [grid.config(c, None).to_yaml() for c in grid.cells] == [same.config(c, None).to_yaml() for c in same.cells]
    plain = yaml.safe_load((tmp_path / "grid" / "compare.yaml").read_text())
    assert plain["epsilons"] == [8.0, "none"] and plain["model"] == "default" and plain["lr"] is None
    assert not {"method", "epsilon", "seed", "output", "processes"} & set(plain)


def test_all_cells_are_checked_before_the_first_runs(tmp_path, fake):
    with pytest.raises(ValueError, match=r"cell la-lora, no privacy, seed 0 cannot be run: mechanism as-released"):
        quietly(grid_config(tmp_path / "grid", methods=["la-lora"], epsilons=[8, "none"]), mechanism="as-released")
    with pytest.raises(ValueError, match="no method 'lalora'"):
        quietly(grid_config(tmp_path / "grid", methods=["la-lora", "lalora"]))
    with pytest.raises(ValueError, match="The grid sets epsilon"):
        quietly(grid_config(tmp_path / "grid"), epsilon=3)
    assert fake.ran == [] and not (tmp_path / "grid").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1, 1]}, "seeds has 1 twice"),
        ({"epsilons": [8, 8.0]}, "epsilons has 8.0 twice"),
        ({"epsilons": ["none", math.inf]}, "epsilons has none twice"),
        ({"methods": []}, "methods is empty"),
        ({"processes": 0}, "processes must be at least 1"),
    ],
)
def test_grids_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        CompareConfig(**options)


def test_one_process_at_a_time_holds_a_comparison(tmp_path, fake, monkeypatch):
    inside: list[str] = []

    def run(config: RunConfig, console: Console) -> loop.Outcome:
        try:
            quietly(grid_config(tmp_path / "grid"))
        except ValueError as error:
            inside.append(str(error))
        return fake.run(config, console)

    monkeypatch.setattr(launch, "run", run)
    quietly(grid_config(tmp_path / "grid"))
    assert "Another process is at work" in inside[0]


def test_notes_of_runs_that_guarantee_nothing(tmp_path, fake):
    quietly(grid_config(tmp_path / "a", methods=["la-lora"], epsilons=[8]), mechanism="as-released")
    text = (tmp_path / "a" / "comparison.md").read_text()
    assert "No privacy guarantee (ε = ∞)" in text and "does not keep" in text and "δ" not in text
    assert "| ε = ∞ (set for 8) " in text
    with pytest.raises(ValueError, match="cell dp-lora, ε = 1, seed 0 cannot be run: mechanism as-released is there"):
        quietly(grid_config(tmp_path / "c", methods=["la-lora", "dp-lora"]), mechanism="as-released")
    quietly(grid_config(tmp_path / "b", epsilons=[8]), reproducible=True)
    assert "do not release" in (tmp_path / "b" / "comparison.md").read_text()


def test_cells_folders():
    assert Cell("flat-lora:deer", 0.5, 3).path.as_posix() == "cells/flat-lora-deer/eps0.5/seed3"
    assert Cell("deer", "none", 0).path.as_posix() == "cells/deer/epsnone/seed0"


SCRIPT = """
import os, signal, sys
from pathlib import Path
from rich.console import Console
from lora_dp.fed import launch
from lora_dp.fed.compare import CompareConfig, compare

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
