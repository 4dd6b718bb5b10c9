"""A client's own ledger: what its node has ever released, kept on its side and trusted to nobody else."""

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dp.accounting import Ledger, PoissonGaussian, check_delta, check_epsilon
from lora_dp.chain import START, Heads, link
from lora_dp.fed.privacy import UNITS, PrivacyPlan, Unit
from lora_dp.files import write_atomically


class Refused(RuntimeError):
    """A client does not do what it was asked; the words tell nothing of its data."""


@dataclass(frozen=True)
class ClientLedger:
    """The ledger of one node's data over all runs, and the budget that its owner has set.

    Each turn's file names the one that it replaces by its digest, and a second file (``.heads`` after the name) holds
    the last digest and how many there were: a damaged file, or one of an earlier day, is refused.

    Args:
        path: of the file; made with the first release.
        unit: whose presence it is about: an example's, or that of all this client's data. Releases that protect the one
            add up to no ε for the other.
        epsilon, delta: releases that would lead beyond this budget are refused; None for no limit.
    """

    path: Path
    unit: Unit = "example"
    epsilon: float | None = None
    delta: float | None = None

    @classmethod
    def of_node(cls, node_config: Mapping[str, Any]) -> "ClientLedger | None":
        """The ledger that a node's configuration names as ``ledger``, with its ``unit``, ``epsilon`` and ``delta``.

        Raises:
            Refused: a unit or a budget without a ledger, or not whole.
        """
        named, unit, epsilon, delta = (node_config.get(name) for name in ("ledger", "unit", "epsilon", "delta"))
        if (epsilon is None) != (delta is None) or (epsilon is not None and named is None):
            raise Refused("cannot keep its budget: its node-config must name ledger, epsilon and delta together")
        if unit is not None and (unit not in UNITS or named is None):
            raise Refused("cannot keep its ledger: its node-config must name a ledger, and unit as example or client")
        if named is None:
            return None
        kept: Unit = "client" if unit == "client" else "example"
        if epsilon is None or delta is None:
            return cls(Path(named), kept)
        try:
            check_epsilon(float(epsilon))
            check_delta(float(delta))
        except ValueError as error:
            raise Refused(f"has a budget in its node-config that is none: {error}") from error
        return cls(Path(named), kept, float(epsilon), float(delta))

    def check(self, plan: PrivacyPlan, *, reproducible: bool) -> None:
        """Raises Refused where noise of this client's own does not protect, in a run, what this ledger is about.

        Args:
            plan: of the run.
            reproducible: noise follows a seed that the server knows.
        """
        if reproducible or not (plan.examples_are_protected or plan.client_adds_noise):
            raise Refused("keeps a ledger, and sends nothing that secret noise of its own does not protect")
        if plan.unit != self.unit:
            raise Refused(f"keeps a ledger for the unit {self.unit}, but the run protects the unit {plan.unit}")

    def spend(self, plan: PrivacyPlan, event: PoissonGaussian, *, reproducible: bool) -> None:
        """Counts one turn, before anything of it is computed; on the disk when this returns.

        Args:
            plan: of the run.
            event: one release of this client.
            reproducible: noise follows a seed that the server knows.

        Raises:
            Refused: what :meth:`check` refuses; or the turn leads beyond the budget; nothing was counted.
        """
        self.check(plan, reproducible=reproducible)
        with self._locked():
            ledger, turns, before = self._read()
            ledger.append(event, plan.releases_per_turn)
            if self.epsilon is not None and self.delta is not None:
                reached = ledger.epsilon(self.delta, plan.accountant)
                if reached > self.epsilon:
                    raise Refused(f"has no budget left: this turn would lead above its own ε of {self.epsilon:g}")
            heads = Heads(self.path)
            if heads.last()[0] < turns:  # a crash came before the last turn was held, and before it left
                heads.append(before)
            state = self._state(ledger, turns + 1, before)
            write_atomically(self.path, json.dumps(state, indent=1))
            heads.append(state["node"]["digest"])

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Held by one process at a time."""
        with self.path.with_name(self.path.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _state(self, ledger: Ledger, turns: int, before: str) -> dict[str, Any]:
        state = ledger.state_dict()
        node = {"unit": self.unit, "turns": turns, "before": before}
        return {**state, "unit": self.unit, "node": {**node, "digest": link(state["digest"], node)}}

    def _read(self) -> tuple[Ledger, int, str]:
        """The ledger as it is on the disk, how many turns were written to it, and the digest of the last.

        Raises:
            ValueError: it is damaged, gone, or of an earlier day.
            Refused: it is of the other unit.
        """
        held, head = Heads(self.path).last()
        if not self.path.exists():
            if held:
                raise self._broken(f"it is gone, but {held} turns were written to it")
            return Ledger(), 0, START
        ledger = Ledger.load(self.path)
        state = json.loads(self.path.read_text(encoding="utf-8"))
        if state.get("unit") in UNITS and state["unit"] != self.unit:
            raise Refused("has a ledger of the other unit: its node-config must name another file for this one")
        if "node" not in state and state["version"] == 1:  # without digests, as earlier versions wrote it
            if held:
                raise self._broken("it is of an earlier day, and has no digests")
            return ledger, 0, START
        try:
            turns, before = state["node"]["turns"], state["node"]["before"]
            whole = state == self._state(ledger, turns, before)
        except (KeyError, TypeError) as error:
            raise self._broken(f"its node's part is damaged: {error!r}") from error
        if not whole:
            raise self._broken("its node's part does not match its digest")
        digest = state["node"]["digest"]
        if (held, head) not in ((turns, digest), (turns - 1, before)):
            raise self._broken(
                f"it has {turns} turns, but {Heads(self.path).path.name} beside it holds {held}, or others")
        return ledger, turns, digest

    def _broken(self, what: str) -> ValueError:
        return ValueError(
            f"The client's ledger {str(self.path)!r} is not the last one that was written ({what}): restore it and its "
            ".heads file from a backup of the same moment; a new one would forget what was spent.")
