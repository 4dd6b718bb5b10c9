"""Membership inference on the embedded default: can an attacker tell who was in the training data?

    python -m benchmarks.membership

Models are fine-tuned on random halves of the digits that the default run trains on, without privacy and at ε = 8 and 1;
each is attacked with the others as shadow models (:mod:`lora_dp.auditing.membership`). Twenty minutes of one core.
"""

import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli

from benchmarks.membership_picture import draw
from lora_dp.auditing.membership import Rate, largest_tpr, leave_out_scores, logit_confidence, rate, roc, tpr_at_fpr
from lora_dp.fed.config import RunConfig
from lora_dp.fed.models.loading import logits
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.setup import match_threads, open_job

SETTINGS: dict[str, float | None] = {"no privacy": None, "ε = 8": 8.0, "ε = 1": 1.0}
DELTA = 1e-5
RATES = (0.001, 0.01, 0.1)
# Of all guesses, those that the attacker is surest of.
SUREST = 0.01


def ceiling(epsilon: float | None) -> tuple[float, float]:
    """(ε, δ) of what the attacker tells apart.

    Every model has exactly half of the pictures, so where one is out another is in. That is two steps, one out and one
    in: 2ε and (1 + e^ε)δ (Dwork and Roth 2014, The Algorithmic Foundations of Differential Privacy, theorem 2.2).
    """
    return (math.inf, 1.0) if epsilon is None else (2 * epsilon, (1 + math.exp(epsilon)) * DELTA)


def most_right(epsilon: float | None) -> float:
    """Of answers that are true or false with equal odds beforehand, the most that can be right on average."""
    return 1 / (1 + math.exp(-ceiling(epsilon)[0]))


def halves(models: int, examples: int, seed: int = 0) -> np.ndarray:
    """What each model is trained on: (models, examples) bool; each pair of models shares out all examples."""
    rng = np.random.default_rng(seed)
    first = [np.argsort(rng.random(examples)) < examples // 2 for _ in range(models // 2)]
    return np.stack([part for half in first for part in (half, ~half)])


def train(epsilon: float | None, rounds: int, members: np.ndarray, name: str) -> tuple[np.ndarray, list[float]]:
    """Confidences (models, examples) of models trained on these members, and their accuracies on the validation data.

    One client of the embedded default, with all its settings but the number of clients and rounds. All models start
    alike, as public seeds let an attacker do too; batches and noise are each model's own.
    """
    config = RunConfig.from_flat(
        {"clients": 1, "rounds": rounds, "epsilon": epsilon, "delta": DELTA, "evaluate_every": rounds, "device": "cpu"}
    )
    job = open_job(config)
    workspace, pool = job.trainer.workspace, job.train.subset(range(members.shape[1]))
    match_threads(workspace.model)
    start, confidences, accuracies, begin = workspace.state(), [], [], time.monotonic()
    for number, chosen in enumerate(members):
        workspace.load(start)
        trainer = replace(job.trainer, seed=1 + number, reproducible=True)
        federation = Federation.of_job(config, replace(job, trainer=trainer, parts=[np.flatnonzero(chosen)]))
        for _ in range(rounds):
            result = federation.run_round(evaluate=federation.rounds_done + 1 == rounds)
        assert result.accuracy is not None
        federation.load_global_state()
        workspace.model.eval()
        with torch.no_grad():
            scores = torch.cat([logits(workspace.model, batch) for batch in pool.batches(512)])
        confidences.append(logit_confidence(scores.numpy(), pool.labels.numpy()).round(3))
        accuracies.append(result.accuracy)
        print(
            f"{name}: model {number + 1} of {len(members)}, accuracy {result.accuracy:.3f}, "
            f"{time.monotonic() - begin:.0f} s",
            flush=True,
        )
    return np.stack(confidences), accuracies


def attack(confidences: np.ndarray, members: np.ndarray) -> dict[str, Any]:
    """The attack's scores and its success, as rates with 95 % intervals."""
    scores = leave_out_scores(confidences, members, together=2)
    count = max(1, round(SUREST * scores.size))
    surest = np.argsort(-scores, axis=None, kind="stable")[:count]
    false, true = roc(scores, members)
    return {
        "scores": scores,
        "guesses right": rate(int(((scores > 0) == members).sum()), scores.size),
        "surest right": rate(int(members.ravel()[surest].sum()), count),
        "pictures among the surest": len(np.unique(surest % scores.shape[1])),
        "area under the curve": float(np.trapezoid(true, false)),
        # Each model's own share, since guesses on one model are not independent of each other.
        "right by model": ((scores > 0) == members).mean(axis=1).round(4).tolist(),
        **{f"TPR at FPR {fpr:g}": tpr_at_fpr(scores, members, fpr) for fpr in RATES},
    }


def main(models: int = 32, rounds: int = 40, output: Path = Path("benchmarks/results/membership")) -> None:
    """Trains, attacks, and draws.

    Args:
        models: for each setting, an even number.
        rounds: of ten steps each; the default run's are 20.
        output: folder for confidences.npz, results.json, table.md and membership.png; settings whose confidences are
            there are not trained again.
    """
    output.mkdir(parents=True, exist_ok=True)
    examples = len(open_job(RunConfig.from_flat({"clients": 1, "device": "cpu"})).train)
    members, store = halves(models, examples), output / "confidences.npz"
    known = dict(np.load(store)) if store.exists() else {}
    found: dict[str, dict[str, Any]] = {}
    for name, epsilon in SETTINGS.items():
        if known.get(name, np.empty(0)).shape != members.shape:
            known[name], accuracies = train(epsilon, rounds, members, name)
            known[f"accuracy, {name}"] = np.array(accuracies)
            np.savez_compressed(store, **{key: value.astype(np.float32) for key, value in known.items()})
        found[name] = attack(known[name], members)
        found[name]["accuracy"] = float(known[f"accuracy, {name}"].mean())
        found[name]["accuracy on members"] = float((known[name] > 0)[members].mean())
    about = {
        "models": models,
        "rounds": rounds,
        "examples": examples,
        "members of a model": examples // 2,
        "delta": DELTA,
    }
    plain = {
        name: {
            key: asdict(value) if isinstance(value, Rate) else value for key, value in row.items() if key != "scores"
        }
        for name, row in found.items()
    }
    (output / "results.json").write_text(json.dumps({**about, "settings": plain}, indent=1, ensure_ascii=False) + "\n")
    (output / "table.md").write_text(table(found) + "\n")
    print(table(found))
    ceilings = {name: (*ceiling(epsilon), most_right(epsilon)) for name, epsilon in SETTINGS.items()}
    draw(found, members, ceilings, output / "membership.png")


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row a setting, in percent, with ceilings."""
    lines = [
        "| | accuracy | right of 100 guesses | of the surest hundredth | "
        + " | ".join(f"found at {fpr:.1%} false alarms" for fpr in RATES)
        + " |",
        "| --- |" + " ---: |" * (3 + len(RATES)),
    ]
    for name, row in found.items():
        shares = [row["guesses right"], row["surest right"], *(row[f"TPR at FPR {fpr:g}"] for fpr in RATES)]
        most = [most_right(SETTINGS[name])] * 2 + [float(largest_tpr(fpr, *ceiling(SETTINGS[name]))) for fpr in RATES]
        cells = [
            f"{100 * r.share:.2f} ({100 * r.low:.2f}–{100 * r.high:.2f})" + (f" ≤ {100 * m:.3g}" if m < 1 else "")
            for r, m in zip(shares, most, strict=True)
        ]
        lines.append(f"| {name} | {row['accuracy']:.1%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
