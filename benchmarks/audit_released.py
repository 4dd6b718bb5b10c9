"""How much the mechanisms that two papers released leak, beside the ε that their code prints.

Its figures are in docs/reports/as-released.md.

    python -m benchmarks.audit_released

takes about 25 minutes on one core.

Two worlds: one client of the embedded default trains its first turn with one example more, or without it, again and
again, by ``--mechanism as-released``. The adversary sees the update that leaves the client and nothing else, and knows
the other examples and the one in question, whose gradient dominates its batch. The other turns of the run would only
add to what is seen here.
"""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

from lora_dp.auditing import audit
from lora_dp.auditing.canaries import Coins, Played
from lora_dp.engine.data_loader import PrivateDataLoader
from lora_dp.engine.optimizer import PrivateOptimizer
from lora_dp.fed.config import RunConfig
from lora_dp.fed.methods import State
from lora_dp.fed.rounds import as_released
from lora_dp.fed.rounds.client import Trainer
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.messages import Task
from lora_dp.fed.rounds.setup import open_job

METHODS = ("la-lora", "deer")
EPSILONS = (1.0, 3.0, 8.0)
DELTA = 1e-5
CLIENT = 0
# Length of the canary's gradient: that of the others' is about 1.
LENGTH = 1000.0


@dataclass
class _Canary:
    """An example with a gradient of its own choosing: the same in every number of every tensor, which a low-pass filter
    leaves alone."""

    number: int
    in_batch: int = 0

    def gradient(self, parameter: Tensor) -> Tensor:
        """Its part of the mean gradient of the batch at hand."""
        return torch.full_like(parameter, LENGTH / parameter.numel() ** 0.5) * self.in_batch

    def score(self, change: State) -> float:
        """How far an update moved against that gradient."""
        return -sum(float(part.double().sum()) / part.numel() ** 0.5 for part in change.values())


@contextmanager
def _in_autograd(model: nn.Module, canary: _Canary) -> Iterator[None]:
    """The canary's gradient joins what autograd finds for the batch (LA-LoRA's code takes that)."""
    hooks = [p.register_hook(lambda g: g + canary.gradient(g)) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _in_optimizer(canary: _Canary) -> Callable[..., None]:
    """The same for local training by the engine, as in DEeR's, where no noise is added and nothing is clipped."""

    def on_turn(client: int, optimizer: PrivateOptimizer, batches: PrivateDataLoader) -> None:
        plain = optimizer.original_optimizer
        step = plain.step

        def stepped(closure: Any = None) -> Any:
            for group in plain.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.add_(canary.gradient(parameter))
            return step(closure)

        plain.step = stepped  # type: ignore[method-assign]

    return on_turn


class Trials:
    """One client's first turn, with or without the canary, as often as is asked."""

    def __init__(self, method: str, epsilon: float) -> None:
        torch.set_num_threads(1)
        config = RunConfig.from_flat({"method": method, "epsilon": epsilon, "mechanism": "as-released"})
        self._job = open_job(config)
        federation = Federation.of_job(config, self._job)
        federation.server.begin(0, torch.Generator().manual_seed(0))
        self._task: Task = federation.server.task(0, 0, self._job.ranks[CLIENT])
        own = self._job.parts[CLIENT]
        self._canary = _Canary(len(own))
        # One more example behind the client's own: one of another client.
        self._with = self._job.train.subset([*own.tolist(), int(self._job.parts[CLIENT + 1][0])])
        self._watch(self._with)
        torch.seed()  # the run's public seed would make DEeR's noise known
        self.noise_multiplier = as_released.claimed_noise_multiplier(self._job.trainer.plan, config.method)

    def _watch(self, examples: Any) -> None:
        canary, kind = self._canary, type(examples)

        class Watched(kind):  # type: ignore[misc, valid-type]
            def __getitems__(self, indices: Any) -> Any:
                canary.in_batch = list(indices).count(canary.number)
                return super().__getitems__(indices)

        examples.__class__ = Watched

    def score(self, included: bool) -> float:
        """The adversary's score of one turn's update."""
        self._canary.in_batch = 0
        trainer: Trainer = self._job.trainer
        examples = self._with if included else self._with.subset(range(self._canary.number))
        if as_released.replaces_training(trainer.method):
            with _in_autograd(trainer.workspace.model, self._canary):
                update = trainer.train(CLIENT, examples, self._task)
        else:
            update = replace(trainer, on_turn=_in_optimizer(self._canary)).train(CLIENT, examples, self._task)
        return self._canary.score({n: value - self._task.state[n] for n, value in update.tensors.items()})


@dataclass
class Replay:
    """Scores that are there already, as canaries for :func:`lora_dp.auditing.audit`."""

    scores: dict[bool, list[float]]
    count: int = 1
    _next: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})

    def play(self, train_fn: Callable[..., Any], included: Coins, generator: torch.Generator) -> Played:
        world = bool(included[0])
        self._next[world] += 1
        return Played(np.array([self.scores[world][self._next[world] - 1]]), None)


