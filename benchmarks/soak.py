"""A soak: federation after federation, killed at random moments, resumed, with clients that fail; nothing may be lost.

    python -m benchmarks.soak --minutes 60 --seed 0

Every run is a small one of the embedded default. Each of its processes is killed at a random moment or at a random
write, or is left alone; the next one goes on, to the end. Then the ledger is held against an independent record of what
left the clients, and everything else against what must be there (:mod:`benchmarks.soak_checks`). The exit status is 1
if anything was violated; such a run's folder is kept.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks import soak_child
from benchmarks.soak_checks import ledger_violations, lines, log_violations, loss_violations, outcome
from lora_dp.fed.config import RunConfig
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.runs.folder import ENDED, SERVER_ONLY

METHODS = (
    "la-lora",
    "dp-lora",
    "ffa-lora",
    "rolora",
    "deer",
    "flora",
    "flexlora",
    "lora-fair",
    "rac-lora",
    "galore",
    "flat-lora:la-lora",
)
# A small bound on whole clients, whose noise would else drive so few of them to infinity.
WHOLE = {"unit": "client", "delta": 0.01, "max_update_norm": 0.01}
UNITS: tuple[dict[str, Any], ...] = (
    {"unit": "example", "delta": 1e-5},
    {"noise_by": "client", **WHOLE},
    {"noise_by": "server", **WHOLE},
)
MOST_KILLS = 12
# A process that hangs by itself, or grows by more than this while it works (MiB), is a violation.
SECONDS, GROWTH = 300.0, 32.0
LONG = 60


def draw_options(rng: random.Random) -> dict[str, Any]:
    """A run's settings: method, unit, sizes and secrecy at random; one run in twenty is long, for its memory."""
    clients = rng.randint(3, 5)
    options = {
        "method": rng.choice(METHODS),
        "clients": clients,
        "rounds": rng.randint(3, 6),
        "local_steps": rng.randint(1, 2),
        "batch_size": 16,
        "epsilon": rng.choice([1.0, 3.0, 8.0]),
        "accountant": rng.choice(["rdp"] * 7 + ["pld"]),
        "clients_per_round": rng.choice([None, clients - 1]),
        "checkpoint_every": rng.choice([1, 1, 2, 3]),
        "evaluate_every": rng.randint(1, 2),
        "reproducible": rng.random() < 0.5,
        "seed": rng.randrange(10),
        "client_timeout": 30.0,
        "validation_fraction": 0.05,
        "device": "cpu",
        **rng.choice(UNITS * 2 + UNITS[:1]),
    }
    if rng.random() < 0.05:
        options |= {"rounds": LONG, "local_steps": 1, "accountant": "rdp"}
    if options["accountant"] == "rdp" and rng.random() < 0.3:
        options |= {"partition": "dirichlet"}
    return options


def make_job(options: dict[str, Any], seed: int, place: Path) -> dict[str, Any]:
    """What processes and checks need to know of a run; noise is calibrated here, once."""
    plan = Federation.from_config(RunConfig.from_flat(options)).plan
    place.mkdir(parents=True)
    (place / "temporary").mkdir()
    return {
        "folder": str(place / "run"),
        "record": str(place / "record.jsonl"),
        "options": options,
        "seed": seed,
        "rate": plan.client_rate,
        "turns": plan.turns,
        "rate_is_secret": plan.server_adds_noise,
        "planned_releases": plan.planned_releases,
        "releases_per_round": plan.releases_per_round,
        "process": 0,
        "outage": None,
        "dies_at": None,
        "draws": False,
    }


