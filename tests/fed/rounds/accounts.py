"""Accounts of three clients, and their logs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_dp.fed.methods import get_method
from lora_dp.fed.rounds.ledgers import LOG, Account, AheadLog
from tests.fed.small import TRAINING, plan_for

SIZES = (12, 20, 9)


def account(method: str = "dp-lora", sizes: Sequence[int] = SIZES, **changes: Any) -> Account:
    return Account(plan_for(get_method(method), TRAINING, clients=len(sizes), **changes), sizes)


def log(folder: Path, *rounds: tuple[int, list[int]], reproducible: bool = False, **changes: Any) -> AheadLog:
    found = AheadLog(folder / LOG)
    found.begin(account(**changes), reproducible=reproducible)
    for number, clients in rounds:
        found.append(number, clients)
    return found


def counts(found: Account) -> list[int]:
    return [found.releases(client) for client in range(len(found.sizes))]


def replayed(found: AheadLog, rounds_done: int = 0, *, reproducible: bool = False, **changes: Any) -> list[int]:
    fresh = account(**changes)
    found.replay(fresh, rounds_done=rounds_done, reproducible=reproducible)
    return counts(fresh)
