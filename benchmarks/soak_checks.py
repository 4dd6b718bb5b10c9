"""What must hold of a run that was killed and resumed: its ledger beside what truly left, and nothing lost.

The record that :mod:`benchmarks.soak_child` leaves knows nothing of the ledger; its ε is worked out here with
``dp-accounting`` alone, from below.
"""

import functools
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

from benchmarks.soak_child import planned_fault
from lora_dp.fed.runs import checkpoint
from lora_dp.fed.runs.folder import SERVER_ONLY, whole_lines

Entry = dict[str, Any]


def lines(path: Path) -> list[Entry]:
    """Of a JSON-lines file, without one at the end that a kill cut off; none where there is no file."""
    return [json.loads(line) for line in whole_lines(path)]


@functools.lru_cache(maxsize=4096)
def _least_epsilon(releases: tuple[tuple[float, float, int], ...], delta: float) -> float:
    total = None
    for sigma, rate, count in releases:
        # Rounded down: a ledger that is right is never below it.
        one = from_gaussian_mechanism(
            sigma,
            pessimistic_estimate=False,
            value_discretization_interval=1e-3,
            sampling_prob=rate,
            use_connect_dots=False,
        )
        part = one.self_compose(count)
        total = part if total is None else total.compose(part)
    return 0.0 if total is None else float(total.get_epsilon_for_delta(delta))


def _truth(record: list[Entry], reproducible: bool) -> dict[Any, list[Entry]]:
    """What left, by client: in a reproducible run the same bits count once, else everything counts."""
    left: dict[Any, list[Entry]] = {}
    places = set()
    for entry in record:
        place = entry["round"], entry["turn"], entry["client"]
        if not (reproducible and place in places):
            left.setdefault(entry["client"], []).append(entry)
        places.add(place)
    return left


def rounds_of_one_draw(entries: list[Entry], reproducible: bool) -> list[Entry]:
    """Under the server's noise the turns of a round share a draw: n of them are one release with 1/σ² = Σ 1/σₜ².

    A process that goes on after a kill draws anew, but in a reproducible run the same: there one may have done the
    first turn, and the next one the second.
    """
    draws: dict[tuple[int, int], list[Entry]] = {}
    for entry in entries:
        draws.setdefault((0 if reproducible else entry["process"], entry["round"]), []).append(entry)
    return [{**turns[0], "sigma": sum(turn["sigma"] ** -2 for turn in turns) ** -0.5} for turns in draws.values()]


def log_violations(folder: Path, record: list[Entry], reproducible: bool) -> Iterator[str]:
    """At any moment: what has left was in the log before, as often."""
    logged = Counter(
        (entry["round"], client)
        for entry in lines(folder / "ledger.jsonl")[1:]
        for client in entry["clients"] or ["all"]
    )
    begun = {(entry["process"], entry["round"], entry["client"]) for entry in record}
    for place, times in Counter((number, client) for _, number, client in begun).items():
        if logged[place] < (1 if reproducible else times):
            yield f"round {place[0]} of client {place[1]} left {times} times, and is in the log {logged[place]} times"
    digests: dict[Any, set[str]] = {}
    for entry in record:
        digests.setdefault((entry["round"], entry["turn"], entry["client"]), set()).add(entry["digest"])
    if reproducible:
        yield from (f"other bits left for {place} under the same noise" for place, of in digests.items() if len(of) > 1)
    elif len({entry["digest"] for entry in record}) < len(record):
        yield "the same secret noise was used twice"


def ledger_violations(folder: Path, record: list[Entry], job: Entry) -> Iterator[str]:
    """At the end: no client's ledger is below what left it, by count, noise, rate and ε; none is above the budget."""
    options = job["options"]
    account = json.loads((folder / "ledger.json").read_text())
    ledgers = {client["client"]: client for client in account["clients"]}
    for client, entries in _truth(record, options["reproducible"]).items():
        entries = rounds_of_one_draw(entries, options["reproducible"]) if client == "all" else entries
        kept, true = ledgers[client]["ledger"]["entries"], sum(entry["steps"] for entry in entries)
        counted = min(ledgers[client]["steps"], sum(entry["count"] for entry in kept))
        if counted < true:
            yield f"client {client}: {true} releases left, the ledger has {counted}"
        least_noise, largest_rate = min(e["sigma"] for e in entries), max(e["rate"] for e in entries)
        if any(entry["noise_multiplier"] > least_noise * (1 + 1e-9) for entry in kept):
            yield f"client {client}: less noise than in the ledger"
        if any(entry["sample_rate"] < largest_rate * (1 - 1e-9) for entry in kept):
            yield f"client {client}: a higher rate than in the ledger"
        kinds = Counter[tuple[float, float]]()
        for entry in entries:
            kinds[entry["sigma"], entry["rate"]] += entry["steps"]
        # To 12 digits, so that roundings make no kinds of their own.
        least = _least_epsilon(
            tuple((float(f"{sigma:.12g}"), rate, count) for (sigma, rate), count in kinds.items()), options["delta"]
        )
        if not least * (1 - 1e-6) <= ledgers[client]["epsilon"] <= account["worst_epsilon"]:
            yield f"client {client}: ε of at least {least} left, the ledger has {ledgers[client]['epsilon']}"
    if not account["worst_epsilon"] <= options["epsilon"] * (1 + 1e-9):
        yield f"ε {account['worst_epsilon']} above the budget {options['epsilon']}"


