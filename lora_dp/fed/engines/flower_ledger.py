"""A client's own ledger: what its node has ever released, kept on its side and trusted to nobody else."""

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dp.accounting import Ledger, PoissonGaussian, check_delta, check_epsilon
from lora_dp.fed.privacy import UNITS, PrivacyPlan, Unit
from lora_dp.files import write_atomically


class Refused(RuntimeError):
    """A client does not do what it was asked; the words tell nothing of its data."""


@dataclass(frozen=True)
class ClientLedger:
    """The ledger of one node's data over all runs, and the budget that its owner has set.

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
        with self._held() as ledger:
            ledger.append(event, plan.releases_per_turn)
            if self.epsilon is not None and self.delta is not None:
                reached = ledger.epsilon(self.delta, plan.accountant)
                if reached > self.epsilon:
                    raise Refused(f"has no budget left: this turn would lead above its own ε of {self.epsilon:g}")
            write_atomically(self.path, json.dumps({**ledger.state_dict(), "unit": self.unit}, indent=1))

    @contextmanager
    def _held(self) -> Iterator[Ledger]:
        """The ledger as it is on the disk, held by one process at a time."""
        with self.path.with_name(self.path.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self.path.exists():
                yield Ledger()
                return
            ledger = Ledger.load(self.path)
            if json.loads(self.path.read_text())["unit"] != self.unit:
                raise Refused("has a ledger of the other unit: its node-config must name another file for this one")
            yield ledger
