"""Tune the kernels: time every configuration at every shape and write the winners to ``tuned.json``.

    python -m benchmarks.tuning FILE.json

FILE.json gets all timings. A configuration whose result is wrong never wins, and the exit status is then 1.
"""

import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case, products, single_kernels
from benchmarks.timing import DeviceTimer, calls_on, input_sets
from lora_dp.kernels import adapted_product, launching
from lora_dp.kernels.launching import TRITON_NAMES, Config

RANKS = (8, 64)
ROUNDS = 9
# A default stays unless it is beaten by more than timings stray.
MARGIN = 0.02
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
WRONG = "wrong"
WAYS = ("fused", "two_step")

# Name → way of the case, and its options.
Candidates = Mapping[str, tuple[str, dict[str, Any]]]


@dataclass
class Row:
    """What was found for one look-up of a kernel: its key in ``tuned.json``, seconds by choice, and the winner."""

    kernel: str
    dtype: str
    shape: dict[str, int]
    default: str
    seconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    choice: str | None = None


def winner(seconds: Mapping[str, float], default: str) -> str | None:
    """The fastest choice, or the default where it is as good as that; None where nothing was timed."""
    if not seconds:
        return None
    best = min(seconds, key=lambda name: seconds[name])
    return default if seconds.get(default, float("inf")) <= (1 + MARGIN) * seconds[best] else best


def merged(table: Mapping[str, Any], device: str, rows: Sequence[Row]) -> dict[str, Any]:
    """``table`` with the winners for ``device`` put in; what it held for other devices and look-ups stays."""
    kernels = {kernel: list(entries) for kernel, entries in table.get(device, {}).items()}
    for row in rows:
        if row.choice is None:
            continue
        entry = {"dtype": row.dtype, "shape": row.shape, "choice": row.choice}
        others = [
            old
            for old in kernels.get(row.kernel, [])
            if (old["dtype"], old["shape"]) != (entry["dtype"], entry["shape"])
        ]
        kernels[row.kernel] = [*others, entry]
    return {**table, device: kernels}


def written(table: Mapping[str, Any]) -> str:
    """``table`` as JSON with one line for each entry."""
    devices = []
    for device, kernels in sorted(table.items()):
        parts = []
        for kernel, entries in sorted(kernels.items()):
            lines = ",\n".join(f"   {json.dumps(entry)}" for entry in entries)
            parts.append(f"  {json.dumps(kernel)}: [\n{lines}\n  ]")
        devices.append(f" {json.dumps(device)}: {{\n" + ",\n".join(parts) + "\n }")
    return "{\n" + ",\n".join(devices) + "\n}\n"


@contextmanager
def _looked_up(case: Case) -> Iterator[list[tuple[Row, Mapping[str, Config]]]]:
    """Notes what the launcher of ``case`` looks up, and lets it run with the default."""
    found: list[tuple[Row, Mapping[str, Config]]] = []

    def note(kernel: str, configs: Mapping[str, Config], default: str, like: Tensor, **shape: int) -> Config:
        found.append((Row(kernel, TRITON_NAMES[like.dtype], shape, default), configs))
        return configs[default]

    with mock.patch.object(case.module, "pick", note):
        yield found


def choices(case: Case, inputs: tuple[Any, ...]) -> tuple[Row, Mapping[str, Config]] | None:
    """The row to fill for ``case`` and its candidates; None where the launcher has nothing to choose."""
    with _looked_up(case) as found:
        next(iter(case.ways.values()))(*inputs)
    return found[0] if found else None


def way_row(case: Case, inputs: tuple[Any, ...]) -> Row:
    """The row for which way :func:`lora_dp.kernels.adapted_product.adapted_product` takes."""
    rows: list[Row] = []

    def note(kernel: str, like: Tensor, **shape: int) -> None:
        rows.append(Row(kernel, TRITON_NAMES[like.dtype], shape, "two_step"))

    with mock.patch.object(adapted_product, "measured", note):
        adapted_product.adapted_product(*inputs, 1.0)
    return rows[0]


def _changed(value: Any, change: Any) -> Any:
    if isinstance(value, list):
        return [_changed(each, change) for each in value]
    return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for each in value for tensor in _tensors(each)] if isinstance(value, list | tuple) else []


def error(case: Case, inputs: tuple[Any, ...], expected: Sequence[Tensor], way: str, **options: Any) -> float:
    """The largest relative error of any output; ``inputs`` are not written to."""
    found = _tensors(case.ways[way](*[_changed(value, Tensor.clone) for value in inputs], **options))
    return max(
        (float((mine.double() - its).norm() / its.norm()) for mine, its in zip(found, expected, strict=True)),
        key=lambda e: e if e == e else float("inf"),
    )


