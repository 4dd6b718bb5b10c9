"""The command: opens what a configuration describes, audits it, and writes audit.json and audit.png."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lora_dp.atomic_files import write_atomically
from lora_dp.auditing import AuditResult, GradientCanaries, audit, plot_audits
from lora_dp.extras import require
from lora_dp.fed.auditing.clients import ClientCanaries, most_clients
from lora_dp.fed.auditing.game import Game, most_exposed
from lora_dp.fed.auditing.gradients import most_gradients, train_with_gradients
from lora_dp.fed.auditing.mislabelled import MislabelledExamples
from lora_dp.fed.auditing.options import AuditConfig, read_options
from lora_dp.fed.config import RunConfig
from lora_dp.fed.rounds.ledgers import LOG
from lora_dp.fed.rounds.privacy_plan import UNITS
from lora_dp.fed.rounds.setup import match_threads, open_job

require("lora_dp.fed", "matplotlib", "fed")  # for the picture at the end of an audit
GRADIENTS, CLIENTS, EXAMPLES = 1000, 200, 100
WHITE_BOX = {"example": "gradients in every private step of client {client}", "client": "updates of whole clients"}
BLACK_BOX = "mislabelled examples of client {client}"


def audit_config(options: AuditConfig, console: Console) -> AuditResult:
    """Audits the training that a configuration describes, prints the verdict, and writes audit.json and audit.png.

    Raises:
        ValueError: a configuration that cannot be read, claims nothing, or cannot be audited in this way.
    """
    config = read_options(options.target)
    check_auditable(config, options)
    folder = _folder(options)
    with console.status("opening data and model"):
        job = open_job(config)
        match_threads(job.trainer.workspace.model)
        example = config.privacy.unit == "example"
        game = Game(config, job, most_exposed(config, job) if example else 0)
        count = _count(game, options)
    what = (WHITE_BOX[config.privacy.unit] if options.canaries == "planted" else BLACK_BOX).format(client=game.client)
    console.print(f"auditing {escape(str(options.target))}: {what}", highlight=False, soft_wrap=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed} of {task.total} steps"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as progress:
        bar = progress.add_task(options.test, total=_steps(game, options, count))
        game.on_step = lambda: progress.advance(bar)
        result = _play(game, options, count)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        report = asdict(result) | {
            "verdict": result.verdict,
            "violated": result.violated,
            "planted": what,
            "unit": UNITS[config.privacy.unit],
            "method": config.federation.method,
            "configuration": str(options.target),
        }
        write_atomically(folder / "audit.json", json.dumps(report, indent=1, ensure_ascii=False))
        plot_audits({f"{config.federation.method}, {options.test}": [result]}, folder / "audit.png")
    except OSError as error:
        raise ValueError(
            f"{result}; but cannot write to {folder} ({error.strerror}): choose another --output"
        ) from error
    console.print(str(result), style="bold red" if result.violated else "bold", highlight=False, soft_wrap=True)
    console.print(f"{escape(str(folder / 'audit.png'))}, audit.json", highlight=False, soft_wrap=True)
    return result


def _folder(options: AuditConfig) -> Path:
    """Where the results go. Losses of private examples are no releases of a run, so they do not go into its folder.

    Raises:
        ValueError: they are to.
    """
    folder = options.output or options.target.parent
    if options.canaries == "planted" or not (folder / LOG).exists():
        return folder
    if options.output is not None:
        raise ValueError(
            f"{folder} is a run's folder, whose files its ε covers; with examples as canaries the results are of "
            "private losses, without noise: choose another --output, and keep it to yourself."
        )
    return folder.with_name(f"{folder.name}-audit")


def check_auditable(config: RunConfig, options: AuditConfig) -> None:
    """Raise ValueError for what cannot be audited."""
    privacy = config.privacy
    if privacy.mechanism == "as-released":
        raise ValueError(
            "mechanism as-released claims nothing that could be refuted: docs/reports/as-released.md audits the ε that "
            "the released code prints."
        )
    if privacy.target is None:
        raise ValueError("epsilon none claims nothing: there is no ε to audit.")
    if config.federation.engine != "local":
        raise ValueError(
            f"engine {config.federation.engine} trains in other processes, where no canary can be planted: set engine "
            "local, whose clients do the same."
        )
    if options.canaries == "examples" and privacy.unit == "client":
        raise ValueError(
            "With the client as unit, examples are not what is protected: leave canaries out, which plants whole "
            "clients."
        )


def _count(game: Game, options: AuditConfig) -> int:
    """Canaries in each training."""
    if options.count is not None or options.test == "two-world":
        return options.count or 1
    if options.canaries == "examples":
        return min(EXAMPLES, len(game.job.parts[game.client]) // 2)
    return (
        min(CLIENTS, most_clients(game))
        if game.config.privacy.unit == "client"
        else min(GRADIENTS, most_gradients(game))
    )


def _steps(game: Game, options: AuditConfig, count: int) -> int:
    plan = game.job.trainer.plan
    trainings = options.runs if options.test == "two-world" else 1
    sums = plan.sums_event is not None
    if plan.unit == "client":
        return trainings * round((plan.rounds * plan.turns * plan.client_rate + sums) * count)
    clients = 1 if options.canaries == "planted" else plan.clients
    return trainings * round((plan.rounds * plan.turns * plan.steps * plan.client_rate + sums) * clients)


def _play(game: Game, options: AuditConfig, count: int) -> AuditResult:
    how: dict[str, Any] = {
        "delta": game.config.privacy.delta,
        "claimed_epsilon": game.claim,
        "confidence": options.confidence,
        "test": options.test,
        "assume": options.assume,
        "runs": options.runs,
        "seed": options.seed,
    }
    if options.canaries == "examples":
        examples = MislabelledExamples(game, count, np.random.default_rng(options.seed))
        return audit(examples.train, examples.canaries(), **how)
    if game.config.privacy.unit == "client":
        canaries = ClientCanaries(game, count)
        return audit(lambda federation: game.train(federation, range(canaries.count)), canaries, **how)
    return audit(train_with_gradients(game), GradientCanaries(count), **how)
