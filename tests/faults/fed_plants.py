"""What plants each fault of the federation: in the server, in a client, in the log of rounds, in who has which data."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_dp.fed.data.partition
import lora_dp.fed.rounds.client
import lora_dp.fed.rounds.head_start
import lora_dp.fed.rounds.server_noise
import lora_dp.fed.rounds.setup
from lora_dp.fed.flower.ledger import ClientLedger
from lora_dp.fed.flower.policy import Policy
from lora_dp.fed.rounds.ledgers import Account, AheadLog
from lora_dp.fed.rounds.local_training import SUM_WEIGHTS, LocalSteps
from lora_dp.fed.rounds.server_noise import NoisySum
from lora_dp.hash_chain import START
from lora_dp.privacy.accounting import Ledger, PoissonGaussian
from tests.faults.planting import Planting


def dealt_to_two_clients(planting: Planting) -> None:
    def planted(deal: Any) -> Any:
        def overlapping(*arguments: Any) -> Any:
            parts = deal(*arguments)
            return [torch.cat([torch.as_tensor(parts[0]), torch.as_tensor(parts[-1][:1])]).numpy(), *parts[1:]]

        return overlapping

    planting.replace(lora_dp.fed.data.partition, "_dirichlet", planted)


def opened_by_two_clients(planting: Planting) -> None:
    def planted(open_part: Any) -> Any:
        def overlapping(self: Any, client: int) -> Any:
            return self.train.subset([*self.parts[client], self.parts[client - 1][0]])

        return overlapping

    planting.replace(lora_dp.fed.rounds.setup.Job, "examples", planted)


def same_noise_at_each_client(planting: Planting) -> None:
    def planted(derive: Any) -> Any:
        return lambda seed, stream, client, *place: derive(seed, stream, 0, *place)

    planting.replace(lora_dp.fed.rounds.client, "derived_seed", planted)


class _Silent:
    def release(self, sums: list[Tensor]) -> list[Tensor]:
        return sums


def no_noise_by_the_client(planting: Planting) -> None:
    planting.replace(lora_dp.fed.rounds.client, "client_mechanism", lambda _: lambda *settings: _Silent())


def _count_updates(planting: Planting) -> dict[int, int]:
    """How many updates each sum has taken in, by its ``id``."""
    counts: dict[int, int] = {}

    def start(init: Any) -> Any:
        return lambda self, *arguments: (counts.pop(id(self), None), init(self, *arguments))[1]

    def planted(add: Any) -> Any:
        def counted(self: NoisySum, *states: Any) -> bool:
            counts[id(self)] = counts.get(id(self), 0) + 1
            return add(self, *states)

        return counted

    planting.replace(NoisySum, "__init__", start)
    planting.replace(NoisySum, "add", planted)
    return counts


def server_noise_on_empty_rounds_only(planting: Planting) -> None:
    counts = _count_updates(planting)

    def planted(result: Any) -> Any:
        def silent(self: NoisySum, source: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                if counts.get(id(self)):
                    patch.setattr(lora_dp.fed.rounds.server_noise, "client_mechanism", lambda *settings: _Silent())
                return result(self, source)

        return silent

    planting.replace(NoisySum, "result", planted)


def server_divides_by_replies(planting: Planting) -> None:
    counts = _count_updates(planting)

    def planted(result: Any) -> Any:
        def divided(self: NoisySum, source: Any) -> Any:
            if replies := counts.get(id(self)):
                self._plan = replace(self._plan, client_rate=1.0, clients=replies)
            return result(self, source)

        return divided

    planting.replace(NoisySum, "result", planted)


def rounds_logged_late(planting: Planting) -> None:
    """Each when the next one begins."""
    waiting: dict[int, tuple[Any, ...]] = {}

    def planted(append: Any) -> Any:
        def late(self: AheadLog, *entry: Any) -> None:
            before, waiting[id(self)] = waiting.get(id(self)), entry
            if before is not None:
                append(self, *before)

        return late

    planting.replace(AheadLog, "append", planted)


def nodes_without_a_ledger_obey(planting: Planting) -> None:
    """As if their owners had declared that they need no privacy of their own."""

    def planted(of_node: Any) -> Any:
        def open_without(node_config: Any, *, budget: bool) -> Policy:
            declared = {} if "ledger" in node_config else {"private": False}
            return of_node({**node_config, **declared}, budget=budget)

        return open_without

    planting.replace(Policy, "of_node", planted)


def damaged_ledgers_begun_anew(planting: Planting) -> None:
    """A node's own."""

    def planted(read: Any) -> Any:
        def anew(self: ClientLedger) -> Any:
            try:
                return read(self)
            except ValueError:
                return Ledger(), 0, START, {}

        return anew

    planting.replace(ClientLedger, "_read", planted)


