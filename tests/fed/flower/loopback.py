"""A Flower grid in one process: nodes that answer at once, by the client code that a SuperNode would run."""

import uuid
from collections.abc import Callable, Iterable
from typing import Any

import lora_dp.fed.flower.without_telemetry  # noqa: F401

# isort: split
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from lora_dp.fed.flower.client import client_app

Answer = Callable[[Message, Context], Message | None]


class LoopbackGrid(Grid):
    """Messages are taken apart into bytes and put together again on both ways, as over the network.

    Args:
        node_configs: one a node; nodes are numbered from 100.
        answer: what a node does; by default the ClientApp's work, in a simulation where nobody has told a node more
            than its number. None is no answer, ever.

    Attributes:
        online: nodes that are listed.
        sent: messages that nodes got, in order.
    """

    def __init__(self, node_configs: list[dict[str, Any]], answer: Answer | None = None) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.contexts = {
            100 + i: Context(run_id=1, node_id=100 + i, node_config=config, state=RecordDict(), run_config={})
            for i, config in enumerate(node_configs)
        }
        self.answer = answer or _work
        self.online = list(self.contexts)
        self.sent: list[Message] = []
        self._replies: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return list(self.online)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        pushed = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            if message.metadata.dst_node_id not in self.online:
                continue
            received = _travelled(message)
            self.sent.append(received)
            reply = self.answer(received, self.contexts[message.metadata.dst_node_id])
            if reply is not None:
                self._replies[message.metadata.message_id] = _travelled(reply)
            pushed.append(message.metadata.message_id)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(number) for number in list(message_ids) if number in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        raise NotImplementedError

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError


def _work(message: Message, context: Context) -> Message:
    simulated = context.node_config.keys() <= {"partition-id", "num-partitions"}
    return client_app(simulated=simulated)(message, context)


def _travelled(message: Message) -> Message:
    contents = {number: item.deflate() for number, item in get_all_nested_objects(message).items()}
    arrived = inflate_object_from_contents(message.object_id, contents)
    assert isinstance(arrived, Message)
    arrived.metadata.__dict__["_message_id"] = message.metadata.message_id
    return arrived
