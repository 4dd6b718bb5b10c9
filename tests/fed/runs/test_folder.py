"""The folder of a run: what goes on from it is whole, or refused in one sentence."""

import io
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lora_dp.fed.config import RunConfig
from lora_dp.fed.launch import resume, run
from lora_dp.fed.rounds.federation import Federation, RoundResult
from lora_dp.fed.runs import checkpoint, loop
from lora_dp.fed.runs.folder import METRICS, RunFolder, read_results
from lora_dp.fed.runs.report import ConsoleReport
from tests.fed.chained import hold

TINY = {
    "clients": 2,
    "rounds": 4,
    "local_steps": 1,
    "batch_size": 16,
    "accountant": "rdp",
    "device": "cpu",
    "reproducible": True,
    "method": "dp-lora",
}


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def stopped_run(folder: Path, last: int, **options: Any) -> None:
    """A run that ended, with its last word taken back: as if it had been killed after round ``last``'s checkpoint."""
    run(RunConfig.from_flat({**TINY, **options, "output": folder}), quiet())
    for name in ("summary.json", "ledger.json", "curves.png"):
        (folder / name).unlink()
    assert checkpoint.rounds(folder)[-1] == last


def result_of(folder: Path) -> tuple[bytes, list[dict[str, Any]]]:
    metrics = [asdict(result) | {"seconds": 0} for result in read_results(folder)]
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes(), metrics


@pytest.mark.slow
def test_resuming_from_before_a_damaged_checkpoint_gives_the_same_bits_and_says_so(tmp_path):
    folder = tmp_path / "run"
    stopped_run(folder, 4)
    expected = result_of(folder)
    path = folder / "checkpoints" / "round-000004.safetensors"
    path.write_bytes(b"\x00" + path.read_bytes()[1:])
    console = quiet()
    outcome = resume(folder, console)
    text = console.file.getvalue()
    assert "round-000004" in text and "does not match its digest" in text and "Going on from the one before it" in text
    assert "after round 3" in text
    assert result_of(folder) == expected
    assert outcome.summary["rounds"] == 4 and checkpoint.read(folder, 4)[1]["round"] == 4


@pytest.mark.slow
def test_with_every_checkpoint_damaged_the_run_is_left_as_it_is(tmp_path):
    folder = tmp_path / "run"
    stopped_run(folder, 4)
    for path in (folder / "checkpoints").glob("*.json"):
        path.write_text("nonsense")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="No checkpoint in .* is whole"):
        resume(folder, quiet())
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_an_edited_configuration_does_not_change_what_was_released(tmp_path):
    """More rounds would have had more noise: the rounds so far had less than the new plan counts."""
    folder = tmp_path / "run"
    stopped_run(folder, 4)
    text = (folder / "config.yaml").read_text()
    edited = re.sub(r"(?m)^rounds: .*$", "rounds: 40", text)
    assert edited != text
    (folder / "config.yaml").write_text(edited)
    with pytest.raises(ValueError, match=r"begun on other terms \(.*rounds.* differ\)"):
        resume(folder, quiet())
    (folder / "config.yaml").write_text(text)
    assert resume(folder, quiet()).summary["status"] == "finished"


@pytest.mark.slow
def test_a_damaged_log_stops_the_resumption(tmp_path):
    folder = tmp_path / "run"
    stopped_run(folder, 4)
    lines = (folder / "ledger.jsonl").read_text().splitlines(keepends=True)
    for content, held, message in (
        (lines[0] + lines[1] + lines[2][:10] + lines[3] + lines[4], 5, "line 3 is damaged"),
        ("".join(lines[:4]), 5, "ends before line 5 of 5"),
        ("".join(lines[:4]), 4, "ends before round 4"),
    ):
        (folder / "ledger.jsonl").write_text(content)
        hold(folder / "ledger.jsonl", held)
        with pytest.raises(ValueError, match=message):
            resume(folder, quiet())
    assert not (folder / "summary.json").exists()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(RunConfig.from_flat({**TINY, "output": tmp_path / "run"}))


def round_result(number: int, **changes: Any) -> RoundResult:
    return RoundResult(
        **{
            "round": number,
            "phases": "AB",
            "participants": [0],
            "loss": 0.1 + 1e-17,
            "accuracy": 1 / 3,
            "epsilon": float("inf"),
            "bytes_up": 1,
            "bytes_down": 2,
            "seconds": 0.5,
            "failed": [],
            **changes,
        }
    )


def test_metrics_come_back_as_they_were(folder):
    results = [round_result(0), round_result(1, failed=[{"client": 1, "reason": 'raised "}"\n\u2028'}], loss=None)]
    for result in results:
        folder.add_metrics(result)
    assert read_results(folder.path) == results


