"""The noise that an optimizer is told is the noise that it gets, whatever was done to it."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lora_dp import AdamBC, GaussianFilter, JamesStein, LaplacianFilter, PrivacyEngine, SpectralShrinkage
from tests.models import assert_refuses, examples, mlp, take_step
from tests.support import Z_LIMIT, make_private, private_gradients

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


@pytest.mark.parametrize("shrinkage", [JamesStein(), SpectralShrinkage()])
def test_shrinkage_is_refused_where_the_noise_must_be_known(shrinkage):
    private_with(torch.optim.AdamW, shrinkage=shrinkage)
    words = f"must know the noise, and what {shrinkage} leaves of it depends on the gradient: leave out one of them"
    for optimizer in (Listening, AdamBC):
        assert_refuses(ValueError, words, lambda optimizer=optimizer: private_with(optimizer, shrinkage=shrinkage))


@pytest.mark.parametrize("shrinkage", [JamesStein(), SpectralShrinkage()])
@pytest.mark.parametrize("options", [{}, {"low_pass": GaussianFilter(0.7)}, {"phases": "B", "regulate_noise": True}])
def test_shrinkage_is_given_the_noise_of_the_mean_and_comes_first(shrinkage, options):
    """Of the same release: shrunk, then brought back by the regulator, then filtered."""
    batch, found = examples(5), []
    for chosen in (None, shrinkage):
        model = mlp()
        optimizer = make_private(
            model, batch_size=5, noise_multiplier=0.1, max_grad_norm=0.4, shrinkage=chosen, **options
        )
        regulators, trained = optimizer.regulators, dict(model.named_parameters())
        take_step(model, optimizer, batch)
        found.append(private_gradients(model))
    plain, shrunk = found
    std = optimizer.mechanism.noise_std(sum(g.numel() for g in plain.values())) / 5
    assert std == pytest.approx(0.1 * 0.4 / 5, rel=1e-3)
    if "low_pass" in options:
        plain = private_without_filter(batch)
    for name, gradient in plain.items():
        regulator = regulators.get(id(trained[name]))
        white = gradient.double() if regulator is None else regulator.measured(gradient.double())
        expected = shrinkage(white, std)
        if regulator is not None:
            expected = regulator.restored(expected)
        if "low_pass" in options and "lora" in name:
            expected = options["low_pass"](expected)
        torch.testing.assert_close(shrunk[name].double(), expected, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(shrunk["0.lora_B"], found[0]["0.lora_B"], rtol=1e-2)


def private_without_filter(batch):
    model = mlp()
    take_step(model, make_private(model, batch_size=5, noise_multiplier=0.1, max_grad_norm=0.4), batch)
    return private_gradients(model)


def test_what_an_optimizer_refuses_is_refused_when_it_is_made_private():
    class Refuses(torch.optim.SGD):
        def set_noise_std(self, stds):
            raise ValueError("none wanted")

    assert_refuses(ValueError, "none wanted", lambda: private_with(Refuses))