# Feature sums


def sums_not_clipped(planting: Planting) -> None:
    """Of a whole client: neither by itself nor by the server."""

    def planted(clip: Any) -> Any:
        return lambda change, bound: clip(change, math.inf if "by_class.weight" in change else bound)

    for place in (lora_dp.fed.rounds.client, lora_dp.fed.rounds.head_start):
        planting.replace(place, "clipped", planted)


def sums_of_examples_not_clipped(planting: Planting) -> None:
    def planted(of_sums: Any) -> Any:
        return lambda *arguments: replace(of_sums(*arguments), clipping="automatic")

    planting.replace(LocalSteps, "of_sums", planted)


def sums_noised_for_less(planting: Planting) -> None:
    """As if an example added its class's part alone, with a sensitivity that is √2 smaller or more."""

    def planted(of_sums: Any) -> Any:
        def quieter(event: PoissonGaussian, *arguments: Any) -> Any:
            event = PoissonGaussian(event.noise_multiplier / math.sqrt(2), event.sample_rate)
            return of_sums(event, *arguments)

        return quieter

    planting.replace(LocalSteps, "of_sums", planted)
    planting.replace(lora_dp.fed.rounds.client.Trainer, "_check_ledger", lambda _: lambda *arguments: None)


def sums_of_clients_noised_for_less(planting: Planting) -> None:
    def planted(make: Any) -> Any:
        return lambda bound, noise_multiplier, source: make(
            bound, noise_multiplier / (math.sqrt(2) if bound == SUM_WEIGHTS.sensitivity else 1), source
        )

    for place in (lora_dp.fed.rounds.client, lora_dp.fed.rounds.head_start):
        planting.replace(place, "client_mechanism", planted)


def sums_barely_noised(planting: Planting) -> None:
    """By examples, clients or the server: a fiftieth of what is accounted for."""

    def by_examples(of_sums: Any) -> Any:
        return lambda event, *arguments: of_sums(
            PoissonGaussian(event.noise_multiplier / 50, event.sample_rate), *arguments
        )

    def by_others(make: Any) -> Any:
        return lambda bound, noise_multiplier, source: make(
            bound, noise_multiplier / (50 if bound == SUM_WEIGHTS.sensitivity else 1), source
        )

    planting.replace(LocalSteps, "of_sums", by_examples)
    planting.replace(lora_dp.fed.rounds.client.Trainer, "_check_ledger", lambda _: lambda *arguments: None)
    for place in (lora_dp.fed.rounds.client, lora_dp.fed.rounds.head_start):
        planting.replace(place, "client_mechanism", by_others)


def sums_not_counted(planting: Planting) -> None:
    planting.replace(Account, "add_sums", lambda _: lambda self, clients: None)


def sums_counted_once(planting: Planting) -> None:
    """However often a crash had them released."""

    def planted(add: Any) -> Any:
        return lambda self, clients: None if self._sums.any() else add(self, clients)

    planting.replace(Account, "add_sums", planted)


def sums_begun_again_beyond_the_budget(planting: Planting) -> None:
    planting.replace(Account, "has_room_for_sums", lambda _: lambda self: True)


def noise_on_class_sums_only(planting: Planting) -> None:
    """Moments over all classes leave as they are."""

    def planted(train: Any) -> Any:
        def silent(self: Any, client: int, examples: Any, task: Any, *rest: Any) -> Any:
            update = train(self, client, examples, task, *rest)
            if task.sums:
                plan = replace(self.plan, epsilon=None)
                exact = train(replace(self, plan=plan), client, examples, task, *rest)
                update.tensors["over_all.weight"] = exact.tensors["over_all.weight"]
            return update

        return silent

    planting.replace(lora_dp.fed.rounds.client.Trainer, "train", planted)


def warm_start_from_plain_sums(planting: Planting) -> None:
    """The server starts the head from sums that it has asked for without noise."""

    def planted(mean: Any) -> Any:
        def plain(federation: Any, *arguments: Any) -> Any:
            trainer, engine = federation.trainer, federation.engine
            bare = copy.copy(engine)
            bare.trainer = replace(trainer, plan=replace(trainer.plan, epsilon=None))
            federation.plan, federation.engine, kept = bare.trainer.plan, bare, federation.plan
            try:
                return mean(federation, *arguments)
            finally:
                federation.plan, federation.engine = kept, engine

        return plain

    planting.replace(lora_dp.fed.rounds.head_start, "_mean_sums", planted)
