"""Rows of a collated batch in other things than tensors with the examples first: arrays, lists, other dimensions."""

import datetime
import decimal
import itertools
import pathlib
import random
from collections.abc import Callable
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import default_collate
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)

from lora_dp import IsolationError
from lora_dp.isolation.collation.rows import Layout, layout_of, lengths, rows_by_example, values
from tests.grids import pairwise
from tests.isolation.collation.row_functions import Collate, check, data, mixup, normalised, texts
from tests.models import examples


class Array:
    """Of another library."""

    def __init__(self, x: Tensor):
        self._x = x.numpy()

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self._x


class Slots:
    """Without a ``__dict__``."""

    __slots__ = ("__hidden", "name", "none")

    def __init__(self, x: Any):
        self.__hidden, self.name = x, "a"


class Own(list[Any]):
    """A list of the user's own."""


def structured(x: Tensor) -> np.ndarray:
    return np.array([(row[0].numpy(), 1) for row in x], dtype=[("x", "f4", (6,)), ("y", "i4")])


def framed(x: Tensor) -> pd.DataFrame:
    return pd.DataFrame({"x": x[:, 0, 0].numpy(), "name": ["a"] * len(x)})


def boxed(x: Tensor) -> np.ndarray:
    """An array of arrays."""
    found = np.empty(len(x), dtype=object)
    for place, row in enumerate(x):
        found[place] = row.numpy()
    return found


# How rows (N, 2, 6) are returned.
DRESSES: dict[str, Callable[[Tensor], Any]] = {
    "array": lambda x: x.numpy(),
    "array of halves": lambda x: x.numpy().astype(np.float16),
    "array in a dict": lambda x: {"x": x.numpy()},
    "array in an object": lambda x: SimpleNamespace(x=x.numpy()),
    "array of another library": Array,
    "array of arrays": boxed,
    "sequence first": lambda x: x.transpose(0, 1),
    "examples last": lambda x: x.permute(1, 2, 0),
    "array with examples last": lambda x: x.permute(1, 2, 0).numpy(),
    "list": list,
    "tuple": tuple,
    "list of arrays": lambda x: [row.numpy() for row in x],
    "lists": lambda x: x.tolist(),
    "list of numbers": lambda x: x[:, 0, 0].tolist(),
    "list of sums": lambda x: list(x.sum((1, 2)).numpy()),
    "list of dicts": lambda x: [{"name": "a", "x": row} for row in x],
    "list of objects": lambda x: [SimpleNamespace(x=row) for row in x],
    "list of dicts of lists": lambda x: [{"x": row.tolist()} for row in x],
    "list beside another": lambda x: (["a"] * len(x), {"x": list(x)}),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "packed": lambda x: pack_sequence(list(x)),
    "slots": Slots,
    "list of slots": lambda x: [Slots(row) for row in x],
    "structured": structured,
    "list of structured": lambda x: list(structured(x)),
    "list of its own": Own,
    "mask": lambda x: np.ma.MaskedArray(np.zeros(x.shape), mask=((x * 1000).long() % 2 == 0).numpy()),
    "masked": lambda x: np.ma.MaskedArray(x.numpy(), mask=(x > 1e6).numpy()),
    "sparse": lambda x: x.to_sparse(),
    "compressed": lambda x: x.flatten(1).to_sparse_csr(),
    "complex": lambda x: torch.view_as_complex(x.view(len(x), 2, 3, 2)),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.01, 0, torch.qint32),
    "eight bits": lambda x: x.to(torch.float8_e5m2),
    "unsigned": lambda x: (x.abs() * 1000).to(torch.uint16),
    "frame in a dict": lambda x: {"x": framed(x)},
    "series": lambda x: framed(x)["x"],
    "list of bytes": lambda x: [row.numpy().tobytes() for row in x],
    "list of buffers": lambda x: [bytearray(row.numpy().tobytes()) for row in x],
    "list of texts": lambda x: [f"{float(row.sum()):.3f}" for row in x],
    "list of words": lambda x: [[f"{float(number):.3f}" for number in row[0]] for row in x],
    "texts in a dict": lambda x: {"name": "all", "x": [f"{float(row.sum()):.3f}" for row in x]},
    "array of texts": lambda x: np.array([f"{float(row.sum()):.3f}" for row in x]),
    "list of sets": lambda x: [set(row[0].tolist()) for row in x],
    "list of tables": lambda x: [{f"w{place}": int(row.sum() * 100) for place in range(101)} for row in x],
    "list of days": lambda x: [datetime.date.fromordinal(int(row.abs().sum() * 1000) + 1) for row in x],
    "days": lambda x: (x[:, 0].abs() * 1000).long().numpy().astype("datetime64[D]"),
}


