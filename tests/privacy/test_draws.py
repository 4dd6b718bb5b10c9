"""No bits are ever used twice: not by threads, parameters, steps, nor in resumed runs.

A repeated word of a right source fails this file with probability 1e-9 a source.
"""

from __future__ import annotations

import copy
import io
import itertools
import os
import pickle
import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_dp import PrivacyEngine
from lora_dp.ops.native import native
from lora_dp.privacy import randomness
from lora_dp.privacy.randomness import Draw, RandomSource, SecureSource, SeededSource
from tests.models import private_run, seeded, train
from tests.sources import CPU


@pytest.fixture(params=["secure", "seeded"])
def source(request: pytest.FixtureRequest) -> RandomSource:
    return SecureSource() if request.param == "secure" else SeededSource(20261122)


def test_no_word_comes_twice(source: RandomSource) -> None:
    words = torch.cat([source.uniform_bits(n) for n in (1, 1, 1, 8, 9, 100_000, 100_000, 1)])
    # A 64-bit word repeats among 2e5 of them with probability 1e-9.
    assert words.unique().numel() == words.numel()


def test_two_secure_sources_share_nothing() -> None:
    words = torch.cat([SecureSource().uniform_bits(10_000) for _ in range(4)])
    assert words.unique().numel() == words.numel()
    assert len({SecureSource().next_draw().key for _ in range(10)}) == 10


@pytest.mark.slow
def test_threads_never_share_a_draw(source: RandomSource) -> None:
    drawn: list[Draw] = []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(target=lambda: drawn.extend([source.next_draw() for _ in range(5000)])) for _ in range(4)
        ]
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
            "sampling_bits": self.sampling_bits,
            "rounded_gaussians": self.rounded_gaussians,
            "private_update": self.private_update,
        }
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
    monkeypatch.setattr(
        randomness,
        "rounded_gaussian_",
        lambda out, key, parameter, draw, scale: native.rounded_gaussians(
            key, parameter, draw, scale, out.data_ptr(), out.numel()
        ),
    )
    monkeypatch.setattr(
        randomness,
        "sampling_bits_",
        lambda out, key, draw: native.sampling_bits(key, draw, out.data_ptr(), 8 * out.numel()),
    )
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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("make", "owner", "name", "bug"),
    [
        (lambda: SeededSource(5), SeededSource, "load_state_dict", forget_the_place),
        (lambda: SeededSource(5), SeededSource, "load_state_dict", lag_behind),
        (lambda: SeededSource(5), SeededSource, "__reduce__", lambda self: (SeededSource, (self.seed,))),
        (lambda: SeededSource(5), SeededSource, "next_draw", stand_still),
        (
            SecureSource,
            SecureSource,
            "_new_stream",
            lambda self: randomness._Stream(
                (os.getpid(), randomness._forks), native.key_from(b"the same"), itertools.count()
            ),
        ),
        (
            SecureSource,
            RandomSource,
            "rounded_gaussians",
            lambda self, shapes, scale, device: [
                randomness.rounded_gaussian_(torch.empty(1), self._stream.key, 0, 0, scale) for _ in shapes
            ],
        ),
    ],
    ids=["place forgotten", "one draw back", "copies begin again", "draw repeated", "one key for all", "one parameter"],
)
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
