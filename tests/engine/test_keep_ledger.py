"""Every step is in a file before its noise is drawn, whatever happens after."""

import json
from pathlib import Path

import pytest

from lora_dp import PrivacyEngine
from tests.models import examples, mlp, take_step
from tests.support import make_private


def steps_in(path: Path) -> int:
    return sum(entry["count"] for entry in json.loads(path.read_text())["ledger"]["entries"])


def test_a_step_is_written_before_its_noise_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, path = PrivacyEngine(), tmp_path / "ledger.json"
    model = mlp()
    optimizer = make_private(model, batch_size=4, noise_multiplier=1.0, engine=engine)
    engine.keep_ledger(path)
    assert steps_in(path) == 0
    take_step(model, optimizer, examples(4))
    assert steps_in(path) == 1
    seen = []
    draw = type(optimizer.mechanism).release
    monkeypatch.setattr(
        type(optimizer.mechanism), "release", lambda self, sums: (seen.append(steps_in(path)), draw(self, sums))[1]
    )
    monkeypatch.setattr("lora_dp.engine.optimizer.find_fused_step", lambda *_: None)
    take_step(model, optimizer, examples(4))
    assert seen == [2]


def test_a_file_that_cannot_be_written_releases_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = PrivacyEngine()
    model = mlp()
    optimizer = make_private(model, batch_size=4, noise_multiplier=1.0, engine=engine)
    engine.keep_ledger(tmp_path / "ledger.json")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_dp.atomic_files.write_atomically", full)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(OSError, match="No space"):
        take_step(model, optimizer, examples(4))
    assert all((p == before[name]).all() for name, p in model.named_parameters())
    assert engine.ledger.steps == 1  # over-counted, which is safe


def test_a_run_goes_on_in_its_file_and_in_no_others(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    engine, model = PrivacyEngine(), mlp()
    optimizer = make_private(model, batch_size=4, noise_multiplier=1.0, engine=engine)
    engine.keep_ledger(path)
    take_step(model, optimizer, examples(4))
    other = PrivacyEngine()
    with pytest.raises(ValueError, match=r"holds 1 steps, not all of which this engine knows: go on with them by"):
        other.keep_ledger(path)
    other.load_state_dict(json.loads(path.read_text()))
    other.keep_ledger(path)
    assert steps_in(path) == 1
    path.write_text("{}")
    with pytest.raises(ValueError, match="holds no ledger of an engine: choose another file"):
        other.keep_ledger(path)


def test_a_seeded_run_is_written_too(tmp_path: Path) -> None:
    engine, model = PrivacyEngine(reproducible_seed=4), mlp()
    optimizer = make_private(model, batch_size=4, noise_multiplier=1.0, engine=engine)
    engine.keep_ledger(tmp_path / "ledger.json")
    take_step(model, optimizer, examples(4))
    resumed = PrivacyEngine(reproducible_seed=4)
    resumed.load_state_dict(json.loads((tmp_path / "ledger.json").read_text()))
    assert resumed.ledger.steps == 1


def test_two_runs_of_one_file_are_told_apart(tmp_path: Path) -> None:
    runs = []
    for _ in range(2):
        engine, model = PrivacyEngine(), mlp()
        optimizer = make_private(model, batch_size=4, noise_multiplier=1.0, engine=engine)
        engine.keep_ledger(tmp_path / "ledger.json")
        runs.append((model, optimizer))
    take_step(*runs[1], examples(4))
    with pytest.raises(RuntimeError, match="another run writes to it"):
        take_step(*runs[0], examples(4))


def test_a_state_that_is_taken_up_later_is_written_at_once(tmp_path: Path) -> None:
    engine, model = PrivacyEngine(), mlp()
    take_step(model, make_private(model, batch_size=4, noise_multiplier=1.0, engine=engine), examples(4))
    resumed = PrivacyEngine()
    resumed.keep_ledger(tmp_path / "ledger.json")
    resumed.load_state_dict(engine.state_dict())
    assert steps_in(tmp_path / "ledger.json") == 1


def test_as_many_steps_of_another_run_are_not_written_over(tmp_path: Path) -> None:
    first, second = PrivacyEngine(), PrivacyEngine()
    for engine in (first, second):
        model = mlp()
        take_step(model, make_private(model, batch_size=4, noise_multiplier=1.0, engine=engine), examples(4))
    first.keep_ledger(tmp_path / "ledger.json")
    before = (tmp_path / "ledger.json").read_text()
    with pytest.raises(ValueError, match="holds 1 steps, not all of which this engine knows"):
        second.keep_ledger(tmp_path / "ledger.json")
    assert (tmp_path / "ledger.json").read_text() == before
