"""What tells two kinds of batches apart, and on which of its examples a trial is made."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_dp.isolation.batches.kinds import chosen, extremes, structure
from tests.isolation.batches.call_values import N, zeros


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
