"""The ledger: what it holds, in memory and in its file."""

import json
import os
import sys
from types import FrameType
from typing import Any

import pytest

from lora_dp.privacy.accounting import Ledger, PoissonGaussian
from tests.privacy.accounting.dp_accounting_oracle import ledger_of


def test_entries_are_run_length_encoded_in_order():
    first, second = PoissonGaussian(1.0, 0.1), PoissonGaussian(2.0, 0.1)
    ledger = Ledger()
    ledger.append(first)
    ledger.append(PoissonGaussian(1, 0.1), 4)
    ledger.append(second, 2)
    ledger.append(second, 0)
    ledger.append(first)
    assert ledger.entries == ((first, 5), (second, 2), (first, 1))
    assert ledger.steps == 8
    with pytest.raises(ValueError, match="only grows"):
        ledger.append(first, -1)
    with pytest.raises(TypeError):
        ledger.append(first, 1.5)
    assert ledger.steps == 8


def test_a_ledger_continues_what_it_begins_with():
    """Whole entries, and at least as many steps of the last one."""
    first, second, third = (0.1, 1.0, 3), (0.1, 2.0, 2), (0.2, 1.0, 1)
    for ledger in ((first,), (first, second), (first, second, third)):
        for earlier in ((), (first,), (first, second), (first, second, third)):
            assert ledger_of(*ledger).continues(ledger_of(*earlier)) == (len(ledger) >= len(earlier))
        assert not ledger_of(*ledger).continues(ledger_of((0.1, 1.0, 4)))
        assert not ledger_of(*ledger).continues(ledger_of((0.1, 1.5, 1)))
        assert ledger_of(*ledger).continues(ledger_of((0.1, 1.0, 2)))
        assert not ledger_of(*ledger).continues(ledger_of((0.1, 1.0, 2), second))
    assert not Ledger().continues(ledger_of(first))


def test_round_trip_through_state_and_file(tmp_path):
    ledger = ledger_of((1 / 3, 0.1 + 0.2, 7), (1.0, 1e-3, 1), (0.25, 5.0, 10**9))
    restored = Ledger()
    restored.load_state_dict(ledger.state_dict())
    assert restored.entries == ledger.entries
    other = Ledger()
    other.append(PoissonGaussian(9.0, 0.9))
    with pytest.raises(ValueError, match="lacks steps that this one has, which cannot be taken back"):
        other.load_state_dict(ledger.state_dict())
    assert other.entries == ((PoissonGaussian(9.0, 0.9), 1),)
    path = tmp_path / "ledger.json"
    ledger.save(path)
    ledger.append(PoissonGaussian(1.0, 0.5))
    ledger.save(str(path))
    assert Ledger.load(path).entries == ledger.entries
    assert os.listdir(tmp_path) == ["ledger.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_crash_while_saving_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "ledger.json"
    ledger = ledger_of((0.1, 1.0, 3))
    ledger.save(path)

    def crash(*args):
        raise OSError("the machine stopped here")

    ledger.append(PoissonGaussian(2.0, 0.1))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="stopped here"):
        patch.setattr(os, call, crash)
        ledger.save(path)
    assert Ledger.load(path).steps == 3
    ledger.save(path)  # what the crash left behind does not stand in the way
    assert Ledger.load(path).steps == 4


def test_the_file_is_on_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    ledger_of((0.1, 1.0, 3)).save(tmp_path / "ledger.json")
    assert calls == ["fsync", "replace", "fsync"]


DAMAGED = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "not text": lambda text: "\udcff",
    "not a ledger": lambda text: "[1, 2]",
    "of another version": lambda text: text.replace('"version": 2', '"version": 3'),
    "without a count": lambda text: text.replace('"count"', '"cuont"'),
    "with a negative count": lambda text: text.replace('"count": 3', '"count": -3'),
    "with another count": lambda text: text.replace('"count": 3', '"count": 2'),
    "with less noise": lambda text: text.replace('"noise_multiplier": 1.0', '"noise_multiplier": 1.5'),
    "of another kind": lambda text: text.replace('"lora-dp ledger"', '"lora-dp log"'),
    "of the version before, which had no digests": lambda text: text.replace('"version": 2', '"version": 1'),
    "with an impossible rate": lambda text: text.replace('"sample_rate": 0.1', '"sample_rate": 1.1'),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_gives_one_clear_error(tmp_path, damage):
    path = tmp_path / "ledger.json"
    ledger_of((0.1, 1.0, 3)).save(path)
    spoilt = DAMAGED[damage](path.read_text())
    assert spoilt != path.read_text()
    path.write_text(spoilt, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=r"privacy ledger .*ledger\.json.* cannot be read"):
        Ledger.load(path)
    with pytest.raises(FileNotFoundError):
        Ledger.load(tmp_path / "elsewhere.json")


def test_a_bad_state_changes_nothing():
    ledger = ledger_of((0.1, 1.0, 3))
    state = json.loads(json.dumps(ledger.state_dict()))
    state["entries"] += [{"noise_multiplier": -1.0, "sample_rate": 0.1, "count": 1}]
    with pytest.raises(ValueError, match="Not a whole ledger of version 2"):
        ledger.load_state_dict(state)
    assert ledger.steps == 3


def test_a_ledger_of_the_version_before_has_no_digests_at_all():
    ledger = ledger_of((0.1, 1.0, 3), (0.1, 2.0, 1))
    state = ledger.state_dict()
    state["version"] = 1
    plain = [{key: value for key, value in entry.items() if key != "digest"} for entry in state["entries"]]
    restored = Ledger()
    for spoilt in (
        state,
        {**state, "entries": plain},
        {**state, "digest": ""},
        {"format": state["format"], "version": 1, "entries": [plain[0], state["entries"][1]]},
    ):
        with pytest.raises(ValueError, match="digests in a version that had none"):
            restored.load_state_dict(spoilt)
    with pytest.raises(ValueError, match="format 'lora-dp log'"):
        restored.load_state_dict({"format": "lora-dp log", "version": 1, "entries": plain})
    restored.load_state_dict({"format": state["format"], "version": 1, "entries": plain})
    assert restored.entries == ledger.entries and restored.state_dict() == ledger.state_dict()
    assert restored.state_dict()["version"] == 2


def test_an_interrupt_forgets_no_earlier_step():
    """At any line of what appends, as Ctrl-C may come."""

    def interrupt(frame: FrameType, kind: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code is not Ledger.append.__code__:
            return None
        left -= kind == "line"
        if left < 0:
            raise KeyboardInterrupt
        return interrupt

    before, interrupted = sys.gettrace(), 0
    for event in (PoissonGaussian(1.0, 0.01), PoissonGaussian(2.0, 0.01)):
        for line in range(30):
            ledger, left = Ledger(), line
            ledger.append(PoissonGaussian(1.0, 0.01), 1000)
            sys.settrace(interrupt)
            try:
                ledger.append(event, 5)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                sys.settrace(before)
            assert ledger.steps in (1000, 1005) and ledger.entries[0][1] >= 1000
    assert interrupted > 10


def test_who_listens_is_told_of_each_append_once_it_is_counted() -> None:
    ledger, told = Ledger(), []
    ledger.on_append = lambda: told.append(ledger.steps)
    for _ in range(2):
        ledger.append(PoissonGaussian(1.0, 0.1))
    ledger.append(PoissonGaussian(2.0, 0.1), 3)
    assert told == [1, 2, 5]
