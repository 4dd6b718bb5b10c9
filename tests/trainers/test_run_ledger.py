"""A run's ledger in its folder and its checkpoints: taken up whole, or refused before anything is loaded."""

import json
from pathlib import Path

import pytest

from lora_dp import PrivacyArguments, PrivacyEngine
from lora_dp.privacy.accounting import PoissonGaussian
from lora_dp.trainers.run_ledger import LEDGER, SETTINGS, RunLedger

PRIVACY = PrivacyArguments(noise_multiplier=1.0, target_delta=1e-5)


def run(folder: Path, steps: int) -> tuple[PrivacyEngine, RunLedger]:
    engine = PrivacyEngine()
    kept = RunLedger(engine, PRIVACY)
    kept.begin(folder)
    if steps:
        engine.ledger.append(PoissonGaussian(1.0, 0.1), steps)
    return engine, kept


def saved(kept: RunLedger, folder: Path) -> Path:
    folder.mkdir()
    kept.save(folder)
    return folder


def test_steps_after_a_checkpoint_are_taken_up(tmp_path: Path) -> None:
    engine, kept = run(tmp_path, 3)
    checkpoint = saved(kept, tmp_path / "checkpoint-3")
    engine.ledger.append(PoissonGaussian(1.0, 0.1), 2)
    resumed = PrivacyEngine()
    RunLedger(resumed, PRIVACY).take_up(checkpoint)
    assert resumed.ledger.steps == 5


def test_a_checkpoint_beside_another_runs_ledger_is_refused(tmp_path: Path) -> None:
    _, kept = run(tmp_path / "a", 6)
    checkpoint = saved(kept, tmp_path / "a" / "checkpoint-6")
    run(tmp_path / "b", 3)
    moved = tmp_path / "b" / "checkpoint-6"
    checkpoint.rename(moved)
    fresh = PrivacyEngine()
    with pytest.raises(ValueError, match="lacks steps that .* holds, so it is of another run"):
        RunLedger(fresh, PRIVACY).take_up(moved)
    assert fresh.ledger.steps == 0
    # As many steps, by another run
    run(tmp_path / "c", 9)
    moved.rename(tmp_path / "c" / "checkpoint-6")
    with pytest.raises(ValueError, match="of another run"):
        RunLedger(fresh, PRIVACY).take_up(tmp_path / "c" / "checkpoint-6")


def test_a_folder_is_another_runs_only_with_steps(tmp_path: Path) -> None:
    run(tmp_path, 0)
    fresh = RunLedger(PrivacyEngine(), PRIVACY)
    fresh.check_new(tmp_path)
    run(tmp_path / "spent", 1)
    with pytest.raises(ValueError, match="holds the private steps of an earlier run"):
        fresh.check_new(tmp_path / "spent")
    (tmp_path / LEDGER).write_text("{")
    with pytest.raises(ValueError, match="holds no ledger"):
        fresh.check_new(tmp_path)


def test_the_settings_of_all_parts_are_kept(tmp_path: Path) -> None:
    _, kept = run(tmp_path, 1)
    checkpoint = saved(kept, tmp_path / "checkpoint-1")
    other = RunLedger(PrivacyEngine(), PrivacyArguments(noise_multiplier=1.0, target_delta=1e-5, clip_bound=3.0))
    other.take_up(checkpoint)
    other.begin(tmp_path)
    assert [part["clip_bound"] for part in other.settings] == [1.0, 3.0]
    assert [part["clip_bound"] for part in json.loads((tmp_path / SETTINGS).read_text())] == [1.0, 3.0]
