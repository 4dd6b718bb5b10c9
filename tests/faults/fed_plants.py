"""What plants each fault of the federation: in the server, in a client, in the log of rounds, in who has which data."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_dp.fed.data.partition
import lora_dp.fed.rounds.client
import lora_dp.fed.rounds.server_noise
import lora_dp.fed.rounds.setup
from lora_dp.fed.flower.ledger import ClientLedger
from lora_dp.fed.flower.policy import Policy
from lora_dp.fed.rounds.ledgers import AheadLog
from lora_dp.fed.rounds.server_noise import NoisySum
from lora_dp.hash_chain import START
from lora_dp.privacy.accounting import Ledger
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
