"""PEFT opens what we save, and we open what PEFT saves: the same logits on both sides."""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

from lora_dp import DPLoRALinear, load_adapter, save_adapter
from lora_dp.lora import peft_format
from lora_dp.lora.adapters import adapter_state
from tests.lora.peft_folders import assert_same, ours, saved_by_peft
from tests.tiny_models import HEADS, KINDS, TARGETS, TEXT, build, randomise

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def opened_by_peft(plain: nn.Module, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("named", [False, True])
def test_peft_opens_ours(kind, named, tmp_path):
    plain = build(kind)
    targets = TARGETS[kind] if named else "all-linear"
    model = ours(plain, alpha=3, target_modules=targets, trainable_modules=[HEADS[kind]])
    save_adapter(model, tmp_path / "adapter")
    assert_same(model, opened_by_peft(plain, tmp_path / "adapter"), kind, plain)
    assert_same(model, load_adapter(copy.deepcopy(plain), tmp_path / "adapter"), kind, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_we_open_pefts(kind, tmp_path):
    plain = build(kind)
    theirs = saved_by_peft(plain, tmp_path, lora_alpha=3, target_modules=TARGETS[kind], modules_to_save=[HEADS[kind]])
    model = load_adapter(copy.deepcopy(plain), tmp_path)
    assert_same(theirs, model, kind, plain)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == set(adapter_state(model)) and any(name.startswith(HEADS[kind]) for name in trainable)
    save_adapter(model, tmp_path / "again")
    assert_same(theirs, opened_by_peft(plain, tmp_path / "again"), kind, plain)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("kind", ["roberta", "vit"])
def test_biases_both_ways(kind, bias, tmp_path):
    plain = build(kind)
    settings = {"target_modules": TARGETS[kind], "bias": bias}
    model = ours(plain, trainable_modules=["classifier"], **settings)
    save_adapter(model, tmp_path / "ours")
    assert_same(model, opened_by_peft(plain, tmp_path / "ours"), kind, plain)
    theirs = saved_by_peft(plain, tmp_path / "theirs", modules_to_save=["classifier"], **settings)
    model = load_adapter(copy.deepcopy(plain), tmp_path / "theirs")
    assert_same(theirs, model, kind, plain)
    # PEFT also trains a convolution's bias: kept when saved on from here, where it stays frozen.
    save_adapter(model, tmp_path / "again")
    assert_same(theirs, opened_by_peft(plain, tmp_path / "again"), kind, plain)


def test_biases_of_an_adapter_with_a_name_of_its_own(plain, tmp_path):
    theirs = peft.get_peft_model(
        copy.deepcopy(plain),
        peft.LoraConfig(r=2, target_modules=["query"], bias="all", modules_to_save=["classifier"]),
        adapter_name="mine",
    ).eval()
    randomise(theirs).save_pretrained(tmp_path)
    assert_same(theirs, load_adapter(copy.deepcopy(plain), tmp_path / "mine"), "roberta", plain)


@pytest.mark.parametrize(("alpha", "rslora"), [(1, False), (5, True), (0.5, True)])
def test_scaling_both_ways(alpha, rslora, plain, tmp_path):
    model = ours(plain, alpha=alpha, rslora=rslora)
    save_adapter(model, tmp_path / "ours")
    assert_same(model, opened_by_peft(plain, tmp_path / "ours"), "roberta", plain)
    theirs = saved_by_peft(
        plain, tmp_path / "theirs", target_modules=r".*\.(query|key)", lora_alpha=alpha, use_rslora=rslora
    )
    assert_same(theirs, load_adapter(copy.deepcopy(plain), tmp_path / "theirs"), "roberta", plain)


def test_a_task_of_pefts_that_adds_modules_to_save(plain, tmp_path):
    theirs = saved_by_peft(plain, tmp_path, task_type="SEQ_CLS", target_modules=["query"])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier", "score"]
    assert_same(theirs, load_adapter(copy.deepcopy(plain), tmp_path), "roberta", plain)


@pytest.mark.parametrize("targets", ["all-linear", ["q_lin"]])
def test_a_head_whose_name_ends_another_modules(targets, tmp_path):
    """DistilBERT has 'classifier' and 'pre_classifier', which PEFT takes for one name."""
    torch.manual_seed(0)
    plain = tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=20, max_position_embeddings=20, **TEXT)
    ).eval()
    model = ours(plain, target_modules=targets, trainable_modules=["classifier"])
    save_adapter(model, tmp_path / "adapter")
    assert_same(model, opened_by_peft(plain, tmp_path / "adapter"), "distilbert", plain)
    assert_same(model, load_adapter(copy.deepcopy(plain), tmp_path / "adapter"), "distilbert", plain)


