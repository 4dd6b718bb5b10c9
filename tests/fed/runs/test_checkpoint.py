"""Checkpoints, and the folder that a run goes on from: whole, or refused in one sentence."""

import io
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lora_dp.fed.config import RunConfig
from lora_dp.fed.launch import resume, run
from lora_dp.fed.rounds import federation as rounds
from lora_dp.fed.rounds.federation import Federation, RoundResult
from lora_dp.fed.runs import checkpoint, loop
from lora_dp.fed.runs.checkpoint import DamagedCheckpoint
from lora_dp.fed.runs.folder import METRICS, RunFolder, read_results
from lora_dp.fed.runs.report import ConsoleReport
from tests.fed.chained import hold
from tests.fed.small import make_federation

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
METHODS = ["la-lora", "deer", "flora", "galore", "lora-fair"]


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    made = {
        f"x.{dtype}".replace("torch.", ""): torch.randn(3, 2).to(dtype)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    }
    made["x.float32"][0] = torch.tensor([-0.0, 1e-45])
    return {**made, "empty": torch.zeros(0, 4), "strided": torch.randn(4, 6)[:, ::2].t()}


NUMBERS = {"round": 3, "seen": [-1, 2], "server": {"version": 5, "changed": {"b": 1, "a": 2}, "additions": {}}}


def bits(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).tolist())
        for name, tensor in state.items()
    }


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


# One checkpoint


def test_what_was_written_is_read_bit_for_bit(tmp_path):
    checkpoint.write(tmp_path, 3, tensors(), NUMBERS)
    state, numbers = checkpoint.read(tmp_path, 3)
    assert bits(state) == bits(tensors()) and numbers == NUMBERS


def test_the_last_two_are_kept(tmp_path):
    for number in (1, 2, 3, 10):
        checkpoint.write(tmp_path, number, tensors(number), {"round": number})
    assert checkpoint.rounds(tmp_path) == [3, 10]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        f"round-{number:06d}.{kind}" for number in (3, 10) for kind in ("json", "safetensors")
    ]
    found, problems = checkpoint.newest(tmp_path)
    assert found is not None and found[1] == {"round": 10} and problems == []


def test_where_there_is_none_there_is_none(tmp_path):
    assert checkpoint.newest(tmp_path) == (None, [])


@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_no_bit_can_flip_unseen(tmp_path, kind):
    checkpoint.write(tmp_path, 1, tensors(), NUMBERS)
    path = tmp_path / "checkpoints" / f"round-000001.{kind}"
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(DamagedCheckpoint, match="round-000001"):
            checkpoint.read(tmp_path, 1)


@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_a_part_is_not_the_whole(tmp_path, kind):
    checkpoint.write(tmp_path, 1, tensors(), NUMBERS)
    path = tmp_path / "checkpoints" / f"round-000001.{kind}"
    content = path.read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedCheckpoint, match="round-000001"):
            checkpoint.read(tmp_path, 1)
    path.unlink()
    with pytest.raises(DamagedCheckpoint, match="cannot be read"):
        checkpoint.read(tmp_path, 1)


def test_tensors_of_another_round_are_not_taken(tmp_path):
    """Each file is whole, but they do not belong together."""
    checkpoint.write(tmp_path, 1, tensors(1), NUMBERS)
    checkpoint.write(tmp_path, 2, tensors(2), NUMBERS)
    folder = tmp_path / "checkpoints"
    (folder / "round-000002.safetensors").write_bytes((folder / "round-000001.safetensors").read_bytes())
    with pytest.raises(DamagedCheckpoint, match="does not match its digest"):
        checkpoint.read(tmp_path, 2)


def test_another_version_says_so(tmp_path):
    checkpoint.write(tmp_path, 1, tensors(), NUMBERS)
    path = tmp_path / "checkpoints" / "round-000001.json"
    head = json.loads(path.read_text())
    path.write_text(json.dumps({**head, "version": 99}))
    with pytest.raises(DamagedCheckpoint, match="version 99: read it with the lora-dp that wrote it"):
        checkpoint.read(tmp_path, 1)


def test_the_one_before_a_damaged_one_serves(tmp_path):
    for number in (1, 2):
        checkpoint.write(tmp_path, number, tensors(number), {"round": number})
    path = tmp_path / "checkpoints" / "round-000002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    found, [problem] = checkpoint.newest(tmp_path)
    assert found is not None and found[1] == {"round": 1} and bits(found[0]) == bits(tensors(1))
    assert "round-000002 is damaged: its content does not match its digest" in problem
    (tmp_path / "checkpoints" / "round-000001.json").write_text("{}")
    with pytest.raises(DamagedCheckpoint, match="No checkpoint in .* is whole .*restore one from a backup"):
        checkpoint.newest(tmp_path)


def test_other_files_are_no_checkpoints(tmp_path):
    checkpoint.write(tmp_path, 1, tensors(), NUMBERS)
    folder = tmp_path / "checkpoints"
    for name in ("round-000002.safetensors", "round-000003.json.tmp", "round-old.json", "notes.json"):
        (folder / name).write_bytes(b"x")
    assert checkpoint.rounds(tmp_path) == [1]


