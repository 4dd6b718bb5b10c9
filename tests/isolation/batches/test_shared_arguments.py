"""What all examples of a batch share among a model's arguments must change nothing where it differs."""

import enum
import functools
import math
from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lora_dp.engine.hooks
from lora_dp import DPLinear, IsolationError
from lora_dp.isolation.batches.shared_arguments import ABSENT, Keyword, SharedArguments, shared_in, with_shared
from lora_dp.isolation.batches.tables import Table
from tests.models import assert_refuses, examples
from tests.support import training_forwards


class Length(enum.Enum):
    SHORT = "short"
    LONG = "long"


class Switched(nn.Module):
    """Looks at the first columns alone, unless it is told that the batch holds something long."""

    def __init__(self, is_long: Callable[[Any], bool]):
        super().__init__()
        self.inner, self.is_long = DPLinear(6, 3), is_long

    def forward(self, x: Tensor, long: Any = None, harmless: Any = None) -> Tensor:
        return self.inner(x if self.is_long(long) else x * (torch.arange(6) < 3))


# How a batch without and one with something long may say so, and how a model asks.
SWITCHES: dict[str, tuple[Any, Any, Callable[[Any], bool]]] = {
    "bool": (False, True, bool),
    "text": ("no", "yes", lambda it: it == "yes"),
    "NumPy's": (np.bool_(False), np.bool_(True), bool),
    "bytes": (b"0", b"1", lambda it: it == b"1"),
    "an enumeration": (Length.SHORT, Length.LONG, lambda it: it is Length.LONG),
    "a dtype": (torch.int32, torch.int64, lambda it: it is torch.int64),
    "complex": (0j, 1j, bool),
    "None or True": (None, True, bool),
    "True or None": (True, None, lambda it: not it),
    "a number of one dimension": (torch.zeros(1), torch.ones(1), bool),
    "a bool of two": (torch.tensor([[False]]), torch.tensor([[True]]), bool),
    "an array": (np.array([False]), np.array([True]), bool),
    "a row for all": (torch.zeros(1, 6), torch.ones(1, 6), lambda it: bool(it.any())),
    "a table": (torch.zeros(7), torch.ones(7), lambda it: bool(it.any())),
    "in an object": (
        SimpleNamespace(any=np.bool_(False)),
        SimpleNamespace(any=np.bool_(True)),
        lambda it: bool(it.any),
    ),
    "an array of texts": (np.array(["no"] * 3), np.array(["no", "yes", "no"]), lambda it: "yes" in it),
    "a set": ({"no"}, {"no", "yes"}, lambda it: "yes" in it),
    "many settings": (
        dict.fromkeys(map(str, range(70)), 0),
        {**dict.fromkeys(map(str, range(70)), 0), "5": 1},
        lambda it: it["5"] == 1,
    ),
    "a function": (lambda: False, lambda: True, lambda it: it()),
    "a height and a width": ((4, 8), (4, 16), lambda it: it[1] > 8),
}


def private(model: nn.Module) -> tuple[nn.Module, Callable[..., None]]:
    call = training_forwards(model)
    return model, lambda n, **arguments: call(examples(n)[0], **arguments)


@pytest.mark.parametrize("kind", SWITCHES)
def test_what_differs_from_batch_to_batch_must_change_nothing(kind: str) -> None:
    short, long, is_long = SWITCHES[kind]
    _, call = private(Switched(is_long).train())
    for n, harmless in zip((4, 5, 3, 6), (short, short, long, short), strict=True):
        call(n, long=short, harmless=harmless)
    assert_refuses(IsolationError, r"The argument [1]['long']", lambda: call(5, long=long, harmless=short))


@pytest.mark.parametrize(
    ("first", "later"), [({}, {"long": True}), ({"long": True}, {}), ({"long": None}, {"long": 1})]
)
def test_a_setting_that_is_given_in_some_batches_must_change_nothing(first: Any, later: Any) -> None:
    _, call = private(Switched(bool).train())
    for harmless in ({}, {"harmless": 3}, {}):
        call(4, **first, **harmless)
    assert_refuses(IsolationError, "of the model differs from batch to batch", lambda: call(5, **later))


