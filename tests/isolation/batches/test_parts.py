"""A call's arguments as a batch: what tells two structures apart, which examples a trial takes, what is padding."""

import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
from lora_dp.isolation.batches.kinds import chosen, extremes, structure
from lora_dp.isolation.batches.padding import cut, narrowed, used_tokens

N = 4


def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def equal(left: Any, right: Any) -> bool:
    return torch.equal(left, right) if isinstance(left, Tensor) else bool(left == right)


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


# A call


def test_what_a_function_calls_its_arguments():
    def of_both_kinds(a: int, b: int = 1, *, c: int = 2) -> None: ...

    def without_names(a: int, /, b: int, *others: int) -> None: ...

    assert [argument_names(of_both_kinds, count) for count in range(5)] == [(), ("a",), ("a", "b"), (), ()]
    assert [argument_names(without_names, count) for count in range(4)] == [(), (), (), ()]
    assert argument_names(torch.add, 1) == ()  # nobody knows: one of C's
    assert named(("a", "b"), ((1, 2), {"c": 3})) == ((), {"a": 1, "b": 2, "c": 3})
    assert named((), ((1, 2), {"c": 3})) == ((1, 2), {"c": 3})


# Structures


def labelled(*rows: Any, name: str = "labels") -> dict[str, Tensor]:
    return {name: torch.tensor(rows)}


