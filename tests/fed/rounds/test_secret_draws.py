"""Who was drawn in secret: nothing in a run's folder tells, whoever fails and whenever it ends."""

import io
import json
import math
import statistics

import pytest
from rich.console import Console

from lora_dp.fed.config import RunConfig
from lora_dp.fed.methods import factor
from tests.fed.breaking import interrupt_before_round
from tests.fed.rounds.units import SERVER
from tests.fed.small import make_federation


@pytest.mark.slow
def test_the_draw_is_poisson_and_secret():
    federation = make_federation("la-lora", sizes=[4] * 40, weighting="equal", **SERVER, client_rate=0.25)
    sizes = []
    for index in range(200):
        federation.rounds_done = index
        sizes.append(len(federation.draw()))
    # Binomial(40, 1/4): mean 10, deviation 2.74
    assert abs(statistics.mean(sizes) - 10) < 5 * 2.74 / math.sqrt(200)
    assert 1.9 < statistics.stdev(sizes) < 3.6
    federation.rounds_done = 0
    result = federation.run_round()
    assert result.participants is None
    names = [n for n in federation.server.state if factor(n) is None or factor(n) in "BA"]
    whole = sum(federation.server.state[n].numel() * 8 for n in names)
    assert result.bytes_up == round(0.25 * 40 * whole)  # of the expected number, whoever was drawn


@pytest.mark.slow
def test_nothing_in_the_folder_tells_who_was_drawn(tmp_path, monkeypatch):
    """Two runs whose draws differ, but nothing else: their folders differ in nothing but what the noise has touched."""
    from lora_dp.fed.launch import run
    from lora_dp.fed.rounds import federation

    folders = []
    monkeypatch.setattr("secrets.token_hex", lambda count: "00" * count)  # what tells one run's log from another's
    for number, drawn in enumerate(([0], [1, 2])):
        monkeypatch.setattr(federation, "poisson_clients", lambda *_, drawn=drawn: drawn)
        folders.append(tmp_path / str(number))
        run(
            RunConfig.from_flat(
                {
                    "unit": "client",
                    "clients": 4,
                    "clients_per_round": 2,
                    "rounds": 2,
                    "local_steps": 1,
                    "accountant": "rdp",
                    "device": "cpu",
                    "output": folders[-1],
                }
            ),
            Console(file=io.StringIO()),
        )
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in folders]
    assert names[0] == names[1] and "server-only.jsonl" not in names[0]
    assert len({(folder / "ledger.jsonl").read_text() for folder in folders}) == 1
    assert len({(folder / "ledger.json").read_text() for folder in folders}) == 1
    metrics = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in folders]
    for first, second in zip(*metrics, strict=True):
        released = {"loss", "accuracy", "balanced_accuracy"} | ({"seconds"} if first["round"] == 0 else set())
        assert {n: v for n, v in first.items() if n not in released} == {
            n: v for n, v in second.items() if n not in released
        }
        assert first["round"] == 0 or (first["participants"], first["seconds"]) == (None, None)
    numbers = [json.loads((folder / "checkpoints" / "round-000002.json").read_text())["numbers"] for folder in folders]
    assert numbers[0] == numbers[1]


@pytest.mark.slow
def test_who_failed_is_for_the_server_alone(tmp_path, monkeypatch):
    from lora_dp.fed.launch import run
    from lora_dp.fed.rounds import federation
    from lora_dp.fed.rounds.client import Trainer

    train = Trainer.train
    monkeypatch.setattr(federation, "poisson_clients", lambda *_: [0, 1, 2])
    monkeypatch.setattr(Trainer, "train", lambda own, client, *a: 1 / 0 if client == 1 else train(own, client, *a))
    screen = io.StringIO()
    outcome = run(
        RunConfig.from_flat(
            {
                "unit": "client",
                "clients": 4,
                "clients_per_round": 2,
                "rounds": 1,
                "local_steps": 1,
                "accountant": "rdp",
                "device": "cpu",
                "output": tmp_path / "run",
            }
        ),
        Console(file=screen),
    )
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])["failed"] == []
    assert outcome.summary["failed_clients"] is None
    private = tmp_path / "run" / "server-only.jsonl"
    assert json.loads(private.read_text())["failed"] == [{"client": 1, "reason": "raised ZeroDivisionError"}]
    assert private.stat().st_mode & 0o077 == 0
    assert "left out: client 1 raised ZeroDivisionError" in screen.getvalue()


@pytest.mark.slow
def test_a_run_that_ends_before_it_is_evaluated_keeps_its_draw_secret_too(tmp_path, monkeypatch):
    from lora_dp.fed.launch import run
    from lora_dp.fed.rounds.client import Trainer

    monkeypatch.setattr(Trainer, "train", lambda *_: 1 / 0)
    interrupt_before_round(monkeypatch, 3)
    screen = io.StringIO()
    outcome = run(
        RunConfig.from_flat(
            {
                "unit": "client",
                "clients": 4,
                "clients_per_round": 2,
                "rounds": 5,
                "evaluate_every": 5,
                "local_steps": 1,
                "accountant": "rdp",
                "device": "cpu",
                "output": tmp_path / "run",
            }
        ),
        Console(file=screen),
    )
    assert (outcome.summary["status"], outcome.summary["rounds"]) == ("interrupted", 2)
    assert outcome.summary["failed_clients"] is None and "times a client" not in screen.getvalue()
