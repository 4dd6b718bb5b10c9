"""The noise that an optimizer is told is the noise that it gets, whatever was done to it."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lora_dp import GaussianFilter, LaplacianFilter, PrivacyEngine
from tests.models import assert_refuses, mlp
from tests.support import Z_LIMIT, make_private

STEPS = 300


class Listening(torch.optim.SGD):
    """Notes what it is told, and what it finds."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.seen = []

    def set_noise_std(self, stds):
        self.told = stds

    def step(self, closure=None):
        held = (p for group in self.param_groups for p in group["params"])
        self.seen.append([(p, self.told[p], p.grad.double()) for p in held if p.grad is not None])
        return super().step(closure)


def listening(model, **options):
    """A private optimizer whose wrapped one listens, and does not move anything."""
    optimizer = make_private(model, **options)
    optimizer.original_optimizer = Listening([p for p in model.parameters() if p.requires_grad], lr=0.0)
    return optimizer


def ratios(optimizer):
    """By shape of the parameter: the found noise's squares over what was told, (steps, *shape)."""
    for _ in range(STEPS):
        optimizer.step_on_empty_batch()
    found = {}
    for step in optimizer.original_optimizer.seen:
        for p, std, gradient in step:
            found.setdefault(tuple(p.shape), []).append((gradient / std).square())
    return {shape: torch.stack(squares) for shape, squares in found.items()}


def check_mean(squares):
    """Their mean is 1: a z-test for independent normals."""
    z = (float(squares.mean()) - 1) * (squares.numel() / 2) ** 0.5
    assert abs(z) < Z_LIMIT, f"{float(squares.mean()) ** 0.5:.4f} of the noise that was told"


FACTORS = {(2, 6), (8, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
@pytest.mark.parametrize("batch_size, bound, sigma", [(1, 1.0, 1.0), (7, 1.0, 0.5), (4, 0.02, 3.0)])
def test_it_is_sigma_times_the_bound_over_the_batch_size(batch_size, bound, sigma, clipping):
    options = {"batch_size": batch_size, "max_grad_norm": bound, "noise_multiplier": sigma, "clipping": clipping}
    found = ratios(listening(mlp(), **options))
    assert found.keys() == FACTORS | {(3, 8), (3,)}
    for squares in found.values():
        check_mean(squares)


@pytest.mark.slow
@pytest.mark.parametrize("low_pass", [GaussianFilter(0.8), LaplacianFilter(1.5)])
def test_a_filter_leaves_its_share_on_factors_alone(low_pass):
    found = ratios(listening(mlp(), batch_size=4, noise_multiplier=0.8, low_pass=low_pass))
    for shape, squares in found.items():
        if shape in FACTORS:
            # Neighbours agree, which leaves fewer independent numbers: the steps are.
            each = squares.flatten(1).mean(dim=1)
            assert abs(float(each.mean()) - 1) < Z_LIMIT * float(each.std()) / STEPS**0.5
            assert float(each.std()) < 1
        else:
            check_mean(squares)


@pytest.mark.slow
@pytest.mark.parametrize("phases", ["BA", "A"])
def test_regulated_noise_is_told_column_by_column(phases):
    """Rows of A, columns of B: each has its own."""
    model = mlp()
    with torch.no_grad():
        model[0].lora_B[:, 0] *= 20
        model[0].lora_A[0] *= 20
    optimizer = listening(model, batch_size=4, noise_multiplier=0.8, phases=phases, regulate_noise=True)
    found = ratios(optimizer)
    for shape in FACTORS & found.keys():
        by_rank = found[shape].movedim(1 if shape == (2, 6) else 2, 0)
        for squares in by_rank:
            check_mean(squares)
    told = {tuple(p.shape): std for step in optimizer.original_optimizer.seen for p, std, _ in step}
    assert told[(2, 6)].shape == (2, 1) and float(told[(2, 6)].max() / told[(2, 6)].min()) > 2
    if phases == "BA":
        assert told[(8, 2)].shape == (2,)


def test_without_noise_it_is_told_that_there_is_none():
    model = mlp()
    optimizer = listening(model, batch_size=4)
    optimizer.step_on_empty_batch()
    assert set(optimizer.original_optimizer.told.values()) == {0.0}


def test_what_is_frozen_meanwhile_is_not_told():
    model = mlp()
    optimizer = listening(model, batch_size=4, noise_multiplier=1.0)
    model[2].requires_grad_(False)
    optimizer.step_on_empty_batch()
    assert set(optimizer.original_optimizer.told) == {model[0].lora_A, model[0].lora_B}


def private_with(optimizer_class, **options):
    """make_private over such an optimizer."""
    model = mlp()
    PrivacyEngine("rdp", reproducible_seed=0).make_private(
        model=model,
        optimizer=optimizer_class([p for p in model.parameters() if p.requires_grad]),
        data_loader=DataLoader(TensorDataset(torch.zeros(4)), batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        **options,
    )


def test_a_filter_after_a_regulator_is_refused_where_the_noise_must_be_known():
    options = {"regulate_noise": True, "low_pass": GaussianFilter(0.5), "phases": "BA"}
    private_with(torch.optim.SGD, **options)
    assert_refuses(
        ValueError, "Listening must know the noise of each entry", lambda: private_with(Listening, **options)
    )


def test_what_an_optimizer_refuses_is_refused_when_it_is_made_private():
    class Refuses(torch.optim.SGD):
        def set_noise_std(self, stds):
            raise ValueError("none wanted")

    assert_refuses(ValueError, "none wanted", lambda: private_with(Refuses))
