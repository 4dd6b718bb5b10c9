"""A key stays in its process and out of Python's sight, and is overwritten when its source goes."""

from __future__ import annotations

import copy
import io
import itertools
import mmap
import multiprocessing
import os
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lora_dp.kernels.optimizer_rows import sgd_row
from lora_dp.ops.native import native
from lora_dp.ops.private_update import private_update_
from lora_dp.privacy import randomness
from lora_dp.privacy.randomness import Draw, RandomSource, SecureSource, SeededSource
from tests.sources import WIDE, draw_from, forks, gaussians, gaussians_of, in_child, locks, on_linux

# Forks


def _draw_in_child(source: RandomSource, queue: Any) -> None:
    queue.put(source.uniform_bits(1000).tolist())


@forks
def test_forked_processes_draw_other_values() -> None:
    source = SecureSource()
    source.uniform_bits(10)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    children = [context.Process(target=_draw_in_child, args=(source, queue)) for _ in range(2)]
    for child in children:
        child.start()
    words = [word for _ in children for word in queue.get()]
    for child in children:
        child.join()
    words += source.uniform_bits(1000).tolist()
    words += in_child(lambda: source.uniform_bits(500).tolist() + in_child(lambda: source.uniform_bits(500).tolist()))
    assert len(set(words)) == 4000


@forks
def test_a_forked_seeded_source_goes_on_with_its_seed() -> None:
    """Its key is gone from the child's memory: made again, it must not become the stream of a key of zeros."""
    source, other = SeededSource(7), SeededSource(7)
    source.uniform_bits(3), other.uniform_bits(3)
    drawn = in_child(lambda: (source.uniform_bits(5).tolist(), gaussians(source, 5).tolist()))
    assert drawn == (other.uniform_bits(5).tolist(), gaussians(other, 5).tolist())
    assert (source.uniform_bits(5).tolist(), gaussians(source, 5).tolist()) == drawn


@forks
def test_a_child_with_the_number_of_an_earlier_process_has_keys_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grandchild may get its grandparent's number, and with it none of its keys."""
    secure, seeded, other = SecureSource(), SeededSource(7), SeededSource(7)
    words = secure.uniform_bits(5).tolist()
    assert seeded.uniform_bits(5).tolist() == other.uniform_bits(5).tolist()
    number = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: number)
    drawn, repeated = in_child(lambda: (secure.uniform_bits(5).tolist(), seeded.uniform_bits(5).tolist()))
    assert len({*drawn, *words, *secure.uniform_bits(5).tolist()}) == 15
    assert repeated == other.uniform_bits(5).tolist()


@forks
def test_a_child_cannot_use_its_parents_keys() -> None:
    keys = [native.new_key(), native.key_from(bytes(range(32))), SecureSource().next_draw().key]

    def attempt(key: int) -> tuple[list[str], bool]:
        buffer, messages = np.full(16, 77, np.int64), []
        for call in (
            lambda: native.sampling_bits(key, 0, buffer.ctypes.data, 64),
            lambda: native.rounded_gaussians(key, 0, 0, 3.0, buffer.ctypes.data, 8),
        ):
            try:
                call()
            except ValueError as error:
                messages.append(str(error))
        return messages, bool((buffer == 77).all())

    kept = SecureSource()
    for key in [*keys[:2], kept.next_draw().key]:
        refusal = f"key {key} belongs to the process that made it: make another"
        assert in_child(lambda key=key: attempt(key)) == ([refusal, refusal], True)
        assert attempt(key) == ([], False)
    assert in_child(lambda: attempt(keys[2]))[0] == [f"there is no key {keys[2]}"] * 2  # its source is gone
    for key in keys[:2]:
        native.drop_key(key)


@forks
def test_a_child_that_drops_a_key_leaves_its_parents() -> None:
    key, expected, found = native.key_from(bytes(range(32))), np.zeros(8, np.int64), np.zeros(8, np.int64)
    native.sampling_bits(key, 0, expected.ctypes.data, 64)
    assert isinstance(in_child(lambda: (native.drop_key(key), draw_from(key))), ValueError)
    native.sampling_bits(key, 0, found.ctypes.data, 64)
    assert (found == expected).all()
    native.drop_key(key)


@forks
def test_keys_made_in_a_child_are_the_childs() -> None:
    def make() -> tuple[list[int], list[int]]:
        known, new = native.key_from(bytes(range(32))), native.new_key()
        return draw_from(known), draw_from(new)

    known, new = in_child(make)
    key = native.key_from(bytes(range(32)))
    assert known == draw_from(key)
    native.drop_key(key)
    zeros = np.zeros(8, np.int64)
    native.keystream(bytes(32), bytes(12), 0, zeros.ctypes.data, 64)
    assert new not in (known, zeros.tolist())


