"""Buffers that forwards write to in some batches only."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_dp import DPLinear, IsolationError
from lora_dp.isolation.model_state.buffers import KeptBuffers, same
from tests.support import make_private

RARE = 2


# A batch that is drawn is refused before anything is written.
pytestmark = pytest.mark.usefixtures("none_drawn")


class Keeps(nn.Module):
    """A head beside a buffer that is written to by the examples of one label, or by none."""

    def __init__(self, way: str):
        super().__init__()
        torch.manual_seed(0)
        self.way, self.inner, self.head = way, DPLinear(6, 8), DPLinear(8, 3)
        self.register_buffer("centre", torch.zeros(8))
        self.register_buffer("seen", torch.tensor(False))
        self.register_buffer("unseen", torch.tensor(True))
        self.register_buffer("passes", torch.tensor(0))
        self.register_buffer("later", None)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.inner(x).tanh()
        rare = hidden[y == RARE].detach()
        if self.way == "average" and len(rare):
            self.centre.mul_(0.9).add_(rare.mean(0), alpha=0.1)
        if self.way == "in its place" and len(rare):
            self.centre = rare.mean(0)
        if self.way == "data" and len(rare):
            self.centre.data = rare.mean(0)
        if self.way == "through data":
            self.centre.data.add_(hidden.detach().mean(0))
        if self.way == "none before" and len(rare):
            self.later = rare.mean(0)
        if self.way == "new" and len(rare) and not hasattr(self, "first"):
            self.register_buffer("first", rare.mean(0))
        if self.way == "set for good":
            self.seen.logical_or_((y == RARE).any())
        if self.way == "cleared for good":
            self.unseen.logical_and_(~(y == RARE).any())
        if self.way == "counts":
            self.passes += 1
        if self.way == "by width" and x.shape[1] > 3:
            self.later = torch.arange(x.shape[1])
        return self.head(hidden)


def batch(n: int, *rare: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    y = torch.arange(n) % 2
    y[list(rare)] = RARE
    return torch.randn(n, 6, generator=generator), y


def train(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    optimizer.recorder.discard()
    model(x, y)


WAYS = ["average", "in its place", "data", "none before", "new", "set for good", "cleared for good"]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("n", "place"), [(12, 7), (12, 0), (12, 3), (12, 11), (5, 2), (2, 1), (3, 1)])
def test_what_a_rare_example_leaves_in_a_buffer_is_refused(way: str, n: int, place: int) -> None:
    model = Keeps(way).train()
    optimizer = make_private(model, batch_size=8)
    train(model, optimizer, *batch(n))
    train(model, optimizer, *batch(n))
    for rare in ([place], []):  # for good
        with pytest.raises(IsolationError, match="The buffer '(centre|later|first|seen|unseen)' takes up statistics"):
            train(model, optimizer, *batch(n, *rare))
    optimizer = make_private(model, batch_size=8)
    if way not in ("new", "set for good", "cleared for good"):
        train(model, optimizer, *batch(n))


@pytest.mark.parametrize("way", ["average", "in its place", "none before", "new"])
def test_it_is_refused_in_the_first_batch_too(way: str) -> None:
    """Of which four examples are tried, and this is none of them."""
    model = Keeps(way).train()
    optimizer = make_private(model, batch_size=8)
    with pytest.raises(IsolationError, match="takes up statistics"):
        train(model, optimizer, *batch(12, 7))


@pytest.mark.parametrize("n", [1, 2, 8])
def test_a_write_that_counts_no_version_is_seen_where_every_batch_has_it(n: int) -> None:
    model = Keeps("through data").train()
    optimizer = make_private(model, batch_size=8)
    with pytest.raises(IsolationError, match="The buffer 'centre' takes up statistics"):
        train(model, optimizer, *batch(n))


@pytest.mark.parametrize("way", ["counts", "by width"])
def test_what_is_the_same_whatever_the_examples_is_taken(way: str) -> None:
    model = Keeps(way).train()
    optimizer = make_private(model, batch_size=8)
    for n in (12, 5, 2, 1):
        train(model, optimizer, *batch(n, 0))
    assert int(model.passes) == (4 if way == "counts" else 0)
    assert (model.later is None) is (way == "counts")


class Sizes(nn.Module):
    """A buffer that it computes with, and that another value than its own would break."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sizes", torch.tensor([2, 3]))
        self.head = DPLinear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        images = x.view(-1, *self.sizes.tolist())
        self.sizes.copy_(torch.tensor([2, 3]))
        return self.head(images.flatten(1))


