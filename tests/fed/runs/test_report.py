"""What a run shows and leaves behind."""

import io
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from lora_dp.fed.config import RunConfig
from lora_dp.fed.rounds.federation import Federation, RoundResult
from lora_dp.fed.runs.folder import RunFolder
from lora_dp.fed.runs.report import ConsoleReport, draw_curves, summarise


def result(index: int, accuracy: float, epsilon: float) -> RoundResult:
    return RoundResult(
        index,
        "BA" if index else "",
        [0, 1],
        1.0 - accuracy,
        accuracy,
        epsilon,
        1_250_000,
        750_000,
        0.5,
        [],
        accuracy / 2,
    )


RESULTS = [result(0, 0.5, 0.0), result(1, 0.7, 4.0), result(2, 0.8, 7.9)]
ACCOUNT = {
    "unit": "one example",
    "worst_epsilon": 7.9,
    "clients": [
        {"ledger": {"entries": [{"noise_multiplier": noise, "sample_rate": 0.1, "count": 4}]}} for noise in (1.5, 1.25)
    ],
}


def config(**options) -> RunConfig:
    return RunConfig.from_flat({"clients": 2, "rounds": 2, "accountant": "rdp", **options})


def test_summary():
    summary = summarise(config(), RESULTS, ACCOUNT, "finished", [1.5, 1.25])
    assert (summary["accuracy_before"], summary["accuracy_after"], summary["worst_epsilon"]) == (0.5, 0.8, 7.9)
    assert summary["noise_multiplier"] == {"smallest": 1.25, "largest": 1.5}
    assert (summary["bytes_up"], summary["bytes_down"], summary["seconds"]) == (3_750_000, 2_250_000, 1.5)
    assert (summary["balanced_accuracy_before"], summary["balanced_accuracy_after"]) == (0.25, 0.4)
    assert summary["release"] is None
    assert "research only" in summarise(config(reproducible=True), RESULTS, ACCOUNT, "finished", [1.0])["release"]


@pytest.mark.parametrize("epsilon", [8, "none"])
def test_curves_show_the_runs_colours(tmp_path, epsilon):
    last = [RoundResult(**{**vars(r), "epsilon": math.inf}) if epsilon == "none" and r.round else r for r in RESULTS]
    draw_curves(last, config(epsilon=epsilon), tmp_path / "curves.png")
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int)
    height, width, _ = pixels.shape
    assert height > 500 and width > 800

    def painted(colour: tuple[int, int, int]) -> bool:
        return bool((np.abs(pixels - np.array(colour)).sum(2) < 12).sum() > 50)

    assert painted((0x2F, 0x6F, 0xDE))  # accuracy
    assert painted((0xE0, 0x70, 0x2F)) is (epsilon == 8)  # ε, only where there is one


def test_a_single_point_can_be_drawn(tmp_path):
    draw_curves(RESULTS[:1], config(), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_metrics_are_on_disk_line_by_line(tmp_path):
    folder = RunFolder.create(config(output=tmp_path / "run"))
    for number, each in enumerate(RESULTS, 1):
        folder.add_metrics(each)
        assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == number


@pytest.fixture(scope="module")
def federation() -> Federation:
    return Federation.from_config(config(device="cpu"))


def show(federation: Federation, terminal: bool) -> str:
    stream = io.StringIO()
    report = ConsoleReport(Console(file=stream, force_terminal=terminal, width=100))
    report.begin(config(), federation)
    with report.progress:
        for each in RESULTS:
            report.round(each, 2)
            report.step()
    return stream.getvalue()


def test_a_batch_size_above_the_examples_of_a_client_is_said(federation):
    stream = io.StringIO()
    ConsoleReport(Console(file=stream, width=200)).begin(config(batch_size=720), federation)
    assert "2 of 2 clients have fewer examples than batch_size 720 (the smallest 719): their" in stream.getvalue()
    stream = io.StringIO()
    ConsoleReport(Console(file=stream, width=200)).begin(config(batch_size=719), federation)
    assert "fewer examples" not in stream.getvalue()


def test_the_time_at_the_end_counts_from_the_start_of_the_process(federation):
    stream = io.StringIO()
    report = ConsoleReport(Console(file=stream, width=200), began=time.monotonic() - 1000)
    report.end(summarise(config(), RESULTS, federation.account.report(), "finished", [1.0]), Path("out"))
    assert re.search(r"time +100\d s", stream.getvalue())


@pytest.mark.slow
def test_lines_without_a_terminal(federation):
    lines = show(federation, terminal=False).splitlines()
    assert lines[0].startswith("la-lora · default, r = 4 · digits: 1438 private examples at 2 clients (719 each)")
    assert lines[1].startswith("ε = 8 at δ = 1e-05 for one example of one client, added or removed; noise multiplier ")
    assert lines[2:] == [
        "start       loss 0.5000   accuracy  50.0 %   worst ε  0.000",
        "round 1/2   loss 0.3000   accuracy  70.0 %   worst ε  4.000   sent 2 MB",
        "round 2/2   loss 0.2000   accuracy  80.0 %   worst ε  7.900   sent 2 MB",
    ]


def test_a_bar_only_on_a_terminal(federation):
    assert "━" in show(federation, terminal=True)
    assert "━" not in show(federation, terminal=False)
