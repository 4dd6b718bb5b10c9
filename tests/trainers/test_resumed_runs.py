"""Runs that end early and go on: every step is counted, and nothing is loaded that cannot be."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.trainers.training import SAVED, Crash, of_trained, private_trainer


def test_steps_after_the_checkpoint_are_counted_by_the_run_that_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        private_trainer(tmp_path, training=SAVED, callbacks=[Crash(5)]).train()
    resumed = private_trainer(tmp_path, training=SAVED)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert resumed.engine.ledger.steps == 5 + (8 - 3)
    assert resumed.state.epoch == 8 / 4
    kept = json.loads((tmp_path / "privacy_ledger.json").read_text())
    assert sum(entry["count"] for entry in kept["ledger"]["entries"]) == 10


def test_under_a_target_it_ends_when_the_budget_is_spent_and_the_model_is_kept(tmp_path: Path) -> None:
    privacy = {"target_epsilon": 4.0}
    with pytest.raises(KeyboardInterrupt):
        private_trainer(tmp_path, privacy=privacy, training=SAVED, callbacks=[Crash(5)]).train()
    resumed = private_trainer(tmp_path, privacy=privacy, training=SAVED)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.engine.ledger.steps == 8
    assert resumed.state.global_step == 3 + (8 - 5)
    assert resumed.epsilon() <= 4.0
    resumed.save_model()
    statement = json.loads((tmp_path / "privacy.json").read_text())
    assert statement["epsilon"] == pytest.approx(resumed.epsilon())
    assert sum(entry["count"] for entry in statement["steps"]) == 8


def test_a_resumed_run_goes_on_from_the_weights_and_the_optimizer(tmp_path: Path) -> None:
    first = private_trainer(tmp_path, training={**SAVED, "max_steps": 3})
    first.train()
    assert first.model is not None
    saved = of_trained(first.model)
    moments = [state["exp_avg"].clone() for state in first.optimizer.state.values()]
    resumed = private_trainer(tmp_path, training={**SAVED, "max_steps": 4}, callbacks=[Crash(4)])
    found: dict[str, Any] = {}

    class Look(TrainerCallback):
        def on_train_begin(self, *_: Any, model: Any, optimizer: Any, **__: Any) -> None:
            found["weights"] = of_trained(model)
            found["moments"] = [state["exp_avg"].clone() for state in optimizer.state.values()]

    resumed.add_callback(Look())
    with pytest.raises(KeyboardInterrupt):
        resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(found["weights"][name], saved[name]) for name in saved)
    assert all(torch.equal(one, other) for one, other in zip(found["moments"], moments, strict=True))


KILLED = """
import os, signal, sys
from pathlib import Path
from transformers import TrainerCallback
from tests.trainers.training import private_trainer

class Kill(TrainerCallback):
    def on_optimizer_step(self, args, state, control, **_):
        if state.global_step == 4:  # the fifth step is taken, and nothing of it is saved
            os.kill(os.getpid(), signal.SIGKILL)

private_trainer(
    Path(sys.argv[1]), training={"save_strategy": "steps", "save_steps": 3, "max_steps": 8}, callbacks=[Kill()]
).train()
"""


@pytest.mark.slow
def test_a_kill_never_under_counts(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    resumed = private_trainer(tmp_path, training=SAVED)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.engine.ledger.steps == 5 + (8 - 3)


def test_a_folder_with_the_steps_of_another_run_is_refused(tmp_path: Path) -> None:
    private_trainer(tmp_path).train()
    with pytest.raises(ValueError, match=r"holds the private steps of an earlier run: go on with it by"):
        private_trainer(tmp_path).train()


def test_a_checkpoint_without_a_ledger_is_refused(tmp_path: Path) -> None:
    private_trainer(tmp_path, training=SAVED).train()
    (tmp_path / "checkpoint-6" / "privacy_ledger.json").unlink()
    with pytest.raises(ValueError, match="has no privacy_ledger.json"):
        private_trainer(tmp_path, training={**SAVED, "max_steps": 9}).train(str(tmp_path / "checkpoint-6"))


def test_a_checkpoint_apart_from_its_run_warns_of_what_it_cannot_know(tmp_path: Path) -> None:
    private_trainer(tmp_path / "run", training=SAVED).train()
    alone = tmp_path / "moved"
    (tmp_path / "run" / "checkpoint-6").rename(alone)
    with pytest.warns(UserWarning, match="is missing, where every step is written before"):
        resumed = private_trainer(tmp_path / "next", training={**SAVED, "max_steps": 7})
        resumed.train(str(alone))
    assert resumed.engine.ledger.steps == 7