@dataclass
class Row:
    """One line of the table; bounds are at a confidence of 0.95 each."""

    method: str
    printed: float
    noise_multiplier: float
    runs: int
    guesses: int
    correct: int
    epsilon: float
    gaussian_epsilon: float
    seconds: float
    scores: dict[str, list[float]]


def _some(method: str, epsilon: float, runs: int) -> tuple[dict[bool, list[float]], float]:
    trials = Trials(method, epsilon)
    return {world: [trials.score(world) for _ in range(runs // 2)] for world in (False, True)}, trials.noise_multiplier


def measure(method: str, epsilon: float, runs: int, jobs: int) -> Row:
    """Plays all trials of one method at one ε, and bounds what they show."""
    begin = time.perf_counter()
    with ProcessPoolExecutor(jobs) as pool:
        parts = list(pool.map(_some, [method] * jobs, [epsilon] * jobs, [-(-runs // (4 * jobs)) * 4] * jobs))
    scores = {world: [s for found, _ in parts for s in found[world]] for world in (False, True)}
    played = 2 * len(scores[True])

    def bound(assume: Any) -> Any:
        return audit(
            lambda: None,
            Replay(scores),
            delta=DELTA,
            claimed_epsilon=epsilon,
            test="two-world",
            assume=assume,
            runs=played,
        )

    plain, gaussian = bound("nothing"), bound("gaussian")
    return Row(
        method,
        epsilon,
        parts[0][1],
        played,
        plain.guesses,
        plain.correct,
        plain.epsilon,
        gaussian.epsilon,
        time.perf_counter() - begin,
        {"out": scores[False], "in": scores[True]},
    )


def draw(rows: list[Row], path: Path) -> None:
    """The adversary's scores in both worlds, and the lower bounds beside what is printed."""
    import matplotlib
    from matplotlib.figure import Figure

    from lora_dp.fed.plot_style import BLUE, INK, ORANGE, QUIET, STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 4.2), layout="constrained")
        methods = list(dict.fromkeys(row.method for row in rows))
        panels = figure.subplots(1, 1 + len(methods))
        for axes, method in zip(panels[:-1], methods, strict=True):
            row = [r for r in rows if r.method == method][-1]
            values = [np.array(row.scores[world]) for world in ("out", "in")]
            low, high = min(v.min() for v in values), max(v.max() for v in values)
            bins = np.linspace(low, high, 40).tolist()
            for value, colour, label in zip(values, (BLUE, ORANGE), ("without the example", "with it"), strict=True):
                axes.hist(value, bins=bins, color=colour, alpha=0.8, label=label)
            axes.set(
                title=f"{method}, ε = {row.printed:g} printed",
                xlabel="adversary's score of one update",
                ylabel="trainings",
            )
            axes.legend(frameon=False)
        axes = panels[-1]
        width = 0.26
        for number, row in enumerate(rows):
            for offset, height, colour, label in (
                (-width, row.printed, QUIET, "printed"),
                (0.0, row.epsilon, BLUE, "at least, nothing assumed"),
                (width, row.gaussian_epsilon, ORANGE, "at least, Gaussian"),
            ):
                axes.bar(number + offset, height, width, color=colour, label=label if number == 0 else None)
                axes.text(number + offset, height, f"{height:.3g}", ha="center", va="bottom", fontsize=7, color=INK)
        axes.set(title="ε printed and measured", ylabel="ε at δ = 1e-5", yscale="log")
        axes.set_xticks(range(len(rows)), [f"{row.method}\nε = {row.printed:g}" for row in rows], fontsize=7)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
        axes.set_ylim(0.5, 10 * max(max(r.gaussian_epsilon, r.epsilon, r.printed) for r in rows))
        figure.savefig(path, dpi=150)


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| method | ε printed | σ | trainings | guesses right | ε at least | ε at least, Gaussian |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r.method} | {r.printed:g} | {r.noise_multiplier:.3g} | {r.runs} | "
        f"{r.correct} of {r.guesses} | {r.epsilon:.3g} | {r.gaussian_epsilon:.3g} |"
        for r in rows
    ]
    return "\n".join(lines)


def main(
    runs: int = 320,
    methods: list[str] | None = None,
    epsilons: list[float] | None = None,
    output: Path = Path("benchmarks/results/audit-released"),
    jobs: int = 1,
) -> None:
    """Audits the released mechanisms.

    Args:
        runs: trainings for each method and ε, half of them with the canary.
        methods: la-lora and deer unless said otherwise.
        epsilons: 1, 3 and 8 unless said otherwise.
        output: folder for results.json, table.md and as-released.png.
        jobs: processes side by side.
    """
    rows = []
    output.mkdir(parents=True, exist_ok=True)
    for method in methods or METHODS:
        for epsilon in epsilons or EPSILONS:
            rows.append(measure(method, epsilon, runs, jobs))
            print(table(rows[-1:]).splitlines()[-1], f"{rows[-1].seconds:.0f} s", flush=True)
            (output / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    (output / "table.md").write_text(table(rows) + "\n")
    draw(rows, output / "as-released.png")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