class Soak:
    """Runs until the time is over, and counts.

    Args:
        folder: to work in.
        seed: of all that is drawn here; when a kill strikes also depends on the machine.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.methods: Counter[str] = Counter()
        self.violations: list[str] = []
        self.seconds_per_round, self.peak, self.growth = 0.2, 0.0, 0.0

    def work(self, seconds: float) -> None:
        """Runs for so long; the last run is ended without kills."""
        begin = time.monotonic()
        end, said = begin + seconds, begin
        while time.monotonic() < end:
            self.one_run(end)
            if time.monotonic() > said + 60:
                said = time.monotonic()
                print(f"{(said - begin) / 60:.0f} min: {json.dumps(self.figures(said - begin))}", flush=True)

    def one_run(self, end: float = float("inf")) -> None:
        """One federation, killed until it has ended (after ``end``, killed no more), and all checks."""
        number = self.counts["runs"] + 1
        place, rng = self.folder / str(number), self.rng
        job = make_job(draw_options(rng), rng.randrange(10**9), place)
        options, folder = job["options"], Path(job["folder"])
        expected = None
        if options["reproducible"]:
            whole = make_job(options, job["seed"], place / "whole")
            if self.process({**whole, "draws": rng.random() < 0.1}, None) != soak_child.DONE:
                self.violate(place, options, ["the run that nobody kills does not end"])
                return
            expected = outcome(Path(whole["folder"]))
        found: list[str] = []
        while not found and not ended(folder):
            kills = self.counts["kills"]
            calm = job["process"] >= MOST_KILLS or time.monotonic() > end or rng.random() < 0.1
            death = None if calm else rng.choice(["moment", "write"])
            job |= {
                "process": job["process"] + 1,
                "draws": rng.random() < 0.1,
                "dies_at": rng.randint(1, 60) if death == "write" else None,
                "outage": rng.randint(1, options["rounds"])
                if not calm and not job["rate_is_secret"] and rng.random() < 0.05
                else None,
            }
            moment = rng.uniform(0, self.seconds_per_round * options["rounds"])
            status = self.process(job, moment if death == "moment" else None)
            found += log_violations(folder, lines(Path(job["record"])), options["reproducible"])
            found += (
                [f"a process ended with status {status}"]
                if status not in (soak_child.DONE, soak_child.TOO_FEW, -signal.SIGKILL)
                else []
            )
            found += ["a process was killed by nobody"] if calm and self.counts["kills"] > kills else []
        if not found:
            record = lines(Path(job["record"]))
            found += [*ledger_violations(folder, record, job), *loss_violations(folder, job)]
            if expected is not None:
                found += [
                    f"{name} differ from the uninterrupted run's"
                    for name, value in outcome(folder).items()
                    if value != expected[name]
                ]
                self.counts["compared bit by bit"] += 1
            self._count(folder, record)
        self.methods[options["method"]] += 1
        self.violate(place, options, found)

    def _count(self, folder: Path, record: list[dict[str, Any]]) -> None:
        metrics = lines(folder / "metrics.jsonl")
        self.counts["rounds"] += len(metrics) - 1
        self.counts["rounds begun"] += len(lines(folder / "ledger.jsonl")) - 1
        self.counts["updates recorded"] += len(record)
        # With noise by the server the same failure may be written down twice, by two processes.
        secret = {entry["round"]: entry for entry in lines(folder / SERVER_ONLY)}
        self.counts["client faults"] += sum(len(entry["failed"]) for entry in [*metrics, *secret.values()])
        summary = json.loads((folder / "summary.json").read_text())
        self.counts[summary["status"]] += 1

    def violate(self, place: Path, options: dict[str, Any], found: list[str]) -> None:
        """Ends a run: its folder goes if nothing was found."""
        self.counts["runs"] += 1
        if not found:
            shutil.rmtree(place)
        for what in found:
            self.violations.append(f"{place}: {what} ({options})")
            print(self.violations[-1], flush=True)

    def process(self, job: dict[str, Any], kill_after: float | None) -> int:
        """One process to its end, or to its kill after so many seconds; returns its exit status."""
        reading, writing = os.pipe()
        begin = time.monotonic()
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            os.close(reading)
            os._exit(soak_child.work(job, writing))
        os.close(writing)
        limit = begin + (SECONDS if kill_after is None else kill_after)
        try:
            while not (waited := os.wait4(child, os.WNOHANG))[0] and time.monotonic() < limit:
                time.sleep(0.002)
        finally:
            if not waited[0]:
                os.kill(child, signal.SIGKILL)
                waited = os.wait4(child, 0)
        with os.fdopen(reading, "rb") as file:
            error = file.read().decode()
        status, took = os.waitstatus_to_exitcode(waited[1]), time.monotonic() - begin
        if error:
            print(error, flush=True)
        if status == -signal.SIGKILL and kill_after is None and job["dies_at"] is None:
            self.violations.append(f"a process hung for {took:.0f} s: {job}")
        self.counts["processes"] += 1
        self.counts["kills"] += status == -signal.SIGKILL
        self.counts["kills at a write"] += status == -signal.SIGKILL and job["dies_at"] is not None
        self.counts["outages"] += status == soak_child.TOO_FEW
        if status == soak_child.DONE and job["process"] == 0:
            self.seconds_per_round += 0.1 * (took / job["options"]["rounds"] - self.seconds_per_round)
        self._look_for_remains(child, job)
        self.peak = max(self.peak, waited[2].ru_maxrss / 1024)
        return status

    def _look_for_remains(self, child: int, job: dict[str, Any]) -> None:
        """No process of the child's group is left, none waits to be collected, and it did not grow as it worked."""
        try:
            os.killpg(child, 0)
            self.violations.append(f"a process was left behind: {job}")
        except ProcessLookupError:
            pass
        try:
            os.waitpid(-1, os.WNOHANG)
            self.violations.append(f"a zombie was left behind: {job}")
        except ChildProcessError:
            pass
        peaks = [entry["peak"] / 1024 for entry in lines(Path(job["record"])) if entry["process"] == job["process"]]
        if len(peaks) >= 2 * LONG:
            growth = peaks[-1] - peaks[len(peaks) // 4]
            self.counts["processes watched for growth"] += 1
            self.growth = max(self.growth, growth)
            if growth > GROWTH:
                self.violations.append(f"a process grew by {growth:.0f} MiB: {job}")

    def figures(self, seconds: float) -> dict[str, Any]:
        """Counts so far; memory in MiB."""
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {
            "violations": len(self.violations),
            "seconds": round(seconds),
            **self.counts,
            "peak MiB of a process": round(self.peak),
            "largest growth MiB": round(self.growth, 1),
            "peak MiB of the script": round(own),
            "methods": dict(sorted(self.methods.items())),
        }


def ended(folder: Path) -> bool:
    """Whether nothing is left to resume."""
    path = folder / "summary.json"
    return path.exists() and json.loads(path.read_text())["status"] in ENDED


def main(arguments: list[str] | None = None) -> int:
    """The soak as a command; returns the exit status."""
    parser = argparse.ArgumentParser(description="Kills and resumes federations; nothing may be lost.")
    parser.add_argument("--minutes", type=float, default=2.0, help="how long (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of runs, faults and kills (default: 0)")
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    soak, begin = Soak(folder, chosen.seed), time.monotonic()
    soak.work(60 * chosen.minutes)
    figures = {**soak.figures(time.monotonic() - begin), "seed": chosen.seed, "violated": soak.violations}
    text = json.dumps(figures, indent=1, ensure_ascii=False)
    print(text)
    if chosen.out is not None:
        chosen.out.write_text(text + "\n")
    if not soak.violations:
        shutil.rmtree(folder)
    return int(bool(soak.violations))


if __name__ == "__main__":
    sys.exit(main())