def test_a_norm_whose_name_ends_many_others(tmp_path):
    plain = build("timm_vit")
    model = ours(plain, target_modules=["qkv"], trainable_modules=["norm", "head"])
    save_adapter(model, tmp_path / "adapter")
    assert_same(model, opened_by_peft(plain, tmp_path / "adapter"), "timm_vit", plain)
    assert_same(model, load_adapter(copy.deepcopy(plain), tmp_path / "adapter"), "timm_vit", plain)


class Nested(nn.Module):
    """A layer whose full name ends that of another, which has it too."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"proj": nn.Linear(4, 4)})

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.proj(self.inner["proj"](input_ids[:, :4] / 10))


@pytest.mark.parametrize("settings", [{"target_modules": "proj"}, {"target_modules": ["inner.proj"]}])
def test_a_target_whose_name_ends_anothers(settings, tmp_path):
    torch.manual_seed(0)
    plain = Nested()
    model = ours(plain, **settings)
    assert sum(isinstance(module, DPLoRALinear) for module in model.modules()) == 1
    save_adapter(model, tmp_path / "adapter")
    assert_same(model, opened_by_peft(plain, tmp_path / "adapter"), "nested", plain)
    assert_same(model, load_adapter(copy.deepcopy(plain), tmp_path / "adapter"), "nested", plain)


def test_a_shared_layer_is_stored_once_under_its_first_name(tmp_path):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    plain = nn.Sequential(layer, nn.Tanh(), layer)
    model = ours(plain)
    save_adapter(model, tmp_path)
    assert sorted(load_file(tmp_path / "adapter_model.safetensors")) == [
        f"base_model.model.0.lora_{factor}.weight" for factor in "AB"
    ]
    x = torch.randn(3, 4)
    assert torch.equal(load_adapter(copy.deepcopy(plain), tmp_path)(x), model(x))


def test_what_is_written(tmp_path):
    plain = build("gpt2")
    plain.config._name_or_path = "some/gpt2"
    model = ours(plain, alpha=6, target_modules=["c_fc"], trainable_modules=["score"], dropout=0.1, rslora=True)
    save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) == {
        "base_model_name_or_path": "some/gpt2",
        "bias": "none",
        "fan_in_fan_out": True,
        "inference_mode": True,
        "lora_alpha": 6,
        "lora_dropout": 0.1,
        "modules_to_save": ["score"],
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"],
        "task_type": None,
        "use_rslora": True,
    }
    layers = [f"base_model.model.transformer.h.{i}.mlp.c_fc.lora_{factor}.weight" for i in (0, 1) for factor in "AB"]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sorted(tensors) == ["base_model.model.score.weight", *layers]
    assert tensors[layers[0]].shape == (2, 16) and tensors[layers[1]].shape == (64, 2)
    read = load_adapter(build("gpt2"), tmp_path / "adapter").lora_config
    assert (read.r, read.alpha, read.dropout, read.rslora, read.bias) == (2, 6.0, 0.1, True, "none")


def test_names_that_only_look_alike():
    assert peft_format.matches_target("a.query", ["query"]) and not peft_format.matches_target("a.prequery", ["query"])
    assert peft_format.matches_saved_module("pre_classifier", ["classifier"])
    assert peft_format.modules_to_save_for(["classifier"], ["classifier", "pre_classifier"]) == [
        "base_model.model.classifier"
    ]
    assert peft_format.target_modules_for(["a.b"], ["a", "a.b", "c.a.b"]) == r"a\.b"
