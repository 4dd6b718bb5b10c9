"""One run from configuration to results."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from lora_dp.accounting import PrivacyBudgetExceeded
from lora_dp.fed.config import RunConfig
from lora_dp.fed.federation import Federation, RoundResult
from lora_dp.fed.report import ConsoleReport, RunFolder, summarise


@dataclass(frozen=True)
class Outcome:
    """A run's folder, its summary (as in summary.json) and its rounds."""

    folder: Path
    summary: dict[str, Any]
    rounds: list[RoundResult]

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it; the results up to the last whole round are in the folder."""
        return self.summary["status"] == "interrupted"


def run(config: RunConfig, console: Console | None = None) -> Outcome:
    """Runs a federation and writes config.yaml, metrics.jsonl, ledger.json, adapter/, summary.json and curves.png.

    Ctrl-C ends the run after writing the results so far.

    Raises:
        ValueError: settings, data and model that do not go together; nothing has been trained.
    """
    federation = Federation.from_config(config)
    _match_threads(federation.model)
    folder = RunFolder(config)
    report = ConsoleReport(console or Console())
    results: list[RoundResult] = []
    status = "finished"
    report.begin(config, federation)
    try:
        with report.progress:
            _train(config, federation, folder, report, results)
    except KeyboardInterrupt:
        status = "interrupted"
    except PrivacyBudgetExceeded:
        status = "budget spent"
    account = federation.account()
    folder.write_ledger(account)
    if not results:
        results.append(federation.start())
    federation.load_global_state()
    folder.write_adapter(federation.model)
    summary = summarise(config, results, account, status)
    folder.write_summary(summary)
    folder.draw_curves(results, config)
    report.end(summary, folder.path)
    return Outcome(folder.path, summary, results)


def _match_threads(model: nn.Module) -> None:
    """One thread for a tiny model on a CPU: more would wait for each other, for minutes where other work runs too."""
    if all(p.device.type == "cpu" for p in model.parameters()) and sum(p.numel() for p in model.parameters()) < 10**6:
        torch.set_num_threads(1)


def _train(
    config: RunConfig, federation: Federation, folder: RunFolder, report: ConsoleReport, results: list[RoundResult]
) -> None:
    rounds = config.federation.rounds
    result = federation.start()
    while True:
        results.append(result)
        folder.add_metrics(result)
        report.round(result, rounds)
        if result.round == rounds:
            return
        participants = federation.draw()
        # On the disk before anything of this round leaves a client.
        folder.write_ledger(federation.account(pending=participants))
        following = result.round + 1
        evaluate = following % config.run.evaluate_every == 0 or following == rounds
        result = federation.run_round(participants, report.step, evaluate=evaluate)
