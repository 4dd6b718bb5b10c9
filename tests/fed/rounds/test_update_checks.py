"""Clients that fail: left out of the round, logged and counted, without a trace in what the others have made."""

import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from lora_dp.errors import TooFewClients
from lora_dp.fed import launch
from lora_dp.fed.config import RunConfig
from lora_dp.fed.launch import resume
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.local_engine import LocalEngine
from lora_dp.fed.rounds.messages import Reply, Task, Update
from lora_dp.fed.runs import loop
from lora_dp.fed.runs.folder import SERVER_ONLY, RunFolder
from lora_dp.fed.runs.report import ConsoleReport
from tests.fed.breaking import FAULTS, breaking, one, put
from tests.fed.rounds.same_state import same
from tests.fed.small import make_federation

# One round


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_client_is_left_out_as_if_it_had_not_been_drawn(fault):
    broken, reason = FAULTS[fault]
    federation, others = make_federation("dp-lora"), make_federation("dp-lora")
    breaking(federation, {1: broken})
    result = federation.run_round()
    expected = others.run_round([0, 2])
    same(federation, others)
    assert result.participants == [0, 2]
    [entry] = result.failed
    assert entry["client"] == 1
    assert re.match(reason, entry["reason"]), entry["reason"]
    assert (result.bytes_up, result.bytes_down) == (expected.bytes_up, expected.bytes_down)
    assert federation.seen.tolist() == others.seen.tolist()
    # It may have released something: its part is counted all the same.
    assert [federation.account.releases(client) for client in range(3)] == [3, 3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["la-lora", "deer", "flora", "flexlora", "lora-fair", "rac-lora", "galore"])
def test_every_method_goes_on_without_the_one_that_failed(method):
    federation, others = make_federation(method), make_federation(method)
    breaking(federation, {0: FAULTS["NaN"][0]})
    for _ in range(2):
        assert federation.run_round().participants == [1, 2]
        others.run_round([1, 2])
    same(federation, others)


@pytest.mark.slow
def test_whoever_fails_may_come_back():
    federation, others = make_federation("dp-lora"), make_federation("dp-lora")
    engine = breaking(federation, {2: FAULTS["shape"][0]})
    federation.run_round()
    others.run_round([0, 1])
    engine.broken = {}
    assert federation.run_round().participants == [0, 1, 2]
    others.run_round()
    same(federation, others)


@pytest.mark.slow
def test_the_first_turn_of_deer_fails_and_the_second_does_without_that_client():
    federation = make_federation("deer")
    engine = breaking(federation, {1: FAULTS["NaN"][0]}, turn=0)
    result = federation.run_round()
    assert engine.asked == [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 2)]
    assert result.participants == [0, 2] and [entry["client"] for entry in result.failed] == [1]
    others = make_federation("deer")
    others.run_round([0, 2])
    same(federation, others)


@pytest.mark.slow
def test_the_second_turn_of_deer_fails():
    """Its B is in the average, its A is not."""
    federation = make_federation("deer")
    breaking(federation, {1: FAULTS["no reply"][0]}, turn=1)
    result = federation.run_round()
    assert [entry["client"] for entry in result.failed] == [1]
    whole, without = make_federation("deer"), make_federation("deer")
    whole.run_round()
    without.run_round([0, 2])
    for name, tensor in federation.server.state.items():
        if name.endswith("lora_B"):
            assert torch.equal(tensor, whole.server.state[name])
        elif name.endswith("lora_A"):
            assert not torch.equal(tensor, whole.server.state[name])
            assert not torch.equal(tensor, without.server.state[name])


@pytest.mark.slow
@pytest.mark.parametrize("odd", ["twice", "a stranger", "not asked"])
def test_replies_that_nobody_asked_for_change_nothing(odd):
    class Odd:
        def __init__(self, engine: Any) -> None:
            self.engine = engine

        def train(self, tasks: Iterable[tuple[int, Task]], on_step: Callable[[], None]) -> Iterator[Reply]:
            for reply in self.engine.train(tasks, on_step):
                yield reply
                yield Reply({"twice": reply.client, "a stranger": 77, "not asked": 1}[odd], reply.update)

    federation, others = make_federation("dp-lora"), make_federation("dp-lora")
    federation.engine = Odd(federation.engine)
    result = federation.run_round([0, 2])
    others.run_round([0, 2])
    same(federation, others)
    assert (result.participants, result.failed) == ([0, 2], [])


# The fewest that a round is made of


