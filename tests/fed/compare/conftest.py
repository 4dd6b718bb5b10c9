"""Runs that end at once, with results that are told to them."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lora_dp.errors import TooFewClients
from lora_dp.fed import launch
from lora_dp.fed.config import RunConfig, read_config
from lora_dp.fed.rounds.privacy_plan import AS_RELEASED
from lora_dp.fed.runs import loop
from tests.fed.compare.small_grids import ACCURACY, Verdict


def summary(config: RunConfig, status: str, accuracy: float, loss: float) -> dict[str, Any]:
    target = config.privacy.target
    released = config.privacy.mechanism == "as-released"
    return {
        "status": status,
        "guarantee": AS_RELEASED if released else None,
        "release": None,
        "accuracy_before": 0.5,
        "accuracy_after": accuracy,
        "balanced_accuracy_before": 0.25,
        "balanced_accuracy_after": 1 - accuracy,
        "loss_after": loss,
        "rounds": 2,
        "worst_epsilon": target and target * 0.99,
        "seconds": 1.5,
        "delta": 1e-5,
    }


class Runner:
    """Stands in for the runner: writes what a run would, or fails as told; notes what it was asked.

    Attributes:
        ran, resumed: the last parts of the folders of runs that were begun, or gone on with.
        configs: of all runs, by these.
        verdict: of a run whose accuracy is not in ACCURACY: accuracy and loss, or None for one that diverges.
        broken: what a run raises.
        stuck: runs that cannot be resumed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        self.resumed: list[str] = []
        self.configs: dict[str, RunConfig] = {}
        self.broken: dict[str, BaseException] = {}
        self.stuck: set[str] = set()
        self.verdict: Verdict = lambda config: (0.5, 0.7)
        monkeypatch.setattr(launch, "run", self.run)
        monkeypatch.setattr(launch, "resume", self.resume)

    def run(self, config: RunConfig, console: Console) -> loop.Outcome:
        path = config.run.output
        assert path is not None and not (path / "config.yaml").exists()
        self.ran.append(named(path))
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.yaml").write_text(config.to_yaml())
        if named(path) in self.broken:
            raise self.broken[named(path)]
        return self._end(config, path)

    def resume(self, path: Path, console: Console) -> loop.Outcome:
        self.resumed.append(named(path))
        if named(path) in self.stuck:
            raise ValueError("No checkpoint is whole.")
        if named(path) in self.broken:
            raise self.broken[named(path)]
        return self._end(read_config(path), path)

    def _end(self, config: RunConfig, path: Path) -> loop.Outcome:
        self.configs[named(path)] = config
        told = ACCURACY.get((config.federation.method, config.privacy.target or 0.0))
        found = (told[config.run.seed], 0.7) if told and config.run.seed < len(told) else self.verdict(config)
        status = "stopped" if found is None else "finished"
        (path / "summary.json").write_text(json.dumps(summary(config, status, *(found or (0.1, 9.0)))))
        if found is None:
            raise TooFewClients("Round 1 has too few usable updates.")
        return loop.Outcome(path, {"status": "finished"}, [])


def named(path: Path) -> str:
    """Method, budget and seed of a run of the table; of a trial, its setting before the seed."""
    return "/".join(path.parts[-4 if "trials" in path.parts else -3 :])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Runner:
    return Runner(monkeypatch)
