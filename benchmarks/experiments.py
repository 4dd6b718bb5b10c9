"""The experiments of docs/experiments.md: tune each method by itself, then the grid of methods, ε and seeds.

    python -m benchmarks.experiments tune --experiment docs/experiments/usps.yaml --rates '[0.25, 0.5, 1, 2]'
    python -m benchmarks.experiments grid --experiment docs/experiments/usps.yaml

Both go on where they were stopped: every finished run is a line of ``<name>.jsonl`` under ``--output``. ``grid`` takes
each method's best learning rate from ``tune`` and ends with the table and a plot.
"""

import json
import multiprocessing
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import auto_cli

METHODS = ("la-lora", "dp-lora", "ffa-lora", "rolora")
EPSILONS = ["1", "3", "8", "none"]
TUNING_SEED = 100  # none of the grid's


@dataclass
class Common:
    """What both commands take."""

    dataset: str | None = None
    """A local folder in place of the configuration's data set."""
    model: str | None = None
    """A local folder in place of the configuration's model."""
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    output: Path = Path("benchmarks/results/experiments")
    """Folder of the results."""
    jobs: int = 2
    """Processes side by side, each with one thread."""


_COMMON = Common()


def _one_run(options: dict[str, Any]) -> dict[str, Any]:
    import io

    import torch
    from rich.console import Console

    from lora_dp.fed.config import RunConfig
    from lora_dp.fed.runner import run

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(RunConfig.from_flat({**options, "output": Path(folder) / "run"}), Console(file=io.StringIO()))
    return {
        "accuracy_before": outcome.rounds[0].accuracy, "accuracy": outcome.rounds[-1].accuracy,
        "loss": outcome.rounds[-1].loss, "epsilon_spent": outcome.rounds[-1].epsilon,
        "seconds": sum(result.seconds for result in outcome.rounds),
    }


def _run_missing(runs: list[dict[str, Any]], experiment: Path, common: Common, path: Path) -> list[dict[str, Any]]:
    """Runs what ``path`` does not hold yet; returns the record of every asked run."""
    base = yaml.safe_load(experiment.read_text())
    local = {name: value for name in ("dataset", "model") if (value := getattr(common, name))}
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    todo = [run for run in runs if not any(record["run"] == run for record in done)]
    path.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(common.jobs, mp_context=context) as pool:
        futures = {pool.submit(_one_run, {**base, **local, **run}): run for run in todo}
        for number, future in enumerate(as_completed(futures), 1):
            record = {"run": futures[future], **future.result()}
            done.append(record)
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(f"{number}/{len(todo)} {record['run']} accuracy {record['accuracy']:.3f}", flush=True)
    return [next(record for record in done if record["run"] == run) for run in runs]


def tune(
    experiment: Path, rates: list[float], epsilons: list[str] | None = None,
    by: Literal["loss", "accuracy"] = "loss", common: Common = _COMMON
) -> None:
    """Tries learning rates for each method at each ε, on a seed that the grid does not use.

    Args:
        experiment: the configuration, docs/experiments/NAME.yaml.
        rates: learning rates to try.
        epsilons: numbers, or none for no privacy; 1, 3, 8 and none if left out.
        by: what decides; noise makes a model overconfident, so the two can disagree.
        common: shared options.
    """
    epsilons = epsilons or EPSILONS
    path = common.output / f"{experiment.stem}-tuning.jsonl"
    runs = [{"method": method, "epsilon": _epsilon(epsilon), "lr": rate, "seed": TUNING_SEED}
            for epsilon in epsilons for method in common.methods for rate in rates]
    records = _run_missing(runs, experiment, common, path)
    best_path = common.output / f"{experiment.stem}-rates.yaml"
    best = yaml.safe_load(best_path.read_text()) if best_path.exists() else {}
    for epsilon in epsilons:
        for method in common.methods:
            mine = [record for record in records
                    if (record["run"]["method"], record["run"]["epsilon"]) == (method, _epsilon(epsilon))]
            winner = min(mine, key=lambda record: record["loss"] if by == "loss" else -record["accuracy"])
            best.setdefault(epsilon, {})[method] = winner["run"]["lr"]
            print(epsilon, method, " ".join(f"{r['run']['lr']:g}: {r['loss']:.3f}, {r['accuracy']:.3f};" for r in mine))
    best_path.write_text(yaml.safe_dump(best, sort_keys=False))


def _epsilon(text: str) -> float | Literal["none"]:
    return "none" if text == "none" else float(text)


def grid(
    experiment: Path, epsilons: list[str] | None = None, seeds: list[int] | None = None, common: Common = _COMMON
) -> None:
    """Runs methods × ε × seeds and writes the table (Markdown) and the plot.

    Args:
        experiment: the configuration, docs/experiments/NAME.yaml.
        epsilons: numbers, or none for no privacy; 1, 3, 8 and none if left out.
        seeds: 0, 1 and 2 if left out.
        common: shared options.
    """
    epsilons, seeds = epsilons or EPSILONS, seeds or [0, 1, 2]
    rates = yaml.safe_load((common.output / f"{experiment.stem}-rates.yaml").read_text())
    cells = [(method, epsilon) for method in common.methods for epsilon in epsilons]
    runs = [{"method": method, "epsilon": _epsilon(epsilon), "lr": rates[epsilon][method], "seed": seed}
            for seed in seeds for method, epsilon in cells]
    records = _run_missing(runs, experiment, common, common.output / f"{experiment.stem}.jsonl")
    accuracies = {
        cell: [100 * record["accuracy"] for run, record in zip(runs, records, strict=True)
               if (run["method"], run["epsilon"]) == (cell[0], _epsilon(cell[1]))]
        for cell in cells
    }
    before = statistics.mean(100 * record["accuracy_before"] for record in records)
    head = "".join(f" ε = {epsilon} |" if epsilon != "none" else " no privacy |" for epsilon in epsilons)
    lines = [f"| method |{head}", "| --- |" + " --- |" * len(epsilons)]
    for method in common.methods:
        row = [f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"
               for epsilon in epsilons if (values := accuracies[method, epsilon])]
        lines.append(f"| `{method}` | " + " | ".join(row) + " |")
    table = "\n".join(lines)
    spent = max((record["epsilon_spent"] for record in records if record["run"]["epsilon"] != "none"), default=0.0)
    print(f"{table}\nbefore: {before:.1f}; largest ε spent {spent:.4f}; "
          f"{sum(record['seconds'] for record in records) / 60:.0f} core minutes")
    (common.output / f"{experiment.stem}.md").write_text(table + "\n")
    _plot(accuracies, common.methods, epsilons, before, Path("docs") / "experiments" / f"{experiment.stem}.png")


def _plot(
    accuracies: dict[tuple[str, str], list[float]], methods: list[str], epsilons: list[str], before: float, path: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, method in enumerate(methods):
        positions = [k + 0.08 * (number - (len(methods) - 1) / 2) for k in range(len(epsilons))]
        means = [statistics.mean(accuracies[method, epsilon]) for epsilon in epsilons]
        spreads = [statistics.stdev(v) if len(v := accuracies[method, epsilon]) > 1 else 0 for epsilon in epsilons]
        axes.errorbar(positions, means, spreads, marker="o", linewidth=1.2, capsize=3, label=method)
    axes.axhline(before, color="grey", linestyle=":", linewidth=1, label="before")
    axes.set_xticks(range(len(epsilons)), [f"ε = {e}" if e != "none" else "no privacy" for e in epsilons])
    axes.set_ylabel("validation accuracy (%)")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    auto_cli([tune, grid], as_positional=False)
