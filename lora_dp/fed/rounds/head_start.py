"""Before the first round: one release of feature sums by every client, by which the server starts the head."""

import math
from collections.abc import Callable

import torch

from lora_dp.errors import TooFewClients
from lora_dp.fed.methods import State, WeightedAverage
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.local_training import SUM_WEIGHTS, summed_head
from lora_dp.fed.rounds.messages import Task
from lora_dp.fed.rounds.privacy_plan import client_mechanism, clipped
from lora_dp.fed.rounds.seeds import Stream
from lora_dp.fed.rounds.server import nbytes
from lora_dp.fed.rounds.update_checks import fault
from lora_dp.fed.safe_text import harmless
from lora_dp.nn.feature_head import started_head
from lora_dp.nn.feature_sums import FeatureMoments, FeatureSums
from lora_dp.privacy.accounting import PrivacyBudgetExceeded

# Sums may be as long as the bound: a rounding in float32 must not make an honest client's too long.
_ROUNDING = 1 + 2.0**-10


def start_head(federation: Federation, on_step: Callable[[], None] = lambda: None) -> tuple[int, int]:
    """Lets every client release its feature sums, and starts the head from their mean.

    The release is in the ledger before it begins.

    Returns:
        Bytes sent down and up.

    Raises:
        ValueError: the model has no feature head.
        PrivacyBudgetExceeded: sums were released before, and the budget has no room for once more.
        TooFewClients: fewer than ``min_clients`` sent sums that can be used.
    """
    name, head = summed_head(federation.workspace.whole)
    clients = list(range(federation.clients))
    if not federation.account.has_room_for_sums():
        raise PrivacyBudgetExceeded(
            "Feature sums were released before a crash, and once more would lead above the budget: begin a new run."
        )
    federation.account.add_sums(clients)
    if federation.log is not None:
        federation.log.append(0, [] if federation.plan.server_adds_noise else clients)
    sums = head.empty_sums(SUM_WEIGHTS)
    moments, down, up = _mean_sums(federation, sums, clients, on_step)
    federation.released_sums = sums
    training = federation.trainer.training
    federation.workspace.load(federation.server.state)  # the head goes on from what the server has
    values = started_head(head, moments, balanced=training.balanced, warm=training.warm_start)
    federation.server.apply({f"{name}.{part}": value for part, value in values.items()})
    return down, up


def _mean_sums(
    federation: Federation, sums: FeatureSums, clients: list[int], on_step: Callable[[], None]
) -> tuple[FeatureMoments, int, int]:
    """The mean of all clients' sums, with the noise that it has, and the bytes that travelled."""
    plan, bound = federation.plan, sums.sensitivity
    assert plan.sums_event is not None
    noise_multiplier = plan.sums_event.noise_multiplier
    zero: State = {name: torch.zeros_like(parameter) for name, parameter in sums.named_parameters()}
    numbers = sum(tensor.numel() for tensor in zero.values())
    tasks = {
        rank: Task(0, 0, rank, federation.server.task(0, 0, rank).state, sums=True) for rank in set(federation.ranks)
    }
    checked = Task(0, 0, federation.workspace.layers.r, zero, sums=True)
    mean = WeightedAverage()
    total = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in zero.items()}
    waiting, problems = set(clients), []
    down = up = arrived = 0
    weights, variance = 0.0, 0.0
    asked = ((client, tasks[federation.ranks[client]]) for client in clients)
    for reply in federation.engine.train(asked, on_step):
        if reply.client not in waiting:
            continue  # a second answer, or one that nobody asked for
        waiting.remove(reply.client)
        # A client's own noise, on a mean over its examples or on one vector of its own.
        divisor = int(federation.account.sizes[reply.client]) if plan.examples_are_protected else 1
        own = 0.0 if plan.server_adds_noise else noise_multiplier * bound / divisor
        reason = reply.failure or fault(reply.update, checked, zero, bound * _ROUNDING, own * math.sqrt(numbers))
        if reason is not None:
            problems.append(f"client {reply.client} {harmless(reason)}")
            continue
        assert reply.update is not None
        tensors = reply.update.tensors
        if plan.server_adds_noise:
            bounded = clipped(tensors, bound)
            assert bounded is not None  # as fault has seen
            for name, value in bounded.items():
                total[name] += value
        else:
            weight = federation.weight(reply.client)
            mean.add(dict(tensors), weight)
            weights, variance = weights + weight, variance + (weight * own) ** 2
        down += nbytes(tasks[federation.ranks[reply.client]].state)
        up += nbytes(tensors)
        arrived += 1
    problems += [f"client {client} sent nothing" for client in sorted(waiting)]
    if not plan.server_adds_noise and arrived < max(1, federation.min_clients):
        raise TooFewClients(
            f"Too few clients sent feature sums: {arrived} of {len(clients)}, min_clients is {federation.min_clients} "
            f"({'; '.join(problems[:3])}). Mend these clients, and resume."
        )
    if plan.server_adds_noise:
        source = federation.trainer.source(Stream.SUMS_NOISE)
        mechanism = client_mechanism(bound, noise_multiplier, source)
        released = mechanism.release(list(total.values()))
        values = {name: noisy / len(clients) for name, noisy in zip(total, released, strict=True)}
        noise = noise_multiplier * bound / len(clients)
        # Of all clients: who answered is not told.
        down, up = sum(nbytes(tasks[rank].state) for rank in federation.ranks), nbytes(zero) * len(clients)
    else:
        values = mean.result()  # type: ignore[assignment]
        noise = math.sqrt(variance) / weights
    with torch.no_grad():
        for name, parameter in sums.named_parameters():
            parameter.copy_(values[name])
    return sums.moments(noise), down, up