def test_metrics_after_the_checkpoint_are_cut_off(folder):
    for number in range(4):
        folder.add_metrics(round_result(number))
    assert [result.round for result in folder.keep_rounds(2)] == [0, 1, 2]
    assert [result.round for result in read_results(folder.path)] == [0, 1, 2]


def test_a_torn_line_of_metrics_is_no_round_wherever_it_is_torn(folder):
    """Also where it happens to end in a brace, inside the list of those who failed."""
    folder.add_metrics(round_result(0))
    whole = (folder.path / METRICS).read_bytes()
    folder.add_metrics(round_result(1, failed=[{"client": 1, "reason": "}"}, {"client": 2, "reason": "x"}]))
    content = (folder.path / METRICS).read_bytes()
    for length in range(len(whole), len(content), 4):
        (folder.path / METRICS).write_bytes(content[:length])
        assert [result.round for result in folder.keep_rounds(0)] == [0]
        assert (folder.path / METRICS).read_bytes() == whole
    (folder.path / METRICS).write_bytes(content[:-9])
    folder.add_metrics(round_result(1))
    assert [result.round for result in read_results(folder.path)] == [0, 1]


def test_missing_metrics_are_not_made_up(folder):
    for number in (0, 2):
        folder.add_metrics(round_result(number))
    with pytest.raises(ValueError, match=r"lacks rounds before the checkpoint \(round 2\): restore it from a backup"):
        folder.keep_rounds(2)


@pytest.mark.slow
def test_a_round_is_in_the_metrics_on_the_disk_before_its_checkpoint(folder, monkeypatch):
    """A power cut must not leave a checkpoint whose round is nowhere else."""
    federation = Federation.from_config(RunConfig.from_flat({**TINY, "rounds": 1}))
    metrics, written = folder.path / METRICS, []
    fsync, write = os.fsync, checkpoint.write

    def watched_fsync(number: int) -> None:
        fsync(number)
        if metrics.exists() and os.path.samestat(os.fstat(number), metrics.stat()):
            written.append(metrics.read_bytes().count(b"\n"))

    def watched_write(*args: Any) -> None:
        written.append("checkpoint")
        write(*args)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(checkpoint, "write", watched_write)
    loop.drive(RunConfig.from_flat({**TINY, "rounds": 1}), federation, folder, ConsoleReport(quiet()), [])
    assert written == [1, 2, "checkpoint"]


def test_one_process_at_a_time(folder):
    for attempt in (lambda: RunFolder.open(folder.path), lambda: resume(folder.path, quiet())):
        with pytest.raises(ValueError, match="Another process is at work in"):
            attempt()
    folder.close()
    RunFolder.open(folder.path)[0].close()


def test_a_folder_with_a_run_is_taken(folder):
    folder.close()
    with pytest.raises(ValueError, match="already holds a run: choose another --output, or resume it"):
        RunFolder.create(RunConfig.from_flat({**TINY, "output": folder.path}))


def test_a_folder_with_the_log_of_a_run_is_taken(folder):
    """A new run of the same options would go on in that log, and count its own rounds alone."""
    folder.log.begin(Federation.from_config(RunConfig.from_flat(TINY)).account, reproducible=False)
    folder.close()
    (folder.path / "config.yaml").unlink()
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    for _ in range(2):
        with pytest.raises(ValueError, match="holds the log of a run, which a new one would not count: choose another"):
            RunFolder.create(RunConfig.from_flat({**TINY, "output": folder.path}))
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    """What that run released would go into this one, and be counted nowhere in it: even of the same configuration."""
    for name, options in (("a", {}), ("same", {}), ("seed", {"seed": 5})):
        config = RunConfig.from_flat({**TINY, **options, "reproducible": False, "output": tmp_path / name})
        run(config, quiet())
        (tmp_path / name / "summary.json").unlink()
    kept = {path.name: path.read_bytes() for path in (tmp_path / "a" / "checkpoints").iterdir()}
    for name in ("same", "seed"):
        own = {path.name: path.read_bytes() for path in (tmp_path / name / "checkpoints").iterdir()}
        for file, data in kept.items():
            (tmp_path / name / "checkpoints" / file).write_bytes(data)
        log = (tmp_path / name / "ledger.jsonl").read_bytes()
        with pytest.raises(ValueError, match="The checkpoint of round 4 in .* is of another run"):
            resume(tmp_path / name, quiet())
        assert (tmp_path / name / "ledger.jsonl").read_bytes() == log
        for file, data in own.items():
            (tmp_path / name / "checkpoints" / file).write_bytes(data)
        assert not resume(tmp_path / name, quiet()).interrupted
