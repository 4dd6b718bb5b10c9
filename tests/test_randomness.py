"""Both random sources: the distribution of their values, and that no value is ever seen twice."""

from __future__ import annotations

import copy
import io
import math
import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Callable

import pytest
import torch
from scipy import stats

from lora_dp import randomness
from lora_dp.randomness import RandomSource, SecureSource, SeededSource

N = 1_000_000
# Each statistical check below rejects a right source with this probability; there are about 20 of them.
FALSE_ALARM = 1e-9
Z = float(stats.norm.isf(FALSE_ALARM / 2))


@pytest.fixture(params=["secure", "seeded"])
def source(request: pytest.FixtureRequest) -> RandomSource:
    return SecureSource() if request.param == "secure" else SeededSource(20261122)


def test_only_the_secure_source_says_so() -> None:
    assert SecureSource().secure is True
    assert SeededSource(0).secure is False


def test_normals_are_standard_normal(source: RandomSource) -> None:
    z = source.normal(N)
    assert z.dtype == torch.float64 and z.shape == (N,) and z.device.type == "cpu"
    assert abs(z.mean().item()) < Z / math.sqrt(N)
    assert abs(z.square().mean().item() - 1) < Z * math.sqrt(2 / N)
    assert abs((z**3).mean().item()) < Z * math.sqrt(15 / N)
    assert abs((z**4).mean().item() - 3) < Z * math.sqrt(96 / N)
    assert stats.kstest(z.numpy(), "norm").pvalue > FALSE_ALARM


def test_tails_have_their_mass(source: RandomSource) -> None:
    z = source.normal(N).abs()
    for bound in (2.0, 3.0, 4.0):
        beyond = int((z > bound).sum())
        assert stats.binomtest(beyond, N, 2 * stats.norm.sf(bound)).pvalue > FALSE_ALARM


def test_normals_are_independent_of_their_neighbours(source: RandomSource) -> None:
    z = source.normal(N)
    half = N // 2
    for left, right in ((z[:-1], z[1:]), (z[:half], z[half:]), (z[:half] ** 2 - 1, z[half:] ** 2 - 1)):
        scale = left.std() * right.std() * math.sqrt(len(left))
        assert abs((left * right).sum().item() / scale.item()) < Z


def test_uniforms_fill_the_unit_interval(source: RandomSource) -> None:
    u = source.uniform(N)
    assert u.dtype == torch.float64 and u.shape == (N,)
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > FALSE_ALARM
    mantissas = u * 2.0**53
    assert torch.equal(mantissas, mantissas.round())
    assert (mantissas.long() % 2 == 1).any(), "the last of the 53 bits is never set"


