"""The engine on Flower: simulated nodes on this machine, or SuperNodes over the network.

Server, tasks and client code are those of every engine; here they travel as Flower's messages.
"""

import dataclasses
import importlib.util
import logging
import os
import secrets
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

import lora_dp.fed.flower.without_telemetry  # noqa: F401  (before Flower)

# isort: split
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from lora_dp.extras import NotInstalled, missing
from lora_dp.fed.config import RunConfig
from lora_dp.fed.flower import messages
from lora_dp.fed.flower.client import client_app
from lora_dp.fed.flower.messages import Introduction
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.messages import Reply, Task, Update
from lora_dp.fed.rounds.server import nbytes
from lora_dp.fed.rounds.setup import Job, open_job
from lora_dp.fed.runs.folder import RunFolder
from lora_dp.fed.runs.loop import Outcome, drive, go_on
from lora_dp.fed.runs.report import ConsoleReport
from lora_dp.fed.safe_text import described, harmless

Result = TypeVar("Result")
_LOG = logging.getLogger(__name__)
# Messages of one request: Flower limits its size, and holds all that it brings.
_AT_ONCE = 64
_REMINDER = 30.0
# Of a node that announces its own number of examples, in medians of all clients' numbers.
_MOST_WEIGHT = 10
# What came of a message of which Flower says that it failed, by its error code.
_FAILURES = {
    1: "could not load its app",
    2: "raised an exception in its app",
    3: "gave no answer in time",
    4: "lost its answer",
    5: "is not connected any more",
    7: "does not trust the app",
    8: "died at work",
}


