"""PEFT opens what we save, and we open what PEFT saves: the same logits on both sides."""

import copy
import json
import os
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn

from lora_dp import DPLoRALinear, LoRAConfig, inject_lora, load_adapter, merge_adapters, save_adapter
from lora_dp.lora import peft_format
from lora_dp.lora.adapters import adapter_state
from tests.tiny_models import HEADS, KINDS, TARGETS, TEXT, build, logits, randomise

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def assert_same(one: nn.Module, other: nn.Module, kind: str, plain: nn.Module) -> None:
    expected = logits(one, kind)
    assert (expected - logits(plain, kind)).abs().max() > 1e-2, "the adapter does nothing"
    torch.testing.assert_close(logits(other, kind), expected, rtol=1e-5, atol=1e-5)


def opened_by_peft(plain: nn.Module, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval()


def ours(plain: nn.Module, **settings: object) -> nn.Module:
    return randomise(inject_lora(copy.deepcopy(plain), LoRAConfig(r=2, **settings)))


def saved_by_peft(plain: nn.Module, folder: Path, **settings: object) -> nn.Module:
    model = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(**{"r": 2} | settings)).eval()
    randomise(model).save_pretrained(folder)
    return model


@pytest.fixture
def plain() -> nn.Module:
    return build("roberta")


@pytest.fixture
def folder(plain: nn.Module, tmp_path: Path) -> Path:
    """An adapter of ours for ``plain``: query and value, and the head."""
    save_adapter(ours(plain, target_modules=["query", "value"], trainable_modules=["classifier"]), tmp_path / "a")
    return tmp_path / "a"


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: object) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


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


def test_an_adapted_model_takes_another_adapter(plain, folder):
    source = load_adapter(copy.deepcopy(plain), folder)
    other = ours(plain, target_modules=["query", "value"], trainable_modules=["classifier"])
    for parameter in other.parameters():
        parameter.data.mul_(2 if parameter.requires_grad else 1)
    load_adapter(other, folder)
    assert_same(source, other, "roberta", plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 4}, r"has alpha = 2\.0 but the model's has 4\.0"),
        ({"rslora": True}, "has rslora = False"),
        ({"bias": "all"}, "has bias = none but the model's has all"),
        ({"target_modules": ["query"]}, r"model's adapters lack: .*value\.lora_A\.weight"),
        ({"target_modules": ["query", "value", "key"]}, r"lacks .*key\.lora_A\.weight"),
        ({"trainable_modules": []}, r"model's adapters lack: 'base_model\.model\.classifier\.dense\.bias'"),
    ],
)
def test_other_adapters_are_refused(settings, message, plain, folder):
    model = ours(plain, **({"target_modules": ["query", "value"], "trainable_modules": ["classifier"]} | settings))
    before = adapter_state(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state(model).items())


def test_another_rank_is_refused(plain, folder):
    model = inject_lora(plain, LoRAConfig(r=4, alpha=2, target_modules=["query", "value"]))
    with pytest.raises(ValueError, match="has r = 2 but the model's has 4: load it onto the plain model"):
        load_adapter(model, folder)


def test_a_merged_model_takes_no_adapter(plain, folder):
    model = load_adapter(plain, folder)
    merge_adapters(model)
    with pytest.raises(ValueError, match="is merged: call unmerge_adapters"):
        load_adapter(model, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "describes a 'IA3' adapter: only 'LORA'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"rank_pattern": {"query": 4}}, r"rank_pattern=\{'query': 4\}, which is not supported"),
        ({"layers_to_transform": [1]}, "layers_to_transform"),
        ({"layers_to_transform": 0}, "layers_to_transform=0"),
        ({"lora_bias": True, "alpha_pattern": {"a": 1}}, r"alpha_pattern=\{'a': 1\}, lora_bias=True"),
        ({"exclude_modules": ["key"]}, "exclude_modules"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"something_new": 3}, "something_new=3"),
        ({"target_modules": None}, "names no target_modules"),
        ({"target_modules": ["nowhere"]}, r"No linear layer of the model answers to \['nowhere'\]"),
        ({"target_modules": ["query"]}, r"model's adapters lack: .*value\.lora_A"),
        ({"target_modules": ["query", "value", "key"]}, r"lacks .*key\.lora_A"),
        ({"modules_to_save": None}, r"model's adapters lack: .*classifier"),
        ({"r": 4}, r"shape \(2, 16\) where the model needs \(4, 16\)"),
        ({"r": 0}, "r must be a whole number"),
        ({"bias": "some"}, "got 'some'"),
        ({"r": "8"}, "sets r to '8', which is not a whole number"),
        ({"r": None}, "sets r to None"),
        ({"r": True}, "sets r to True"),
        ({"r": 2.0}, r"sets r to 2\.0"),
        ({"lora_alpha": None}, "lora_alpha to None"),
        ({"lora_alpha": "x"}, "lora_alpha to 'x', which is not a number"),
        ({"lora_alpha": float("nan")}, "alpha must be"),
        ({"lora_dropout": [0.1]}, "lora_dropout"),
        ({"use_rslora": "yes"}, "use_rslora to 'yes'"),
        ({"bias": None}, "sets bias to None"),
        ({"target_modules": 5}, "target_modules to 5"),
        ({"target_modules": [5]}, "target_modules to .5."),
        ({"modules_to_save": "classifier"}, "modules_to_save to 'classifier', which is not a list of names"),
    ],
)
def test_adapters_that_cannot_be_opened_leave_the_model_plain(changes, message, plain, folder):
    edit_config(folder, **changes)
    names = list(plain.state_dict())
    with pytest.raises(ValueError, match=message):
        load_adapter(plain, folder)
    assert list(plain.state_dict()) == names and all(parameter.requires_grad for parameter in plain.parameters())
    assert not any(isinstance(module, DPLoRALinear) for module in plain.modules())


