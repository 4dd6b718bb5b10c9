"""What a private step is to cost on one H100, and whether measurements show it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.models import GPU_SHAPES
from benchmarks.variants import YARDSTICK

NOT_MEASURED = "not measured"
B_PHASE, A_PHASE = "lora-dp, B phase", "lora-dp, A phase"
GHOST, PEFT_B = "Opacus ghost, B only", "PEFT plain, B only"
# Bytes of the wide factor from which the one-pass kernel is to reach its share of a copy's bandwidth.
LARGE = 8e6


@dataclass(frozen=True)
class Goal:
    """A number and its bound: at most ``bound``, or at least that."""

    name: str
    bound: float
    at_least: bool = False
    unit: str = ""

    @property
    def limit(self) -> str:
        """The bound in words of a table."""
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}{self.unit}"

    def verdict(self, value: float | None) -> str:
        """The number, and whether it meets the bound or by how much it misses it."""
        if value is None:
            return NOT_MEASURED
        missed = 1 - value / self.bound if self.at_least else value / self.bound - 1
        shown = f"{value:.1f}{self.unit}" if self.unit else f"{value:.3f}"
        return f"{shown}, met" if missed <= 0 else f"{shown}, missed by {100 * missed:.1f} %"


STEP_GOALS = [
    Goal(f"B-phase step / {YARDSTICK}", 0.90),
    Goal(f"A-phase step / {YARDSTICK}", 0.90),
    Goal(f"B-phase step / {PEFT_B}", 1.0),
    Goal(f"{GHOST} / B-phase step", 2.0, at_least=True),
    Goal(f"peak memory of the B phase / {YARDSTICK}", 1.0),
    Goal(f"peak memory of the A phase / {YARDSTICK}", 1.0),
]
GRADIENT_GOALS = {
    kernel: Goal(
        f"one-pass gradient, norm{name}: bandwidth / a copy's, the least from 8 MB upward, bfloat16",
        0.85,
        at_least=True,
    )
    for kernel, name in (("example_grad_u", " and u (B phase)"), ("example_grad", " (A phase)"))
}
UPDATE_GOAL = Goal("clip, sum, noise, filter and AdamW of 48 adapters of 768 × 16, bfloat16", 60.0, unit=" µs")


def _quotient(above: Any, below: Any) -> float | None:
    return None if above is None or below is None else float(above / below)


def _of_step(rows: Mapping[str, Mapping[str, Any]]) -> list[float | None]:
    """The numbers of STEP_GOALS at one shape, from what was measured of each variant."""
    b, a, ghost, peft_b = (rows.get(name, {}) for name in (B_PHASE, A_PHASE, GHOST, PEFT_B))
    return [
        b.get("ratio"),
        a.get("ratio"),
        _quotient(b.get("ratio"), peft_b.get("ratio")),
        _quotient(ghost.get("ratio"), b.get("ratio")),
        b.get("peak_ratio"),
        a.get("peak_ratio"),
    ]


def tables(benchmarks: Iterable[Mapping[str, Any]]) -> str:
    """Every goal and its verdict, from pytest-benchmark's records of steps and kernels on a GPU."""
    steps: dict[str, dict[str, Any]] = {shape: {} for shape in GPU_SHAPES}
    kernels: dict[str, list[tuple[Mapping[str, Any], float]]] = {}
    for benchmark in benchmarks:
        extra = benchmark["extra_info"]
        if extra.get("device") == "cuda" and benchmark["group"] in steps:
            steps[benchmark["group"]][extra["variant"]] = extra
        elif extra.get("way") in ("triton", "native") and "kernel" in extra:
            kernels.setdefault(extra["kernel"], []).append((extra, benchmark["stats"]["median"]))

    lines = ["| a whole step, bfloat16 | goal | " + " | ".join(steps) + " |", "| --- | ---: |" + " ---: |" * len(steps)]
    values = [_of_step(rows) for rows in steps.values()]
    for goal, row in zip(STEP_GOALS, zip(*values, strict=True), strict=True):
        cells = [goal.verdict(value) for value in row]
        if goal.at_least:
            cells = [
                "Opacus stops" if "stops" in rows.get(GHOST, {}) else cell
                for cell, rows in zip(cells, steps.values(), strict=True)
            ]
        lines.append(f"| {goal.name} | {goal.limit} | " + " | ".join(cells) + " |")

    lines += ["", "| a kernel | goal | measured |", "| --- | ---: | ---: |"]
    for kernel, goal in GRADIENT_GOALS.items():
        ratios = [
            extra["ratio"]
            for extra, _ in kernels.get(kernel, ())
            if extra["dtype"] == "bfloat16" and 2 * math.prod(extra["dims"][:3]) >= LARGE
        ]
        lines.append(f"| {goal.name} | {goal.limit} | {goal.verdict(min(ratios, default=None))} |")
    updates = kernels.get("clip_sum and private_update", ())
    medians = [median for extra, median in updates if extra["dtype"] == "bfloat16"]
    lines.append(
        f"| {UPDATE_GOAL.name} | {UPDATE_GOAL.limit} | {UPDATE_GOAL.verdict(1e6 * medians[0] if medians else None)} |"
    )
    return "\n".join(lines) + "\n"
