"""The ledger: every private step taken, in memory and in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lora_dp.argument_checks import check_path
from lora_dp.atomic_files import write_atomically
from lora_dp.hash_chain import START, link
from lora_dp.privacy.accounting.epsilon import Accountant, check_accountant, composed_epsilon
from lora_dp.privacy.accounting.steps import Entry, PoissonGaussian, check_delta, gathered, whole

# dp-accounting is imported where ε is computed: training at a given noise multiplier does without it.
if TYPE_CHECKING:
    from dp_accounting import dp_event

_FORMAT, _VERSION = "lora-dp ledger", 2
_WITHOUT_DIGESTS = 1  # the version before, which is read as it is and saved as this one


T = TypeVar("T")


def begins(counted: Sequence[tuple[T, int]], earlier: Sequence[tuple[T, int]]) -> bool:
    """Whether what was counted, neighbours together, begins with all that was counted ``earlier``."""
    if not earlier:
        return True
    *before, (what, count) = earlier
    place = len(before)
    return (
        list(counted[:place]) == before
        and len(counted) > place
        and counted[place][0] == what
        and counted[place][1] >= count
    )


class PrivacyBudgetExceeded(RuntimeError):
    """The next private step would take epsilon above the budget; it was not taken.

    >>> import torch
    >>> from torch.utils.data import DataLoader
    >>> from lora_dp import DPLinear, PrivacyEngine
    >>> model = DPLinear(4, 2)
    >>> model, optimizer, loader = PrivacyEngine().make_private_with_epsilon(
    ...     model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    ...     data_loader=DataLoader(torch.randn(40, 4), batch_size=20),
    ...     target_epsilon=1.0, target_delta=1e-3, steps=1, max_grad_norm=1.0)
    >>> for x in loader.take(2):  # one step more than was planned
    ...     optimizer.backward(model(x).square().sum(1))
    ...     optimizer.step()
    Traceback (most recent call last):
    lora_dp.privacy.accounting.ledger.PrivacyBudgetExceeded: The next step would exceed ε = 1 at δ = 0.001 ...
    """


class Ledger:
    """What has been released so far: private steps in order, equal neighbours counted together; entries only grow.

    Append a step *before* its result is used: a crash can then over-count but never under-count.

    Attributes:
        on_append: called after each :meth:`append`, so that a file can be written before the step's result is used.

    >>> ledger = Ledger()
    >>> ledger.append(PoissonGaussian(noise_multiplier=1.0, sample_rate=0.01), count=1000)
    >>> round(ledger.epsilon(delta=1e-5), 2)
    1.83
    >>> ledger.save("ledger.json")
    >>> Ledger.load("ledger.json").steps
    1000
    """

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self.on_append: Callable[[], None] | None = None

    @property
    def entries(self) -> tuple[Entry, ...]:
        """``(event, count)`` in the order of release; neighbours differ.

        >>> ledger.entries
        ((PoissonGaussian(noise_multiplier=1.0, sample_rate=0.01), 1000),)
        """
        return tuple(self._entries)

    @property
    def steps(self) -> int:
        """The number of private steps taken.

        >>> ledger.steps
        1000
        """
        return sum(count for _, count in self._entries)

    def append(self, event: PoissonGaussian, count: int = 1) -> None:
        """Add ``count`` steps.

        Raises ValueError when ``count`` is negative: what was released cannot be taken back; TypeError for another kind
        of step or of count.

        >>> ledger.append(PoissonGaussian(noise_multiplier=2.0, sample_rate=0.01), count=5)
        >>> ledger.steps
        1005
        """
        if not isinstance(event, PoissonGaussian):
            raise TypeError(
                f"A ledger holds private steps, not {event!r}: append PoissonGaussian(noise_multiplier, sample_rate)."
            )
        count = whole("count", count, "it is a number of steps.")
        if count < 0:
            raise ValueError(f"A ledger only grows: count must be 0 or more, not {count}.")
        # Either way one store: an interrupt finds the step counted or not begun, and no earlier one gone.
        if self._entries and self._entries[-1][0] == event:
            self._entries[-1] = (event, self._entries[-1][1] + count)
        elif count:
            self._entries.append((event, count))
        if self.on_append is not None:
            self.on_append()

    def continues(self, earlier: Ledger) -> bool:
        """Whether this ledger begins with all that ``earlier`` holds.

        >>> ledger.continues(Ledger()), Ledger().continues(ledger)
        (True, False)
        """
        return begins(self._entries, earlier._entries)

    def epsilon(self, delta: float, accountant: Accountant = "pld") -> float:
        """An upper bound on epsilon at ``delta``: 0 when nothing was released, inf after a step without noise.

        "Without noise" includes a noise multiplier below 0.01. By "pld" epsilon is never above that by "rdp". Raises
        ValueError when ``delta`` is outside (0, 1) or the accountant unknown, TypeError when ``delta`` is no number.

        >>> round(ledger.epsilon(1e-5), 2), round(ledger.epsilon(1e-5, "rdp"), 2)
        (1.83, 2.1)
        """
        check_delta(delta)
        check_accountant(accountant)
        return composed_epsilon(gathered(self.entries), float(delta), accountant)

    def dp_event(self) -> dp_event.DpEvent:
        """The run for any accountant of ``dp-accounting``.

        >>> from dp_accounting.rdp import RdpAccountant
        >>> round(float(RdpAccountant().compose(ledger.dp_event()).get_epsilon(1e-5)), 2)
        2.1
        """
        from dp_accounting import dp_event

        return dp_event.ComposedDpEvent(
            [dp_event.SelfComposedDpEvent(event.dp_event(), count) for event, count in self._entries]
        )

    def state_dict(self) -> dict[str, Any]:
        """The ledger as plain numbers, lists and strings.

        Each entry has the ``digest`` that chains it to those before (:mod:`lora_dp.hash_chain`); the last ``digest`` is
        that of the whole.

        >>> {name: value for name, value in ledger.state_dict()["entries"][0].items() if name != "digest"}
        {'noise_multiplier': 1.0, 'sample_rate': 0.01, 'count': 1000}
        """
        entries: list[dict[str, Any]] = []
        digest = START
        for event, count in self._entries:
            entry = {"noise_multiplier": event.noise_multiplier, "sample_rate": event.sample_rate, "count": count}
            digest = link(digest, entry)
            entries.append({**entry, "digest": digest})
        whole_digest = link(digest, {"format": _FORMAT, "version": _VERSION, "entries": len(entries)})
        return {"format": _FORMAT, "version": _VERSION, "entries": entries, "digest": whole_digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the entries of ``state``; version 1, which had no digests, is read too.

        Raises ValueError, and changes nothing, when it is no ledger, or not the one that was saved, or lacks steps that
        this one has: a ledger only grows.

        >>> other = Ledger()
        >>> other.load_state_dict(ledger.state_dict())
        >>> other.entries == ledger.entries
        True
        """
        try:
            if state["format"] != _FORMAT or state["version"] not in (_WITHOUT_DIGESTS, _VERSION):
                raise ValueError(f"format {state['format']!r}, version {state['version']!r}")
            loaded = Ledger()
            for entry in state["entries"]:
                loaded.append(PoissonGaussian(entry["noise_multiplier"], entry["sample_rate"]), entry["count"])
            saved = loaded.state_dict()
            if state["version"] == _WITHOUT_DIGESTS:
                if "digest" in state or any("digest" in entry for entry in state["entries"]):
                    raise ValueError("digests in a version that had none")
            elif any(state[name] != value for name, value in saved.items()):
                raise ValueError("an entry does not match its digest")
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"Not a whole ledger of version {_VERSION} ({type(error).__name__}: {error}): "
                "restore it from a backup, or read it with the lora-dp that wrote it."
            ) from error
        if not loaded.continues(self):
            raise ValueError(
                "The saved ledger lacks steps that this one has, which cannot be taken back: load it into a new one, "
                "or keep this one."
            )
        self._entries = loaded._entries

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ledger as JSON, atomically: after a crash the file holds either the old ledger or the new one.

        Raises TypeError when ``path`` is none.

        >>> ledger.save("spent.json")
        """
        check_path("path", path)
        write_atomically(Path(path), json.dumps(self.state_dict(), indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ledger:
        """Read a saved ledger. Raises FileNotFoundError, ValueError for a damaged file or another version, TypeError
        when ``path`` is none.

        >>> ledger.save("spent.json")
        >>> Ledger.load("spent.json").steps
        1000
        """
        check_path("path", path)
        ledger = cls()
        try:
            ledger.load_state_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:  # JSON and Unicode errors are ValueErrors too
            raise ValueError(
                f"The privacy ledger {os.fspath(path)!r} cannot be read ({error}) "
                "Do not start a new one for the same data: what was spent would be forgotten."
            ) from error
        return ledger
