"""What a run shows: its summary, the curves, the lines on the console."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lora_dp.extras import require
from lora_dp.fed.config import RunConfig
from lora_dp.fed.plot_style import BLUE, ORANGE, QUIET, STYLE, marks_of
from lora_dp.fed.rounds import as_released
from lora_dp.fed.rounds.federation import Federation, RoundResult
from lora_dp.fed.rounds.privacy_plan import AS_RELEASED, UNITS, finite, guarantee
from lora_dp.fed.safe_text import harmless

require("lora_dp.fed", "matplotlib", "fed")  # for the curves at the end of a run
RESEARCH_ONLY = "research only: sampling and noise follow the seed, so the guarantee does not hold; do not release"
PUBLIC = (
    "Taken to be public, not protected: the number of each client's examples (it sets sample rates and weights), which "
    "clients take part in which rounds, the classes, the validation data, and all settings."
)
PUBLIC_CLIENTS = (
    "Taken to be public, not protected: the number of clients, the classes, the validation data, and all settings. "
    "With noise by the server, which clients take part in which rounds is secret, as are the server's logs."
)


def public(config: RunConfig) -> str:
    """What a run takes to be public. A language model has no classes."""
    said = PUBLIC if config.privacy.unit == "example" else PUBLIC_CLIENTS
    return said.replace("the classes, ", "") if config.data.task == "causal-lm" else said


def notes(config: RunConfig) -> dict[str, str | None]:
    """What must be said of a run wherever it shows itself: of its guarantee, and of a release."""
    return {
        "guarantee": guarantee(config.privacy.mechanism),
        "release": RESEARCH_ONLY if config.run.reproducible else None,
    }


def summarise(
    config: RunConfig, results: Sequence[RoundResult], account: dict[str, Any], status: str, noise: Sequence[float]
) -> dict[str, Any]:
    """summary.json, with the noise multipliers that were used. ε is null where there is no privacy."""
    first, last = results[0], [result for result in results if result.accuracy is not None][-1]
    secret = any(result.participants is None for result in results)
    return {
        "status": status,
        **notes(config),
        "method": config.federation.method,
        "model": config.model.name,
        "dataset": config.data.dataset,
        "clients": config.federation.clients,
        "rounds": results[-1].round,
        "accuracy_before": first.accuracy,
        "accuracy_after": last.accuracy,
        "balanced_accuracy_before": first.balanced_accuracy,
        "balanced_accuracy_after": last.balanced_accuracy,
        "loss_before": first.loss,
        "loss_after": last.loss,
        **_of_texts(config, first, last),
        "target_epsilon": config.privacy.target,
        "worst_epsilon": account["worst_epsilon"],
        "delta": config.privacy.delta,
        "accountant": config.privacy.accountant,
        "privacy_unit": account["unit"],
        "noise_multiplier": {"smallest": min(noise), "largest": max(noise)} if noise else None,
        "public": None if config.privacy.kept is None else public(config),
        "bytes_up": sum(result.bytes_up for result in results),
        "bytes_down": sum(result.bytes_down for result in results),
        "failed_clients": None if secret else sum(len(result.failed) for result in results),
        "seconds": total_seconds(results),
    }


def _of_texts(config: RunConfig, first: RoundResult, last: RoundResult) -> dict[str, Any]:
    """What a language model's losses are in perplexity."""
    if config.data.task != "causal-lm":
        return {}
    ends = {"perplexity_before": first.perplexity, "perplexity_after": last.perplexity}
    return {name: None if value is None else finite(value) for name, value in ends.items()}


def used_noise(federation: Federation) -> list[float]:
    """The noise multipliers of a run: deviations over bounds."""
    if federation.plan.mechanism == "as-released":
        return [as_released.claimed_noise_multiplier(federation.plan, federation.method)]
    return federation.account.noise_multipliers()


def total_seconds(results: Sequence[RoundResult]) -> float | None:
    """Of all rounds; None where that is secret."""
    parts = [result.seconds for result in results]
    return None if None in parts else round(sum(part for part in parts if part is not None), 3)


