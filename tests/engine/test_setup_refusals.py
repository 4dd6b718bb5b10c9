"""Refusals at set-up: one sentence with the remedy."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

from lora_dp import PrivacyEngine
from tests.models import assert_refuses, cross_entropy, examples, loader_of, mlp, seeded
from tests.support import make_private, private_gradients


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield torch.zeros(6)


class NoLength(Dataset):
    def __getitem__(self, index: int) -> Tensor:
        return torch.zeros(6)


def make(model: nn.Module | None = None, loader: Any = None, **options: Any) -> Any:
    model = mlp() if model is None else model
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **options}
    method = "make_private"
    if "target_epsilon" in options:
        options.pop("noise_multiplier")
        method = "make_private_with_epsilon"
    return getattr(seeded(), method)(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        data_loader=loader_of(20, 4) if loader is None else loader,
        **options,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier must be"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"noise_multiplier": math.inf}, "noise_multiplier must be"),
        ({"max_grad_norm": 0.0}, "1.0 is a usual start"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be above 0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm"),
        ({"max_grad_norm": math.inf}, "set a finite max_grad_norm"),
        ({"max_grad_norm": math.inf, "noise_multiplier": 0.0, "clipping": "per_layer"}, "use clipping='flat'"),
        ({"max_grad_norm": math.inf, "noise_multiplier": 0.0, "clipping": "automatic"}, "use clipping='flat'"),
        ({"clipping": "layers"}, "choose one of flat, per_layer, automatic"),
        ({"phases": "C"}, "choose one of B, A, AB, BA"),
        ({"loss_reduction": "none"}, "choose 'mean' or 'sum'"),
        ({"norm_method": "fast"}, "'auto', 'direct' or 'ghost'"),
        ({"target_epsilon": 1.0, "target_delta": 0.5, "steps": 3}, "promises nothing to one of 20 examples"),
        ({"target_epsilon": 0.0, "target_delta": 1e-5, "steps": 3}, "epsilon must be a positive"),
        ({"target_epsilon": -1.0, "target_delta": 1e-5, "steps": 3}, "epsilon must be a positive"),
        ({"target_epsilon": math.inf, "target_delta": 1e-5, "steps": 3}, "epsilon must be a positive"),
        ({"target_epsilon": math.nan, "target_delta": 1e-5, "steps": 3}, "epsilon must be a positive"),
        ({"target_epsilon": 1.0, "target_delta": 0.0, "steps": 3}, "strictly between 0 and 1"),
        ({"target_epsilon": 1.0, "target_delta": 1.0, "steps": 3}, "strictly between 0 and 1"),
        ({"target_epsilon": 1.0, "target_delta": math.nan, "steps": 3}, "strictly between 0 and 1"),
        ({"target_epsilon": 1.0, "target_delta": 1e-5}, "either as epochs or as steps"),
        ({"target_epsilon": 1.0, "target_delta": 1e-5, "steps": 3, "epochs": 1}, "either as epochs or as steps"),
        ({"target_epsilon": 1.0, "target_delta": 1e-5, "steps": 0}, "at least one step, got 0"),
        ({"target_epsilon": 1.0, "target_delta": 1e-5, "epochs": 0}, "at least one step, got 0"),
    ],
)
def test_bad_options_are_refused(options, words):
    assert_refuses(ValueError, words, lambda: make(**options))


@pytest.mark.parametrize(
    ("loader", "error", "words"),
    [
        (lambda: DataLoader(TensorDataset(torch.zeros(0, 6)), batch_size=4), ValueError, "The data set is empty"),
        (lambda: DataLoader(Stream(), batch_size=4), TypeError, "use a map-style one"),
        (lambda: DataLoader(NoLength(), batch_size=4, sampler=[0, 1]), TypeError, "use a map-style one"),
        (lambda: loader_of(20, 21), ValueError, "choose at most 20"),
        (lambda: DataLoader(loader_of(20, 4).dataset, batch_size=None), ValueError, "Give a loader with a batch_size"),
        (lambda: loader_of(20, 4, sampler=WeightedRandomSampler([1.0] * 20, 20)), ValueError, "no sampler of its own"),
        (lambda: DataLoader(loader_of(20, 4).dataset, batch_sampler=[[0], [1]]), ValueError, "no sampler of its own"),
    ],
)
def test_bad_loaders_are_refused(loader, error, words):
    assert_refuses(error, words, lambda: make(loader=loader()))
    assert_refuses(error, words, lambda: make(loader=loader(), target_epsilon=1.0, target_delta=1e-5, steps=3))


def test_unknown_accountant_is_refused():
    assert_refuses(ValueError, "choose 'pld' or 'rdp'", lambda: PrivacyEngine("prv"))


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, math.nan])
def test_epsilon_of_a_wrong_delta_is_refused(delta):
    assert_refuses(ValueError, "strictly between 0 and 1", lambda: seeded().get_epsilon(delta))


def test_optimizers_that_cannot_be_private_are_refused():
    model = mlp()
    trained = [p for p in model.parameters() if p.requires_grad]
    options = {"model": model, "data_loader": loader_of(20, 4), "noise_multiplier": 1.0, "max_grad_norm": 1.0}
    assert_refuses(
        TypeError,
        "LBFGS cannot be made private",
        lambda: seeded().make_private(optimizer=torch.optim.LBFGS(trained), **options),
    )
    private = make(model=model)[1]
    assert_refuses(TypeError, "not yet a private one", lambda: seeded().make_private(optimizer=private, **options))


def test_refusal_leaves_the_model_as_it_was():
    model = mlp()
    assert_refuses(ValueError, "", lambda: make(model=model, phases="C"))
    stranger = torch.optim.SGD([nn.Parameter(torch.zeros(2, 9))], lr=0.1)
    assert_refuses(
        ValueError,
        "shape (2, 9)",
        lambda: seeded().make_private(
            model=model, optimizer=stranger, data_loader=loader_of(20, 4), noise_multiplier=1.0, max_grad_norm=1.0
        ),
    )
    cross_entropy(model, examples(4)).backward()
    assert set(private_gradients(model)) == {"0.lora_A", "0.lora_B", "2.weight", "2.bias"}


def test_model_called_without_a_tensor_is_refused():
    model = mlp()
    make_private(model, batch_size=4)
    assert_refuses(ValueError, "called without a tensor", lambda: model([[1.0] * 6]))
