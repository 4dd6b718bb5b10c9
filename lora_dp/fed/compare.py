"""A grid of runs, methods × ε × seeds: which cells there are, and running those that are left."""

import contextlib
import dataclasses
import fcntl
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pandas import DataFrame
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_dp.fed import tables
from lora_dp.fed.cells import INTERRUPTED, run_all
from lora_dp.fed.config import RunConfig
from lora_dp.fed.folder import ENDED
from lora_dp.files import write_atomically

DEFINITION = "compare.yaml"
FAILURES = "failures.json"
_BY_GRID = ("method", "epsilon", "seed", "output")
Budget = float | Literal["none"]


@dataclass
class CompareConfig:
    """The grid"""

    methods: list[str] = field(default_factory=lambda: ["la-lora", "dp-lora", "ffa-lora", "rolora"])
    """Methods to compare: the rows of the table."""
    epsilons: list[float | Literal["none"]] = field(default_factory=lambda: [1.0, 3.0, 8.0, "none"])
    """Budgets of every client, none for no privacy: the columns."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Each cell is run once with each of these; the table has mean and spread over them."""
    processes: int = 1
    """Runs at the same time, each in a process of its own with one thread for the CPU."""
    output: Path | None = None
    """Folder of the comparison, the same again to go on with it; by default runs/<time>-compare."""

    def __post_init__(self) -> None:
        self.epsilons = ["none" if e in ("none", "inf", None, float("inf")) else float(e) for e in self.epsilons]
        if self.processes < 1:
            raise ValueError(f"processes must be at least 1, not {self.processes}.")
        for name in ("methods", "epsilons", "seeds"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name} is empty: give at least one.")
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has {max(values, key=values.count)} twice: leave one out.")


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    method: str
    epsilon: Budget
    seed: int

    @property
    def path(self) -> Path:
        """Its folder, within that of the comparison."""
        budget = "none" if self.epsilon == "none" else f"{self.epsilon:.12g}"
        return Path("cells") / self.method.replace(":", "-") / f"eps{budget}" / f"seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.method}, {tables.budget_name(self.epsilon)}, seed {self.seed}"


class Grid:
    """All cells of a comparison, and what they have in common.

    Args:
        config: methods, budgets and seeds.
        common: options of a run as :meth:`RunConfig.from_flat` takes them, without those that the grid sets.

    Raises:
        ValueError: an option that the grid sets, or one that does not fit a cell, which is named.
    """

    def __init__(self, config: CompareConfig, common: Mapping[str, Any]) -> None:
        if found := [name for name in _BY_GRID if name in common]:
            raise ValueError(f"The grid sets {found[0]} of its cells: leave it out of the common options.")
        self.cells = [Cell(m, e, s) for m in config.methods for e in config.epsilons for s in config.seeds]
        self.common = {**_defaults(), **common}
        self._lists = {name: list(getattr(config, name)) for name in ("methods", "epsilons", "seeds")}
        self.configs: dict[Cell, RunConfig] = {}
        for cell in self.cells:
            options = {"method": cell.method, "epsilon": cell.epsilon, "seed": cell.seed}
            try:
                self.configs[cell] = RunConfig.from_flat({**common, **options})
            except ValueError as error:
                raise ValueError(f"The cell {cell} cannot be run: {error}") from error
        if len({cell.path for cell in self.cells}) < len(self.cells):
            raise ValueError("Two cells of the grid would share a folder: leave out methods or budgets nearly alike.")

    @property
    def example(self) -> RunConfig:
        """The configuration of one cell, for what all have in common."""
        return self.configs[self.cells[0]]

    def definition(self) -> dict[str, Any]:
        """Everything that defines the results, as plain values."""
        plain = json.loads(json.dumps({**self._lists, **self.common}, default=str))
        return {str(name): value for name, value in plain.items()}

    @classmethod
    def read(cls, folder: Path) -> "Grid":
        """The grid of an existing comparison.

        Raises:
            ValueError: there is none, or its definition is damaged.
        """
        given = _read_definition(folder)
        own = {name: given.pop(name) for name in ("methods", "epsilons", "seeds") if name in given}
        return cls(CompareConfig(**own), given)


