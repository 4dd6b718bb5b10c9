"""What a batch is made of: objects in objects, tables, tensors that hold their numbers in other ways."""

import array
import time
from collections import UserDict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lora_dp import IsolationError
from lora_dp.isolation.collation import leaves as batch_leaves
from lora_dp.isolation.collation.leaves import as_tensor, leaves, stands_alone
from lora_dp.isolation.collation.trial import check_collation


class Node:
    """Of a graph."""

    def __init__(self, x: Any):
        self.x, self.others = x, []


def names(batch: Any) -> list[str]:
    return [name for name, _ in leaves(batch)]


def test_an_object_is_opened_by_all_that_it_holds():
    class Slots:
        __slots__ = "one"

    class Both(Slots):
        __slots__ = ("__two", "none", "__dict__")

        def __init__(self) -> None:
            self.one, self.__two, self.three = 1, 2, 3

    class Words(UserDict[str, Any]):
        def __init__(self) -> None:
            super().__init__(a=1)
            self.scale = 2

    class Rows(list[Any]):
        pass

    rows = Rows([torch.ones(1)])
    assert names(rows) == ["[0]"]
    rows.scale = 2  # type: ignore[attr-defined]
    assert names({"both": Both(), "words": Words(), "rows": rows, "set": {3, 1}}) == [
        "['both']['_Both__two']",
        "['both']['one']",
        "['both']['three']",
        "['words']['data']['a']",
        "['words']['scale']",
        "['words']['a']",
        "['rows']['scale']",
        "['rows']['entries'][0]",
        "['set']",
    ]


def test_code_and_settings_are_not_opened():
    assert names([int, print, len, nn.Linear(1, 1), np, torch.Generator(), "a".join]) == [f"[{i}]" for i in range(7)]


def test_a_parent_is_not_opened_below_its_child():
    parent = Node(1)
    parent.others = [Node(2)]
    parent.others[0].others = [parent]
    assert names(parent) == ["['x']", "['others'][0]['x']", "['others'][0]['others'][0]"]


@pytest.mark.slow
@pytest.mark.parametrize("n", [4, 7, 16, 64])
def test_objects_that_lead_to_each_other_take_no_long_time(n):
    def linked(items: list[Any]) -> list[Node]:
        nodes = [Node(item) for item in items]
        for node in nodes:
            node.others = nodes
        return nodes

    items, began = [torch.ones(2) * place for place in range(n)], time.process_time()
    with pytest.raises(IsolationError, match="joins examples|objects that lead to each other"):
        check_collation(items, linked, range(n), linked(items))
    assert time.process_time() - began < 20


@pytest.mark.slow
def test_objects_in_a_grid_are_looked_into_less_deep():
    """On all ways of eight steps from each they would be thousands."""
    grid = {(i, j): Node((i, j)) for i in range(6) for j in range(6)}
    for (i, j), node in grid.items():
        node.others = [grid[at] for at in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)) if at in grid]
    found = names(list(grid.values()))
    assert max(name.count("others") for name in found) < 8 and len(found) > 36


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_a_vocabulary_that_examples_share_is_compared_as_one(n):
    words = {f"w{number}": number for number in range(5000)}
    vocabulary = SimpleNamespace(words=words, names=list(words))

    def documents(items: list[Any]) -> list[Any]:
        return [SimpleNamespace(x=item, vocabulary=vocabulary) for item in items]

    items, began = [torch.ones(2) * place for place in range(n)], time.process_time()
    assert check_collation(items, documents, range(n), documents(items)) is False
    assert time.process_time() - began < 10


def test_texts_and_tables_are_compared_by_what_they_hold():
    assert as_tensor("aé").tolist() == [97, 233]  # type: ignore[union-attr]
    assert as_tensor(b"ab").tolist() == [97, 98]  # type: ignore[union-attr]
    assert as_tensor("\ud800").tolist() == [0xD800]  # type: ignore[union-attr]
    table = {f"w{place}": float(place) for place in range(101)}
    found = as_tensor(table)
    assert found is not None and torch.equal(found, as_tensor(dict(table)))  # type: ignore[arg-type]
    for other in ({**table, "w3": 4.0}, {name + "s": value for name, value in table.items()}):
        assert not torch.equal(found, as_tensor(other))  # type: ignore[arg-type]
    missing = [{**table, "w3": float("nan")} for _ in range(2)]
    assert torch.equal(*map(as_tensor, missing))  # type: ignore[arg-type]
    assert stands_alone(table) and stands_alone("a") and not stands_alone({"a": 1.0}) and not stands_alone(1)
    assert names(dict(list(table.items())[:100])) == [f"['w{place}']" for place in range(100)]


@pytest.mark.parametrize(
    ("leaf", "found"),
    [
        (torch.tensor([[0.0, 2.0]]).to_sparse(), [[0, 2]]),
        (torch.tensor([[0.0, 2.0]]).to_sparse_csr(), [[0, 2]]),
        (torch.tensor([1 + 2j]), [[1, 2]]),
        (torch.tensor([1 + 2j]).conj(), [[1, -2]]),
        (1 + 2j, [1, 2]),
        (torch.tensor([1.5]).to(torch.float8_e4m3fn), [1.5]),
        (torch.tensor([7], dtype=torch.uint16), [7]),
        (torch.quantize_per_tensor(torch.tensor([1.0]), 0.5, 0, torch.qint8), [1.0]),
        (bytearray(b"ab"), [97, 98]),
        (array.array("d", [1.5]), [1.5]),
        (memoryview(b"a"), [97]),
        (torch.ones(1, requires_grad=True), [1.0]),
        (np.array(["1970-01-02"], "datetime64[D]"), [1]),
        (np.timedelta64(3, "s"), 3),
        (None, None),
        (object(), None),
        (torch.ones(2, device="meta"), None),
    ],
)
def test_numbers_are_read_however_they_are_held(leaf, found):
    tensor = as_tensor(leaf)
    assert (tensor is None) == (found is None)
    if tensor is not None:
        assert tensor.tolist() == found and not tensor.requires_grad


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_a_large_sparse_tensor_is_compared_by_where_it_has_which(layout, monkeypatch):
    large = torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 0.0]])
    monkeypatch.setattr(batch_leaves, "_DENSE", 6)
    assert names(getattr(large, layout)()) == [""]
    monkeypatch.setattr(batch_leaves, "_DENSE", 5)
    assert {name: leaf.tolist() for name, leaf in leaves(getattr(large, layout)())} == {
        "['indices']": [[0, 1], [1, 0]],
        "['values']": [2.0, 3.0],
    }


def test_values_under_a_mask_are_passed_over():
    left, right = (np.ma.MaskedArray([1.0, hidden], mask=[False, True]) for hidden in (5.0, 6.0))
    assert (
        [(name, leaf.tolist()) for name, leaf in leaves(left)]
        == [(name, leaf.tolist()) for name, leaf in leaves(right)]
        == [("['data']", [1.0, 0.0]), ("['mask']", [False, True])]
    )
    assert names(np.ma.MaskedArray(["a"], mask=[False])) == ["['data']", "['mask']"]
