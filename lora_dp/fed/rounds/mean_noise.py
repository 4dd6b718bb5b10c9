"""The noise in the mean of a round: known, since all of its settings are public."""

import math
from collections.abc import Sequence

from lora_dp.fed.rounds.client import Trainer
from lora_dp.fed.rounds.server import Server
from lora_dp.fed.rounds.update_statistics import expected_noise

# Of a client in a mean: its weight, rank and number of examples.
Averaged = tuple[float, int, int]


def noise_of_mean(
    trainer: Trainer, server: Server, index: int, turn: int, averaged: Sequence[Averaged]
) -> dict[str, float]:
    """Deviation of the noise in each number of a round's mean, by tensor; empty without noise.

    Args:
        trainer: of the run.
        server: with the state that the round started from.
        index, turn: of the round.
        averaged: the clients in the mean, where each has noise of its own.
    """
    plan = trainer.plan
    if plan.server_adds_noise:
        names = [name for name in server.state if trainer.method.trains(name, index, turn)]
        one = plan.turn_noise_multiplier(1) * plan.max_update_norm / (plan.client_rate * plan.clients)
        return dict.fromkeys(names, one)
    total = sum(weight for weight, _, _ in averaged)
    squares: dict[str, float] = {}
    for (rank, examples), weight in _summed_squares(averaged).items():
        noise_multiplier = plan.event(examples).noise_multiplier
        own = expected_noise(trainer, server.task(index, turn, rank), examples, noise_multiplier)
        for name, deviation in (own or {}).items():
            squares[name] = squares.get(name, 0.0) + weight * deviation**2
    return {name: math.sqrt(square) / total for name, square in squares.items()}


def _summed_squares(averaged: Sequence[Averaged]) -> dict[tuple[int, int], float]:
    """Σ of squared weights of the clients that are alike in rank and number of examples."""
    found: dict[tuple[int, int], float] = {}
    for weight, rank, examples in averaged:
        found[rank, examples] = found.get((rank, examples), 0.0) + weight**2
    return found
