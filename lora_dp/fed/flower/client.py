"""A client on Flower: the trainer of all engines, on the data of its node and, where one is named, with its ledger.

A node is told by its ``node_config``: ``partition-id`` is the client's number, from 0. ``data`` names a folder with its
own examples, in place of its part of the run's data set. Which columns of them are read, ``label-column`` and the like
say here, and the server does not: it could ask for one after another. ``classes`` names the classes in the order of the
run, as in "ham,spam". ``ledger``, ``unit``, ``epsilon`` and ``delta`` are explained in
:mod:`lora_dp.fed.flower.ledger`, ``policy`` and ``private`` in :mod:`lora_dp.fed.flower.policy`.

A node that Flower simulates has no owner but whoever runs the simulation: its configuration is that of the run.
"""

import functools
import logging
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import lora_dp.fed.flower.without_telemetry  # noqa: F401  (before Flower)

# isort: split
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from lora_dp.fed.flower import messages
from lora_dp.fed.flower.ledger import ClientLedger, Refused, own_path
from lora_dp.fed.flower.messages import Introduction
from lora_dp.fed.rounds.messages import Task, Update
from lora_dp.fed.safe_text import described, harmless

if TYPE_CHECKING:
    from lora_dp.fed.data.examples import Examples
    from lora_dp.fed.rounds.client import Trainer
    from lora_dp.fed.rounds.setup import Job

_LOG = logging.getLogger(__name__)

# What a node reads of its own data, by the words of its node-config, which are those of the options.
_COLUMNS = ("input-column", "pair-column", "label-column", "prompt-column", "prompt-template", "completion-column")


def client_app(*, simulated: bool = False) -> ClientApp:
    """The ClientApp of simulation and deployment.

    Args:
        simulated: all nodes are processes of whoever runs it. Under Ray, by which Flower simulates nodes, they are in
            any case.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        work = functools.partial(_train, simulated=simulated or _by_ray(context.node_config))
        return Message(_answered(work, message.content, context.node_config), reply_to=message)

    app.query()(introduce)
    return app


def train(message: Message, context: Context) -> Message:
    """One turn of the client: its update, or the reason why there is none."""
    return Message(_answered(_train, message.content, context.node_config), reply_to=message)


def introduce(message: Message, context: Context) -> Message:
    """Which client this node is."""
    return Message(_answered(_introduce, message.content, context.node_config), reply_to=message)


def _by_ray(node_config: Mapping[str, Any]) -> bool:
    """Whether Flower's simulation runs this process: nothing that a server could say."""
    ray = sys.modules.get("ray")
    inside = ray is not None and ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None
    return inside and node_config.keys() <= {"partition-id", "num-partitions"}


def _answered(
    work: Callable[[RecordDict, Mapping[str, Any]], RecordDict], content: RecordDict, node_config: Mapping[str, Any]
) -> RecordDict:
    """What the work returns, or that it was refused; an exception may quote private data, so it stays in the log of
    this side, where it is one line of harmless text and the places that it came from."""
    try:
        return work(content, node_config)
    except Refused as refusal:
        _LOG.error("This client %s.", harmless(str(refusal)))
        return messages.pack_failure(str(refusal))
    except Exception as error:
        places = " < ".join(f"{f.filename}:{f.lineno}" for f in reversed(traceback.extract_tb(error.__traceback__)))
        _LOG.error("This client failed: %s (%s)", described(error), harmless(places, 2000))
        return messages.pack_failure(f"raised {type(error).__name__}")


def _train(content: RecordDict, node_config: Mapping[str, Any], *, simulated: bool = False) -> RecordDict:
    client = _number(node_config)
    ledger = None if simulated else _admitted(content, node_config)
    task = messages.unpack_task(content)
    return messages.pack_update(_node(content, node_config).train(client, task, ledger))


def _introduce(content: RecordDict, node_config: Mapping[str, Any]) -> RecordDict:
    client, partitions = _number(node_config), node_config.get("num-partitions")
    ClientLedger.of_node(node_config)  # says now what would be refused in every round
    own_path(node_config, "policy")
    examples = None
    if node_config.get("data") is not None:
        _admitted(content, node_config)
        node = _node(content, node_config)
        plan = node.trainer.plan
        # With whole clients protected, how many examples one has is not public.
        examples = None if plan.private and plan.unit == "client" else len(node.examples(client))
    return messages.pack_introduction(Introduction(client, partitions, examples))