class FlowerEngine:
    """Carries tasks to the nodes of a Flower federation.

    Args:
        grid: Flower's, of a ServerApp.
        config: of the run; nodes get it without the output folder, and choose their own device.
        poll: seconds between looks for replies.
        stop: set from outside, it ends the waiting.
    """

    def __init__(
        self, grid: Grid, config: RunConfig, *, poll: float = 0.2, stop: threading.Event | None = None
    ) -> None:
        self._grid, self._poll, self._stop = grid, poll, stop or threading.Event()
        self._timeout, self._clients = config.federation.client_timeout, config.federation.clients
        self._steps = config.federation.local_steps
        anywhere = dataclasses.replace(config, run=dataclasses.replace(config.run, device="auto"))
        self._config = messages.pack_config(anywhere.to_yaml())
        # Nodes by client, in the order in which they claimed its number; what the first of them said.
        self._claims: dict[int, list[int]] = {}
        self._introductions: dict[int, Introduction] = {}
        # Nodes by the question who they are that is not answered yet; all that were asked.
        self._asked: dict[str, int] = {}
        self._known: set[int] = set()

    def train(self, tasks: Iterable[tuple[int, Task]], on_step: Callable[[], None]) -> Iterator[Reply]:
        self._meet()
        online = set(self._grid.get_node_ids())
        waiting: dict[str, tuple[int, Task]] = {}
        records: dict[int, tuple[Task, ArrayRecord]] = {}
        batch: list[tuple[int, Task, Message]] = []
        for client, task in tasks:
            node = self._node(client, online)
            if node is None:
                yield Reply(client, None, "is not connected")
                continue
            if id(task) not in records:
                records[id(task)] = task, messages.pack_tensors(task.state)
            content = messages.pack_task(self._config, task, records[id(task)][1])
            batch.append(
                (
                    client,
                    task,
                    Message(
                        content, dst_node_id=node, message_type="train", ttl=self._timeout, group_id=str(task.round + 1)
                    ),
                )
            )
            if len(batch) == _AT_ONCE:
                yield from self._push(batch, waiting)
                batch = []
        yield from self._push(batch, waiting)
        end = None if self._timeout is None else time.monotonic() + self._timeout
        while waiting:
            for reply in self._pull(waiting):
                client, task = waiting.pop(reply.metadata.reply_to_message_id)
                read = _read(client, reply, task)
                if read.update is not None:
                    for _ in range(self._steps):
                        on_step()
                yield read
            if end is not None and time.monotonic() > end:
                break
            if waiting:
                self._pause()
        for client, _ in waiting.values():
            yield Reply(client, None, f"gave no answer within {self._timeout:g} s")

    def wait_for_clients(self) -> list[Introduction]:
        """What each client's node says of itself, in the clients' order, as soon as all of them are there.

        Raises:
            ValueError: the federation was set up for another number of nodes.
        """
        reminded = time.monotonic()
        while True:
            self._meet()
            self._check_partitions()
            missing = [client for client in range(self._clients) if client not in self._introductions]
            if not missing:
                return [self._introductions[client] for client in range(self._clients)]
            if time.monotonic() - reminded > _REMINDER:
                reminded = time.monotonic()
                _LOG.warning("Waiting for %d of %d clients, the first is %d.", len(missing), self._clients, missing[0])
            self._pause()

    def _check_partitions(self) -> None:
        """Raises ValueError where all nodes say that there are as many as there are, and these are not the clients."""
        said = {introduction.partitions for introduction in self._introductions.values()}
        if len(said) == 1 and (number := said.pop()) not in (None, self._clients) and number == len(self._known):
            raise ValueError(
                f"Flower has {number} nodes, but the run has {self._clients} clients: set both alike (num-supernodes "
                "and clients)."
            )

    def _meet(self) -> None:
        """Asks nodes that are new who they are, and hears those that have answered."""
        listed = list(self._grid.get_node_ids())
        self._known &= set(listed)  # one that went away and comes back is asked again
        new = [node for node in listed if node not in self._known]
        for start in range(0, len(new), _AT_ONCE):
            questions = [
                Message(RecordDict({messages.CONFIG: self._config}), dst_node_id=node, message_type="query")
                for node in new[start : start + _AT_ONCE]
            ]
            pushed = set(self._grid.push_messages(questions))
            for question in questions:
                if question.metadata.message_id in pushed:
                    self._asked[question.metadata.message_id] = question.metadata.dst_node_id
                    self._known.add(question.metadata.dst_node_id)
        for reply in self._pull(self._asked):
            node = self._asked.pop(reply.metadata.reply_to_message_id)
            said: Introduction | str
            try:
                said = "is gone" if reply.has_error() else messages.unpack_introduction(reply.content)
            except (TypeError, ValueError) as error:
                said = f"sent an answer that is none: {error}"
            except Exception:
                said = "sent an answer that cannot be read"
            if isinstance(said, str) or not 0 <= said.client < self._clients:
                reason = said if isinstance(said, str) else f"claims to be client {said.client} of {self._clients}"
                _LOG.warning("Node %d is left out: it %s.", node, harmless(reason).rstrip("."))
                continue
            self._introductions.setdefault(said.client, said)
            claims = self._claims.setdefault(said.client, [])
            if node not in claims:
                claims.append(node)

    def _node(self, client: int, online: set[int]) -> int | None:
        """The first connected node that claimed the client's number: no later one takes it away."""
        return next((node for node in self._claims.get(client, []) if node in online), None)

    def _push(self, batch: list[tuple[int, Task, Message]], waiting: dict[str, tuple[int, Task]]) -> Iterator[Reply]:
        """Sends messages; a reply for each that could not be sent."""
        pushed = set(self._grid.push_messages([message for _, _, message in batch])) if batch else set()
        for client, task, message in batch:
            if message.metadata.message_id in pushed:
                waiting[message.metadata.message_id] = client, task
            else:
                yield Reply(client, None, "could not be reached")

    def _pull(self, waiting: Mapping[str, Any]) -> Iterator[Message]:
        """Replies that have come to the messages that are waited for, a few of them in memory at a time."""
        numbers = list(waiting)
        for start in range(0, len(numbers), _AT_ONCE):
            for reply in self._grid.pull_messages(numbers[start : start + _AT_ONCE]):
                if reply.metadata.reply_to_message_id in waiting:
                    yield reply

    def _pause(self) -> None:
        if self._stop.wait(self._poll):
            raise KeyboardInterrupt


def _read(client: int, reply: Message, task: Task) -> Reply:
    """What a message brings, its tensors where the task's are."""
    if reply.has_error():
        failure = _FAILURES.get(reply.error.code, f"failed (Flower's error {reply.error.code})")
        return Reply(client, None, failure, harmless(reply.error.reason or ""))
    try:
        # Before anything of it takes room: an update is no larger than the state that it started from.
        answer = messages.unpack_answer(reply.content, nbytes(task.state))
    except Exception as error:
        return Reply(client, None, "sent an answer that cannot be read", described(error))
    if isinstance(answer, str):
        return Reply(client, None, answer)
    devices = {name: tensor.device for name, tensor in task.state.items()}
    tensors = {name: tensor.to(devices.get(name, tensor.device)) for name, tensor in answer.tensors.items()}
    return Reply(client, Update(tensors))


def connected(config: RunConfig, grid: Grid, stop: threading.Event | None = None) -> Federation:
    """The federation of a ServerApp, once the node of every client is there.

    Raises:
        ValueError: data, model, settings and nodes that do not go together.
    """
    job = open_job(config)
    engine = FlowerEngine(grid, config, stop=stop)
    nodes = engine.wait_for_clients()
    job = _with_own_data(job, nodes)
    return Federation.of_job(config, job, engine, weights=_weights(job.sizes, nodes))


