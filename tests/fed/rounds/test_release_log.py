"""The log written ahead: what it counts, and how it is damaged."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from lora_dp.fed.rounds.client import Trainer
from lora_dp.fed.rounds.ledgers import LOG, Account, AheadLog, LogError
from tests.fed.chained import forge, forget, hold
from tests.fed.rounds.accounts import SIZES, account, counts, log, replayed
from tests.fed.small import make_federation


def test_the_log_says_which_format_it_has(tmp_path):
    log(tmp_path)
    head = json.loads((tmp_path / LOG).read_text())
    assert (head["format"], head["version"]) == ("lora-dp log", 3)


def test_the_log_counts_every_round_that_was_begun(tmp_path):
    found = log(tmp_path, (1, [0, 1]), (2, [1, 2]), (2, [0]), (3, []))
    assert (tmp_path / LOG).read_text().count("\n") == 5
    assert replayed(found) == [6, 6, 3]


def test_a_round_done_again_with_the_same_bits_counts_once(tmp_path):
    found = log(tmp_path, (1, [0, 1]), (2, [0, 1]), (2, [0, 1]), (3, [2]), reproducible=True)
    assert replayed(found, 3, reproducible=True) == [6, 6, 3]
    # From the checkpoint of round 1, rounds 2 and 3 are going to be done again.
    assert replayed(found, 1, reproducible=True) == [3, 3, 0]
    assert replayed(found, 0, reproducible=True) == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, name",
    [
        ({"rounds": 40, "participations": 40}, "rounds"),
        ({"epsilon": 3.0}, "epsilon"),
        ({"delta": 1e-6}, "delta"),
        ({"sizes": (12, 21, 9)}, "sizes"),
        ({"unit": "client"}, "unit"),
        ({"reproducible": True}, "reproducible"),
        ({"epsilon": None}, "epsilon"),
    ],
)
def test_what_was_released_on_other_terms_is_not_counted_on_these(tmp_path, changes, name):
    """More rounds from an edited config.yaml, say: past releases had less noise than the new plan has."""
    found = log(tmp_path, (1, [0, 1]))
    with pytest.raises(ValueError, match=rf"begun on other terms \(.*{name}.* differ\).*restore its config.yaml"):
        replayed(found, **changes)
    assert replayed(found) == [3, 3, 0]


def test_the_last_bit_of_a_calibration_is_no_other_term(tmp_path):
    found = log(tmp_path, (1, [0]))
    calibrated_again(tmp_path / LOG, 1 + 1e-13)
    assert replayed(found) == [3, 0, 0]
    # What no two machines differ by is another noise.
    calibrated_again(tmp_path / LOG, 1 + 1e-8)
    with pytest.raises(LogError, match=r"other terms \(events differ\)"):
        replayed(found)


def calibrated_again(path: Path, factor: float) -> None:
    """Multiplies the noise of a log's terms."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    for entry in entries:
        del entry["digest"]
    events = entries[0]["terms"]["events"]
    entries[0]["terms"]["events"] = [[noise * factor, rate] for noise, rate in events]
    forget(path)
    forge(path, entries)


def test_no_log_is_no_release(tmp_path):
    assert replayed(AheadLog(tmp_path / LOG)) == [0, 0, 0]


