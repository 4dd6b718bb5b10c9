"""Turn pytest-benchmark's JSON into Markdown: ratios of steps, bandwidths of kernels, and the goals on a GPU.

    python -m benchmarks.report [FILE.json ...]

Without a file it gives the goals alone, of which nothing is then measured.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import goals
from benchmarks.variants import YARDSTICK

STEP_COLUMNS = ["variant", "median, ms", "ratio in time", "peak, MB", "ratio in peak memory"]
KERNEL_COLUMNS = [
    "size",
    "dtype",
    "way",
    "µs",
    "must move, MB",
    "GB/s",
    "of a copy",
    "torch's, µs",
    "time / torch's",
    "launched one by one, µs",
]


def machine(results: dict[str, Any]) -> str:
    """The line that says where the figures come from: device, precision and versions."""
    info, rows = results["machine_info"], [benchmark["extra_info"] for benchmark in results["benchmarks"]]
    gpu, cpu = info.get("gpu"), info.get("cpu", {})
    on_gpu = gpu and any(row.get("device", "cuda") == "cuda" for row in rows)
    threads = "/".join(sorted({str(row["threads"]) for row in rows if "threads" in row}))
    parts = [f"{gpu['name']}, CUDA {gpu['cuda']}"] if gpu and on_gpu else []
    parts.append(f"{cpu.get('brand_raw', info['machine'])}, {cpu.get('count', '?')} cores")
    parts += [f"{threads} torch thread(s)"] if threads else []
    parts += [f"{info['system']} {info['release']}", f"Python {info['python_version']}"]
    parts += [f"{name} {version}" for name, version in info.get("packages", {}).items()]
    dtypes = "/".join(sorted({row.get("dtype", "float32") for row in rows}))
    return f"{', '.join(parts)}; {dtypes}; {results['datetime'][:10]}."


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> list[str]:
    """Lines of a table whose first ``words`` columns are words and the others numbers."""
    head = ["| " + " | ".join(columns) + " |", "|" + " --- |" * words + " ---: |" * (len(columns) - words)]
    return [*head, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _step_row(benchmark: dict[str, Any]) -> list[str]:
    extra = benchmark["extra_info"]
    # The yardstick timed against itself shows how far a ratio of 1 strays on this machine.
    name = f"{extra['variant']} (the yardstick, twice)" if extra["variant"] == YARDSTICK else extra["variant"]
    if "stops" in extra:
        return [f"{name}: stops with {extra['stops'].replace('|', '/')}", *["–"] * (len(STEP_COLUMNS) - 1)]
    memory = [f"{extra['peak_mb']:.1f}", f"{extra['peak_ratio']:.3f}"] if "peak_mb" in extra else ["–", "–"]
    return [name, f"{benchmark['stats']['median'] * 1e3:.1f}", f"{extra['ratio']:.3f}", *memory]


def step_tables(benchmarks: Sequence[dict[str, Any]]) -> str:
    """One table for each shape, in the order of the file."""
    lines: list[str] = []
    for shape in dict.fromkeys(benchmark["extra_info"]["shape"] for benchmark in benchmarks):
        rows = [b for b in benchmarks if b["extra_info"]["shape"] == shape]
        lines += [f"**{shape}** ({max(row['stats']['rounds'] for row in rows)} rounds)", ""]
        lines += _table(STEP_COLUMNS, [_step_row(row) for row in rows])
    return "\n".join(lines)


def kernel_tables(benchmarks: Sequence[dict[str, Any]]) -> str:
    """One table for each kernel, a row for each of our ways at each size, and the copy that they are compared with."""
    copied = benchmarks[0]["extra_info"]["copy_bandwidth"]
    lines = [f"A copy on the device reaches {copied / 1e9:.0f} GB/s in this run, read and written bytes counted.", ""]
    torchs = {_key(b): b["stats"]["median"] for b in benchmarks if b["extra_info"]["way"] == "torch"}
    for kernel in dict.fromkeys(benchmark["extra_info"]["kernel"] for benchmark in benchmarks):
        rows = []
        for benchmark in benchmarks:
            extra, median = benchmark["extra_info"], benchmark["stats"]["median"]
            if extra["kernel"] != kernel or extra["way"] == "torch":
                continue
            rival = torchs.get(_key(benchmark))
            rows.append(
                [
                    extra["size"],
                    extra["dtype"],
                    extra["way"] if extra["graphed"] else f"{extra['way']} (no graph)",
                    f"{median * 1e6:.1f}",
                    f"{extra['bytes_moved'] / 1e6:.1f}",
                    f"{extra['bandwidth'] / 1e9:.0f}",
                    f"{extra['ratio']:.3f}",
                    f"{rival * 1e6:.1f}" if rival else "–",
                    f"{median / rival:.2f}" if rival else "–",
                    f"{extra['eager_s'] * 1e6:.1f}",
                ]
            )
        if rows:
            lines += [f"**{kernel}**", "", *_table(KERNEL_COLUMNS, rows, words=3)]
    return "\n".join(lines)


def native_tables(benchmarks: Sequence[dict[str, Any]]) -> str:
    """One table for each native op and size, each way beside its yardstick in the same run."""
    lines: list[str] = []
    for op in dict.fromkeys(benchmark["extra_info"]["native"] for benchmark in benchmarks):
        rows = []
        for benchmark in benchmarks:
            extra, median = benchmark["extra_info"], benchmark["stats"]["median"]
            if extra["native"] != op:
                continue
            name = f"{extra['way']} (the yardstick, twice)" if extra["way"] == extra["yardstick"] else extra["way"]
            speed = f"{extra['bytes_per_second'] / 1e9:.2f}" if "bytes_per_second" in extra else "–"
            rows.append([name, f"{median * 1e3:.2f}", speed, f"{extra['ratio']:.3f}"])
        lines += [f"**{op}**", "", *_table(["way", "median, ms", "GB/s", "ratio in time"], rows)]
    return "\n".join(lines)


def _key(benchmark: dict[str, Any]) -> tuple[str, ...]:
    extra = benchmark["extra_info"]
    return extra["kernel"], extra["size"], extra["dtype"]


def report(paths: Sequence[Path]) -> str:
    """The tables of all files, each under its machine, and the goals if one is of a GPU or there is no file."""
    parts, measured = [], []
    for path in paths:
        results = json.loads(path.read_text())
        # A step that failed or was interrupted has no ratio.
        rows = [row for row in results["benchmarks"] if {"ratio", "stops"} & row["extra_info"].keys()]
        parts.append(machine({**results, "benchmarks": rows}) + "\n")
        if steps := [row for row in rows if "variant" in row["extra_info"]]:
            parts.append(step_tables(steps))
        if kernels := [row for row in rows if "kernel" in row["extra_info"]]:
            parts.append(kernel_tables(kernels))
        if native := [row for row in rows if "native" in row["extra_info"]]:
            parts.append(native_tables(native))
        measured += rows if "gpu" in results["machine_info"] else []
    if measured or not paths:
        parts.append(goals.tables(measured))
    return "\n".join(parts)


if __name__ == "__main__":
    print(report([Path(argument) for argument in sys.argv[1:]]), end="")
