"""Learning rates that a comparison tries before its cells."""

import io
import json
from pathlib import Path
from typing import Any

import pandas
import pytest
from rich.console import Console

from lora_dp.errors import TooFewClients
from lora_dp.fed import launch
from lora_dp.fed.compare.comparison import compare
from lora_dp.fed.compare.grid import Grid
from lora_dp.fed.compare.options import CompareConfig
from lora_dp.fed.config import RunConfig, read_config
from lora_dp.fed.page import write_page
from lora_dp.fed.runs import loop

COMMON = {"clients": 2, "rounds": 2, "local_steps": 1, "batch_size": 16, "accountant": "rdp", "device": "cpu"}
# Accuracy and loss of a trial, by method and rate: dp-lora's two best are equally accurate.
TRIALS = {
    ("la-lora", 0.1): (0.7, 0.9),
    ("la-lora", 0.3): (0.8, 0.9),
    ("la-lora", 1.0): (0.6, 0.1),
    ("dp-lora", 0.1): (0.8, 0.7),
    ("dp-lora", 0.3): (0.8, 0.6),
    ("dp-lora", 1.0): (0.3, 0.5),
}


class Runs:
    """Stands in for the runner, and notes at what rate each folder was run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rates: dict[str, float | None] = {}
        self.broken: set[str] = set()
        monkeypatch.setattr(launch, "run", self.run)
        monkeypatch.setattr(launch, "resume", lambda path, console: self.run(read_config(path), console, path))

    def run(self, config: RunConfig, console: Console, path: Path | None = None) -> loop.Outcome:
        path = path or config.run.output
        assert path is not None
        name, rate = "/".join(path.parts[-4:]), config.optimization.lr
        self.rates[name] = rate
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.yaml").write_text(config.to_yaml())
        if name in self.broken:
            raise RuntimeError("no memory")
        accuracy, loss = TRIALS[config.federation.method, rate]
        (path / "summary.json").write_text(
            json.dumps(
                {
                    "status": "finished",
                    "accuracy_before": 0.5,
                    "accuracy_after": accuracy,
                    "loss_after": loss,
                    "seconds": 1.0,
                    "worst_epsilon": 0.9,
                    "delta": 1e-5,
                }
            )
        )
        return loop.Outcome(path, {"status": "finished"}, [])


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(monkeypatch)


def tuned(folder: Path, **options: Any) -> str:
    stream = io.StringIO()
    config = CompareConfig(
        **{
            "methods": ["la-lora", "dp-lora"],
            "epsilons": [1],
            "seeds": [0, 1],
            "learning_rates": [0.1, 0.3, 1.0],
            "output": folder,
            **options,
        }
    )
    compare(config, COMMON, Console(file=stream, width=200))
    return stream.getvalue()


def test_cells_take_the_rate_that_was_best(tmp_path, runs):
    tuned(tmp_path / "grid", learning_rates=[0.1, 0.3, 1.0])
    trials = {name: rate for name, rate in runs.rates.items() if name.startswith("trials/")}
    assert len(trials) == 6 and all(name.endswith(f"/lr{rate:g}") for name, rate in trials.items())
    # la-lora: the most accurate, whose loss is not the lowest; dp-lora: of two as accurate the one of lower loss.
    cells = {name: rate for name, rate in runs.rates.items() if name.startswith("cells/")}
    assert cells == {f"cells/{m}/eps1/seed{s}": 0.3 for m in ("la-lora", "dp-lora") for s in (0, 1)}
    assert list(runs.rates)[:6] == list(trials)


def test_the_trials_have_a_seed_of_their_own(tmp_path, runs):
    tuned(tmp_path / "grid", tuning_seed=7)
    assert {read_config(path.parent).run.seed for path in tmp_path.glob("grid/trials/*/*/*/config.yaml")} == {7}
    with pytest.raises(ValueError, match="tuning_seed 1 is one of seeds"):
        tuned(tmp_path / "other", tuning_seed=1)


@pytest.mark.slow
def test_what_was_tried_is_told(tmp_path, runs):
    tuned(tmp_path / "grid", learning_rates=[0.1, 0.3])
    words = (tmp_path / "grid" / "comparison.md").read_text()
    assert "the best of 0.1, 0.3 by accuracy on these validation data, one trial each with seed 100" in words
    assert "(0 of 2 chose the smallest, 2 of 2 chose the largest)" in words
    trials = pandas.read_csv(tmp_path / "grid" / "trials.csv")
    assert list(trials["lr"]) == [0.1, 0.3] * 2 and list(trials["accuracy_after"]) == [0.7, 0.8, 0.8, 0.8]
    assert list(pandas.read_csv(tmp_path / "grid" / "comparison.csv")["lr"]) == [0.3] * 4
    page = write_page(tmp_path / "grid").read_text()
    assert "4 trials of learning rates" in page


@pytest.mark.slow
def test_a_failed_trial_stops_its_cells_only(tmp_path, runs):
    runs.broken = {"trials/la-lora/eps1/lr0.3"}
    shown = tuned(tmp_path / "grid")
    assert "failed: la-lora, ε = 1, trial of lr 0.3: RuntimeError: no memory" in shown
    assert "failed: la-lora, ε = 1, seed 0: a trial of its learning rates failed" in shown
    assert [name for name in runs.rates if name.startswith("cells/")] == [
        "cells/dp-lora/eps1/seed0",
        "cells/dp-lora/eps1/seed1",
    ]
    assert "trial of lr 0.3</th>" in write_page(tmp_path / "grid").read_text()
    # The next call tries what failed, and what hung on it.
    runs.broken, runs.rates = set(), {}
    tuned(tmp_path / "grid")
    assert runs.rates == {
        "trials/la-lora/eps1/lr0.3": 0.3,
        "cells/la-lora/eps1/seed0": 0.3,
        "cells/la-lora/eps1/seed1": 0.3,
    }


def test_a_trial_that_diverged_is_not_chosen_and_stops_nothing(tmp_path, runs, monkeypatch):
    """Its clients' updates were left out, as not finite or absurdly long, until there were too few."""
    run = runs.run

    def diverging(config: RunConfig, console: Console, path: Path | None = None) -> loop.Outcome:
        outcome = run(config, console, path)
        if config.optimization.lr == 0.3:
            (outcome.folder / "summary.json").write_text(json.dumps({"status": "stopped"}))
            raise TooFewClients("Round 7 has too few usable updates.")
        return outcome

    monkeypatch.setattr(launch, "run", diverging)
    shown = tuned(tmp_path / "grid")
    assert "trial of lr 0.3   failed: TooFewClients: Round 7" in shown
    assert {rate for name, rate in runs.rates.items() if name.startswith("cells/")} == {0.1}
    assert list(pandas.read_csv(tmp_path / "grid" / "comparison.csv")["lr"]) == [0.1] * 4


def test_its_definition_holds_the_rates(tmp_path, runs):
    tuned(tmp_path / "grid")
    assert len(Grid.read(tmp_path / "grid").trials) == 6
    with pytest.raises(ValueError, match="learning_rates differ"):
        tuned(tmp_path / "grid", learning_rates=[0.1, 0.3])


def test_a_rate_for_all_and_rates_to_try_exclude_each_other():
    with pytest.raises(ValueError, match="leave one out"):
        Grid(CompareConfig(learning_rates=[0.1]), {"lr": 0.3})
    with pytest.raises(ValueError, match="lr must be positive"):
        Grid(CompareConfig(learning_rates=[0.1, 0.0]), {})
    with pytest.raises(ValueError, match="learning_rates has 0.1 twice"):
        CompareConfig(learning_rates=[0.1, 0.1])
