"""Running a grid: what is left of it, several runs at a time if need be, and then its tables and picture."""

import contextlib
import dataclasses
import fcntl
import io
import json
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from pandas import DataFrame
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_dp.atomic_files import write_atomically, write_bytes_atomically
from lora_dp.fed.compare import plot, tables
from lora_dp.fed.compare.caption import caption
from lora_dp.fed.compare.grid import DEFINITION, Cell, Grid, own_defaults, read_definition
from lora_dp.fed.compare.measures import MEASURES
from lora_dp.fed.compare.options import CompareConfig, Metric
from lora_dp.fed.compare.outcomes import FAILURES, NOT_COMPLETE, Outcomes
from lora_dp.fed.compare.workers import INTERRUPTED, Why, run_all
from lora_dp.fed.config import RunConfig
from lora_dp.fed.plot_style import STYLE
from lora_dp.fed.runs.folder import ENDED


def compare(config: CompareConfig, common: Mapping[str, Any], console: Console | None = None) -> Path:
    """Runs what a grid lacks, trials of its search and then cells; writes tables (:mod:`lora_dp.fed.compare.tables`)
    and a picture (:mod:`lora_dp.fed.compare.plot`).

    A run that a crash or Ctrl-C cut short is resumed. One that fails is a dash in the table, and the others go on; the
    next call tries it again. One that diverged has its result, and is not. With several processes call it under
    ``if __name__ == "__main__":``, since they import the calling script.

    Args:
        config: the grid, and what is searched.
        common: options of a run as :meth:`~lora_dp.fed.RunConfig.from_flat` takes them, for all cells; method,
            epsilon, seed and output are the grid's.
        console: to print on.

    Returns:
        The folder of the comparison. It has compare.yaml, cells/<method>/eps<ε>/seed<seed>/, comparison.md, .csv, .tex
        and .png; trials/ and trials.csv where settings were searched, and failures.json where a run failed.

    Raises:
        ValueError: an option that does not fit, of any cell; a folder with another comparison. Nothing has been run.
        KeyboardInterrupt: Ctrl-C; the tables of what has finished are written, and a further call goes on.

    >>> grid = CompareConfig(["la-lora"], [8.0], [0], minutes=0, output=Path("runs/none-begun"))
    >>> compare(grid, {"rounds": 5}, Console(quiet=True)).name
    'none-begun'
    """
    console = console or Console()
    grid = Grid(config, common)
    folder = config.output or _fresh()
    with _held(folder):
        _check_definition(grid, folder)
        outcomes = Outcomes(grid, folder)
        work = _Work(outcomes, config, console)
        interrupted = False
        try:
            work.run()
        except KeyboardInterrupt:
            interrupted = True
        failures = work.failures
        _write_failures(folder, failures)
        cells = outcomes.cells_frame()
        named = {str(cell): reason.said for cell, reason in failures.items()}
        tables.write(folder, cells, outcomes.trials_frame(), grid.metric, caption(outcomes, cells), failures=named)
        _draw(folder, cells, grid.metric)
    if interrupted:
        _say(console, f"interrupted: the same command with --output {folder} goes on")
        raise KeyboardInterrupt
    _say(console, "\n" + tables.plain(cells, grid.metric))
    for note in [*cells["guarantee"].dropna().unique(), *cells["release"].dropna().unique()]:
        _say(console, note)
    for cell, reason in failures.items():
        _say(console, f"failed: {cell}: {reason.in_full}")
    if work.out_of_time and (left := outcomes.left()):
        _say(console, f"{left} runs are left: the same command with --output {folder} goes on")
    _say(console, f"results: {folder}")
    return folder