RAGGED = {"patches": torch.ones(11, 6)}
ALIKE: dict[str, tuple[tuple[Any, int], tuple[Any, int]]] = {
    "numbers of examples": (({"x": zeros(4, 5)}, 4), ({"x": zeros(6, 5)}, 6)),
    "many examples and few": (({"x": zeros(4, 5)}, 4), ({"x": zeros(40, 5)}, 40)),
    "sizes within a factor of two": (({"x": zeros(N, 4)}, N), ({"x": zeros(N, 7)}, N)),
    "a width that is the number of examples": (({"x": zeros(4, 4)}, 4), ({"x": zeros(5, 4)}, 5)),
    "rows of all within a factor of two": (({"x": zeros(8, 3)}, N), ({"x": zeros(15, 3)}, N)),
    "numbers": (({"count": 3.0}, N), ({"count": 4.0}, N)),
    "labels": ((labelled(0, 1, 2, 0), N), (labelled(2, 1, 1, 1), N)),
    "labels that are ignored alike": ((labelled([1, -100], [-100, 2]), 2), (labelled([-100, 0], [0, -100]), 2)),
    "probabilities": (({"labels": 0.5 * torch.ones(N, 3)}, N), ({"labels": -torch.ones(N, 3)}, N)),
    "labels of images": (({"labels": zeros(N, 2, 2)}, N), ({"labels": -zeros(N, 2, 2) - torch.eye(2).long()}, N)),
    "no numbers at all": (({"labels": zeros(N, 0), **RAGGED}, N), ({"labels": zeros(N, 0), **RAGGED}, N)),
    "even groups": (({**RAGGED, "sizes": zeros(N)}, N), ({**RAGGED, "sizes": zeros(N) + 3}, N)),
    "flags of groups": (({**RAGGED, "used": zeros(N).bool()}, N), ({**RAGGED, "used": torch.arange(N) == 1}, N)),
    "positions of tokens": (
        (labelled([0, 1], [0, 1], name="position_ids"), 2),
        (labelled([0, 2], [0, 3], name="position_ids"), 2),
    ),
    "positions that reach as far": (
        (labelled(0, 1, 5, 0, name="start_positions"), N),
        (labelled(5, 2, 3, 4, name="start_positions"), N),
    ),
    "offsets of even groups": (
        ({**RAGGED, "offsets": torch.arange(5) * 2}, N),
        ({**RAGGED, "offsets": torch.arange(5) * 3}, N),
    ),
}
APART: dict[str, tuple[Any, Any]] = {
    "names": ({"x": zeros(N)}, {"y": zeros(N)}),
    "dtypes": ({"x": zeros(N)}, {"x": zeros(N).int()}),
    "dimensions": ({"x": zeros(N, 1)}, {"x": zeros(N)}),
    "sizes": ({"x": zeros(N, 7)}, {"x": zeros(N, 8)}),
    "a row for each and one for all": ({"x": zeros(N, 2)}, {"x": zeros(N + 1, 2)}),
    "kinds": ({"x": 3.0}, {"x": 3}),
    "options": ({"x": True}, {"x": False}),
    "modes": ({"x": "sum"}, {"x": "mean"}),
    "missing arguments": ({"x": zeros(N), "y": 1}, {"x": zeros(N)}),
    "an ignored label": (labelled(0, 1, 2, 0), labelled(0, 1, -100, 0)),
    "an ignored target": (labelled(0, 1, 2, 0, name="target"), labelled(0, -1, 2, 0, name="target")),
    "labels that are ignored unevenly": (
        labelled([1, 1], [1, -100], [1, 1], [-100, 1]),
        labelled([1, -100], [1, -100], [1, -100], [-100, 1]),
    ),
    "ignored alike, and none": (labelled(*[[0, 0]] * N), labelled(*[[0, -100]] * N)),
    "ignored under any name": ({"x": zeros(N, 2)}, {"x": torch.tensor([[0, 1], [0, -100], [0, 1], [1, 1]])}),
    "flags that mark as many of each": ({"used": torch.eye(N).bool()}, {"used": torch.ones(N, N).tril().bool()}),
    "weights of one sum": ({"weights": torch.ones(N, 3) * 0.3}, {"weights": torch.rand(N, 3)}),
    "a mask of ones and one that is even": ({"mask": torch.ones(N, 3)}, {"mask": torch.ones(N, 3).tril(-1)[[2] * N]}),
    # A sum in the mask's own type would be rounded to 256 tokens.
    "a token more, in few bits": (
        {"mask": torch.ones(N, 260).bfloat16() * (torch.arange(260) < 256)},
        {"mask": torch.ones(N, 260).bfloat16() * (torch.arange(260) < torch.tensor([[256], [257]] * 2))},
    ),
    "marks that are numbers": ({"x": torch.ones(N, 3)}, {"x": torch.ones(N, 3).tril()}),
    "marks that are numbers, in the midst": (
        {"x": torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0, 1, 0]).expand(N, 10)},
        {
            "x": torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0, 1, 0])
            .repeat(N, 1)
            .index_put((torch.tensor(0), torch.tensor(4)), torch.tensor(0.0))
        },
    ),
    "equal lengths": ({"sizes": zeros(N) + 3}, {"sizes": torch.arange(N)}),
    "how far positions reach": (labelled(0, 1, 2, 0, name="end_positions"), labelled(0, 1, 9, 0, name="end_positions")),
    "groups of one size and of several": ({**RAGGED, "sizes": zeros(N) + 2}, {**RAGGED, "sizes": torch.arange(N)}),
    "groups in a grid": (
        {**RAGGED, "grid": zeros(N, 2) + 2},
        {**RAGGED, "grid": torch.tensor([[2, 2]] * 3 + [[2, 3]])},
    ),
    "offsets": ({**RAGGED, "offsets": torch.arange(5) * 2}, {**RAGGED, "offsets": torch.tensor([0, 1, 4, 6, 8])}),
    "distant offsets": (
        {**RAGGED, "offsets": torch.arange(5) * 99},
        {**RAGGED, "offsets": torch.tensor([0, 1, 99, 300, 500])},
    ),
    "groups of rows": ({"x": torch.tensor([0, 0, 1, 1, 2, 2])}, {"x": torch.tensor([0, 1, 1, 1, 2, 2])}),
    "groups of rows, some in none": (
        {"x": torch.tensor([-1, 0, 1, 1, 2, 2])},
        {"x": torch.tensor([-1, 1, 1, 1, 2, 2])},
    ),
    "offsets of 32 bits": (
        {**RAGGED, "offsets": torch.arange(5).int()},
        {**RAGGED, "offsets": torch.tensor([0, 1, 4, 6, 8]).int()},
    ),
}


