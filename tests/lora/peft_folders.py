"""Adapters saved by PEFT or by us, and edited."""

import copy
from pathlib import Path

import peft
import torch
from torch import nn

from lora_dp import LoRAConfig, inject_lora
from tests.tiny_models import logits, randomise


def assert_same(one: nn.Module, other: nn.Module, kind: str, plain: nn.Module) -> None:
    expected = logits(one, kind)
    assert (expected - logits(plain, kind)).abs().max() > 1e-2, "the adapter does nothing"
    torch.testing.assert_close(logits(other, kind), expected, rtol=1e-5, atol=1e-5)


def ours(plain: nn.Module, **settings: object) -> nn.Module:
    return randomise(inject_lora(copy.deepcopy(plain), LoRAConfig(r=2, **settings)))


def saved_by_peft(plain: nn.Module, folder: Path, **settings: object) -> nn.Module:
    model = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(**{"r": 2} | settings)).eval()
    randomise(model).save_pretrained(folder)
    return model