@pytest.mark.parametrize("length", range(0, 26, 5))
def test_a_torn_last_line_was_no_round_and_spoils_none(tmp_path, length):
    found = log(tmp_path, (1, [0, 1]), (2, [1, 2]))
    content = (tmp_path / LOG).read_bytes()
    end = content[:-1].rindex(b"\n") + 1
    (tmp_path / LOG).write_bytes(content[: end + length])
    # A crash cannot have come so early: the line was held.
    with pytest.raises(LogError, match="it ends before line 3 of 3.*do not go on"):
        replayed(found)
    hold(tmp_path / LOG, 2)
    assert replayed(found) == [3, 3, 0]
    found.append(2, [0])
    assert replayed(found) == [6, 3, 0]


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"round":2,"clients":[1,2]\x00',
        b'{"round":2,"clients":[1,',
        b"\x00" * 27,
        b'{"round":2}',
        b"[2, [1, 2]]",
        b"",
        b'{"round":2,"clients":7}',
        b'{"round":"x","clients":[1]}',
        b'{"round":0,"clients":[1]}',
    ],
)
def test_a_damaged_line_inside_is_refused(tmp_path, damaged):
    for reproducible in (False, True):
        forget(tmp_path / LOG)
        log(tmp_path, (1, [0, 1]), (2, [1, 2]), (3, [0]), reproducible=reproducible)
        content = (tmp_path / LOG).read_bytes().split(b"\n")
        (tmp_path / LOG).write_bytes(b"\n".join([*content[:2], damaged, *content[3:]]))
        with pytest.raises(ValueError, match="line 3 is damaged.*[Rr]estore it from a backup; do not go on"):
            replayed(AheadLog(tmp_path / LOG), reproducible=reproducible)


@pytest.mark.parametrize(
    "head", [{}, {"format": "lora-dp log", "version": 3}, {"format": "lora-dp log", "version": 3, "terms": [1]}]
)
def test_a_whole_chain_that_begins_with_no_terms_is_damaged(tmp_path, head):
    forge(tmp_path / LOG, [head, {"round": 1, "clients": [0]}])
    with pytest.raises(LogError, match="line 1 is damaged.*do not go on"):
        replayed(AheadLog(tmp_path / LOG))


@pytest.mark.parametrize(
    "wrong",
    [
        {"round": 3, "clients": [0]},
        {"round": 0, "clients": [0]},
        {"round": "x", "clients": [0]},
        {"clients": [0]},
        {"round": 2, "clients": 7},
        {"round": 2, "clients": ["a"]},
        {"round": 2, "clients": [None]},
    ],
)
def test_a_whole_chain_with_a_line_that_is_no_round_in_its_turn_is_damaged(tmp_path, wrong):
    log(tmp_path)
    head = json.loads((tmp_path / LOG).read_text())
    del head["digest"]
    forge(tmp_path / LOG, [head, {"round": 1, "clients": [0]}, {"round": 2, "clients": [1]}])
    assert replayed(AheadLog(tmp_path / LOG)) == [3, 3, 0]
    forge(tmp_path / LOG, [head, {"round": 1, "clients": [0]}, wrong])
    with pytest.raises(LogError, match="line 3 is damaged.*do not go on"):
        replayed(AheadLog(tmp_path / LOG))
    forge(tmp_path / LOG, [head, {"round": 2, "clients": [0]}])
    with pytest.raises(LogError, match="line 2 is damaged.*do not go on"):
        replayed(AheadLog(tmp_path / LOG))


def test_a_log_without_digests_is_gone_on_with_by_the_version_that_wrote_it(tmp_path):
    (tmp_path / LOG).write_text(json.dumps({"terms": account().terms()}) + "\n")
    with pytest.raises(LogError, match="written by an earlier lora-dp, without digests"):
        replayed(AheadLog(tmp_path / LOG))


def test_missing_lines_are_refused(tmp_path):
    found = log(tmp_path, (1, [0]), (2, [0]), (3, [0]))
    content = (tmp_path / LOG).read_bytes().splitlines(keepends=True)
    (tmp_path / LOG).write_bytes(content[0] + content[1] + content[3])
    with pytest.raises(ValueError, match="line 3 is damaged"):
        replayed(found)
    (tmp_path / LOG).write_bytes(b"".join(content[1:]))
    with pytest.raises(ValueError, match="line 1 is damaged"):
        replayed(found)
    (tmp_path / LOG).write_bytes(b"".join(content[:3]))
    with pytest.raises(ValueError, match="ends before line 4 of 4"):
        replayed(found, 2)
    hold(tmp_path / LOG, 3)
    assert replayed(found, 2) == [6, 0, 0]
    with pytest.raises(ValueError, match="ends before round 3"):
        replayed(found, 3)
    (tmp_path / LOG).unlink()
    with pytest.raises(ValueError, match="ends before line 1 of 3"):
        replayed(found, 1)
    assert not (tmp_path / LOG).exists()
    forget(tmp_path / LOG)
    with pytest.raises(ValueError, match="ends before round 1"):
        replayed(found, 1)


