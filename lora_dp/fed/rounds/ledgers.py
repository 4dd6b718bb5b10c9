"""Every client's ledger in a run: who may still take part, what ε it adds up to, and the log written ahead."""

import json
import math
import re
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_dp.atomic_files import append_durably
from lora_dp.fed.origin import Origin
from lora_dp.fed.rounds.privacy_plan import UNITS, PrivacyPlan, check_size, finite, guarantee
from lora_dp.hash_chain import START, BrokenChain, ChainedLog, link
from lora_dp.privacy.accounting import Ledger, PoissonGaussian, max_steps

LOG = "ledger.jsonl"
# Beside the log: which examples its rounds release of, in a digest that is as private as they are.
EXAMPLES = "server-only.sha256"
_FORMAT, _VERSION = "lora-dp log", 3
_FEW = 8


class LogError(ValueError):
    """The release log is damaged or belongs to other settings, so ε cannot be computed. The run must not be resumed."""


class Account:
    """The releases of all clients: one count a client, or one for all where the server adds the noise.

    Args:
        plan: the run's privacy.
        sizes: number of examples of each client.
        origin: what tells the run from another, where it has a configuration.
        events: one release of a client of each size that there is, from the smallest; by default what the plan
            calibrates.

    Raises:
        ValueError: no noise reaches the budget for a client of that size, or no client is of such a size; another
            number of events than of sizes.
    """

    def __init__(
        self,
        plan: PrivacyPlan,
        sizes: Sequence[int],
        origin: Origin | None = None,
        events: Sequence[PoissonGaussian] | None = None,
    ) -> None:
        for client, size in enumerate(sizes):
            check_size(client, size)
        self.plan, self.sizes, self.origin = plan, np.asarray(sizes, dtype=np.int64), origin
        different = np.unique(self.sizes).tolist()
        events = [plan.event(size) for size in different] if events is None else events
        self._events = dict(zip(different, events, strict=True))
        self._counts = np.zeros(1 if plan.server_adds_noise else len(sizes), dtype=np.int64)
        # Releases of feature sums before the first round: one, or more where a crash had it begin again.
        self._sums = np.zeros_like(self._counts)
        self._rooms: dict[tuple[int, int], int] = {}
        self._sums_event = plan.sums_event

    def event(self, client: int) -> PoissonGaussian:
        """One release of this client."""
        return self._events[int(self.sizes[client])]

    def releases(self, client: int) -> int:
        """How many there were."""
        return int(self._counts[0 if self.plan.server_adds_noise else client])

    def ledger(self, client: int) -> Ledger:
        """What this client has released so far."""
        sums = int(self._sums[0 if self.plan.server_adds_noise else client])
        return self._ledger(self.event(client), self.releases(client), sums)

    def eligible(self) -> list[int]:
        """Clients whose budget has room for a round; a function of public quantities only."""
        if not self.plan.private:
            return list(range(len(self.sizes)))
        most: np.ndarray | int = self.plan.planned_releases
        if self._sums.max() > 1:  # the plan is for one
            pairs = zip(self.sizes.tolist(), np.broadcast_to(self._sums, self.sizes.shape).tolist(), strict=True)
            most = np.array([self._room(*pair) for pair in pairs])
        room = np.broadcast_to(self._counts, self.sizes.shape) + self.plan.releases_per_round <= most
        return np.flatnonzero(room).tolist()

    def _room(self, size: int, sums: int) -> int:
        """Releases that fit the budget of a client of that size beside so many of feature sums."""
        plan = self.plan
        if sums <= 1:
            return plan.planned_releases
        if (size, sums) not in self._rooms:
            assert plan.epsilon is not None
            event = self._events[size]
            before = self._ledger(event, 0, sums)
            self._rooms[size, sums] = max_steps(before, event, plan.epsilon, plan.delta, plan.accountant)
        return self._rooms[size, sums]

    def add_sums(self, clients: Iterable[int]) -> None:
        """Counts that these clients are about to release feature sums."""
        np.add.at(self._sums, [0] if self.plan.server_adds_noise else list(clients), 1)

    def has_room_for_sums(self) -> bool:
        """Whether one release of feature sums more leads no client above its budget; the plan is for one."""
        if not self.plan.private or not self._sums.any():
            return True
        assert self.plan.epsilon is not None
        return all(self._epsilon(event, count, sums + 1) <= self.plan.epsilon for event, count, sums in self._kinds())

    def add_round(self, clients: Iterable[int]) -> None:
        """Counts a round that these clients are about to take part in."""
        members = [0] if self.plan.server_adds_noise else list(clients)
        np.add.at(self._counts, members, self.plan.releases_per_round)

    def epsilon(self, client: int) -> float:
        """ε of one client so far; 0 before its first release, inf without privacy."""
        return self.ledger(client).epsilon(self.plan.delta, self.plan.accountant)

    def worst_epsilon(self, *, exact: bool = True) -> float:
        """The largest ε of all clients; an upper bound of it, quickly, where ``exact`` is not asked for and they differ
        in more than a few ways."""
        kinds = self._kinds()
        if exact or len(kinds) <= _FEW or not self.plan.private:
            return max(self._epsilon(*kind) for kind in kinds)
        bound = max(self._ledger(*kind).epsilon(self.plan.delta, "rdp") for kind in kinds)
        # The noise was calibrated so that no planned number of releases exceeds the budget.
        assert self.plan.epsilon is not None
        within = int(self._counts.max()) <= self.plan.planned_releases and int(self._sums.max()) <= 1
        return min(bound, self.plan.epsilon) if within else bound

    def _kinds(self) -> set[tuple[PoissonGaussian, int, int]]:
        """One release, how many there were, and how many of feature sums: of each kind of client that there is."""
        counts, sums = (np.broadcast_to(each, self.sizes.shape) for each in (self._counts, self._sums))
        triples = np.unique(np.stack([self.sizes, counts, sums]), axis=1).T.tolist()
        return {(self._events[size], count, beside) for size, count, beside in triples}

    def noise_multipliers(self) -> list[float]:
        """σ of each kind of client."""
        return [event.noise_multiplier for event in self._events.values()]

    def report(self) -> dict[str, Any]:
        """Every ledger and its ε, ready for JSON (an infinite ε is null)."""
        plan = self.plan
        shared = plan.server_adds_noise
        clients = []
        for client in range(1 if shared else len(self.sizes)):
            clients.append(
                {
                    "client": "all" if shared else client,
                    # With whole clients protected, how many examples one has is not public.
                    "examples": None if plan.unit == "client" and plan.private else int(self.sizes[client]),
                    "steps": self.releases(client),
                    "epsilon": finite(self.epsilon(client)),
                    "ledger": self.ledger(client).state_dict(),
                }
            )
        return {
            "unit": UNITS[plan.unit] if plan.private else None,
            "delta": plan.delta,
            "accountant": plan.accountant,
            "target_epsilon": plan.epsilon,
            "mechanism": plan.mechanism,
            "guarantee": guarantee(plan.mechanism),
            "worst_epsilon": finite(self.worst_epsilon()),
            "clients": clients,
        }

    def terms(self) -> dict[str, Any]:
        """What the run releases by its plan: public, and ready for JSON."""
        plan = self.plan
        hidden = plan.unit == "client" and plan.private
        return {
            "unit": plan.unit,
            "delta": plan.delta,
            "epsilon": plan.epsilon,
            "mechanism": plan.mechanism,
            "noise_by": plan.noise_by if hidden else None,
            "rounds": plan.rounds,
            "releases_per_round": plan.releases_per_round,
            "planned_releases": plan.planned_releases,
            "sizes": None if hidden else self.sizes.tolist(),
            "clients": len(self.sizes),
            "sums": None
            if self._sums_event is None
            else [self._sums_event.noise_multiplier, self._sums_event.sample_rate],
            "events": [[e.noise_multiplier, e.sample_rate] for e in self._events.values()][: 1 if hidden else None],
            "options": None if self.origin is None else self.origin.options,
        }

    def _epsilon(self, event: PoissonGaussian, count: int, sums: int) -> float:
        return self._ledger(event, count, sums).epsilon(self.plan.delta, self.plan.accountant)

    def _ledger(self, event: PoissonGaussian, count: int, sums: int) -> Ledger:
        ledger = Ledger()
        if self._sums_event is not None:
            ledger.append(self._sums_event, sums)
        ledger.append(event, count)
        return ledger


