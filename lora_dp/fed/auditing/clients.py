"""White box, unit client: canaries are clients whose updates are as long as clipping lets them be, and longer.

They are clients of a federation of the same plan: drawn, clipped, noised and counted as any other. The real clients
stand aside, since the adversary that the guarantee speaks of knows what they add.

A release of feature sums before the first round is attacked in the same way, by clients whose sums are as long. It has
a bound and a noise of its own, and all clients take part in it. The server's own check leaves out whoever sends more
than the bound: where it adds the noise, canaries send just that.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from lora_dp.auditing.bounds import Floats
from lora_dp.auditing.canaries import Coins, Played
from lora_dp.fed.auditing.game import Game, no_sums, unchanged
from lora_dp.fed.data.examples import Examples
from lora_dp.fed.methods import State
from lora_dp.fed.rounds.client import Trainer
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.local_training import LocalSteps
from lora_dp.fed.rounds.messages import Reply, Task
from lora_dp.fed.rounds.regulators import regulators
from lora_dp.nn.feature_sums import FeatureSums


@dataclass(frozen=True)
class _CanaryTrainer(Trainer):
    """Puts a canary's weights, or sums, in place of local training; all that follows is the client's own code."""

    planted: Callable[[int, Task], State] = lambda client, task: {}

    def _train_by_engine(
        self,
        examples: Examples,
        task: Task,
        place: tuple[int, int, int],
        on_step: Callable[[], None],
        steps: LocalSteps,
    ) -> None:
        planted = self.planted(place[0], task)
        if task.sums:
            next(m for m in self.workspace.model.modules() if isinstance(m, FeatureSums)).load_state_dict(planted)
        else:
            self.workspace.load({**task.state, **planted}, task.rank)


@dataclass(frozen=True)
class ClientCanaries:
    """Clients whose updates move one number each, in or out by coin.

    The likelihood ratio of what was released scores them, round by round: of the noised sum if the server adds the
    noise, and else of each client's own update.

    Attributes:
        game: the run.
        count: m, how many.
        norm: length of each update, in units of ``max_update_norm``, and of what is added to feature sums, in units of
            their sensitivity; above 1, so that clipping is tested.

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
        # Of a turn, and of feature sums: bound, and deviation of the noise in units of it.
        self._bounds, self._sigmas = {False: plan.max_update_norm}, {False: plan.turn_noise_multiplier(1)}
        if (sums := plan.sums_event) is not None:
            self._bounds[True], self._sigmas[True] = no_sums(job).sensitivity, sums.noise_multiplier
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
        tasks = iter(tasks)
        first = next(tasks, None)  # none where no client was drawn
        if first is None or not first[1].sums:
            task = server.task(self.federation.rounds_done, self._next_turn(), job.ranks[0])
        else:
            task = first[1]
        self._task = replace(task, state=dict(task.state))  # the server goes on in the same dictionary
        self._pending = True
        examples = job.examples(0)
        for client, given in tasks if first is None else itertools.chain([first], tasks):
            update = self._trainer.train(client, examples, given, on_step)
            if not self._trainer.plan.server_adds_noise:
                start = unchanged(job, given)
                change = {name: tensor - start[name] for name, tensor in update.tensors.items()}
                self.scores[client] += self._likelihood(self._projected(change, given)[client], given)
            on_step()
            yield Reply(client, update)

    def _next_turn(self) -> int:
        before = self._task
        if before is None or before.sums or before.round != self.federation.rounds_done:
            return 0
        return before.turn + 1

    def _planted(self, client: int, task: Task) -> State:
        start = unchanged(self._game.job, task)
        if not self._included[client]:
            return start
        names, sizes = list(start), [tensor.numel() for tensor in start.values()]
        flat = torch.zeros(sum(sizes), dtype=torch.float64)
        norm = 1.0 if task.sums and self._trainer.plan.server_adds_noise else self._canaries.norm
        flat[int(self._directions(start)[client])] = norm * self._bounds[task.sums]
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
        return np.asarray(flat.numpy()[self._directions(change)] / self._bounds[task.sums], dtype=np.float64)

    def _likelihood(self, x: float | Floats, task: Task) -> float | Floats:
        """log of how much likelier x is with the canary than without, by the noise that this release claims."""
        sigma = self._sigmas[task.sums]
        return (x - 0.5) / sigma**2 if sigma else x

    def _observe_sum(self) -> None:
        task = self._task
        if task is None or not self._pending:
            return  # what the server begins a round with
        self._pending = False
        plan = self._trainer.plan
        if task.sums:
            assert self.federation.released_sums is not None
            mean: State = {name: tensor.detach() for name, tensor in self.federation.released_sums.named_parameters()}
            # All take part: nothing is drawn.
            self.scores += self._likelihood(self._projected(mean, task) * self._canaries.count, task)
            return
        state = self.federation.server.state
        change = {
            name: state[name].double() - before.double() for name, before in unchanged(self._game.job, task).items()
        }
        self._evidence += self._likelihood(self._projected(change, task) * plan.client_rate * plan.clients, task)
        if task.turn == self._trainer.method.turns - 1:
            # All turns of a round share its draw.
            self.scores += np.logaddexp(
                np.log1p(-plan.client_rate) if plan.client_rate < 1 else -np.inf,
                np.log(plan.client_rate) + self._evidence,
            )
            self._evidence = np.zeros(self._canaries.count)


def most_clients(game: Game) -> int:
    """Numbers that the turn trains which trains fewest; or those of the feature sums, where they are fewer."""
    trainer = game.job.trainer
    state = trainer.workspace.state()
    sums = [] if trainer.plan.sums_event is None else [sum(p.numel() for p in no_sums(game.job).parameters())]
    turns = [
        sum(tensor.numel() for name, tensor in state.items() if trainer.method.trains(name, index, turn))
        for index in range(trainer.plan.rounds)
        for turn in range(trainer.method.turns)
    ]
    return min(sums + turns)
