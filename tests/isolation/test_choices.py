"""What is decided for all examples of a batch together: by one of them, or by what most have in common."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_dp.engine.hooks
from lora_dp import DPLinear, IsolationError
from lora_dp.isolation.batches.calls import beside_noise
from lora_dp.isolation.check import check_isolation
from lora_dp.losses import classification_loss
from tests.models import assert_refuses, mlp
from tests.support import make_private

N, T = 12, 24


class Missing(nn.Module):
    """Has a layer for examples with missing values, for all of the batch or for these alone."""

    def __init__(self, way: str):
        super().__init__()
        torch.manual_seed(0)
        self.way, self.inner, self.extra, self.head = way, DPLinear(6, 8), DPLinear(8, 8), DPLinear(8, 3)
        if "zero" in way:
            nn.init.zeros_(self.extra.weight)
            nn.init.zeros_(self.extra.bias)

    def forward(self, x: Tensor) -> Tensor:
        missing = x.isnan()
        hidden = self.inner(x.nan_to_num()).tanh()
        if bool(missing.any()) == ("without" not in self.way):
            extra = hidden + self.extra(hidden)
            hidden = torch.where(missing.any(1, keepdim=True), extra, hidden) if "own" in self.way else extra
        return self.head(hidden)


def values(n: int, missing: bool = False) -> Tensor:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(n))
    if missing:
        x[1, 2] = torch.nan
    return x


def train(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    optimizer.zero_grad()
    optimizer.batch.expect(len(x))
    optimizer.backward(classification_loss(model(x), torch.arange(len(x)) % 3))
    optimizer.step()


@pytest.mark.parametrize(
    ("way", "n"),
    [("all", 3), ("all", 12), ("all, without", 3), ("all, without", 12), ("all, zero", 3), ("all, zero, without", 3)],
)
def test_a_layer_that_one_example_calls_or_leaves_out_for_all_is_refused(way: str, n: int, none_drawn: None) -> None:
    model = Missing(way).train()
    optimizer = make_private(model, batch_size=n)
    for size in (n, n, n + 1):
        train(model, optimizer, values(size))
    with pytest.raises(IsolationError):
        train(model, optimizer, values(n, missing=True))


@pytest.mark.parametrize("n", [3, 12])
@pytest.mark.parametrize("way", ["own", "own, zero"])
def test_a_layer_that_is_called_for_its_own_examples_is_taken(way: str, n: int, none_drawn: None) -> None:
    model = Missing(way).train()
    optimizer = make_private(model, batch_size=n)
    for missing in (False, True, False, True):
        train(model, optimizer, values(n, missing))


def test_which_layers_are_called_is_tried_once(monkeypatch: pytest.MonkeyPatch, none_drawn: None) -> None:
    tried: list[int] = []
    check = lora_dp.engine.hooks.check_isolation

    def counted(*args: Any, **options: Any) -> Any:
        tried.append(args[3])
        return check(*args, **options)

    monkeypatch.setattr(lora_dp.engine.hooks, "check_isolation", counted)
    model = Missing("own").train()
    optimizer = make_private(model, batch_size=N)
    for missing in (False, False, True, True, False, True):
        train(model, optimizer, values(N, missing))
    assert tried == [N, N]


class Frequencies(nn.Module):
    """Keeps the frequencies of series that are strongest in the mean over the batch, as TimesNet does, or in each."""

    def __init__(self, together: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.together, self.head = together, DPLinear(T, 3)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        spectrum = torch.fft.rfft(x, dim=1)
        strength = spectrum.abs()
        if self.together:
            strength = strength.mean(0, keepdim=True).expand_as(strength)
        kept = torch.zeros_like(strength).scatter(1, strength.topk(1, dim=1).indices, 1.0)
        return self.head(torch.fft.irfft(spectrum * kept, n=T, dim=1))


def alike(n: int) -> Tensor:
    """Series of one period."""
    return torch.sin(torch.arange(T) * torch.pi / 6 + torch.linspace(0, 1, n).unsqueeze(1))


def test_a_choice_that_all_make_together_is_refused_though_all_are_alike() -> None:
    for _ in range(5):  # the noise may choose the same: 1 in 13
        try:
            check_isolation(Frequencies().train(), (alike(N),), {}, N)
        except IsolationError as error:
            assert "changes where the others are noise" in str(error)
            break
    else:
        pytest.fail("the choice was not seen")
    check_isolation(Frequencies(together=False).train(), (alike(N),), {}, N)


class Scored(Frequencies):
    """One of its scores, beside one that stands for nothing, is left out where the batch is loud."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        scores = self.head(x).masked_fill(torch.tensor([False, False, True]), -1e9)
        return scores.masked_fill(torch.tensor([False, bool(x.square().mean() > 3), False]), 0.0)


def test_so_is_one_that_shows_in_the_outputs_alone() -> None:
    assert_refuses(
        IsolationError,
        "The output of an example changes where the others are noise",
        lambda: check_isolation(Scored().train(), (alike(N),), {}, N),
    )


class Loud(Frequencies):
    """A layer whose weights are 0 is given something else where the batch is loud."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.head(-x if bool(x.square().mean() > 3) else x)


def test_so_is_one_that_shows_in_what_a_layer_is_given_alone() -> None:
    model = Loud().train()
    nn.init.zeros_(model.head.weight)
    assert_refuses(
        IsolationError,
        "The input of 'head' of an example changes where the others are noise",
        lambda: check_isolation(model, (alike(N),), {}, N),
    )


def test_noise_stands_beside_the_first_example() -> None:
    x, mask, labels = alike(4).to(torch.bfloat16), torch.ones(4, T), torch.arange(4)
    x[1, 0], mask[2] = torch.inf, 0
    rest = {"mask": mask, "labels": labels, "table": torch.randn(7, 3), "ages": torch.rand(4)}
    found = beside_noise({"x": x, **rest}, 4, 1)
    noise = found.pop("x")
    assert torch.equal(noise[0], x[0]) and noise.dtype == x.dtype and noise.shape == x.shape
    spread = float(noise[1:].double().std())
    assert 8 < spread < 12 and bool(noise[1:].isfinite().all())
    again, other = (beside_noise(x, 4, seed) for seed in (1, 2))
    assert torch.equal(again, noise) and not torch.equal(other, noise)
    assert all(torch.equal(found[name], value) for name, value in rest.items())
    for values, size in ((x * 8, 80), (-torch.rand(4, 500) - 1, 20), (torch.rand(4, 500) + 0.5, 15)):
        assert 0.8 * size < float(beside_noise(values, 4, 1)[1:].double().std()) < 1.2 * size
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, of a number that has a gradient
        assert beside_noise(torch.randn(4, 2, requires_grad=True), 4, 1).requires_grad
    assert beside_noise(torch.full((4, 2), torch.nan), 4, 1)[1:].eq(0).all()
    images = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    before = images.clone()
    assert beside_noise(images, 4, 1).stride() == images.stride() and torch.equal(images, before)
    assert beside_noise(rest, 4, 1) is None and beside_noise(torch.arange(8).view(4, 2), 4, 1) is None


def test_a_model_that_takes_no_noise_passes() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            if float(x.abs().max()) > 5:
                raise ValueError("no such numbers")
            return self.inner(x)

    check_isolation(Picky().train(), (values(N) / 2,), {}, N)
