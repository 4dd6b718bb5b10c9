"""Every client's ledger in a run: who may still take part, what ε it adds up to, and the log written ahead."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_dp.accounting import Ledger, PoissonGaussian
from lora_dp.fed.privacy import UNITS, PrivacyPlan, finite

LOG = "ledger.jsonl"


class Account:
    """The releases of all clients: one count a client, or one for all where the server adds the noise.

    Args:
        plan: the run's privacy.
        sizes: number of examples of each client.

    Raises:
        ValueError: no noise reaches the budget for a client of that size.
    """

    def __init__(self, plan: PrivacyPlan, sizes: Sequence[int]) -> None:
        self.plan, self.sizes = plan, np.asarray(sizes, dtype=np.int64)
        self._events = {int(size): plan.event(int(size)) for size in np.unique(self.sizes)}
        self._counts = np.zeros(1 if plan.server_adds_noise else len(sizes), dtype=np.int64)

    def event(self, client: int) -> PoissonGaussian:
        """One release of this client."""
        return self._events[int(self.sizes[client])]

    def releases(self, client: int) -> int:
        """How many there were."""
        return int(self._counts[0 if self.plan.server_adds_noise else client])

    def eligible(self) -> list[int]:
        """Clients whose budget has room for a round; a function of public quantities only."""
        if not self.plan.private:
            return list(range(len(self.sizes)))
        room = self._counts + self.plan.releases_per_round <= self.plan.planned_releases
        return np.flatnonzero(np.broadcast_to(room, self.sizes.shape)).tolist()

    def add_round(self, clients: Iterable[int]) -> None:
        """Counts a round that these clients are about to take part in."""
        members = [0] if self.plan.server_adds_noise else list(clients)
        np.add.at(self._counts, members, self.plan.releases_per_round)

    def epsilon(self, client: int) -> float:
        """ε of one client so far; 0 before its first release, inf without privacy."""
        return self._epsilon(self.event(client), self.releases(client))

    def worst_epsilon(self) -> float:
        """The largest ε of all clients."""
        counts = np.broadcast_to(self._counts, self.sizes.shape)
        kinds = {(int(size), int(count)) for size, count in np.unique(np.stack([self.sizes, counts]), axis=1).T}
        return max(self._epsilon(self._events[size], count) for size, count in kinds)

    def noise_multipliers(self) -> list[float]:
        """σ of each kind of client."""
        return [event.noise_multiplier for event in self._events.values()]

    def report(self) -> dict[str, Any]:
        """Every ledger and its ε, ready for JSON (an infinite ε is null)."""
        plan = self.plan
        shared = plan.server_adds_noise
        clients = []
        for client in range(1 if shared else len(self.sizes)):
            count = self.releases(client)
            clients.append({
                "client": "all" if shared else client,
                "examples": int(self.sizes.sum()) if shared else int(self.sizes[client]),
                "steps": count,
                "epsilon": finite(self.epsilon(client)),
                "ledger": _ledger(self.event(client), count).state_dict(),
            })
        return {
            "unit": UNITS[plan.unit],
            "delta": plan.delta,
            "accountant": plan.accountant,
            "target_epsilon": plan.epsilon,
            "mechanism": plan.mechanism,
            "worst_epsilon": finite(self.worst_epsilon()),
            "clients": clients,
        }

    def _epsilon(self, event: PoissonGaussian, count: int) -> float:
        return _ledger(event, count).epsilon(self.plan.delta, self.plan.accountant)


def _ledger(event: PoissonGaussian, count: int) -> Ledger:
    ledger = Ledger()
    ledger.append(event, count)
    return ledger


class AheadLog:
    """The rounds that were begun, each on the disk before anything of it leaves a client.

    A crash can over-count, never under-count: a round that was begun again, with other noise, is counted twice. In a
    reproducible run the second time releases the same bits as the first, and counts once.

    Args:
        path: of the file, one JSON object a line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, number: int, clients: Sequence[int]) -> None:
        """Writes that round ``number`` (from 1) begins with these clients; on the disk when this returns."""
        line = json.dumps({"round": number, "clients": list(clients)}, separators=(",", ":")) + "\n"
        with self.path.open("ab") as file:
            # After a crash the last line may be torn: its round had not begun. It must not spoil the next one.
            if file.tell() and not self._ends_whole():
                line = "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def _ends_whole(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def replay(self, account: Account, *, reproducible: bool, before: int | None = None) -> None:
        """Counts every round of the log into an account.

        Args:
            reproducible: count a round that was begun several times once.
            before: of a reproducible run, only rounds with a smaller number: the others will be done again.

        Raises:
            ValueError: a line inside the log is damaged, so that releases may have been forgotten.
        """
        rounds: list[tuple[int, list[int]]] = []
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        for index, line in enumerate(lines):
            if not line:
                continue
            try:
                entry = json.loads(line)
                rounds.append((int(entry["round"]), [int(client) for client in entry["clients"]]))
            except (ValueError, KeyError, TypeError) as error:
                if _torn(line):
                    continue
                raise ValueError(
                    f"Line {index + 1} of {self.path} is damaged: what was released cannot be counted any more. "
                    "Restore the file from a backup; do not go on with this run.") from error
        if reproducible:
            rounds = [(n, clients) for n, clients in dict(rounds).items() if before is None or n < before]
        for _, clients in rounds:
            if clients and not 0 <= min(clients) <= max(clients) < len(account.sizes):
                raise ValueError(f"{self.path} names clients that this run does not have: it belongs to another run.")
            account.add_round(clients)


def _torn(line: bytes) -> bool:
    """Whether a line is the beginning of one that a crash cut off: nothing of it was begun."""
    return b"}" not in line