@pytest.mark.parametrize("client", [-1, 3])
def test_the_log_of_another_run_is_refused(tmp_path, client):
    with pytest.raises(ValueError, match="names clients that this run does not have"):
        replayed(log(tmp_path, (1, [0]), (2, [1, client])))


@pytest.mark.slow
def test_the_log_is_on_the_disk_before_anybody_trains(tmp_path, monkeypatch):
    """Line written, file synchronised, its name in the folder too: then the first client begins."""
    federation = make_federation("deer")
    federation.log = AheadLog(tmp_path / LOG)
    federation.log.begin(federation.account, reproducible=True)
    events: list[str] = []
    fsync, train = os.fsync, Trainer.train

    def watched_fsync(number: int) -> None:
        folder = stat.S_ISDIR(os.fstat(number).st_mode)
        held = tmp_path / f"{LOG}.heads"
        if os.path.samestat(os.fstat(number), os.stat(held)):
            events.append(f"{held.read_bytes().count(10)} held")
        else:
            assert os.path.samestat(os.fstat(number), os.stat(tmp_path if folder else tmp_path / LOG))
            events.append("folder" if folder else f"{(tmp_path / LOG).read_bytes().count(10)} lines")
        fsync(number)

    def watched_train(*args: Any, **kwargs: Any) -> Any:
        events.append("train")
        return train(*args, **kwargs)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Trainer, "train", watched_train)
    federation.run_round()
    federation.run_round([1])
    assert events == ["2 lines", "2 held", *["train"] * 6, "3 lines", "3 held", *["train"] * 2]
    rounds = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()[1:]]
    assert [{**entry, "digest": None} for entry in rounds] == [
        {"round": 1, "clients": [0, 1, 2], "digest": None},
        {"round": 2, "clients": [1], "digest": None},
    ]


@pytest.mark.slow
def test_who_was_drawn_in_secret_is_not_in_the_log(tmp_path):
    federation = make_federation(
        "dp-lora", unit="client", noise_by="server", client_rate=0.5, delta=0.01, weighting="equal"
    )
    federation.log = AheadLog(tmp_path / LOG)
    federation.log.begin(federation.account, reproducible=False)
    for _ in range(3):
        assert federation.run_round().participants is None
    terms, *rounds = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [entry["clients"] for entry in rounds] == [[]] * 3
    # Nor how many examples anybody has.
    assert terms["terms"]["sizes"] is None and len(terms["terms"]["events"]) == 1
    fresh = Account(federation.plan, SIZES)
    federation.log.replay(fresh, rounds_done=3, reproducible=False)
    assert fresh.releases(0) == federation.account.releases(0) == 3


def test_a_round_that_ends_in_the_middle_counts(tmp_path):
    """What clients before the interruption have sent has left."""
    federation = make_federation("dp-lora")
    federation.log = log(tmp_path)

    def interrupt() -> None:
        raise KeyboardInterrupt

    state = dict(federation.server.state)
    with pytest.raises(KeyboardInterrupt):
        federation.run_round(on_step=interrupt)
    assert counts(federation.account) == [3, 3, 3]
    assert federation.log.rounds_begun() == 1
    assert replayed(federation.log) == [3, 3, 3]
    assert federation.rounds_done == 0
    assert all(tensor.equal(federation.server.state[name]) for name, tensor in state.items())