def test_missing_and_misshapen_tensors_are_named(plain, folder):
    key = "base_model.model.roberta.encoder.layer.1.attention.self.value.lora_B.weight"
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.zeros(20, 2)}))
    with pytest.raises(ValueError, match=r"value\.lora_B\.weight' with shape \(20, 2\) where .* \(16, 2\)"):
        load_adapter(plain, folder)
    edit_tensors(folder, lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match=f"lacks '{key}'"):
        load_adapter(plain, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.index_fill(0, torch.tensor([1]), float("nan")), "NaN or infinite numbers in '{}'"),
        (lambda tensor: tensor / 0, "NaN or infinite numbers in '{}'"),
        (lambda tensor: tensor.to(torch.bfloat16) / 0, "NaN or infinite numbers in '{}'"),
        (lambda tensor: tensor.to(torch.int8), "'{}' in torch.int8, which is not floating-point"),
    ],
)
@pytest.mark.parametrize("end", ["lora_A.weight", "lora_B.weight"])
def test_tensors_that_are_not_finite_numbers_are_named(change, message, end, plain, folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith(end))
    edit_tensors(folder, lambda found: found.update({key: change(found[key])}))
    before = [tensor.clone() for tensor in plain.state_dict().values()]
    with pytest.raises(ValueError, match=re.escape(f"The stored adapter has {message.format(key)}")):
        load_adapter(plain, folder)
    for one, other in zip(before, plain.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_rank_above_a_layers_size_is_refused_by_name(plain, tmp_path):
    saved_by_peft(plain, tmp_path, r=17, target_modules=["query"])
    with pytest.raises(ValueError, match=r"Rank 17 is above the size of 'roberta\.encoder\.layer\.0\.attention\.self"):
        load_adapter(plain, tmp_path)


def test_missing_files_are_named(plain, folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_model\.safetensors"):
        load_adapter(plain, folder)
    with pytest.raises(FileNotFoundError, match=r"nowhere holds no adapter_config\.json"):
        load_adapter(plain, folder / "nowhere")


def test_a_broken_config_is_named(plain, folder):
    (folder / "adapter_config.json").write_text('{"r": ')
    with pytest.raises(ValueError, match=r"adapter_config\.json is not JSON"):
        load_adapter(plain, folder)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"LORA"'])
def test_a_config_of_another_kind_is_named(text, plain, folder):
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json does not describe an adapter"):
        load_adapter(plain, folder)


@pytest.mark.parametrize("length", [0, 4, 100, -8])
def test_broken_weights_are_named(length, plain, folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    names = list(plain.state_dict())
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged .*: save the adapter again"):
        load_adapter(plain, folder)
    assert list(plain.state_dict()) == names


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


def test_names_that_only_look_alike():
    assert peft_format.matches_target("a.query", ["query"]) and not peft_format.matches_target("a.prequery", ["query"])
    assert peft_format.matches_saved_module("pre_classifier", ["classifier"])
    assert peft_format.modules_to_save_for(["classifier"], ["classifier", "pre_classifier"]) == [
        "base_model.model.classifier"
    ]
    assert peft_format.target_modules_for(["a.b"], ["a", "a.b", "c.a.b"]) == r"a\.b"
