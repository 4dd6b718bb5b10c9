"""LoRA-XS's layer: a core between the singular vectors of the weight."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_dp.nn.lora_xs_linear import DPLoRAXSLinear, singular_factors
from tests.models import assert_refuses
from tests.nn.lora_layers import close
from tests.support import make_private


def trained(dtype=torch.float32, **options):
    torch.manual_seed(0)
    layer = DPLoRAXSLinear(7, 5, r=2, alpha=3, dtype=dtype, **options)
    nn.init.normal_(layer.lora_R)
    return layer


def by_hand(layer, x):
    weight = (layer.weight.t() if layer.fan_in_fan_out else layer.weight).double()
    update = layer.lora_B.double() @ layer.lora_R.double() @ layer.lora_A.double()
    return F.linear(x.double(), weight + layer.scaling * update, layer.bias.double())


@pytest.mark.parametrize("rank", [1, 3, 99])
@pytest.mark.parametrize(("d_out", "d_in", "r"), [(5, 9, 2), (9, 5, 2), (6, 6, 6), (1, 8, 1), (12, 4, 4)])
def test_the_factors_are_those_of_the_best_cut(d_out, d_in, r, rank):
    generator = torch.Generator().manual_seed(d_out + rank)
    rank = min(rank, d_out, d_in)
    weight = (
        torch.randn(d_out, rank, generator=generator).double() @ torch.randn(rank, d_in, generator=generator).double()
    )
    left, right = singular_factors(weight, r)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(left @ right, (u[:, :r] * s[:r]) @ vh[:r], rtol=0, atol=1e-12 * float(s[0]))
    torch.testing.assert_close(left.t() @ left, torch.eye(r).double(), rtol=0, atol=1e-12)
    # Singular values stand beside V, as in the paper.
    torch.testing.assert_close(right @ right.t(), s[:r].square().diag(), rtol=0, atol=1e-12 * float(s[0] ** 2))
    assert left.abs().amax(0).equal(left.amax(0))


@pytest.mark.parametrize("weight", [torch.full((3, 4), float("nan")), torch.empty(3, 4, device="meta")])
def test_a_weight_without_numbers_is_refused(weight):
    with pytest.raises(ValueError, match="is not finite, or not loaded: load the model's weights first"):
        singular_factors(weight, 2)


def test_a_new_layer_trains_the_core_alone_and_adds_nothing():
    plain = nn.Linear(7, 5)
    layer = DPLoRAXSLinear.from_linear(plain, r=3)
    assert layer.weight is plain.weight
    assert [(name, p.numel()) for name, p in layer.named_parameters() if p.requires_grad] == [("lora_R", 9)]
    x = torch.randn(4, 7)
    assert torch.equal(layer(x), plain(x)) and layer.lora_B.any()


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forward_and_merge(dtype, fan_in_fan_out):
    layer, x = trained(dtype, fan_in_fan_out=fan_in_fan_out), torch.randn(3, 4, 7, dtype=dtype)
    assert layer.lora_R.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    before, frozen = layer(x), layer.weight.detach().clone()
    assert before.dtype == dtype and close(before, by_hand(layer, x), dtype)
    assert not close(before, F.linear(x, frozen.t() if fan_in_fan_out else frozen, layer.bias), dtype)
    layer.merge()
    assert close(layer(x), before, dtype) and list(layer.state_dict()) == ["weight", "bias"]
    layer.unmerge()
    assert close(layer.weight, frozen, dtype) and close(layer(x), before, dtype)


def test_dropout_is_on_the_adapter_input_alone():
    layer, x = trained(dropout=0.5), torch.ones(200, 7)
    base = F.linear(x, layer.weight, layer.bias)
    torch.manual_seed(1)
    update = layer(x) - base
    torch.manual_seed(1)
    b, a = layer.factors()
    assert close(update, layer.scaling * F.dropout(x, 0.5) @ a.t() @ b.t(), torch.float32)
    assert close(layer.eval()(x), by_hand(layer, x), torch.float32)


def test_a_state_dict_brings_the_basis_along():
    layer, other = trained(), DPLoRAXSLinear(7, 5, r=2, alpha=3)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 7)
    assert torch.equal(other(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    merged = copy.deepcopy(layer)
    merged.merge()
    with pytest.raises(RuntimeError, match="merged weight"):
        other.load_state_dict(merged.state_dict(), strict=False)


def test_the_core_of_a_stored_b():
    layer = trained(torch.float64)
    torch.testing.assert_close(layer.core_of(layer.factors()[0]), layer.lora_R.detach(), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="leaves the span of the weight's singular vectors"):
        layer.core_of(torch.randn(5, 2))


def test_the_rank_is_that_of_the_decomposition():
    layer = trained()
    layer.set_rank(2, alpha=8)
    assert layer.scaling == 4.0
    with pytest.raises(ValueError, match="decomposed at rank 2, not 1"):
        layer.set_rank(1, alpha=8)


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
def test_what_is_frozen_must_stay_so(name):
    layer = trained()
    getattr(layer, name).requires_grad_(True)
    with pytest.raises(ValueError, match=f"'0.{name}' is .* an adapter but requires grad: freeze it"):
        make_private(nn.Sequential(layer), batch_size=2)


def test_a_merged_adapter_is_not_trained():
    model = nn.Sequential(trained())
    make_private(model, batch_size=2)
    model[0].merge()
    assert_refuses(RuntimeError, "A merged adapter cannot be trained", lambda: model(torch.ones(2, 7)))