def _with_own_data(job: Job, nodes: list[Introduction]) -> Job:
    """The job with the sizes that nodes with data of their own have said; which examples these are stays with them."""
    told = zip(job.parts, nodes, strict=True)
    parts = [part if node.examples is None else range(node.examples) for part, node in told]
    return dataclasses.replace(job, parts=parts)


def _weights(sizes: Sequence[int], nodes: Sequence[Introduction]) -> list[float]:
    """Each client's weight where sizes weigh: the number that a node has announced counts for at most ten times the
    median of all, so that none drowns the others by its word."""
    most = _MOST_WEIGHT * statistics.median(sizes)
    return [float(size if node.examples is None else min(size, most)) for size, node in zip(sizes, nodes, strict=True)]


def simulate(config: RunConfig, work: Callable[[Federation], Result]) -> Result:
    """Does the work with a federation whose clients are nodes that Flower simulates on this machine, by Ray.

    Args:
        config: of the run.
        work: gets the federation; it runs in another thread, and is interrupted as by Ctrl-C when this one is.

    Raises:
        ImportError: Ray is not installed.
        Exception: whatever the work raises.
    """
    if importlib.util.find_spec("ray") is None:
        raise NotInstalled(missing("engine flower", "Ray", "flower"))
    # Ray listens on all interfaces, and does what anyone asks of it who does not have to show a token.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    from flwr.simulation import run_simulation
    from ray._raylet import Config  # type: ignore[attr-defined]  # its stub leaves it out

    Config.initialize("")  # Ray read its settings when it was imported, which may have been before

    stop, done = threading.Event(), threading.Event()
    results: list[Result] = []
    errors: list[BaseException] = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            results.append(work(connected(config, grid, stop)))
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    with _notices_off():
        try:
            clients = client_app(simulated=True)
            run_simulation(app, clients, config.federation.clients, backend_config=_resources(config))
        except BaseException as error:
            # Whatever became of the simulation, the work has the last word: it writes down what there is.
            errors.append(error)
        finally:
            stop.set()
            done.wait()
    if results:
        return results[0]
    raise errors[0]


def _resources(config: RunConfig) -> dict[str, Any]:
    """One process for each processor that may be used (each GPU, if clients train there), no more than clients."""
    gpus = torch.cuda.device_count() if config.run.device != "cpu" else 0
    cpus = min(len(os.sched_getaffinity(0)), config.federation.clients)
    return {
        "init_args": {"address": "local", "num_cpus": cpus, "num_gpus": gpus, "logging_level": "ERROR"},
        "client_resources": {"num_cpus": 1, "num_gpus": 1.0 if gpus else 0.0},
    }


@contextmanager
def _notices_off() -> Iterator[None]:
    """Without Flower's log, since all that matters comes back as replies and exceptions, and without Ray's notices of
    what later versions will do."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
            yield
    finally:
        logger.setLevel(before)


def server_app() -> ServerApp:
    """The ServerApp of a deployment: its run configuration holds the options of ``lora-dp``."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        given = dict(context.run_config)
        if folder := given.pop("resume", None):
            serve_again(Path(str(folder)), grid)
        else:
            serve(options_of(given), grid)

    return app


def serve(config: RunConfig, grid: Grid, console: Console | None = None) -> Outcome:
    """A whole run as the server of a Flower federation; its folder is written on this machine."""
    report = ConsoleReport(console or Console())
    federation = connected(config, grid)
    folder = RunFolder.create(config)
    try:
        return drive(config, federation, folder, report, [])
    finally:
        folder.close()


def serve_again(path: Path, grid: Grid, console: Console | None = None) -> Outcome:
    """Goes on with a run whose server was stopped or killed, from its last whole checkpoint.

    Raises:
        ValueError: no such run there, or one that has ended or was not deployed; every checkpoint damaged.
    """
    report = ConsoleReport(console or Console())
    folder, config = RunFolder.open(path)
    try:
        if config.federation.engine != "deployed":
            raise ValueError(f"The run in {path} was not deployed: go on with it by lora-dp resume {path}.")
        return go_on(config, connected(config, grid), folder, report)
    finally:
        folder.close()


def options_of(run_config: Mapping[str, Any]) -> RunConfig:
    """A Flower run configuration (``local-steps = 10``) as that of a run.

    Raises:
        ValueError: an option out of its range, or unknown.
    """
    options = {name.replace("-", "_"): value for name, value in run_config.items()}
    if "output" in options:
        options["output"] = Path(str(options["output"]))
    return RunConfig.from_flat({**options, "engine": "deployed"})