def _admitted(content: RecordDict, node_config: Mapping[str, Any]) -> ClientLedger | None:
    """The node's ledger, if it has one, for a run in which its owner lets it take part. No data are opened for that.

    It knows the run by the options that the node reads. A ledger without a budget has that of the policy: else a server
    that names another seed each time could start any number of runs.

    Raises:
        Refused: a run that noise of this node's own does not protect, unless its owner has declared that it need not;
            or one that the node's policy does not admit.
    """
    # Here and not above: a SuperNode starts a process for each message, and who only introduces itself needs no models.
    from lora_dp.fed.flower.policy import Policy, read_sent_config
    from lora_dp.fed.rounds.setup import plan_of

    ledger = ClientLedger.of_node(node_config)
    policy = Policy.of_node(node_config, budget=ledger is not None and ledger.epsilon is not None)
    if ledger is None and policy.private:
        raise Refused(
            "has no ledger, so that nothing would count what it releases: its node-config must name one, or say "
            "private=false"
        )
    if ledger is not None and not policy.private:
        raise Refused("has a ledger and says private=false: its node-config must leave one of them out")
    config = read_sent_config(messages.unpack_config(content), policy.rules["method"])
    if ledger is not None:
        ledger.check(plan_of(config), reproducible=config.run.reproducible)
    policy.check(config)
    if ledger is None:
        return None
    if ledger.epsilon is None:
        ledger = ledger.limited(*policy.budget())
    return ledger.of_run(policy.run_digest(config))


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
        plan, most = trainer.plan, trainer.workspace.layers.r
        if not (task.round < plan.rounds and task.turn < plan.turns and min(1, most) <= task.rank <= most):
            raise Refused(
                f"was asked for turn {task.turn} of round {task.round} at rank {task.rank}: the run has no such"
            )
        if task.sums and (plan.sums_event is None or task.round or task.turn):
            raise Refused("was asked for feature sums, which the run does not have, or not there")
        if ledger is not None:
            event = plan.sums_event if task.sums else plan.event(len(examples))
            assert event is not None
            ledger.spend(plan, event, reproducible=trainer.reproducible, sums=task.sums)
        device = next(trainer.workspace.model.parameters()).device
        state = {name: tensor.to(device) for name, tensor in task.state.items()}
        return trainer.train(client, examples, replace(task, state=state))


def _node(content: RecordDict, node_config: Mapping[str, Any]) -> _Node:
    columns = tuple(node_config.get(name) for name in _COLUMNS)
    data = own_path(node_config, "data")
    return _opened(
        messages.unpack_config(content),
        None if data is None else str(data),
        columns,
        _classes(node_config.get("classes")),
    )


def _classes(listed: object) -> tuple[str, ...] | None:
    if listed is None:
        return None
    names = tuple(name.strip() for name in str(listed).split(","))
    if len(names) < 2 or len(set(names)) < len(names) or "" in names:
        raise Refused('cannot tell its classes: its node-config must list each once, as in classes="ham,spam"')
    return names


@functools.lru_cache(maxsize=1)
def _opened(
    text: str, folder: str | None, columns: tuple[str | None, ...], classes: tuple[str, ...] | None = None
) -> _Node:
    """Data and model of a configuration, opened once in a process."""
    from lora_dp.fed.data.opening import open_data
    from lora_dp.fed.data.own_data import open_own
    from lora_dp.fed.data.unreadable import encode_training
    from lora_dp.fed.flower.policy import read_sent_config
    from lora_dp.fed.rounds.setup import open_job

    config = read_sent_config(text)
    # Where a node computes is its own choice.
    config = replace(config, run=replace(config.run, device="auto"))
    federation, alone = config.federation, config
    if folder is not None:
        # All of the folder is this client's, and nothing of it is held out; the privacy is that of the whole run.
        read: dict[str, Any] = {name.replace("-", "_"): own for name, own in zip(_COLUMNS, columns, strict=True)}
        # What its own columns are for, the server does not say either.
        read |= {"task": "auto", "chat": False}
        data = replace(config.data, dataset=str(folder), subset=None, validation_split=None, **read)
        alone = replace(
            config,
            data=data,
            federation=replace(
                federation,
                clients=1,
                clients_per_round=None,
                ranks=None,
                min_clients=1,
                partition="iid",
                dirichlet_alpha=1.0,
            ),
        )
    try:
        raw = open_data(alone.data) if folder is None else open_own(alone.data, classes)
        if folder is not None and raw.task == "causal-lm" and config.data.chat:
            alone = replace(alone, data=replace(alone.data, chat=True))
            raw = open_own(alone.data, classes)
        if not len(raw.train_labels):
            raise ValueError("there are no examples: put some into its files")
    except Exception as error:
        _LOG.error("This node's data cannot be opened: %s", described(error))
        raise Refused("cannot open its own data: its log says why") from None
    if folder is not None and config.data.task not in ("auto", raw.task):
        raise Refused(
            f"has data for {raw.task}, but the run's task is {config.data.task}: name the columns in its node-config"
        )
    job = open_job(alone, raw=raw, encode=encode_training)
    plan = replace(
        job.trainer.plan,
        participations=federation.participations,
        client_rate=federation.client_rate,
        clients=federation.clients,
    )
    return _Node(replace(job.trainer, plan=plan), job, own=folder is not None)
