"""Mutation testing: small mistakes are put into the code that privacy rests on, one at a time; a test must notice each.

    python -m tests.mutation                              # all; goes on where it was interrupted
    python -m tests.mutation --only lora_dp/privacy/noise.py      # one file
    python -m tests.mutation --sample 25 --seed 1         # as many, drawn
    python -m tests.mutation --list                       # the mutants alone

A mutant that no test notices has survived: a test is missing, or the mistake is none, and then it is written down with
the reason in ``equivalents.toml``. The exit status is 1 if one survived that is not written down there, or if one that
is written down is no mutant any more.
"""

import argparse
import json
import random
import sys
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tests.mutation.cpp_mistakes import cpp_mutants
from tests.mutation.mutant import Mutant
from tests.mutation.python_mistakes import python_mutants
from tests.mutation.targets import TARGETS
from tests.mutation.workbench import ROOT, Workbench

EQUIVALENTS = Path(__file__).with_name("equivalents.toml")
WORK = ROOT / "build" / "mutation"
# Tests that have noticed most mutants of the same function, tried before all others.
_LIKELY = 4


def mutants_of(path: str) -> list[Mutant]:
    """All mutants of a file of the repository, in its order."""
    source = (ROOT / path).read_text(encoding="utf-8")
    return python_mutants(path, source) if path.endswith(".py") else cpp_mutants(path, source)


def equivalents() -> dict[str, str]:
    """The reason why no test can, or need, notice a mutant, by the mutant's id."""
    entries = tomllib.loads(EQUIVALENTS.read_text(encoding="utf-8"))
    return {mutant: reason for reason, mutants in entries.items() for mutant in mutants}


class Record:
    """What became of each mutant, as lines of JSON in a file; and from that, which tests notice what."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                self.found[entry["id"]] = entry

    def add(self, entry: dict[str, Any]) -> None:
        """Keeps it, on disk too."""
        self.found[entry["id"]] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def likely(self, mutant: Mutant, interpreted: bool) -> list[str]:
        """Tests that have noticed mistakes in this function, then in this file: those that noticed most first."""
        here: Counter[str] = Counter()
        near: Counter[str] = Counter()
        for name, entry in list(self.found.items()):  # one thread reads while another adds
            if (
                entry["test"]
                and name.startswith(f"{mutant.path}::")
                and (entry["test"].partition("::")[0] in tests_of(mutant, interpreted))
            ):
                (here if name.startswith(f"{mutant.path}::{mutant.function}::") else near)[entry["test"]] += 1
        order = [test for test, _ in here.most_common(_LIKELY)] + [test for test, _ in near.most_common(2)]
        return list(dict.fromkeys(order))


def run(mutants: Sequence[Mutant], record: Record, work: Path, jobs: int, until: float) -> Iterator[dict[str, Any]]:
    """Tries mutants out, in so many copies of the repository, until all are or the time is over."""
    noticed: set[str] = set()
    for interpreted in (False, True):
        chosen = [m for m in mutants if tests_of(m, interpreted) and m.id not in noticed]
        with ExitStack() as opened, ThreadPoolExecutor(jobs) as pool:
            benches: SimpleQueue[Workbench] = SimpleQueue()
            for number in range(min(jobs, len(chosen))):
                folder = work / f"{'interpreted' if interpreted else 'plain'}-{number}"
                benches.put(opened.enter_context(Workbench(folder, interpreted=interpreted)))

            def one(
                mutant: Mutant, benches: SimpleQueue[Workbench] = benches, interpreted: bool = interpreted
            ) -> dict[str, Any] | None:
                if time.monotonic() > until:
                    return None
                bench = benches.get()
                try:
                    return bench.try_out(mutant, tests_of(mutant, interpreted), record.likely(mutant, interpreted))
                finally:
                    benches.put(bench)

            for mutant, found in zip(chosen, pool.map(one, chosen), strict=True):
                if found is None or (found["status"] == "survived" and not interpreted and tests_of(mutant, True)):
                    continue
                noticed.add(mutant.id)
                record.add({"id": mutant.id, **found})
                yield record.found[mutant.id]


def tests_of(mutant: Mutant, interpreted: bool) -> list[str]:
    """The tests that are to notice a mutant, with Triton's kernels in its interpreter or without them."""
    target = TARGETS[mutant.path]
    return list(target.interpreted if interpreted else target.tests)


def table(mutants: Iterable[Mutant], record: Record, written_down: dict[str, str]) -> str:
    """Counts by file, as Markdown."""
    kinds = ("killed", "timeout", "survived", "equivalent", "same code", "not compiled", "not run")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for mutant in mutants:
        found = record.found.get(mutant.id, {"status": "not run"})["status"]
        counts[mutant.path]["equivalent" if mutant.id in written_down else found] += 1
    counts["all"] = sum(counts.values(), Counter())
    lines = [f"| file | mutants | {' | '.join(kinds)} |", "| --- |" + " ---: |" * (len(kinds) + 1)]
    for path, count in counts.items():
        lines.append(f"| {path} | {count.total()} | {' | '.join(str(count[kind]) for kind in kinds)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutation", description="Puts small mistakes into the code; a test must notice each."
    )
    parser.add_argument("--only", action="append", choices=list(TARGETS), metavar="FILE", help="mutate this file alone")
    parser.add_argument("--match", default="", help="mutants with this in their id alone")
    parser.add_argument("--sample", type=int, help="draw so many (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end after so long (default: never)")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time (default: 1)")
    parser.add_argument(
        "--work",
        type=Path,
        default=WORK,
        help="folder of the copies and of record.jsonl, what was "
        "found; what was noticed there is not run again (default: build/mutation)",
    )
    parser.add_argument("--list", action="store_true", help="list the mutants, run none")
    chosen = parser.parse_args(arguments)
    everything = [mutant for path in TARGETS for mutant in mutants_of(path)]
    written_down, known = equivalents(), {mutant.id for mutant in everything}
    gone = [name for name in written_down if name not in known]
    for name in gone:
        print(f"written down as equivalent, and no mutant: {name}")
    mutants = [m for m in everything if (not chosen.only or m.path in chosen.only) and chosen.match in m.id]
    if chosen.sample is not None:
        possible = [m for m in mutants if m.id not in written_down]
        mutants = random.Random(chosen.seed).sample(possible, min(chosen.sample, len(possible)))
    if chosen.list:
        print("\n".join(mutant.id for mutant in mutants))
        return int(bool(gone))
    record = Record(chosen.work / "record.jsonl")
    to_run = [
        m
        for m in mutants
        if m.id not in written_down and record.found.get(m.id, {}).get("status", "survived") == "survived"
    ]
    for entry in run(to_run, record, chosen.work, chosen.jobs, time.monotonic() + 60 * chosen.minutes):
        print(f"{entry['status']:>12} {entry['seconds']:6.1f} s  {entry['id']}", flush=True)
    print(table(mutants, record, written_down))
    survived = [
        m.id for m in mutants if m.id not in written_down and record.found.get(m.id, {}).get("status") == "survived"
    ]
    for name in survived:
        print(f"survived: {name}")
    return int(bool(gone or survived))


if __name__ == "__main__":
    sys.exit(main())
