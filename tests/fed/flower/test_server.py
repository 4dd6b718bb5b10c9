"""The engine on Flower: what travels, failures as values, and the simulation beside the run in one process."""

import importlib
import logging
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

import lora_dp.fed.flower.without_telemetry  # noqa: F401

# isort: split
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

from lora_dp.fed.flower import client as flower_client
from lora_dp.fed.flower import messages
from lora_dp.fed.flower import server as flower
from lora_dp.fed.flower.server import FlowerEngine, connected, options_of, simulate
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.head_start import start_head
from lora_dp.fed.rounds.messages import Update
from lora_dp.fed.rounds.setup import open_job
from tests.fed.flower.loopback import LoopbackGrid
from tests.fed.flower.small_deployments import STATE, TASK, nodes, signed, tiny


def signature(update: Update | None) -> int:
    assert update is not None
    return int(update.tensors["head.bias"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"method": "la-lora"},
        {"method": "deer"},
        {"method": "galore", "epsilon": "none"},
        {"method": "flora", "ranks": [2, 4, 3]},
        {"method": "fedask", "ranks": [2, 4, 3]},
        {"method": "lora-xs"},
        {"method": "prism"},
        {"method": "dp-fedadamw"},
        {"method": "dp-fedadamw", "unit": "client", "noise_by": "client"},
        {"method": "fedsvd", "unit": "client"},
        {"method": "la-lora", "unit": "client", "noise_by": "client"},
        {"method": "flat-lora:ffa-lora", "unit": "client", "clients_per_round": 2},
        {"method": "head-only", "features": "unit", "sums_share": 0.1, "warm_start": True, "server_optimizer": "adam"},
        {"method": "dp-lora", "features": "unit", "sums_share": 0.1, "unit": "client", "averaging": "ema"},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_two_rounds_are_those_of_the_engine_in_one_process(options):
    config = tiny(**options)
    there, here = connected(config, LoopbackGrid(nodes())), Federation.from_config(config)
    steps: list[int] = []
    if there.plan.sums_event is not None:
        assert start_head(there) == start_head(here)
    for _ in range(2):
        found = there.run_round(on_step=lambda: steps.append(1))
        expected = here.run_round()
        assert replace(found, seconds=None) == replace(expected, seconds=None)
    assert there.server.state.keys() == here.server.state.keys()
    for name, tensor in here.server.state.items():
        assert there.server.state[name].dtype == tensor.dtype
        torch.testing.assert_close(there.server.state[name], tensor, rtol=1e-6, atol=1e-7)
    start = open_job(config).trainer.workspace.state()
    assert any(not tensor.equal(there.server.state[name]) for name, tensor in start.items())
    if there.plan.unit == "example":
        assert len(steps) == 2 * 3 * 2 * there.method.turns


@pytest.mark.slow
def test_a_simulation_by_ray_agrees_with_the_run_in_one_process(tmp_path, monkeypatch):
    importlib.import_module("ray")  # as by a program that uses Ray itself: it has read its settings, without a token
    config = tiny()
    # One process for all three clients, which is slow enough to start.
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))

    def two_rounds(federation: Federation) -> dict[str, torch.Tensor]:
        assert isinstance(federation.engine, FlowerEngine)
        # Ray listens on all interfaces: only who shows this run's token is let in.
        assert os.environ["RAY_AUTH_MODE"] == "token" and len(os.environ["RAY_AUTH_TOKEN"]) >= 32
        assert not [federation.run_round() for _ in range(2)][1].failed
        return federation.server.state

    there, here = simulate(config, two_rounds), Federation.from_config(config)
    for _ in range(2):
        here.run_round()
    for name, tensor in here.server.state.items():
        torch.testing.assert_close(there[name], tensor, rtol=1e-5, atol=1e-6)


# What a node may do other than answer well, and what becomes of it.
FAULTS = {
    "raised ValueError": lambda m: Message(messages.pack_failure("raised ValueError"), reply_to=m),
    "raised an exception in its app": lambda m: Message(Error(2, "quoting data"), reply_to=m),
    "is not connected any more": lambda m: Message(Error(5), reply_to=m),
    "failed (Flower's error 99)": lambda m: Message(Error(99), reply_to=m),
    "sent an answer that cannot be read": lambda m: Message(
        RecordDict(
            {
                messages.ANSWER: ConfigRecord({"examples": 1}),
                messages.TENSORS: ArrayRecord({"safetensors": Array(np.zeros(9, dtype=np.uint8))}),
            }
        ),
        reply_to=m,
    ),
    "gave no answer within 0.3 s": lambda m: None,
}


