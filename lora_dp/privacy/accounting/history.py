"""Whose steps a ledger has: so that those of another history are told from as many of one's own."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lora_dp.privacy.accounting.ledger import Ledger, begins
from lora_dp.privacy.accounting.steps import whole

Run = tuple[str, int]


class History:
    """The runs by which a ledger has grown, each with a random name, from one loaded state to the next.

    Args:
        ledger: only grows.
    """

    def __init__(self, ledger: Ledger):
        self.ledger = ledger
        self._earlier: list[Run] = []
        self._name = secrets.token_hex(8)

    @property
    def runs(self) -> list[Run]:
        """``(name, steps)`` in order."""
        own = self.ledger.steps - sum(steps for _, steps in self._earlier)
        return [*self._earlier, *([(self._name, own)] if own else [])]

    def holds(self, runs: Sequence[Run]) -> bool:
        """Whether the ledger has all steps of these runs, and no others before or between them."""
        return begins(self.runs, runs)

    @property
    def spent(self) -> "Spent":
        """The ledger and its runs, as they are now."""
        return Spent(self.ledger, self.runs)

    def go_on_from(self, runs: Sequence[Run]) -> None:
        """The ledger has been made that of these runs."""
        self._earlier, self._name = list(runs), secrets.token_hex(8)


def read_runs(saved: Any, steps: int) -> list[Run]:
    """Runs as they were saved.

    Args:
        saved: pairs, or None: of an earlier version, which kept no names.
        steps: of the ledger that was saved with them.

    Raises:
        ValueError: no such runs, or of another number of steps.
    """
    if saved is None:
        return [("", steps)] if steps else []
    try:
        runs = [(str(name), whole("steps", count, "of a run.")) for name, count in saved]
    except (TypeError, ValueError) as error:
        raise ValueError(f"The names of a ledger's runs cannot be read ({error}): restore a backup.") from error
    if sum(count for _, count in runs) != steps:
        raise ValueError(f"The runs of a ledger have other steps than its {steps}: restore a backup.")
    return runs


class Spent(NamedTuple):
    """What an engine has spent: its steps, and whose they are."""

    ledger: Ledger
    runs: list[Run]

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Spent":
        """As an engine's state says.

        Raises:
            LookupError, TypeError, ValueError: it is no such state, or damaged.
        """
        ledger = Ledger()
        ledger.load_state_dict(state["ledger"])
        return cls(ledger, read_runs(state.get("runs"), ledger.steps))

    def continues(self, earlier: "Spent") -> bool:
        """Whether this begins with all of ``earlier``, by the same runs."""
        return self.ledger.continues(earlier.ledger) and begins(self.runs, earlier.runs)