@pytest.mark.parametrize("name", ALIKE)
def test_what_no_code_could_tell_apart_is_one_structure(name):
    one, other = ALIKE[name]
    assert structure(*one) == structure(*other) and hash(structure(*one)) == hash(structure(*other))


@pytest.mark.parametrize("name", APART)
def test_what_code_may_tell_apart_is_another_structure(name):
    one, other = APART[name]
    assert structure(one, N) != structure(other, N)


@pytest.mark.parametrize(
    "ids",
    [
        lambda x: x,
        lambda x: x.int(),
        lambda x: x.double(),
        lambda x: x.unsqueeze(1),
        lambda x: torch.stack([x * 0, x], 1),
    ],
)
def test_names_that_some_examples_share_are_another_structure_and_two_of_them_are_tried(ids):
    alone, shared = torch.arange(40) + 100, torch.arange(40) + 100
    shared[[5, 8, 31]] = 7
    assert structure({"x": ids(alone)}, 40) == structure({"x": ids(alone + 1)}, 40)
    assert structure({"x": ids(alone)}, 40) != structure({"x": ids(shared)}, 40)
    assert chosen({"x": ids(shared), "sex": alone % 2}, 40, 4) == [0, 5, 8, 39]
    assert chosen({"x": ids(alone)}, 40, 4) == [0, 1, 2, 39]
    for columns, is_a_name in ((8, True), (9, False)):
        one, other = ({"x": values.repeat(columns, 1).T + 0.5} for values in (alone, shared))
        assert (structure(one, 40) != structure(other, 40)) is is_a_name
        assert ({5, 8} < set(chosen(other, 40, 4))) is is_a_name
    for dtype in (torch.float32, torch.int64):  # nothing names nobody
        assert chosen({"x": torch.zeros(40, 0, dtype=dtype), "y": alone.float()}, 40, 4) == [0, 1, 2, 39]
    for name in ("labels", "mask"):  # equal ones are nothing unusual
        tree = {name: torch.stack([shared, shared], 1)}
        assert structure(tree, 40) == structure({name: torch.stack([shared, shared], 1) + 1}, 40)
        assert not {5, 8} < set(chosen(tree, 40, 4))


def test_a_name_may_be_one_of_a_few_numbers_or_a_label():
    alone, shared = torch.arange(40) + 100, torch.arange(40) + 100
    shared[[5, 8, 31]] = 7
    for columns, is_a_name in ((2, True), (4, True), (5, False)):
        one, other = (
            {"x": torch.stack([alone, *(values + 1000 * k for k in range(1, columns))], 1)}
            for values in (alone, shared)
        )
        assert (structure(one, 40) != structure(other, 40)) is is_a_name
        assert ({5, 8} < set(chosen(other, 40, 4))) is is_a_name
    rest = torch.arange(40) % 2
    one, other = ({"x": torch.stack([alone, values], 1)} for values in (rest, alone + 1000))
    assert structure(one, 40) != structure(other, 40)
    one, other = ({"x": torch.stack([alone, values + 1000, values + 2000], 1).double()} for values in (alone, shared))
    assert structure(one, 40) == structure(other, 40)
    for name in ("labels", "target"):
        assert structure({name: alone}, 40) != structure({name: shared}, 40)
        assert chosen({name: shared}, 40, 4) == [0, 5, 8, 39]
    assert structure({"positions": alone - 100}, 40) == structure({"positions": alone.roll(1) - 100}, 40)
    assert not {5, 8} < set(chosen({"start_positions": shared}, 40, 4))


