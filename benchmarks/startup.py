"""What starting costs, in CPU seconds: an answer of the command line, ``import lora_dp``, and a run's first line.

    python -m benchmarks.startup [--output FOLDER]

Each is a process of its own, user and system time; the least of some is given, since other work only adds to it.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import cpuinfo
import psutil
from jsonargparse import auto_cli

REPEATS = 5
DOOR = (sys.executable, "-m", "lora_dp.fed")
PYTHON = (sys.executable, "-c")
COMMANDS = {
    "`lora-dp --version`": (*DOOR, "--version"),
    "`lora-dp --help`": (*DOOR, "--help"),
    "a command that is none": (*DOOR, "comapre"),
    "an option that is none": (*DOOR, "--epslon", "1"),
    "a value out of range": (*DOOR, "--epsilon", "0"),
    "`import torch`": (*PYTHON, "import torch"),
    "`import torch, lora_dp`": (*PYTHON, "import torch, lora_dp"),
    "`import torch`, then `from lora_dp import PrivacyEngine, inject_lora`": (
        *PYTHON,
        "import torch; from lora_dp import PrivacyEngine, inject_lora",
    ),
}


def cpu_seconds(command: tuple[str, ...]) -> float:
    """User and system time of a process that runs to its end."""
    before = os.times()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def first_line() -> tuple[float, float]:
    """CPU and wall-clock seconds until the default run says something."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        process = psutil.Popen([*DOOR, "--output", f"{folder}/run"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        process.stdout.readline()
        found = sum(process.cpu_times()[:2]), time.perf_counter() - begin
        process.kill()
        process.wait()
    return found


def machine() -> dict[str, Any]:
    """What the figures are of: processor, versions and day."""
    return {
        "processor": cpuinfo.get_cpu_info().get("brand_raw", platform.machine()),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"Python": platform.python_version(), "torch": metadata.version("torch")},
        "date": datetime.date.today().isoformat(),
    }


def table(found: dict[str, Any]) -> str:
    """Markdown: what was measured where, and a row for each."""
    about = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"{about['processor']}, {about['cores']} cores, {about['system']}, {versions}; {about['date']}.\n",
        "| what | CPU seconds |\n| --- | ---: |",
        *(f"| {name} | {seconds:.2f} |" for name, seconds in found["CPU seconds"].items()),
        "| {what} | {CPU seconds:.2f} (wall clock {wall clock:.2f}) |".format(**found["first line"]),
    ]
    return "\n".join(lines)


def main(output: Path = Path("benchmarks/results/startup")) -> None:
    """Measures, and prints the table.

    Args:
        output: folder for results.json and table.md.
    """
    seconds = {name: min(cpu_seconds(command) for _ in range(REPEATS)) for name, command in COMMANDS.items()}
    cpu, wall = min(first_line() for _ in range(REPEATS))
    found = {
        "machine": machine(),
        "repeats": REPEATS,
        "CPU seconds": {name: round(value, 3) for name, value in seconds.items()},
        "first line": {
            "what": "first line of the default run",
            "CPU seconds": round(cpu, 3),
            "wall clock": round(wall, 3),
        },
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (output / "table.md").write_text(table(found) + "\n")
    print(table(found))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
