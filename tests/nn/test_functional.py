"""The functions under the layers: values and derivatives of the formula in every dtype, and what their graphs keep."""

import gc

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tests.models import mlp
from tests.nn.lora_layers import TOLERANCE, adapted, by_hand, close
from tests.support import make_private

SHAPES = [(7,), (3, 7), (3, 4, 7), (2, 3, 4, 7), (0, 7), (3, 0, 7)]


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_of_any_shape_and_dtype(shape, dtype, fan_in_fan_out):
    layer = adapted(dtype, fan_in_fan_out=fan_in_fan_out)
    x = torch.randn(shape, dtype=dtype)
    out = layer(x)
    assert out.dtype == dtype
    assert close(out, by_hand(layer.double(), x.double()), dtype)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 4, 7)])
def test_gradients_are_those_of_the_formula(shape):
    layer, x = adapted(torch.float64), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    wanted = [x, layer.lora_A, layer.lora_B]
    actual = torch.autograd.grad(layer(x).tanh().sum(), wanted)
    for left, right in zip(actual, torch.autograd.grad(by_hand(layer, x).tanh().sum(), wanted), strict=True):
        assert close(left, right, torch.float64)
        assert right.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision(dtype):
    """Float32 gradients for float32 factors; products are rounded, so errors are relative to the terms summed."""
    layer, x = adapted(dtype), torch.randn(6, 7, dtype=dtype)
    weights = torch.linspace(-1, 1, 5, dtype=dtype)
    (layer(x) * weights).sum().backward()
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32
    actual = layer.lora_A.grad.double(), layer.lora_B.grad.double()
    layer, x, g = layer.double(), x.double(), weights.double().expand(6, 5)
    expected = torch.autograd.grad((by_hand(layer, x) * g).sum(), [layer.lora_A, layer.lora_B])
    with torch.no_grad():
        terms = ((g.abs() @ layer.lora_B.abs()).t() @ x.abs(), g.abs().t() @ (x.abs() @ layer.lora_A.abs().t()))
    for left, right, sizes in zip(actual, expected, terms, strict=True):
        assert (left - right).abs().le(TOLERANCE[dtype] / 2 * layer.scaling * sizes).all()


def test_first_and_second_derivatives():
    layer = adapted(torch.float64)

    def forward(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))

    inputs = tuple(
        t.detach().clone().requires_grad_()
        for t in (torch.randn(2, 3, 7, dtype=torch.float64), layer.lora_A, layer.lora_B)
    )
    assert gradcheck(forward, inputs)
    assert gradgradcheck(forward, inputs)


def test_autocast():
    layer, x = adapted(), torch.randn(3, 4, 7)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        assert out.dtype == torch.bfloat16
    out.float().tanh().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32
    assert close(out, by_hand(layer, x), torch.bfloat16)
    expected = torch.autograd.grad(by_hand(layer, x).tanh().sum(), [layer.lora_A, layer.lora_B])
    for left, right in zip((layer.lora_A.grad, layer.lora_B.grad), expected, strict=True):
        assert close(left, right, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("private", [False, True])
def test_no_grad_leaves_no_graph_and_no_tensor_but_the_output(private):
    model = mlp()
    optimizer = make_private(model, batch_size=4) if private else None
    x = torch.randn(4, 6)

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    with torch.no_grad():
        model(x)
        before = alive()
        out = model(x)
        after = alive()
    assert out.grad_fn is None
    assert after == before + 1
    if optimizer is not None:
        assert optimizer._recorder.current is None and not optimizer._recorder.superseded
