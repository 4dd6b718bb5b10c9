"""Runs that are killed, at random moments and at every write, and resumed.

``KILLS=40 python -m pytest tests/fed/runs/test_resume.py -s`` kills each kind of run so often, and prints when.
"""

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_dp.fed.config import RunConfig
from lora_dp.fed.launch import resume
from lora_dp.fed.rounds.ledgers import LOG, AheadLog
from lora_dp.fed.rounds.setup import plan_of
from lora_dp.fed.runs import checkpoint
from lora_dp.privacy.accounting import Ledger
from tests.fed.chained import hold
from tests.fed.crashing import warm_process

SEED, KILLS = 20261123, int(os.environ.get("KILLS", "3"))
TINY = {
    "clients": 3,
    "rounds": 3,
    "local_steps": 1,
    "batch_size": 16,
    "accountant": "rdp",
    "device": "cpu",
    "reproducible": True,
    "validation_fraction": 0.05,
}
KINDS: dict[str, dict[str, Any]] = {
    "la-lora": {"method": "la-lora", "clients_per_round": 2},
    "deer": {"method": "deer", "rounds": 2},
    "flora": {"method": "flora", "ranks": [2, 4, 3]},
    "galore": {"method": "galore", "optimizer": "adamw"},
    "lora-xs": {"method": "lora-xs", "clients_per_round": 2},
    "flat-lora": {"method": "flat-lora:lora-fair", "evaluate_every": 2},
    "server noise": {"method": "dp-lora", "unit": "client", "clients_per_round": 2, "delta": 0.01},
    "client noise": {"method": "deer", "unit": "client", "noise_by": "client", "delta": 0.01},
    "rare checkpoints": {"method": "rolora", "checkpoint_every": 2, "rounds": 4},
    "feature sums": {
        "method": "head-only",
        "features": "unit",
        "sums_share": 0.2,
        "warm_start": True,
        "server_optimizer": "momentum",
        "averaging": "tail",
    },
    "feature sums, server noise": {
        "method": "dp-lora",
        "features": "unit",
        "sums_share": 0.2,
        "balanced": True,
        "server_optimizer": "adam",
        "averaging": "ema",
        "unit": "client",
        "delta": 0.01,
    },
}
Work = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def work() -> Iterator[Work]:
    with warm_process() as process:
        yield process


