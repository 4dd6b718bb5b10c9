"""A node that breaks its word: what it announces is bounded, and nothing that it sends reaches a terminal as it is."""

import io
import logging
import time
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

pytest.importorskip("flwr")

import lora_dp.fed.flower.without_telemetry  # noqa: F401

# isort: split
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from safetensors.torch import save

from lora_dp.errors import TooFewClients
from lora_dp.fed.flower import client as flower_client
from lora_dp.fed.flower import messages
from lora_dp.fed.flower import server as flower
from lora_dp.fed.flower.messages import Introduction
from lora_dp.fed.flower.server import FlowerEngine, connected
from lora_dp.fed.flower.tensors import unpack_tensors
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.ledgers import Account
from lora_dp.fed.rounds.messages import Reply, Update
from lora_dp.fed.rounds.privacy_plan import LARGEST_SIZE
from lora_dp.fed.rounds.setup import open_job
from lora_dp.fed.runs import loop
from lora_dp.fed.runs.folder import RunFolder
from lora_dp.fed.runs.report import ConsoleReport
from lora_dp.fed.safe_text import described, harmless
from tests.fed.flower.asking_servers import ODD, SPOILT
from tests.fed.flower.loopback import LoopbackGrid
from tests.fed.flower.small_deployments import STATE, TASK, nodes, signed, tiny

MARKUP = "[bold red]owned[/] [link=https://evil.example]x[/link] \\"


# Text


@pytest.mark.parametrize(
    "text",
    [
        SPOILT,
        "\x9b2J",
        "\u202eabc",
        "a\nb",
        "\ud800",
        "x" * 10**7,
        "\x1b" * 10**6,
        MARKUP,
        "",
        "é ∞ 漢字 (3, 6)",
        "\u200b\ufeff",
    ],
)
def test_harmless_text_is_one_bounded_line_of_what_can_be_seen(text):
    made = harmless(text)
    assert made.isprintable() and len(made) <= 300 and harmless(made) == made
    made.encode("utf-8")
    if text.isprintable() and len(text) <= 300:
        assert made == text
    assert len(harmless(text, 10)) <= 10 and harmless(text, 10).isprintable()


def test_what_is_no_text_is_named_by_its_type_alone():
    assert harmless([SPOILT] * 1000) == "(list)" and harmless(None) == "(NoneType)"
    assert described(ValueError(SPOILT)).isprintable() and described(ValueError()) == "ValueError"


def check(text: str) -> None:
    assert not ODD.search(text.replace("\n", "")) and "owned\x07" not in text, repr(text[:500])


