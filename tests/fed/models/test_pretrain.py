"""The embedded model is made again with the settings here, and the federation opens it."""

import json

import datasets
import pytest
import torch
from safetensors.torch import load_file

from lora_dp.fed.data.encoding import ImageSpec, encode
from lora_dp.fed.data.opening import open_data
from lora_dp.fed.data.options import DataConfig
from lora_dp.fed.models import loading as models
from lora_dp.fed.models.loading import load_model
from lora_dp.fed.models.options import DEFAULT_WEIGHTS, ModelConfig, PretrainConfig
from lora_dp.fed.models.pretrain import ARCHITECTURE, augment, pretrain


@pytest.fixture
def folder(tmp_path):
    """A folder of 400 handwritten digits, as images of 28 x 28."""
    raw = open_data(DataConfig())
    rows = {"image": [image.resize((28, 28)) for image in raw.train_inputs[:400]], "label": raw.train_labels[:400]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    (tmp_path / "digits").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "digits" / "train.parquet")
    return tmp_path / "digits"


@pytest.mark.slow
def test_writes_a_model_that_the_federation_opens(folder, tmp_path, monkeypatch):
    # a few steps suffice to be better than chance (10 %)
    config = PretrainConfig(dataset=str(folder), output=tmp_path / "new" / "vit.safetensors", epochs=8, batch_size=32)
    before = torch.get_rng_state()
    path = pretrain(config)
    assert torch.equal(torch.get_rng_state(), before)
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["command"] == "lora-dp pretrain --dataset digits"
    assert card["settings"]["epochs"] == 8
    assert 0.2 < card["validation_accuracy"] <= 1
    assert card["validation_images"] == 80
    monkeypatch.setattr(models, "DEFAULT_WEIGHTS", path)
    loaded = load_model(ModelConfig(), 10, "image")
    splits = encode(open_data(DataConfig(dataset=str(folder))), loaded.spec)
    # the contrast of what it was trained on: mean of all pixels, and the mean of each image's deviation
    values = splits.train.batch(range(len(splits.train)))["pixel_values"].double() / 2 + 0.5
    assert card["pixels"] == pytest.approx([float(values.mean()), float(values.std((1, 2, 3)).mean())], abs=1e-4)
    assert loaded.spec.usual == tuple(card["pixels"]) and not loaded.spec.contrast
    batch = splits.validation.batch(range(80))
    with torch.no_grad():
        hits = models.logits(loaded.model.eval(), batch).argmax(1) == batch["labels"]
    # what the description says is what a user gets
    assert hits.float().mean().item() == pytest.approx(card["validation_accuracy"], abs=1e-4)


@pytest.mark.slow
def test_the_seed_decides(folder, tmp_path):
    def weights(name, seed):
        config = PretrainConfig(dataset=str(folder), output=tmp_path / name, epochs=1, batch_size=64, seed=seed)
        return load_file(pretrain(config))

    first, again, other = weights("a.safetensors", 0), weights("b.safetensors", 0), weights("c.safetensors", 1)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_delivered_weights_match_the_settings_here():
    card = json.loads(DEFAULT_WEIGHTS.with_suffix(".json").read_text())
    assert card["architecture"] == ARCHITECTURE
    for name, value in card["settings"].items():
        assert getattr(PretrainConfig(), name) == value
    assert card["validation_accuracy"] > 0.95
    assert "/" not in card["dataset"] or card["dataset"] == PretrainConfig().dataset


def test_augmentation_varies_and_stays_in_range():
    train = encode(open_data(DataConfig()), ImageSpec(28, 28, 1, (0.0,), (1.0,))).train
    images = train.batch(range(64))["pixel_values"]
    first, second = (augment(images, 16, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, second)
    other = augment(images, 16, torch.Generator().manual_seed(1))
    assert first.shape == (64, 1, 16, 16)
    assert first.min() >= 0 and first.max() <= 1
    assert (first - other).abs().mean() > 0.05
