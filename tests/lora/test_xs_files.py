"""LoRA-XS adapters on disk are LoRA adapters of the same product, for PEFT as for us."""

import copy
import json

import peft
import pytest
import torch
from torch import nn

from lora_dp import DPLoRALinear, LoRAConfig, inject_lora, load_adapter, merge_adapters, save_adapter
from lora_dp.lora.adapters import adapter_state, load_adapter_state
from lora_dp.nn.lora_xs_linear import DPLoRAXSLinear
from tests.lora.merged_files import adapted, opened
from tests.lora.peft_folders import assert_same
from tests.tiny_models import HEADS, KINDS, build, logits

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
SETTINGS = {"adapter": "xs", "r": 3, "alpha": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_others_load_it_as_plain_lora(kind, tmp_path):
    model, plain = adapted(kind, **SETTINGS), build(kind)
    assert any(isinstance(module, DPLoRAXSLinear) for module in model.modules())
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert_same(model, peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval(), kind, plain)
    loaded = load_adapter(copy.deepcopy(plain), tmp_path)
    assert_same(model, loaded, kind, plain)
    assert {type(m) for m in loaded.modules() if isinstance(m, DPLoRALinear)} == {DPLoRALinear}


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_it_goes_on_as_it_was(kind, tmp_path):
    model = adapted(kind, **SETTINGS)
    save_adapter(model, tmp_path)
    settings = {"trainable_modules": [HEADS[kind]], "bias": "all", **SETTINGS}
    again = load_adapter(inject_lora(build(kind), LoRAConfig(**settings)), tmp_path)
    assert_same(model, again, kind, build(kind))
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5, msg=name)
        assert other.requires_grad == one.requires_grad


def test_states_are_exchanged_to_the_last_bit():
    model, other = (adapted("roberta", **SETTINGS) for _ in range(2))
    for name, parameter in other.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter)
    load_adapter_state(other, adapter_state(model))
    assert torch.equal(logits(other, "roberta"), logits(model, "roberta"))


def test_another_weight_has_no_core_for_it(tmp_path):
    config = LoRAConfig(r=2, target_modules=["0"], adapter="xs")
    torch.manual_seed(0)
    models = [inject_lora(nn.Sequential(nn.Linear(8, 8)), config) for _ in range(2)]
    nn.init.normal_(models[0][0].lora_R)
    save_adapter(models[0], tmp_path)
    before = adapter_state(models[1])
    with pytest.raises(ValueError, match="'0': The stored B leaves the span"):
        load_adapter(models[1], tmp_path)
    assert all(tensor.equal(before[name]) for name, tensor in adapter_state(models[1]).items())


@pytest.mark.parametrize("merged", [True, False])
def test_from_pretrained_opens_what_save_pretrained_wrote(merged, tmp_path):
    model = adapted("roberta", **SETTINGS)
    expected = logits(model, "roberta")
    if merged:
        merge_adapters(model)
        torch.testing.assert_close(logits(model, "roberta"), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(opened("roberta", tmp_path), "roberta"), expected, rtol=1e-4, atol=1e-5)
