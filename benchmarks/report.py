"""``python -m benchmarks.report FILE.json``: pytest-benchmark's results as Markdown tables with ratios."""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.variants import YARDSTICK

PACKAGES = ("torch", "transformers", "timm", "peft", "opacus")
COLUMNS = ["variant", "median, ms", "ratio in time", "peak, MB", "ratio in peak memory", "GPU"]


def machine(results: dict[str, Any]) -> str:
    """The line that says where the figures come from: processor, threads, versions of this environment."""
    info, cpu = results["machine_info"], results["machine_info"]["cpu"]
    threads = {benchmark["extra_info"]["threads"] for benchmark in results["benchmarks"]}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if _installed(name))
    return (f"{cpu['brand_raw']}, {cpu['count']} cores, {'/'.join(map(str, sorted(threads)))} torch thread(s), "
            f"{info['system']} {info['release']}, Python {info['python_version']}, {versions}; float32; "
            f"{results['datetime'][:10]}.")


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def tables(results: dict[str, Any]) -> str:
    """One table per shape, in the order of the file."""
    lines: list[str] = []
    for shape in dict.fromkeys(benchmark["extra_info"]["shape"] for benchmark in results["benchmarks"]):
        rows = [b for b in results["benchmarks"] if b["extra_info"]["shape"] == shape]
        lines += [f"**{shape}** ({rows[0]['stats']['rounds']} rounds)", "", "| " + " | ".join(COLUMNS) + " |",
                  "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
        for row in rows:
            extra = row["extra_info"]
            # The yardstick timed against itself shows how far a ratio of 1 strays on this machine.
            name = f"{extra['variant']} (the yardstick, twice)" if extra["variant"] == YARDSTICK else extra["variant"]
            lines.append(
                f"| {name} | {row['stats']['median'] * 1e3:.1f} | {extra['ratio']:.3f} | {extra['peak_mb']:.1f} | "
                f"{extra['peak_ratio']:.3f} | not measured |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.report FILE.json")
    results = json.loads(Path(sys.argv[1]).read_text())
    print(machine(results), end="\n\n")
    print(tables(results), end="")


if __name__ == "__main__":
    main()
