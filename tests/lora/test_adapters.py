"""The tensors of adapters that models exchange."""

import pytest
import torch
from torch import nn

from lora_dp import LoRAConfig, inject_lora
from lora_dp.lora.adapters import adapter_state, load_adapter_state
from lora_dp.lora.merging import merge_adapters
from tests.lora.adapted_models import trainable
from tests.tiny_models import build, logits, randomise


def test_adapter_state_goes_from_one_model_to_another():
    config = LoRAConfig(r=2, trainable_modules=["classifier"], bias="lora_only")
    source, target = (inject_lora(build("roberta"), config) for _ in range(2))
    randomise(source)
    state = adapter_state(source)
    assert set(state) == trainable(source)
    load_adapter_state(target, state)
    assert torch.equal(logits(source, "roberta"), logits(target, "roberta"))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, adapter_state(target)[name]) for name, tensor in state.items()), "it shares memory"


def test_adapter_state_holds_both_factors_even_if_one_is_frozen():
    model = inject_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2))
    model[0].lora_A.requires_grad_(False)
    assert set(adapter_state(model)) == {"0.lora_A", "0.lora_B"}


def test_a_state_that_does_not_fit_is_refused_and_nothing_is_loaded():
    model = inject_lora(nn.Sequential(nn.Linear(4, 5)), LoRAConfig(r=2))
    before = adapter_state(model)
    ones = {name: torch.ones_like(tensor) for name, tensor in before.items()}
    with pytest.raises(ValueError, match=r"lacks '0\.lora_B'"):
        load_adapter_state(model, {"0.lora_A": ones["0.lora_A"]})
    with pytest.raises(ValueError, match=r"model's adapters lack: '1\.lora_A'"):
        load_adapter_state(model, ones | {"1.lora_A": torch.ones(1)})
    with pytest.raises(ValueError, match=r"'0\.lora_B' with shape \(5, 3\) where the model needs \(5, 2\)"):
        load_adapter_state(model, ones | {"0.lora_B": torch.ones(5, 3)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state(model).items())
    merge_adapters(model)
    with pytest.raises(ValueError, match="'0' is merged: call unmerge_adapters"):
        load_adapter_state(model, ones)