def random_mixup(x: Tensor) -> Tensor:
    share = 0.2 + 0.6 * torch.rand(1)
    return share * x + (1 - share) * x[torch.randperm(len(x))]


@pytest.mark.parametrize(("dress", "join", "n"), pairwise(list(DRESSES), [mixup, normalised], [2, 3, 4, 5, 6, 8, 12]))
def test_what_joins_examples_is_refused_in_each(dress, join, n):
    with pytest.raises(IsolationError, match="collate function joins examples: an example's rows"):
        check(data(n), lambda items: DRESSES[dress](join(torch.stack(items))))


@pytest.mark.parametrize("n", [3, 8])
@pytest.mark.parametrize("dress", DRESSES)
def test_what_draws_and_joins_is_refused_in_each(dress, n):
    with pytest.raises(IsolationError, match="collate function joins examples: an example's rows"):
        check(data(n), lambda items: DRESSES[dress](random_mixup(torch.stack(items))))


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 8, 12])
@pytest.mark.parametrize("dress", DRESSES)
def test_what_stacks_is_taken_in_each(dress, n):
    def noisy(x: Tensor) -> Tensor:
        return x + torch.randn(x.shape)

    for own in (lambda x: x, noisy):
        assert check(data(n), lambda items, own=own: DRESSES[dress](own(torch.stack(items)))) is False


@pytest.mark.parametrize("n", [2, 8])
def test_entries_that_change_by_themselves_are_refused(n):
    clock = itertools.count()
    with pytest.raises(IsolationError, match=r"The same examples are others in \[…\]\['at'\] when they"):
        check(data(n), lambda items: [{"x": x, "at": next(clock)} for x in items])


# How texts are returned, and whether the longest shows in the others.
WORDS: dict[str, tuple[Callable[[list[str]], Any], bool]] = {
    "list": (list, False),
    "cut": (lambda items: [item[:4] for item in items], False),
    "words": (lambda items: [item.split() for item in items], False),
    "array": (np.array, False),
    "padded": (lambda items: [item.ljust(max(map(len, items))) for item in items], True),
    "padded left": (lambda items: [item.rjust(max(map(len, items)), "_") for item in items], True),
    "padded words": (
        lambda items: [
            item.split() + ["<pad>"] * (max(len(other.split()) for other in items) - len(item.split()))
            for item in items
        ],
        True,
    ),
    "letters left out": (lambda items: ["".join(c for c in item if random.random() < 0.8) for item in items], False),
    "all names in one": (lambda items: {"x": [float(len(item)) for item in items], "names": ", ".join(items)}, False),
    "all names once": (lambda items: {"x": [float(len(item)) for item in items], "names": set(items)}, False),
    "notes": (
        lambda items: [
            {
                "path": pathlib.Path("data") / item,
                "tags": {item, "all"},
                "score": decimal.Decimal(2),
                "kind": Kind.OTHER,
                "none": None,
                "at": datetime.timedelta(len(item)),
            }
            for item in items
        ],
        False,
    ),
}


class Kind(Enum):
    """Of a text."""

    OTHER = 1