def introducing(answer: Any) -> Any:
    """Nodes that introduce themselves as they should, and answer a task with what is given."""

    def behave(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type == "query":
            return flower_client.introduce(message, context)
        client = context.node_config["partition-id"]
        return answer(message) if client == 1 else Message(messages.pack_update(signed(client)), reply_to=message)

    return behave


ANSWERS: dict[str, Any] = {
    "failure": lambda: RecordDict({messages.ANSWER: ConfigRecord({"failure": SPOILT + MARKUP})}),
    "long failure": lambda: RecordDict({messages.ANSWER: ConfigRecord({"failure": "x" * 10**6})}),
    "many failures": lambda: RecordDict({messages.ANSWER: ConfigRecord({"failure": [SPOILT] * 1000})}),
    "bytes": lambda: RecordDict({messages.ANSWER: ConfigRecord({"failure": SPOILT.encode()})}),
    "tensor": lambda: messages.pack_update(Update({SPOILT: torch.zeros(1)})),
    "record": lambda: RecordDict({SPOILT: ConfigRecord({SPOILT: SPOILT})}),
    "array": lambda: RecordDict(
        {messages.ANSWER: ConfigRecord(), messages.TENSORS: ArrayRecord({SPOILT: Array(np.zeros(3))})}
    ),
    "type": lambda: RecordDict(
        {
            messages.ANSWER: ConfigRecord(),
            messages.TENSORS: ArrayRecord({"safetensors": Array(SPOILT, (3,), SPOILT, b"\x93NUMPY" + SPOILT.encode())}),
        }
    ),
    "header": lambda: RecordDict(
        {
            messages.ANSWER: ConfigRecord(),
            messages.TENSORS: ArrayRecord(
                {"safetensors": Array(np.frombuffer((5).to_bytes(8, "little") + b'{"\x1b[', dtype=np.uint8))}
            ),
        }
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*ANSWERS, "error"])
def test_no_text_of_an_answer_reaches_terminal_log_or_file_as_it_is(kind, tmp_path, caplog):
    """Through a whole run: its console, its folder, the sentence that it ends with, and the server's log."""

    def answer(message: Message) -> Message:
        return Message(Error(2, SPOILT) if kind == "error" else ANSWERS[kind](), reply_to=message)

    def behave(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type == "query" or context.node_config["partition-id"] != 1:
            return flower_client.client_app(simulated=True)(message, context)
        return answer(message)

    shown = io.StringIO()
    config = tiny(output=tmp_path / "run", rounds=1, min_clients=3)
    federation = connected(config, LoopbackGrid(nodes(), behave))
    folder = RunFolder.create(config)
    with caplog.at_level(logging.DEBUG, logger="lora_dp"), pytest.raises(TooFewClients) as caught:
        loop.drive(config, federation, folder, ConsoleReport(Console(file=shown, width=200)), [])
    folder.close()
    for text in (str(caught.value), caught.value.in_full, shown.getvalue(), caplog.text):
        check(text)
        assert len(text) < 10_000
    for path in (tmp_path / "run").glob("*.json*"):
        check(path.read_text())


def test_a_reason_is_shown_as_text_and_not_as_markup():
    shown = io.StringIO()
    report = ConsoleReport(Console(file=shown, force_terminal=True, width=300, color_system="standard"))
    report.warn(SPOILT + MARKUP)
    inner = shown.getvalue().removeprefix("\x1b[33m").removesuffix("\x1b[0m\n")
    check(inner)
    assert MARKUP in inner


INTRODUCTIONS: dict[str, Any] = {
    "failure": {"failure": SPOILT},
    "client": {"client": SPOILT},
    "client as list": {"client": [1, 2]},
    "partitions": {"client": 1, "partitions": SPOILT},
    "examples": {"client": 1, "examples": SPOILT},
    "bytes": {"client": 1, "examples": SPOILT.encode()},
    "a key": {SPOILT: SPOILT},
}


@pytest.mark.parametrize("kind", INTRODUCTIONS)
def test_no_text_of_an_introduction_reaches_the_log_as_it_is(kind, caplog):
    grid = LoopbackGrid(
        nodes(2),
        lambda message, context: Message(
            RecordDict({messages.ANSWER: ConfigRecord(INTRODUCTIONS[kind])}), reply_to=message
        ),
    )
    with caplog.at_level(logging.DEBUG, logger="lora_dp"):
        FlowerEngine(grid, tiny(clients=2))._meet()
    assert "is left out" in caplog.text
    check(caplog.text)


# Numbers

NO_SIZES = [10**13, LARGEST_SIZE + 1, 0, -5, True, False, 1.5, 10**400, "7", [7], float("nan")]


@pytest.mark.parametrize("size", NO_SIZES, ids=lambda size: str(size)[:20])
def test_a_size_that_no_client_has_is_refused_by_the_nodes_name(size, caplog):
    with pytest.raises(ValueError, match="client 3 announces .* as its number of examples, which must be a whole"):
        Introduction(3, None, size)
    if isinstance(size, int) and not isinstance(size, bool):
        with pytest.raises(ValueError, match="client 1 announces"):
            Account(open_job(tiny()).trainer.plan, [300, size])
    if isinstance(size, int) and abs(size) >= 2**63 or isinstance(size, list) and not size:
        return
    grid = LoopbackGrid(
        nodes(2),
        lambda message, context: Message(
            RecordDict({messages.ANSWER: ConfigRecord({"client": 0, "examples": size})}), reply_to=message
        ),
    )
    engine = FlowerEngine(grid, tiny(clients=2))
    with caplog.at_level(logging.WARNING):
        engine._meet()
    assert "Node 100 is left out: it sent an answer that is none: client 0 announces" in caplog.text
    assert not engine._introductions


@pytest.mark.parametrize("number", [-1, 2**31, True, 1.5, "0", 10**30])
def test_a_clients_number_and_that_of_nodes_are_numbers(number):
    with pytest.raises((TypeError, ValueError)):
        Introduction(number)
    with pytest.raises((TypeError, ValueError)):
        Introduction(0, number)


@pytest.mark.slow
def test_memory_does_not_follow_an_announced_number():
    import tracemalloc

    job = open_job(tiny(clients=2))
    tracemalloc.start()
    there = flower._with_own_data(job, [Introduction(0, None, LARGEST_SIZE), Introduction(1)])
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert there.sizes == [LARGEST_SIZE, len(job.parts[1])] and taken < 10**5
    assert len(Federation.of_job(tiny(clients=2), there).account.sizes) == 2


def test_an_announced_number_weighs_at_most_ten_medians():
    sizes = [300, 200, 10**8, 250, 100]
    told = [Introduction(i, None, sizes[i] if i != 1 else None) for i in range(5)]
    assert flower._weights(sizes, told) == [300, 200, 2500, 250, 100]
    # What is known here, and not announced, weighs what it is.
    assert flower._weights(sizes, [Introduction(i) for i in range(5)]) == sizes


@pytest.mark.slow
def test_the_servers_average_takes_these_weights(tmp_path):
    def behave(message: Message, context: Context) -> Message:
        client = context.node_config["partition-id"]
        if message.metadata.message_type == "query":
            said = Introduction(client, None, [10, 10, 10**8][client])
            return Message(messages.pack_introduction(said), reply_to=message)
        return flower_client.client_app(simulated=True)(message, context)

    config = tiny(rounds=1, method="dp-lora", fault_norm=1e9)
    federation = connected(config, LoopbackGrid(nodes(), behave))
    assert [federation.weight(client) for client in range(3)] == [10, 10, 100]
    start = dict(federation.server.state)
    updates: dict[int, dict[str, torch.Tensor]] = {}
    train = federation.engine.train

    def noted(*arguments: Any) -> Any:
        for reply in train(*arguments):
            updates[reply.client] = reply.update.tensors
            yield reply

    federation.engine.train = noted  # type: ignore[method-assign]
    federation.run_round()
    for name in updates[0]:
        changes = [weight * (updates[k][name] - start[name]).double() for k, weight in ((0, 10), (1, 10), (2, 100))]
        mean = sum(changes) / 120
        torch.testing.assert_close(federation.server.state[name].double(), start[name] + mean, rtol=1e-5, atol=1e-6)


def test_one_node_cannot_stop_the_run_by_the_number_of_nodes_that_it_claims():
    def behave(message: Message, context: Context) -> Message:
        client = context.node_config["partition-id"]
        return Message(messages.pack_introduction(Introduction(client, 7 if client == 0 else None)), reply_to=message)

    engine = FlowerEngine(LoopbackGrid(nodes(), behave), tiny())
    assert [said.client for said in engine.wait_for_clients()] == [0, 1, 2]


# Bytes


def array(header: bytes, content: bytes) -> ArrayRecord:
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content
    return ArrayRecord({"safetensors": Array("uint8", (1,), "numpy.ndarray", data)})


def npy(content: bytes) -> ArrayRecord:
    return array(b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d,), }" % len(content), content)


def counted(header: bytes) -> bytes:
    """A safetensors header behind its length."""
    return len(header).to_bytes(8, "little") + header


BYTES = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%s), }"
TERABYTES = counted(b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}')
FORGED = {
    "a head that claims a terabyte": array(BYTES % b"1000000000000,", b"x"),
    "many dimensions": array(BYTES % (b"99999," * 30), b"x"),
    "another type": array(b"{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }", b"12345678"),
    "objects": array(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"cos\nsystem\n(S'true'\ntR."),
    "no numpy": ArrayRecord({"safetensors": Array("uint8", (1,), "numpy.ndarray", b"PK\x03\x04" * 10)}),
    "nothing": npy(b""),
    "half a length": npy(b"1234"),
    "a header that is a list": npy(counted(b"[]")),
    "a header longer than all": npy((10**9).to_bytes(8, "little") + b"{}"),
    "a tensor that claims more than there is": npy(TERABYTES),
    "many tensors": npy(save({f"t{i}": torch.zeros(1) for i in range(200)})),
    "a long name": npy(save({"n" * 10**4: torch.zeros(1)})),
    "large": npy(save({"a": torch.zeros(1000)})),
}