def compare(config: CompareConfig, common: Mapping[str, Any], console: Console | None = None) -> Path:
    """Runs all cells of a grid that have not finished, and writes tables and plot (:mod:`lora_dp.fed.tables`).

    A cell that a crash or Ctrl-C cut short is resumed. One that fails is a dash in the table, and the others go on;
    the next call tries it again. With several processes call it under ``if __name__ == "__main__":``, since they
    import the calling script.

    Args:
        common: options of a run as :meth:`RunConfig.from_flat` takes them, for all cells; method, epsilon, seed and
            output are the grid's.

    Returns:
        The folder of the comparison: compare.yaml, cells/<method>/eps<ε>/seed<seed>/, comparison.md, .csv, .tex and
        .png, and failures.json where a cell failed.

    Raises:
        ValueError: an option that does not fit, of any cell; a folder with another comparison. Nothing has been run.
        KeyboardInterrupt: Ctrl-C; the tables of what has finished are written, and a further call goes on.
    """
    console = console or Console()
    grid = Grid(config, common)
    folder = config.output or _fresh()
    with _held(folder):
        _check_definition(grid, folder)
        left = [cell for cell in grid.cells if ended_summary(folder / cell.path) is None]
        jobs = [_placed(grid.configs[cell], folder / cell.path) for cell in left]
        by_path = {folder / cell.path: cell for cell in left}
        total, interrupted = len(grid.cells), False
        failures: dict[Cell, str] = {}
        _say(console, f"{total} cells, {total - len(left)} of them finished before · {folder}")
        with _progress(console) as progress, contextlib.closing(run_all(jobs, config.processes)) as results:
            bar = progress.add_task("cells", total=total, completed=total - len(left))
            try:
                for path, reason in results:
                    if reason == INTERRUPTED:
                        raise KeyboardInterrupt
                    if reason is not None:
                        failures[by_path[path]] = reason
                    _say(console, _line(by_path[path], path, reason))
                    progress.advance(bar)
            except KeyboardInterrupt:
                interrupted = True
        _write_failures(folder, failures)
        cells = read_cells(grid, folder)
        tables.write(folder, cells, caption(grid, cells), failures={str(c): r for c, r in failures.items()})
    if interrupted:
        _say(console, f"interrupted: the same command with --output {folder} goes on")
        raise KeyboardInterrupt
    _say(console, "\n" + tables.plain(cells))
    for cell, reason in failures.items():
        _say(console, f"failed: {cell}: {reason}")
    _say(console, f"results: {folder}")
    return folder


def ended_summary(path: Path) -> dict[str, Any] | None:
    """The summary of a cell that has ended, else None."""
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if summary.get("status") in ENDED else None


def read_failures(folder: Path) -> dict[str, str]:
    """Why cells failed in the last call, by their folder within that of the comparison."""
    try:
        entries = json.loads((folder / FAILURES).read_text(encoding="utf-8"))
        return {entry["folder"]: entry["reason"] for entry in entries}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def read_cells(grid: Grid, folder: Path) -> DataFrame:
    """One row a cell, in the order of the grid: its definition, its status, and all numbers of its summary."""
    failures = read_failures(folder)
    rows = []
    for cell in grid.cells:
        summary = ended_summary(folder / cell.path)
        reason = failures.get(cell.path.as_posix()) if summary is None else None
        status = summary["status"] if summary else "failed" if reason else "not finished"
        rows.append(tables.row(cell.method, cell.epsilon, cell.seed, status, reason, cell.path, summary or {}))
    return tables.frame(rows)


def caption(grid: Grid, cells: DataFrame) -> str:
    """What the table shows, and what must be known to read it."""
    return tables.caption(grid.example, cells, tuned=grid.common.get("lr") is None)


def _defaults() -> dict[str, Any]:
    """The options of a run that cells have in common, as flat options."""
    found: dict[str, Any] = {}
    for group in dataclasses.fields(RunConfig):
        kind: Any = group.default_factory
        values = vars(kind())
        found |= {"model": values.pop("name"), **values} if group.name == "model" else values
    return {name: value for name, value in found.items() if name not in _BY_GRID}


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
                f"Another process is at work in {folder}: wait for it, or choose another --output.") from error
        yield


def _read_definition(folder: Path) -> dict[str, Any]:
    try:
        given = yaml.safe_load((folder / DEFINITION).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{folder} holds no comparison ({DEFINITION} is missing or cannot be read): name another.") from error
    if not isinstance(given, dict):
        raise ValueError(f"{folder / DEFINITION} is no definition of a comparison: restore it from a backup.")
    return given


def _check_definition(grid: Grid, folder: Path) -> None:
    if (folder / "config.yaml").exists():
        raise ValueError(f"{folder} holds a run: choose another --output for the comparison.")
    new = grid.definition()
    if not (folder / DEFINITION).exists():
        text = yaml.safe_dump(new, sort_keys=False, allow_unicode=True)
        write_atomically(folder / DEFINITION, f"# python -m lora_dp.fed compare --config {DEFINITION}\n{text}")
        return
    old = {**_defaults(), **_read_definition(folder)}
    different = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if different:
        raise ValueError(
            f"{folder} holds another comparison ({', '.join(different)} differ): choose another --output, or go on "
            f"with its own {DEFINITION} as --config.")


def _placed(config: RunConfig, path: Path) -> RunConfig:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, output=path))


def _write_failures(folder: Path, failures: Mapping[Cell, str]) -> None:
    if failures:
        entries = [{**dataclasses.asdict(c), "folder": c.path.as_posix(), "reason": r} for c, r in failures.items()]
        write_atomically(folder / FAILURES, json.dumps(entries, indent=1, ensure_ascii=False))
    else:
        (folder / FAILURES).unlink(missing_ok=True)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
        TimeRemainingColumn(compact=True), console=console, transient=True, disable=not console.is_terminal)


def _say(console: Console, line: str) -> None:
    console.print(escape(line), highlight=False, soft_wrap=True)


def _line(cell: Cell, path: Path, reason: str | None) -> str:
    summary = ended_summary(path)
    if summary is None:
        return f"{cell}   failed: {reason}"
    note = "" if summary["status"] == "finished" else f"   {summary['status']}"
    return f"{cell}   accuracy {100 * summary['accuracy_after']:.1f} %{note}"