@pytest.mark.parametrize("stop", range(1, 5))
def test_a_crash_while_writing_leaves_the_one_before(tmp_path, monkeypatch, stop):
    """At any of the calls that reach the disk: two files, each synchronised and renamed."""
    checkpoint.write(tmp_path, 1, tensors(1), {"round": 1})
    calls = 0

    def crashing(function: Any) -> Any:
        def called(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt
            return function(*args)

        return called

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("lora_dp.atomic_files.os.replace", crashing(os.replace))
        patched.setattr("lora_dp.atomic_files.os.fsync", crashing(os.fsync))
        checkpoint.write(tmp_path, 2, tensors(2), {"round": 2})
    found, problems = checkpoint.newest(tmp_path)
    assert found is not None and found[1] == {"round": 1} and problems == []
    checkpoint.write(tmp_path, 2, tensors(2), {"round": 2})
    found, _ = checkpoint.newest(tmp_path)
    assert found is not None and bits(found[0]) == bits(tensors(2))


def test_the_numbers_are_written_after_the_tensors_are_on_the_disk(tmp_path, monkeypatch):
    renamed: list[str] = []
    replace = os.replace

    def watched(source: Path, target: Path) -> None:
        renamed.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr("lora_dp.atomic_files.os.replace", watched)
    checkpoint.write(tmp_path, 1, tensors(), NUMBERS)
    assert renamed == ["round-000001.safetensors", "round-000001.json"]


# A federation's checkpoint


@pytest.mark.parametrize("method", METHODS)
def test_a_federation_goes_on_with_the_same_bits_after_each_round(tmp_path, method):
    """Through the disk, into a fresh federation; bytes that travel are the same too."""
    whole = make_federation(method)
    expected = [whole.run_round([0, index % 3]) if index % 3 else whole.run_round([0, 1, 2]) for index in range(3)]
    resumed = make_federation(method)
    for index in range(3):
        checkpoint.write(tmp_path, index, *rounds.checkpoint(resumed))
        resumed = make_federation(method)
        rounds.restore(resumed, *checkpoint.read(tmp_path, index))
        resumed.account.add_round([])
        result = resumed.run_round([0, index % 3]) if index % 3 else resumed.run_round([0, 1, 2])
        for name in ("round", "participants", "loss", "accuracy", "bytes_up", "bytes_down"):
            assert getattr(result, name) == getattr(expected[index], name), name
    assert list(resumed.server.state) == list(whole.server.state)
    assert bits(resumed.server.state) == bits(whole.server.state)
    assert resumed.server.bookkeeping() == whole.server.bookkeeping()
    assert resumed.seen.tolist() == whole.seen.tolist()


def test_the_order_of_tensors_on_the_disk_does_not_matter():
    """Noise and fresh factors are drawn tensor by tensor: the order is the model's, whatever the file's."""
    settings: dict[str, Any] = {"unit": "client", "noise_by": "server", "delta": 0.01, "weighting": "equal"}
    for method, extra in (("flora", {}), ("dp-lora", settings)):
        whole, resumed = make_federation(method, **extra), make_federation(method, **extra)
        whole.run_round([0, 1, 2])
        state, numbers = rounds.checkpoint(whole)
        rounds.restore(resumed, dict(reversed(state.items())), json.loads(json.dumps(numbers)))
        for federation in (whole, resumed):
            federation.run_round([0, 1, 2])
        assert bits(resumed.server.state) == bits(whole.server.state), method


@pytest.mark.parametrize("change", ["lacks", "shape", "unknown"])
def test_a_checkpoint_of_another_model_is_refused(change):
    federation = make_federation("dp-lora")
    state, numbers = rounds.checkpoint(federation)
    name = "1.lora_A"
    if change == "lacks":
        del state[name]
    elif change == "shape":
        state[name] = torch.zeros(3, 12, dtype=torch.float64)
    else:
        state["other"] = torch.zeros(1)
    before = dict(federation.server.state)
    with pytest.raises(ValueError, match="The checkpoint was made for another model"):
        rounds.restore(federation, state, numbers)
    assert bits(federation.server.state) == bits(before) and federation.rounds_done == 0


# The folder


def stopped_run(folder: Path, last: int, **options: Any) -> None:
    """A run that ended, with its last word taken back: as if it had been killed after round ``last``'s checkpoint."""
    run(RunConfig.from_flat({**TINY, **options, "output": folder}), quiet())
    for name in ("summary.json", "ledger.json", "curves.png"):
        (folder / name).unlink()
    assert checkpoint.rounds(folder)[-1] == last


def result_of(folder: Path) -> tuple[bytes, list[dict[str, Any]]]:
    metrics = [asdict(result) | {"seconds": 0} for result in read_results(folder)]
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes(), metrics


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


def test_with_every_checkpoint_damaged_the_run_is_left_as_it_is(tmp_path):
    folder = tmp_path / "run"
    stopped_run(folder, 4)
    for path in (folder / "checkpoints").glob("*.json"):
        path.write_text("nonsense")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="No checkpoint in .* is whole"):
        resume(folder, quiet())
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
