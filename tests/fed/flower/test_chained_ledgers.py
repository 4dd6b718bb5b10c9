"""No damage makes a ledger say less: the run's log, a node's own ledger, and the engine's saved one."""

import contextlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_dp.fed.flower.ledger import ClientLedger, Refused
from lora_dp.fed.methods import get_method
from lora_dp.fed.rounds.ledgers import LOG, Account, AheadLog, LogError
from lora_dp.hash_chain import ChainedLog, Heads
from lora_dp.privacy.accounting import Ledger, PoissonGaussian
from tests.fed.chained import forge, forget
from tests.fed.small import TRAINING, plan_for

PLAN = plan_for(get_method("dp-lora"), TRAINING)
ROUNDS = [(1, [0, 1, 2]), (2, [0, 2]), (2, [0, 1]), (3, []), (4, [1, 2])]
EVENTS = [PoissonGaussian(1.5, 0.25), PoissonGaussian(1.5, 0.25), PoissonGaussian(3.0, 0.5)]
Count = dict[Any, int]

# The run's log, a node's ledger, the engine's saved ledger: how each is written, and what it says.


def write_log(path: Path) -> None:
    log = AheadLog(path)
    log.begin(Account(PLAN, [12, 20, 9]), reproducible=False)
    for entry in ROUNDS:
        log.append(*entry)


def read_log(path: Path) -> Count:
    account = Account(PLAN, [12, 20, 9])
    AheadLog(path).replay(account, rounds_done=0, reproducible=False)
    return {client: account.releases(client) for client in range(3)}


def write_own(path: Path) -> None:
    for event in EVENTS:
        ClientLedger(path).spend(PLAN, event, reproducible=False)


def read_own(path: Path) -> Count:
    before = path.read_bytes() if path.exists() else None
    try:
        ClientLedger(path).spend(PLAN, EVENTS[-1], reproducible=False)
    except Exception:
        assert (path.read_bytes() if path.exists() else None) == before
        raise
    counted = counts(Ledger.load(path))
    counted[EVENTS[-1]] -= PLAN.releases_per_turn
    return counted


# The same file, by what it says of one run.
RUN = "a" * 64
LONG = replace(PLAN, participations=100)


def write_runs(path: Path) -> None:
    for run, event in zip((RUN, "b" * 64, RUN), EVENTS, strict=True):
        ClientLedger(path, run=run).spend(LONG, event, reproducible=False)


def read_runs(path: Path) -> Count:
    before = path.read_bytes() if path.exists() else None
    try:
        ClientLedger(path, run=RUN).spend(LONG, EVENTS[-1], reproducible=False)
    except Exception:
        assert (path.read_bytes() if path.exists() else None) == before
        raise
    counted: Count = json.loads(path.read_text())["node"]["runs"]
    return {**counted, RUN: counted[RUN] - LONG.releases_per_turn}


def write_saved(path: Path) -> None:
    ledger = Ledger()
    for count, event in enumerate(EVENTS, 7):
        ledger.append(event, count)
    ledger.save(path)


def read_saved(path: Path) -> Count:
    return counts(Ledger.load(path))


def counts(ledger: Ledger) -> Count:
    counted: Count = {}
    for event, count in ledger.entries:
        counted[event] = counted.get(event, 0) + count
    return counted


FILES: dict[str, tuple[Callable[[Path], None], Callable[[Path], Count], tuple[str, ...]]] = {
    "log": (write_log, read_log, (LOG, f"{LOG}.heads")),
    "own": (write_own, read_own, ("own.json", "own.json.heads")),
    "runs": (write_runs, read_runs, ("own.json", "own.json.heads")),
    "saved": (write_saved, read_saved, ("saved.json",)),
}


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """One byte flipped, lost or added; lines swapped, lost, repeated; the end or the front cut off."""
    kind = draw(st.sampled_from(["flip", "lose", "add", "swap", "drop", "repeat", "end", "front"]))
    place, other = draw(st.floats(0, 1, exclude_max=True)), draw(st.floats(0, 1, exclude_max=True))
    byte = draw(st.integers(1, 255))

    def damage(content: bytes) -> bytes:
        at = int(place * len(content))
        if kind in ("flip", "lose", "add"):
            middle = {"flip": bytes([content[at] ^ byte]), "lose": b"", "add": bytes([byte, content[at]])}[kind]
            return content[:at] + middle + content[at + 1 :]
        if kind in ("end", "front"):
            return content[:at] if kind == "end" else content[at:]
        lines = content.splitlines(keepends=True)
        first, second = int(place * len(lines)), int(other * len(lines))
        if kind == "swap":
            lines[first], lines[second] = lines[second], lines[first]
        else:
            lines[first : first + 1] = [] if kind == "drop" else [lines[first]] * 2
        return b"".join(lines)

    return damage


