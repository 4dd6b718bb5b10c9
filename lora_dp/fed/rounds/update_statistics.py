"""What clients' updates of one round say: how long they are, how far they agree, and how much of them is noise."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_dp.engine.phases import PhaseCycle
from lora_dp.fed.methods import MERGED, factor
from lora_dp.fed.rounds.client import Trainer
from lora_dp.fed.rounds.local_training import LocalTraining
from lora_dp.fed.rounds.messages import Task
from lora_dp.fed.rounds.privacy_plan import finite
from lora_dp.fed.rounds.regulators import regulators
from lora_dp.privacy.filter_gain import filter_gain, impulse_energy
from lora_dp.privacy.filtering import Filter, make_filter

MOST_UPDATES = 32
MOST_BYTES = 256 * 2**20


class UpdateRecorder:
    """Takes in the updates of one turn of a round as they arrive, and sums them up in a line of JSON.

    It is to see released values only: updates that clients have noised, or that no privacy is claimed for. Where the
    server adds the noise, single updates are not released, and must not be given to it.

    At most 32 updates are kept, each as one float32 vector, and no more than 256 MiB would hold if all were as large:
    those of the lowest numbers. Those beyond are counted. In which order they came is not kept: it would tell how long
    clients took, and so of their batches.

    Args:
        asked: the numbers of the clients that were asked for one.
    """

    def __init__(self, asked: Sequence[int]) -> None:
        self._places = {client: place for place, client in enumerate(sorted(asked))}
        self._clients: list[int] = []
        self._shapes: list[list[tuple[str, torch.Size]]] = []
        self._changes: list[Tensor] = []
        self._norms: list[float] = []
        self._noise: list[float | None] = []
        self._cosines: list[list[float | None]] = []
        self._left_out = 0

    def add(
        self, client: int, update: Mapping[str, Tensor], start: Mapping[str, Tensor], noise_norm: float | None
    ) -> None:
        """Takes in one update.

        Args:
            client: its number.
            update: the trained tensors as they were sent, by name.
            start: what the client started from: the same names at least, with the same shapes.
            noise_norm: expected norm of the noise in the update (:func:`expected_noise_norm`); None where there is
                none, or it is not known.

        Raises:
            ValueError: no tensors, or ones that the start lacks.
        """
        names = sorted(update)
        if not names or any(name not in start or start[name].shape != update[name].shape for name in names):
            raise ValueError(f"The update of client {client} does not fit the state that it started from.")
        size = 4 * sum(update[name].numel() for name in names)
        if self._places[client] >= min(MOST_UPDATES, MOST_BYTES // max(size, 1)):
            self._left_out += 1
            return
        change = torch.cat(
            [(update[name].detach().cpu().double() - start[name].detach().cpu().double()).flatten() for name in names]
        )
        norm = float(change.norm())
        shapes = [(name, update[name].shape) for name in names]
        row = [
            self._cosine(change, norm, other) if shapes == self._shapes[other] else None
            for other in range(len(self._changes))
        ]
        for other, cosine in enumerate(row):
            self._cosines[other].append(cosine)
        self._cosines.append([*row, 1.0 if math.isfinite(norm) and norm > 0 else None])
        self._clients.append(client)
        self._shapes.append(shapes)
        self._changes.append(change.float())
        self._norms.append(norm)
        self._noise.append(noise_norm)

    def _cosine(self, change: Tensor, norm: float, other: int) -> float | None:
        scale = norm * self._norms[other]
        if not (math.isfinite(scale) and scale > 0):
            return None
        return max(-1.0, min(1.0, float(change @ self._changes[other].double()) / scale))

    def summary(self) -> dict[str, Any]:
        """What was taken in, ready for JSON.

        Returns:
            A mapping with

            - ``clients``: their numbers, in ascending order;
            - ``norms``: ‖Δ‖ of each, Δ = update − start, all tensors together;
            - ``cosine``: ⟨Δᵢ, Δⱼ⟩ / ‖Δᵢ‖‖Δⱼ‖ by pair; null where an update is zero, or their shapes
              differ (other ranks);
            - ``noise_share``: noise_norm² / ‖Δ‖² of each; null without a noise_norm. Above 1 by chance, or where
              training has undone some of the noise;
            - ``left_out``: how many were not kept.
        """
        shares = [
            None if noise is None or not norm > 0 else finite(noise**2 / norm**2)
            for noise, norm in zip(self._noise, self._norms, strict=True)
        ]
        order = sorted(range(len(self._clients)), key=self._clients.__getitem__)
        return {
            "clients": [self._clients[i] for i in order],
            "norms": [finite(self._norms[i]) for i in order],
            "cosine": [[self._cosines[i][j] for j in order] for i in order],
            "noise_share": [shares[i] for i in order],
            "left_out": self._left_out,
        }


def expected_noise(trainer: Trainer, task: Task, examples: int, noise_multiplier: float) -> dict[str, float] | None:
    """Root mean square of what the noise alone contributes to each number of a client's update in a turn, by tensor.

    With private steps of SGD: √(k · g) · lr · σC/L, with k the steps that train it, L the expected batch size, and g
    the energy that filter (and regulator) leave of white noise: that of the sum of the noise that the steps add, as if
    no later gradient answered to it. With noise on whole updates: √g · σC.

    Args:
        trainer: of the run.
        task: the turn, with the state that the client starts from.
        examples: of the client.
        noise_multiplier: σ of the client's releases.

    Returns:
        None where single updates carry no noise (no privacy, the server's noise), where the mechanism is not the sound
        one, or where no such formula holds: private steps of AdamW, or of a method's own optimizer, whose moments
        divide by the noise, or at a bound that moves.
    """
    plan, training, method = trainer.plan, trainer.training, trainer.method
    by_steps = plan.examples_are_protected
    if not plan.private or plan.server_adds_noise:
        return None
    if by_steps and (training.optimizer != "sgd" or method.own_optimizer or plan.clipping == "adaptive"):
        return None
    rules = regulators(method, task.state, task.round, task.turn)
    low_pass = make_filter(training.low_pass, training.low_pass_strength) if by_steps else None
    bound = plan.max_grad_norm if by_steps else plan.max_update_norm
    one = noise_multiplier * bound / (min(training.batch_size, examples) if by_steps else 1)
    found = {}
    for name, tensor in task.state.items():
        if name.endswith(MERGED) or not method.trains(name, task.round, task.turn):
            continue
        filtered = low_pass if factor(name) is not None else None
        gain = _gain(filtered, tensor, rules[name].inverse if name in rules else None)
        if by_steps:
            gain *= _steps(name, trainer, task) * _learning_rate(name, training) ** 2
        found[name] = one * math.sqrt(gain)
    return found


def expected_noise_norm(trainer: Trainer, task: Task, examples: int, noise_multiplier: float) -> float | None:
    """√E‖·‖² of what the noise alone contributes to a client's update in one turn, all its tensors together.

    Args, and when it is None: as for :func:`expected_noise`.
    """
    by_tensor = expected_noise(trainer, task, examples, noise_multiplier)
    if by_tensor is None:
        return None
    return math.sqrt(sum(task.state[name].numel() * noise**2 for name, noise in by_tensor.items()))


def _steps(name: str, trainer: Trainer, task: Task) -> int:
    """How many of a turn's steps train a tensor; a cycle of phases goes on from round to round."""
    which, steps = factor(name), trainer.training.local_steps
    if which is None:
        return steps
    phases, first = PhaseCycle(trainer.method.phases(task.round, task.turn)), task.round * steps
    return sum(which in phases.factors(step) for step in range(first, first + steps))


def _learning_rate(name: str, training: LocalTraining) -> float:
    return training.learning_rate * (training.lr_ratio if factor(name) == "B" else 1.0)


def _gain(low_pass: Filter | None, tensor: Tensor, inverse: Tensor | None) -> float:
    """Mean square of what is left of white noise Z: of F(Z), of Z·M⁻¹ for B and M⁻¹·Z for A, or of both in turn."""
    if low_pass is None:
        return 1.0 if inverse is None else float(inverse.double().square().sum()) / len(inverse)
    rows, columns = tensor.shape
    if inverse is None:
        return filter_gain(low_pass, (rows, columns))
    return impulse_energy(low_pass, (rows, columns), inverse.double().cpu())
