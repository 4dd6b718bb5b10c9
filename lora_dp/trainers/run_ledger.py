"""The ledger of a Trainer's run in its folder, and with which settings its parts were trained."""

import json
import warnings
from pathlib import Path
from typing import Any

from lora_dp.atomic_files import write_atomically
from lora_dp.engine.engine import PrivacyEngine
from lora_dp.privacy.accounting.history import Spent
from lora_dp.trainers.privacy_arguments import PrivacyArguments

LEDGER, SETTINGS = "privacy_ledger.json", "privacy_settings.json"


class RunLedger:
    """Keeps what a run has spent, in its folder and in each checkpoint.

    Args:
        engine: with the ledger.
        privacy: settings of the part that is trained now.

    Attributes:
        settings: those of all parts so far, each once.

    >>> kept = RunLedger(PrivacyEngine(), PrivacyArguments(noise_multiplier=1.0, target_delta=1e-5))
    >>> kept.begin(Path("run"))
    >>> sorted(path.name for path in Path("run").iterdir())
    ['privacy_ledger.json', 'privacy_settings.json']
    """

    def __init__(self, engine: PrivacyEngine, privacy: PrivacyArguments):
        self._engine, self._privacy = engine, privacy
        self.settings: list[dict[str, Any]] = []

    def check_new(self, folder: Path) -> None:
        """Refuse a folder that holds steps of a run that this one does not go on from.

        Raises:
            ValueError: it does.

        >>> kept.check_new(Path("run"))
        """
        file = folder / LEDGER
        if not self._engine.ledger.steps and file.exists() and _read(file)[1].ledger.steps:
            raise ValueError(
                f"'{file}' holds the private steps of an earlier run: go on with it by "
                "train(resume_from_checkpoint=True), or choose another output_dir."
            )

    def take_up(self, checkpoint: Path) -> None:
        """Go on from all steps of the run that saved ``checkpoint``, those after it too.

        Raises:
            ValueError: the checkpoint has no ledger, or the one beside it is of another run.

        >>> RunLedger(PrivacyEngine(), PrivacyArguments(noise_multiplier=1.0, target_delta=1e-5)).take_up(Path("run"))
        """
        own, beside = checkpoint / LEDGER, checkpoint.parent / LEDGER
        if not own.exists():
            raise ValueError(
                f"'{checkpoint}' has no {LEDGER}, so that ε would leave out its steps: resume what a private Trainer "
                "saved."
            )
        state, spent = _read(own)
        if beside.exists():
            state, later = _read(beside)
            if not later.continues(spent):
                raise ValueError(
                    f"'{beside}' lacks steps that '{own}' holds, so it is of another run: put the checkpoint back "
                    "beside its own ledger."
                )
            spent = later
        else:
            warnings.warn(
                f"'{beside}' is missing, where every step is written before it is taken: steps after '{checkpoint}' "
                "are not counted.",
                stacklevel=2,
            )
        if not self._engine.history.spent.continues(spent):
            self._engine.load_state_dict(state)
        for folder in (checkpoint, checkpoint.parent):
            if (folder / SETTINGS).exists():
                self._add(json.loads((folder / SETTINGS).read_text(encoding="utf-8")))

    def begin(self, folder: Path) -> None:
        """Write the ledger to ``folder`` ahead of each step from now on."""
        folder.mkdir(parents=True, exist_ok=True)
        self._add([self._privacy.as_dict()])
        write_atomically(folder / SETTINGS, json.dumps(self.settings, indent=1))
        self._engine.keep_ledger(folder / LEDGER)

    def save(self, checkpoint: Path) -> None:
        """Write both files to a checkpoint."""
        write_atomically(checkpoint / LEDGER, json.dumps(self._engine.state_dict()))
        write_atomically(checkpoint / SETTINGS, json.dumps(self.settings, indent=1))

    def _add(self, settings: list[dict[str, Any]]) -> None:
        self.settings += [part for part in settings if part not in self.settings]


def _read(file: Path) -> tuple[dict[str, Any], Spent]:
    """The state in a file, and what it says was spent."""
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        return state, Spent.of(state)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"'{file}' holds no ledger ({error}): restore it from a backup.") from error
