"""A run from its configuration to its results, and one that was cut short to its end, on the engine that it names."""

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from lora_dp.fed.config import RunConfig
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.runs.folder import RunFolder
from lora_dp.fed.runs.loop import Outcome, drive, go_on
from lora_dp.fed.runs.report import ConsoleReport


def run(config: RunConfig, console: Console | None = None) -> Outcome:
    """Runs a federation and writes its folder (:mod:`lora_dp.fed.runs.folder`).

    Ctrl-C ends the run after writing the results so far; :func:`resume` goes on from there.

    Raises:
        ValueError: settings, data and model that do not go together; nothing has been trained.
        TooFewClients: a round had too few usable updates; the run can be resumed.
    """

    def work(federation: Federation) -> Outcome:
        folder = RunFolder.create(config)
        try:
            return drive(config, federation, folder, ConsoleReport(console or Console()), [])
        finally:
            folder.close()

    return _with_federation(config, work)


def resume(path: Path, console: Console | None = None) -> Outcome:
    """Goes on with a run that was killed or interrupted, from its last whole checkpoint.

    A reproducible run ends with the same bits as if it had never stopped. With secret noise the rounds after the
    checkpoint were released and count, and their budget is spent.

    Raises:
        ValueError: no run there, or one that has ended; every checkpoint damaged.
    """
    folder, config = RunFolder.open(path)
    try:
        return _with_federation(config, lambda federation: go_on(config, federation, folder, console))
    finally:
        folder.close()


def _with_federation(config: RunConfig, work: Callable[[Federation], Outcome]) -> Outcome:
    """Does the work on the engine that the configuration names."""
    if config.federation.engine == "local":
        return work(Federation.from_config(config))
    if config.federation.engine == "deployed":
        raise ValueError(
            "engine deployed trains where the data are: start it by flwr run, and go on with it by the same command "
            'with resume="FOLDER" in its --run-config (docs/flower.md).'
        )
    try:
        from lora_dp.fed.flower.server import simulate
    except ImportError as error:
        raise ImportError('engine flower needs Flower: pip install "lora-dp[flower]"') from error
    return simulate(config, work)
