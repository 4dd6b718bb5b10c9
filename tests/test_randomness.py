"""Both random sources: the values they give, that no bits are ever used twice, and that a key stays secret.

The statistics here are of what the sources do with the bits; those of the Gaussians are in
``tests/ops/test_rounded_gaussian.py``. Each check rejects a right source with probability FALSE_ALARM, and there are 71
for each source: 64 bits, two for uniforms, three for Gaussians, and two that no word repeats. The secure source draws a
new key each time, so this file fails by chance with probability 7.1e-8; the seeded one passes always or never.
"""

from __future__ import annotations

import copy
import hashlib
import io
import itertools
import math
import multiprocessing
import os
import pickle
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from lora_dp import PrivacyEngine, randomness
from lora_dp.ops.native import native
from lora_dp.ops.rounded_gaussian import rounded_gaussian_
from lora_dp.randomness import Draw, RandomSource, SecureSource, SeededSource
from tests.models import private_run, seeded, train

N = 1_000_000
FALSE_ALARM = 1e-9
Z = float(stats.norm.isf(FALSE_ALARM / 2))
CPU = torch.device("cpu")
WIDE = 2.0**32 * 1.7

forks = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(params=["secure", "seeded"])
def source(request: pytest.FixtureRequest) -> RandomSource:
    return SecureSource() if request.param == "secure" else SeededSource(20261122)


def gaussians(source: RandomSource, n: int, scale: float = WIDE) -> torch.Tensor:
    return source.rounded_gaussians([(n,)], scale, CPU)[0]


def test_only_the_secure_source_says_so() -> None:
    assert SecureSource().secure is True
    assert SeededSource(0).secure is False


# Values


def test_uniforms_fill_the_unit_interval(source: RandomSource) -> None:
    u = source.uniform(N)
    assert u.dtype == torch.float64 and u.shape == (N,) and u.device.type == "cpu"
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > FALSE_ALARM
    mantissas = u * 2.0**53
    assert torch.equal(mantissas, mantissas.round())
    odd = int((mantissas.long() % 2).sum())
    assert abs(odd - N / 2) < Z * math.sqrt(N / 4), "the last of the 53 bits is not fair"


