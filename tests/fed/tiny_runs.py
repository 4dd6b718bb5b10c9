"""Runs of two clients and two rounds, and what they leave."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from lora_dp.fed.config import RunConfig

TINY = {"clients": 2, "rounds": 2, "local_steps": 2, "batch_size": 16, "accountant": "rdp", "device": "cpu"}


def tiny(output: Path | None = None, **options) -> RunConfig:
    return RunConfig.from_flat({**TINY, "output": output, **options})


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")