@pytest.fixture(scope="module")
def whole(work: Work, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, float]]:
    """The folder of an uninterrupted run of a kind, and its seconds."""
    done: dict[str, tuple[Path, float]] = {}

    def of(kind: str) -> tuple[Path, float]:
        if kind not in done:
            folder = tmp_path_factory.mktemp("whole") / "run"
            answer = work(folder, options={**TINY, **KINDS[kind]})
            assert answer["status"] == 0, answer["error"]
            done[kind] = folder, answer["seconds"]
        return done[kind]

    return of


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_seconds(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "seconds"}


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves behind but how long it took, tensors as bytes."""
    tensors, numbers = checkpoint.read(folder, checkpoint.rounds(folder)[-1])
    return {
        "files": sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")),
        "adapter": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        "merged": [path.read_bytes() for path in folder.glob("merged.safetensors")],
        "state": {name: (tensor.dtype, tensor.numpy().tobytes()) for name, tensor in tensors.items()},
        "numbers": numbers,
        "metrics": [without_seconds(entry) for entry in lines(folder / "metrics.jsonl")],
        "updates": [path.read_text() for path in folder.glob("updates.jsonl")],
        "ledger": json.loads((folder / "ledger.json").read_text()),
        "summary": without_seconds(json.loads((folder / "summary.json").read_text())),
    }


def ended(folder: Path) -> bool:
    return (folder / "summary.json").exists()


def finish(work: Work, folder: Path, options: dict[str, Any]) -> None:
    """Resumes to the end, if it is not there."""
    if not ended(folder):
        answer = work(folder, options=options)
        assert answer["status"] == 0, answer["error"]


# The kinds that CI kills at random moments.
SOME = {"la-lora", "server noise", "rare checkpoints"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[] if kind in SOME else pytest.mark.long) for kind in KINDS])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(work, whole, tmp_path, kind):
    expected, seconds = whole(kind)
    options, rng = {**TINY, **KINDS[kind]}, random.Random(f"{SEED} {kind}")
    runs, killed = 0, []
    while len(killed) < KILLS:
        runs += 1
        folder = tmp_path / str(runs) / "run"
        folder.parent.mkdir()
        while not ended(folder) and len(killed) < KILLS:
            moment = rng.uniform(0.02, 0.7 * seconds)
            answer = work(folder, options=options, kill_after=moment)
            assert answer["status"] in (0, -9), (killed, answer["error"])
            killed += [round(moment, 3)] if answer["status"] else []
        finish(work, folder, options)
        assert outcome(folder) == outcome(expected)
    print(f"{kind}: seed {SEED}, killed {len(killed)} times in {runs} runs of {seconds:.2f} s, after {killed} s")


def sites(kind: str) -> list[tuple[str, str, int]]:
    """(what is written, when the kill comes, which time): "before" where nothing else was written just before."""
    if kind != "la-lora":
        return [("numbers", "after", 2), ("merged", "after", 1)]
    written = ["log", "metrics", "tensors", "numbers"]
    each_round = [(name, when, 2) for name in written for when in ("before", "after")]
    at_the_end = [(name, "after", 1) for name in ("ledger", "adapter", "picture")]
    return [*each_round, ("training", "after", 5), ("ledger", "before", 1), *at_the_end, ("summary", "before", 1)]


def check_killed(work, whole, folder, kind, crash):
    options = {**TINY, **KINDS[kind]}
    assert work(folder, options=options, crash=crash)["status"] == -9
    finish(work, folder, options)
    assert outcome(folder) == outcome(whole(kind)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "crash"),
    [(kind, site) for kind in ("la-lora", "flora") for site in sites(kind)],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_a_run_killed_at_a_write_ends_with_the_same_bits(work, whole, tmp_path, kind, crash):
    check_killed(work, whole, tmp_path / "run", kind, crash)


# Before the first round: the first time that each is written.
AT_THE_SUMS = [
    ("log", "before", 1),
    ("log", "after", 1),
    ("training", "after", 2),
    ("metrics", "after", 1),
    ("tensors", "after", 1),
    ("log", "after", 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "crash"),
    [
        ("feature sums", ("metrics", "before", 1)),
        ("feature sums", ("numbers", "after", 1)),
        ("feature sums, server noise", ("metrics", "after", 3)),
        *(pytest.param("feature sums", site, marks=pytest.mark.long) for site in AT_THE_SUMS),
        pytest.param("feature sums, server noise", ("metrics", "before", 1), marks=pytest.mark.long),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_a_run_killed_around_its_feature_sums_ends_with_the_same_bits(work, whole, tmp_path, kind, crash):
    """The server's optimizer and average, too, go on where they were."""
    check_killed(work, whole, tmp_path / "run", kind, crash)


@pytest.mark.long
def test_killed_again_and_again_at_each_later_write(work, whole, tmp_path):
    """Every process gets one write further than the one before it, so that each write is the last of some process."""
    folder, options = tmp_path / "run", {**TINY, **KINDS["deer"]}
    count = 0
    while not ended(folder):
        count += 1
        answer = work(folder, options=options, crash=["fsync", "before", count])
        assert answer["status"] in (0, -9), answer["error"]
        assert count < 60
    assert count > 5
    assert outcome(folder) == outcome(whole("deer")[0])


