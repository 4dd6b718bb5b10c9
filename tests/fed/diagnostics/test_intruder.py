"""Intruder dimensions: planted ones are found, and the adapted weight is the one that the model computes with."""

import pytest
import torch
from torch import nn

from lora_dp.fed.diagnostics.intruder import adapted_layers, intruder_dimensions, weight_and_update
from lora_dp.lora.config import LoRAConfig
from lora_dp.lora.injection import inject_lora
from lora_dp.lora.merging import merge_adapters
from lora_dp.nn.lora_linear import DPLoRALinear


def orthonormal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn)[0]


# W0 uses the first 12 of 20 left directions; the 13th is free for an intruder.
LEFT, RIGHT = orthonormal(20, 13), orthonormal(15, 13, seed=1)
VALUES = torch.arange(12, 0, -1, dtype=torch.float64)
WEIGHT = LEFT[:, :12] * VALUES @ RIGHT[:, :12].T


def planted(strength: float) -> torch.Tensor:
    """A new direction on both sides, so that the others stay singular vectors."""
    return strength * torch.outer(LEFT[:, 12], RIGHT[:, 12])


@pytest.mark.parametrize(("strength", "place"), [(100.0, 0), (10.5, 2), (3.5, 9)])
def test_a_planted_direction_is_found_at_its_rank(strength, place):
    found = intruder_dimensions(WEIGHT, planted(strength))
    assert found.indices == [place] and found.count == 1
    assert found.singular_values[place] == pytest.approx(strength)
    assert found.cosines[place] == pytest.approx(0, abs=1e-12)
    assert found.cosines[:place] + found.cosines[place + 1 :] == pytest.approx([1.0] * 9)


def test_only_the_strongest_are_looked_at():
    # The planted direction is the 11th of 13.
    assert intruder_dimensions(WEIGHT, planted(2.5)).indices == []
    assert intruder_dimensions(WEIGHT, planted(2.5), top=11).indices == [10]
    assert len(intruder_dimensions(WEIGHT, planted(2.5), top=99).cosines) == 13


@pytest.mark.parametrize("angle", [0.3, 1.0, 1.3])
def test_the_cosine_is_that_of_the_angle_and_its_sign_does_not_matter(angle):
    # One direction of W0 alone, turned by an angle towards a new one and flipped.
    turned = -(torch.cos(torch.tensor(angle)) * LEFT[:, 0] + torch.sin(torch.tensor(angle)) * LEFT[:, 12])
    weight, after = torch.outer(LEFT[:, 0], RIGHT[:, 0]), torch.outer(turned, RIGHT[:, 0])
    found = intruder_dimensions(weight, after - weight)
    cosine = torch.cos(torch.tensor(angle)).item()
    assert found.cosines == pytest.approx([cosine], rel=1e-6)
    assert found.indices == ([0] if cosine < 0.5 else [])
    assert intruder_dimensions(weight, after - weight, threshold=cosine - 1e-4).count == 0
    assert intruder_dimensions(weight, after - weight, threshold=cosine + 1e-4).count == 1


def test_by_the_definition_on_random_matrices():
    for seed, shape in enumerate([(30, 20), (20, 30), (16, 16)]):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(shape, generator=generator)
        update = 0.5 * torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, shape[1], generator=generator)
        found = intruder_dimensions(weight, update, threshold=0.6)
        # The left singular vectors are the eigenvectors of W·Wᵀ, the oracle here.
        rank = min(shape)
        before = torch.linalg.eigh(weight.double() @ weight.double().T)[1].flip(1)[:, :rank]
        after = weight.double() + update.double()
        strongest = torch.linalg.eigh(after @ after.T)[1].flip(1)[:, :10]
        cosines = [max(abs(float(u @ v)) for v in before.T) for u in strongest.T]
        assert found.cosines == pytest.approx(cosines, abs=1e-9)
        assert found.indices == [j for j, cosine in enumerate(cosines) if cosine < 0.6]


def test_nothing_new_without_an_update_and_everything_on_a_zero_weight():
    assert intruder_dimensions(WEIGHT, torch.zeros_like(WEIGHT)).cosines == pytest.approx([1.0] * 10)
    found = intruder_dimensions(torch.zeros_like(WEIGHT), planted(1.0))
    assert found.indices == [0] and found.cosines == [0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((WEIGHT, WEIGHT.T), "one shape"),
        ((WEIGHT[0], WEIGHT[0]), "one shape"),
        ((WEIGHT, WEIGHT, 0), "top must be at least 1"),
        ((WEIGHT, WEIGHT, 10, 1.5), "threshold from 0 to 1"),
        ((WEIGHT, WEIGHT * float("nan")), "not finite"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        intruder_dimensions(*arguments)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_weights_are_those_of_the_forward(transposed):
    torch.manual_seed(0)
    layer = DPLoRALinear(6, 5, r=2, alpha=6, fan_in_fan_out=transposed)
    nn.init.normal_(layer.lora_B)
    original = layer.weight.detach().clone()
    with torch.no_grad():
        # As a merging method leaves it: a moved weight, and what it was before.
        layer.weight += 0.1
        layer.original_weight = original
    before, change = weight_and_update(layer)
    x = torch.randn(4, 6)
    torch.testing.assert_close(x.double() @ (before + change).T + layer.bias, layer(x).double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(before.float(), original.T if transposed else original)
    assert before.shape == change.shape == (5, 6)


def test_a_merged_adapter_is_refused():
    model = inject_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules=["0"]))
    merge_adapters(model)
    with pytest.raises(ValueError, match="unmerge_adapters"):
        adapted_layers(model)
