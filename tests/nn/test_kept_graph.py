"""Two backward passes through one kept graph: an example's gradient is the sum of both, and is clipped as one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lora_dp import DPLinear, DPLoRALinear
from lora_dp.nn.layers import DPEmbedding, DPLayerNorm
from lora_dp.nn.per_example import NormMethod
from tests.grids import pairwise
from tests.support import assert_close, brute_force, make_private, private_gradients

N, T = 5, 4


def adapter(fan_in_fan_out: bool = False) -> nn.Module:
    layer = DPLoRALinear(6, 3, r=2, fan_in_fan_out=fan_in_fan_out)
    nn.init.normal_(layer.lora_B)
    return layer


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = DPEmbedding(7, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


def rows() -> Tensor:
    return torch.randn(N, T, 6)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "adapter": (adapter, rows),
    "adapter of a Conv1D": (lambda: adapter(fan_in_fan_out=True), rows),
    "linear": (lambda: DPLinear(6, 3, bias=False), rows),
    "Conv1D": (lambda: DPLinear(6, 3, bias=False, fan_in_fan_out=True), rows),
    "Conv1D and bias": (lambda: DPLinear(6, 3, fan_in_fan_out=True), rows),
    "bias": (lambda: DPLinear(6, 3), rows),
    "bias alone": (lambda: DPLinear(6, 3), rows),
    "affine": (lambda: DPLayerNorm(6), rows),
    "lookup": (Lookup, lambda: torch.randint(7, (N, T))),
}


@pytest.mark.parametrize(
    ("name", "method", "bound", "part"),
    pairwise(list(LAYERS), ["auto", "direct", "ghost"], [0.05, 1e6], [-1.0, -0.9, 0.5]),
)
def test_both_count_as_one_gradient(name: str, method: NormMethod, bound: float, part: float) -> None:
    """``part`` below 0: what the second pass brings all but cancels the first."""
    torch.manual_seed(0)
    make, inputs = LAYERS[name]
    layer, x = make().train(), inputs()
    if name == "bias alone":
        layer.weight.requires_grad_(False)
    trained = {key for key, p in layer.named_parameters() if p.requires_grad}

    def loss(model: nn.Module, example: Tensor) -> Tensor:
        return model(example).square().sum() / 2

    def both(model: nn.Module, example: Tensor) -> Tensor:
        return (1 + part) * loss(model, example)

    expected = brute_force(
        layer,
        both,
        [x[i : i + 1] for i in range(N)] if name == "lookup" else [x[i : i + 1].double() for i in range(N)],
        trained,
    )
    optimizer = make_private(layer, batch_size=N, max_grad_norm=bound, loss_reduction="sum", norm_method=method)
    optimizer.batch.expect(N)
    value = loss(layer, x)
    value.backward(retain_graph=True)
    (part * value).backward()
    optimizer.step()
    released = {key: N * value for key, value in private_gradients(layer).items()}
    whole = [sum(float(g.square().sum()) for g in each.values()) ** 0.5 for each in expected]
    alone = [norm / abs(1 + part) if part != -1 else 1.0 for norm in whole]
    for key in trained:
        summed = torch.stack(
            [
                min(1.0, bound / norm if norm > 1e-9 else 1.0) * each[key]
                for each, norm in zip(expected, whole, strict=True)
            ]
        ).sum(0)
        assert_close(released[key], summed, 1e-4, scale=sum(min(bound, norm) for norm in alone))
