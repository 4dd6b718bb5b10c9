"""A model, and a folder with an adapter for it."""

from pathlib import Path

import pytest
from torch import nn

from lora_dp import save_adapter
from tests.lora.peft_folders import ours
from tests.tiny_models import build


@pytest.fixture
def plain() -> nn.Module:
    return build("roberta")


@pytest.fixture
def folder(plain: nn.Module, tmp_path: Path) -> Path:
    """An adapter of ours for ``plain``: query and value, and the head."""
    save_adapter(ours(plain, target_modules=["query", "value"], trainable_modules=["classifier"]), tmp_path / "a")
    return tmp_path / "a"
