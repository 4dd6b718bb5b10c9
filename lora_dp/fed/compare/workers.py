"""Running the cells of a grid, in this process or several: resumed where they were cut short, and none stops the
others."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from lora_dp.errors import TooFewClients
from lora_dp.fed import launch
from lora_dp.fed.config import RunConfig, read_config
from lora_dp.fed.rounds.kept_data import data_kept
from lora_dp.fed.rounds.ledgers import LOG, AheadLog, LogError
from lora_dp.fed.rounds.setup import plan_of
from lora_dp.fed.runs.folder import RunFolder


class Why(NamedTuple):
    """Why a run has not ended.

    Attributes:
        said: in files, which are made to be shown.
        in_full: with an exception's own words, which may quote private data: for the console of whoever runs it.
    """

    said: str
    in_full: str

    @classmethod
    def of(cls, words: str) -> "Why":
        """A reason in words that quote nothing."""
        return cls(words, words)


INTERRUPTED = Why.of("interrupted")
# The run's folder; and None, INTERRUPTED, or another reason.
Result = tuple[Path, Why | None]


def run_all(jobs: deque[RunConfig], processes: int) -> Generator[Result, None, None]:
    """Runs all jobs, each with its folder as output, and gives each result when it is there.

    Whoever takes the results may add jobs, or clear those that have not begun: each is taken off when it begins. Jobs
    on the same data open them once in each process.

    In one process it stops after a job that Ctrl-C interrupted. With several, KeyboardInterrupt comes through (or the
    generator is closed) once all processes have written what they have.
    """
    return _here(jobs) if processes == 1 else _in_processes(jobs, processes)


def run_one(config: RunConfig) -> Result:
    """Runs or resumes one job in this process; errors and Ctrl-C become the result's reason."""
    path = config.run.output
    assert path is not None
    try:
        outcome = _run_or_resume(config, path)
        return path, INTERRUPTED if outcome.interrupted else None
    except KeyboardInterrupt:
        return path, INTERRUPTED
    except Exception as error:
        text, kind = " ".join(str(error).split()), type(error).__name__
        in_full = text if isinstance(error, ValueError) and text else f"{kind}: {text}".rstrip(": ")
        if isinstance(error, LogError | TooFewClients):  # which quote nothing
            return path, Why.of(in_full)
        return path, Why(f"{kind}, in words that the console alone shows, since they may quote the data", in_full)


def _run_or_resume(config: RunConfig, path: Path) -> launch.Outcome:
    quiet = Console(quiet=True)
    if not path.exists():
        return launch.run(config, quiet)
    # Refused while another process is at work there, whose folder must stay where it is.
    RunFolder(path).close()
    try:
        stored = read_config(path)
        if stored.to_yaml() == config.settled_as(stored).to_yaml():
            return launch.resume(path, quiet)
    except LogError:
        raise
    except ValueError as error:
        _check_unspent(config, path, error)
    else:
        raise ValueError(f"{path} holds a run with other settings: move it away.")
    aside = next(p for i in range(1, 1000) if not (p := path.with_name(f"{path.name}.aside-{i}")).exists())
    path.rename(aside)
    try:
        return launch.run(config, quiet)
    except BaseException:
        # What stops a new run as well, a missing data set perhaps, was not the old one's fault.
        if not path.exists():
            aside.rename(path)
        raise


def _check_unspent(config: RunConfig, path: Path, reason: ValueError) -> None:
    """Refuses to begin a cell anew where rounds of it have begun: it would spend a second budget on the same data, and
    tell of one. Without privacy there is none to spend, and what follows its seed releases the same bits again.

    Raises:
        LogError: rounds have begun, or the log of the cell is not whole.
    """
    if plan_of(config).private and not config.run.reproducible and AheadLog(path / LOG).rounds_begun():
        raise LogError(
            f"{path} cannot be resumed (lora-dp resume {path} says why), and is not begun anew, since "
            "its rounds have spent a budget: restore it from a backup, or move it away and add its ε to the new run's."
        ) from reason


def _here(jobs: deque[RunConfig]) -> Generator[Result, None, None]:
    """One job after another in this process, up to the first that is interrupted."""
    with data_kept():
        while jobs:
            result = run_one(jobs.popleft())
            yield result
            if result[1] == INTERRUPTED:
                return


def _in_processes(waiting: deque[RunConfig], processes: int) -> Generator[Result, None, None]:
    """Several jobs at a time. Where a process dies, those that were under way are tried once more, each alone."""
    context = multiprocessing.get_context("spawn")
    while waiting:
        stop = context.Event()
        suspects: list[RunConfig] = []
        running: dict[Future[Result], RunConfig] = {}
        with ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(stop,)) as pool:
            try:
                while (waiting or running) and not suspects:
                    while waiting and len(running) < processes:
                        future = pool.submit(_work, waiting[0])
                        running[future] = waiting.popleft()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        job = running.pop(future)
                        if isinstance(future.exception(), BrokenProcessPool):
                            suspects.append(job)
                        else:
                            yield future.result()
            except BrokenProcessPool:  # from submit
                pass
            except BaseException:
                stop.set()  # and the pool waits until they have written what they have
                raise
            suspects += running.values()
        for job in suspects:
            if processes == 1:
                yield job.run.output or Path(), Why.of("its process died (was memory short?)")
            else:
                yield from _in_processes(deque([job]), 1)


_stopping: Event
_for_life = contextlib.ExitStack()


def _start_worker(stop: Event) -> None:
    """Of a process of the pool. Ctrl-C reaches it through ``stop``, whoever of the processes the terminal told."""
    global _stopping
    _stopping = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _for_life.enter_context(data_kept())
    threading.Thread(target=_watch, args=(stop,), daemon=True).start()


def _watch(stop: Event) -> None:
    parent = multiprocessing.parent_process()
    while not stop.wait(0.5):
        if parent is not None and not parent.is_alive():
            os._exit(1)  # nobody is left to hand results to; checkpoints are whole at any time
    os.kill(os.getpid(), signal.SIGINT)


def _work(config: RunConfig) -> Result:
    """One job in a process of the pool."""

    def once(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the results so far are being written
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, once)
    try:
        if _stopping.is_set():
            raise KeyboardInterrupt
        return run_one(config)
    except KeyboardInterrupt:
        return config.run.output or Path(), INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
