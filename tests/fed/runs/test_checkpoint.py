"""Checkpoints, and the folder that a run goes on from: whole, or refused in one sentence."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_dp.fed.rounds import saved_state
from lora_dp.fed.runs import checkpoint
from lora_dp.fed.runs.checkpoint import DamagedCheckpoint
from tests.fed.small import make_federation

METHODS = ["la-lora", "deer", "flora", "galore", "lora-fair", "fedsvd", "lora-xs", "dp-fedadamw"]


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


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_federation_goes_on_with_the_same_bits_after_each_round(tmp_path, method):
    """Through the disk, into a fresh federation; bytes that travel are the same too."""
    whole = make_federation(method)
    expected = [whole.run_round([0, index % 3]) if index % 3 else whole.run_round([0, 1, 2]) for index in range(3)]
    resumed = make_federation(method)
    for index in range(3):
        checkpoint.write(tmp_path, index, *saved_state.checkpoint(resumed))
        resumed = make_federation(method)
        saved_state.restore(resumed, *checkpoint.read(tmp_path, index))
        resumed.account.add_round([])
        result = resumed.run_round([0, index % 3]) if index % 3 else resumed.run_round([0, 1, 2])
        for name in ("round", "participants", "loss", "accuracy", "bytes_up", "bytes_down"):
            assert getattr(result, name) == getattr(expected[index], name), name
    assert list(resumed.server.state) == list(whole.server.state)
    assert bits(resumed.server.state) == bits(whole.server.state)
    assert resumed.server.bookkeeping() == whole.server.bookkeeping()
    assert resumed.seen.tolist() == whole.seen.tolist()


@pytest.mark.slow
def test_the_order_of_tensors_on_the_disk_does_not_matter():
    """Noise and fresh factors are drawn tensor by tensor: the order is the model's, whatever the file's."""
    settings: dict[str, Any] = {"unit": "client", "noise_by": "server", "delta": 0.01, "weighting": "equal"}
    for method, extra in (("flora", {}), ("dp-lora", settings)):
        whole, resumed = make_federation(method, **extra), make_federation(method, **extra)
        whole.run_round([0, 1, 2])
        state, numbers = saved_state.checkpoint(whole)
        saved_state.restore(resumed, dict(reversed(state.items())), json.loads(json.dumps(numbers)))
        for federation in (whole, resumed):
            federation.run_round([0, 1, 2])
        assert bits(resumed.server.state) == bits(whole.server.state), method


@pytest.mark.parametrize("change", ["lacks", "shape", "unknown"])
def test_a_checkpoint_of_another_model_is_refused(change):
    federation = make_federation("dp-lora")
    state, numbers = saved_state.checkpoint(federation)
    name = "1.lora_A"
    if change == "lacks":
        del state[name]
    elif change == "shape":
        state[name] = torch.zeros(3, 12, dtype=torch.float64)
    else:
        state["other"] = torch.zeros(1)
    before = dict(federation.server.state)
    with pytest.raises(ValueError, match="The checkpoint was made for another model"):
        saved_state.restore(federation, state, numbers)
    assert bits(federation.server.state) == bits(before) and federation.rounds_done == 0
