"""A run from its configuration to its results, and one that was cut short to its end, on the engine that it names."""

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from lora_dp.extras import needing
from lora_dp.fed.config import RunConfig
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.runs.folder import RunFolder
from lora_dp.fed.runs.loop import Outcome, drive, go_on
from lora_dp.fed.runs.report import ConsoleReport


def run(config: RunConfig, console: Console | None = None, began: float | None = None) -> Outcome:
    """Runs a federation and writes its folder (:mod:`lora_dp.fed.runs.folder`).

    Ctrl-C ends the run after writing the results so far; :func:`resume` goes on from there.

    Args:
        config: of the run.
        console: to print on.
        began: ``time.monotonic()`` from which the time shown at the end counts; by default now.

    Raises:
        ValueError: settings, data and model that do not go together; nothing has been trained.
        TooFewClients: a round had too few usable updates; the run can be resumed.

    >>> config = RunConfig.from_flat({"clients": 2, "rounds": 1, "local_steps": 1, "output": "runs/first"})
    >>> outcome = run(config, Console(quiet=True))
    >>> outcome.summary["status"], outcome.summary["worst_epsilon"] <= 8
    ('finished', True)
    >>> (outcome.folder / "adapter" / "adapter_model.safetensors").exists()
    True
    """

    report = ConsoleReport(console or Console(), began)

    def work(federation: Federation) -> Outcome:
        folder = RunFolder.create(config)
        try:
            return drive(config, federation, folder, report, [])
        finally:
            folder.close()

    return _with_federation(config, work)


def resume(path: Path, console: Console | None = None, began: float | None = None) -> Outcome:
    """Goes on with a run that was killed or interrupted, from its last whole checkpoint.

    A reproducible run ends with the same bits as if it had never stopped. With secret noise the rounds after the
    checkpoint were released and count, and their budget is spent.

    Args:
        path: of the run's folder.
        console, began: as for :func:`run`.

    Raises:
        ValueError: no run there, or one that has ended; every checkpoint damaged.

    >>> config = RunConfig.from_flat({"clients": 2, "rounds": 1, "local_steps": 1, "output": "runs/killed"})
    >>> path = run(config, Console(quiet=True)).folder
    >>> (path / "summary.json").unlink()  # as if it had been killed at the end
    >>> resume(path, Console(quiet=True)).summary["status"]
    'finished'
    """
    report = ConsoleReport(console or Console(), began)
    folder, config = RunFolder.open(path)
    try:
        return _with_federation(config, lambda federation: go_on(config, federation, folder, report))
    finally:
        folder.close()


def _with_federation(config: RunConfig, work: Callable[[Federation], Outcome]) -> Outcome:
    """Does the work on the engine that the configuration names."""
    if config.federation.engine == "local":
        return work(Federation.from_config(config))
    if config.federation.engine == "deployed":
        raise ValueError(
            "engine deployed trains where the data are: start it by flwr run, and go on with it by the same command "
            'with resume="FOLDER" in its --run-config (docs/how-to/flower.md).'
        )
    with needing("engine flower", "flower"):
        from lora_dp.fed.flower.server import simulate
    return simulate(config, work)
