"""Audits whose tasks and updates travel as Flower's messages to the nodes' own code, with a ledger at every node.

The command audits one process; here every turn of it is carried out by a node: the task is packed, sent, unpacked,
counted in the node's ledger, trained by the client's code, packed and sent back.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("flwr")

from lora_dp.fed import cli
from lora_dp.fed.config import RunConfig
from lora_dp.fed.flower import client as flower_client
from lora_dp.fed.flower.server import FlowerEngine
from lora_dp.fed.rounds import client
from lora_dp.fed.rounds.client import Trainer
from lora_dp.fed.rounds.messages import Update
from lora_dp.fed.rounds.setup import open_job
from lora_dp.privacy.mechanism import Mechanism
from tests.fed.flower.loopback import LoopbackGrid

SHORT = {"clients": 2, "rounds": 1, "local_steps": 1, "accountant": "rdp", "method": "dp-lora", "epsilon": 2.0}
WHOLE = {**SHORT, "unit": "client", "delta": 0.01}
STEPS = {**SHORT, "rounds": 2, "local_steps": 2}
FEW = ["--count", "160"]
SURE = ["--confidence", "0.999"]
CASES = {
    "example": ({**STEPS, "method": "la-lora"}, []),
    "example, deer": ({**STEPS, "method": "deer"}, []),
    # A tenth of the canaries is never drawn: with 160 of them, one fault in 25 would pass; with 240, none of 4,000.
    "client, server": ({**WHOLE, "clients": 10, "clients_per_round": 9}, ["--count", "240"]),
    "client, client": ({**WHOLE, "noise_by": "client"}, FEW),
}
each_case = pytest.mark.parametrize(("options", "words"), CASES.values(), ids=CASES)


class Carried:
    """Turns of clients, each carried to a node and back.

    Attributes:
        turns: how many there were.
        ledgers: of the nodes, while one audit runs; None where the server adds the noise, and nodes can keep none.
    """

    def __init__(self, options: dict[str, Any], folder: Path) -> None:
        self.config, self.folder = RunConfig.from_flat(options), folder
        self.job = open_job(self.config)
        self.turns = 0
        self.ledgers: Path | None = None
        self._audits = itertools.count()

    def begin(self) -> None:
        """New data, so to speak: with no releases so far."""
        if not self.job.trainer.plan.server_adds_noise:
            self.ledgers = self.folder / str(next(self._audits))
            self.ledgers.mkdir()

    def node(self, place: int, number: int) -> dict[str, Any]:
        kept = (
            {}
            if self.ledgers is None
            else {
                "ledger": str(self.ledgers / f"{number}.json"),
                "unit": self.config.privacy.unit,
                # Few clients, audited at a δ that no built-in policy admits; a budget takes the place of its bounds.
                "epsilon": 1e6,
                "delta": 0.01,
            }
        )
        return {"partition-id": place, "num-partitions": self.config.federation.clients, **kept}

    def train(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Puts it in the place of :meth:`Trainer.train`."""
        train = Trainer.train

        def carried(trainer: Trainer, number: int, examples: Any, task: Any, on_step: Any = lambda: None) -> Any:
            class Node(flower_client._Node):
                def examples(self, _: int) -> Any:
                    return examples

            def at_the_node(*arguments: Any) -> Any:
                with monkeypatch.context() as inside:
                    inside.setattr(Trainer, "train", lambda _, __, *rest: train(trainer, number, *rest))
                    return node.train(*arguments)

            # The node of the audit's client, with its own ledger: canaries that stand for clients outnumber partitions.
            node = Node(trainer, self.job, own=False)
            place = number % self.config.federation.clients
            with monkeypatch.context() as patch:
                patch.setattr(flower_client, "_opened", lambda *_: _Opened(at_the_node))
                engine = FlowerEngine(LoopbackGrid([self.node(place, number)]), self.config, poll=0.001)
                (reply,) = engine.train([(place, task)], on_step)
            assert reply.update is not None, reply.failure
            self.turns += 1
            # Messages have an order of their own; the audit reads tensors in the model's.
            return Update({n: reply.update.tensors[n] for n in trainer.workspace.names if n in reply.update.tensors})

        monkeypatch.setattr(Trainer, "train", carried)


class _Opened:
    """What a node finds when it opens the run."""

    def __init__(self, train: Any) -> None:
        self.train = train


@pytest.fixture
def audited(tmp_path, monkeypatch):
    """Audits a configuration on Flower: the exit code, and what was carried."""

    def run(options: dict[str, Any], *words: str, seeds: int = 1) -> tuple[list[int], Carried]:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
        carried = Carried(options, tmp_path)
        carried.train(monkeypatch)
        codes = []
        for seed in range(seeds):
            carried.begin()
            codes.append(cli.main(["audit", str(tmp_path), *SURE, *words, "--seed", str(seed)]))
        return codes, carried

    return run


@pytest.mark.slow
@each_case
def test_what_is_sound_is_not_violated(options, words, audited, tmp_path):
    codes, carried = audited(options, *words)
    assert codes == [0] and carried.turns > 0
    report = json.loads((tmp_path / "audit.json").read_text())
    assert report["claimed_epsilon"] == pytest.approx(2, abs=0.02)
    if carried.ledgers is not None:
        counted = [json.loads(path.read_text()) for path in carried.ledgers.glob("*.json")]
        assert counted and all(ledger["unit"] == carried.config.privacy.unit for ledger in counted)


@pytest.mark.long
@each_case
def test_what_is_sound_is_not_violated_over_5_seeds(options, words, audited):
    """At a confidence of 0.999 two false alarms of 5 have a probability of 0.00001."""
    codes, _ = audited(options, *words, seeds=5)
    assert set(codes) <= {0, 1} and sum(codes) <= 1


@pytest.mark.slow
@each_case
def test_a_fiftieth_of_the_noise_is_violated(options, words, audited, monkeypatch):
    true = Mechanism.noise_std
    monkeypatch.setattr(Mechanism, "noise_std", lambda self, size: true(self, size) / 50)
    assert audited(options, *words)[0] == [1]


@pytest.mark.slow
def test_without_clipping_of_updates_clients_are_violated(audited, monkeypatch):
    monkeypatch.setattr(client, "clipped", lambda change, bound: {n: t.double() for n, t in change.items()})
    assert audited(*CASES["client, client"][:1], *FEW)[0] == [1]