class Holder:
    def __init__(self, **held: Any):
        vars(self).update(held)

    def get(self, name: str) -> Any:
        return getattr(self, name, None)


class Illustrated(nn.Module):
    """Texts with images, without which the model computes otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.image = DPLinear(6, 3), nn.Linear(4, 3).requires_grad_(False)

    def forward(self, x: Tensor, image: Any = None, more: Any = None) -> Tensor:
        image = image if more is None else more.get("image")
        return self.inner(x) if image is None else self.inner(x).square() + self.image(torch.as_tensor(image))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("without", [{}, {"image": None}])
@pytest.mark.parametrize(
    "dress",
    [
        lambda it: it,
        lambda it: {"more": it},
        lambda it: {"more": UserDict(it)},
        lambda it: {"more": Holder(**it)},
        list,
    ],
    ids=["tensor", "in a dict", "in a mapping", "in an object", "list"],
)
def test_rows_that_are_given_in_some_batches_alone_are_refused(dress: Any, without: Any, first: bool) -> None:
    _, call = private(Illustrated().train())

    def batch(n: int, illustrated: bool) -> dict[str, Any]:
        given = {"image": torch.randn(n, 4)} if illustrated else without
        return (
            dress(given)
            if dress is not list
            else {name: None if value is None else value.tolist() for name, value in given.items()}
        )

    call(4, **batch(4, first))
    call(3, **batch(3, first))
    call(1, **batch(1, not first))  # nobody is beside it
    for n in (5, 2):
        assert_refuses(
            IsolationError,
            "['image'] is given in some batches and not in others, so that what one",
            functools.partial(call, n, **batch(n, not first)),
        )


def test_what_does_not_fit_as_it_was_is_refused() -> None:
    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = DPLinear(6, 3)

        def forward(self, x: Tensor, rows: Tensor, width: int) -> Tensor:
            return self.inner(x) + rows.view(-1, width, 3).sum(1)

    _, call = private(Shaped().train())
    call(4, rows=torch.randn(4, 6), width=2)
    assert_refuses(
        IsolationError,
        "the model does not take it as it was in an earlier one (RuntimeError)",
        lambda: call(4, rows=torch.randn(4, 9), width=3),
    )


@pytest.mark.parametrize("count", [8, 9])
def test_where_much_differs_it_is_put_back_at_once(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, call = private(Switched(lambda long: long["7"] > 3).train())
    call(4, long={str(i): i // 8 for i in range(count)})
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(0))
    call(4, long={str(i): 1 + i // 8 for i in range(count)})
    many = len(passes)
    passes.clear()
    call(4, long={str(i): i // 8 + (i == 0) for i in range(count)})  # of one alone, one
    assert many - len(passes) == (7 if count == 8 else 0)
    assert_refuses(
        IsolationError,
        "differs from batch to batch and changes",
        lambda: call(4, long={str(i): 4 + i for i in range(count)}),
    )


def test_a_larger_batch_leaves_what_is_shared_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    checked = lora_dp.engine.hooks.check_isolation
    monkeypatch.setattr(
        lora_dp.engine.hooks,
        "check_isolation",
        lambda *args, **options: (tried.append(options["earlier"]), checked(*args, **options))[1],
    )
    monkeypatch.setattr(lora_dp.engine.hooks, "drawn_for_test", lambda: False)
    _, call = private(Switched(bool).train())
    for n in (0, 5, 6, 0, 7):
        call(n, long=False, harmless="of none" if n == 0 else "of some")
    assert tried == [{}]


# Each by itself


def test_shared_is_what_is_no_row_of_an_example() -> None:
    table = torch.ones(2)
    call = (
        (torch.ones(3, 2), 5),
        {
            "rows": torch.ones(7),
            "one": torch.ones(1, 4),
            "table": Table(table, frozenset()),
            "single": torch.tensor(1),
            "text": "a",
            "nothing": None,
        },
        None,
    )
    found = shared_in(call, 3)
    assert list(found) == [
        "[0][1]",
        "[1]['one']",
        "[1]['table']",
        "[1]['single']",
        "[1]['text']",
        "[1]['nothing']",
        "[2]",
    ]
    assert found["[1]['table']"] is table and found["[0][1]"] == 5
    assert "[1]['one']" not in shared_in(call, 1)


def test_what_is_shared_is_put_in() -> None:
    table = Table(torch.ones(2), frozenset({0}))
    call = ((1,), {"a": 2, "b": {"c": None}, "table": table, "gone": 3}, 4)
    values = {
        "[0][0]": 5,
        "[1]['b']['c']": "x",
        "[1]['table']": torch.zeros(2),
        "[2]": 6,
        Keyword("new"): [7],
        Keyword("gone"): ABSENT,
        "[1]['a']": None,
    }
    args, kwargs, targets = with_shared(call, values)
    assert args == (5,) and targets == 6 and list(kwargs) == ["a", "b", "table", "new"]
    assert kwargs["a"] is None and kwargs["b"] == {"c": "x"} and kwargs["new"] == [7]
    assert torch.equal(kwargs["table"].tensor, torch.zeros(2)) and kwargs["table"].free == {0}
    assert call[1]["gone"] == 3 and "new" not in call[1] and with_shared(call, {})[1] == call[1]


def test_values_are_compared_with_the_first() -> None:
    one = torch.tensor([[1.0, math.nan]])
    shared = SharedArguments()

    def changed(**arguments: Any) -> dict[str, Any]:
        return shared.changed(((), arguments), 3)

    assert changed(a=1, t=one) == {}
    assert changed(a=1, t=one.clone()) == {}
    assert changed(a=1, t=torch.ones(1, 5)) == {}  # of another shape
    one.zero_()  # the user's own
    found = changed(a=1.0, t=torch.tensor([[1.0, 2.0]]))
    assert found.keys() == {"[1]['a']", "[1]['t']"} and found["[1]['a']"] == 1
    assert found["[1]['t']"][0, 0] == 1 and found["[1]['t']"][0, 1].isnan()
    assert changed(a=2, t=torch.tensor([[1.0, math.nan]])) == {"[1]['a']": 1}
    assert changed(a=True, t=torch.tensor([[1.0, math.nan]]).double()).keys() == {"[1]['a']", "[1]['t']"}
    assert changed(a=torch.tensor(1), t=3).keys() == {"[1]['a']", "[1]['t']"}


def test_what_the_user_changes_is_kept_as_it_was() -> None:
    shared, words, names = SharedArguments(), {"a"}, np.array(["a", "b"])
    assert shared.changed(((), {"words": words, "names": names}), 3) == {}
    words.add("b")
    names[0] = "c"
    weights = torch.ones(1, 2, requires_grad=True)
    assert shared.changed(((), {"words": {"a"}, "names": names.copy(), "weights": weights}), 3).keys() == {
        "[1]['names']",
        "weights",
    }
    again = shared.changed(((), {"words": {"a"}, "names": names, "weights": torch.zeros(1, 2)}), 3)["[1]['weights']"]
    assert not again.requires_grad and again.tolist() == [[1, 1]]
    found = shared.changed(((), {"words": words, "names": names}), 3)
    assert found["[1]['words']"] == {"a"} and found["[1]['names']"].tolist() == ["a", "b"]


def test_what_comes_and_goes_is_put_back_as_it_was() -> None:
    shared = SharedArguments()
    assert shared.changed(((), {"x": torch.ones(3), "a": 1, "d": {"k": 2}}), 3) == {}
    assert shared.changed(((), {"x": torch.ones(3), "d": {"k": 2}}), 3) == {"a": 1}
    assert shared.changed(((), {"x": torch.ones(3), "a": 1}), 3) == {"d": {"k": 2}}
    assert shared.changed(((), {"x": torch.ones(3), "a": 1, "d": {"k": 2}, "new": 5}), 3) == {"new": ABSENT}
    assert shared.changed(((), {"x": torch.ones(1), "a": 1}), 1) == {}
    found = shared.changed(((), {"x": torch.ones(3), "d": {"k": 2}}), 3)
    assert [type(name) for name in found] == [Keyword]
