"""What the sizes of a model's arguments tell from batch to batch."""

from typing import Any

import torch

from lora_dp.isolation.batches.sizes import Sizes


def sizes_of(*batches: tuple[int, dict[str, tuple[int, ...]]]) -> Any:
    known = Sizes()
    for n, shapes in batches:
        seen = known.look({name: torch.zeros(shape) for name, shape in shapes.items()}, n)
    return seen


def test_a_tensor_is_a_table_if_it_follows_a_width_or_stays():
    def tables(*batches: Any) -> set[str]:
        return {name.strip("[']") for name in sizes_of(*batches).tables}

    def ids(n: int, width: int, *shape: int) -> tuple[int, dict[str, tuple[int, ...]]]:
        return n, {"ids": (n, width), "it": shape}

    assert tables(ids(4, 9, 9)) == tables(ids(4, 9, 9, 9)) == tables(ids(4, 9, 9, 3)) == {"it"}
    assert tables(ids(4, 9, 7)) == tables(ids(4, 9, 4)) == tables(ids(4, 9, 1, 9)) == tables(ids(9, 9, 9)) == set()
    assert tables(ids(4, 9, 7), ids(5, 8, 7)) == tables(ids(4, 9, 7), ids(7, 8, 7)) == {"it"}
    assert tables(ids(4, 9, 9), ids(8, 8, 8)) == {"it"}
    assert tables(ids(4, 9, 7), ids(4, 9, 7)) == set()  # as many examples as before tell nothing
    assert tables(ids(7, 9, 7), ids(7, 8, 7), ids(5, 8, 7)) == {"it"}
    # Rows of the examples, whose number changes: by example in one batch, as many as a width or as before in another.
    for last in (ids(6, 9, 6), ids(7, 8, 8), ids(5, 9, 6)):
        assert tables(ids(4, 9, 7), ids(5, 9, 6), last) == set()
    # What has always had an entry for each example, whatever else is as long.
    assert tables(ids(4, 4, 4), ids(5, 5, 5), ids(9, 9, 9), ids(4, 9, 4)) == set()
    # Known to have no entry for each example, from the first time on.
    assert tables(ids(4, 4, 4), ids(5, 5, 5), ids(9, 9, 9), ids(4, 9, 9), ids(4, 4, 4)) == {"it"}
    assert tables(ids(4, 9, 7), ids(5, 9, 7), ids(4, 9, 7)) == {"it"}
    assert tables(ids(7, 9, 7), ids(5, 9, 7), ids(8, 9, 7), ids(6, 9, 6), ids(5, 9, 7)) == set()
    assert tables((0, {"ids": (0, 9), "it": (9,)})) == set()
    assert tables(ids(4, 9, 2), ids(5, 9, 2)) == {"it"}
    assert tables(ids(4, 9, 1), ids(5, 9, 1)) == set()  # one row for all examples
    # As long as a width of what is not by example, as another table is.
    assert tables((4, {"ids": (4, 9), "it": (7, 3), "other": (8, 7)})) == set()


def test_what_of_a_table_follows_no_width_is_remembered():
    first, second = (4, {"ids": (4, 9), "it": (9, 8)}), (4, {"ids": (4, 8), "it": (8, 8)})
    assert sizes_of(second).tables == {"['it']": frozenset()}
    assert sizes_of(first, second).tables == {"['it']": frozenset({1})}


def test_what_has_been_of_several_sizes():
    batches = [(4, {"ids": (4, 9), "x": (4, 3, 8), "y": (4,)}), (5, {"ids": (5, 9), "x": (5, 3, 7), "y": (5, 1)})]
    assert sizes_of(batches[0]).varied == set() and not sizes_of(batches[0], batches[0]).number
    assert sizes_of(*batches).varied == {("['x']", 2)} and sizes_of(*batches).number
    assert sizes_of(*batches, (5, {"ids": (5, 9)})).varied == {("['x']", 2)}


def test_a_width_that_is_the_number_of_one_batch_alone_follows_nobody():
    sizes, x = Sizes(), torch.ones(4, 2)
    for n, width in ((4, 4), (4, 4), (6, 5), (5, 5), (7, 7)):
        assert not sizes.look({"x": torch.ones(n, 2), "row": torch.ones(1, width)}, n).sideways
    sizes = Sizes()
    for n in (1, 0, 4, 4):
        assert not sizes.look({"x": torch.ones(n, 2), "row": torch.ones(1, n), "square": torch.ones(n, n)}, n).sideways
    assert sizes.look({"x": x[:3], "row": torch.ones(1, 3), "square": torch.ones(3, 3)}, 3).sideways == {"['row']": 1}
