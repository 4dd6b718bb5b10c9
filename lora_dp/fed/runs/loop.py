"""All rounds of one run, and its results in its folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dp.errors import TooFewClients
from lora_dp.fed.config import RunConfig
from lora_dp.fed.rounds import saved_state
from lora_dp.fed.rounds.federation import Federation, RoundResult
from lora_dp.fed.rounds.head_start import start_head
from lora_dp.fed.rounds.setup import match_threads
from lora_dp.fed.runs import checkpoint
from lora_dp.fed.runs.folder import RunFolder
from lora_dp.fed.runs.report import ConsoleReport, draw_curves, summarise, used_noise
from lora_dp.fed.runs.results import save_merged
from lora_dp.privacy.accounting import PrivacyBudgetExceeded


@dataclass(frozen=True)
class Outcome:
    """A run's folder, its summary (as in summary.json) and its rounds.

    >>> outcome = Outcome(Path("runs/first"), {"status": "interrupted"}, rounds=[])
    >>> outcome.interrupted
    True
    """

    folder: Path
    summary: dict[str, Any]
    rounds: list[RoundResult]

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it; the results up to the last whole round are in the folder."""
        return self.summary["status"] == "interrupted"


def go_on(config: RunConfig, federation: Federation, folder: RunFolder, report: ConsoleReport) -> Outcome:
    """The rounds that an opened folder lacks, by a federation that has just been made."""
    with _resumable(folder.path):
        found, problems = checkpoint.newest(folder.path)
        if found is not None:
            saved_state.restore(federation, *found)
        for problem in problems:
            report.warn(f"{problem} Going on from the one before it.")
        done = federation.rounds_done
        report.resumed(folder.path, done)
        folder.log.replay(
            federation.account, rounds_done=done if found is not None else -1, reproducible=config.run.reproducible
        )
        if found is not None and found[1].get("run") not in (None, folder.log.run):  # earlier versions did not say
            raise ValueError(
                f"The checkpoint of round {done} in {folder.path} is of another run, whose releases this one's log "
                "does not count: restore one of this run's own, or begin a new run."
            )
        results = folder.keep_rounds(done if found is not None else -1)
    return drive(config, federation, folder, report, results)


def drive(
    config: RunConfig, federation: Federation, folder: RunFolder, report: ConsoleReport, results: list[RoundResult]
) -> Outcome:
    """All rounds that are left, and the results.

    Args:
        results: of the rounds so far, of a resumed run.

    Raises:
        OSError: a disk is full, or the like; the run can be resumed.
    """
    with _resumable(folder.path):
        return _drive(config, federation, folder, report, results)


@contextmanager
def _resumable(path: Path) -> Iterator[None]:
    """A disk that is full, or the like, is told with the remedy."""
    try:
        yield
    except OSError as error:
        raise OSError(f"The run in {path} stopped ({error}): mend that, then lora-dp resume {path} goes on.") from error


def _drive(
    config: RunConfig, federation: Federation, folder: RunFolder, report: ConsoleReport, results: list[RoundResult]
) -> Outcome:
    match_threads(federation.model)
    federation.check_model()
    folder.log.begin(federation.account, reproducible=config.run.reproducible)
    federation.log = folder.log
    folder.forget_results()
    status, problem = "finished", None
    report.begin(config, federation)
    try:
        with report.progress:
            _train(config, federation, folder, report, results)
    except KeyboardInterrupt:
        status = "interrupted"
    except PrivacyBudgetExceeded:
        status = "budget spent"
    except TooFewClients as error:
        status, problem = "stopped", error
    account = federation.account.report()
    folder.write_ledger(account)
    if not results:
        results.append(federation.start())
    federation.load_global_state()
    folder.write_adapter(federation.workspace.whole)
    save_merged(federation.server.state, folder.path)
    summary = summarise(config, results, account, status, used_noise(federation))
    if (prompts := federation.prompts) is not None:
        report.generating(len(prompts.prompts))
        found = prompts.compared(folder.read_texts([p.text for p in prompts.prompts]), _generated(federation))
        folder.write_generations(found)
        summary |= {"text_quality_before": found.before, "text_quality_after": found.after}
    draw_curves(results, config, folder.path / "curves.png")
    # Last: a run with a summary has ended, and nothing is missing.
    folder.write_summary(summary)
    report.end(summary, folder.path)
    if problem is not None:
        raise problem
    return Outcome(folder.path, summary, results)


def _generated(federation: Federation) -> list[str]:
    """What the global model goes on with from the prompts."""
    assert federation.prompts is not None
    federation.load_global_state()
    return federation.prompts.generate(federation.workspace.whole, federation.trainer.training.precision)


def _train(
    config: RunConfig, federation: Federation, folder: RunFolder, report: ConsoleReport, results: list[RoundResult]
) -> None:
    planned = config.federation.rounds
    if not results:
        down = up = 0
        if federation.plan.sums_event is not None:
            down, up = start_head(federation, report.step)
        result = federation.start(up, down)
        if federation.prompts is not None:
            report.generating(len(federation.prompts.prompts))
            folder.write_generations(federation.prompts.compared(_generated(federation), None))
        results.append(result)
        folder.add_metrics(result)
        if federation.plan.sums_event is not None:  # what was released is not to be released again
            checkpoint.write(folder.path, 0, *saved_state.checkpoint(federation))
    report.round(results[-1], planned)
    while federation.rounds_done < planned:
        following = federation.rounds_done + 1
        evaluate = following % config.run.evaluate_every == 0 or following == planned
        result = federation.run_round(on_step=report.step, evaluate=evaluate)
        results.append(result)
        folder.add_updates(federation.recorded)
        folder.add_metrics(result)
        if following % config.run.checkpoint_every == 0 or following == planned:
            checkpoint.write(folder.path, following, *saved_state.checkpoint(federation))
        report.round(result, planned)