@pytest.fixture(params=FILES)
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    write, read, names = FILES[request.param]
    path = tmp_path / names[0]
    write(path)
    contents = {name: (tmp_path / name).read_bytes() for name in names}

    def fresh() -> Path:
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
        return path

    return fresh, read, names


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=damages(), second=st.booleans())
def test_no_damage_makes_a_ledger_say_less(ledger, damage, second):
    fresh, read, names = ledger
    path = fresh()
    true = read(path)
    path = fresh()
    file = path.with_name(names[-1] if second else names[0])
    before = file.read_bytes()
    file.write_bytes(damage(before))
    try:
        found = read(path)
    except (ValueError, Refused) as error:
        assert file.read_bytes() != before and str(error)
    else:
        assert all(found.get(name, 0) >= count for name, count in true.items())


def test_whole_ones_are_read(ledger):
    """The control: what is refused above is not refused without damage, again and again."""
    fresh, read, _ = ledger
    assert read(fresh()) == read(fresh()) and sum(read(fresh()).values()) > 0


@pytest.mark.parametrize(
    "old, new",
    [
        (r'"count": \d+', '"count": 1'),
        (r'"noise_multiplier": 1.5', '"noise_multiplier": 9.5'),
        (r'"sample_rate": 0.25', '"sample_rate": 0.05'),
        (r'"version": 2', '"version": 1'),
        (r'"version": 2', '"version": 3'),
    ],
)
@pytest.mark.parametrize("kind", ["own", "saved"])
def test_an_edited_entry_is_noticed(tmp_path, kind, old, new):
    write, read, names = FILES[kind]
    write(tmp_path / names[0])
    text = (tmp_path / names[0]).read_text()
    edited = re.sub(old, new, text, count=1)
    assert edited != text
    (tmp_path / names[0]).write_text(edited)
    with pytest.raises(ValueError, match=r"privacy ledger .* cannot be read .*restore it from a backup"):
        read(tmp_path / names[0])


@pytest.mark.slow
def test_a_client_of_a_round_edited_or_left_out_is_noticed(tmp_path):
    for old, new in ((b"[0,1,2]", b"[0,1,1]"), (b"[0,1,2]", b"[]"), (b'"round":3', b'"round":2')):
        forget(tmp_path / LOG)
        write_log(tmp_path / LOG)
        content = (tmp_path / LOG).read_bytes()
        assert old in content
        (tmp_path / LOG).write_bytes(content.replace(old, new, 1))
        with pytest.raises(LogError, match=r"is damaged.*Restore it from a backup; do not go on with this run\.$"):
            read_log(tmp_path / LOG)


# The end, which a chain alone cannot hold


@pytest.mark.parametrize("lost", [1, 2, 5, 6])
def test_a_log_that_has_lost_its_end_is_noticed(tmp_path, lost):
    write_log(tmp_path / LOG)
    lines = (tmp_path / LOG).read_bytes().splitlines(keepends=True)
    (tmp_path / LOG).write_bytes(b"".join(lines[: len(lines) - lost]))
    with pytest.raises(LogError, match=f"ends before line {len(lines) - lost + 1} of 6"):
        read_log(tmp_path / LOG)


@pytest.mark.parametrize("earlier", [1, 2])
def test_a_nodes_ledger_of_an_earlier_day_is_noticed(tmp_path, earlier):
    path = tmp_path / "own.json"
    days = []
    for event in EVENTS:
        ClientLedger(path).spend(PLAN, event, reproducible=False)
        days.append(path.read_bytes())
    path.write_bytes(days[earlier - 1])
    with pytest.raises(ValueError, match=f"it has {earlier} turns, but own.json.heads beside it holds 3.*a backup"):
        read_own(path)
    path.unlink()
    with pytest.raises(ValueError, match="it is gone, but 3 turns were written to it"):
        read_own(path)
    assert not path.exists()
    path.write_bytes(days[-1])
    Heads(path).path.unlink()
    with pytest.raises(ValueError, match="it has 3 turns, but own.json.heads beside it holds 0"):
        read_own(path)


