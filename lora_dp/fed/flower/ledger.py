"""A client's own ledger: what its node has ever released, kept on its side and trusted to nobody else."""

import fcntl
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_dp.atomic_files import write_atomically
from lora_dp.fed.rounds.privacy_plan import UNITS, PrivacyPlan, Unit
from lora_dp.hash_chain import START, Heads, link
from lora_dp.privacy.accounting import Ledger, PoissonGaussian, check_delta, check_epsilon

_LOG = logging.getLogger(__name__)
_SUMS = "sums"  # after the digest of a run, for its release of feature sums


class Refused(RuntimeError):
    """A client does not do what it was asked; the words tell nothing of its data."""


def own_path(node_config: Mapping[str, Any], name: str) -> Path | None:
    """The file or folder that a node's configuration names as ``name``; None where it names none.

    Symbolic links are followed to their end, whether something lies there yet or not: what is kept beside a file, and
    what takes its place, then lies where the file does, by whatever name it is reached.

    Raises:
        Refused: a path that is not absolute, and so another one for each folder that the node is started from.
    """
    named = node_config.get(name)
    if named is None:
        return None
    path = Path(str(named))
    if not path.is_absolute():
        raise Refused(
            f"cannot tell which {name} is meant: its node-config must name it by an absolute path, since a relative "
            "one is another in each folder that the node is started from"
        )
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # Python below 3.13 raises the latter for links in a circle
        raise Refused(f"cannot tell which {name} is meant: the symbolic links of its path lead nowhere") from error


