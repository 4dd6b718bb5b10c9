"""A model's call as a batch: its tensors, its arguments' names, and other batches made of it."""

import logging
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lora_dp.isolation.batches.calls import (
    argument_names,
    changed,
    doubled,
    named,
    numbers_in,
    of_whole_batch,
    take,
    tensors_in,
    widths,
)
from lora_dp.isolation.batches.kinds import structure
from tests.isolation.batches.call_values import N, zeros


def test_tensors_are_found_in_whatever_a_model_returns():
    found = [torch.ones(i + 1) for i in range(5)]
    tree = SimpleNamespace(
        first=found[0],
        others={"list": [found[1], (found[2], "text", None)], "set": {found[3]}},
        model=nn.Linear(2, 2),
        kind=nn.Linear,
        slots=1,
        last=found[4],
    )
    assert [id(tensor) for tensor in tensors_in(tree)] == [id(tensor) for tensor in found]
    assert tensors_in(None) == tensors_in("text") == tensors_in(nn.Linear(1, 1)) == tensors_in(nn.Linear) == []


def test_tensors_in_what_knows_itself_are_found_once():
    one, other = torch.ones(1), torch.ones(2)
    tree = SimpleNamespace(x=one, log=logging.getLogger(), op=torch.ops.aten.relu, module=torch)
    tree.whole, tree.parts = tree, [SimpleNamespace(up=tree, x=other), {"all": tree, "x": one}]
    deep: list[Any] = [other]
    for _ in range(5000):
        deep = [deep]
    for friend in (friends := [SimpleNamespace(x=torch.ones(1)) for _ in range(20)]):
        friend.all = friends
    found = [one, other, one, one, one, other, *(friend.x for friend in friends)]
    assert list(map(id, tensors_in((tree, [one, one], deep, friends)))) == list(map(id, found))


def test_what_holds_rows_of_all_examples_together():
    tree = {
        "number": torch.ones(()),
        "by_example": torch.ones(N, 3),
        "row": torch.ones(1, 3),
        "rows": torch.ones(2, 3),
        "flat": torch.ones(3 * N),
        "labels": torch.ones(N),
        "text": "no tensor",
    }
    assert [tuple(leaf.shape) for leaf in of_whole_batch(tree, N)] == [(2, 3), (3 * N,)]
    assert of_whole_batch({"labels": torch.ones(N)}, N) == []


def test_what_a_function_calls_its_arguments():
    def of_both_kinds(a: int, b: int = 1, *, c: int = 2) -> None: ...

    def without_names(a: int, /, b: int, *others: int) -> None: ...

    assert [argument_names(of_both_kinds, count) for count in range(5)] == [(), ("a",), ("a", "b"), (), ()]
    assert [argument_names(without_names, count) for count in range(4)] == [(), (), (), ()]
    assert argument_names(torch.add, 1) == ()  # nobody knows: one of C's
    assert named(("a", "b"), ((1, 2), {"c": 3})) == ((), {"a": 1, "b": 2, "c": 3})
    assert named((), ((1, 2), {"c": 3})) == ((1, 2), {"c": 3})


def test_some_examples_of_a_call():
    table, x = torch.ones(5, 3), torch.arange(2 * N).view(N, 2)
    part = take({"x": x, "table": table, "scale": 2.0, "number": torch.ones(())}, [2, 0], N)
    assert part["x"].tolist() == [[4, 5], [0, 1]] and part["table"] is table and part["scale"] == 2.0


def test_every_example_twice():
    tree = {
        "x": torch.arange(N),
        "flat": torch.arange(6).view(3, 2),
        "row": torch.ones(1, 3),
        "number": torch.ones(()),
        "pair": torch.arange(2),
        "flag": True,
    }
    found = doubled(tree, N)
    assert found["x"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3] and found["flat"].shape == (6, 2)
    assert found["pair"].tolist() == [0, 1, 0, 1]
    assert all(found[name] is tree[name] for name in ("row", "number", "flag"))


def test_the_sizes_of_what_an_example_holds():
    tree = {"ids": torch.rand(N, 9), "labels": torch.rand(N), "table": torch.rand(9, 3), "images": torch.rand(N, 3, 8)}
    assert set(widths(tree, N)) == {(9,), (), (3, 8)} and len(widths(tree, N)) == 3  # type: ignore[call-overload,arg-type]
    assert widths(tree, N) == widths({**tree, "table": torch.rand(8, 3)}, N) != widths({**tree, "ids": zeros(N, 8)}, N)


def test_other_examples_are_as_a_model_would_take_them():
    tree = {
        "x": torch.tensor([[1.0, 2.0], [3.0, -4.0]]),
        "ids": torch.tensor([[5, 6], [7, 8]]),
        "labels": torch.tensor([1, 2]),
        "weights": torch.tensor([2.0, 4.0]),
        "table": torch.rand(3, 2),
        "scale": 2,
    }
    found = changed(tree, 2)
    assert found["x"].tolist() == [[1.75, 3.25], [4.75, -5.75]] and found["weights"].tolist() == [3.25, 6.25]
    assert found["ids"].tolist() == [[5, 5], [7, 7]]
    assert all(found[name] is tree[name] for name in ("table", "scale"))


def test_ids_of_other_examples_are_others_that_a_model_knows():
    found = changed({"ids": torch.tensor([3, 0, 1, -100]), "used": torch.tensor([True, False, True, True])}, 4)
    assert found["ids"].tolist() == [2, 1, 0, -100] and found["used"].tolist() == [True, False, True, True]


def test_numbers_among_the_arguments():
    tree = {
        "count": 3,
        "scale": 0.5,
        "flag": True,
        "number": torch.tensor(7),
        "switch": torch.tensor(True),
        "x": torch.ones(1),
        "text": "12",
    }
    found = numbers_in(tree)
    assert found == {"['count']": 3.0, "['scale']": 0.5, "['number']": 7.0}
    assert all(type(value) is float for value in found.values())
    assert structure(tree, N) != structure({**tree, "switch": torch.tensor(False)}, N)
