"""A client on Flower: the trainer of all engines, on the data of its node and, where one is named, with its ledger.

A node is told by its ``node_config``: ``partition-id`` is the client's number, from 0. ``data`` names a folder with its
own examples, in place of its part of the run's data set. Which columns of them are read, ``label-column`` and the like
say here, and the server does not: it could ask for one after another. ``ledger``, ``unit``, ``epsilon`` and ``delta``
are explained in :mod:`lora_dp.fed.engines.flower_ledger`.
"""

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import yaml

import lora_dp.fed.engines.flower_quiet  # noqa: F401  (before Flower)

# isort: split
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from lora_dp.fed.engines import flower_messages as messages
from lora_dp.fed.engines.flower_ledger import ClientLedger, Refused
from lora_dp.fed.engines.flower_messages import Introduction
from lora_dp.fed.exchange import Task, Update

if TYPE_CHECKING:
    from lora_dp.fed.client import Trainer
    from lora_dp.fed.examples import Examples
    from lora_dp.fed.job import Job

_LOG = logging.getLogger(__name__)

_COLUMNS = ("input-column", "pair-column", "label-column")


def client_app() -> ClientApp:
    """The ClientApp of simulation and deployment."""
    app = ClientApp()
    app.train()(train)
    app.query()(introduce)
    return app


def train(message: Message, context: Context) -> Message:
    """One turn of the client: its update, or the reason why there is none."""
    return Message(_answered(_train, message.content, context.node_config), reply_to=message)


def introduce(message: Message, context: Context) -> Message:
    """Which client this node is."""
    return Message(_answered(_introduce, message.content, context.node_config), reply_to=message)


def _answered(work: Any, content: RecordDict, node_config: Mapping[str, Any]) -> RecordDict:
    """What the work returns; an exception may quote private data, so it stays in the log of this side."""
    try:
        answer: RecordDict = work(content, node_config)
    except Refused as refusal:
        _LOG.error("This client %s.", refusal)
        return messages.pack_failure(str(refusal))
    except Exception as error:
        _LOG.exception("This client failed.")
        return messages.pack_failure(f"raised {type(error).__name__}")
    return answer


def _train(content: RecordDict, node_config: Mapping[str, Any]) -> RecordDict:
    client = _number(node_config)
    node = _node(content, node_config)
    return messages.pack_update(
        node.train(client, messages.unpack_task(content), ClientLedger.of_node(node_config)))


def _introduce(content: RecordDict, node_config: Mapping[str, Any]) -> RecordDict:
    client, partitions = _number(node_config), node_config.get("num-partitions")
    ledger = ClientLedger.of_node(node_config)  # says now what would be refused in every round
    examples = None
    if node_config.get("data") is not None:
        node = _node(content, node_config)
        plan = node.trainer.plan
        if ledger is not None:
            ledger.check(plan, reproducible=node.trainer.reproducible)
        # With whole clients protected, how many examples one has is not public.
        examples = None if plan.private and plan.unit == "client" else len(node.examples(client))
    return messages.pack_introduction(Introduction(client, partitions, examples))


def _number(node_config: Mapping[str, Any]) -> int:
    number = node_config.get("partition-id")
    if not isinstance(number, int) or number < 0:
        raise Refused("has no number: give its node-config partition-id=0 for the first client, 1 for the next, …")
    return number


@dataclass(frozen=True)
class _Node:
    """A run as opened at a node; ``own`` where all of the job's examples are this client's."""

    trainer: "Trainer"
    job: "Job"
    own: bool

    def examples(self, client: int) -> "Examples":
        if self.own:
            return self.job.train
        if client >= len(self.job.parts):
            raise Refused(f"has the number {client}, but the run has {len(self.job.parts)} clients, counted from 0")
        return self.job.examples(client)

    def train(self, client: int, task: Task, ledger: ClientLedger | None) -> Update:
        trainer, examples = self.trainer, self.examples(client)
        if ledger is not None:
            ledger.spend(trainer.plan, trainer.plan.event(len(examples)), reproducible=trainer.reproducible)
        device = next(trainer.workspace.model.parameters()).device
        state = {name: tensor.to(device) for name, tensor in task.state.items()}
        return trainer.train(client, examples, replace(task, state=state))


def _node(content: RecordDict, node_config: Mapping[str, Any]) -> _Node:
    columns = tuple(node_config.get(name) for name in _COLUMNS)
    return _opened(messages.unpack_config(content), node_config.get("data"), columns)


@functools.lru_cache(maxsize=1)
def _opened(text: str, folder: str | None, columns: tuple[str | None, ...]) -> _Node:
    """Data and model of a configuration, opened once in a process."""
    # Here and not above: a SuperNode starts a process for each message, and who only introduces itself needs no models.
    from lora_dp.fed.config import RunConfig
    from lora_dp.fed.job import open_job

    config = RunConfig.from_flat(yaml.safe_load(text))
    if folder is None:
        job = open_job(config)
        return _Node(job.trainer, job, own=False)
    # All of the folder is this client's, and nothing of it is held out; the privacy is that of the whole run.
    federation = config.federation
    inputs, pairs, labels = columns
    data = replace(
        config.data, dataset=str(folder), subset=None, validation_split=None, input_column=inputs, pair_column=pairs,
        label_column=labels)
    alone = replace(config, data=data, federation=replace(
        federation, clients=1, clients_per_round=None, ranks=None, min_clients=1))
    job = open_job(alone, evaluate=False)
    plan = replace(
        job.trainer.plan, participations=federation.participations, client_rate=federation.client_rate,
        clients=federation.clients)
    return _Node(replace(job.trainer, plan=plan), job, own=True)
