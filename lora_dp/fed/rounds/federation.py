"""The round loop: draws clients, carries tasks to them by an engine, checks and combines what comes back."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lora_dp.errors import TooFewClients
from lora_dp.fed.config import RunConfig
from lora_dp.fed.data.examples import Examples
from lora_dp.fed.methods import Aggregation
from lora_dp.fed.models.task_losses import training_inputs
from lora_dp.fed.origin import Origin
from lora_dp.fed.rounds.client import Trainer
from lora_dp.fed.rounds.engines import Engine
from lora_dp.fed.rounds.evaluation import Evaluation, evaluate, perplexity
from lora_dp.fed.rounds.generation import Prompts
from lora_dp.fed.rounds.ledgers import Account, AheadLog
from lora_dp.fed.rounds.local_engine import LocalEngine
from lora_dp.fed.rounds.mean_noise import Averaged, noise_of_mean
from lora_dp.fed.rounds.messages import Reply, Task
from lora_dp.fed.rounds.seeds import Stream, derived_seed
from lora_dp.fed.rounds.server import Server, draw_clients, nbytes, poisson_clients
from lora_dp.fed.rounds.server_noise import NoisySum
from lora_dp.fed.rounds.server_optimizer import ServerOptimizer, StateAverage
from lora_dp.fed.rounds.setup import ClientExamples, Job, open_job
from lora_dp.fed.rounds.update_checks import fault
from lora_dp.fed.rounds.update_statistics import UpdateRecorder, expected_noise_norm
from lora_dp.fed.safe_text import described, harmless
from lora_dp.isolation.check import check_isolation
from lora_dp.nn.feature_sums import FeatureSums
from lora_dp.privacy.accounting import PrivacyBudgetExceeded

_TRIED = 4


@dataclass(frozen=True)
class RoundResult:
    """What is known after a round. The loss is that of the validation data, which are taken to be public; losses and
    norms on private examples are never computed for show. All of it is public but ``failed`` where the draw is secret,
    which it tells of.

    Attributes:
        round: from 1; 0 is the start.
        phases: factors that the round trained.
        participants: clients whose updates were combined; None where the draw is secret.
        loss, accuracy: of the global model on the validation data; None in a round that is not evaluated.
        epsilon: worst ε of all clients so far; inf without privacy.
        bytes_up, bytes_down: tensors sent to and by the server in this round; where the draw is secret, those of the
            expected number of clients.
        seconds: duration; None with privacy, since it grows with the batches, whose sizes are secret.
        failed: clients that were left out, each with the reason.
        balanced_accuracy: as the accuracy, mean over classes; None, too, in a round of an earlier version.
    """

    round: int
    phases: str
    participants: list[int] | None
    loss: float | None
    accuracy: float | None
    epsilon: float
    bytes_up: int
    bytes_down: int
    seconds: float | None
    failed: list[dict[str, Any]] = field(default_factory=list)
    balanced_accuracy: float | None = None

    @property
    def perplexity(self) -> float | None:
        """Of a language model's loss; None in a round that is not evaluated."""
        return None if self.loss is None else perplexity(self.loss)


