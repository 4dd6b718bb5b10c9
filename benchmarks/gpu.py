"""Test, tune and measure on one NVIDIA GPU, in under eight minutes on an H100.

    python -m benchmarks.gpu [--out FOLDER] [--only STAGE]

Stages: the tests that need a GPU; compute-sanitizer over every kernel; tuning, which writes ``kernels/tuned.json``; the
suites for kernels and for whole steps. Each has a time budget, to which comes what earlier ones left; one that fails
or runs out of time does not stop the others. Exit status: 0 if all that ran passed
(compute-sanitizer may be missing: the summary says so), 1 if not, 2 without a GPU.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEAST_CAPABILITY = (8, 0)
# What an interrupted stage gets to write what it has.
GRACE_SECONDS = 10
# Lines of its output that a failed command shows; all are in log.txt.
_TAIL = 25


@dataclass(frozen=True)
class Command:
    """What a stage runs; ``environment`` comes on top of this process's. ``optional``: only if time allows."""

    arguments: Sequence[str]
    environment: dict[str, str]
    optional: bool = False


@dataclass(frozen=True)
class Stage:
    """Seconds that it may take, and its commands, given the output folder."""

    seconds: float
    commands: Callable[[Path], list[Command]]


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: "passed", "failed", "out of time" or "missing", and its last line."""

    stage: str
    status: str
    seconds: float
    note: str


def _python(*arguments: str) -> Command:
    return Command([sys.executable, "-m", *arguments], {})


def _tests(out: Path) -> list[Command]:
    # Nearly all of their time is compiling.
    parallel = ["-n", str(min(16, os.cpu_count() or 1))] if find_spec("xdist") else []
    # Only files that hold such tests: others import what an image for GPUs may lack.
    marked = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if path.parent.name != "kernels" and "mark.gpu" in path.read_text()
    ]
    # test_resources.py compiles ahead of time, which needs no GPU.
    kernels = _python("pytest", "tests/kernels", "--ignore", "tests/kernels/test_resources.py", *parallel)
    return [_python("pytest", "-m", "gpu", *marked, *parallel), kernels]


def _sanitizer(out: Path) -> list[Command]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return []
    common = [tool, "--error-exitcode", "1", "--target-processes", "application-only", "--tool"]
    script = [sys.executable, "-m", "benchmarks.sanitized"]
    # Without torch's cache, every tensor is an allocation of its own, whose bounds are watched.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # torch and Triton call some functions of the driver to see whether they fail.
    return [
        Command([*common, "memcheck", "--report-api-errors", "no", *script], environment),
        Command([*common, "racecheck", *script], environment, optional=True),
    ]


def _suite(file: str, json: Path, *options: str) -> list[Command]:
    return [_python("pytest", f"benchmarks/{file}", "--device", "cuda", f"--benchmark-json={json}", *options)]


STAGES = {
    "tests": Stage(120, _tests),
    "sanitizer": Stage(55, _sanitizer),
    "tuning": Stage(80, lambda out: [_python("benchmarks.tuning", str(out / "tuning.json"))]),
    "kernels": Stage(50, lambda out: _suite("test_kernels.py", out / "kernels.json", "--rounds", "20")),
    # Compiling all three models would take longer than all else together.
    "steps": Stage(
        160, lambda out: _suite("test_step.py", out / "steps.json", "--rounds", "20", "-k", "not compiled or roberta")
    ),
}


def run_command(command: Command, seconds: float, log: Path) -> tuple[str, list[str]]:
    """Run one command for at most ``seconds``, its output into ``log``; status and the output's lines."""
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(command.arguments)}\n".encode())
        file.flush()
        begin = file.tell()
        environment = {**os.environ, "TRITON_INTERPRET": "0", **command.environment}
        process = subprocess.Popen(
            command.arguments,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        try:
            status = "passed" if process.wait(max(seconds - GRACE_SECONDS, 1)) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
            _stop(process)
        except BaseException:
            _stop(process)
            raise
    return status, [line for line in log.read_bytes()[begin:].decode(errors="replace").splitlines() if line.strip()]


def _stop(process: subprocess.Popen[bytes]) -> None:
    # pytest and the tuner write what they have when they are interrupted.
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_stage(name: str, commands: Sequence[Command], seconds: float, log: Path) -> Outcome:
    """Run a stage's commands one after the other; the first status that is not "passed" is the stage's."""
    begin = time.monotonic()
    if not commands:
        return Outcome(name, "missing", 0.0, "compute-sanitizer is not on PATH")
    status, notes = "passed", []
    for command in commands:
        left = seconds - (time.monotonic() - begin)
        found, lines = run_command(command, left, log) if left > GRACE_SECONDS else ("out of time", ["earlier ones"])
        last = lines[-1].strip("= ") if lines else "no output"
        notes.append(f"out of time after: {last}" if found == "out of time" else last)
        if found != "passed" and not (command.optional and found == "out of time"):
            print("\n".join(lines[-_TAIL:]), flush=True)
            status = found if status == "passed" else status
    return Outcome(name, status, time.monotonic() - begin, "; ".join(notes))


def run_all(names: Sequence[str], out: Path) -> list[Outcome]:
    """Run stages in order; one gets its budget and what earlier ones left."""
    log = out / "log.txt"
    log.write_bytes(b"")
    outcomes: list[Outcome] = []
    left = 0.0 if len(names) > 1 else sum(stage.seconds for stage in STAGES.values()) - STAGES[names[0]].seconds
    for name in names:
        # A figure of an earlier run must not pass for one of this.
        (out / f"{name}.json").unlink(missing_ok=True)
        seconds = STAGES[name].seconds + left
        print(f"{name}: at most {seconds:.0f} s", flush=True)
        outcomes.append(run_stage(name, STAGES[name].commands(out), seconds, log))
        left = max(seconds - outcomes[-1].seconds, 0.0)
        print(f"{name}: {outcomes[-1].status}", flush=True)
    return outcomes


def _missing_gpu() -> str | None:
    import torch

    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= LEAST_CAPABILITY:
        return None
    return (
        "No NVIDIA GPU of compute capability 8.0 or later is here, so nothing was tested, tuned or measured: run "
        "this on a machine that has one."
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results/<device>)")
    parser.add_argument("--only", choices=STAGES, help="one stage, which then gets the time of all")
    options = parser.parse_args()
    if missing := _missing_gpu():
        print(missing, file=sys.stderr)
        return 2
    import torch

    from benchmarks.report import report

    device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    out = (options.out or ROOT / "benchmarks" / "results" / device).resolve()
    out.mkdir(parents=True, exist_ok=True)
    # A shell may have started this with interrupts ignored, which the stages would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    outcomes = run_all([options.only] if options.only else list(STAGES), out)
    measured = [path for name in ("steps", "kernels") if (path := out / f"{name}.json").exists()]
    if measured:
        (out / "tables.md").write_text(report(measured))
    print(f"\n{'stage':<11}{'status':<13}{'seconds':>8}  last line")
    for outcome in outcomes:
        print(f"{outcome.stage:<11}{outcome.status:<13}{outcome.seconds:>8.0f}  {outcome.note}")
    print(f"Results and log.txt: {out}")
    return 0 if all(outcome.status in ("passed", "missing") for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
