"""PRISM's adapters on disk are LoRA adapters of the same product, where their coordinates are zero."""

import copy

import peft
import pytest
import torch
from torch import nn

from lora_dp import DPLoRALinear, LoRAConfig, inject_lora, load_adapter, save_adapter
from lora_dp.lora.adapters import adapter_state
from lora_dp.nn.lora_tangent_linear import DPLoRATangentLinear
from tests.lora.peft_folders import assert_same
from tests.tiny_models import build

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
CONFIG = LoRAConfig(r=2, adapter="tangent")


def adapted(kind="roberta", config=CONFIG):
    model = inject_lora(build(kind), config)
    for layer in model.modules():
        if isinstance(layer, DPLoRATangentLinear):
            nn.init.orthogonal_(layer.lora_B)
    return model.eval()


def test_others_load_it_as_plain_lora_and_it_goes_on_as_it_was(tmp_path):
    model, plain = adapted(), build("roberta")
    save_adapter(model, tmp_path)
    assert_same(model, peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval(), "roberta", plain)
    loaded = load_adapter(copy.deepcopy(plain), tmp_path)
    assert_same(model, loaded, "roberta", plain)
    assert {type(m) for m in loaded.modules() if isinstance(m, DPLoRALinear)} == {DPLoRALinear}
    again = adapted()
    for name, parameter in again.named_parameters():
        if "lora_d" in name:
            nn.init.normal_(parameter)
    load_adapter(again, tmp_path)
    assert all(tensor.equal(adapter_state(model)[name]) for name, tensor in adapter_state(again).items())


def test_what_stands_beside_its_point_is_not_saved(tmp_path):
    model = adapted()
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, DPLoRATangentLinear))
    nn.init.normal_(layer.lora_dB)
    with pytest.raises(ValueError, match=f"'{name}' stands beside its point in the tangent space, and so has rank 4"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_plain_factors_are_no_point_of_a_tangent_space(tmp_path):
    torch.manual_seed(0)
    config = LoRAConfig(r=2, target_modules=["0"])
    save_adapter(inject_lora(nn.Sequential(nn.Linear(8, 8)), config), tmp_path)
    model = inject_lora(nn.Sequential(nn.Linear(8, 8)), LoRAConfig(r=2, target_modules=["0"], adapter="tangent"))
    before = adapter_state(model)
    with pytest.raises(ValueError, match="'0': The stored factors are not orthogonal"):
        load_adapter(model, tmp_path)
    assert all(tensor.equal(before[name]) for name, tensor in adapter_state(model).items())