class Federation:
    """Server, clients' accounts, and the engine on which clients work.

    Args:
        trainer: with the model, the method and the settings that server and clients share.
        engine: carries tasks to clients.
        sizes: number of examples of each client.
        validation: public examples to evaluate on.
        ranks: of each client's adapters; all of the model's rank by default.
        clients_per_round: None for all.
        weighting: "examples" (public numbers) or "equal".
        min_clients: fewest updates that a round is combined from.
        fault_norm: of a client's change, above which it is left out.
        weights: of each client where weighting is "examples"; its size if left out.
        origin: what tells this run from another, for its log.
        prompts: that a language model is to go on from; None for none.

    Attributes:
        log: where rounds are written ahead; None for none.
        recorded: what the released updates of the last round say, turn by turn, ready for JSON; empty where single
            updates are not released.
        released_sums: the mean of all clients' feature sums, noise included; None where this process released none.
    """

    def __init__(
        self,
        trainer: Trainer,
        engine: Engine,
        sizes: Sequence[int],
        validation: Examples,
        *,
        ranks: Sequence[int] | None = None,
        clients_per_round: int | None = None,
        weighting: str = "examples",
        min_clients: int = 1,
        fault_norm: float = 1000.0,
        weights: Sequence[float] | None = None,
        origin: Origin | None = None,
        prompts: Prompts | None = None,
    ) -> None:
        self.trainer, self.engine, self.validation, self.prompts = trainer, engine, validation, prompts
        self.workspace, self.method, self.plan = trainer.workspace, trainer.method, trainer.plan
        self.model = self.workspace.model
        self.device = next(self.model.parameters()).device
        self.account = Account(self.plan, sizes, origin)
        self.ranks = list(ranks) if ranks is not None else [self.workspace.layers.r] * len(sizes)
        self.server = Server(self.workspace.state(), self.workspace.layers, self.method)
        training = trainer.training
        self.optimizer = ServerOptimizer(training.server_optimizer, training.server_learning_rate)
        self.average = StateAverage(training.averaging, self.plan.rounds)
        self.weighting, self.min_clients, self.fault_norm = weighting, min_clients, fault_norm
        self._weights = self.account.sizes if weights is None else np.asarray(weights)
        self.rounds_done = 0
        self.log: AheadLog | None = None
        self.recorded: list[dict[str, Any]] = []
        self.released_sums: FeatureSums | None = None
        self._per_round = clients_per_round or len(sizes)
        # Version of the global state that each client holds; not kept where the draw is secret.
        self.seen = np.full(len(sizes), -1, dtype=np.int64)

    @classmethod
    def from_config(cls, config: RunConfig) -> "Federation":
        """Opens data and model and splits the examples over the clients.

        Raises:
            ValueError: data, model and settings that do not go together, in one sentence.
        """
        return cls.of_job(config, open_job(config))

    @classmethod
    def of_job(
        cls, config: RunConfig, job: Job, engine: Engine | None = None, *, weights: Sequence[float] | None = None
    ) -> "Federation":
        """The federation of an opened job, in this process unless another engine is given."""
        chosen = config.federation
        assert chosen.weighting is not None
        return cls(
            job.trainer,
            engine or LocalEngine(job.trainer, ClientExamples(job), chosen.client_timeout),
            job.sizes,
            job.validation,
            ranks=job.ranks,
            clients_per_round=chosen.clients_per_round,
            weighting=chosen.weighting,
            min_clients=chosen.min_clients,
            fault_norm=chosen.fault_norm,
            weights=weights,
            origin=job.origin(config),
            prompts=job.prompts,
        )

    @property
    def clients(self) -> int:
        """How many there are."""
        return len(self.ranks)

    def draw(self) -> list[int]:
        """The clients of the next round, among those whose budget has room for it.

        Raises:
            PrivacyBudgetExceeded: none has.
        """
        eligible = self.account.eligible()
        if not eligible:
            raise PrivacyBudgetExceeded("No client has budget left for a round: the run ends here.")
        if self.plan.server_adds_noise:
            source = self.trainer.source(Stream.CLIENT_DRAWS, self.rounds_done)
            return poisson_clients(self.clients, self.plan.client_rate, source)
        rng = np.random.default_rng([self.trainer.seed, Stream.CLIENT_DRAWS, self.rounds_done])
        return draw_clients(eligible, self._per_round, rng)

    def run_round(
        self,
        participants: Sequence[int] | None = None,
        on_step: Callable[[], None] = lambda: None,
        *,
        evaluate: bool = True,
    ) -> RoundResult:
        """One round: every turn of its participants, and the server's combinations.

        Updates are combined as they come, so that memory does not grow with the number of clients. The round is in the
        ledger before it begins.

        Args:
            participants: by default drawn.

        Raises:
            ValueError: participants under the server's noise, unless all clients take part in every round.
            PrivacyBudgetExceeded: no client, or not all participants, have budget left; nothing was trained.
            TooFewClients: fewer than ``min_clients`` of them sent a usable update, and each adds noise of its own; the
                last checkpoint is whole.
        """
        begin = time.perf_counter()
        index = self.rounds_done
        if participants is not None and self.plan.server_adds_noise and self.plan.client_rate < 1:
            raise ValueError(
                "With noise by the server ε rests on a secret draw of clients: leave participants out, or let "
                "all clients take part in every round."
            )
        drawn = self.draw() if participants is None else list(participants)
        if spent := set(drawn) - set(self.account.eligible()):
            raise PrivacyBudgetExceeded(f"Client {min(spent)} has spent its budget: it takes part in no more rounds.")
        self.account.add_round(drawn)  # before the log: Ctrl-C between the two may count a round that never began
        if self.log is not None:
            self.log.append(index + 1, [] if self.plan.server_adds_noise else drawn)
        self.recorded = []
        before = self.server.snapshot(), self.optimizer.snapshot(), self.average.snapshot()
        try:
            up, down, remaining, failed = self._run_turns(index, drawn, on_step)
            self.average.add(self.server.state, index + 1)
            loss, accuracy, balanced = self.evaluate() if evaluate else (None, None, None)
        except BaseException:
            # Interrupted or with too few updates: the global state stays that of the last whole round.
            self.server.go_back(before[0])
            _, self.optimizer, self.average = before
            raise
        self.rounds_done += 1
        secret = self.plan.private and (self.plan.server_adds_noise or not self.trainer.reproducible)
        seconds = None if secret else time.perf_counter() - begin
        phases = " ".join(dict.fromkeys(self.method.phases(index, turn) for turn in range(self.method.turns)))
        return RoundResult(
            self.rounds_done,
            phases,
            None if self.plan.server_adds_noise else remaining,
            loss,
            accuracy,
            self.account.worst_epsilon(exact=False),
            up,
            down,
            seconds,
            failed,
            balanced,
        )

    def _run_turns(
        self, index: int, drawn: Sequence[int], on_step: Callable[[], None]
    ) -> tuple[int, int, list[int], list[dict[str, Any]]]:
        """Bytes up and down, the clients that took part to the end, and those that were left out."""
        self.server.begin(index, torch.Generator().manual_seed(derived_seed(self.trainer.seed, Stream.BEGIN, index)))
        up = down = 0
        failed: list[dict[str, Any]] = []
        remaining = list(drawn)
        for turn in range(self.method.turns):
            sent, received, lost = self._run_turn(index, turn, remaining, on_step)
            down, up = down + sent, up + received
            failed += lost
            gone = {entry["client"] for entry in lost}
            remaining = [client for client in remaining if client not in gone]
        return up, down, remaining, failed

    def _run_turn(
        self, index: int, turn: int, drawn: Sequence[int], on_step: Callable[[], None]
    ) -> tuple[int, int, list[dict[str, Any]]]:
        """One exchange; returns bytes down and up, and who was left out."""
        server, plan = self.server, self.plan
        names = [n for n in self.workspace.names if self.method.trains(n, index, turn)]
        noisy = (
            NoisySum(plan, self.method, server.layers, server.state, index, turn) if plan.server_adds_noise else None
        )
        plain: Aggregation | None = None if noisy else self.method.aggregation()
        failed: list[dict[str, Any]] = []
        recorder = UpdateRecorder(drawn)
        noise_norm = functools.cache(functools.partial(self._noise_norm, index, turn))
        reasons: list[str] = []
        details: list[str] = []
        waiting = set(drawn)
        averaged: list[Averaged] = []
        up = down = arrived = 0
        tasks = {rank: server.task(index, turn, rank) for rank in {self.ranks[client] for client in drawn}}
        for reply in self._replies(drawn, tasks, on_step):
            if reply.client not in waiting:
                continue  # a second answer, or one that nobody asked for
            waiting.remove(reply.client)
            task = tasks[self.ranks[reply.client]]
            own_noise = None if noisy else noise_norm(task.rank, int(self.account.sizes[reply.client]))
            reason = reply.failure or fault(reply.update, task, names, self.fault_norm, own_noise or 0.0)
            if reason is None:
                assert reply.update is not None
                if noisy is not None:
                    noisy.add(reply.update.tensors, task.state)
                else:
                    assert plain is not None
                    contribution = self.method.contribution(reply.update.tensors, server.layers)
                    plain.add(contribution, self.weight(reply.client))
                    averaged.append((self.weight(reply.client), task.rank, int(self.account.sizes[reply.client])))
                    down += server.news_bytes(int(self.seen[reply.client]), task.rank)
                    up += nbytes(reply.update.tensors)
                    self.seen[reply.client] = server.version
                    recorder.add(reply.client, reply.update.tensors, task.state, own_noise)
                arrived += 1
            else:
                reason, detail = harmless(reason), harmless(reply.detail)  # names of tensors are the client's own
                failed.append({"client": reply.client, "reason": reason})
                reasons.append(f"client {reply.client} {reason}")
                details.append(reasons[-1] + (f": {detail}" if detail not in ("", reason) else ""))
        # Under the server's noise a round goes on with noise alone: that it stopped would tell who was drawn.
        if noisy is None and arrived < max(1, min(self.min_clients, len(drawn))):
            remedy = "Mend these clients, and resume"
            if arrived:
                remedy = "Mend these clients, or lower min_clients in config.yaml, and resume"
            elif all("finite" in entry["reason"] for entry in failed):
                remedy = "Begin again with a lower lr"
            said, in_full = (
                f"Round {index + 1} has too few usable updates: {arrived} of {len(drawn)}, min_clients is "
                f"{self.min_clients} ({'; '.join(words[:3])}). {remedy}."
                for words in (reasons, details)
            )
            raise TooFewClients(said, in_full)
        if noisy is not None:
            mean = noisy.result(self.trainer.source(Stream.SERVER_NOISE, index, turn))
            down, up = self._expected_bytes(index, turn, names)
        else:
            assert plain is not None
            mean = plain.result()
            self.recorded.append({"round": index + 1, "turn": turn, **recorder.summary()})
        if not self.optimizer.takes_the_mean:
            noise = noise_of_mean(self.trainer, server, index, turn, averaged)
            mean = dict(self.optimizer.stepped(mean, server.state, noise))  # type: ignore[arg-type]
        server.apply(self.method.combine(mean, server.state, server.layers, index, turn))
        # Not as they came, which tells how long they took.
        return down, up, sorted(failed, key=lambda entry: entry["client"])

    def _replies(self, drawn: Sequence[int], tasks: dict[int, Task], on_step: Callable[[], None]) -> Iterator[Reply]:
        """The engine's replies, then an empty one of each client: it counts where there was no other before."""
        yield from self.engine.train(((client, tasks[self.ranks[client]]) for client in drawn), on_step)
        for client in drawn:
            yield Reply(client, None)

    def _noise_norm(self, index: int, turn: int, rank: int, examples: int) -> float | None:
        noise_multiplier = self.plan.event(examples).noise_multiplier
        return expected_noise_norm(self.trainer, self.server.task(index, turn, rank), examples, noise_multiplier)

    def _expected_bytes(self, index: int, turn: int, names: Sequence[str]) -> tuple[int, int]:
        """Down and up of the expected number of clients: the true ones would tell how many were drawn."""
        down = up = 0.0
        for rank in set(self.ranks):
            share = self.ranks.count(rank) * self.plan.client_rate
            start = self.server.task(index, turn, rank).state
            down += share * self.server.news_bytes(self.server.version - 1, rank)
            up += share * nbytes({name: start[name] for name in names})
        return round(down), round(up)

    def weight(self, client: int) -> float:
        """A client's public, unnormalised share in a mean."""
        return float(self._weights[client]) if self.weighting == "examples" else 1.0

    def check_model(self) -> None:
        """Tries on validation data, which are public, whether clients can train as the unit of privacy asks for.

        With the example as unit: whether the model mixes the examples of a batch. At a client such a model would be
        trained on each example by itself. With the client as unit: whether training works at all. Else every client's
        change would be zero. That it was found there would be a word on the client's data, and so nobody else is told.

        Raises:
            IsolationError: naming the module in which examples meet.
            ValueError: training fails.
        """
        if self.plan.private and not self.plan.examples_are_protected:
            self._check_training()
        if not self.plan.examples_are_protected or len(self.validation) < 2:
            return
        batch = self.validation.batch(range(min(_TRIED, len(self.validation))))
        args, named = training_inputs({name: tensor.to(self.device) for name, tensor in batch.items()})
        mode = self.model.training
        try:
            check_isolation(self.model.train(), args, named, len(batch["labels"]))
        finally:
            self.model.train(mode)

    def _check_training(self) -> None:
        tried = min(_TRIED, len(self.validation), self.trainer.training.batch_size)
        task = self.server.task(self.rounds_done, 0, self.workspace.layers.r)
        try:
            self.trainer.attempt(self.validation.subset(range(tried)), task)
        except Exception as error:
            raise ValueError(
                f"Training fails on validation data ({described(error)}): every client's change would be zero, and the "
                "run noise alone. Choose another model."
            ) from error

    def evaluate(self) -> Evaluation:
        """Loss and accuracies of the global model on the validation data."""
        self.load_global_state()
        return evaluate(self.model, self.validation, self.device, self.trainer.training.precision)

    def load_global_state(self) -> None:
        """Puts the global adapter and head into the model: their averages, where these are the result."""
        self.workspace.load(self.average.of(self.server.state))

    def start(self, bytes_up: int = 0, bytes_down: int = 0) -> RoundResult:
        """The global model before the first round, as round 0, with the bytes that its head's start took."""
        begin = time.perf_counter()
        loss, accuracy, balanced = self.evaluate()
        seconds = time.perf_counter() - begin
        epsilon = self.account.worst_epsilon()
        return RoundResult(
            0, "", [], loss, accuracy, epsilon, bytes_up, bytes_down, seconds, balanced_accuracy=balanced
        )