@pytest.mark.parametrize("n", [2, 3, 4, 8])
@pytest.mark.parametrize("name", WORDS)
def test_texts_are_taken_in_each(name, n):
    collate, varies = WORDS[name]
    sentences = [f"é{place} " + "a b cd efg hij kl mnopq"[: 3 + 5 * place % 17] for place in range(n)]
    assert check(sentences, collate) is varies
    check(sentences, lambda items: collate(sorted(items, key=len)))
    if name != "letters left out":  # texts that are drawn of several lengths are not compared
        with pytest.raises(IsolationError, match="joins examples"):
            check(sentences, lambda items: collate([f"{items[place - 1]} {item}" for place, item in enumerate(items)]))


# How texts of several lengths are returned, and whether the longest shows in the others.
RAGGED: dict[str, tuple[Callable[[list[Tensor]], Any], bool]] = {
    "list": (list, False),
    "lists": (lambda items: [item.tolist() for item in items], False),
    "with nothing": (lambda items: [item.tolist()[: len(item) % 2 * 3] for item in items], False),
    "dicts": (lambda items: [{"ids": item, "last": int(item[-1])} for item in items], False),
    "entries that some have": (
        lambda items: [{"ids": item, **({"odd": item} if len(item) % 2 else {})} for item in items],
        False,
    ),
    "sequence first": (pad_sequence, True),
    "array": (lambda items: pad_sequence(items, True).numpy(), True),
    "padded lists": (lambda items: pad_sequence(items, True).tolist(), True),
    "packed": (lambda items: pack_sequence(items, enforce_sorted=False), True),
}


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8, 14])
@pytest.mark.parametrize("name", RAGGED)
def test_several_lengths_are_taken_in_each(name, n):
    collate, varies = RAGGED[name]
    assert check(texts(n), collate) is varies
    if n < 8:  # no two of one length, whose order would be that in which they are given
        check(texts(n)[::-1], lambda items: collate(sorted(items, key=len)))


@pytest.mark.parametrize("name", RAGGED)
def test_several_lengths_hide_no_mixture(name):
    def joined(items: list[Tensor]) -> Any:
        total = sum(int(item.sum()) for item in items)
        return RAGGED[name][0]([item + total for item in items])

    for n in (3, 8):
        with pytest.raises(IsolationError, match="collate function joins examples: an example's rows"):
            check(texts(n), joined)


def test_an_entry_that_an_example_has_in_some_company_alone_is_refused():
    """That a text is the longest tells of all others."""

    def told(items: list[Tensor]) -> Any:
        return [{"ids": item, **({"longest": 1.0} if len(item) == max(map(len, items)) else {})} for item in items]

    with pytest.raises(IsolationError, match=r"an example's rows in \[…\]\['longest'\] change with the others"):
        check(texts(8), told)


def masked(items: list[Tensor]) -> dict[str, Any]:
    ids = pad_sequence(items)
    chosen = torch.rand(ids.shape) < 0.3
    return {"ids": ids.masked_fill(chosen, 1).numpy(), "labels": torch.where(chosen, ids, -100)}


def masked_lists(items: list[Tensor]) -> list[dict[str, Any]]:
    chosen = [torch.rand(item.shape) < 0.3 for item in items]
    return [
        {"ids": torch.where(each, 1, item).tolist(), "labels": torch.where(each, item, -100)}
        for item, each in zip(items, chosen, strict=True)
    ]


@pytest.mark.parametrize("collate", [masked, masked_lists])
def test_random_masks_are_taken_in_each(collate):
    for n in (2, 3, 8, 14):
        check(texts(n), collate)


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(40)}, unk_token="w1"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w1", mask_token="w2", pad_token="w0", cls_token="w3", sep_token="w4"
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pt", "np", None])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_collators_of_transformers_are_taken(kind, n):
    items = [{"input_ids": text.tolist(), "attention_mask": [1] * len(text)} for text in texts(n)]
    words = tokenizer()
    collators: list[Collate] = [lambda items: words.pad(items, return_tensors=kind)]
    if kind:
        collators += [
            DataCollatorWithPadding(words, return_tensors=kind),
            DataCollatorForLanguageModeling(words, return_tensors=kind),
            DataCollatorForLanguageModeling(words, mlm=False, return_tensors=kind),
        ]
    for collate in collators:
        assert check(items, collate)
    if kind:
        pairs = [{**item, "labels": item["input_ids"][1:]} for item in items]
        assert check(pairs, DataCollatorForSeq2Seq(words, return_tensors=kind))


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_torchs_own_collate_function_is_taken(n):
    items = [
        (x, {"name": "abc"[: place % 3], "score": float(x[0]), "y": place % 2}, [place, place + 1.0])
        for place, x in enumerate(examples(n)[0])
    ]
    assert check(items, default_collate) is False