@pytest.mark.slow
def test_a_round_goes_on_with_as_many_as_are_needed_and_stops_with_fewer():
    federation = make_federation("dp-lora")
    federation.min_clients = 2
    engine = breaking(federation, {0: FAULTS["NaN"][0]})
    assert federation.run_round().participants == [1, 2]
    engine.broken[2] = FAULTS["failure"][0]
    before, bookkeeping = dict(federation.server.state), federation.server.bookkeeping()
    with pytest.raises(TooFewClients) as caught:
        federation.run_round()
    message = str(caught.value)
    for part in (
        "Round 2",
        "1 of 3",
        "min_clients is 2",
        "client 0 sent values that are not finite",
        "client 2 raised OSError",
        "Mend these clients, or lower min_clients in config.yaml, and resume",
    ):
        assert part in message, message
    assert federation.rounds_done == 1
    assert all(tensor is federation.server.state[name] for name, tensor in before.items())
    assert federation.server.bookkeeping() == bookkeeping
    # What they sent may have been seen: the round counts.
    assert [federation.account.releases(client) for client in range(3)] == [6, 6, 6]


@pytest.mark.parametrize(
    ("kind", "remedy"), [("NaN", "Begin again with a lower lr."), ("failure", "Mend these clients, and resume.")]
)
def test_where_nobody_is_left_the_remedy_is_another(kind, remedy):
    federation = make_federation("dp-lora")
    breaking(federation, dict.fromkeys(range(3), FAULTS[kind][0]))
    with pytest.raises(TooFewClients) as caught:
        federation.run_round()
    assert str(caught.value).endswith(f" {remedy}") and "lower min_clients" not in str(caught.value)


