"""Running a grid: the cells that are left, several at a time if need be, and then its tables and plot."""

import contextlib
import dataclasses
import fcntl
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_dp.atomic_files import write_atomically
from lora_dp.fed.compare import tables
from lora_dp.fed.compare.grid import (
    DEFINITION,
    FAILURES,
    Cell,
    Grid,
    defaults,
    ended_summary,
    grid_caption,
    read_cells,
    read_definition,
    read_trials,
)
from lora_dp.fed.compare.options import CompareConfig
from lora_dp.fed.compare.workers import INTERRUPTED, Why, run_all
from lora_dp.fed.config import RunConfig


def compare(config: CompareConfig, common: Mapping[str, Any], console: Console | None = None) -> Path:
    """Runs all cells of a grid that have not finished, and writes tables and plot (:mod:`lora_dp.fed.compare.tables`).

    A cell that a crash or Ctrl-C cut short is resumed. One that fails is a dash in the table, and the others go on;
    the next call tries it again. With several processes call it under ``if __name__ == "__main__":``, since they
    import the calling script.

    Args:
        common: options of a run as :meth:`~lora_dp.fed.RunConfig.from_flat` takes them, for all cells; method,
            epsilon, seed and output are the grid's.

    Returns:
        The folder of the comparison. It has compare.yaml, cells/<method>/eps<ε>/seed<seed>/, comparison.md, .csv, .tex
        and .png; trials/ and trials.csv where learning rates were tried, and failures.json where a run failed.

    Raises:
        ValueError: an option that does not fit, of any cell; a folder with another comparison. Nothing has been run.
        KeyboardInterrupt: Ctrl-C; the tables of what has finished are written, and a further call goes on.
    """
    console = console or Console()
    grid = Grid(config, common)
    folder = config.output or _fresh()
    with _held(folder):
        _check_definition(grid, folder)
        everything = grid.trials + grid.cells
        finished = sum(ended_summary(folder / cell.path) is not None for cell in everything)
        _say(console, f"{len(everything)} runs, {finished} of them finished before · {folder}")
        failures: dict[Cell, Why] = {}
        interrupted = False
        with _progress(console) as progress:
            bar = progress.add_task("runs", total=len(everything), completed=finished)

            def ended(cell: Cell, reason: Why | None) -> None:
                if reason is not None:
                    failures[cell] = reason
                _say(console, _line(cell, folder / cell.path, reason))
                progress.advance(bar)

            try:
                _run_left(grid, grid.trials, folder, config.processes, ended)
                _run_left(grid, grid.cells, folder, config.processes, ended)
            except KeyboardInterrupt:
                interrupted = True
        _write_failures(folder, failures)
        cells, trials = read_cells(grid, folder), read_trials(grid, folder)
        named = {str(cell): reason.said for cell, reason in failures.items()}
        tables.write(folder, cells, trials, grid_caption(grid, cells, trials), failures=named)
    if interrupted:
        _say(console, f"interrupted: the same command with --output {folder} goes on")
        raise KeyboardInterrupt
    _say(console, "\n" + tables.plain(cells))
    for note in [*cells["guarantee"].dropna().unique(), *cells["release"].dropna().unique()]:
        _say(console, note)
    for cell, reason in failures.items():
        _say(console, f"failed: {cell}: {reason.in_full}")
    _say(console, f"results: {folder}")
    return folder


def _run_left(
    grid: Grid, cells: Sequence[Cell], folder: Path, processes: int, ended: Callable[[Cell, Why | None], None]
) -> None:
    """Runs those cells that have not ended, at the learning rates that are theirs, and tells what came of each."""
    jobs: dict[Path, tuple[Cell, RunConfig]] = {}
    for cell in cells:
        path = folder / cell.path
        if ended_summary(path) is not None:
            continue
        rate = cell.trial or grid.chosen_rate(folder, cell)
        if rate is None and grid.rates:
            ended(cell, Why.of("a trial of its learning rates failed"))
        else:
            jobs[path] = cell, _placed(grid.config(cell, rate), path)
    with contextlib.closing(run_all([config for _, config in jobs.values()], processes)) as results:
        for path, reason in results:
            if reason == INTERRUPTED:
                raise KeyboardInterrupt
            ended(jobs[path][0], reason)


def _fresh() -> Path:
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-compare"
    candidates = [Path("runs") / (name + (f"-{i}" if i else "")) for i in range(1000)]
    return next(path for path in candidates if not path.exists())


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The folder of a comparison, made if need be, and held by one process at a time."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {folder} ({error.strerror}): choose another --output") from error
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"Another process is at work in {folder}: wait for it, or choose another --output."
            ) from error
        yield


def _check_definition(grid: Grid, folder: Path) -> None:
    if (folder / "config.yaml").exists():
        raise ValueError(f"{folder} holds a run: choose another --output for the comparison.")
    new = grid.definition()
    if not (folder / DEFINITION).exists():
        text = yaml.safe_dump(new, sort_keys=False, allow_unicode=True)
        write_atomically(folder / DEFINITION, f"# lora-dp compare --config {DEFINITION}\n{text}")
        return
    old = {**defaults(), **read_definition(folder)}
    different = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if different:
        raise ValueError(
            f"{folder} holds another comparison ({', '.join(different)} differ): choose another --output, or go on "
            f"with its own {DEFINITION} as --config."
        )


def _placed(config: RunConfig, path: Path) -> RunConfig:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, output=path))


def _write_failures(folder: Path, failures: Mapping[Cell, Why]) -> None:
    if failures:
        entries = [
            {**dataclasses.asdict(cell), "folder": cell.path.as_posix(), "reason": reason.said}
            for cell, reason in failures.items()
        ]
        write_atomically(folder / FAILURES, json.dumps(entries, indent=1, ensure_ascii=False))
    else:
        (folder / FAILURES).unlink(missing_ok=True)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _say(console: Console, line: str) -> None:
    console.print(escape(line), highlight=False, soft_wrap=True)


def _line(cell: Cell, path: Path, reason: Why | None) -> str:
    summary = ended_summary(path)
    if summary is None:
        assert reason is not None
        return f"{cell}   failed: {reason.in_full}"
    note = "" if summary["status"] == "finished" else f"   {summary['status']}"
    note += "   no privacy guarantee (ε = ∞)" if summary.get("guarantee") else ""
    return f"{cell}   accuracy {100 * summary['accuracy_after']:.1f} %{note}"
