"""White box, unit example: gradients planted in every private step that one client takes in the whole run.

The release of feature sums is such a step, with a bound and a noise of its own.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from lora_dp.auditing.canaries import PlantedCanaries
from lora_dp.engine.data_loader import PrivateDataLoader
from lora_dp.engine.optimizer import PrivateOptimizer
from lora_dp.fed.auditing.game import Game, no_sums, unchanged
from lora_dp.fed.methods import factor
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.messages import Reply, Task, Update

Plant = Callable[[PrivateOptimizer, PrivateDataLoader], None]


@dataclass(frozen=True)
class _OneClient:
    """An engine on which one client works and the others send back what they were sent: nothing that they do tells of
    the one's examples. An error ends the audit."""

    game: Game

    def train(self, tasks: Iterable[tuple[int, Task]], on_step: Callable[[], None]) -> Iterator[Reply]:
        job, trainer = self.game.job, self.game.job.trainer
        for client, task in tasks:
            if client == self.game.client:
                yield Reply(client, trainer.train(client, job.examples(client), task, on_step))
            else:
                yield Reply(client, Update(unchanged(job, task)))


def train_with_gradients(game: Game) -> Callable[[Plant], None]:
    """The training function for :class:`lora_dp.auditing.GradientCanaries`.

    The low-pass filter is left out: it works on what has been released already.
    """
    trainer = game.job.trainer

    def train(plant: Plant) -> None:
        def on_turn(client: int, optimizer: PrivateOptimizer, batches: PrivateDataLoader) -> None:
            planted = getattr(plant, "__self__", None)
            if isinstance(planted, PlantedCanaries):
                planted.ledger = None  # every turn has a ledger of its own, and the account adds them up
            plant(optimizer, batches)

        game.fresh()
        audited = replace(trainer, on_turn=on_turn, training=replace(trainer.training, low_pass=None))
        playing = replace(game, job=replace(game.job, trainer=audited))
        federation = Federation.of_job(game.config, playing.job, _OneClient(playing))
        game.train(federation, [game.client])

    return train


def most_gradients(game: Game) -> int:
    """How many canaries find a coordinate of their own in every part that is clipped by itself, whatever a step
    trains."""
    trainer, rank = game.job.trainer, game.job.ranks[game.client]
    by_layer, share = trainer.plan.clipping == "per_layer", rank / max(1, trainer.workspace.layers.r)
    state = trainer.workspace.state()
    # What is set by the server is no step's, nor is what travels beside the model.
    tunes = {
        name: name not in trainer.workspace.beside and (factor(name) is not None or trainer.method.trains(name, 0))
        for name in state
    }
    least = [] if trainer.plan.sums_event is None else [sum(p.numel() for p in no_sums(game.job).parameters())]
    for trained in ("A", "B"):
        sizes: dict[str, int] = {}
        for name, tensor in state.items():
            if tunes[name] and factor(name) in (None, trained):
                group = name.rpartition(".")[0] if by_layer else ""
                sizes[group] = sizes.get(group, 0) + round(tensor.numel() * (share if factor(name) else 1))
        least.append(min(sizes.values()))
    return min(least)
