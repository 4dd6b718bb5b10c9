"""Sharpness against the whole Hessian in float64, and a model that is left as it was."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_dp.fed.diagnostics.sharpness import LossCurves, loss_curves, top_eigenvalue
from lora_dp.fed.models.loading import load_model
from lora_dp.fed.models.options import ModelConfig
from lora_dp.lora.config import LoRAConfig
from lora_dp.lora.injection import inject_lora


def small_model() -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    model = inject_lora(plain, LoRAConfig(r=2, alpha=3, target_modules=["0"], trainable_modules=["3"]))
    nn.init.normal_(model[0].lora_B)
    return model


def small_batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (11,), generator=generator)
    return [{"pixel_values": x[:4], "labels": y[:4]}, {"pixel_values": x[4:], "labels": y[4:]}]


def written_out(model: nn.Module) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """The plain weights that the small model computes with, and all its data: no private layer, no dropout."""
    layer, head = model[0], model[3]
    tensors = {
        "weight": (layer.weight + 1.5 * layer.lora_B @ layer.lora_A).detach(),
        "bias": layer.bias.detach(),
        "head": head.weight.detach(),
        "head_bias": head.bias.detach(),
    }
    x, y = (torch.cat([batch[name] for batch in small_batches()]) for name in ("pixel_values", "labels"))
    return tensors, x, y


def loss_of(tensors: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    hidden = torch.tanh(x @ tensors["weight"].T + tensors["bias"])
    return F.cross_entropy(hidden @ tensors["head"].T + tensors["head_bias"], y)


def whole_hessian(f, tensors: list[torch.Tensor]) -> torch.Tensor:
    sizes = [tensor.numel() for tensor in tensors]
    shapes = [tensor.shape for tensor in tensors]
    return torch.autograd.functional.hessian(
        lambda flat: f(*[part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]),
        torch.cat([tensor.flatten() for tensor in tensors]),
    )


def test_the_top_eigenvalue_is_that_of_the_whole_hessian_of_the_adapted_weights():
    model = small_model()
    tensors, x, y = written_out(model)
    hessian = whole_hessian(
        lambda weight, head, bias: loss_of({**tensors, "weight": weight, "head": head, "head_bias": bias}, x, y),
        [tensors["weight"], tensors["head"], tensors["head_bias"]],
    )
    values = torch.linalg.eigvalsh(hessian)
    assert top_eigenvalue(model, small_batches()) == pytest.approx(float(values[-1]), rel=2e-3)
    # Not the largest in absolute value by accident: the smallest is negative here.
    assert values[0] < 0


def test_the_top_eigenvalue_of_factors():
    model = small_model()
    layer = model[0]
    tensors, x, y = written_out(model)
    hessian = whole_hessian(
        lambda a, b, head, bias: loss_of(
            {**tensors, "weight": layer.weight + 1.5 * b @ a, "head": head, "head_bias": bias}, x, y
        ),
        [layer.lora_A.detach(), layer.lora_B.detach(), tensors["head"], tensors["head_bias"]],
    )
    expected = float(torch.linalg.eigvalsh(hessian)[-1])
    assert top_eigenvalue(model, small_batches(), space="factors") == pytest.approx(expected, rel=2e-3)


def test_weights_do_not_care_how_a_product_is_split_but_factors_do():
    model, rescaled = small_model(), small_model()
    with torch.no_grad():
        rescaled[0].lora_A /= 20
        rescaled[0].lora_B *= 20
    for measure in (top_eigenvalue, lambda *a, **k: loss_curves(*a, **k).rise):
        here, there = measure(model, small_batches()), measure(rescaled, small_batches())
        assert here == pytest.approx(there, rel=1e-6)
    here, there = (top_eigenvalue(m, small_batches(), space="factors") for m in (model, rescaled))
    assert there > 2 * here


@pytest.mark.parametrize("transposed", [False, True])
def test_loss_curves_are_the_loss_at_filter_normalised_moves(transposed):
    model = small_model()
    if transposed:
        model[0].weight.data = model[0].weight.data.T.contiguous()
        model[0].fan_in_fan_out = True
    curves = loss_curves(model, small_batches(), directions=2, points=5, reach=0.8, seed=3)
    assert curves.alpha == pytest.approx([-0.8, -0.4, 0.0, 0.4, 0.8])
    tensors, x, y = written_out(small_model())
    generator = torch.Generator().manual_seed(3)
    for losses in curves.losses:
        shape = (5, 6) if transposed else (6, 5)
        first = torch.randn(shape, generator=generator, dtype=torch.float64)
        drawn = {"weight": first.T if transposed else first}
        drawn["head"] = torch.randn(3, 6, generator=generator, dtype=torch.float64)
        for name in drawn:
            for row, filter_ in zip(drawn[name], tensors[name], strict=True):
                row *= math.sqrt(float((filter_**2).sum())) / math.sqrt(float((row**2).sum()))
        expected = [
            float(loss_of({**tensors, **{n: tensors[n] + a * d for n, d in drawn.items()}}, x, y)) for a in curves.alpha
        ]
        assert losses == pytest.approx(expected, rel=1e-9)
    assert curves.losses[0] != curves.losses[1]


def test_mean_and_rise():
    curves = LossCurves([-1.0, 0.0, 1.0], [[3.0, 1.0, 2.0], [5.0, 1.0, 4.0]])
    assert curves.mean == [4.0, 1.0, 3.0] and curves.rise == 2.5


def test_seeds_repeat():
    model = small_model()
    one, same, other = (loss_curves(model, small_batches(), points=3, seed=seed) for seed in (0, 0, 1))
    assert one == same and one != other


@pytest.mark.parametrize("options", [{"directions": 0}, {"points": 4}, {"points": 1}, {"reach": 0.0}])
def test_wrong_numbers_are_refused(options):
    with pytest.raises(ValueError, match="odd number of points"):
        loss_curves(small_model(), small_batches(), **options)


def test_a_loss_that_is_not_finite_has_no_eigenvalue():
    model = small_model()
    with torch.no_grad():
        model[3].weight.fill_(float("nan"))
    assert top_eigenvalue(model, small_batches()) is None


def snapshot(model: nn.Module) -> list:
    tensors = [*model.parameters(), *model.buffers()]
    return [
        [tensor.detach().numpy().tobytes() for tensor in tensors],
        [id(tensor) for tensor in tensors],
        [tensor.requires_grad for tensor in tensors],
        [module.training for module in model.modules()],
        [None if p.grad is None else p.grad.numpy().tobytes() for p in model.parameters()],
        torch.get_rng_state().numpy().tobytes(),
        np.random.get_state()[1].tobytes(),
    ]


@pytest.mark.slow
def test_a_transformer_is_left_as_it_was_and_its_attention_has_a_second_derivative():
    model = load_model(ModelConfig(dropout=0.3), 10, "image").model
    model.blocks[1].eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    x = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    batches = [{"pixel_values": x, "labels": torch.arange(4)}]
    before = snapshot(model)
    assert top_eigenvalue(model, batches) > 0
    assert math.isfinite(loss_curves(model, batches, directions=1, points=3).rise)
    assert snapshot(model) == before


@pytest.mark.parametrize("measure", [top_eigenvalue, loss_curves])
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(measure):
    model = small_model()
    before = snapshot(model)
    batches = small_batches()
    batches[1] = {"pixel_values": batches[1]["pixel_values"], "labels": torch.full((7,), 99)}
    with pytest.raises((IndexError, RuntimeError)):
        measure(model, batches)
    assert snapshot(model) == before
