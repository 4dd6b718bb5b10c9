"""Objects among a model's arguments that know each other come back as they were, or are refused soon."""

import time
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from lora_dp import IsolationError
from lora_dp.isolation.batches.objects import check_opened, put_together, take_apart
from tests.isolation.batches.object_arguments import ByAttribute, Handed, Tree
from tests.support import make_private


def test_what_knows_itself_comes_back_as_itself() -> None:
    ring = SimpleNamespace(x=torch.zeros(3))
    ring.next, ring.all = ring, [ring, {"it": ring}]
    tree = Tree(torch.ones(2))
    given = take_apart({"ring": ring, "tree": tree, "again": ring})
    check_opened(given)
    assert len(pytree.tree_leaves(given)) == 3
    back = put_together(given)
    assert back["ring"].next is back["ring"] is back["ring"].all[0] is back["ring"].all[1]["it"] is not ring
    assert back["tree"].part.whole is back["tree"] is back["tree"].get.__self__ is back["tree"].parts[0].whole
    assert type(back["tree"].get) is MethodType and type(back["tree"]) is Tree
    kept = ByAttribute(a=1)
    again = put_together(take_apart(kept))
    assert vars(again) is again is not kept and again == kept


@pytest.mark.slow
def test_objects_that_all_know_each_other_are_refused_soon() -> None:
    friends = [SimpleNamespace(x=i) for i in range(20)]
    for friend in friends:
        friend.all = friends
    held: list[Any] = []
    held.append(held)
    start = time.perf_counter()
    for tree in (friends, SimpleNamespace(held=held)):
        model = Handed()
        make_private(model, batch_size=4)
        with pytest.raises(IsolationError, match="that hold each other, too often to be taken apart by example: pass"):
            model(torch.randn(4, 6), tree)
    assert time.perf_counter() - start < 20
    shared = SimpleNamespace(names={f"{i}": i for i in range(5000)})
    take_apart([SimpleNamespace(x=i, shared=shared) for i in range(20_000)])


@pytest.mark.parametrize(("depth", "seen"), [(8, True), (9, False)])
def test_objects_in_objects_are_taken_apart_eight_deep(depth: int, seen: bool) -> None:
    tree: Any = torch.ones(2)
    for _ in range(depth):
        tree = SimpleNamespace(x=tree)
    if seen:
        check_opened(take_apart(tree))
    else:
        with pytest.raises(IsolationError, match="cannot be taken apart by example"):
            check_opened(take_apart(tree))