class _Work:
    """Runs what is left, and keeps what failed.

    Attributes:
        failures: runs of this call that have no result, with the reason.
        out_of_time: whether the minutes were up before all was begun.
    """

    def __init__(self, outcomes: Outcomes, config: CompareConfig, console: Console) -> None:
        self.outcomes, self.console, self.processes = outcomes, console, config.processes
        self.failures: dict[Cell, Why] = {}
        self.out_of_time = False
        self._until = math.inf if config.minutes is None else time.monotonic() + 60 * config.minutes
        self._begun: set[Cell] = set()
        self._cells: dict[Path, Cell] = {}
        self._waiting: deque[RunConfig] = deque()

    def run(self) -> None:
        """All runs, those of the table as soon as their settings are chosen.

        Raises:
            KeyboardInterrupt: what is under way has been written.
        """
        outcomes = self.outcomes
        left = outcomes.left()
        known = len(outcomes.trials()) + len(outcomes.grid.cells)
        _say(self.console, f"{known} runs, {known - left} of them finished before · {outcomes.folder}")
        with _progress(self.console) as progress:
            bar = progress.add_task("runs", total=known, completed=known - left)
            self._add_ready()
            with contextlib.closing(run_all(self._waiting, self.processes)) as results:
                for path, reason in results:
                    if reason == INTERRUPTED:
                        raise KeyboardInterrupt
                    self._ended(self._cells[path], reason)
                    self._add_ready()
                    total = len(outcomes.trials()) + len(outcomes.grid.cells)
                    progress.update(bar, total=total, completed=total - outcomes.left())
        for cell in outcomes.grid.cells:
            why = None if cell in self._begun else outcomes.why_not(cell)
            if why is not None and not (self.out_of_time and why == NOT_COMPLETE):
                self.failures[cell] = Why.of(why)

    def _add_ready(self) -> None:
        """Puts what can be run in line; nothing any more when the minutes are up."""
        if time.monotonic() >= self._until:
            self.out_of_time = True
            self._waiting.clear()
            return
        for cell, places in self.outcomes.ready():
            if cell not in self._begun:
                self._begun.add(cell)
                config = self.outcomes.grid.config(cell, places)
                path = self.outcomes.folder / cell.path
                self._cells[path] = cell
                self._waiting.append(dataclasses.replace(config, run=dataclasses.replace(config.run, output=path)))

    def _ended(self, cell: Cell, reason: Why | None) -> None:
        self.outcomes.refresh(cell)
        if self.outcomes.ended(cell):
            summary = self.outcomes.summary(cell)
            measure = MEASURES[self.outcomes.grid.metric]
            note = "" if summary["status"] == "finished" else f"   {summary['status']}"
            note += "   no privacy guarantee (ε = ∞)" if summary.get("guarantee") else ""
            name = self.outcomes.grid.metric.replace("-", " ")
            name = f"token {name}" if name == "accuracy" and "perplexity_after" in summary else name
            _say(self.console, f"{cell}   {name} {measure.shown(summary[measure.after])}{note}")
        elif self.outcomes.diverged(cell):
            _say(self.console, f"{cell}   diverged: {reason.in_full if reason else 'too few usable updates'}")
        else:
            assert reason is not None
            self.failures[cell] = reason
            _say(self.console, f"{cell}   failed: {reason.in_full}")


def _draw(folder: Path, cells: DataFrame, metric: Metric) -> None:
    """comparison.png, where a cell has ended."""
    if cells["status"].isin(ENDED).any():
        image = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            plot.draw(cells, metric).savefig(image, format="png", dpi=160)
        write_bytes_atomically(folder / "comparison.png", image.getvalue())


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
        _write_definition(folder, new)
        return
    old = {**own_defaults(), **read_definition(folder)}
    different = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if different == ["search_trials"] and new["search_trials"] > old["search_trials"]:
        _write_definition(folder, new)  # further ones follow those that were drawn
    elif different and not (own_defaults().keys().isdisjoint(different) and _same_runs(grid, Grid.read(folder))):
        raise ValueError(
            f"{folder} holds another comparison ({', '.join(different)} differ): choose another --output, or go on "
            f"with its own {DEFINITION} as --config."
        )


def _same_runs(one: Grid, other: Grid) -> bool:
    """Whether two grids, of the same cells, run them alike: a default that is written out changes nothing."""
    return all(one.config(cell, None).to_yaml() == other.config(cell, None).to_yaml() for cell in one.cells)


def _write_definition(folder: Path, definition: Mapping[str, Any]) -> None:
    text = yaml.safe_dump(definition, sort_keys=False, allow_unicode=True)
    write_atomically(folder / DEFINITION, f"# lora-dp compare --config {DEFINITION}\n{text}")


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
