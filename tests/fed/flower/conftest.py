"""A node with a policy, its state, and data of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_dp.fed.config import RunConfig
from lora_dp.fed.rounds.setup import open_job
from tests.fed.flower.node_data import GOOD, own_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_folder(tmp_path_factory.mktemp("own"), 40)


@pytest.fixture
def node(folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {"partition-id": 0, "data": str(folder), "ledger": str(tmp_path / "ledger.json")}


@pytest.fixture(scope="module")
def state(folder: Path) -> dict[str, torch.Tensor]:
    config = RunConfig.from_flat({**GOOD, "dataset": str(folder), "validation_fraction": 0.3})
    return open_job(config).trainer.workspace.state()
