"""What the page of a run shows, from its folder."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

from lora_dp.fed.config import read_config
from lora_dp.fed.page import figures, number_format
from lora_dp.fed.plot_style import GREEN, ORANGE
from lora_dp.fed.rounds.federation import RoundResult
from lora_dp.fed.rounds.ledgers import LOG, AheadLog, LogError
from lora_dp.fed.rounds.privacy_plan import UNITS
from lora_dp.fed.rounds.setup import plan_of
from lora_dp.fed.runs.folder import ENDED, SAMPLES, read_results
from lora_dp.fed.runs.report import notes, public, total_seconds

# A page of all of 10,000 clients would be of no use to a reader.
MOST_CLIENTS, MOST_FAILURES, MOST_SAMPLES = 100, 100, 5
_ACCOUNTANTS = {"pld": "privacy loss distributions", "rdp": "Rényi divergences"}


def content(folder: Path) -> dict[str, Any]:
    """The variables of run.html.j2, of a finished run or one that was cut short.

    Raises:
        ValueError: the configuration, or a file that the run has written, is damaged.
    """
    config = read_config(folder)
    try:
        summary = _read_json(folder / "summary.json") or {}
        # What was begun counts, and is in the log alone until the run stops.
        counted = AheadLog(folder / LOG).counted(plan_of(config))
        ledger = _read_json(folder / "ledger.json") if counted is None else counted.report()
        results = read_results(folder)
    except LogError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"A file in {folder} is damaged ({error}): restore it from a backup.") from error
    federation, privacy = config.federation, config.privacy
    evaluated = [result for result in results if result.accuracy is not None]
    released = privacy.mechanism == "as-released"
    status = summary.get("status", "not finished")
    secret = any(result.participants is None for result in results)
    image = folder / "inspect.png"
    return {
        "title": f"{federation.method} on {config.data.dataset}",
        "folder": folder.resolve().name,
        "config": config,
        "settings": config.to_yaml(),
        "status": status,
        "ended": status in ENDED,
        "rounds_done": results[-1].round if results else 0,
        "warnings": [text for name, own in notes(config).items() if (text := summary.get(name, own))],
        "causal": config.data.task == "causal-lm",
        "perplexities": [result.perplexity for result in (evaluated[:1] + evaluated[-1:])],
        "generations": _read_json(folder / SAMPLES),
        "samples": MOST_SAMPLES,
        "before": evaluated[0].accuracy if evaluated else None,
        "after": evaluated[-1].accuracy if evaluated else None,
        "after_by_class": evaluated[-1].balanced_accuracy if evaluated else None,
        "after_round": evaluated[-1].round if evaluated else None,
        "private": privacy.target is not None and not released,
        "follows_seed": config.run.reproducible,
        "worst_epsilon": ledger["worst_epsilon"] if ledger is not None else results[-1].epsilon if results else 0.0,
        "unit": UNITS[privacy.unit],
        "public": summary.get("public", public(config)) or "",
        "seconds": total_seconds(results),
        "up": sum(result.bytes_up for result in results),
        "down": sum(result.bytes_down for result in results),
        "secret": secret,
        "curves": _curves(results, privacy.kept, causal=config.data.task == "causal-lm"),
        "traffic": _traffic(results),
        "ledger": None if ledger is None else _ledger(ledger),
        "failures": _failures(results),
        "inspection": base64.b64encode(image.read_bytes()).decode() if image.exists() else None,
    }


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _curves(results: list[RoundResult], target: float | None, *, causal: bool) -> list[tuple[str, Any]]:
    evaluated = [result for result in results if result.accuracy is not None]
    if not evaluated:
        return []
    rounds = [result.round for result in evaluated]
    accuracy = [float(result.accuracy or 0) for result in evaluated]
    found = [
        (
            f"{'Token accuracy' if causal else 'Accuracy'} on validation data",
            figures.curve(
                rounds,
                accuracy,
                kind="percent",
                name="Accuracy by round",
                reference=(accuracy[0], f"before: {number_format.percent(accuracy[0])}"),
            ),
        )
    ]
    if causal:
        known = [(result.round, value) for result in evaluated if (value := result.perplexity) is not None]
        found.insert(
            0,
            (
                "Perplexity on validation data",
                figures.curve(
                    [at for at, _ in known],
                    [value for _, value in known],
                    name="Perplexity by round",
                    reference=(known[0][1], f"before: {known[0][1]:.4g}"),
                ),
            ),
        )
    losses = [(result.round, result.loss) for result in results if result.loss is not None]
    if losses:
        found.append(
            (
                "Loss on validation data",
                figures.curve(
                    [at for at, _ in losses], [loss for _, loss in losses], colour=GREEN, name="Loss by round"
                ),
            )
        )
    if target is not None:
        found.append(
            (
                "Worst client's ε",
                figures.curve(
                    [result.round for result in results],
                    [result.epsilon for result in results],
                    colour=ORANGE,
                    name="Worst client's ε by round",
                    reference=(target, f"budget: {target:g}"),
                ),
            )
        )
    return found


def _traffic(results: list[RoundResult]) -> Any:
    trained = [result for result in results if result.round]
    if not trained:
        return None
    return figures.traffic(
        [result.round for result in trained],
        [result.bytes_up for result in trained],
        [result.bytes_down for result in trained],
    )


def _failures(results: list[RoundResult]) -> dict[str, Any]:
    all_of_them = [(result.round, each) for result in results for each in result.failed]
    listed = [
        {"round": at, "client": each.get("client"), "reason": each.get("reason", "")}
        for at, each in all_of_them[:MOST_FAILURES]
    ]
    return {"count": len(all_of_them), "listed": listed}


def _ledger(account: dict[str, Any]) -> dict[str, Any]:
    """The clients of an account, as in ledger.json, with the largest ε first, and how all of them are spread."""
    clients = []
    for each in account.get("clients", []):
        entries = each.get("ledger", {}).get("entries", [])
        clients.append(
            {
                "client": each.get("client"),
                "examples": each.get("examples"),
                "steps": each.get("steps"),
                "epsilon": each.get("epsilon"),
                # One kind of release a client, so far; several are listed one by one.
                "sigma": [entry.get("noise_multiplier") for entry in entries],
                "rate": [entry.get("sample_rate") for entry in entries],
            }
        )
    if len(clients) > MOST_CLIENTS:
        clients.sort(key=lambda each: float("inf") if each["epsilon"] is None else each["epsilon"], reverse=True)
    return {
        "count": len(clients),
        "listed": clients[:MOST_CLIENTS],
        "spread": [
            ("examples", _spread([each["examples"] for each in clients])),
            ("steps", _spread([each["steps"] for each in clients])),
            ("σ", _spread([sigma for each in clients for sigma in each["sigma"]])),
            ("q", _spread([rate for each in clients for rate in each["rate"]])),
            ("ε", _spread([each["epsilon"] for each in clients])),
        ],
        "accountant": _ACCOUNTANTS.get(account.get("accountant", ""), ""),
    }


def _spread(values: list[float | None]) -> tuple[float, float, float] | None:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return min(known), float(np.median(known)), max(known)
