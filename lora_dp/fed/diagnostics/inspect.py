"""``lora-dp inspect RUN``: the quantities by which papers explain why a method wins, of one run.

Only public things are looked at: what the run has released, its settings, and validation data (taken to be public).
"""

import io
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from lora_dp.atomic_files import write_atomically, write_bytes_atomically
from lora_dp.fed.config import RunConfig, read_config
from lora_dp.fed.data.examples import Batch, Examples
from lora_dp.fed.diagnostics.intruder import THRESHOLD, TOP, adapted_layers, intruder_dimensions, weight_and_update
from lora_dp.fed.diagnostics.plots import draw_inspection
from lora_dp.fed.diagnostics.sharpness import loss_curves, top_eigenvalue
from lora_dp.fed.rounds.privacy_plan import finite
from lora_dp.fed.rounds.setup import match_threads, open_job
from lora_dp.fed.runs.folder import ENDED, UPDATES, whole_lines
from lora_dp.fed.runs.report import notes
from lora_dp.fed.runs.results import load_result

# So that the embedded model takes less than half a minute on a CPU, and one of 20 million parameters some minutes. The
# number must depend on the model alone: sharpness on other examples is another sharpness.
MOST_EXAMPLES, MOST_FOR_LARGE, MOST_TEXTS, LARGE = 512, 128, 16, 10**7
# Bounds the memory of a second derivative.
BATCH = 64


def inspect_run(folder: Path, console: Console) -> Path:
    """Measures a finished run, prints a table, and writes inspect.json and inspect.png into its folder.

    Args:
        folder: of the run.
        console: to print on.

    Returns:
        The folder.

    Raises:
        ValueError: no run there, or one that has not finished; data or model that cannot be opened any more.
    """
    config = read_config(folder)
    _check_finished(folder)
    with console.status("opening the run"):
        job = open_job(config)
        model, whole = job.trainer.workspace.model, job.trainer.workspace.whole
        load_result(whole, folder)
        match_threads(model)
        large = sum(parameter.numel() for parameter in model.parameters()) > LARGE
        most = MOST_FOR_LARGE if large else MOST_EXAMPLES
        # Each of them is scored for every token of the vocabulary, some hundred times.
        most = MOST_TEXTS if config.data.task == "causal-lm" else most
        examples = _sample(job.validation, most)
        device = next(model.parameters()).device
        batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in examples.batches(BATCH)]
    report = measure(model, batches, console, whole) | {
        "method": config.federation.method,
        "epsilon": _epsilon(config),
        **notes(config),
        "model": config.model.name,
        "dataset": config.data.dataset,
        "examples": len(examples),
        "validation_examples": len(job.validation),
        "updates": read_updates(folder / UPDATES),
    }
    write_atomically(folder / "inspect.json", json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False))
    image = io.BytesIO()
    draw_inspection(report, image)
    write_bytes_atomically(folder / "inspect.png", image.getvalue())
    _print(report, folder, console)
    return folder


def measure(
    model: nn.Module, batches: Sequence[Batch], console: Console, whole: nn.Module | None = None
) -> dict[str, Any]:
    """Intruder dimensions and sharpness of a model, ready for JSON; it is left as it was.

    Args:
        model: with adapters.
        batches: public examples, on its device.
        whole: the model that this is the rest of, by whose names layers are known; by default itself.
    """
    with console.status("intruder dimensions"):
        found = {
            name: intruder_dimensions(*weight_and_update(layer))
            for name, layer in adapted_layers(whole or model).items()
        }
    with console.status("sharpness: top Hessian eigenvalue"):
        eigenvalue = top_eigenvalue(model, batches)
    with console.status("sharpness: loss along random directions"):
        curves = loss_curves(model, batches)
    return {
        "intruder_dimensions": {
            "top": TOP,
            "threshold": THRESHOLD,
            "total": sum(each.count for each in found.values()),
            "looked_at": sum(len(each.cosines) for each in found.values()),
            "layers": {
                name: {"count": each.count, "cosines": each.cosines, "singular_values": each.singular_values}
                for name, each in found.items()
            },
        },
        "sharpness": {
            "space": "adapted weights and head",
            "top_eigenvalue": eigenvalue,
            "alpha": curves.alpha,
            "losses": [[finite(loss) for loss in each] for each in curves.losses],
            "rise": finite(curves.rise),
        },
    }


