"""Digests over entries, and the heads that say where a chain ends."""

import hashlib

import pytest

from lora_dp.atomic_files import append_durably
from lora_dp.hash_chain import START, BrokenChain, ChainedLog, Heads, link
from tests.fed.chained import hold


def test_a_digest_is_sha256_over_the_one_before_and_the_canonical_entry():
    text = '{"clients":[0,1],"round":1}'
    assert link(START, {"round": 1, "clients": [0, 1]}) == hashlib.sha256(("0" * 64 + text).encode()).hexdigest()
    with pytest.raises(ValueError, match="JSON"):
        link(START, {"noise": float("nan")})


def test_a_head_that_is_not_the_chains_is_noticed(tmp_path):
    log = ChainedLog(tmp_path / "log")
    for number in range(4):
        log.append({"a": number})
    hold(log.path, 2)  # two lines more than are held: no single crash leaves that
    with pytest.raises(BrokenChain, match="log.heads beside it is damaged, or of another day"):
        ChainedLog(log.path).read()
    append_durably(Heads(log.path).path, b"f" * 64 + b"\n")
    with pytest.raises(BrokenChain, match="log.heads beside it is damaged"):
        ChainedLog(log.path).append({"a": 5})


@pytest.mark.parametrize("cut", [1, 2, 40, 64])
def test_a_digest_that_a_crash_cut_off_is_not_held(tmp_path, cut):
    """Whole lines alone count: also where nothing but the end of the line is missing."""
    heads = Heads(tmp_path / "log")
    assert heads.last() == (0, START)
    for number, before in enumerate([(0, START), (1, "a" * 64), (2, "b" * 64)]):
        heads.append("abc"[number] * 64)
        whole = heads.path.read_bytes()
        heads.path.write_bytes(whole[:-cut])
        assert heads.last() == before
        heads.path.write_bytes(whole)
        assert heads.last() == (number + 1, "abc"[number] * 64)


@pytest.mark.parametrize("held", [1, 2])
def test_an_edited_line_is_damaged_whether_it_was_held_or_not(tmp_path, held):
    """A crash before the last line was held leaves no other trace of it than its own digest."""
    log = ChainedLog(tmp_path / "log")
    log.append({"a": 1})
    log.append({"a": 2})
    heads = Heads(log.path).path
    heads.write_bytes(heads.read_bytes()[: held * 65])
    assert ChainedLog(log.path).read() == [{"a": 1}, {"a": 2}]
    log.path.write_bytes(log.path.read_bytes().replace(b'"a":2', b'"a":0'))
    with pytest.raises(BrokenChain, match="line 2 is damaged"):
        ChainedLog(log.path).read()
