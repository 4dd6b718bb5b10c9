"""LoRA's layer without an engine: a drop-in for ``nn.Linear`` with ordinary gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_dp import DPLoRALinear
from tests.models import assert_refuses, mlp
from tests.nn.lora_layers import adapted, by_hand, close
from tests.support import make_private


def test_state_dict_names_are_those_of_linear():
    plain, layer = nn.Linear(7, 5), DPLoRALinear(7, 5, r=2)
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
    assert set(DPLoRALinear(7, 5, bias=False, r=2).state_dict()) == {"weight", "lora_A", "lora_B"}
    missing, unexpected = layer.load_state_dict(plain.state_dict(), strict=False)
    assert missing == ["lora_A", "lora_B"] and not unexpected
    x = torch.randn(3, 7)
    assert torch.equal(layer(x), plain(x))


def test_new_layer_trains_the_factors_alone():
    layer = DPLoRALinear(7, 5, r=2)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert not layer.lora_B.any() and layer.lora_A.any()
    bound = math.sqrt(6 / ((1 + 5) * 7))  # Kaiming-uniform with a = √5
    assert layer.lora_A.abs().max() <= bound


@pytest.mark.parametrize(("d_in", "d_out", "r"), [(40, 24, 6), (12, 12, 12), (9, 20, 1)])
def test_an_orthonormal_a_has_the_mean_square_of_a_kaiming_one(d_in, d_out, r):
    layers = {
        init_a: [DPLoRALinear(d_in, d_out, r=r, init_a=init_a, dtype=torch.float64).lora_A.detach() for _ in range(200)]
        for init_a in ("kaiming", "orthonormal")
    }
    for a in layers["orthonormal"]:
        assert close(a @ a.t(), torch.eye(r, dtype=torch.float64) / 3, torch.float64)
    sizes = {init_a: torch.stack([a.square().sum() for a in drawn]) for init_a, drawn in layers.items()}
    # Of a uniform row u, ‖u‖² = Σ uⱼ² has a deviation of √(4 / (45 d_in)) about 1/3.
    deviation = math.sqrt(4 * r / (45 * d_in) / 200)
    assert abs(sizes["kaiming"].mean() - sizes["orthonormal"].mean()) < 5 * deviation
    assert not torch.equal(*layers["orthonormal"][:2])


def test_the_start_is_kept_when_an_adapter_is_reset():
    layer = DPLoRALinear.from_linear(nn.Linear(7, 5), r=3, init_a="orthonormal")
    nn.init.ones_(layer.lora_A)
    layer.reset_lora_parameters()
    assert close(layer.lora_A @ layer.lora_A.t(), torch.eye(3) / 3, torch.float32) and not layer.lora_B.any()
    with pytest.raises(ValueError, match="init_a must be 'kaiming' or 'orthonormal', got 'zero'"):
        DPLoRALinear(7, 5, r=2, init_a="zero")


@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_shares_and_freezes_the_very_parameters(bias):
    linear = nn.Linear(7, 5, bias=bias).eval()
    layer = DPLoRALinear.from_linear(linear, r=2)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not any(p.requires_grad for p in linear.parameters())
    assert not layer.training
    x = torch.randn(3, 7)
    assert torch.equal(layer(x), linear(x))


def test_from_conv1d():
    conv = Conv1D(5, 7)
    layer = DPLoRALinear.from_linear(conv, r=2)
    nn.init.normal_(layer.lora_B)
    assert layer.weight is conv.weight and layer.fan_in_fan_out
    assert (layer.in_features, layer.out_features) == (7, 5)
    assert layer.lora_A.shape == (2, 7) and layer.lora_B.shape == (5, 2)
    x = torch.randn(3, 4, 7)
    assert close(layer(x), conv(x) + layer.scaling * x @ layer.lora_A.t() @ layer.lora_B.t(), torch.float32)


@pytest.mark.parametrize(
    ("options", "scaling"), [({"r": 4}, 1.0), ({"r": 4, "alpha": 8}, 2.0), ({"r": 4, "alpha": 8, "rslora": True}, 4.0)]
)
def test_scaling(options, scaling):
    assert DPLoRALinear(7, 5, **options).scaling == scaling


def test_dropout_is_on_the_adapter_input_alone():
    layer, x = adapted(dropout=0.5), torch.ones(200, 7)
    base = F.linear(x, layer.weight, layer.bias)
    torch.manual_seed(1)
    update = layer(x) - base
    torch.manual_seed(1)
    assert close(update, layer.scaling * F.dropout(x, 0.5) @ layer.lora_A.t() @ layer.lora_B.t(), torch.float32)
    assert not close(update, by_hand(layer, x) - base, torch.float32)
    assert close(layer.eval()(x), by_hand(layer, x), torch.float32)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merge_and_unmerge(dtype, fan_in_fan_out):
    layer = adapted(dtype, fan_in_fan_out=fan_in_fan_out)
    x = torch.randn(3, 7, dtype=dtype)
    frozen, before = layer.weight.detach().clone(), layer(x)
    layer.merge()
    layer.merge()
    assert layer.merged and "merged" in repr(layer)
    assert not torch.equal(layer.weight, frozen)
    assert close(layer(x), before, dtype)
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged
    assert close(layer.weight, frozen, dtype)
    assert close(layer(x), before, dtype)


def test_merged_layer_is_not_trained_privately():
    model = mlp()
    optimizer = make_private(model, batch_size=4)
    model[0].merge()
    optimizer.batch.expect(4)
    assert_refuses(RuntimeError, "call unmerge() first", lambda: model(torch.randn(4, 6)))
    with torch.no_grad():
        assert model(torch.randn(4, 6)).shape == (4, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, "choose r from 1 to 5"),
        ({"r": -1}, "choose r from 1 to 5"),
        ({"r": 6}, "choose r from 1 to 5"),
        ({"r": 2, "alpha": 0}, "alpha must be above 0"),
        ({"r": 2, "alpha": -1}, "alpha must be above 0"),
        ({"r": 2, "alpha": math.nan}, "alpha must be above 0"),
        ({"r": 2, "dropout": 1.0}, "dropout must be in [0, 1)"),
        ({"r": 2, "dropout": -0.1}, "dropout must be in [0, 1)"),
    ],
)
def test_bad_options_are_refused(options, words):
    assert_refuses(ValueError, words, lambda: DPLoRALinear(7, 5, **options))
    assert_refuses(ValueError, words, lambda: DPLoRALinear.from_linear(nn.Linear(7, 5), **options))


@pytest.mark.parametrize("rank", [0, -1, 9])
def test_a_rank_that_does_not_fit_changes_nothing(rank):
    layer = DPLoRALinear(8, 8, r=2, alpha=4)
    with pytest.raises(ValueError, match=f"Rank {rank} does not fit a 8 → 8 layer"):
        layer.set_rank(rank, alpha=1)
    assert (layer.r, layer.alpha, layer.scaling, layer.lora_A.shape) == (2, 4.0, 2.0, (2, 8))


def test_a_merged_layer_keeps_its_rank():
    layer = DPLoRALinear(8, 8, r=2)
    layer.merge()
    with pytest.raises(ValueError, match="call unmerge"):
        layer.set_rank(4, alpha=4)
    layer.unmerge()