@pytest.mark.parametrize("kind", FORGED)
def test_bytes_that_claim_more_than_they_are_take_no_room(kind):
    began = time.monotonic()
    with pytest.raises(Exception) as caught:
        unpack_tensors(FORGED[kind], most_bytes=2000, most_tensors=100)
    assert not isinstance(caught.value, MemoryError) and time.monotonic() - began < 5


def test_bytes_that_are_tensors_come_back():
    assert {name: tensor.shape for name, tensor in unpack_tensors(npy(save(STATE))).items()} == {
        name: tensor.shape for name, tensor in STATE.items()
    }


def test_an_update_larger_than_the_state_is_not_read():
    def answer(message: Message) -> Message:
        return Message(messages.pack_update(Update({**STATE, "more": torch.zeros(100)})), reply_to=message)

    engine = FlowerEngine(LoopbackGrid(nodes(), introducing(answer)), tiny(), poll=0.01)
    engine.wait_for_clients()
    replies = {reply.client: reply for reply in engine.train([(client, TASK) for client in range(3)], lambda: None)}
    assert replies[1].failure == "sent an answer that cannot be read" and "more than" in replies[1].detail
    assert all(replies[client].update is not None for client in (0, 2))


@pytest.mark.slow
def test_an_engine_of_ones_own_is_not_trusted_with_text_either(tmp_path):
    federation = Federation.from_config(tiny(min_clients=1, rounds=1))
    train = federation.engine.train

    class Spoiling:
        def train(self, *arguments: Any) -> Any:
            for reply in train(*arguments):
                yield Reply(1, None, SPOILT, SPOILT) if reply.client == 1 else reply

    federation.engine = Spoiling()
    [failed] = federation.run_round().failed
    check(failed["reason"])
