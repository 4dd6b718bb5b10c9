"""Lists of numbers among a model's arguments, one for each example."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_dp import DPLinear, IsolationError
from lora_dp.number_lists import as_lists, as_tensors, other_lists
from tests.support import make_private

WIDTH = 6


class Packed(nn.Module):
    """A frozen LSTM over packed texts, whose lengths come as a list, and a head; or one in which lengths meet."""

    def __init__(self, kind: str = "apart"):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.given = kind, []
        self.words, self.reads = nn.Embedding(40, 8), nn.LSTM(8, 8, batch_first=True)
        self.words.requires_grad_(False), self.reads.requires_grad_(False)
        self.head = DPLinear(8, 3)

    def forward(self, tokens: Tensor, lengths: Any) -> Tensor:
        self.given.append(lengths)
        packed = nn.utils.rnn.pack_padded_sequence(
            self.words(tokens), lengths, batch_first=True, enforce_sorted=False)
        hidden = self.reads(packed)[1][0][0]
        if self.kind == "by the longest":
            hidden = hidden / max(lengths)
        if self.kind == "by all":
            hidden = hidden * len(lengths) / sum(lengths)
        return self.head(hidden)


def batch(*lengths: int) -> tuple[Tensor, list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = torch.randint(1, 40, (len(lengths), WIDTH), generator=generator)
    return tokens * (torch.arange(WIDTH) < torch.tensor(lengths).unsqueeze(1)), list(lengths)


def train(model: nn.Module, optimizer: Any, *lengths: int) -> None:
    optimizer.backward(model(*batch(*lengths)).square().sum(1))
    optimizer.zero_grad()
    optimizer.recorder.discard()


@pytest.mark.parametrize("lengths", [(3, 6, 1, 5, 2, 4, 6), (3, 6), (4,), (5, 5, 5, 5, 5)])
def test_lengths_in_a_list_are_those_of_the_examples(lengths: tuple[int, ...]) -> None:
    model = Packed()
    optimizer = make_private(model, batch_size=4)
    train(model, optimizer, *lengths)
    train(model, optimizer, 2, 6, 3)
    assert all(type(given) is list and all(type(length) is int for length in given) for given in model.given)
    assert {len(given) for given in model.given} > {len(lengths), 3}  # trials took other examples beside


@pytest.mark.parametrize("kind", ["by the longest", "by all"])
@pytest.mark.parametrize("lengths", [(3, 6, 1, 5, 2, 4, 6), (3, 6)])
def test_what_lengths_in_a_list_mix_is_refused(kind: str, lengths: tuple[int, ...]) -> None:
    model = Packed(kind)
    optimizer = make_private(model, batch_size=4)
    with pytest.raises(IsolationError, match="example"):
        train(model, optimizer, *lengths)


def test_lists_come_back_as_they_were() -> None:
    call = ([3, 4, 5], {"scales": [0.1, 2, 3.5], "names": ["a", "b", "c"], "flags": [True, False, True],
                        "size": [224, 224], "large": [2**70, 1, 2],
                        "edge": [2**63, 1, 2], "least": [-(2**63), 1, 2], "low": [-(2**70), 1, 2],
                        "fits": [2**63 - 1, 1 - 2**63, 0]})
    assert as_lists(as_tensors(call, 3)) == call


def test_only_numbers_of_the_examples_are_taken_up() -> None:
    lengths, rest = as_tensors(([3, 4000, 5], [224, 224]), 3)
    assert lengths.dtype == torch.int64 and torch.equal(lengths.as_subclass(Tensor), torch.tensor([3, 4000, 5]))
    assert rest == [224, 224]
    assert as_tensors([0.1, 2], 2).dtype == torch.float64
    assert as_tensors([], 0) == []


class Boxed(nn.Module):
    """Targets of each image in a list of dicts, as detectors take them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = DPLinear(6, 3)

    def forward(self, x: Tensor, labels: list[dict[str, Tensor]]) -> Tensor:
        out = self.head(x)
        return torch.stack([out[i] - label["boxes"].sum() for i, label in enumerate(labels)])


def test_a_list_of_other_things_is_named() -> None:
    model = Boxed().train()
    make_private(model, batch_size=8)
    labels = [{"boxes": torch.rand(1, 4)} for _ in range(8)]
    with pytest.raises(IsolationError, match=r"an entry for each example \(\[1\]\['labels'\]\), .*IndexError"):
        model(torch.randn(8, 6), labels=labels)
    assert other_lists({"x": [1, 2, 3], "y": ([{}, {}],), "z": [[1, 2], 3]}, 2) == ["['y'][0]", "['z']"]


def test_another_error_of_the_model_is_its_own() -> None:
    model = Boxed().train()
    make_private(model, batch_size=8)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(8, 5), labels=[])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(3, 5), labels=[{"boxes": torch.rand(1, 4)} for _ in range(3)])  # all of them


class Sized(nn.Module):
    """A size of images that comes as a list, of as many numbers as the batch may have examples."""

    def __init__(self) -> None:
        super().__init__()
        self.head = DPLinear(6, 3)

    def forward(self, x: Tensor, size: list[int]) -> Tensor:
        assert type(size) is list and len(size) == 2
        return self.head(x.view(-1, *size).flatten(1))


def test_a_list_that_is_as_long_as_the_batch_by_chance() -> None:
    model = Sized().train()
    optimizer = make_private(model, batch_size=8)
    for n in (2, 5, 2):
        optimizer.backward(model(torch.randn(n, 6), [2, 3]).square().sum(1))
        optimizer.zero_grad()
        optimizer.recorder.discard()
