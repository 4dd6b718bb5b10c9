"""A client's own ledger: what its node has ever released, kept on its side and trusted to nobody else."""

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dp.accounting import Ledger, PoissonGaussian, check_delta, check_epsilon
from lora_dp.fed.privacy import PrivacyPlan


class Refused(RuntimeError):
    """A client does not do what it was asked; the words tell nothing of its data."""


@dataclass(frozen=True)
class ClientLedger:
    """The ledger of one node's data over all runs, and the budget that its owner has set.

    Args:
        path: of the file; made with the first release.
        epsilon, delta: releases that would lead beyond this budget are refused; None for no limit.
    """

    path: Path
    epsilon: float | None = None
    delta: float | None = None

    @classmethod
    def of_node(cls, node_config: Mapping[str, Any]) -> "ClientLedger | None":
        """The ledger that a node's configuration names as ``ledger``, with its ``epsilon`` and ``delta``.

        Raises:
            Refused: a budget without a ledger, or not whole.
        """
        named, epsilon, delta = (node_config.get(name) for name in ("ledger", "epsilon", "delta"))
        if (epsilon is None) != (delta is None) or (epsilon is not None and named is None):
            raise Refused("cannot keep its budget: its node-config must name ledger, epsilon and delta together")
        if named is None:
            return None
        if epsilon is None or delta is None:
            return cls(Path(named))
        try:
            check_epsilon(float(epsilon))
            check_delta(float(delta))
        except ValueError as error:
            raise Refused(f"has a budget in its node-config that is none: {error}") from error
        return cls(Path(named), float(epsilon), float(delta))

    def spend(self, plan: PrivacyPlan, event: PoissonGaussian, *, reproducible: bool) -> None:
        """Counts one turn, before anything of it is computed; on the disk when this returns.

        Args:
            plan: of the run.
            event: one release of this client.
            reproducible: noise follows a seed that the server knows.

        Raises:
            Refused: what the turn releases is not protected by noise of this client's own, or leads beyond the budget;
                nothing was counted.
        """
        if reproducible or not (plan.examples_are_protected or plan.client_adds_noise):
            raise Refused("keeps a ledger, and sends nothing that secret noise of its own does not protect")
        with self._held() as ledger:
            ledger.append(event, plan.releases_per_turn)
            if self.epsilon is not None and self.delta is not None:
                reached = ledger.epsilon(self.delta, plan.accountant)
                if reached > self.epsilon:
                    raise Refused(f"has no budget left: this turn would lead above its own ε of {self.epsilon:g}")
            ledger.save(self.path)

    @contextmanager
    def _held(self) -> Iterator[Ledger]:
        """The ledger as it is on the disk, held by one process at a time."""
        with self.path.with_name(self.path.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield Ledger.load(self.path) if self.path.exists() else Ledger()
