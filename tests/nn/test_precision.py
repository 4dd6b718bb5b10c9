"""Half-precision models, autocast, and products that may be rounded."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp import DPLayerNorm, DPLinear, DPLoRALinear
from tests.models import cross_entropy, examples, flat, mlp, moved, one_by_one, snapshot, take_step
from tests.support import assert_close, brute_force, clip_and_sum, make_private


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("phases", ["A", "B", "AB"])
def test_model_in_half_precision(dtype, phases):
    """The release is the clipped sum of this model's own gradients, near float64's; factors and theirs are float32."""
    model, batch, bound = mlp(dtype=dtype), examples(6), 0.3
    trained = {name for name, p in model.named_parameters() if p.requires_grad} - {
        {"A": "0.lora_B", "B": "0.lora_A"}.get(phases)
    }
    expected = clip_and_sum(brute_force(model, cross_entropy, one_by_one(batch), trained), "flat", bound, str)
    optimizer = make_private(model, batch_size=6, max_grad_norm=bound, phases=phases, lr=0.1)
    before = snapshot(model)
    released = take_step(model, optimizer, batch)
    assert {name: g.dtype for name, g in released.items()} == {
        name: torch.float32 if "lora" in name else dtype for name in released
    }
    assert_close(flat(released), flat(expected), 3e-2 if dtype == torch.bfloat16 else 4e-3)
    assert moved(model, before)


@pytest.mark.parametrize("phases", ["A", "B"])
def test_autocast(phases):
    model, (x, y), bound = mlp(), examples(6), 0.3
    trained = {name for name, p in model.named_parameters() if p.requires_grad} - {
        {"A": "0.lora_B", "B": "0.lora_A"}[phases]
    }
    expected = clip_and_sum(brute_force(model, cross_entropy, one_by_one((x, y)), trained), "flat", bound, str)
    optimizer = make_private(model, batch_size=6, max_grad_norm=bound, phases=phases)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(batch[0])
            assert out.dtype == torch.bfloat16
            return F.cross_entropy(out, batch[1])

    released = take_step(model, optimizer, (x, y), loss)
    assert all(g.dtype == torch.float32 for g in released.values())
    assert_close(flat(released), flat(expected), 3e-2)


def test_layer_norm_and_trainable_bias_under_autocast():
    torch.manual_seed(0)
    model = nn.Sequential(DPLoRALinear(6, 6, r=2), DPLayerNorm(6), DPLinear(6, 3)).train()
    model[0].bias.requires_grad_(True)
    expected = brute_force(model, cross_entropy, one_by_one(examples(4)), {"0.bias", "1.weight", "1.bias"})
    optimizer = make_private(model, batch_size=4, max_grad_norm=math.inf)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(model, batch)

    released = take_step(model, optimizer, examples(4), loss)
    for name in ("0.bias", "1.weight", "1.bias"):
        assert_close(released[name], sum(gradient[name] for gradient in expected), 5e-2)


# Products that torch.set_float32_matmul_precision allows to be rounded


@pytest.fixture(params=["medium", "high"])
def rounded_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Any processor behaves like those that make use of the permission: float32 operands lose 16 of 24 bits."""

    def rounding(product: Any) -> Any:
        def run(left: Tensor, right: Tensor, **options: Any) -> Tensor:
            if left.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision not in ("none", "ieee"):
                left, right = left.bfloat16().float(), right.bfloat16().float()
            return product(left, right, **options)

        return run

    monkeypatch.setattr(Tensor, "__matmul__", rounding(Tensor.__matmul__))
    monkeypatch.setattr(torch, "bmm", rounding(torch.bmm))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    try:
        yield
        assert torch.get_float32_matmul_precision() == request.param  # a step leaves the user's setting alone
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("rounded_products")
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("method", ["direct", "ghost"])
def test_one_example_keeps_the_bound_where_products_are_rounded(method, clipping, tokens):
    """The gradients are as rough as the user allowed, but their clipped sum is not."""
    bound, model = 0.05, mlp()
    optimizer = make_private(model, batch_size=4, max_grad_norm=bound, clipping=clipping, norm_method=method, lr=0.0)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0].unsqueeze(1).repeat(1, tokens, 1)).sum(1), batch[1])

    for example in one_by_one(examples(8)):
        norm = float(flat(take_step(model, optimizer, example, loss)).norm())
        assert bound * (1 - 1e-4) < norm <= bound * (1 + 1e-7)