def draw_curves(results: Sequence[RoundResult], config: RunConfig, path: Path) -> None:
    """Draws accuracy, or a language model's perplexity, and worst ε by round into a PNG."""
    import matplotlib  # half a second, at the end of a run alone
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    target, causal = config.privacy.kept, config.data.task == "causal-lm"
    rounds = [result.round for result in results]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.8) if target is not None else (5.6, 3.8), layout="constrained", dpi=160)
        axes = figure.subplots(1, 1 if target is None else 2, squeeze=False)[0]
        evaluated = [result.round for result in results if result.accuracy is not None]
        shown = [result.perplexity if causal else result.accuracy for result in results]
        values = [value for value in shown if value is not None]
        form = ".3g" if causal else ".1%"
        axes[0].axhline(values[0], color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
        axes[0].annotate(
            f"before: {values[0]:{form}}",
            (rounds[-1], values[0]),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=QUIET,
            fontsize=9,
        )
        _curve(axes[0], evaluated, values, BLUE, f"{values[-1]:{form}}")
        axes[0].set_title(f"{'Perplexity' if causal else 'Accuracy'} on validation data")
        if not causal:
            axes[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        if target is not None:
            epsilon = [result.epsilon for result in results]
            axes[1].axhline(target, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
            axes[1].annotate(
                f"budget: {target:g}",
                (0, target),
                xytext=(0, 4),
                textcoords="offset points",
                ha="left",
                va="bottom",
                color=QUIET,
                fontsize=9,
            )
            _curve(axes[1], rounds, epsilon, ORANGE, f"{epsilon[-1]:.3g}")
            axes[1].set_title(f"Worst client's ε at δ = {config.privacy.delta:g}")
            axes[1].set_ylim(0, max(*epsilon, target) * 1.12)
        for axis in axes:
            axis.set_xlabel("round")
            axis.set_xlim(0, max(rounds[-1], 1) * 1.08)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
            axis.tick_params(length=0)
        marks = "".join(f" · {words}" for words in marks_of(**notes(config)))
        figure.suptitle(
            f"{config.federation.method} · {config.model.name} on {config.data.dataset} · "
            f"{config.federation.clients} clients{marks}",
            fontsize=10,
            color=QUIET,
            x=0.01,
            ha="left",
        )
        figure.savefig(path)


def _curve(axis: Any, x: Sequence[int], y: Sequence[float], colour: str, label: str) -> None:
    axis.plot(x, y, color=colour, linewidth=2, marker="o", markersize=3.5, markeredgewidth=0)
    axis.fill_between(x, y, min(y), color=colour, alpha=0.08, linewidth=0)
    axis.annotate(
        label, (x[-1], y[-1]), xytext=(0, 8), textcoords="offset points", ha="center", color=colour, weight="bold"
    )


class ConsoleReport:
    """Lines of a run on the console; the moving bar only where there is a terminal.

    Args:
        console: to print on.
        began: ``time.monotonic()`` from which the time at the end counts; by default now.
    """

    def __init__(self, console: Console, began: float | None = None) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._causal = False
        self._per_round, self._begin = 0, time.monotonic() if began is None else began

    def begin(self, config: RunConfig, federation: Federation) -> None:
        """Says what is about to run."""
        self._causal = config.data.task == "causal-lm"
        sizes = federation.account.sizes.tolist()
        noise = used_noise(federation)
        target, chosen = config.privacy.target, config.federation
        whole_clients = federation.plan.private and federation.plan.unit == "client"
        private = (
            f"{len(sizes)} clients"
            if whole_clients
            else f"{sum(sizes)} private examples at {len(sizes)} clients ({_span(sizes, 'd')} each)"
        )
        self._print(
            f"[bold]{chosen.method}[/] · {config.model.name}, r = {_span(federation.ranks, 'd')} · "
            f"{config.data.dataset}: {private}, {len(federation.validation)} to validate on"
        )
        if target is None:
            self._print("[yellow]no privacy[/] (ε = ∞): nothing is clipped, no noise is added")
        elif config.privacy.mechanism == "as-released":
            self._print(
                f"[yellow]{AS_RELEASED}[/]; its noise (σ = {_span(noise, '.3g')}) is set as if for "
                f"ε = {target:g} at δ = {config.privacy.delta:g}"
            )
        else:
            privacy = config.privacy
            how = f"{privacy.clipping} clipping" if privacy.unit == "example" else f"added by the {privacy.noise_by}"
            self._print(
                f"ε = {target:g} at δ = {privacy.delta:g} for {UNITS[privacy.unit]}; noise multiplier "
                f"{_span(noise, '.3g')}, {how}"
            )
        small = sum(size < chosen.batch_size for size in sizes)
        if small and not whole_clients:
            self._print(
                f"[yellow]{small} of {len(sizes)} clients have fewer examples than batch_size {chosen.batch_size}[/] "
                f"(the smallest {min(sizes)}): their batches always hold all of them, so that sampling hides nothing"
            )
        self._per_round = (chosen.clients_per_round or chosen.clients) * chosen.local_steps * federation.method.turns
        self._task = self.progress.add_task("round 1", total=chosen.rounds * self._per_round)

    def resumed(self, folder: Path, rounds: int) -> None:
        """Says from where a run goes on."""
        self._print(f"resuming {escape(str(folder))} after round {rounds}")

    def warn(self, text: str) -> None:
        """Something that is not as it should be, but does not stop the run."""
        self._alarm(text)

    def step(self) -> None:
        """One local step was taken."""
        assert self._task is not None
        self.progress.advance(self._task)

    def round(self, result: RoundResult, rounds: int) -> None:
        """One line for a round."""
        width = len(str(rounds))
        epsilon = f"{result.epsilon:6.3f}" if finite(result.epsilon) is not None else "∞"
        sent = f"   sent {_size(result.bytes_up + result.bytes_down)}" if result.round else ""
        name = f"round {result.round:>{width}}/{rounds}" if result.round else "start".ljust(7 + 2 * width)
        loss = "     –" if result.loss is None else f"{result.loss:6.4f}"
        accuracy = "    – " if result.accuracy is None else f"{100 * result.accuracy:5.1f} %"
        said = f"accuracy {accuracy}"
        if self._causal:
            said = f"perplexity {_number(result.perplexity):>6}   token {said}"
        self._print(f"{name}   loss {loss}   {said}   worst ε {epsilon}{sent}")
        for entry in result.failed:
            who = "a client" if entry["client"] is None else f"client {entry['client']}"
            self._alarm(f"left out: {who} {entry['reason']}")
        if self._task is not None:
            # Steps on empty batches were not counted one by one.
            done, following = result.round * self._per_round, min(result.round + 1, rounds)
            self.progress.update(self._task, completed=done, description=f"round {following}")

    def generating(self, count: int) -> None:
        """Says that texts are generated, which takes a while."""
        self._print(f"going on from {count} validation prompts …")

    def end(self, summary: dict[str, Any], folder: Path) -> None:
        """The table at the end. What whoever runs it may know besides, how long it took, stays on the console."""
        worst = "∞ (no privacy)" if summary["worst_epsilon"] is None else f"{summary['worst_epsilon']:.4g}"
        table = Table(title=None, show_header=False, box=None, padding=(0, 3, 0, 0))
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        what = "token accuracy" if self._causal else "accuracy"
        if self._causal:
            for name, before, after in _text_rows(summary):
                table.add_row(f"{name} before", before)
                table.add_row(f"{name} after", f"[bold]{after}[/]")
        table.add_row(f"{what} before", f"{100 * summary['accuracy_before']:.1f} %")
        table.add_row(f"{what} after", f"[bold]{100 * summary['accuracy_after']:.1f} %[/]")
        if summary["balanced_accuracy_after"] is not None:  # resumed from rounds of an earlier version
            table.add_row("mean over classes", f"{100 * summary['balanced_accuracy_after']:.1f} %")
        table.add_row(f"worst ε at δ = {summary['delta']:g}", f"[bold]{worst}[/]")
        table.add_row("sent up, down", f"{_size(summary['bytes_up'])}, {_size(summary['bytes_down'])}")
        table.add_row("time", f"{time.monotonic() - self._begin:.0f} s")
        table.add_row("results", str(folder))
        if summary["failed_clients"]:
            table.add_row("left out", f"[yellow]{summary['failed_clients']} times a client[/]")
        if summary["guarantee"]:
            table.add_row("guarantee", f"[yellow]{summary['guarantee']}[/]")
        if summary["status"] != "finished":
            table.add_row("status", f"[yellow]{summary['status']}[/]")
        if summary["status"] in ("interrupted", "stopped"):
            table.add_row("go on with", f"lora-dp resume {escape(str(folder))}")
        if summary["release"]:
            table.add_row("release", f"[yellow]{summary['release']}[/]")
        self.console.print()
        self.console.print(table)

    def _alarm(self, text: str) -> None:
        # As text, not as markup: a client has a hand in it.
        self.console.print(Text(harmless(text, 1000), style="yellow"), soft_wrap=True)

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)


def _text_rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What is said of a language model, before and after: perplexity, and where texts were generated their quality."""
    rows = [("perplexity", _number(summary["perplexity_before"]), _number(summary["perplexity_after"]))]
    found = {end: summary.get(f"text_quality_{end}") or {} for end in ("before", "after")}
    for name, key in (("BLEU", "bleu"), ("ROUGE-L", "rouge_l")):
        if key in found["after"]:
            rows.append((name, _number(found["before"].get(key)), _number(found["after"].get(key))))
    return rows


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _span(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def _size(count: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} B"