@dataclass(frozen=True)
class ClientLedger:
    """The ledger of one node's data over all runs, and the budget that its owner has set.

    It also holds how many releases each run has had, so that no turn of a run can be repeated beyond the run's plan.
    Each turn's file names the one that it replaces by its digest, and a second file (``.heads`` after the name) holds
    the last digest and how many there were: a damaged file, or one of an earlier day, is refused.

    Args:
        path: of the file; made with the first release.
        unit: whose presence it is about: an example's, or that of all this client's data. Releases that protect the one
            add up to no ε for the other.
        epsilon, delta: releases that would lead beyond this budget are refused; both None for no limit.
        written: whether that budget stands in the node-config; else it is what the policy admits.
        run: digest of the run that turns are of; releases beyond its plan are refused; None for no limit.
    """

    path: Path
    unit: Unit = "example"
    epsilon: float | None = None
    delta: float | None = None
    written: bool = True
    run: str | None = None

    @classmethod
    def of_node(cls, node_config: Mapping[str, Any]) -> "ClientLedger | None":
        """The ledger that a node's configuration names as ``ledger``, with its ``unit``, ``epsilon`` and ``delta``.

        Raises:
            Refused: a unit or a budget without a ledger, or not whole; a path that is not absolute.
        """
        path = own_path(node_config, "ledger")
        unit, epsilon, delta = (node_config.get(name) for name in ("unit", "epsilon", "delta"))
        if (epsilon is None) != (delta is None) or (epsilon is not None and path is None):
            raise Refused("cannot keep its budget: its node-config must name ledger, epsilon and delta together")
        if unit is not None and (unit not in UNITS or path is None):
            raise Refused("cannot keep its ledger: its node-config must name a ledger, and unit as example or client")
        if path is None:
            return None
        kept: Unit = "client" if unit == "client" else "example"
        if epsilon is None or delta is None:
            return cls(path, kept)
        try:
            check_epsilon(float(epsilon))
            check_delta(float(delta))
        except ValueError as error:
            raise Refused(f"has a budget in its node-config that is none: {error}") from error
        return cls(path, kept, float(epsilon), float(delta))

    def of_run(self, run: str) -> "ClientLedger":
        """The same ledger, for turns of the run with this digest."""
        return replace(self, run=run)

    def limited(self, epsilon: float, delta: float) -> "ClientLedger":
        """The same ledger with this budget, which its owner did not write."""
        return replace(self, epsilon=epsilon, delta=delta, written=False)

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

    def spend(self, plan: PrivacyPlan, event: PoissonGaussian, *, reproducible: bool, sums: bool = False) -> None:
        """Counts one turn, before anything of it is computed; on the disk when this returns.

        Args:
            plan: of the run.
            event: one release of this client.
            reproducible: noise follows a seed that the server knows.
            sums: the turn is the release of feature sums, of which a run has one.

        Raises:
            Refused: what :meth:`check` refuses; or the turn leads beyond the run's plan or the budget; nothing was
                counted.
        """
        self.check(plan, reproducible=reproducible)
        with self._locked():
            ledger, turns, before, runs = self._read()
            ledger.append(event, 1 if sums else plan.releases_per_turn)
            reached = self._within_budget(ledger, plan)
            runs = self._within_plan(runs, plan, sums)
            heads = Heads(self.path)
            if heads.last()[0] < turns:  # a crash came before the last turn was held, and before it left
                heads.append(before)
            state = self._state(ledger, turns + 1, before, runs)
            write_atomically(self.path, json.dumps(state, indent=1))
            heads.append(state["node"]["digest"])
        if reached is not None:  # a warning, because a SuperNode shows nothing below
            _LOG.warning(
                "This client's ledger is at ε = %.4g of %g over all runs, at δ = %g.", reached, self.epsilon, self.delta
            )

    def _within_budget(self, ledger: Ledger, plan: PrivacyPlan) -> float | None:
        """The ε of a ledger, None without a budget; raises Refused where that is above the budget."""
        if self.epsilon is None:
            return None
        assert self.delta is not None
        reached = ledger.epsilon(self.delta, plan.accountant)
        if reached <= self.epsilon:
            return reached
        if self.written:
            raise Refused(f"has no budget left: this turn would lead above its own ε of {self.epsilon:g}")
        raise Refused(
            f"has no budget left: this turn would lead above ε = {self.epsilon:g} at δ = {self.delta:g}, which its "
            "policy admits for all runs together: for another budget, write epsilon and delta into its node-config"
        )

    def _within_plan(self, runs: dict[str, int], plan: PrivacyPlan, sums: bool) -> dict[str, int]:
        """The releases of each run with those of one more turn; raises Refused where the plan has no room for them.

        That of feature sums has an entry of its own: a run's steps must not take its place, nor it theirs.
        """
        if self.run is None:
            return runs
        run = f"{self.run} {_SUMS}" if sums else self.run
        spent = runs.get(run, 0) + (1 if sums else plan.releases_per_turn)
        if spent > (1 if sums else plan.planned_releases):
            raise Refused(
                "has released all that this run's plan accounts for, and what is repeated counts again: start another "
                "run, with another seed"
            )
        return {**runs, run: spent}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Held by one process at a time."""
        with self.path.with_name(self.path.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _state(self, ledger: Ledger, turns: int, before: str, runs: dict[str, int]) -> dict[str, Any]:
        state = ledger.state_dict()
        # Without runs it is as earlier versions wrote it.
        node = {"unit": self.unit, "turns": turns, "before": before, **({"runs": runs} if runs else {})}
        return {**state, "unit": self.unit, "node": {**node, "digest": link(state["digest"], node)}}

    def _read(self) -> tuple[Ledger, int, str, dict[str, int]]:
        """The ledger as it is on the disk, how many turns were written to it, the digest of the last, and how many
        releases there were of each run, by the run's digest.

        Raises:
            ValueError: it is damaged, gone, or of an earlier day.
            Refused: it is of the other unit.
        """
        held, head = Heads(self.path).last()
        if not self.path.exists():
            if held:
                raise self._broken(f"it is gone, but {held} turns were written to it")
            return Ledger(), 0, START, {}
        ledger = Ledger.load(self.path)
        state = json.loads(self.path.read_text(encoding="utf-8"))
        if state.get("unit") in UNITS and state["unit"] != self.unit:
            raise Refused("has a ledger of the other unit: its node-config must name another file for this one")
        if "node" not in state and state["version"] == 1:  # without digests, as earlier versions wrote it
            if held:
                raise self._broken("it is of an earlier day, and has no digests")
            return ledger, 0, START, {}
        try:
            node = state["node"]
            turns, before, runs = node["turns"], node["before"], node.get("runs", {})
            whole = state == self._state(ledger, turns, before, runs)
        except (KeyError, TypeError, AttributeError) as error:
            raise self._broken(f"its node's part is damaged: {error!r}") from error
        if not whole:
            raise self._broken("its node's part does not match its digest")
        digest = state["node"]["digest"]
        if (held, head) not in ((turns, digest), (turns - 1, before)):
            raise self._broken(
                f"it has {turns} turns, but {Heads(self.path).path.name} beside it holds {held}, or others"
            )
        return ledger, turns, digest, runs

    def _broken(self, what: str) -> ValueError:
        return ValueError(
            f"The client's ledger {str(self.path)!r} is not the last one that was written ({what}): restore it and its "
            ".heads file from a backup of the same moment; a new one would forget what was spent."
        )