@pytest.mark.parametrize("change", ["process id", "fork count"])
def test_another_process_means_a_new_key(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process id may come back, and a fork that Python does not know of changes the id alone."""
    source = SecureSource()
    before = source.next_draw()
    assert source.next_draw() == Draw(before.key, 1)
    if change == "process id":
        process = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: process + 1)
    else:
        monkeypatch.setattr(randomness, "_forks", randomness._forks + 1)
    after = source.next_draw()
    assert after.key != before.key and after.number == 0
    assert source.next_draw() == Draw(after.key, 1)


# Keys


def unknown(key: int) -> bool:
    try:
        draw_from(key)
    except ValueError as error:
        return str(error) == f"there is no key {key}"
    return False


def test_a_dropped_key_is_unknown() -> None:
    key, other = native.new_key(), native.new_key()
    values = draw_from(other)
    native.drop_key(key)
    native.drop_key(key)  # as one that never was
    native.drop_key(-5)
    assert unknown(key) and draw_from(other) == values
    native.drop_key(other)
    # Their places are used again, their numbers are not.
    third = native.new_key()
    assert third > other > key
    native.drop_key(third)


def test_numbers_that_never_were_keys_are_refused() -> None:
    for number in (0, -1, 2**40, 2**63 - 1, -(2**63)):
        assert unknown(number)


@pytest.mark.parametrize("make", [SecureSource, lambda: SeededSource(4)], ids=["secure", "seeded"])
def test_a_source_that_is_gone_drops_its_key(make: Callable[[], RandomSource]) -> None:
    source = make()
    key = source.next_draw().key
    assert not unknown(key)
    del source
    assert unknown(key)


def test_a_source_drops_the_keys_of_all_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    source = SecureSource()
    keys = [source.next_draw().key]
    for count in (1, 2):
        monkeypatch.setattr(randomness, "_forks", randomness._forks + count)
        keys.append(source.next_draw().key)
    assert len(set(keys)) == 3
    del source
    assert all(unknown(key) for key in keys)


def mappings(*flags: str) -> Iterator[tuple[int, int, str, list[str]]]:
    """Start, end, name and flags of this process's mappings that have all of these flags (proc(5), smaps)."""
    place = None
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ *(.*)", line):
                place = int(found[1], 16), int(found[2], 16), found[3].strip()
            elif place and line.startswith("VmFlags:") and set(flags) <= set(line.split()[1:]):
                yield *place, line.split()[1:]


def count_in_memory(wanted: bytes, where: list[tuple[int, int, str, list[str]]]) -> int:
    found = 0
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        for start, end, *_ in where:
            memory.seek(start)
            found += memory.read(end - start).count(wanted)
    return found


def stacks_of_threads() -> list[tuple[int, int, str, list[str]]]:
    """Of threads that are running, and of those that are gone: each lies behind a page that nobody may read."""
    found, before = [], (0, 0, "", ["rd"])
    for place in mappings():
        guarded = before[1] == place[0] and before[1] - before[0] == mmap.PAGESIZE and "rd" not in before[3]
        if guarded and not place[2] and {"rd", "wr"} <= set(place[3]):
            found.append(place)
        before = place
    return found


def key_pages() -> list[tuple[int, int, str, list[str]]]:
    """Anonymous mappings left out of core dumps ("dd") and empty in a child ("wf"): the keys' are among them."""
    return [place for place in mappings("dd", "wf") if not place[2]]


@locks
@on_linux
@forks
def test_a_key_lies_where_it_should_and_is_wiped() -> None:
    secret = os.urandom(32)
    key = native.key_from(secret)
    pages = [place for place in key_pages() if count_in_memory(secret, [place])]
    assert len(pages) == 1 and count_in_memory(secret, pages) == 1
    assert ("lo" in pages[0][3]) == native.keys_are_locked()
    assert in_child(lambda: count_in_memory(secret, pages)) == 0
    draw_from(key)
    assert count_in_memory(secret, pages) == 1
    native.drop_key(key)
    assert count_in_memory(secret, pages) == 0


@locks
@on_linux
@forks
def test_a_childs_keys_are_locked_where_it_says_so() -> None:
    def make() -> tuple[bool, bool]:
        secret = os.urandom(32)
        native.key_from(secret)
        (page,) = [place for place in key_pages() if count_in_memory(secret, [place])]
        return native.keys_are_locked(), "lo" in page[3]

    if not native.keys_are_locked():  # makes a page, before the fork
        pytest.skip("this machine locks no memory")
    said, locked = in_child(make)
    assert said == locked


@on_linux
def test_a_call_leaves_no_key_on_the_stack() -> None:
    secret = os.urandom(32)
    key = native.key_from(secret)
    stack = [place for place in mappings() if place[2] == "[stack]"]
    assert len(stack) == 1
    draw_from(key)
    gaussians_of(key)
    assert count_in_memory(secret[:16], stack) == 0


@on_linux
def test_threads_leave_no_key_on_their_stacks() -> None:
    """The words of a stream are on them while they draw; what a thread leaves there outlives it."""
    secret, threads = os.urandom(32), torch.get_num_threads()
    key, theta = native.key_from(secret), torch.zeros(10**5)
    try:
        torch.set_num_threads(4)
        for draw in range(4):
            private_update_(
                [theta],
                [torch.zeros_like(theta)],
                [],
                [],
                [],
                [sgd_row(1.0)],
                optimizer="sgd",
                key=key,
                draw=draw,
                scale=WIDE,
                step=2.0**-31,
                expected_batch_size=1.0,
                filtered=[False],
                filter_strength=0.0,
            )
    finally:
        torch.set_num_threads(threads)
    stacks = stacks_of_threads()
    assert len(stacks) >= 3 and count_in_memory(secret[:16], stacks) == 0
    native.drop_key(key)


def grown_by_keys() -> int:
    """By how many bytes the pages of keys grow where a thousand come and go."""
    native.drop_key(native.new_key())
    before = sum(end - start for start, end, *_ in key_pages())
    for _ in range(1000):
        native.drop_key(native.new_key())
    return sum(end - start for start, end, *_ in key_pages()) - before


@pytest.mark.slow
@on_linux
@forks
def test_keys_that_come_and_go_take_no_more_memory() -> None:
    assert grown_by_keys() == 0 and in_child(grown_by_keys) == 0
    keys = [native.new_key() for _ in range(1000)]
    values = [tuple(draw_from(key)) for key in keys]
    assert len(set(values)) == 1000
    for key in keys:
        native.drop_key(key)


@locks
@on_linux
@forks
def test_keys_that_cannot_be_locked_are_not_said_to_be() -> None:
    import resource

    def without_leave_to_lock() -> bool:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
        if os.getuid() == 0:
            os.setuid(65534)  # whom the limit binds
        native.key_from(os.urandom(32))
        return native.keys_are_locked()

    assert in_child(without_leave_to_lock) is False


def test_a_key_of_zeros_is_refused() -> None:
    """A forked process finds its parent's keys so, and one of the same number would not know that they are not its."""
    key = native.key_from(bytes(32))
    for draw in (draw_from, gaussians_of):
        with pytest.raises(ValueError, match=f"^key {key} is empty, as in a forked process: make another$"):
            draw(key)
    native.drop_key(key)
    last = native.key_from(bytes(31) + b"\x01")  # one bit is enough
    assert len(set(draw_from(last))) == 8
    native.drop_key(last)


def test_whether_keys_are_locked_is_known() -> None:
    assert isinstance(native.keys_are_locked(), bool)


def held_by(thing: Any) -> Iterator[Any]:
    """An object, and what Python can reach from it by attributes and items."""
    yield thing
    inside = list(thing) if isinstance(thing, tuple | list | set | dict) else []
    inside += list(thing.values()) if isinstance(thing, dict) else []
    for value in [*inside, *getattr(thing, "__dict__", {}).values()]:
        yield from held_by(value)


def check_hides_its_key(source: SecureSource) -> None:
    for text in (repr(source), str(source), f"{source!r}"):
        assert text == "SecureSource(key hidden)"
    held = list(held_by(source))
    assert len(held) > 4
    for value in held:
        # 32 bytes fit in none of these: numbers of keys and processes are small.
        assert isinstance(value, SecureSource | str | tuple | dict | int | itertools.count), f"holds {value!r}"
        assert not isinstance(value, int) or abs(value) < 2**32, f"holds {value}"
        assert not isinstance(value, str) or len(value) < 16, f"holds {value}"


def test_a_secure_source_hides_its_key() -> None:
    source = SecureSource()
    source.uniform_bits(1)
    check_hides_its_key(source)
    # Nor does the native library give any bytes away.
    functions = [getattr(native, name) for name in dir(native) if callable(getattr(native, name))]
    assert len(functions) > 8 and not any("-> bytes" in (function.__doc__ or "") for function in functions)


@pytest.mark.parametrize(
    "planted",
    [b"secret", bytearray(2), memoryview(b"secret"), torch.zeros(2), 2**200, "0" * 32, [np.zeros(2)], {"key": b"x"}],
)
def test_a_source_that_holds_a_key_is_caught(planted: Any) -> None:
    aside, within = SecureSource(), SecureSource()
    aside._kept = planted  # type: ignore[attr-defined]
    within._stream = within._stream._replace(process=(planted, 0))
    for source in (aside, within):
        with pytest.raises(AssertionError, match="holds "):
            check_hides_its_key(source)


@pytest.mark.parametrize(
    "copier", [copy.copy, copy.deepcopy, pickle.dumps, lambda source: torch.save(source, io.BytesIO())]
)
def test_a_secure_source_is_neither_copied_nor_saved(copier: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        copier(SecureSource())
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        copier({"inside": [SecureSource()]}) if copier is not copy.copy else copier(SecureSource())
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            pickle.dumps(SecureSource(), protocol)
    assert not hasattr(SecureSource(), "state_dict")
