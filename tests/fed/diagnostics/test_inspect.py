"""A finished run, inspected: files, table, and what it refuses."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from lora_dp.fed.config import RunConfig, read_config
from lora_dp.fed.diagnostics import inspect
from lora_dp.fed.diagnostics.inspect import inspect_run, read_updates
from lora_dp.fed.diagnostics.intruder import intruder_dimensions
from lora_dp.fed.launch import run
from lora_dp.fed.rounds.setup import open_job
from lora_dp.fed.runs.results import load_result
from tests.fed.diagnostics.recorded_updates import write_updates

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


def inspected(folder) -> tuple[dict, str]:
    stream = io.StringIO()
    assert inspect_run(folder, Console(file=stream, width=160)) == folder
    return json.loads((folder / "inspect.json").read_text()), stream.getvalue()


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_guarantees_nothing_says_so(tmp_path):
    folder = finished(tmp_path / "run", mechanism="as-released", rounds=1)
    report, text = inspected(folder)
    assert "no privacy guarantee (ε = ∞)" in text and "research only" in text
    assert report["epsilon"] is None and "no privacy guarantee" in report["guarantee"]


@pytest.mark.slow
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
