"""Two minutes of the soak (benchmarks/soak.py), of which the last third sees it find what it is there to find."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak_checks import rounds_of_one_draw
from tests.fed.soaking import PLANTS

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, which forks: not this one, whose threads a fork would lose."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.mark.long
def test_kills_and_faults_loses_nothing(tmp_path: Path) -> None:
    done = run("benchmarks.soak", "--minutes", "1.4", "--seed", "20261123", "--out", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["violations"] == 0 and not figures["violated"]
    assert figures["runs"] >= 3 and figures["kills"] >= 5 and figures["client faults"] >= 5, figures
    assert figures["compared bit by bit"] >= 1 and figures["kills at a write"] >= 1, figures


@pytest.mark.long
def test_it_finds_what_is_broken() -> None:
    """A ledger below the truth, bits that differ, lines that stay: each fault is planted, and found."""
    done = run("tests.fed.soaking")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    for plant, (_, _, _, said) in PLANTS.items():
        assert any(re.search(said, violation) for violation in found[plant]), (plant, found[plant])


def test_turns_of_a_round_that_two_processes_did_share_a_draw_where_it_is_reproducible() -> None:
    turns = [{"process": process, "round": 3, "turn": process, "sigma": 2.0, "steps": 1} for process in (0, 1)]
    assert len(rounds_of_one_draw(turns, reproducible=False)) == 2
    (joined,) = rounds_of_one_draw(turns, reproducible=True)
    assert joined["sigma"] == pytest.approx(2**0.5)
