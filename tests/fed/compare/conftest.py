"""Runs that end at once, with results that are told to them."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lora_dp.fed import launch
from lora_dp.fed.config import RunConfig, read_config
from lora_dp.fed.rounds.privacy_plan import AS_RELEASED
from lora_dp.fed.runs import loop
from tests.fed.compare.small_grids import ACCURACY


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
