"""Runs of one process that share their data, and end as they would by themselves."""

import pytest
from rich.console import Console

from lora_dp.fed.config import RunConfig
from lora_dp.fed.launch import run
from lora_dp.fed.rounds import setup
from lora_dp.fed.rounds.kept_data import data_kept, made_once


def test_the_newest_of_each_kind_is_kept_inside_alone():
    made: list[str] = []

    def make(name: str) -> str:
        made.append(name)
        return name

    with data_kept():
        for name in ("a", "a", "b", "b", "a"):
            assert made_once("data", name, lambda name=name: make(name)) == name
        assert made_once("model", "a", lambda: make("other kind")) == "other kind"
    assert made == ["a", "b", "a", "other kind"]
    assert [made_once("data", "a", lambda: make("c")) for _ in range(2)] == ["c", "c"] and made.count("c") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"method": "la-lora"}, {"method": "head-only", "features": "mean", "feature_blocks": [1, -1]}]
)
def test_shared_data_change_no_bit_of_a_run(tmp_path, monkeypatch, options):
    opened: list[str] = []
    open_data = setup.open_data
    monkeypatch.setattr(setup, "open_data", lambda config: opened.append(config.dataset) or open_data(config))
    small = {"clients": 2, "rounds": 1, "local_steps": 1, "accountant": "rdp", "device": "cpu", "reproducible": True}

    def ended(name: str, seed: int) -> object:
        config = RunConfig.from_flat({**small, **options, "seed": seed, "output": tmp_path / name})
        summary = run(config, Console(quiet=True)).summary
        return {key: value for key, value in summary.items() if key != "seconds"}

    with data_kept():
        together = [ended(f"together-{seed}", seed) for seed in (1, 2)]
    assert opened == ["digits"]
    assert together[1] == ended("alone", 2) and together[1] != together[0]
    adapters = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("together-2", "alone")
    ]
    assert adapters[0] == adapters[1] and len(opened) == 2