def _alike(a: Any, b: Any) -> bool:
    """Equal, numbers to a rounding: another machine may calibrate the same noise to another last bit."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_alike(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9)
    return bool(a == b)


def _different(terms: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Names of the terms that are not alike; of the options, those that differ."""
    names = [name for name in {**terms, **before} if not _alike(terms.get(name), before.get(name))]
    options, others = terms.get("options"), before.get("options")
    if "options" in names and options is not None and others is not None:
        names.remove("options")
        names += [name for name in {**options, **others} if options.get(name) != others.get(name)]
    return list(dict.fromkeys(names))


def _bound(origin: Origin, head: dict[str, Any]) -> str:
    """What stands for the examples of the run whose log begins with this entry."""
    return link(link(START, head), origin.examples)


class AheadLog:
    """The rounds that were begun, each on the disk before anything of it leaves a client.

    A crash can over-count, never under-count: a round that was begun again, with other noise, is counted twice. In a
    reproducible run the second time releases the same bits as the first, and counts once.

    Args:
        path: of the file, one JSON object a line: the terms on which the rounds release, then the rounds; each with the
            digest that chains it to those before (:mod:`lora_dp.hash_chain`). Which examples they release of stands in
            a file beside it, in a digest that follows the terms': it says something of private data, as the log must
            not.

    Attributes:
        run: what tells this run from all others, the digest of the log's first line; None before :meth:`begin`. Runs of
            one configuration with secret noise differ by a number that was drawn for each; reproducible ones release
            the same bits.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._examples = path, path.with_name(EXAMPLES)
        self._log = ChainedLog(path)
        self.run: str | None = None

    def begin(self, account: Account, *, reproducible: bool) -> None:
        """Writes the terms of a new log, or checks that those of an existing one are the account's.

        Raises:
            LogError: they are not: what the log counts was released on other terms, or of other examples; or the log is
                not whole.
        """
        terms = {**account.terms(), "reproducible": reproducible}
        entries = self._entries()
        if not entries:
            head = {"format": _FORMAT, "version": _VERSION, "terms": terms}
            if not reproducible:
                head["run"] = secrets.token_hex(16)
            if account.origin is not None:  # before the log, which counts on it
                self._examples.unlink(missing_ok=True)
                append_durably(self._examples, f"{_bound(account.origin, head)}\n".encode(), 0o600)
            self._log.append(head)
            self.run = link(START, head)
            return
        different = _different(terms, self._terms(entries[0]))
        origin = account.origin if "options" not in different else None
        if origin is not None and self._held_examples() != _bound(origin, entries[0]):
            different.append("examples")
        self._refuse(different)
        self.run = link(START, entries[0])

    def _terms(self, head: dict[str, Any]) -> dict[str, Any]:
        """The terms in the first entry."""
        try:
            if (head["format"], head["version"]) != (_FORMAT, _VERSION):
                raise LogError(
                    f"The log {self.path} is of format {head['format']!r}, version "
                    f"{head['version']!r}: go on with this run by the lora-dp that began it."
                )
            return dict(head["terms"])
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, LogError):
                raise
            raise LogError(self._lost("line 1 is damaged")) from error

    def _refuse(self, different: Sequence[str]) -> None:
        if different:
            raise LogError(
                f"The run in {self.path.parent} was begun on other terms ({', '.join(different)} differ), and what it "
                "has released cannot be counted on these: restore its config.yaml and its data, or begin a new run."
            )

    def _held_examples(self) -> str:
        try:
            held = self._examples.read_text(encoding="ascii")
        except (OSError, ValueError):
            held = ""
        if re.fullmatch(r"[0-9a-f]{64}\n", held) is None:
            raise LogError(self._lost(f"{EXAMPLES} beside it is missing or damaged"))
        return held[:-1]

    def _entries(self) -> list[dict[str, Any]]:
        try:
            return self._log.read()
        except BrokenChain as error:
            if self._is_without_digests():
                raise LogError(
                    f"The log {self.path} was written by an earlier lora-dp, without digests: go on with this run by "
                    "that one, or begin a new run."
                ) from error
            raise LogError(self._lost(str(error))) from error

    def _is_without_digests(self) -> bool:
        try:
            return set(json.loads(self.path.read_bytes().split(b"\n")[0])) == {"terms"}
        except (OSError, ValueError, TypeError):
            return False

    def append(self, number: int, clients: Sequence[int]) -> None:
        """Writes that round ``number`` begins with these clients; on the disk when this returns.

        Rounds count from 1; 0 is the release of feature sums before them.
        """
        self._log.append({"round": number, "clients": list(clients)})

    def replay(self, account: Account, *, rounds_done: int, reproducible: bool) -> None:
        """Counts the rounds of the log into an account.

        Args:
            rounds_done: the round of the checkpoint that the run goes on from; −1 where there is none.
            reproducible: count each round up to that one once; those after it will release the same bits again.

        Raises:
            LogError: a line is damaged or missing, so that releases may have been forgotten; or they were released
                on other terms than the account's.
        """
        self.begin(account, reproducible=reproducible)
        rounds = self._rounds(self._entries())
        if max((n for n, _ in rounds), default=0) < rounds_done:
            raise LogError(self._lost(f"it ends before round {rounds_done}"))
        if reproducible:
            rounds = [(n, clients) for n, clients in dict(rounds).items() if n <= rounds_done]
        self._count(rounds, account)

    def rounds_begun(self) -> int:
        """How many lines of rounds there are.

        Raises:
            LogError: the log is not whole.
        """
        return len(self._entries()[1:])

    def counted(self, plan: PrivacyPlan) -> Account | None:
        """What all rounds that were begun add up to, by the log alone: neither data nor model are opened for it.

        Args:
            plan: of the run, by its configuration.

        Returns:
            None where there is no log, and so nothing was released.

        Raises:
            LogError: the log is not whole, or was begun on other terms than the plan's.
        """
        entries = self._entries()
        if not entries:
            return None
        terms = self._terms(entries[0])
        try:
            # Where sizes are no public matter, one kind of release is all clients'.
            sizes = [1] * terms["clients"] if terms["sizes"] is None else terms["sizes"]
            account = Account(plan, sizes, events=[PoissonGaussian(*event) for event in terms["events"]])
            once = {name: terms[name] for name in ("options", "reproducible")}
        except (KeyError, TypeError, ValueError) as error:
            raise LogError(self._lost("line 1 is damaged")) from error
        self._refuse(_different({**account.terms(), **once}, terms))
        rounds = self._rounds(entries)
        self._count(dict(rounds).items() if once["reproducible"] else rounds, account)
        return account

    def _rounds(self, entries: Sequence[dict[str, Any]]) -> list[tuple[int, list[int]]]:
        """The rounds that were begun, each with its clients, in the order of the log."""
        rounds: list[tuple[int, list[int]]] = []
        has_sums = self._terms(entries[0]).get("sums") is not None if entries else False
        for index, entry in enumerate(entries[1:], 1):
            try:
                number, clients = entry["round"], [int(client) for client in entry["clients"]]
                last = max((n for n, _ in rounds), default=0)
                if not (1 <= number <= last + 1 or has_sums and number == last == 0):
                    raise ValueError(f"round {number} out of turn")
            except (ValueError, KeyError, TypeError) as error:
                raise LogError(self._lost(f"line {index + 1} is damaged")) from error
            rounds.append((number, clients))
        return rounds

    def _count(self, rounds: Iterable[tuple[int, list[int]]], account: Account) -> None:
        for number, clients in rounds:
            if clients and not 0 <= min(clients) <= max(clients) < len(account.sizes):
                raise LogError(f"{self.path} names clients that this run does not have: it belongs to another run.")
            if number:
                account.add_round(clients)
            else:
                account.add_sums(clients)

    def _lost(self, what: str) -> str:
        return (
            f"The log {self.path} is not whole ({what}): what was released cannot be counted any more. Restore it "
            "from a backup; do not go on with this run."
        )