def test_every_bit_is_fair(source: RandomSource) -> None:
    bits = source.uniform_bits(N // 4)
    assert bits.dtype == torch.int64 and bits.device.type == "cpu"
    for place in range(64):
        ones = int((bits >> place & 1).sum())
        assert abs(ones - N / 8) < Z * math.sqrt(N / 16)


def test_gaussians_have_their_deviation(source: RandomSource) -> None:
    """A deviation that is wrong by one percent, or noise from another scale's call, would be seen."""
    z = gaussians(source, N).double() / WIDE
    assert abs(z.mean().item()) < Z / math.sqrt(N)
    assert abs(z.square().mean().item() - 1) < Z * math.sqrt(2 / N)
    assert stats.kstest(z.numpy(), "norm").pvalue > FALSE_ALARM


def test_gaussians_are_those_of_the_op(source: RandomSource) -> None:
    """One draw for all shapes, and each shape a parameter of it."""
    shapes = [(3, 5), (), (0,), (7,), (2, 1, 4)]
    drawn = source.rounded_gaussians(shapes, WIDE, CPU)
    after = source.next_draw()
    assert after.number == 1
    for p, (shape, values) in enumerate(zip(shapes, drawn, strict=True)):
        assert values.shape == shape and values.dtype == torch.int64 and values.device.type == "cpu"
        expected = rounded_gaussian_(torch.empty(shape, dtype=torch.int64), after.key, p, 0, WIDE)
        assert torch.equal(values, expected)
    assert source.rounded_gaussians([], WIDE, CPU) == []
    assert not torch.equal(source.rounded_gaussians(shapes, WIDE, CPU)[0], drawn[0])


def test_bits_are_the_sampling_bits_of_the_draw(source: RandomSource) -> None:
    for n in (0, 1, 9, 100):
        drawn, after = source.uniform_bits(n), source.next_draw()
        expected = torch.zeros(n, dtype=torch.int64)
        native.sampling_bits(after.key, after.number - 1, expected.data_ptr(), 8 * n)
        assert torch.equal(drawn, expected)


class Constant(RandomSource):
    """Yields the same 64-bit word for ever."""

    secure = False

    def __init__(self, word: int) -> None:
        self.word = word

    def next_draw(self) -> Draw:
        raise NotImplementedError

    def uniform_bits(self, n: int) -> torch.Tensor:
        return torch.full((n,), self.word)


def test_extreme_bits_give_uniforms_below_one() -> None:
    assert Constant(0).uniform(1).item() == 0.0
    assert Constant(-1).uniform(1).item() == 1 - 2.0**-53
    assert Constant(2**53 - 1).uniform(1).item() == 1 - 2.0**-53
    assert Constant(-(2**63)).uniform(1).item() == 0.0


@pytest.mark.parametrize("n", [0, 1, 2, 3, 17])
def test_any_count_can_be_drawn(source: RandomSource, n: int) -> None:
    for draw in (source.uniform_bits, source.uniform, lambda n: gaussians(source, n)):
        assert draw(n).shape == (n,)


def test_negative_counts_are_refused(source: RandomSource) -> None:
    for draw in (source.uniform_bits, source.uniform):
        with pytest.raises(ValueError, match=r"^n must not be negative, got -1$"):
            draw(-1)


@pytest.mark.parametrize("scale", [0.0, 0.999, 2.0**33, math.inf, math.nan])
def test_scales_out_of_range_are_refused(source: RandomSource, scale: float) -> None:
    with pytest.raises(ValueError, match=r"^scale must lie in \[1, 2\*\*33\), got "):
        source.rounded_gaussians([(3,)], scale, CPU)


def test_default_device_of_torch_does_not_matter(source: RandomSource) -> None:
    with torch.device("meta"):
        for values in (source.uniform_bits(3), source.uniform(3), gaussians(source, 3)):
            assert values.device.type == "cpu" and torch.isfinite(values).all()


def test_both_sources_share_one_way_from_bits_to_values() -> None:
    for name in ("uniform_bits", "uniform", "rounded_gaussians"):
        assert getattr(SecureSource, name) is getattr(SeededSource, name) is getattr(RandomSource, name)


def test_sources_leave_the_global_generator_alone(source: RandomSource) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    source.uniform(100), gaussians(source, 100)
    assert torch.equal(torch.rand(4), expected)


def test_a_million_values_take_little_time(source: RandomSource) -> None:
    def measure(draw: Callable[[int], torch.Tensor]) -> float:
        started = time.perf_counter()
        draw(N)
        return time.perf_counter() - started

    # 5 ms to 50 ms on one core of 2024; the bound is what a loop in Python could never reach.
    for draw in (source.uniform, lambda n: gaussians(source, n)):
        assert min(measure(draw) for _ in range(5)) < 0.3


# Nothing is used twice


def test_no_word_comes_twice(source: RandomSource) -> None:
    words = torch.cat([source.uniform_bits(n) for n in (1, 1, 1, 8, 9, 100_000, 100_000, 1)])
    # A 64-bit word repeats among 2e5 of them with probability 1e-9.
    assert words.unique().numel() == words.numel()


def test_two_secure_sources_share_nothing() -> None:
    words = torch.cat([SecureSource().uniform_bits(10_000) for _ in range(4)])
    assert words.unique().numel() == words.numel()
    assert len({SecureSource().next_draw().key for _ in range(10)}) == 10


def test_threads_never_share_a_draw(source: RandomSource) -> None:
    drawn: list[Draw] = []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(target=lambda: drawn.extend([source.next_draw() for _ in range(5000)])) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert sorted(draw.number for draw in drawn) == list(range(20_000))


class Ledger:
    """Notes which blocks of which key's streams each call of the native library takes.

    A key made of bytes is told by them, whatever its number; a new key is like no other.

    Args:
        answering: whether calls are handed on, or draw nothing.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, answering: bool) -> None:
        self.keys: dict[int, object] = {}
        self.taken: set[tuple[object, int, int, int]] = set()
        self.calls = 0
        numbers = itertools.count(1)
        takes: dict[str, Callable[..., None]] = {
            "sampling_bits": self.sampling_bits, "rounded_gaussians": self.rounded_gaussians,
            "private_update": self.private_update}
        for name, take in takes.items():
            answer = getattr(native, name) if answering else None
            monkeypatch.setattr(native, name, take if answer is None else self._both(take, answer))
        for name in ("new_key", "key_from"):
            make = getattr(native, name) if answering else lambda *secret: next(numbers)
            monkeypatch.setattr(native, name, lambda *secret, make=make: self._add(make(*secret), *secret))
        if not answering:
            monkeypatch.setattr(native, "drop_key", lambda key: None)

    @staticmethod
    def _both(take: Callable[..., None], answer: Callable[..., None]) -> Callable[..., None]:
        return lambda *arguments: (take(*arguments), answer(*arguments))[1]

    def _add(self, number: int, *secret: bytes) -> int:
        self.keys[number] = secret[0] if secret else object()
        return number

    def sampling_bits(self, key: int, draw: int, out: int, n_bytes: int) -> None:
        self._take(key, 0, 0, draw, n_bytes)

    def rounded_gaussians(self, key: int, parameter: int, draw: int, scale: float, out: int, n: int) -> None:
        self._take(key, 1, parameter, draw, n)

    def private_update(self, key: int, draw: int, rows: int, hyper: int, count: int, *rest: Any) -> None:
        for parameter in range(count):
            self._take(key, 1, parameter, draw, 1)

    def _take(self, key: int, purpose: int, parameter: int, draw: int, n: int) -> None:
        """Every call begins at block 0: two with the same nonce share blocks, unless one of them takes none."""
        self.calls += 1
        if n == 0:
            return
        stream = (self.keys[key], purpose, parameter, draw)
        assert stream not in self.taken, f"purpose, parameter and draw {stream[1:]} are taken a second time"
        self.taken.add(stream)


def resumed(source: RandomSource, generator: random.Random) -> RandomSource:
    """The source as a run goes on with it: after a restart, or, where it is secure, after a fork."""
    if isinstance(source, SecureSource):
        if generator.random() < 0.5:
            return SecureSource()
        randomness._count_fork()  # the child's memory: the same object
        return source
    assert isinstance(source, SeededSource)
    kind = generator.randrange(4)
    if kind == 0:
        return copy.copy(source)
    if kind == 1:
        return pickle.loads(pickle.dumps(source))
    saved = io.BytesIO()
    torch.save(source.state_dict(), saved)
    saved.seek(0)
    # Into a new process, or into one whose source has drawn before: it must not go back to its own place.
    fresh = SeededSource(source.seed)
    if kind == 3:
        fresh._next = generator.randrange(source._next + 1)
    fresh.load_state_dict(torch.load(saved, weights_only=True))
    return fresh


def simulate(make: Callable[[], RandomSource], steps: int, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """A run: in each step up to two sampling draws, and noise for four parameters, one of them empty."""
    generator, ledger = random.Random(0), Ledger(monkeypatch, answering=False)
    # The ops without torch's dispatcher, which takes most of the time.
    monkeypatch.setattr(randomness, "rounded_gaussian_", lambda out, key, parameter, draw, scale:
                        native.rounded_gaussians(key, parameter, draw, scale, out.data_ptr(), out.numel()))
    monkeypatch.setattr(randomness, "sampling_bits_", lambda out, key, draw:
                        native.sampling_bits(key, draw, out.data_ptr(), 8 * out.numel()))
    monkeypatch.setattr(randomness, "_forks", randomness._forks)  # put back afterwards
    source, counters = make(), set()
    for _ in range(steps):
        chance = generator.random()
        if chance < 1 / 250:
            source = resumed(source, generator)
        for n in range(generator.randrange(3)):
            source.uniform_bits(1 - n)
        if chance < 0.3:
            source.rounded_gaussians([(2,), (), (0,), (1, 3)], 3.0, CPU)
        elif chance < 0.8 or isinstance(source, SecureSource):
            draw = source.next_draw()
            native.private_update(draw.key, draw.number, 0, 0, 4)
        else:
            counter = source.next_counter()
            assert counter not in counters, "a counter is used a second time"
            counters.add(counter)
    return ledger


@pytest.mark.parametrize("kind", ["secure", "seeded"])
def test_a_long_run_with_resumes_takes_no_block_twice(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = randomness._forks
    ledger = simulate(SecureSource if kind == "secure" else lambda: SeededSource(5), 100_000, monkeypatch)
    assert ledger.calls > len(ledger.taken) > 300_000
    # About 400 resumes: a secure source has another key after each, a seeded one makes the same again.
    assert len(ledger.keys) > 200
    assert (len(set(ledger.keys.values())) == 1) == (kind == "seeded")
    assert (randomness._forks > before) == (kind == "secure")


def forget_the_place(self: SeededSource, state: dict[str, torch.Tensor]) -> None:
    self._next = 0


def lag_behind(self: SeededSource, state: dict[str, torch.Tensor]) -> None:
    self._next = int(state["draws"]) - 1


def stand_still(self: SeededSource) -> Draw:
    self._key = (os.getpid(), native.key_from(b"seed"))
    self._next += random.Random(self._next).random() < 0.9999
    return Draw(self._key[1], self._next)


@pytest.mark.parametrize(("make", "owner", "name", "bug"), [
    (lambda: SeededSource(5), SeededSource, "load_state_dict", forget_the_place),
    (lambda: SeededSource(5), SeededSource, "load_state_dict", lag_behind),
    (lambda: SeededSource(5), SeededSource, "__reduce__", lambda self: (SeededSource, (self.seed,))),
    (lambda: SeededSource(5), SeededSource, "next_draw", stand_still),
    (SecureSource, SecureSource, "_new_stream", lambda self: randomness._Stream(
        (os.getpid(), randomness._forks), native.key_from(b"the same"), itertools.count())),
    (SecureSource, RandomSource, "rounded_gaussians", lambda self, shapes, scale, device: [
        randomness.rounded_gaussian_(torch.empty(1), self._stream.key, 0, 0, scale) for _ in shapes]),
], ids=["place forgotten", "one draw back", "copies begin again", "draw repeated", "one key for all", "one parameter"])
def test_planted_reuse_is_caught(
    make: Callable[[], RandomSource], owner: type, name: str, bug: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, bug)
    with pytest.raises(AssertionError, match="a second time"):
        simulate(make, 20_000, monkeypatch)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("kind", ["secure", "seeded"])
def test_training_takes_no_block_twice(kind: str, optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own calls, with the native update and without it, and over resumes."""
    ledger, saved, steps = Ledger(monkeypatch, answering=True), None, 0
    for taken in (3, 5, 4):
        engine = seeded() if kind == "seeded" else PrivacyEngine("rdp")
        model, private, loader = private_run(engine, size=12, batch_size=3, phases="BA", optimizer=optimizer)
        if saved is not None:
            engine.load_state_dict(saved)
        train(model, private, loader.take(taken))
        saved = copy.deepcopy(engine.state_dict())
        steps += taken
    sampled = sum(purpose == 0 for _, purpose, _, _ in ledger.taken)
    noisy = {(key, draw) for key, purpose, _, draw in ledger.taken if purpose == 1}
    assert sampled == steps == len(noisy)
    assert len({key for key, *_ in ledger.taken}) == (1 if kind == "seeded" else 3)


# Forks


def in_child(action: Callable[[], Any]) -> Any:
    """What ``action`` returns, or the exception that it raises, in a forked process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            result = action()
        except BaseException as error:
            result = error
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(result, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        content = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return pickle.loads(content)


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
def test_a_child_cannot_use_its_parents_keys() -> None:
    keys = [native.new_key(), native.key_from(bytes(range(32))), SecureSource().next_draw().key]

    def attempt(key: int) -> tuple[list[str], bool]:
        buffer, messages = np.full(16, 77, np.int64), []
        for call in (lambda: native.sampling_bits(key, 0, buffer.ctypes.data, 64),
                     lambda: native.rounded_gaussians(key, 0, 0, 3.0, buffer.ctypes.data, 8)):
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


def draw_from(key: int) -> list[int]:
    out = np.zeros(8, np.int64)
    native.sampling_bits(key, 0, out.ctypes.data, 64)
    return out.tolist()


def gaussians_of(key: int) -> list[int]:
    out = np.zeros(8, np.int64)
    native.rounded_gaussians(key, 0, 0, 3.0, out.ctypes.data, 8)
    return out.tolist()


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


def key_pages() -> list[tuple[int, int, str, list[str]]]:
    """Anonymous mappings left out of core dumps ("dd") and empty in a child ("wf"): the keys' are among them."""
    return [place for place in mappings("dd", "wf") if not place[2]]


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
def test_keys_that_come_and_go_take_no_more_memory() -> None:
    native.drop_key(native.new_key())
    before = sum(end - start for start, end, *_ in key_pages())
    for _ in range(1000):
        native.drop_key(native.new_key())
    assert sum(end - start for start, end, *_ in key_pages()) == before
    keys = [native.new_key() for _ in range(1000)]
    values = [tuple(draw_from(key)) for key in keys]
    assert len(set(values)) == 1000
    for key in keys:
        native.drop_key(key)


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


@pytest.mark.parametrize("planted", [
    b"secret", bytearray(2), memoryview(b"secret"), torch.zeros(2), 2**200, "0" * 32, [np.zeros(2)], {"key": b"x"}])
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


# Seeds


def test_a_seed_repeats_its_values() -> None:
    one, two, other = SeededSource(7), SeededSource(7), SeededSource(8)
    for n in (1, 5, 1000):
        assert torch.equal(gaussians(one, n), gaussians(two, n))
        assert torch.equal(one.uniform(n), two.uniform(n))
    assert not torch.equal(gaussians(one, 1000), gaussians(other, 1000))
    assert not torch.equal(gaussians(one, 1000), gaussians(one, 1000))


def test_a_seed_means_the_same_everywhere() -> None:
    """Saved runs go on with another version, and on another machine."""
    secret = hashlib.sha256(b"lora-dp seed 7").digest()
    expected = np.zeros(3, np.int64)
    native.keystream(secret, bytes(4) + (1).to_bytes(8, "little"), 0, expected.ctypes.data, 24)
    source = SeededSource(7)
    source.uniform_bits(1)
    assert source.uniform_bits(3).tolist() == expected.tolist()


def test_seeds_that_differ_share_nothing() -> None:
    seeds = [0, 1, -1, 2**31, 2**32, 2**32 + 1, 2**63, 2**64, 2**64 + 1, -(2**64), 10**40]
    words = torch.cat([SeededSource(seed).uniform_bits(100) for seed in seeds])
    assert words.unique().numel() == 100 * len(seeds)
    assert repr(SeededSource(-3)) == "SeededSource(-3)" and SeededSource(True).seed == 1


def test_counters_are_draws_too() -> None:
    source = SeededSource(2**63 + 5)
    first = source.next_counter()
    assert first == (-(2**63) + 5, 0)
    assert source.next_draw().number == 1
    assert source.next_counter() == (-(2**63) + 5, 2)
    torch.tensor(first)  # a signed 64-bit number


@pytest.mark.parametrize(
    "copier", [copy.copy, copy.deepcopy, lambda source: pickle.loads(pickle.dumps(source)),
               lambda source: copy.deepcopy({"inside": source})["inside"]])
def test_a_seeded_source_can_be_copied_and_goes_on(copier: Callable[[SeededSource], SeededSource]) -> None:
    source = SeededSource(7)
    source.uniform(3), gaussians(source, 3)
    twin = copier(source)
    assert twin is not source and twin.seed == 7
    assert torch.equal(twin.uniform(9), source.uniform(9))
    expected = gaussians(source, 9)
    del source  # and its key, not the twin's
    assert torch.equal(gaussians(twin, 9), expected)


def test_a_seeded_source_resumes_where_it_was_saved() -> None:
    source = SeededSource(7)
    gaussians(source, 11), source.uniform(2)
    saved = io.BytesIO()
    torch.save(source.state_dict(), saved)
    expected = [gaussians(source, 11), source.uniform(3)]
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    assert set(state) == {"draws", "seed"} and int(state["draws"]) == 2
    for taken in (0, 1, 5):
        fresh = SeededSource(7)
        for _ in range(taken):
            fresh.uniform(1)
        fresh.load_state_dict(state)
        assert torch.equal(gaussians(fresh, 11), expected[0])
        assert torch.equal(fresh.uniform(3), expected[1])


def test_a_state_does_not_change_with_its_source() -> None:
    source = SeededSource(7)
    state = source.state_dict()
    source.uniform(1)
    assert int(state["draws"]) == 0 and int(source.state_dict()["draws"]) == 1


@pytest.mark.parametrize("state", [
    {}, {"draws": torch.tensor(-1), "seed": torch.tensor(7)}, {"generator": torch.zeros(5056, dtype=torch.uint8)},
    {"draws": torch.tensor(3), "seed": torch.tensor(7), "key": torch.tensor(1)}, {"draw": torch.tensor(3)},
    {"draws": torch.tensor(1.7), "seed": torch.tensor(7)}, {"draws": torch.tensor(True), "seed": torch.tensor(7)},
    {"draws": None, "seed": torch.tensor(7)}, None,
], ids=["empty", "negative", "generator", "more", "misspelt", "fraction", "bool", "none", "nothing"])
def test_a_bad_state_is_refused(state: Any) -> None:
    source = SeededSource(7)
    source.uniform(1)
    words = "Not the state of a seeded source: it must hold the integers 'draws' and 'seed'."
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        source.load_state_dict(state)
    assert source.next_draw().number == 1


def test_the_state_of_another_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="The saved source had another seed"):
        SeededSource(7).load_state_dict(SeededSource(8).state_dict())


def test_a_key_of_zeros_is_no_key() -> None:
    """What a page holds that a fork has emptied, in a process that has got its grandparent's number."""
    with pytest.raises(ValueError, match="is empty, as in a forked process"):
        draw_from(native.key_from(bytes(32)))
