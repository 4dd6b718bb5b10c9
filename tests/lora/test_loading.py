"""Adapters on disk put into models, or refused by name with the model left plain."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_dp import DPLoRALinear, LoRAConfig, inject_lora, load_adapter, merge_adapters
from lora_dp.lora.adapters import adapter_state
from tests.lora.peft_folders import assert_same, ours, saved_by_peft

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: object) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


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


def test_a_rank_above_a_layers_size_is_loaded(plain, tmp_path):
    """Which PEFT trains, and inject_lora refuses."""
    theirs = saved_by_peft(plain, tmp_path, r=17, target_modules=["query"])
    model = load_adapter(copy.deepcopy(plain), tmp_path)
    assert model.roberta.encoder.layer[0].attention.self.query.lora_A.shape == (17, 16)
    assert_same(model, theirs, "roberta", plain)
    with pytest.raises(ValueError, match="Rank 17 is above the size"):
        inject_lora(plain, LoRAConfig(r=17, target_modules=["query"]))


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