def test_a_buffer_that_takes_no_other_value_is_tried_with_its_own() -> None:
    model = Sizes().train()
    optimizer = make_private(model, batch_size=8)
    for _ in range(3):
        model(torch.randn(8, 6))
        optimizer.zero_grad()
        optimizer.recorder.discard()
    assert model.sizes.tolist() == [2, 3]


def test_a_buffer_that_was_made_in_an_evaluation_is_taken() -> None:
    """Under torch.inference_mode, whose tensors count no versions."""
    model = Keeps("by width").train()
    optimizer = make_private(model, batch_size=8)
    with torch.inference_mode():
        model.eval()(*batch(8))
    assert model.train().later.is_inference()
    model.way = "none"
    for _ in range(2):
        train(model, optimizer, *batch(8))


def test_a_buffer_may_have_been_made_in_an_evaluation_before() -> None:
    model = Keeps("none").train()
    with torch.inference_mode():
        model.centre = torch.zeros(8)
    optimizer = make_private(model, batch_size=8)
    for _ in range(2):
        train(model, optimizer, *batch(8))


def test_a_trial_leaves_the_buffers_as_the_forward_left_them() -> None:
    model = Keeps("counts")
    model.register_buffer("steps", torch.tensor(0.0))
    optimizer = make_private(model.train(), batch_size=8)
    held = model.passes
    train(model, optimizer, *batch(4))
    assert model.passes is held and int(held) == 1


class Ragged(Keeps):
    """Rows of all examples in one tensor, which fit no other batch."""

    def forward(self, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        assert torch.equal(rows[: len(x)], x)
        return super().forward(x, y)


def test_rows_that_fit_no_other_batch_are_not_tried() -> None:
    model = Ragged("counts").train()
    optimizer = make_private(model, batch_size=8)
    x, y = batch(6)
    optimizer.recorder.sizes_fixed = True
    model(x, y, torch.cat([x, x[:1]]))
    assert int(model.passes) == 1


def test_a_batch_of_nobody_writes_as_any() -> None:
    model = Keeps("counts").train()
    optimizer = make_private(model, batch_size=8)
    train(model, optimizer, torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))
    train(model, optimizer, *batch(5))
    assert int(model.passes) == 2


def test_a_whole_client_may_keep_what_it_likes() -> None:
    model = Keeps("average").train()
    optimizer = make_private(model, batch_size=8)
    optimizer.recorder.per_example = False
    train(model, optimizer, *batch(12, 7))
    assert model.centre.any()


def test_only_what_none_wrote_before_is_unknown() -> None:
    model = Keeps("counts")
    kept = KeptBuffers(model)

    def forward(change: Any) -> bool:
        kept.begin()
        change()
        found = kept.unknown()
        kept.know(found)
        return bool(found)

    assert not forward(lambda: None)
    # At all, to change it, to leave it as it is.
    for number, new in ((1, True), (1, True), (1, False), (0, True), (0, False), (1, False)):
        assert forward(lambda number=number: model.passes.add_(number)) is new
    for value, new in ((torch.nan, True), (torch.nan, True), (torch.nan, False), (0.0, True), (torch.nan, False)):
        assert forward(lambda value=value: model.centre.fill_(value)) is new


def test_buffers_of_one_name_are_those_of_their_modules() -> None:
    model = nn.Sequential(Keeps("none"), Keeps("none"))
    kept = KeptBuffers(model)
    for module in (model[0], model[0], model[1], model[1]):
        kept.begin()
        module.passes.add_(1)
        assert kept.unknown()
        kept.know(kept.unknown())


def test_what_a_forward_wrote_is_filled_and_what_it_took_away_put_back() -> None:
    model = Keeps("none")
    kept = KeptBuffers(model)
    kept.begin()
    model.passes.add_(3)
    centre = model.centre
    del model.centre
    with kept.put_back(1):
        assert int(model.passes) == 1 and model.centre is centre and not centre.any() and model.later is None
    assert int(model.passes) == 3 and not hasattr(model, "centre")


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ([0.0, 1.0], [0.0, 1.0], True),
        ([torch.nan, 1.0], [torch.nan, 1.0], True),
        ([torch.nan], [0.0], False),
        ([0.0], [torch.nan], False),
        ([1.0], [1.0, 1.0], False),
        ([torch.inf], [3e38], False),
        ([], [], True),
    ],
)
def test_nan_is_the_same_as_nan_alone(one: list[float], other: list[float], alike: bool) -> None:
    assert same(torch.tensor(one), torch.tensor(other)) is alike