def loss_violations(folder: Path, job: Entry) -> Iterator[str]:
    """At the end: every round, line, fault and file is there, and nothing else."""
    options, turns = job["options"], job["turns"]
    summary, metrics = json.loads((folder / "summary.json").read_text()), lines(folder / "metrics.jsonl")
    account = json.loads((folder / "ledger.json").read_text())
    rounds = summary["rounds"]
    if [entry["round"] for entry in metrics] != list(range(rounds + 1)):
        yield f"metrics.jsonl has rounds {[entry['round'] for entry in metrics]} of {rounds}"
    if summary["worst_epsilon"] != account["worst_epsilon"]:
        yield "summary.json and ledger.json disagree about ε"
    if summary["status"] == "budget spent":
        most = job["planned_releases"] - job["releases_per_round"]
        if options["reproducible"] or any(client["steps"] <= most for client in account["clients"]):
            yield "the run ended as budget spent, but a budget was left"
    elif (summary["status"], rounds) != ("finished", options["rounds"]):
        yield f"the run ended as {summary['status']} after round {rounds} of {options['rounds']}"
    for entry in metrics[1:]:
        yield from _fault_violations(entry, job)
    if job["rate_is_secret"]:
        for entry in lines(folder / SERVER_ONLY):
            yield from _fault_violations({**entry, "participants": []}, job)
    elif [(e["round"], e["turn"]) for e in lines(folder / "updates.jsonl")] != [
        (number, turn) for number in range(1, rounds + 1) for turn in range(turns)
    ]:
        yield "updates.jsonl lacks a line"
    yield from _file_violations(folder, rounds, summary["status"] == "budget spent")


def _file_violations(folder: Path, rounds: int, spent: bool) -> Iterator[str]:
    kept = checkpoint.rounds(folder)
    # One more where a kill came before the oldest went and no other checkpoint followed. Where the budget was spent on
    # the round that was cut off, nothing clears up its half of a checkpoint either.
    if checkpoint.newest(folder)[1] or len(kept) > checkpoint.KEPT + 1 or not (spent or kept[-1] == rounds):
        yield f"checkpoints {kept} after round {rounds}"
    wanted = ("config.yaml", "curves.png", "adapter/adapter_model.safetensors", "adapter/adapter_config.json")
    yield from (f"{name} is missing" for name in wanted if not (folder / name).exists())
    left = [path for pattern in ("*.tmp", ".adapter-*") for path in folder.rglob(pattern)]
    left = [path for path in left if not (spent and path.parent.name == checkpoint.FOLDER)]
    left += list(folder.with_name("temporary").iterdir())
    yield from (f"{path.relative_to(folder.parent)} was left behind" for path in left)


def _fault_violations(entry: Entry, job: Entry) -> Iterator[str]:
    """The clients that a round left out are those that were made to fail."""
    planned = planned_fault(job["seed"], entry["round"], job["options"]["clients"], job["turns"])
    found = [failed["client"] for failed in entry["failed"]]
    # A client that is alone in its round is spared.
    expected = planned[0] if planned and (found or entry["participants"] != [planned[0]]) else None
    if any(client != expected for client in found) or expected in (entry["participants"] or []):
        yield f"round {entry['round']}: clients {found} were left out, client {expected} was made to fail"
    if entry["participants"] is not None and entry.get("accuracy") is not None and not math.isfinite(entry["loss"]):
        yield f"round {entry['round']}: the model is not finite"


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves but how long it took, tensors as bytes."""
    tensors, numbers = checkpoint.read(folder, checkpoint.rounds(folder)[-1])
    skipped = (
        ".lock",
        "config.yaml",
        "ledger.jsonl",
        "ledger.jsonl.heads",
        "metrics.jsonl",
        "summary.json",
        "curves.png",
        SERVER_ONLY,
    )
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in skipped and path.parent.name != checkpoint.FOLDER
    }
    return {
        "files": files,
        "numbers": numbers,
        # A round that is run again writes down its failures again.
        "failures": {json.dumps(entry) for entry in lines(folder / SERVER_ONLY)},
        "state": {name: (tensor.dtype, tensor.numpy().tobytes()) for name, tensor in tensors.items()},
        "metrics": [_timeless(entry) for entry in lines(folder / "metrics.jsonl")],
        "summary": _timeless(json.loads((folder / "summary.json").read_text())),
    }


def _timeless(entry: Entry) -> Entry:
    return {name: value for name, value in entry.items() if name != "seconds"}
