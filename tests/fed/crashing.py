"""A warm process that forks runs, and kills them: at a moment, or at a write of their own choice.

``python -m tests.fed.crashing`` reads one JSON job a line and answers each with the exit status of the child that did
it: 0, 2 for an error (its text is in the answer), -9 for one that was killed.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lora_dp.fed import launch
from lora_dp.fed.config import RunConfig
from lora_dp.fed.rounds.client import Trainer
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.ledgers import AheadLog
from lora_dp.fed.runs import checkpoint, loop
from lora_dp.fed.runs.folder import RunFolder

# What a run writes, by name: where the function is that writes it.
POINTS: dict[str, tuple[Any, str]] = {
    "log": (AheadLog, "append"),
    "training": (Trainer, "train"),
    "metrics": (RunFolder, "add_metrics"),
    "tensors": (checkpoint, "write_bytes_atomically"),
    "numbers": (checkpoint, "write_atomically"),
    "ledger": (RunFolder, "write_ledger"),
    "adapter": (RunFolder, "write_adapter"),
    "merged": (loop, "save_merged"),
    "picture": (loop, "draw_curves"),
    "summary": (RunFolder, "write_summary"),
    "fsync": (os, "fsync"),
    "replace": (os, "replace"),
}
SECONDS = 60.0


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _plant(point: str, when: str, count: int) -> None:
    """Lets the ``count``-th call of a writing function (from 1) kill this process before or after it."""
    owner, name = POINTS[point]
    function, calls = getattr(owner, name), 0

    def fatal(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and when == "before":
            _die()
        result = function(*args, **kwargs)
        if calls == count:
            _die()
        return result

    setattr(owner, name, fatal)


def _trace(path: Path) -> None:
    """Writes down each turn that begins, as it begins: what may have left a client."""
    train = Trainer.train

    def traced(trainer: Trainer, client: int, examples: Any, task: Any, *args: Any) -> Any:
        with path.open("ab", buffering=0) as file:
            file.write(f"{os.getpid()} {task.round + 1} {client}\n".encode())
        return train(trainer, client, examples, task, *args)

    Trainer.train = traced  # type: ignore[method-assign]


def _work(job: dict[str, Any]) -> None:
    folder, console = Path(job["folder"]), Console(file=io.StringIO())
    loop.draw_curves = lambda results, config, path: path.touch()  # drawing takes longer than all the rest
    _trace(folder.with_name("trace"))
    if job.get("crash"):
        _plant(*job["crash"])
    if (folder / "config.yaml").exists():
        launch.resume(folder, console)
    else:
        launch.run(RunConfig.from_flat({**job["options"], "output": folder}), console)


def _child(job: dict[str, Any], errors: int) -> int:
    status = 2
    try:
        _work(job)
        status = 0
    except BaseException as error:
        os.write(errors, f"{type(error).__name__}: {error}".encode()[:4000])
    return status


def _serve(job: dict[str, Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os._exit(_child(job, writing))
    os.close(writing)
    begin = time.monotonic()
    end = begin + (job.get("kill_after") or SECONDS)
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            break
        time.sleep(0.0005)
    with os.fdopen(reading, "rb") as file:
        text = file.read().decode()
    return {"status": os.waitstatus_to_exitcode(status), "error": text, "seconds": time.monotonic() - begin}


def main() -> None:
    """Answers jobs until standard input ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        # Here, not in each child: noise multipliers are found once. No gradient, so that autograd can be forked.
        if "options" in job:
            Federation.from_config(RunConfig.from_flat(job["options"]))
        print(json.dumps(_serve(job)), flush=True)


@contextlib.contextmanager
def warm_process() -> Iterator[Callable[..., dict[str, Any]]]:
    """A function that lets a run (or, where the folder holds one, its resumption) be done by a fork, to a kill or to
    the end; it takes folder, options, crash = (point, "before" or "after", number) and kill_after in seconds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fed.crashing"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None and process.stdout is not None
    given, answers = process.stdin, process.stdout

    def work(folder: Path, **job: Any) -> dict[str, Any]:
        given.write(json.dumps({"folder": str(folder), **job}) + "\n")
        given.flush()
        answer: dict[str, Any] = json.loads(answers.readline())
        return answer

    try:
        yield work
    finally:
        given.close()
        process.wait(SECONDS)
        answers.close()


if __name__ == "__main__":
    main()