def test_fewer_drawn_than_min_clients_is_no_fault():
    federation = make_federation("dp-lora")
    federation.min_clients = 3
    assert federation.run_round([1]).participants == [1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dp-lora", "deer"])
def test_nobody_left_is_too_few(method):
    federation = make_federation(method)
    breaking(federation, {client: FAULTS["nothing"][0] for client in range(3)}, turn=federation.method.turns - 1)
    before = dict(federation.server.state)
    with pytest.raises(TooFewClients, match="0 of 3"):
        federation.run_round()
    assert all(torch.equal(tensor, federation.server.state[name]) for name, tensor in before.items())


# Whole clients protected


SERVER: dict[str, Any] = {"unit": "client", "noise_by": "server", "delta": 0.01, "weighting": "equal", "epsilon": 8.0}


@pytest.mark.parametrize("fault", ["NaN", "no reply", "shape"])
def test_a_client_left_out_changes_neither_the_servers_noise_nor_the_divisor(fault):
    """mean = start + (Σ clipped changes + noise) / (q · clients): without client 1 exactly its summand is missing."""
    summands = {}
    for clients in ([], [0], [2]):
        federation = make_federation("dp-lora", **SERVER)
        start = dict(federation.server.state)
        federation.run_round(clients)
        summands[tuple(clients)] = {name: federation.server.state[name] - start[name] for name in start}
    noise = summands[()]
    federation = make_federation("dp-lora", **SERVER)
    breaking(federation, {1: FAULTS[fault][0]})
    result = federation.run_round([0, 1, 2])
    assert result.participants is None
    for name, tensor in federation.server.state.items():
        parts = [summands[(client,)][name] - noise[name] for client in (0, 2)]
        # What is released lies on a grid, finer than this.
        torch.testing.assert_close(tensor - start[name], noise[name] + sum(parts), rtol=0, atol=1e-9)
        assert noise[name].abs().max() > 0
    assert federation.account.releases(0) == 1
    others = make_federation("dp-lora", **SERVER)
    others.run_round([0, 2])
    same(federation, others)


def test_a_round_where_all_that_were_drawn_fail_is_that_where_nobody_was_drawn():
    """Noise alone, and the run goes on: that it stopped would tell of the secret draw and of a client's data."""
    federation, others = make_federation("dp-lora", **SERVER), make_federation("dp-lora", **SERVER)
    breaking(federation, {1: FAULTS["NaN"][0]})
    assert [entry["client"] for entry in federation.run_round([1]).failed] == [1]
    assert others.run_round([]).failed == []
    same(federation, others)
    with pytest.raises(ValueError, match="min_clients has no meaning with noise by the server.*set it to 1"):
        RunConfig.from_flat({"unit": "client", "min_clients": 2})


def test_a_client_that_noises_itself_is_left_out_like_any_other():
    settings = {**SERVER, "noise_by": "client"}
    federation, others = make_federation("deer", **settings), make_federation("deer", **settings)
    breaking(federation, {2: FAULTS["infinity"][0]})
    assert federation.run_round().participants == [0, 1]
    others.run_round([0, 1])
    same(federation, others)


# A whole run


TINY = {
    "clients": 3,
    "rounds": 2,
    "local_steps": 1,
    "batch_size": 16,
    "accountant": "rdp",
    "device": "cpu",
    "reproducible": True,
    "method": "dp-lora",
    "validation_fraction": 0.05,
}


def head(new: Callable[[Tensor], Any]) -> Callable[[Update, int], Reply]:
    return one(new, "head.bias")


def broken_run(folder: Path, broken: dict[int, Any], **options: Any) -> tuple[loop.Outcome, str]:
    config = RunConfig.from_flat({**TINY, **options, "output": folder})
    federation = Federation.from_config(config)
    breaking(federation, broken)
    console = Console(file=io.StringIO(), width=200)
    place = RunFolder.create(config)
    try:
        outcome = loop.drive(config, federation, place, ConsoleReport(console), [])
    finally:
        place.close()
    return outcome, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_run_tells_of_whom_it_left_out(tmp_path):
    broken = {1: head(put(math.nan)), 2: lambda update, client: Reply(client, None, "raised KeyError", "'Jane'")}
    outcome, text = broken_run(tmp_path / "run", broken)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    failed = [{"client": 1, "reason": "sent values that are not finite"}, {"client": 2, "reason": "raised KeyError"}]
    assert [line["failed"] for line in metrics] == [[], failed, failed]
    assert [line["participants"] for line in metrics] == [[], [0], [0]]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["failed_clients"] == outcome.summary["failed_clients"] == 4
    assert summary["status"] == "finished"
    assert text.count("left out: client 1 sent values that are not finite") == 2
    assert text.count("left out: client 2 raised KeyError") == 2
    assert "4 times a client" in text
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(b"Jane" in path.read_bytes() for path in files)


@pytest.mark.slow
def test_a_run_with_too_few_clients_stops_and_can_be_resumed(tmp_path):
    """Mended, it ends with the same bits as if nobody had ever failed."""
    folder = tmp_path / "run"
    calls = itertools.count()

    def in_round_two(update: Update, client: int) -> Reply:
        return Reply(client, update if next(calls) < 2 else None)

    with pytest.raises(TooFewClients, match="Round 2 has too few usable updates: 1 of 3"):
        broken_run(folder, {0: in_round_two, 1: in_round_two}, min_clients=2)
    assert (
        not (folder / "summary.json").exists()
        or json.loads((folder / "summary.json").read_text())["status"] == "stopped"
    )
    outcome = resume(folder, Console(file=io.StringIO()))
    whole = launch.run(
        RunConfig.from_flat({**TINY, "min_clients": 2, "output": tmp_path / "whole"}), Console(file=io.StringIO())
    )
    assert outcome.summary["status"] == "finished"
    assert [r.loss for r in outcome.rounds] == [r.loss for r in whole.rounds]
    adapters = [(path / "adapter" / "adapter_model.safetensors").read_bytes() for path in (folder, tmp_path / "whole")]
    assert adapters[0] == adapters[1]


@pytest.mark.slow
def test_where_the_draw_is_secret_the_folder_does_not_tell_who_failed(tmp_path):
    options = {"unit": "client", "noise_by": "server", "delta": 0.01}
    outcome, _ = broken_run(tmp_path / "run", {1: head(put(math.nan))}, **options)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["failed"], line["participants"], line["seconds"]) for line in metrics[1:]] == [([], None, None)] * 2
    kept = tmp_path / "run" / SERVER_ONLY
    assert [json.loads(line)["round"] for line in kept.read_text().splitlines()] == [1, 2]
    assert kept.stat().st_mode & 0o077 == 0
    for name in ("metrics.jsonl", "summary.json", "ledger.json", "ledger.jsonl"):
        assert "finite" not in (tmp_path / "run" / name).read_text()
    assert outcome.summary["status"] == "finished"


def test_the_options_reach_engine_and_server():
    options = {**TINY, "client_timeout": 0.5, "min_clients": 2, "fault_norm": 3.0}
    federation = Federation.from_config(RunConfig.from_flat(options))
    assert isinstance(federation.engine, LocalEngine)
    assert (federation.engine.timeout, federation.min_clients, federation.fault_norm) == (0.5, 2, 3.0)