def test_layouts_are_what_is_twice_as_long():
    def batch(n: int) -> Any:
        return {
            "first": torch.zeros(n, 4),
            "second": np.zeros((4, n, 2)),
            "both": torch.zeros(n, n),
            "table": torch.zeros(4),
            "more": torch.zeros(2 * n),
            "list": [{"x": 1.0, "names": ["a"]}] * n,
            "pair": [torch.zeros(n), 2],
            "four": ["a", "b", "c", "d"],
            "none": torch.zeros(n) if n == 4 else 3.0,
        }

    layout = layout_of(batch(4), batch(8), 4)
    assert layout.axes == {"['first']": 0, "['second']": 1, "['both']": 0, "['pair'][0]": 0}
    assert layout.lists == {"['list']"}
    assert layout.others == {"['table']", "['none']", "['more']", "['pair'][1]", "['four']", "['list'][0]['x']"} | {
        f"['list'][{place}]['{part}']" for place in range(4) for part in ("x", "names")
    }
    found = rows_by_example(batch(6), 6, layout)
    assert found.pop("['list'][…]['names']")[0].tolist() == [hash("a")]  # type: ignore[union-attr]
    assert {name: [None if row is None else tuple(row.shape) for row in rows][0] for name, rows in found.items()} == {
        "['first']": (4,),
        "['second']": (4, 2),
        "['both']": (6,),
        "['list'][…]['x']": (),
        "['pair'][0]": (),
    }
    assert rows_by_example({"second": np.zeros((6, 5, 2)), "list": [{"x": 1.0}] * 7}, 6, layout) == {}
    rows = rows_by_example([{"x": 1}, {"y": 2.5}], 2, Layout(lists=frozenset([""])))
    assert rows == {"[…]['x']": [torch.tensor(1), None], "[…]['y']": [None, torch.tensor(2.5, dtype=torch.float64)]}


def test_values_are_numbers_in_whatever_they_come():
    batch = {
        "list": [1, 2.5],
        "mixed": [1, "a"],
        "flags": (True, False),
        "large": 2**70,
        "texts": np.array(["a"]),
        "number": np.float32(2),
        "boxed": boxed(torch.ones(2, 1)),
        "none": [],
        "text": "a",
        "of": [[]],
        "packed": pack_sequence([torch.ones(2)]),
    }
    found = values(batch)
    assert found.pop("['texts']").tolist() == [hash("a")]
    assert {name: (leaf.dtype, leaf.tolist()) for name, leaf in found.items()} == {
        "['list']": (torch.float64, [1.0, 2.5]),
        "['mixed'][0]": (torch.int64, 1),
        "['flags']": (torch.bool, [True, False]),
        "['number']": (torch.float32, 2.0),
        "['boxed'][0]": (torch.float32, [1.0]),
        "['boxed'][1]": (torch.float32, [1.0]),
        "['none']": (torch.float64, []),
        "['of'][0]": (torch.float64, []),
        "['packed'][0]": (torch.float32, [[1.0, 1.0]]),
        "['packed'][1]": (torch.int64, [2]),
    }
    assert lengths(batch) == {"['boxed']": 2, "['mixed']": 2, "['of']": 1, "['packed']": 2, "['texts']": 1}
    assert values(batch, alone=True)["['text']"].tolist() == [97]
    assert pad_packed_sequence(batch["packed"])[1].tolist() == [2]  # type: ignore[arg-type]
