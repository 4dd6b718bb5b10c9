"""A finished run, inspected: files, table, and what it refuses."""

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from lora_dp.fed.config import RunConfig
from lora_dp.fed.diagnostics import inspect
from lora_dp.fed.diagnostics.inspect import inspect_run, read_updates
from lora_dp.fed.diagnostics.intruder import intruder_dimensions
from lora_dp.fed.diagnostics.plots import draw_inspection
from lora_dp.fed.launch import run
from lora_dp.fed.rounds.setup import open_job
from lora_dp.fed.rounds.update_statistics import UpdateRecorder
from lora_dp.fed.runs.folder import read_config
from lora_dp.fed.runs.results import load_result

TINY = {
    "clients": 2,
    "rounds": 2,
    "local_steps": 2,
    "batch_size": 16,
    "accountant": "rdp",
    "device": "cpu",
    "reproducible": True,
}


@pytest.fixture(autouse=True)
def few_examples(monkeypatch):
    monkeypatch.setattr(inspect, "MOST_EXAMPLES", 24)


def finished(folder, **options):
    run(RunConfig.from_flat({**TINY, "output": folder, **options}), Console(file=io.StringIO()))
    return folder


def write_updates(folder, noise: float | None = 1.0) -> list[dict]:
    lines = []
    for number in (1, 2):
        recorder = UpdateRecorder(range(3))
        for client in range(3):
            drawn = torch.randn(50, generator=torch.Generator().manual_seed(10 * number + client)) + 0.5
            recorder.add(client, {"x": drawn}, {"x": torch.zeros(50)}, noise)
        lines.append({"round": number, "turn": 0, **recorder.summary()})
    (folder / "updates.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def inspected(folder) -> tuple[dict, str]:
    stream = io.StringIO()
    assert inspect_run(folder, Console(file=stream, width=160)) == folder
    return json.loads((folder / "inspect.json").read_text()), stream.getvalue()


def test_a_run_is_measured(tmp_path):
    folder = finished(tmp_path / "run", lr=1.0)
    lines = [json.loads(line) for line in (folder / "updates.jsonl").read_text().splitlines()]
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    report, text = inspected(folder)
    assert {path.name for path in folder.iterdir() if path.is_file()} == before.keys() | {"inspect.json", "inspect.png"}
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    # The same from the run's own files, by hand.
    model = load_result(open_job(read_config(folder)).trainer.workspace.model, folder)
    layer = model.blocks[2].attn.proj
    expected = intruder_dimensions(layer.weight, layer.lora_B @ layer.lora_A * layer.scaling)
    found = report["intruder_dimensions"]["layers"]["blocks.2.attn.proj"]
    assert found["count"] == expected.count and found["cosines"] == pytest.approx(expected.cosines, abs=1e-6)
    assert min(found["cosines"]) < 0.999
    counts = [each["count"] for each in report["intruder_dimensions"]["layers"].values()]
    assert report["intruder_dimensions"]["total"] == sum(counts) and len(counts) == 16
    assert report["sharpness"]["top_eigenvalue"] > 0
    assert np.array(report["sharpness"]["losses"]).shape == (5, 11)
    assert (report["examples"], report["epsilon"], report["method"]) == (24, 8.0, "la-lora")
    assert report["updates"]["last"] == lines[-1]
    assert [entry["mean_cosine"] for entry in report["updates"]["rounds"]] == [line["cosine"][0][1] for line in lines]
    # Two steps beside the noise of ε = 8: hardly anything else.
    assert 0.8 < report["updates"]["rounds"][1]["noise_share"] < 1.2
    for part in (
        "intruder dimensions",
        "top Hessian eigenvalue",
        "alignment of updates",
        "noise in an update",
        "sharpness on 24 of 359 validation examples",
    ):
        assert part in text
    again, _ = inspected(folder)
    assert again == report


def test_a_run_without_privacy_and_without_updates(tmp_path):
    folder = finished(tmp_path / "run", epsilon="none", method="dp-lora")
    report, text = inspected(folder)
    first = report["updates"]["rounds"][0]
    assert first["noise_share"] is None and first["mean_cosine"] > 0.1
    assert "no noise was added" in text
    (folder / "updates.jsonl").unlink()
    report, text = inspected(folder)
    assert report["epsilon"] is None and report["updates"] is None
    assert "no updates.jsonl" in text
    assert (tmp_path / "run" / "inspect.png").stat().st_size > 10_000


def test_what_guarantees_nothing_says_so(tmp_path):
    folder = finished(tmp_path / "run", mechanism="as-released", rounds=1)
    report, text = inspected(folder)
    assert "no privacy guarantee (ε = ∞)" in text and "research only" in text
    assert report["epsilon"] is None and "no privacy guarantee" in report["guarantee"]


def test_what_was_merged_counts_as_change(tmp_path):
    folder = finished(tmp_path / "run", method="flora", lr=1.0)
    report, _ = inspected(folder)
    # FLoRA's adapters begin anew each round: all that it learnt is in the weight.
    assert (folder / "merged.safetensors").exists()
    assert min(min(each["cosines"]) for each in report["intruder_dimensions"]["layers"].values()) < 0.999


def test_the_sample_is_the_same_every_time_and_mixed():
    validation = open_job(RunConfig.from_flat(TINY)).validation
    one, two = inspect._sample(validation, 100), inspect._sample(validation, 100)
    assert len(one) == 100 and one._rows.equal(two._rows) and len(set(one._rows.tolist())) == 100
    assert not one._rows.equal(one._rows.sort().values)
    assert inspect._sample(validation, 359) is validation


def test_no_run_there(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        inspect_run(tmp_path, Console(file=io.StringIO()))


@pytest.mark.parametrize("summary", [None, '{"status": "interrupted"}', '{"sta'])
def test_a_run_that_has_not_finished(tmp_path, summary):
    (tmp_path / "config.yaml").write_text(RunConfig.from_flat(TINY).to_yaml())
    if summary is not None:
        (tmp_path / "summary.json").write_text(summary)
    with pytest.raises(ValueError, match="has not finished: let it end, or resume it"):
        inspect_run(tmp_path, Console(file=io.StringIO()))
    assert not (tmp_path / "inspect.json").exists()


def test_updates_are_read_up_to_a_torn_line(tmp_path):
    lines = write_updates(tmp_path)
    path = tmp_path / "updates.jsonl"
    path.write_text(path.read_text() + '{"round": 3, "tu')
    found = read_updates(path)
    assert [entry["round"] for entry in found["rounds"]] == [1, 2] and found["last"] == lines[-1]
    for entry, line in zip(found["rounds"], lines, strict=True):
        cosine, share = np.array(line["cosine"]), line["noise_share"]
        assert entry["mean_cosine"] == pytest.approx((cosine[0, 1] + cosine[0, 2] + cosine[1, 2]) / 3)
        assert entry["noise_share"] == pytest.approx(np.mean(share))
        assert (entry["least_noise_share"], entry["most_noise_share"]) == (min(share), max(share))
    assert read_updates(tmp_path / "nothing.jsonl") is None


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
