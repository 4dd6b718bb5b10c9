"""PRISM's layer: coordinates in an orthonormal basis of the tangent space at a product of low rank."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_dp.nn.lora_tangent_linear import DPLoRATangentLinear, check_tangent_point, unit_columns
from tests.models import assert_refuses
from tests.nn.lora_layers import close
from tests.support import make_private

D_OUT, D_IN, R = 5, 7, 2


def moved(dtype=torch.float32, coordinates=True, rank=R, **options):
    """A layer at U Σ Vᵀ of that rank, and beside it if it has coordinates."""
    torch.manual_seed(0)
    layer = DPLoRATangentLinear(D_IN, D_OUT, r=R, alpha=3, dtype=dtype, **options)
    with torch.no_grad():
        nn.init.orthogonal_(layer.lora_B).mul_(torch.tensor([1.0, 0.5]) * (torch.arange(R) < rank))
    for parameter in (layer.lora_dA, layer.lora_dB) if coordinates else ():
        nn.init.normal_(parameter, std=0.2)
    return layer


def tangent_projection(layer, matrix):
    """P_U G + G P_V − P_U G P_V, from torch's own singular vectors."""
    u, s, vh = torch.linalg.svd((layer.lora_B @ layer.lora_A).detach())
    rank = int((s > 1e-9).sum())
    left, right = u[:, :rank] @ u[:, :rank].t(), vh[:rank].t() @ vh[:rank]
    return left @ matrix + matrix @ right - left @ matrix @ right


def motion(layer, dA, dB):
    across = torch.eye(D_IN).double() - layer.lora_A.t() @ layer.lora_A
    return (dB @ layer.lora_A + unit_columns(layer.lora_B) @ dA @ across).detach()


def test_a_new_layer_trains_the_coordinates_alone_and_adds_nothing():
    plain = nn.Linear(D_IN, D_OUT)
    layer = DPLoRATangentLinear.from_linear(plain, r=3)
    assert layer.weight is plain.weight
    trained = {name: tuple(p.shape) for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"lora_dA": (3, D_IN), "lora_dB": (D_OUT, 3)}
    assert close(layer.lora_A @ layer.lora_A.t(), torch.eye(3), torch.float32)
    x = torch.randn(4, D_IN)
    assert torch.equal(layer(x), plain(x)) and not layer.lora_B.any()


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forward_and_merge(dtype, fan_in_fan_out):
    layer, x = moved(dtype, fan_in_fan_out=fan_in_fan_out), torch.randn(3, 4, D_IN, dtype=dtype)
    assert layer.lora_dA.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    before, frozen = layer(x), layer.weight.detach().clone()
    plain = (frozen.t() if fan_in_fan_out else frozen).double()
    wide = moved(torch.float64)
    update = wide.lora_B @ wide.lora_A + motion(wide, layer.lora_dA.double(), layer.lora_dB.double())
    if dtype == torch.float64:  # other dtypes draw other numbers
        assert close(before, F.linear(x, plain + 1.5 * update, layer.bias), dtype)
    b, a = layer.factors()
    assert before.dtype == dtype and b.shape[1] == 2 * R
    assert close(before, F.linear(x.double(), plain + 1.5 * b.double() @ a.double(), layer.bias.double()), dtype)
    assert not close(before, F.linear(x.double(), plain, layer.bias.double()), dtype)
    layer.merge()
    assert close(layer(x), before, dtype) and list(layer.state_dict()) == ["weight", "bias"]
    layer.unmerge()
    assert close(layer.weight, frozen, dtype) and close(layer(x), before, dtype)


def test_dropout_is_on_the_adapter_input_alone():
    layer, x = moved(dropout=0.5), torch.ones(200, D_IN)
    base = F.linear(x, layer.weight, layer.bias)
    torch.manual_seed(1)
    update = layer(x) - base
    torch.manual_seed(1)
    b, a = layer.factors()
    assert close(update, layer.scaling * F.dropout(x, 0.5) @ a.t() @ b.t(), torch.float32)


@pytest.mark.parametrize("coordinates", [False, True])
@pytest.mark.parametrize("rank", [R, 1])
def test_an_example_s_gradient_has_the_length_of_its_tangent(coordinates, rank):
    """Of s · G, projected; where a direction of U is missing, of what is left of it."""
    layer, weight = moved(torch.float64, coordinates, rank), torch.nn.Parameter(torch.zeros(D_OUT, D_IN).double())
    x, y = torch.randn(6, D_IN).double(), torch.randn(6, D_OUT).double()
    (layer(x) * y).sum().backward()
    (F.linear(x, weight) * y).sum().backward()
    whole = layer.scaling * tangent_projection(layer, weight.grad)
    if rank < R:  # V has rows beside the product's own
        rest = layer.lora_A[rank:]
        outside = weight.grad - (lambda u: u @ u.t() @ weight.grad)(unit_columns(layer.lora_B))
        whole = whole + layer.scaling * outside @ rest.t() @ rest
    gradient = motion(layer, layer.lora_dA.grad, layer.lora_dB.grad)
    torch.testing.assert_close(gradient, whole.detach(), rtol=0, atol=1e-12)
    squares = float(layer.lora_dA.grad.square().sum() + layer.lora_dB.grad.square().sum())
    assert squares**0.5 == pytest.approx(float(whole.norm()), rel=1e-12)


