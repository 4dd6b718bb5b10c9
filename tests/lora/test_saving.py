"""What a model with adapters writes, opened again, computes what the model did: merged, unmerged, or a refusal."""

import copy
import importlib.util
import os
from pathlib import Path

import pytest
import torch
import transformers as tf
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file
from torch import nn

from lora_dp import LoRAConfig, inject_lora, load_adapter, merge_adapters, save_adapter
from tests.lora.merged_files import adapted, opened
from tests.lora.peft_folders import assert_same, ours
from tests.tiny_models import build, logits, randomise

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


TRANSFORMERS = ["roberta", "gpt2", "llama", "vit"]


@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.parametrize("merged", [True, False])
def test_from_pretrained_opens_what_save_pretrained_wrote(kind, merged, tmp_path):
    model = adapted(kind)
    expected = logits(model, kind)
    assert (expected - logits(build(kind), kind)).abs().max() > 1e-2
    if merged:
        merge_adapters(model)
    model.save_pretrained(tmp_path / "ours")
    torch.testing.assert_close(logits(opened(kind, tmp_path / "ours"), kind), expected, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "ours" / "adapter_config.json").exists() != merged
    if merged:
        build(kind).save_pretrained(tmp_path / "plain")
        ours, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "plain"))
        assert ours.keys() == plain.keys()


def test_how_a_starts_is_no_matter_of_the_file(tmp_path):
    files = []
    for init_a in ("kaiming", "orthonormal"):
        config = LoRAConfig(r=2, target_modules=["0"], init_a=init_a)
        save_adapter(inject_lora(nn.Sequential(nn.Linear(8, 8)), config), tmp_path / init_a)
        files.append((tmp_path / init_a / "adapter_config.json").read_text())
    assert files[0] == files[1]
    rows = load_adapter(nn.Sequential(nn.Linear(8, 8)), tmp_path / "orthonormal")[0].lora_A
    torch.testing.assert_close(rows @ rows.t(), torch.eye(2) / 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_in_half_precision(dtype, tmp_path):
    model = adapted("roberta", dtype)
    merge_adapters(model)
    expected = logits(model, "roberta")
    model.save_pretrained(tmp_path)
    again = opened("roberta", tmp_path, dtype=dtype)
    assert torch.equal(logits(again, "roberta"), expected)


def test_a_reader_without_peft_is_spoken_of(tmp_path, monkeypatch):
    model = adapted("llama")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="only where PEFT is installed.*or call merge_adapters"):
        model.save_pretrained(tmp_path)


def test_a_trainers_checkpoint_resumes(tmp_path):
    """It saves by save_pretrained, and loads the weights into the adapted model."""
    model, fresh = adapted("roberta"), adapted("roberta")
    for parameter in fresh.parameters():
        parameter.data.mul_(0.5 if parameter.requires_grad else 1)
    model.save_pretrained(tmp_path)
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert torch.equal(logits(fresh, "roberta"), logits(model, "roberta"))


def test_merged_weights_never_lie_beside_an_adapter(tmp_path):
    """from_pretrained would add it once more."""
    model = adapted("llama")
    save_adapter(model, tmp_path)
    merge_adapters(model)
    with pytest.raises(ValueError, match="once more: give another folder"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_part_of_an_adapted_model_is_not_saved_without_the_adapters(tmp_path):
    model = adapted("llama", trainable_modules=[])
    with pytest.raises(ValueError, match="call merge_adapters first"):
        model.model.save_pretrained(tmp_path)
    expected = model.model(input_ids=torch.arange(1, 8)[None])[0]
    merge_adapters(model)
    model.model.save_pretrained(tmp_path)
    again = tf.AutoModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(input_ids=torch.arange(1, 8)[None])[0], expected, rtol=1e-4, atol=1e-5)


class Hub(nn.Module, PyTorchModelHubMixin):
    """Its ``from_pretrained`` would drop factors without a word."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


def test_what_transformers_does_not_open_is_saved_merged_only(tmp_path):
    model = randomise(inject_lora(Hub(), LoRAConfig(r=2)))
    with pytest.raises(ValueError, match="would lose the adapters when opened again: call merge_adapters first"):
        model.save_pretrained(tmp_path)
    x = torch.randn(3, 4)
    expected = model.layer(x)
    merge_adapters(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(Hub.from_pretrained(tmp_path).layer(x), expected)


def test_only_the_main_process_writes(tmp_path):
    adapted("llama").save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "adapter_config.json").exists()


def test_only_an_adapted_model_is_saved(plain, tmp_path):
    with pytest.raises(ValueError, match="the very model that inject_lora returned"):
        save_adapter(plain, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_saving_again_replaces_both_files_and_nothing_else(plain, folder):
    (folder / "README.md").write_text("mine")
    model = ours(plain, alpha=7)
    save_adapter(model, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert_same(model, load_adapter(copy.deepcopy(plain), folder), "roberta", plain)


def test_a_save_that_fails_leaves_what_was_there(plain, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object, **__: object) -> bytes:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for target in (folder, folder.parent / "new"):
        with pytest.raises(OSError, match="no space"):
            save_adapter(ours(plain, alpha=7), target)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_relative_folders_and_parents_that_are_not_there(plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ours(plain)
    save_adapter(model, "runs/one")
    monkeypatch.chdir(tmp_path / "runs" / "one")
    assert_same(model, load_adapter(copy.deepcopy(plain), "."), "roberta", plain)
    save_adapter(model, ".")
    assert len(list(Path().iterdir())) == 2
