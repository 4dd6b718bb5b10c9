"""The width of a model is that of its tokens."""

from pathlib import Path

import pytest
import torch

from lora_dp.fed.models.loading import load_model
from lora_dp.fed.models.options import ModelConfig
from lora_dp.fed.models.width import width_of
from tests.fed.models.tiny_texts import bert_folder


def test_it_is_the_number_of_a_heads_features_after_one_block(tmp_path: Path) -> None:
    for name, kind in (("default", "image"), (bert_folder(tmp_path), "text")):
        loaded = load_model(ModelConfig(name=name, features="mean"), 3, kind)  # type: ignore[arg-type]
        assert loaded.model.get_submodule("head").in_features == width_of(name)
    assert isinstance(torch.empty(width_of("test_vit")), torch.Tensor) and width_of("test_vit") == 64


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^There is no model .*: give a timm name"):
        width_of(str(tmp_path / "none"))
