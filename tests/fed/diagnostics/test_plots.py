"""The figure of an inspected run."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from lora_dp.fed.diagnostics.inspect import read_updates
from lora_dp.fed.diagnostics.plots import draw_inspection
from tests.fed.diagnostics.recorded_updates import write_updates


def report_with(updates: dict | None, layers: int = 16, losses: list | None = None) -> dict:
    generator = np.random.default_rng(0)
    found = {
        f"blocks.{n}.attn.proj": {"count": 0, "cosines": generator.uniform(0.3, 1, 10).tolist()} for n in range(layers)
    }
    return {
        "intruder_dimensions": {"threshold": 0.5, "total": 3, "looked_at": 10 * layers, "layers": found},
        "sharpness": {"top_eigenvalue": None, "alpha": [-0.5, 0.0, 0.5], "losses": losses or [[2.0, 0.1, 1.0]]},
        "updates": updates,
        "method": "dp-lora",
        "epsilon": 8.0,
        "guarantee": None,
        "release": None,
        "model": "default",
        "dataset": "digits",
        "examples": 359,
    }


def painted(report: dict) -> tuple[tuple[int, ...], int, int]:
    """The size of a figure, and its pixels in blue and in orange."""
    file = io.BytesIO()
    draw_inspection(report, file)
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    near = [int((np.abs(pixels - colour).sum(2) < 12).sum()) for colour in ((0x2F, 0x6F, 0xDE), (0xE0, 0x70, 0x2F))]
    return pixels.shape, *near


@pytest.mark.slow
def test_the_figure_has_as_many_panels_as_there_is_to_show(tmp_path):
    write_updates(tmp_path)
    noisy = read_updates(tmp_path / "updates.jsonl")
    write_updates(tmp_path, noise=None)
    plain = read_updates(tmp_path / "updates.jsonl")
    (height, _, _), blue, orange = painted(report_with(noisy))
    (without_noise, _, _), _, less_orange = painted(report_with(plain))
    (without_updates, _, _), less_blue, _ = painted(report_with(None))
    assert height == without_noise > without_updates + 400
    assert blue > less_blue > 50 and orange > less_orange > 50


@pytest.mark.slow
def test_what_is_missing_leaves_a_gap():
    cosine = [[1.0, None], [None, None]]
    rounds = [
        {
            "round": 1,
            "turn": turn,
            "mean_cosine": None,
            "noise_share": share,
            "least_noise_share": share,
            "most_noise_share": share,
            "left_out": 0,
        }
        for turn, share in ((0, None), (1, 0.9))
    ]
    updates = {"rounds": rounds, "last": {"round": 1, "clients": [3, 4], "cosine": cosine}}
    losses = [[None, 0.1, 1.0], [math.pi, 0.1, 2.0]]
    assert painted(report_with(updates, losses=losses))[1] > 50
    assert painted(report_with(updates, layers=200))[1] > 50