def test_two_ways_to_share_a_name_are_tried_both():
    """By users and items, say; where two of the four are of one user anyway, no more are taken."""
    users, items = torch.arange(40) + 100, torch.arange(40) + 100
    items[[5, 8]], users[[20, 30, 33]] = 7, 7
    for tree in ({"users": users, "items": items}, {"items": items, "users": users}):
        assert chosen(tree, 40, 4) == [0, 5, 8, 20, 30, 39]
        assert chosen({**tree, "cities": users // 50}, 40, 4) == [0, 5, 8, 20, 30, 39]
        seats = torch.arange(40) + 100
        seats[[12, 15, 16, 17]] = 7
        assert chosen({**tree, "seats": seats}, 40, 4) == [0, 5, 8, 20, 30, 39]  # no third way
    for tree in ({"items": items, "sex": torch.arange(40) % 2}, {"sex": torch.arange(40) % 2, "items": items}):
        assert chosen(tree, 40, 4) == [0, 5, 8, 39]
    assert chosen({"labels": items, "target": users}, 40, 4) == [5, 8, 20, 30]
    assert chosen({"items": items, "labels": users}, 40, 4) == [5, 8, 20, 30]


@pytest.mark.parametrize("pad", [0, -1, 7])
@pytest.mark.parametrize(
    "dress",
    [
        lambda x: x,
        lambda x: x.flip(1),
        lambda x: x.double(),
        lambda x: x.unsqueeze(2).repeat(1, 1, 3) + 0.0,
        lambda x: torch.where(x > 10, x, torch.nan),
    ],
)
def test_padding_that_no_mask_shows_is_another_structure_and_the_shortest_is_tried(dress, pad):
    full = torch.arange(40 * 16).view(40, 16) + 11
    short, shorter = full.clone(), full.clone()
    short[:, 13:], short[23, 6:], shorter[:, 13:] = pad, pad, pad
    one, all_alike, ragged = ({"x": dress(x)} for x in (full, shorter, short))
    assert len({structure(tree, 40) for tree in (one, all_alike, ragged)}) == 3
    assert 23 in chosen(ragged, 40, 4) and 23 not in chosen(one, 40, 4) and 23 not in chosen(all_alike, 40, 4)
    chance = full.clone()  # two equal numbers are no padding yet
    chance[5, 14:] = 11
    alone = full.clone()
    alone[23, 6:] = pad
    assert structure({"x": dress(chance)}, 40) != structure({"x": dress(alone)}, 40)
    mask = torch.ones(40, 16).long()  # it tells, and numbers end alike by chance
    if pad >= 0:
        assert structure({**one, "mask": mask}, 40) == structure({**ragged, "mask": mask}, 40)


def test_of_images_and_whole_numbers_in_rows_no_padding_is_asked():
    for shape, dtype in (((40, 3, 8, 8), torch.float32), ((40, 8, 4), torch.int64)):
        one = torch.arange(math.prod(shape)).view(shape).to(dtype)
        other = one.clone()
        other[7:, ..., 4:] = 0
        assert structure({"x": one}, 40) == structure({"x": other}, 40)


@pytest.mark.parametrize(
    "mask", [lambda used: used, lambda used: ~used, lambda used: torch.where(used, 0.0, -1e9), lambda used: used.long()]
)
@pytest.mark.parametrize("place", [lambda it: it[:, None, None], lambda it: it[:, None].expand(-1, 6, -1)])
def test_masks_of_attention_tell_of_padding(place, mask):
    lengths = torch.full((40, 1), 6)
    full = place(mask(torch.arange(6) < lengths))
    assert structure({"mask": full}, 40) == structure({"mask": place(mask(torch.eye(40, 6).bool() | True))}, 40)
    rolled = torch.stack([(torch.arange(6) < 4).roll(row) for row in range(40)])
    one = rolled[:1].expand(40, 6)
    assert structure({"mask": place(mask(rolled))}, 40) == structure({"mask": place(mask(one))}, 40)
    lengths[7] = 3
    assert structure({"mask": full}, 40) != structure({"mask": place(mask(torch.arange(6) < lengths))}, 40)


def test_rows_in_another_order_are_another_structure():
    rows, groups = torch.randn(8, 3), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    in_order, mixed = ({"y": torch.arange(N), "rows": rows, "of": of} for of in (groups, groups.roll(1)))
    assert structure(in_order, N) != structure(mixed, N)


def test_large_numbers_are_no_groups():
    """Counting by them would need as much memory."""
    structure({**RAGGED, "times": torch.tensor([2**37, 0, 2**37, 1, 5])}, N)
    extremes({**RAGGED, "times": torch.tensor([2**37, 0, 2**37, 1, 5])}, N)


# Parts


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


@pytest.mark.parametrize(
    ("tree", "found"),
    [
        ({"sizes": torch.tensor([2, 5, 1, 3])}, {1, 2}),
        ({"grid": torch.tensor([[3, 3], [1, 6], [2, 5], [4, 1]])}, {1, 2, 3}),
        ({"x": torch.rand(N, 2)}, set()),
        ({"flags": torch.eye(N).bool()}, set()),
        ({"none": zeros(N, 0)}, set()),
        ({"offsets": torch.tensor([0, 2, 7, 8, 11])}, {0, 1, 2}),
        ({"rows": torch.tensor([-1, 0, 1, 1, 1, 2, 3, 3])}, {0, 1, 2}),
        ({"rows": torch.tensor([4, 4, 4, 0, 1, 1])}, {2, 3}),
        ({"table": torch.rand(7, 2)}, set()),
        ({"offset": torch.tensor([5])}, set()),
        ({"ends": torch.tensor([3, 5])}, {0, 3}),
        ({"text": "sizes", "number": torch.tensor(3)}, set()),
    ],
)
def test_the_least_and_the_largest_group(tree, found):
    """Sizes by example; what may be offsets, or the group of each row, is taken for both."""
    assert extremes(tree, N) == found


def test_which_examples_a_trial_takes():
    def batch(n: int, **changed: Any) -> Any:
        tree = {"labels": zeros(n, 5), "attention_mask": torch.ones(n, 5).long(), "labelled": torch.zeros(n, 5)}
        return ((), {**tree, **changed}, None)

    labels, mask = zeros(40, 5), torch.ones(40, 5).long()
    labels[7, 2], mask[11, 3] = -100, 0
    ids = zeros(40, 5) - (torch.arange(40) == 30).long().unsqueeze(1)
    assert chosen(batch(40, input_ids=ids), 40, 4) == [0, 1, 2, 39]
    assert chosen(batch(40, labels=labels), 40, 4) == [0, 1, 7, 39]
    assert chosen(batch(40, labels=labels, attention_mask=mask), 40, 4) == [0, 7, 11, 39]
    labels[:7], mask[:20] = -100, 0
    labels[3, 0], mask[5, 4] = 1, 1
    assert chosen(batch(40, labels=labels, attention_mask=mask), 40, 4) == [0, 8, 20, 39]
    assert chosen(batch(3), 3, 4) == [0, 1, 2] and chosen(batch(4), 4, 4) == [0, 1, 2, 3]
    assert chosen(((torch.rand(40),), {}, None), 40, 4) == [0, 1, 2, 39]
    assert len(chosen(batch(40, labels=zeros(40, 0), target=zeros(40)), 40, 4)) == 4


def test_what_a_loss_may_pass_over_is_among_them_before_all_others():
    """Ignored labels, and positions that reach beyond the tokens, of every kind; rather than the first and the last."""
    starts, ends, labels, mask = zeros(40) + 1, zeros(40) + 2, zeros(40), torch.ones(40, 5).long()
    starts[5], ends[9], labels[13], mask[2, 1:], mask[30:, 1:] = 99, 99, -100, 0, 0
    tree = {"start_positions": starts, "end_positions": ends, "labels": labels, "attention_mask": mask}
    assert {5, 9, 13} < set(chosen(tree, 40, 4))
    mask[:], mask[2, 1:], mask[7] = torch.tensor([1, 1, 1, 0, 0]), 0, 1
    assert chosen({"start_positions": starts, "attention_mask": mask}, 40, 3) == [2, 5, 7]
    mask_alone = {"labels": labels, "attention_mask": mask}
    assert {2, 13} < set(chosen(mask_alone, 40, 4))


# Padding


def padded(*lengths: int, width: int = 9, left: bool = False, fill: int = 0) -> Tensor:
    """Numbers from 1 on, all of them different, and ``fill`` beyond each length."""
    ids = torch.arange(1, len(lengths) * width + 1).view(len(lengths), width)
    used = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    return ids.where(used.flip(1) if left else used, torch.tensor(fill))


def first_cuts(tree: Any, n: int, **options: Any) -> list[tuple[int, list[int], int, slice]]:
    return [(parts[0].place, parts[0].rows, parts[0].tokens, parts[0].kept) for parts in narrowed(tree, n, **options)]


def test_padding_is_found_by_masks_labels_and_runs():
    """At either end; rows are the two that have most of it, or the one that has any."""
    right, left = (1, [1, 2], 9, slice(0, 4)), (1, [1, 2], 9, slice(5, 9))
    for at_left, expected in ((False, right), (True, left)):
        ids = padded(9, 4, 3, 6, left=at_left)
        for tree, by_runs in (
            ({"attention_mask": (ids != 0).long()}, False),
            ({"attention_mask": ids != 0}, False),
            ({"labels": ids.where(ids != 0, -100)}, False),
            ({"ids": ids}, True),
            ({"ids": ids.where(ids != 0, 7)}, True),
        ):
            assert first_cuts(tree, N, by_runs=by_runs) == [expected]
            assert first_cuts(take(tree, [0, 1], N), 2, by_runs=by_runs) == [(1, [1], 9, expected[3])]
        assert first_cuts({"ids": ids}, N, by_runs=False) == []
    assert first_cuts({"ids": padded(9, 4, 3, 6)}, N) == [right]
    assert first_cuts({"ids": padded(9, 7, 7, 9)}, N) == [(1, [1, 2], 9, slice(0, 7))]


def test_every_padded_example_comes_without_any_padding():
    """Beside itself, but for those that have none in the company of another."""

    def rows(*lengths: int) -> list[tuple[list[int], slice]]:
        mask = (padded(*lengths) != 0).long()
        return [(parts[0].rows, parts[0].kept) for parts in narrowed({"attention_mask": mask}, len(mask), each=True)]

    assert rows(9, 4, 3, 6) == [([1, 2], slice(0, 4)), ([2, 2], slice(0, 3)), ([3, 3], slice(0, 6))]
    assert rows(9, 4, 4, 6) == [([1, 2], slice(0, 4)), ([3, 3], slice(0, 6))]
    assert rows(9, 4, 9, 9) == [([1], slice(0, 4))] and rows(9, 9, 9, 9) == []


def test_what_is_no_padding():
    """A word that one text ends in twice, borders that all have, rows without any token, tables, numbers."""
    one = padded(9, 9, 9, 9)
    one[2, -3:] = 50
    assert first_cuts({"ids": one}, N) == [] == first_cuts({"ids": one[1:]}, 3)
    one[1, -1] = 50  # another ends in that word, once
    assert first_cuts({"ids": one}, N) == []
    one[1, -2:] = 50
    assert first_cuts({"ids": one}, N) == [(1, [1, 2], 9, slice(0, 7))]
    assert first_cuts({"ids": padded(5, 5, 5, 5)}, N) == []
    assert first_cuts({"ids": padded(8, 9, 9, 9)}, N) == []
    mask = (padded(9, 0, 7, 9) != 0).long()
    assert first_cuts({"attention_mask": mask}, N) == [(1, [2], 9, slice(0, 7))]
    assert first_cuts({"attention_mask": (padded(9, 9, 9, 9) != 0).long()}, N) == []
    for tree in (
        {"table": padded(9, 4, 3, 6, 2)},
        {"x": zeros(N)},
        {"x": zeros(N, 0)},
        {"text": "mask"},
        {"attention_mask": zeros(N, 0)},
        {"labels": torch.full((N, 3), -100.0)},
        {"x": torch.rand(N, 1)},
    ):
        assert first_cuts(tree, N) == []


@pytest.mark.parametrize(
    "tree",
    [
        {"ids": padded(9, 4, 3, 6, fill=-100)},
        {"labels": padded(9, 4, 3, 6, fill=-100).float()},
        {"labels": padded(9, 4, 3, 6, fill=-100).unsqueeze(2)},
        {"masks": padded(9, 4, 3, 6).unsqueeze(2)},
    ],
)
def test_only_labels_of_tokens_are_ignored(tree):
    assert first_cuts(tree, N, by_runs=False) == []


def test_masks_tell_more_than_runs_do():
    """Where a mask shows padding, no run of words is taken for some; where it is all ones, it tells nothing."""
    ids = padded(9, 4, 3, 6)
    assert first_cuts({"ids": ids, "mask_of_examples": torch.tensor([1, 0, 1, 1])}, N) == [(1, [1, 2], 9, slice(0, 4))]
    for mask, expected in ((padded(9, 9, 8, 9), [slice(0, 8)]), (torch.ones(N, 9), [slice(0, 4)])):
        found = first_cuts({"ids": ids, "attention_mask": (mask != 0).long()}, N)
        assert [kept for _, _, _, kept in found] == expected
    images = {"pixels": torch.rand(N, 3, 8, 8), "pixel_mask": torch.ones(N, 8, 8)}
    images["pixel_mask"][1:, :, 5:] = 0
    images["pixel_mask"][3, :, 4:] = 0
    assert (2, [1, 2], 8, slice(0, 5)) in first_cuts(images, N) or (2, [1, 3], 8, slice(0, 5)) in first_cuts(images, N)


@pytest.mark.parametrize("place", [1, 2, 3])
@pytest.mark.parametrize("left", [False, True])
def test_padding_of_images_is_found_in_every_dimension(place, left):
    x = 1 + torch.rand(N, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    for row, border in ((1, 3), (3, 1)):
        x[row].narrow(place - 1, 0 if left else 8 - border, border).zero_()
    assert first_cuts({"x": x}, N) == [(place, [1, 3], 8, slice(1, 8) if left else slice(0, 7))]
    x[:].narrow(place, 0 if left else 5, 3).zero_()
    assert first_cuts({"x": x}, N) == []


def test_padding_of_images_is_what_most_of_them_end_in():
    x = 1 + torch.rand(N, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    x[1:3, :, :, 7:], x[3, :, :, 6:] = 0, 5
    assert first_cuts({"x": x}, N) == [(3, [1, 2], 8, slice(0, 7))]


def test_a_part_has_what_is_left_for_models_that_take_some_lengths_only():
    tree = {"ids": padded(40, 3, 5, 20, width=40), "attention_mask": (padded(40, 3, 5, 20, width=40) != 0).long()}
    (parts,) = list(narrowed(tree, N))
    assert [part.kept.stop for part in parts] == [5, 6, 8, 16] and {part.tokens for part in parts} == {40}
    assert parts[0].mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert torch.equal(parts[0].call["ids"], tree["ids"][[1, 2], :5])
    long = {"attention_mask": (padded(300, 100, 130, 299, width=300) != 0).long()}
    assert [part.kept.stop for part in next(iter(narrowed(long, N)))] == [130, 136, 144, 192]


def test_what_goes_with_a_tensor_is_cut_with_it():
    tree = {
        "ids": torch.rand(N, 9),
        "features": torch.rand(N, 9, 9),
        "attention_mask": torch.rand(N, 9),
        "mask_of_pairs": torch.rand(N, 1, 9, 9),
        "mask_of_both": torch.rand(N, 9, 9),
        "heads": torch.rand(N, 2, 9),
        "other": torch.rand(N, 8),
        "table": torch.rand(9, 3),
        "number": 9,
    }
    found = cut(tree, "['ids']", 1, 9, slice(2, 7))
    assert {name: tuple(leaf.shape) for name, leaf in found.items() if isinstance(leaf, Tensor)} == {
        "ids": (N, 5),
        "features": (N, 5, 9),
        "attention_mask": (N, 5),
        "mask_of_pairs": (N, 1, 5, 5),
        "mask_of_both": (N, 5, 5),
        "heads": (N, 2, 9),
        "other": (N, 8),
        "table": (9, 3),
    }
    assert torch.equal(found["features"], tree["features"][:, 2:7]) and found["number"] == 9
    assert torch.equal(found["mask_of_pairs"], tree["mask_of_pairs"][:, :, 2:7, 2:7])
    found = cut(tree, "['heads']", 2, 9, slice(0, 4))
    assert found["heads"].shape == (N, 2, 4) and found["features"].shape == (N, 4, 4)
    # Of the tensor itself, the dimension that was padded alone.
    assert cut({"x": torch.rand(N, 9, 9)}, "['x']", 2, 9, slice(0, 4))["x"].shape == (N, 9, 4)


def test_the_sizes_of_what_an_example_holds():
    tree = {"ids": torch.rand(N, 9), "labels": torch.rand(N), "table": torch.rand(9, 3), "images": torch.rand(N, 3, 8)}
    assert set(widths(tree, N)) == {(9,), (), (3, 8)} and len(widths(tree, N)) == 3  # type: ignore[call-overload,arg-type]
    assert widths(tree, N) == widths({**tree, "table": torch.rand(8, 3)}, N) != widths({**tree, "ids": zeros(N, 8)}, N)


def test_which_tokens_are_used_is_what_masks_and_labels_say():
    ids = padded(9, 4, 3, 6)
    assert used_tokens({"ids": ids}, N) is None  # a run of one word says nothing here
    for tree in ({"ids": ids, "attention_mask": (ids != 0).long()}, {"labels": ids.where(ids != 0, -100)}):
        found = used_tokens(tree, N)
        assert found is not None and torch.equal(found, ids != 0)


def test_copies_of_one_example_have_padding_where_it_ends_in_one_word():
    """What all rows have is a border, unless all rows are the same example."""
    assert first_cuts({"ids": torch.tensor([[1, 2, 0, 0, 0]] * 2)}, 2) == [(1, [0, 1], 5, slice(0, 2))]
    assert first_cuts({"ids": torch.tensor([[1, 2, 0, 0, 0], [3, 2, 0, 0, 0]])}, 2) == []


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


def test_runs_of_whole_numbers_alone_may_be_asked_for():
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0]])
    found = list(narrowed({"ids": ids, "x": ids.float()}, 3, by_runs="whole numbers"))
    assert [lengths[0].name for lengths in found] == ["['ids']"]


@pytest.mark.parametrize("value", [0.0, -1.0, torch.inf, torch.nan])
def test_padding_is_any_one_value(value):
    x = torch.randn(3, 6, 4)
    for row, length in enumerate((6, 3, 2)):
        x[row, length:] = value
    assert first_cuts({"x": x}, 3)[0] == (1, [1, 2], 6, slice(0, 3))


# Numbers


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
