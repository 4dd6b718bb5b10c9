"""What starting costs, in CPU seconds: an answer of the command line, ``import lora_dp``, and a run's first line.

    python -m benchmarks.startup

Each is a process of its own, user and system time; the least of some is given, since other work only adds to it.
"""

import os
import subprocess
import sys
import tempfile
import time

import psutil

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


def main() -> None:
    """Prints a table in Markdown."""
    print("| what | CPU seconds |\n| --- | ---: |")
    for name, command in COMMANDS.items():
        print(f"| {name} | {min(cpu_seconds(command) for _ in range(REPEATS)):.2f} |", flush=True)
    cpu, wall = min(first_line() for _ in range(REPEATS))
    print(f"| first line of the default run | {cpu:.2f} (wall clock {wall:.2f}) |")


if __name__ == "__main__":
    main()
