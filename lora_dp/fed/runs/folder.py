"""The folder of one run: what it leaves behind, and what a resumed run goes on from."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from lora_dp.atomic_files import append_durably, remove_durably, write_atomically
from lora_dp.fed.config import RunConfig, read_config
from lora_dp.fed.rounds.federation import RoundResult
from lora_dp.fed.rounds.generation import Generations
from lora_dp.fed.rounds.ledgers import LOG, AheadLog
from lora_dp.fed.rounds.privacy_plan import finite
from lora_dp.lora.saving import save_adapter

METRICS = "metrics.jsonl"
UPDATES = "updates.jsonl"
SAMPLES = "samples.json"
SERVER_ONLY = "server-only.jsonl"
ENDED = ("finished", "budget spent")
# What says an ε, and is written (or drawn up by `report`) when a run has stopped.
_STOPPED = ("summary.json", "ledger.json", "curves.png", "report.html")


class RunFolder:
    """The folder of one run, held by one process at a time.

    Attributes:
        path: the folder.
        log: the rounds that were begun, written ahead.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = AheadLog(path / LOG)
        self._lock = (path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ValueError(f"Another process is at work in {path}: wait for it, or choose another folder.") from error

    @classmethod
    def create(cls, config: RunConfig) -> "RunFolder":
        """A new folder with the configuration in it.

        Raises:
            ValueError: the folder named in the configuration already holds a run, or cannot be made.
        """
        path = config.run.output or _fresh(config)
        _check_empty(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make the folder {path} ({error.strerror}): choose another --output") from error
        folder = cls(path)
        try:
            _check_empty(path)
        except ValueError:
            folder.close()
            raise
        write_atomically(path / "config.yaml", config.to_yaml())
        return folder

    @classmethod
    def open(cls, path: Path) -> tuple["RunFolder", RunConfig]:
        """An existing folder with its configuration.

        Raises:
            ValueError: no run there, or one that has ended; a damaged configuration.
        """
        config = read_config(path)
        if (path / "summary.json").exists():
            status = json.loads((path / "summary.json").read_text(encoding="utf-8")).get("status")
            if status in ENDED:
                raise ValueError(f"The run in {path} has ended ({status}): there is nothing to resume.")
        folder = cls(path)
        for left in path.glob(".adapter-*"):  # a crash while the adapter was saved
            shutil.rmtree(left)
        return folder, config

    def close(self) -> None:
        """Lets other processes work here."""
        self._lock.close()

    def add_metrics(self, result: RoundResult) -> None:
        """Appends one line to metrics.jsonl; on the disk when this returns.

        Where the draw is secret, who failed goes to a file that only the server's own user may read.
        """
        append_durably(self.path / METRICS, _line(result).encode())
        if result.participants is None and result.failed:
            file_number = os.open(self.path / SERVER_ONLY, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with open(file_number, "a", encoding="utf-8") as file:
                file.write(json.dumps({"round": result.round, "failed": result.failed}) + "\n")

    def add_updates(self, lines: Sequence[dict[str, Any]]) -> None:
        """Appends to updates.jsonl what the released updates of a round say; on the disk when this returns."""
        if lines:
            append_durably(self.path / UPDATES, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def keep_rounds(self, last: int) -> list[RoundResult]:
        """Cuts metrics.jsonl (and updates.jsonl) back to the rounds up to ``last``, and returns them.

        Raises:
            ValueError: one of them is missing.
        """
        results = [result for result in read_results(self.path) if result.round <= last]
        if [result.round for result in results] != list(range(last + 1)):
            raise ValueError(
                f"{self.path / METRICS} lacks rounds before the checkpoint (round {last}): restore it from a backup."
            )
        write_atomically(self.path / METRICS, "".join(_line(result) for result in results))
        updates = self.path / UPDATES
        if updates.exists():
            kept = [line for line in whole_lines(updates) if json.loads(line)["round"] <= last]
            write_atomically(updates, "".join(line + "\n" for line in kept))
        return results

    def forget_results(self) -> None:
        """Removes what says an ε of where the run had stopped: once a further round begins, it is below the true one.

        ledger.jsonl counts at any time.
        """
        remove_durably(self.path / name for name in _STOPPED)

    def write_ledger(self, account: dict[str, Any]) -> None:
        """Replaces ledger.json; on the disk when this returns."""
        write_atomically(self.path / "ledger.json", json.dumps(account, indent=1))

    def write_adapter(self, model: nn.Module) -> None:
        """Saves the global adapter and head as PEFT saves them."""
        save_adapter(model, self.path / "adapter")

    def write_generations(self, generations: Generations) -> None:
        """Writes samples.json."""
        text = json.dumps(asdict(generations), indent=1, ensure_ascii=False)
        write_atomically(self.path / SAMPLES, text)

    def read_texts(self, prompts: Sequence[str]) -> list[str] | None:
        """What samples.json has of these prompts from before training; None where it lacks one."""
        try:
            texts = json.loads((self.path / SAMPLES).read_text(encoding="utf-8"))["texts"]
            known = {each["prompt"]: each["before"] for each in texts}
            found = [known[prompt] for prompt in prompts]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if all(isinstance(text, str) for text in found) else None

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes summary.json."""
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False))


def _check_empty(path: Path) -> None:
    if (path / "config.yaml").exists():
        raise ValueError(f"{path} already holds a run: choose another --output, or resume it.")
    if (path / LOG).exists():
        raise ValueError(
            f"{path} holds the log of a run, which a new one would not count: choose another --output, or restore that "
            "run's config.yaml and resume it."
        )


def read_results(path: Path) -> list[RoundResult]:
    """The rounds in a folder's metrics.jsonl; a line that a crash cut off is left out."""
    results = []
    for line in whole_lines(path / METRICS):
        entry = json.loads(line)
        entry["epsilon"] = float("inf") if entry["epsilon"] is None else entry["epsilon"]
        results.append(RoundResult(**entry))
    return results


def whole_lines(path: Path) -> list[str]:
    """The lines of a JSON-lines file, without one at the end that a crash cut off."""
    if not path.exists():
        return []
    return [line for line in path.read_bytes().decode("utf-8", errors="replace").split("\n")[:-1] if line]


def _line(result: RoundResult) -> str:
    public = asdict(result) | {"epsilon": finite(result.epsilon)}
    if result.participants is None:
        public["failed"] = []
    return json.dumps(public) + "\n"


def _fresh(config: RunConfig) -> Path:
    target = config.privacy.kept
    budget = (
        "as-released"
        if config.privacy.mechanism == "as-released"
        else "no-privacy"
        if target is None
        else f"eps{target:g}"
    )
    method = config.federation.method.replace(":", "-")
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{method}-{budget}"
    candidates: Sequence[Path] = [Path("runs") / (name + (f"-{i}" if i else "")) for i in range(1000)]
    return next(path for path in candidates if not path.exists())