def _wrong(case: Case, inputs: tuple[Any, ...], candidates: Candidates) -> dict[str, str]:
    """Which candidates fail or give a wrong result, and how."""
    if not case.checked:
        return {}
    expected = _tensors(case.ways["torch"](*[_changed(value, Tensor.double) for value in inputs]))
    found = {}
    for name, (way, options) in candidates.items():
        try:
            if not (e := error(case, inputs, expected, way, **options)) <= TOLERANCE[case.dtype]:
                found[name] = f"{WRONG}: relative error {e:.1e}"
        # Triton has its own exceptions for what does not fit a chip.
        except Exception as problem:
            found[name] = _described(problem)
    return found


def _described(problem: Exception) -> str:
    return f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}"


def fill(row: Row, case: Case, sets: Sequence[tuple[Any, ...]], candidates: Candidates) -> None:
    """Check all candidates, time the right ones and name the winner."""
    row.failed = _wrong(case, sets[0], candidates)
    for name, (way, options) in candidates.items():
        if name not in row.failed:
            timer = DeviceTimer(calls_on(case.ways[way], case, sets, **options), case.graphed)
            row.seconds[name] = statistics.median(timer() for _ in range(timer.rounds(ROUNDS)))
    row.choice = winner(row.seconds, row.default)


def _tune(case: Case, device: torch.device) -> Row | None:
    sets = input_sets(case, device)
    if (found := choices(case, sets[0])) is None:
        return None
    row, configs = found
    way = next(iter(case.ways))
    fill(row, case, sets, {name: (way, {"config": config}) for name, config in configs.items()})
    return row


def _tune_way(case: Case, device: torch.device) -> Row:
    sets = input_sets(case, device)
    row = way_row(case, sets[0])
    fill(row, case, sets, {way: (way, {}) for way in WAYS})
    return row


def _cases(rank: int) -> list[Case]:
    return [*single_kernels(rank), *products(rank)]


def _compile(number: int, rank: int) -> None:
    """Run every configuration of a case once, which leaves it in Triton's cache on disk."""
    case, device = _cases(rank)[number], torch.device("cuda")
    # What fails here is met again, and noted, when it is timed.
    with suppress(Exception):
        inputs = case.inputs(device)
        found = choices(case, inputs)
        for config in found[1].values() if found else ():
            with suppress(Exception):
                next(iter(case.ways.values()))(*inputs, config=config)


def _compile_all(processes: int) -> None:
    """Compile side by side what will be timed one after the other."""
    seen, jobs = set(), []
    for rank in RANKS:
        for number, case in enumerate(_cases(rank)):
            # Triton compiles anew for another dtype, padded rank, or size that 16 does not divide.
            if (key := (case.kernel, case.dtype, rank, tuple(size % 16 == 0 for size in case.dims))) not in seen:
                seen.add(key)
                jobs.append((number, rank))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool, suppress(BrokenProcessPool):
        list(pool.map(_compile, *zip(*jobs, strict=True)))


class _Tuner:
    """Rows so far, and what went wrong with whole cases."""

    def __init__(self, device: torch.device, output: Path):
        self.device, self.name, self.output = device, torch.cuda.get_device_name(device), output
        self.rows: list[Row] = []
        self.problems: list[str] = []

    def take(self, tune: Callable[[Case, torch.device], Row | None], cases: Sequence[Case]) -> None:
        for case in cases:
            try:
                row = tune(case, self.device)
            except Exception as problem:
                self.problems.append(f"{case}: {_described(problem)}")
                continue
            if row is not None:
                self.rows.append(row)
                self.problems += [f"{case}, {name}: {why}" for name, why in row.failed.items() if why.startswith(WRONG)]

    def save(self) -> None:
        """Write tables; kernels launched from now on follow them."""
        table = json.loads(launching.TABLE.read_text()) if launching.TABLE.exists() else {}
        launching.TABLE.write_text(written(merged(table, self.name, self.rows)))
        launching._table.cache_clear()
        self.output.write_text(
            json.dumps(
                {"device": self.name, "torch": torch.__version__, "rows": [asdict(row) for row in self.rows]}, indent=1
            )
            + "\n"
        )


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.tuning FILE.json")
    tuner = _Tuner(torch.device("cuda"), Path(sys.argv[1]))
    _compile_all(min(8, os.cpu_count() or 1))
    try:
        for rank in RANKS:
            tuner.take(_tune, _cases(rank))
            # The ways are compared with the kernels at their best.
            tuner.save()
            tuner.take(_tune_way, list(products(rank)))
    finally:
        tuner.save()
    print("\n".join(tuner.problems))
    changed = sum(row.choice != row.default for row in tuner.rows)
    print(
        f"{len(tuner.rows)} shapes tuned, {changed} of them away from the default, {len(tuner.problems)} problems; "
        f"written to {launching.TABLE}"
    )
    sys.exit(1 if tuner.problems else 0)


if __name__ == "__main__":
    main()