@pytest.mark.parametrize("kind", ["log", "own", "runs"])
@pytest.mark.parametrize("stop", range(1, 9))
def test_a_crash_at_any_write_leaves_a_ledger_that_is_read_and_counts_no_less(tmp_path, monkeypatch, kind, stop):
    """Each call that reaches the disk, of two releases in turn, is the last one once."""
    write, read, names = FILES[kind]
    path = tmp_path / names[0]
    write(path)
    true = read(path)
    calls, done = 0, 0

    def release() -> None:
        if kind == "log":
            AheadLog(path).append(5, [0])
        else:
            ClientLedger(path, run=RUN if kind == "runs" else None).spend(LONG, EVENTS[-1], reproducible=False)

    def crashing(function: Any) -> Any:
        def called(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt
            return function(*args)

        return called

    with monkeypatch.context() as patched:
        patched.setattr("lora_dp.atomic_files.os.fsync", crashing(os.fsync))
        patched.setattr("lora_dp.atomic_files.os.replace", crashing(os.replace))
        with contextlib.suppress(KeyboardInterrupt):
            for _ in range(2):
                release()
                done += 1
    name: Any = {"log": 0, "own": EVENTS[-1], "runs": RUN}[kind]
    each = PLAN.releases_per_round if kind == "log" else PLAN.releases_per_turn
    extra = 0 if kind == "log" else 1  # reading a node's ledger spends once
    release()
    assert done < 2 or calls < stop
    assert read(path)[name] >= true[name] + (done + 1 + extra) * each


def test_an_interrupted_append_is_read_again(tmp_path, monkeypatch):
    log = ChainedLog(tmp_path / "log")
    log.append({"a": 1})
    with monkeypatch.context() as patched, pytest.raises(OSError, match="full"):

        def full(*_: Any) -> None:
            raise OSError("disk full")

        patched.setattr("lora_dp.atomic_files.os.fsync", full)
        log.append({"a": 2})
    log.append({"a": 3})
    assert log.read() == [{"a": 1}, {"a": 2}, {"a": 3}]


# Files of the version before


def test_a_ledger_without_digests_is_read_and_saved_with_them(tmp_path):
    write_saved(tmp_path / "saved.json")
    write_own(tmp_path / "own.json")
    for name in ("saved.json", "own.json"):
        path = tmp_path / name
        entries = Ledger.load(path).entries
        old = json.loads(path.read_text())
        for entry in old["entries"]:
            del entry["digest"]
        del old["digest"]
        old.pop("node", None)
        path.write_text(json.dumps({**old, "version": 1}))
        if name == "own.json":
            with pytest.raises(ValueError, match="it is of an earlier day, and has no digests"):
                read_own(path)
            Heads(path).path.unlink()
            ClientLedger(path).spend(PLAN, EVENTS[-1], reproducible=False)
        else:
            Ledger.load(path).save(path)
        kept = json.loads(path.read_text())
        assert kept["version"] == 2 and len(kept["digest"]) == 64
        assert name != "own.json" or (kept["node"]["turns"], Heads(path).last()[0]) == (1, 1)
        assert Ledger.load(path).steps >= sum(count for _, count in entries)


def test_a_nodes_ledger_that_knew_of_no_runs_goes_on_and_then_counts_them(tmp_path):
    path = tmp_path / "own.json"
    write_own(path)
    assert "runs" not in json.loads(path.read_text())["node"]
    ClientLedger(path, run=RUN).spend(LONG, EVENTS[-1], reproducible=False)
    ClientLedger(path).spend(LONG, EVENTS[-1], reproducible=False)
    kept = json.loads(path.read_text())
    assert kept["node"]["runs"] == {RUN: LONG.releases_per_turn} and kept["node"]["turns"] == 5
    assert Ledger.load(path).steps == 5 * LONG.releases_per_turn


@pytest.mark.parametrize("runs", [None, {}, {RUN: 0}, {"c" * 64: 1}, [], 3])
def test_runs_that_were_edited_are_noticed(tmp_path, runs):
    path = tmp_path / "own.json"
    write_runs(path)
    kept = json.loads(path.read_text())
    kept["node"]["runs"] = runs
    if runs is None:
        del kept["node"]["runs"]
    path.write_text(json.dumps(kept, indent=1))
    with pytest.raises(ValueError, match="its node's part .*restore it"):
        read_runs(path)


def test_a_nodes_part_that_was_cut_out_is_noticed(tmp_path):
    """The file is then one that the engine would have saved, with digests that are right."""
    path = tmp_path / "own.json"
    for lost in ("node", "unit"):
        forget(path)
        write_runs(path)
        kept = json.loads(path.read_text())
        del kept[lost]
        path.write_text(json.dumps(kept, indent=1))
        with pytest.raises(ValueError, match="its node's part .*restore it"):
            read_runs(path)


def test_a_log_without_digests_is_refused_with_the_remedy(tmp_path):
    write_log(tmp_path / LOG)
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    forget(tmp_path / LOG)
    old = [{"terms": lines[0]["terms"]}, *({"round": entry["round"], "clients": []} for entry in lines[1:])]
    (tmp_path / LOG).write_text("".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in old))
    with pytest.raises(LogError, match="by an earlier lora-dp, without digests: go on with this run by that one"):
        read_log(tmp_path / LOG)
    forge(tmp_path / LOG, [{"format": "lora-dp log", "version": 4, "terms": lines[0]["terms"]}])
    with pytest.raises(LogError, match="version 4: go on with this run by the lora-dp that began it"):
        read_log(tmp_path / LOG)
