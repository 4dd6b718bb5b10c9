"""Black box: examples of one client with a wrong label, in or out by coin, scored by the final model's loss.

For a language model, they are examples whose completions are random tokens.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from lora_dp.auditing import ExampleCanaries
from lora_dp.fed.auditing.game import Game
from lora_dp.fed.models.task_losses import task_losses
from lora_dp.fed.rounds.evaluation import evaluation_batches
from lora_dp.fed.rounds.federation import Federation

Losses = dict[int, float]


class MislabelledExamples:
    """The federation with some examples of one client mislabelled, of which those train whose coin says so.

    Args:
        game: the run; all its clients work.
        count: how many, at most half of the client's examples.
        rng: chooses which, and their labels.

    Raises:
        ValueError: too many of them, or a single class.
    """

    def __init__(self, game: Game, count: int, rng: np.random.Generator) -> None:
        own = game.job.parts[game.client]
        if not 1 <= count <= len(own) // 2:
            raise ValueError(
                f"count must lie between 1 and {len(own) // 2}, half of the {len(own)} examples of the client with the "
                f"largest ε, not {count}."
            )
        self._game = game
        self.indices = rng.permutation(own)[:count]
        self._others = np.setdiff1d(own, self.indices)
        self._train = game.job.train.with_wrong_targets(self.indices, rng)

    def canaries(self) -> ExampleCanaries:
        """What :func:`lora_dp.audit` plants: numbers of examples."""
        return ExampleCanaries(self.indices.tolist(), lambda losses, index: losses[index])

    def train(self, included: Sequence[int]) -> Losses:
        """Trains with these canaries, and returns the loss (nats) of all of them."""
        game = self._game
        game.fresh()
        parts = list(game.job.parts)
        parts[game.client] = np.sort(np.concatenate([self._others, np.asarray(included, dtype=self._others.dtype)]))
        federation = Federation.of_job(game.config, replace(game.job, train=self._train, parts=parts))
        game.train(federation, [game.client])
        federation.load_global_state()
        return self._losses(federation)

    def _losses(self, federation: Federation) -> Losses:
        model, precision = federation.model, federation.trainer.training.precision
        model.eval()
        found = []
        with torch.no_grad():
            for batch in evaluation_batches(self._train.subset(self.indices)):
                batch = {name: tensor.to(federation.device) for name, tensor in batch.items()}
                found.append(task_losses(model, batch, precision))
        return dict(zip(self.indices.tolist(), torch.cat(found).tolist(), strict=True))
