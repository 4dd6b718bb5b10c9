"""White box, unit client: canaries are clients whose updates are as long as clipping lets them be, and longer.

They are clients of a federation of the same plan: drawn, clipped, noised and counted as any other. The real clients
stand aside, since the adversary that the guarantee speaks of knows what they add.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from lora_dp.auditing.bounds import Floats
from lora_dp.auditing.canaries import Coins, Played
from lora_dp.fed.auditing.game import Game, unchanged
from lora_dp.fed.data.examples import Examples
from lora_dp.fed.methods import State
from lora_dp.fed.rounds.client import Trainer
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.local_training import LocalSteps
from lora_dp.fed.rounds.messages import Reply, Task
from lora_dp.fed.rounds.regulators import regulators


@dataclass(frozen=True)
class _CanaryTrainer(Trainer):
    """Puts a canary's weights in place of local training; all that follows is the client's own code."""

    planted: Callable[[int, Task], State] = lambda client, task: {}

    def _train_by_engine(
        self,
        examples: Examples,
        task: Task,
        place: tuple[int, int, int],
        on_step: Callable[[], None],
        steps: LocalSteps,
    ) -> None:
        self.workspace.load({**task.state, **self.planted(place[0], task)}, task.rank)


@dataclass(frozen=True)
class ClientCanaries:
    """Clients whose updates move one number each, in or out by coin.

    The likelihood ratio of what was released scores them, round by round: of the noised sum if the server adds the
    noise, and else of each client's own update.

    Attributes:
        game: the run.
        count: m, how many.
        norm: length of each update, in units of ``max_update_norm``; above 1, so that clipping is tested.

    Raises:
        ValueError: more of them than a turn trains numbers, or a method whose sum is not that of the tensors trained.
    """

    game: Game
    count: int
    norm: float = 10.0

    def __post_init__(self) -> None:
        trainer = self.game.job.trainer
        if self.count < 1 or self.count > (most := most_clients(self.game)):
            raise ValueError(
                f"count must lie between 1 and {most}, since each canary needs a number of its own, not {self.count}."
            )
        state = trainer.workspace.state()
        if trainer.plan.server_adds_noise and any(
            value is not state.get(name)
            for name, value in trainer.method.contribution(state, trainer.workspace.layers).items()
        ):
            raise ValueError(
                f"{trainer.method.name} sums products of factors under the server's noise, in which no canary has a "
                "number of its own: audit it with noise_by client, or another method."
            )

    def play(self, train_fn: Callable[..., object], included: Coins, generator: torch.Generator) -> Played:
        """One run, which ``train_fn`` trains: it is given the federation."""
        run = _Run(self, included, np.random.default_rng(generator.initial_seed()))
        train_fn(run.federation)
        return Played(run.scores, self.game.ledger)


class _Run:
    """The engine of one run with canaries, and its adversary."""

    def __init__(self, canaries: ClientCanaries, included: Coins, rng: np.random.Generator) -> None:
        self._game, self._canaries, self._included = canaries.game, canaries, included
        job, plan, count = self._game.job, self._game.job.trainer.plan, canaries.count
        self._game.fresh()
        self._trainer = _CanaryTrainer(
            **{f.name: getattr(job.trainer, f.name) for f in fields(Trainer)}, planted=self._planted
        )
        self._places: dict[tuple[str, ...], np.ndarray] = {}
        self._rng = rng
        self.scores: Floats = np.zeros(count)
        per_round = None if plan.server_adds_noise else max(1, round(plan.client_rate * count))
        # No fault norm: it is for accidents, and guarantees nothing.
        self.federation = Federation(
            self._trainer,
            self,
            [1] * count,
            job.validation,
            ranks=[job.ranks[0]] * count,
            clients_per_round=per_round,
            weighting="equal",
            fault_norm=math.inf,
        )
        self._sigma = plan.turn_noise_multiplier(1)
        self._evidence: Floats = np.zeros(count)
        # The turn under way, and what the server has released of it: nothing yet.
        self._task: Task | None = None
        self._pending = False
        if plan.server_adds_noise:
            apply = self.federation.server.apply

            def observed(combined: State) -> None:
                apply(combined)  # type: ignore[arg-type]
                self._observe_sum()

            self.federation.server.apply = observed  # type: ignore[assignment, method-assign]

    def train(self, tasks: Iterable[tuple[int, Task]], on_step: Callable[[], None]) -> Iterator[Reply]:
        server, job = self.federation.server, self._game.job
        task = server.task(self.federation.rounds_done, self._next_turn(), job.ranks[0])
        self._task = replace(task, state=dict(task.state))  # the server goes on in the same dictionary
        self._pending = True
        examples = job.examples(0)
        for client, given in tasks:
            update = self._trainer.train(client, examples, given, on_step)
            if not self._trainer.plan.server_adds_noise:
                change = {name: tensor - given.state[name] for name, tensor in update.tensors.items()}
                self.scores[client] += self._likelihood(self._projected(change, given)[client])
            on_step()
            yield Reply(client, update)

    def _next_turn(self) -> int:
        before = self._task
        return before.turn + 1 if before is not None and before.round == self.federation.rounds_done else 0

    def _planted(self, client: int, task: Task) -> State:
        start = unchanged(self._game.job, task)
        if not self._included[client]:
            return start
        names, sizes = list(start), [tensor.numel() for tensor in start.values()]
        flat = torch.zeros(sum(sizes), dtype=torch.float64)
        flat[int(self._directions(start)[client])] = self._canaries.norm * self._trainer.plan.max_update_norm
        rules = regulators(self._trainer.method, task.state, task.round, task.turn)
        for name, part in zip(names, flat.split(sizes), strict=True):
            change = part.view_as(start[name])
            start[name] = (start[name].double() + (rules[name].restored(change) if name in rules else change)).to(
                start[name].dtype
            )
        return start

    def _directions(self, trained: State) -> np.ndarray:
        """(m,): the coordinate of each canary among the numbers that a turn trains."""
        names = tuple(trained)
        if names not in self._places:
            size = sum(tensor.numel() for tensor in trained.values())
            self._places[names] = self._rng.permutation(size)[: self._canaries.count]
        return self._places[names]

    def _projected(self, change: State, task: Task) -> Floats:
        """(m,): a change along each canary's direction, in units of the clip bound: 1 and noise, or noise."""
        rules = regulators(self._trainer.method, task.state, task.round, task.turn)
        flat = torch.cat(
            [
                (rules[name].measured(part.double()) if name in rules else part.double()).flatten().cpu()
                for name, part in change.items()
            ]
        )
        bound = self._trainer.plan.max_update_norm
        return np.asarray(flat.numpy()[self._directions(change)] / bound, dtype=np.float64)

    def _likelihood(self, x: float | Floats) -> float | Floats:
        return (x - 0.5) / self._sigma**2 if self._sigma else x

    def _observe_sum(self) -> None:
        task = self._task
        if task is None or not self._pending:
            return  # what the server begins a round with
        self._pending = False
        plan, state = self._trainer.plan, self.federation.server.state
        change = {
            name: state[name].double() - before.double() for name, before in unchanged(self._game.job, task).items()
        }
        self._evidence += self._likelihood(self._projected(change, task) * plan.client_rate * plan.clients)
        if task.turn == self._trainer.method.turns - 1:
            # All turns of a round share its draw.
            self.scores += np.logaddexp(
                np.log1p(-plan.client_rate) if plan.client_rate < 1 else -np.inf,
                np.log(plan.client_rate) + self._evidence,
            )
            self._evidence = np.zeros(self._canaries.count)


def most_clients(game: Game) -> int:
    """Numbers that the turn trains which trains fewest."""
    trainer = game.job.trainer
    state = trainer.workspace.state()
    return min(
        sum(tensor.numel() for name, tensor in state.items() if trainer.method.trains(name, index, turn))
        for index in range(trainer.plan.rounds)
        for turn in range(trainer.method.turns)
    )