def test_one_factor_clips_the_tangent_of_each_example():
    """Against every example's own weight gradient, projected and clipped as a matrix."""
    layer = moved(torch.float64, coordinates=False)
    layer.bias = None
    model, bound = nn.Sequential(layer), 0.7
    x, y = (
        torch.randn(6, 3, D_IN).double() * torch.logspace(-2, 1, 6).double()[:, None, None],
        torch.randn(D_OUT).double(),
    )
    tangents = [layer.scaling * tangent_projection(layer, y.outer(one.sum(0))) for one in x]
    norms = [float(tangent.norm()) for tangent in tangents]
    assert min(norms) < bound < max(norms)
    expected = sum(min(1.0, bound / norm) * tangent for norm, tangent in zip(norms, tangents, strict=True)) / 6
    optimizer = make_private(model, batch_size=6, max_grad_norm=bound, lr=0.0, loss_reduction="sum")
    optimizer.batch.expect(6)
    (model(x) * y).sum().backward()
    optimizer.step()
    found = motion(layer, layer.lora_dA.grad, layer.lora_dB.grad)
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-6 * bound)  # clipped a little below the bound


def test_noise_on_the_coordinates_is_isotropic_in_the_tangent_space():
    """Its covariance is J·Jᵀ: the projection onto the r(d_out + d_in − r) directions of the space."""
    layer = moved(torch.float64, coordinates=False)
    basis = torch.eye(R * (D_IN + D_OUT)).double()
    columns = [motion(layer, z[: R * D_IN].view(R, D_IN), z[R * D_IN :].view(D_OUT, R)).flatten() for z in basis]
    covariance = torch.stack(columns, 1) @ torch.stack(columns, 1).t()
    units = torch.eye(D_OUT * D_IN).double()
    expected = torch.stack([tangent_projection(layer, unit.view(D_OUT, D_IN)).flatten() for unit in units], 1)
    torch.testing.assert_close(covariance, expected, rtol=0, atol=1e-12)
    assert float(covariance.trace()) == pytest.approx(R * (D_OUT + D_IN - R))


def test_nothing_hangs_on_the_order_and_signs_of_the_factors():
    layer, other = (moved(torch.float64, coordinates=False) for _ in range(2))
    with torch.no_grad():
        turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]]).double()
        other.lora_A.copy_(turn @ layer.lora_A)
        other.lora_B.copy_(layer.lora_B @ turn.t())
    x, y = torch.randn(6, D_IN).double(), torch.randn(6, D_OUT).double()
    for one in (layer, other):
        (one(x) * y).sum().backward()
    found = [motion(one, one.lora_dA.grad, one.lora_dB.grad) for one in (layer, other)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
    assert not torch.allclose(layer.lora_dA.grad, other.lora_dA.grad)


@pytest.mark.parametrize(
    ("lora_A", "lora_B", "fits"),
    [
        (torch.eye(2, 6), torch.zeros(4, 2), True),
        (torch.eye(2, 6), 9 * torch.eye(4, 2), True),
        (2 * torch.eye(2, 6), torch.zeros(4, 2), False),
        (torch.eye(2, 6), torch.ones(4, 2), False),
        (torch.ones(2, 6) / 6**0.5, torch.zeros(4, 2), False),
    ],
)
def test_which_factors_have_a_tangent_space(lora_A, lora_B, fits):
    if fits:
        check_tangent_point(lora_A, lora_B)
        return
    with pytest.raises(ValueError, match="not orthogonal, as plain LoRA's are not: load them onto the plain model"):
        check_tangent_point(lora_A, lora_B)


def test_a_change_of_rank_keeps_the_parameters():
    layer = moved()
    parameters = dict(layer.named_parameters())
    layer.set_rank(3, alpha=6)
    assert all(layer.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert layer.lora_dA.shape == (3, D_IN) and layer.lora_dB.shape == (D_OUT, 3) and layer.scaling == 2.0


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
def test_what_is_frozen_must_stay_so(name):
    layer = moved()
    getattr(layer, name).requires_grad_(True)
    with pytest.raises(ValueError, match=f"'0.{name}' is .* an adapter but requires grad: freeze it"):
        make_private(nn.Sequential(layer), batch_size=2)


def test_a_merged_adapter_is_not_trained():
    model = nn.Sequential(moved())
    make_private(model, batch_size=2)
    model[0].merge()
    assert_refuses(RuntimeError, "A merged adapter cannot be trained", lambda: model(torch.ones(2, D_IN)))