def read_updates(path: Path) -> dict[str, Any] | None:
    """What updates.jsonl says: a few numbers for each turn of each round, and the last turn whole; None if empty."""
    lines = [json.loads(line) for line in whole_lines(path)]
    lines = [line for line in lines if line["clients"]]
    if not lines:
        return None
    return {"rounds": [_means(line) for line in lines], "last": lines[-1]}


def _means(line: dict[str, Any]) -> dict[str, Any]:
    pairs = [value for number, row in enumerate(line["cosine"]) for value in row[:number] if value is not None]
    shares = [share for share in line["noise_share"] if share is not None]
    return {
        "round": line["round"],
        "turn": line["turn"],
        "mean_cosine": statistics.fmean(pairs) if pairs else None,
        "noise_share": statistics.fmean(shares) if shares else None,
        "least_noise_share": min(shares, default=None),
        "most_noise_share": max(shares, default=None),
        "left_out": line["left_out"],
    }


def _check_finished(folder: Path) -> None:
    try:
        status = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, KeyError, TypeError):
        status = None
    if status not in ENDED:
        raise ValueError(
            f"The run in {folder} has not finished: let it end, or resume it if it was cut short, then inspect it."
        )


def _epsilon(config: RunConfig) -> float | None:
    """The budget where one was kept."""
    return config.privacy.target if config.privacy.mechanism == "sound" else None


def _sample(examples: Examples, most: int) -> Examples:
    """At most so many of them, always the same, at random: a data set may be sorted by label."""
    if len(examples) <= most:
        return examples
    return examples.subset(torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))[:most])


def _print(report: dict[str, Any], folder: Path, console: Console) -> None:
    intruders, sharpness, updates = report["intruder_dimensions"], report["sharpness"], report["updates"]
    most = max(intruders["layers"], key=lambda name: intruders["layers"][name]["count"], default="")
    where = f" (most in {escape(most)}: {intruders['layers'][most]['count']})" if intruders["total"] else ""
    rise = "not finite" if sharpness["rise"] is None else f"{sharpness['rise']:+.3f} nats"
    table = Table(box=None, padding=(0, 3, 0, 0), show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(
        "intruder dimensions",
        f"{intruders['total']} of {intruders['looked_at']}",
        f"of the {TOP} strongest directions of each adapted layer, those that the pretrained weight lacks{where}; "
        "fewer: less is forgotten",
    )
    table.add_row(
        "top Hessian eigenvalue",
        "not found" if sharpness["top_eigenvalue"] is None else f"{sharpness['top_eigenvalue']:.4g}",
        "curvature of the loss in its steepest direction; lower: flatter",
    )
    table.add_row(
        "loss nearby",
        rise,
        f"rise of the loss {sharpness['alpha'][-1]:g} filter norms away in random directions; lower: flatter",
    )
    if updates is None:
        table.add_row("updates", "none", f"no {UPDATES} here: clients' updates were not recorded, or are secret")
    else:
        _add_updates(table, updates["rounds"])
    console.print(table)
    for note in (report["guarantee"], report["release"]):
        if note is not None:
            console.print(f"[yellow]{note}[/]", highlight=False, soft_wrap=True)
    used, all_ = report["examples"], report["validation_examples"]
    console.print(
        f"sharpness on {used} of {all_} validation examples, drawn at random"
        if used < all_
        else f"sharpness on all {all_} validation examples",
        style="dim",
        highlight=False,
    )
    console.print(f"{escape(str(folder / 'inspect.png'))}, inspect.json", highlight=False, soft_wrap=True)


def _add_updates(table: Table, rounds: Sequence[dict[str, Any]]) -> None:
    cosine = _mean([entry["mean_cosine"] for entry in rounds])
    share = _mean([entry["noise_share"] for entry in rounds])
    table.add_row(
        "alignment of updates",
        "–" if cosine is None else f"{cosine:.3f}",
        "mean cosine of two clients' updates, over all rounds; 1: they agree, 0: nothing in common",
    )
    table.add_row(
        "noise in an update",
        "none" if share is None else f"{share:.1%}",
        "no noise was added, or its norm is not known"
        if share is None
        else "share of a client's squared update that is privacy noise; an average of K clients has 1/K of its energy",
    )
    if left_out := sum(entry["left_out"] for entry in rounds):
        table.add_row("not recorded", str(left_out), "updates beyond those that a round keeps")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(known) if known else None