@pytest.mark.slow
def test_a_write_cut_off_in_the_middle_leaves_the_file_before_it(work, whole, tmp_path):
    """The temporary files of a checkpoint are there, half of them written, and nobody minds."""
    folder, options = tmp_path / "run", {**TINY, **KINDS["la-lora"]}
    # config.yaml, then a round's log, tensors, numbers: two renames a round.
    assert work(folder, options=options, crash=["replace", "before", 5])["status"] == -9
    [left] = (folder / "checkpoints").glob("*.tmp")
    left.write_bytes(left.read_bytes()[: left.stat().st_size // 2])
    finish(work, folder, options)
    assert {**outcome(folder), "files": []} == {**outcome(whole("la-lora")[0]), "files": []}
    assert not list((folder / "checkpoints").glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("torn", ["metrics.jsonl", "ledger.jsonl"])
def test_half_a_line_at_the_end_is_no_line(work, whole, tmp_path, torn):
    folder, options = tmp_path / "run", {**TINY, **KINDS["la-lora"]}
    assert work(folder, options=options, crash=["log", "after", 3])["status"] == -9
    content = (folder / torn).read_bytes()
    (folder / torn).write_bytes(content[: content[:-1].rindex(b"\n") + 15])
    if torn == "ledger.jsonl":  # a crash that tears its line comes before the line is held
        hold(folder / torn, 3)
    if torn == "metrics.jsonl":  # its last line had a checkpoint: the one before serves
        for path in (folder / "checkpoints").glob("round-000002.*"):
            path.unlink()
    finish(work, folder, options)
    assert {**outcome(folder), "files": []} == {**outcome(whole("la-lora")[0]), "files": []}


@pytest.mark.slow
def test_whoever_reads_finished_finds_everything(work, whole, tmp_path):
    """summary.json comes last."""
    folder, options = tmp_path / "run", {**TINY, **KINDS["la-lora"]}
    assert work(folder, options=options, crash=["summary", "after", 1])["status"] == -9
    assert outcome(folder) == outcome(whole("la-lora")[0])


@pytest.mark.slow
def test_an_ended_run_is_not_resumed(whole):
    folder, _ = whole("la-lora")
    with pytest.raises(ValueError, match=r"has ended \(finished\): there is nothing to resume"):
        resume(folder)


def test_where_there_is_no_run_nothing_is_resumed(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        resume(tmp_path)


# Secret noise


SECRET: dict[str, dict[str, Any]] = {
    "examples": {"method": "la-lora", "clients_per_round": 2},
    "two turns": {"method": "deer"},
    "rare checkpoints": {"method": "flora", "checkpoint_every": 3, "rounds": 6},
    "client noise": {"method": "dp-lora", "unit": "client", "noise_by": "client", "delta": 0.01},
    "server noise": {"method": "dp-lora", "unit": "client", "clients_per_round": 2, "delta": 0.01},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SECRET)
def test_with_secret_noise_everything_that_may_have_left_is_counted(work, tmp_path, kind):
    folder, rng = tmp_path / "run", random.Random(f"{SEED} secret {kind}")
    options = {**TINY, "rounds": 4, **SECRET[kind], "reproducible": False}
    killed: list[float] = []
    while not ended(folder) and len(killed) < KILLS:
        moment = rng.uniform(0.05, 0.6)
        answer = work(folder, options=options, kill_after=moment)
        assert answer["status"] in (0, -9), answer["error"]
        killed += [round(moment, 3)] if answer["status"] else []
    print(f"{kind}: seed {SEED}, killed after {killed} s")
    finish(work, folder, options)

    begun = lines(folder / "ledger.jsonl")[1:]
    # Every turn that a process began was in the log.
    trained = {tuple(map(int, line.split())) for line in (tmp_path / "trace").read_text().splitlines()}
    if kind == "server noise":  # one release for all; who was drawn is secret
        assert all(entry["clients"] == [] for entry in begun)
        trained = {(process, number, None) for process, number, _ in trained}
    logged = Counter((entry["round"], client) for entry in begun for client in entry["clients"] or [None])
    for place, times in Counter((number, client) for _, number, client in trained).items():
        assert times <= logged[place]
    # The account is what the log says, and ε what it adds up to.
    turns = 2 if kind == "two turns" else 1
    account = json.loads((folder / "ledger.json").read_text())
    by_client = Counter(client for entry in begun for client in entry["clients"])
    for client in account["clients"]:
        releases = len(begun) if client["client"] == "all" else by_client[client["client"]]
        assert client["steps"] == releases * turns
        ledger = Ledger()
        ledger.load_state_dict(client["ledger"])
        assert ledger.steps == client["steps"]
        assert client["epsilon"] == pytest.approx(ledger.epsilon(options.get("delta", 1e-5), "rdp"), rel=1e-12)
        assert client["epsilon"] <= 8
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["worst_epsilon"] == max(client["epsilon"] for client in account["clients"])
    assert summary["status"] == ("finished" if summary["rounds"] == options["rounds"] else "budget spent")


@pytest.mark.slow
def test_a_budget_spent_on_lost_rounds_is_spent(work, tmp_path):
    """Killed in each of two rounds after training: two of four rounds are left, and then nobody has room."""
    folder = tmp_path / "run"
    options = {**TINY, "rounds": 4, "method": "dp-lora", "reproducible": False}
    for _ in range(2):
        assert work(folder, options=options, crash=["metrics", "before", 2])["status"] == -9
    finish(work, folder, options)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("budget spent", 2)
    assert [entry["round"] for entry in lines(folder / "ledger.jsonl")[1:]] == [1, 1, 1, 2]
    assert [client["steps"] for client in json.loads((folder / "ledger.json").read_text())["clients"]] == [4, 4, 4]


SUMS = {**TINY, "method": "head-only", "features": "unit", "batch_size": 4096, "rounds": 6, "reproducible": False}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "crash", "twice"),
    [
        ({}, ["training", "before", 2], True),
        ({"unit": "client", "noise_by": "client"}, ["metrics", "before", 1], True),
        ({"unit": "client"}, ["training", "after", 1], True),
        pytest.param({}, ["log", "after", 2], False, marks=pytest.mark.long),
    ],
)
def test_sums_that_may_have_left_are_counted(work, tmp_path, way, crash, twice):
    """By the log alone where the run was killed, and in the end; rounds fill what is left of the budget."""
    folder, options = tmp_path / "run", {**SUMS, **way, "delta": 0.001, "sums_share": 0.3}
    assert work(folder, options=options, crash=crash)["status"] == -9
    config = RunConfig.from_flat(options)
    killed = AheadLog(folder / LOG).counted(plan_of(config))
    assert killed is not None and killed.worst_epsilon() > 0
    assert dict(killed.ledger(0).entries)[killed.plan.sums_event] == 1
    finish(work, folder, options)
    begun = [entry["round"] for entry in lines(folder / "ledger.jsonl")[1:]]
    rounds = json.loads((folder / "summary.json").read_text())["rounds"]
    assert begun == ([0, 0, *range(1, rounds + 1)] if twice else [0, 1, *range(1, rounds + 1)])
    counted = AheadLog(folder / LOG).counted(plan_of(config))
    account = json.loads((folder / "ledger.json").read_text())
    assert counted is not None and counted.worst_epsilon() == pytest.approx(account["worst_epsilon"], rel=1e-12)
    assert rounds < 6 and account["worst_epsilon"] <= 8
    for client in account["clients"]:
        ledger = Ledger()
        ledger.load_state_dict(client["ledger"])
        assert dict(ledger.entries)[counted.plan.sums_event] == (2 if twice else 1)


@pytest.mark.slow
def test_sums_that_would_lead_above_the_budget_are_not_released_again(work, tmp_path):
    """The run ends with what it has, which is its start."""
    folder, options = tmp_path / "run", {**SUMS, "sums_share": 0.6}
    assert work(folder, options=options, crash=["metrics", "before", 1])["status"] == -9
    finish(work, folder, options)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("budget spent", 0) and summary["worst_epsilon"] <= 8
    assert [entry["round"] for entry in lines(folder / "ledger.jsonl")[1:]] == [0]
