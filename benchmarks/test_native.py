"""ChaCha20 beside OpenSSL's, and the private update beside torch's optimizers: each in turn with its yardstick."""

import statistics
import time
from typing import Any

import pytest
import torch

from benchmarks.native_cases import ADAPTERS, BYTES, Adapters, Call, keystreams, updates


def _in_turn(benchmark: Any, call: Call, yardstick: Call, rounds: int, device: str = "cpu") -> float:
    """Times ``call``; the median ratio of each of its times to the yardstick's just before it."""

    def ended(one: Call) -> Call:
        def run() -> None:
            one()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    others: list[float] = []

    def before() -> None:
        start = time.perf_counter()
        ended(yardstick)()
        others.append(time.perf_counter() - start)

    benchmark.pedantic(ended(call), setup=before, rounds=5 * rounds, warmup_rounds=3)
    times = benchmark.stats.stats.data
    return statistics.median(mine / its for mine, its in zip(times, others[-len(times) :], strict=True))


def _note(benchmark: Any, op: str, way: str, ratio: float, yardstick: str, **more: Any) -> None:
    benchmark.group = op
    benchmark.extra_info.update(
        native=op, way=way, ratio=ratio, yardstick=yardstick, threads=torch.get_num_threads(), **more
    )
    print(f"\n{op}: {way}: {ratio:.3f} × {yardstick}")


KEYSTREAMS = ["OpenSSL (cryptography)", "lora-dp, avx512", "lora-dp, avx2", "lora-dp, portable"]


@pytest.mark.parametrize("way", KEYSTREAMS)
def test_keystream(way: str, rounds: int, device: str, benchmark: Any) -> None:
    if device != "cpu":
        pytest.skip("OpenSSL runs on a CPU")
    pytest.importorskip("cryptography")
    ways = keystreams()
    if way not in ways:
        pytest.skip(f"this machine does not run {way}")
    yardstick = next(iter(ways))
    ratio = _in_turn(benchmark, ways[way], ways[yardstick], rounds)
    speed = BYTES / benchmark.stats.stats.median
    _note(benchmark, "ChaCha20, 64 MiB", way, ratio, yardstick, bytes_per_second=speed)


WAYS = [way.replace("over 1 ", "over 32 ") for way in updates(Adapters("", 1, (1, 1), 1))]


@pytest.mark.parametrize("adapters", ADAPTERS, ids=lambda adapters: adapters.name)
@pytest.mark.parametrize("way", WAYS)
def test_update(way: str, adapters: Adapters, rounds: int, device: str, benchmark: Any) -> None:
    torch.manual_seed(0)
    ways = updates(adapters, device)
    name = next((name for name in ways if name.split(" the sum")[0] == way.split(" the sum")[0]), way)
    yardstick = next(iter(ways))
    ratio = _in_turn(benchmark, ways[name], ways[yardstick], rounds, device)
    _note(benchmark, f"update, {adapters.name}", name, ratio, yardstick, device=device)
