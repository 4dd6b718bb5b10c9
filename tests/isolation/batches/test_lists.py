"""Lists of numbers among a model's arguments, one for each example."""

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lora_dp import DPLinear, IsolationError
from lora_dp.isolation.batches.lists import EntryList, as_lists, as_tensors, other_lists
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
        packed = nn.utils.rnn.pack_padded_sequence(self.words(tokens), lengths, batch_first=True, enforce_sorted=False)
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
    call = (
        [3, 4, 5],
        {
            "scales": [0.1, 2, 3.5],
            "names": ["a", "b", "c"],
            "flags": [True, False, True],
            "size": [224, 224],
            "large": [2**70, 1, 2],
            "edge": [2**63, 1, 2],
            "least": [-(2**63), 1, 2],
            "low": [-(2**70), 1, 2],
            "fits": [2**63 - 1, 1 - 2**63, 0],
        },
    )
    assert as_lists(as_tensors(call, 3)) == call


def test_only_numbers_of_the_examples_are_taken_up() -> None:
    lengths, rest = as_tensors(([3, 4000, 5], [224, 224]), 3)
    assert lengths.dtype == torch.int64 and torch.equal(lengths.as_subclass(Tensor), torch.tensor([3, 4000, 5]))
    assert rest == [224, 224]
    assert as_tensors([0.1, 2], 2).dtype == torch.float64
    assert as_tensors([], 0) == []


class Boxed(nn.Module):
    """Targets of each image in a list of dicts, as detectors take them; or one in which their numbers of boxes meet."""

    def __init__(self, kind: str = "apart") -> None:
        super().__init__()
        self.kind, self.head = kind, DPLinear(6, 3)

    def forward(self, x: Tensor, labels: list[dict[str, Tensor]]) -> Tensor:
        out = self.head(x)
        most = max(len(label["boxes"]) for label in labels) if self.kind == "by the most" else 1
        for label in labels:
            label["boxes"] *= 1 / 640  # in place, as some do
        return torch.stack([out[i] - label["boxes"].sum() / most for i, label in enumerate(labels)])


def test_tensors_in_a_list_that_have_rows_of_all_are_named() -> None:
    model = Boxed().train()
    make_private(model, batch_size=8)
    labels = [{"boxes": torch.rand(8, 4)} for _ in range(8)]
    with pytest.raises(IsolationError, match=r"an entry for each example \(\[1\]\['labels'\]\), .*IndexError"):
        model(torch.randn(8, 6), labels=labels)
    assert other_lists({"x": [1, 2, 3], "y": ([{}, {}],), "z": [[1, 2], 3]}, 2) == ["['y'][0]", "['z']"]


@pytest.mark.parametrize("boxes", [(1, 3, 0, 2, 2, 9), (2, 3)])
def test_boxes_of_each_image(boxes: tuple[int, ...]) -> None:
    labels = [{"boxes": torch.full((count, 4), 640.0)} for count in boxes]
    model = Boxed()
    optimizer = make_private(model, batch_size=4)
    optimizer.backward(model(torch.randn(len(boxes), 6), labels).square().sum(1))
    assert all(bool((label["boxes"] == 1).all()) for label in labels)  # trials scaled boxes of their own
    model = Boxed("by the most")
    make_private(model, batch_size=4)
    with pytest.raises(IsolationError, match="example"):
        model(torch.randn(len(boxes), 6), labels)


class Reader(nn.Module):
    """Takes texts, or lists of words, beside numbers, and pads them to the longest; it looks at padding or does not."""

    def __init__(self, looks: bool):
        super().__init__()
        torch.manual_seed(0)
        self.looks, self.given = looks, []
        self.words = nn.Embedding(130, 8).requires_grad_(False)
        self.head = DPLinear(9, 3)

    def forward(self, x: Tensor, texts: Any) -> Tensor:
        self.given.append(texts)
        words = [
            list(map(ord, text)) if isinstance(text, str) else [] if text is None else list(text)
            for text in (texts.values() if isinstance(texts, dict) else texts)
        ]
        length = max(map(len, words))
        rows = self.words(torch.tensor([word + [0] * (length - len(word)) for word in words]))
        if not self.looks:
            rows = rows * torch.tensor([[[float(k < len(word))] for k in range(length)] for word in words])
        return self.head(torch.cat([x, rows.sum(1)], 1))


TEXTS = ("a long text about nothing", "short", "", "of some length", "another", "one", "short")
# How N texts may be given beside a tensor.
LISTS: dict[str, Any] = {
    "texts": list,
    "a tuple of texts": tuple,
    "an array of texts": np.array,
    "an array of objects": lambda texts: np.array(texts, dtype=object),
    "lists of words": lambda texts: [list(map(ord, text)) for text in texts],
    "tuples of words": lambda texts: [tuple(map(ord, text)) for text in texts],
    "words or nothing": lambda texts: [list(map(ord, text)) or None for text in texts],
    "tensors": lambda texts: [torch.tensor(list(map(ord, text)) + [0, 0], dtype=torch.int64) for text in texts],
    "a deque": deque,
    "a dict by number": lambda texts: dict(enumerate(texts)),
    "a tuple of words": lambda texts: tuple(list(map(ord, text)) for text in texts),
    "arrays": lambda texts: [np.array(list(map(ord, text)) + [0, 0], np.int64) for text in texts],
}