@pytest.mark.parametrize("failure", FAULTS)
def test_failures_are_replies_and_the_others_count(failure):
    def answer(message: Message, context: Context) -> Message | None:
        client = context.node_config["partition-id"]
        if message.metadata.message_type == "query":
            return flower_client.introduce(message, context)
        return (
            FAULTS[failure](message) if client == 1 else Message(messages.pack_update(signed(client)), reply_to=message)
        )

    engine = FlowerEngine(LoopbackGrid(nodes(), answer), tiny(client_timeout=0.3), poll=0.01)
    engine.wait_for_clients()
    replies = {reply.client: reply for reply in engine.train([(client, TASK) for client in range(3)], lambda: None)}
    assert replies.keys() == {0, 1, 2}
    assert replies[1].failure == failure and replies[1].update is None
    assert [signature(replies[client].update) for client in (0, 2)] == [0, 2]


@pytest.mark.slow
def test_many_clients_are_asked_and_heard_in_requests_of_a_bounded_size():
    held = []

    class Watched(LoopbackGrid):
        def push_messages(self, given: Any) -> list[str]:
            held.append(len(list(given)))
            return super().push_messages(given)

        def pull_messages(self, numbers: Any) -> list[Message]:
            held.append(len(list(numbers)))
            return super().pull_messages(numbers)

    grid = Watched(
        nodes(150),
        lambda message, context: (
            flower_client.introduce(message, context)
            if message.metadata.message_type == "query"
            else Message(messages.pack_update(Update(STATE)), reply_to=message)
        ),
    )
    engine = FlowerEngine(grid, tiny(clients=150), poll=0.01)
    assert [said.client for said in engine.wait_for_clients()] == list(range(150))
    replies = list(engine.train([(client, TASK) for client in range(150)], lambda: None))
    assert sorted(reply.client for reply in replies) == list(range(150)) and max(held) == 64
    # The tensors travel as one array: a SuperLink handles every array by itself.
    assert len(grid.sent[-1].content.array_records[messages.TENSORS]) == 1


def test_messages_expire_with_the_round_so_that_nobody_trains_for_it_later():
    grid = LoopbackGrid(nodes(1))
    engine = FlowerEngine(grid, tiny(clients=1, client_timeout=7.0))
    engine.wait_for_clients()
    list(engine.train([(0, TASK)], lambda: None))
    assert grid.sent[-1].metadata.ttl == 7.0


def test_a_node_that_is_gone_fails_and_is_known_again_when_it_comes_back():
    grid = LoopbackGrid(
        nodes(2) + [{"partition-id": 0}],
        lambda message, context: (
            flower_client.introduce(message, context)
            if message.metadata.message_type == "query"
            else Message(messages.pack_update(signed(context.node_id)), reply_to=message)
        ),
    )
    # 102 claims the number of 101, which keeps it as long as it is there.
    engine = FlowerEngine(grid, tiny(clients=2), poll=0.01)
    engine.wait_for_clients()

    def outcome() -> list[Any]:
        replies = engine.train([(0, TASK), (1, TASK)], lambda: None)
        found = {reply.client: reply.failure or signature(reply.update) for reply in replies}
        return [found[0], found[1]]

    assert outcome() == [101, 100]
    grid.online = [102]
    assert outcome() == [102, "is not connected"]
    grid.online = [100, 101, 102]
    engine._meet()
    assert outcome() == [101, 100]


def test_waiting_ends_when_it_is_stopped_from_outside():
    stop = threading.Event()
    engine = FlowerEngine(LoopbackGrid([]), tiny(), stop=stop)
    stop.set()
    with pytest.raises(KeyboardInterrupt):
        engine.wait_for_clients()


def test_another_number_of_nodes_than_of_clients_is_refused():
    with pytest.raises(ValueError, match="Flower has 2 nodes, but the run has 3 clients: set both alike"):
        FlowerEngine(LoopbackGrid(nodes(2)), tiny()).wait_for_clients()


