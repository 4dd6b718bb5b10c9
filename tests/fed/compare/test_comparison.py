"""The grid of runs, its tables and its plot."""

import re

import pytest
from rich.console import Console

from lora_dp.fed import launch
from lora_dp.fed.compare import comparison as module
from lora_dp.fed.config import RunConfig
from lora_dp.fed.runs import loop
from tests.fed.compare.conftest import Runner
from tests.fed.compare.small_grids import grid_config, quietly


@pytest.mark.slow
def test_a_failed_cell_is_a_dash_and_the_others_go_on(tmp_path, fake):
    fake.broken = {
        "dp-lora/eps1/seed0": RuntimeError("no\nmemory"),
        "dp-lora/eps8/seed0": ValueError("bad"),
        "dp-lora/eps8/seed1": ValueError("bad"),
        "dp-lora/eps8/seed2": ValueError("bad"),
    }
    shown = quietly(grid_config(tmp_path / "grid"))
    text = (tmp_path / "grid" / "comparison.md").read_text()
    assert re.search(r"`dp-lora` +\| 85.0 ± 63.5† \(n = 2\) +\| – +\|", text)
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


@pytest.mark.slow
def test_a_finished_grid_runs_nothing(tmp_path, fake):
    quietly(grid_config(tmp_path / "grid"))
    fake.ran.clear()
    assert "12 runs, 12 of them finished before" in quietly(grid_config(tmp_path / "grid"))
    assert fake.ran == fake.resumed == []


@pytest.mark.slow
def test_what_cannot_be_resumed_is_moved_aside(tmp_path, fake):
    fake.broken = {"la-lora/eps1/seed0": RuntimeError("crash")}
    quietly(grid_config(tmp_path / "grid"))
    fake.broken, fake.stuck = {}, {"la-lora/eps1/seed0"}
    quietly(grid_config(tmp_path / "grid"))
    seeds = tmp_path / "grid" / "cells" / "la-lora" / "eps1"
    assert (seeds / "seed0" / "summary.json").exists()
    assert (seeds / "seed0.aside-1" / "config.yaml").exists()
    assert not (seeds / "seed0.aside-1" / "summary.json").exists()


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_with_other_settings_is_not_taken_for_a_cell(tmp_path, fake):
    fake.broken = {"la-lora/eps1/seed0": RuntimeError("crash")}
    quietly(grid_config(tmp_path / "grid"))
    path = tmp_path / "grid" / "cells" / "la-lora" / "eps1" / "seed0" / "config.yaml"
    path.write_text(path.read_text().replace("local_steps: 1", "local_steps: 3"))
    assert "holds a run with other settings" in quietly(grid_config(tmp_path / "grid"))
    assert "local_steps: 3" in path.read_text() and fake.resumed == []


@pytest.mark.slow
def test_ctrl_c_leaves_tables_and_goes_on(tmp_path, fake):
    fake.broken = {"la-lora/eps8/seed0": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        quietly(grid_config(tmp_path / "grid"))
    assert len(fake.ran) == 4
    text = (tmp_path / "grid" / "comparison.md").read_text()
    assert "90.0 ± 3.1" in text and "9 of 12 runs are missing" in text and "Failed" not in text
    fake.broken = {}
    quietly(grid_config(tmp_path / "grid"))
    assert fake.resumed == ["la-lora/eps8/seed0"] and len(fake.ran) == 12


class Clock:
    """A minute passes with every run."""

    def __init__(self, fake: Runner) -> None:
        self._fake = fake

    def monotonic(self) -> float:
        return 1000.0 + 60 * len(self._fake.configs)


def test_no_run_begins_when_the_minutes_are_up(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(module, "time", Clock(fake))
    shown = quietly(grid_config(tmp_path / "grid", minutes=5))
    assert len(fake.ran) == 5
    assert f"7 runs are left: the same command with --output {tmp_path / 'grid'} goes on" in shown.splitlines()
    assert "7 of 12 runs are missing" in (tmp_path / "grid" / "comparison.md").read_text()
    assert not (tmp_path / "grid" / "failures.json").exists()
    assert "are left" in quietly(grid_config(tmp_path / "grid", minutes=0)) and len(fake.ran) == 5
    fake.configs.clear()
    shown = quietly(grid_config(tmp_path / "grid", minutes=7.5))
    assert len(fake.ran) == len(set(fake.ran)) == 12 and "are left" not in shown


@pytest.mark.slow
def test_trials_count_among_the_runs_that_are_left(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(module, "time", Clock(fake))
    options = {"epsilons": [1], "search": {"lr": [0.1, 1.0]}, "search_trials": 2}
    shown = quietly(grid_config(tmp_path / "grid", minutes=3, **options))
    assert fake.ran == ["la-lora/eps1/s0/seed100", "la-lora/eps1/s1/seed100", "dp-lora/eps1/s0/seed100"]
    assert "11 runs are left" in shown and "failed" not in shown


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
