"""A soak of a library with a fault of its own: ``python -m tests.fed.soaking`` says what is found of each, as JSON."""

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.soak import Soak
from lora_dp.fed.rounds import client
from lora_dp.fed.rounds.ledgers import Account, AheadLog
from lora_dp.fed.runs.folder import RunFolder, read_results

MOST_RUNS = 30


def forgets_a_client(append: Callable[..., None]) -> Callable[..., None]:
    return lambda log, number, clients: append(log, number, clients[:-1])


def forgets_lost_rounds(replay: Callable[..., None]) -> Callable[..., None]:
    def forgetful(log: AheadLog, account: Account, *, rounds_done: int, reproducible: bool) -> None:
        log.begin(account, reproducible=reproducible)
        with mock.patch.object(log, "begin"):  # whose terms would tell
            replay(log, account, rounds_done=rounds_done, reproducible=True)

    return forgetful


def counts_too_little(add_round: Callable[..., None]) -> Callable[..., None]:
    return lambda account, clients: add_round(account, [one for one in clients if one != 1])


def other_noise_in_each_process(derived_seed: Callable[..., int]) -> Callable[..., int]:
    return lambda *path: derived_seed(*path, os.getpid())


def keeps_lines_of_lost_rounds(keep_rounds: Callable[..., Any]) -> Callable[..., Any]:
    return lambda folder, last: [result for result in read_results(folder.path) if result.round <= last]


# What goes wrong, where, and what must be said of it.
PLANTS: dict[str, tuple[Any, str, Callable[..., Any], str]] = {
    "log": (AheadLog, "append", forgets_a_client, "and is in the log 0 times"),
    "resumed ledger": (AheadLog, "replay", forgets_lost_rounds, r"\d+ releases left, the ledger has \d+"),
    "ledger": (Account, "add_round", counts_too_little, r"\d+ releases left, the ledger has 0"),
    # Which of the two is seen first hangs on the moment of a kill.
    "noise": (
        client,
        "derived_seed",
        other_noise_in_each_process,
        "differ from the uninterrupted run's|other bits left for .* under the same noise",
    ),
    "metrics": (RunFolder, "keep_rounds", keeps_lines_of_lost_rounds, "metrics.jsonl has rounds"),
}


def found(plant: str) -> list[str]:
    """Violations of the first run that has any."""
    owner, name, fault, _ = PLANTS[plant]
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(owner, name, fault(getattr(owner, name))):
        soak = Soak(Path(folder), seed=0)
        while not soak.violations and soak.counts["runs"] < MOST_RUNS:
            soak.one_run()
    return soak.violations


if __name__ == "__main__":
    torch.set_num_threads(1)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        everything = {plant: found(plant) for plant in PLANTS}
    print(json.dumps(everything))