def test_nodes_that_cannot_take_part_are_named_and_left_out(caplog):
    grid = LoopbackGrid([{}, {"partition-id": 9}, {"partition-id": 0, "epsilon": 8.0}, {"partition-id": 0}])
    with caplog.at_level(logging.WARNING):
        FlowerEngine(grid, tiny(clients=1)).wait_for_clients()
    assert "Node 100 is left out: it has no number: give its node-config partition-id=0" in caplog.text
    assert "Node 101 is left out: it claims to be client 9 of 1" in caplog.text
    assert "Node 102 is left out: it cannot keep its budget" in caplog.text


def simulated(monkeypatch: pytest.MonkeyPatch, behave: Any) -> None:
    """Puts another simulation in Flower's place, which gets the ServerApp's work as a function without arguments."""
    import flwr.simulation

    def run_simulation(server_app: Any, client_app: Any, number: int, **_: Any) -> None:
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
        behave(lambda: server_app(LoopbackGrid(nodes(number)), context))

    monkeypatch.setattr(flwr.simulation, "run_simulation", run_simulation)


@pytest.mark.slow
def test_what_the_work_raises_in_a_simulation_comes_out(monkeypatch):
    simulated(monkeypatch, lambda serve: serve())

    def work(federation: Federation) -> None:
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        simulate(tiny(), work)


@pytest.mark.slow
def test_ctrl_c_in_a_simulation_interrupts_the_work_which_ends_in_order(monkeypatch):
    waiting = threading.Event()

    def behave(serve: Any) -> None:
        threading.Thread(target=serve).start()
        waiting.wait()
        raise KeyboardInterrupt

    simulated(monkeypatch, behave)
    monkeypatch.setattr(LoopbackGrid, "pull_messages", lambda self, numbers: [])
    monkeypatch.setattr(FlowerEngine, "wait_for_clients", lambda self: [messages.Introduction(i) for i in range(3)])
    monkeypatch.setattr(FlowerEngine, "_node", lambda self, client, online: 100)

    def work(federation: Federation) -> str:
        waiting.set()
        with pytest.raises(KeyboardInterrupt):
            federation.run_round()
        return "written down"

    assert simulate(tiny(), work) == "written down"


def test_a_run_configuration_of_flower_is_that_of_a_run(tmp_path):
    config = options_of({"local-steps": 7, "noise-by": "client", "unit": "client", "output": str(tmp_path)})
    assert config.federation.local_steps == 7 and config.privacy.noise_by == "client"
    assert config.run.output == tmp_path and config.federation.engine == "deployed"
    with pytest.raises(ValueError, match="Unknown options: wrong_name"):
        options_of({"wrong-name": 1})


def test_every_option_of_the_shipped_app_is_one():
    import tomllib

    app = Path(__file__).parents[3] / "examples" / "flower_app"
    settings = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert settings["config"].pop("resume") == ""  # not a run's option, but a run to go on with
    config = options_of(settings["config"])
    assert config.run.output == Path("flower-run") and config.federation.clients == 3
    for component in settings["components"].values():
        module, _, name = component.partition(":")
        assert name == "app" and (app / (module.replace(".", "/") + ".py")).exists()


def test_without_flower_one_sentence_says_what_to_install(monkeypatch):
    import importlib

    from lora_dp.fed.flower import without_telemetry

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"engine flower needs Flower, .*\.\[flower\]"):
        importlib.reload(without_telemetry)
    with pytest.raises(ImportError, match=r"engine flower needs .*\.\[flower\]"):
        flower.simulate(tiny(), lambda federation: None)


def test_masks_of_flowers_secure_aggregation_still_come_from_32_bits():
    """Why docs/explanation/secure-aggregation.md advises against it: when this fails, Flower has changed it."""
    one, other = bytes(range(32)), bytearray(range(32))
    other[0], other[4] = other[0] ^ 0xA5, other[4] ^ 0xA5
    masks = [pseudo_rand_gen(bytes(secret), 2**32, [(1000,)])[0] for secret in (one, other)]
    assert (masks[0] == masks[1]).all()