def test_every_bit_is_fair(source: RandomSource) -> None:
    bits = source.uniform_bits(N // 4)
    assert bits.dtype == torch.int64
    for place in range(64):
        ones = int((bits >> place & 1).sum())
        assert abs(ones - N / 8) < Z * math.sqrt(N / 16)


class Constant(RandomSource):
    """Yields the same 64-bit word for ever."""

    secure = False

    def __init__(self, *words: int) -> None:
        self.words = words

    def uniform_bits(self, n: int) -> torch.Tensor:
        # `normal` takes all u1 first, then all u2.
        return torch.tensor(self.words).repeat_interleave(max(1, n // len(self.words)))[:n].clone()


def test_extreme_bits_give_finite_values() -> None:
    assert Constant(0).uniform(1).item() == 0.0
    assert Constant(-1).uniform(1).item() == 1 - 2.0**-53
    assert Constant(0, 0).normal(2).tolist() == [0.0, 0.0]
    furthest = Constant(-1, 0).normal(2)
    assert furthest[0].item() == pytest.approx(math.sqrt(106 * math.log(2)), rel=1e-15)
    assert furthest[1].item() == 0.0


@pytest.mark.parametrize("n", [0, 1, 2, 3, 17])
def test_any_count_can_be_drawn(source: RandomSource, n: int) -> None:
    for draw in (source.uniform_bits, source.uniform, source.normal):
        assert draw(n).shape == (n,)


def test_negative_counts_are_refused(source: RandomSource) -> None:
    for draw in (source.uniform_bits, source.uniform, source.normal):
        with pytest.raises(ValueError, match="n must not be negative, got -1"):
            draw(-1)


def test_default_device_of_torch_does_not_matter(source: RandomSource) -> None:
    with torch.device("meta"):
        assert source.normal(3).device.type == "cpu"
        assert torch.isfinite(source.normal(3)).all()


def test_no_word_comes_twice(source: RandomSource) -> None:
    draws = [source.uniform_bits(n) for n in (1, 1, 1, 8, 9, 100_000, 100_000, 1)]
    words = torch.cat(draws)
    # A 64-bit word repeats among 2e5 of them with probability 1e-9.
    assert words.unique().numel() == words.numel()


def test_two_secure_sources_share_nothing() -> None:
    words = torch.cat([SecureSource().uniform_bits(10_000) for _ in range(4)])
    assert words.unique().numel() == words.numel()


def test_every_secure_draw_takes_its_own_nonce(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[bytes, bytes]] = []

    def record(key: bytes, nonce: bytes, n: int) -> torch.Tensor:
        used.append((key, nonce))
        return torch.zeros(n, dtype=torch.int64)

    monkeypatch.setattr(randomness, "chacha20_bits", record)
    source = SecureSource()
    threads = [threading.Thread(target=lambda: [source.normal(1) for _ in range(2000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(used) == len(set(used)) == 8000
    assert len({key for key, _ in used}) == 1


@pytest.mark.parametrize(
    "copier", [copy.copy, copy.deepcopy, pickle.dumps, lambda source: torch.save(source, io.BytesIO())]
)
def test_a_secure_source_is_neither_copied_nor_saved(copier: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        copier(SecureSource())
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        copy.deepcopy({"inside": SecureSource()})


def test_a_secure_source_hides_its_key() -> None:
    source = SecureSource()
    key = source._stream.key
    assert len(key) == 32
    for text in (repr(source), str(source), f"{source!r}"):
        assert text == "SecureSource(key hidden)"


def _draw_in_child(source: RandomSource, queue) -> None:
    queue.put(source.uniform_bits(1000).tolist())


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
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
    assert len(set(words)) == 3000


def test_a_process_id_that_changed_means_a_new_key(monkeypatch: pytest.MonkeyPatch) -> None:
    source = SecureSource()
    before = source._stream.key
    source.uniform_bits(1)
    assert source._stream.key == before
    process = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: process + 1)
    source.uniform_bits(1)
    after = source._stream.key
    assert after != before
    source.uniform_bits(1)
    assert source._stream.key == after


def test_a_seed_repeats_its_values() -> None:
    one, two, other = SeededSource(7), SeededSource(7), SeededSource(8)
    for n in (1, 5, 1000):
        assert torch.equal(one.normal(n), two.normal(n))
    assert not torch.equal(one.normal(1000), other.normal(1000))
    assert not torch.equal(one.normal(1000), one.normal(1000))


def test_a_seeded_source_resumes_where_it_was_saved() -> None:
    source = SeededSource(7)
    source.normal(11)
    saved = io.BytesIO()
    torch.save(source.state_dict(), saved)
    expected = [source.normal(11), source.uniform(3)]
    saved.seek(0)
    resumed = SeededSource(0)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(resumed.normal(11), expected[0])
    assert torch.equal(resumed.uniform(3), expected[1])


def test_seeded_source_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    SeededSource(1).normal(100)
    assert torch.equal(torch.rand(4), expected)


def test_both_sources_share_one_way_from_bits_to_values() -> None:
    for name in ("uniform", "normal"):
        assert getattr(SecureSource, name) is getattr(SeededSource, name) is getattr(RandomSource, name)


def test_a_million_normals_take_little_time(source: RandomSource) -> None:
    source.normal(N)

    def measure() -> float:
        started = time.perf_counter()
        source.normal(N)
        return time.perf_counter() - started

    # 10 ms on one core of 2024; the bound is what a loop in Python could never reach.
    assert min(measure() for _ in range(5)) < 0.3