def read(model: nn.Module, optimizer: Any, texts: Any) -> None:
    optimizer.backward(model(torch.randn(len(texts), 1), texts).square().sum(1))
    optimizer.zero_grad()
    optimizer.recorder.discard()


@pytest.mark.parametrize("kind", LISTS)
def test_texts_in_a_list_are_those_of_the_examples(kind: str) -> None:
    model = Reader(looks=False)
    optimizer = make_private(model, batch_size=4)
    for n in (7, 2, 1, 5):
        read(model, optimizer, LISTS[kind](TEXTS[:n]))
    assert len({type(given) for given in model.given}) == 1
    assert {len(given) for given in model.given} >= {1, 2, 4, 5, 7}


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("n", [7, 2])
def test_texts_that_a_model_pads_to_the_longest_are_refused_if_it_looks_at_padding(kind: str, n: int) -> None:
    model = Reader(looks=True)
    optimizer = make_private(model, batch_size=4)
    with pytest.raises(IsolationError, match="example"):
        read(model, optimizer, LISTS[kind](TEXTS[:n]))


@pytest.mark.parametrize("kind", LISTS)
def test_texts_that_are_first_of_one_length_are_tried_again(kind: str) -> None:
    model = Reader(looks=True)
    optimizer = make_private(model, batch_size=4)
    for _ in range(2):
        read(model, optimizer, LISTS[kind](["abc", "xyz", "two", "one", "six", "ten"]))
    with pytest.raises(IsolationError, match="example"):
        read(model, optimizer, LISTS[kind](["abc", "xyz", "two", "one", "seven", "ten"]))


class Classes(nn.Module):
    """Names of classes, which belong to no example."""

    def __init__(self) -> None:
        super().__init__()
        self.head = DPLinear(6, 3)

    def forward(self, x: Tensor, names: Any) -> Tensor:
        assert len(names) == 3
        return self.head(x) * sum(map(len, names))


@pytest.mark.parametrize("names", [["cat", "dog", "mouse"], ("cat", "dog", "mouse"), [["a"], ["b", "c"], []]], ids=str)
def test_names_of_classes_may_be_as_many_as_a_later_batch_has_examples(names: Any) -> None:
    model = Classes().train()
    optimizer = make_private(model, batch_size=8)
    for n in (4, 3, 5, 3):
        optimizer.backward(model(torch.randn(n, 6), names).square().sum(1))
        optimizer.zero_grad()
        optimizer.recorder.discard()


def test_equal_entries_share_a_place() -> None:
    texts, rest = as_tensors((["a", "b", "a", 1], [True, 1, [], None]), 4)
    assert texts.places.tolist() == [0, 1, 0, 3] and texts.sizes.tolist() == [1, 1, 1, 1]
    assert rest.places.tolist() == [0, 1, 2, 3] and rest.sizes.tolist() == [1, 1, -1, -1]
    sizes = as_tensors([["ab", b"cde"], {"x": torch.ones(2, 3), "y": [1, (2, 3)]}, ""], 3).sizes
    assert sizes.dtype == torch.int64 and sizes.tolist() == [5, 9, -1]


def test_what_is_taken_of_a_list_has_tensors_of_its_own() -> None:
    boxes = torch.ones(3, 4, requires_grad=True)
    (taken,) = EntryList([boxes], torch.tensor([0]), torch.tensor([12])).chosen()
    assert taken is not boxes and taken.is_leaf and taken.requires_grad and torch.equal(taken, boxes)
    first, second = EntryList([boxes], torch.tensor([0, 0]), torch.tensor([12, 12])).chosen()
    assert first is not second


def test_one_text_for_all_is_no_list() -> None:
    whole, dates = as_tensors((np.array("a text"), np.array(["2026-01-01", "2026-01-02"], "datetime64[D]")), 2)
    assert whole == np.array("a text") and dates.places.tolist() == [0, 1]


def test_lists_of_other_lengths_are_remembered_by_name() -> None:
    others: set[str] = set()
    as_tensors(({"x": [1, 2], "y": ["a"], "in": [["a", "b", "c"], 5]}, torch.ones(3)), 3, others)
    assert others == {"[0]['x']", "[0]['y']", "[0]['in']"}
    as_tensors(["a"], 0, others)
    assert len(others) == 3
    call = as_tensors(({"x": [1, 2], "y": ["a", "b"], "in": [["a", "b"], ["c", "d"]], "z": ["a", "b"]},), 2, others)
    assert call[0]["x"] == [1, 2] and call[0]["y"] == ["a", "b"]
    assert [type(part).__name__ for part in (*call[0]["in"], call[0]["z"])] == ["EntryList"] * 3
    others.add("[0]['in'][1]")
    assert [type(part).__name__ for part in as_tensors(({"in": [["a", "b"], ["c", "d"]]},), 2, others)[0]["in"]] == [
        "EntryList",
        "list",
    ]


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
