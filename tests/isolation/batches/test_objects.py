"""What a model is given in NumPy arrays, mappings and objects is taken apart by example, as tensors are."""

import itertools
from collections import ChainMap, Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import BatchEncoding, BertConfig

from lora_dp import DPLinear, IsolationError, PrivacyEngine
from lora_dp.isolation.batches.lists import as_lists, as_tensors
from lora_dp.isolation.batches.objects import NumberArray, Opened
from tests.isolation.batches.object_arguments import ByAttribute, Lengths, Tree, lengths_of, train
from tests.support import make_private


class Texts(UserDict[str, Any]):
    """A mapping of a library's own."""


class Named(dict[str, Any]):
    """A dict of a library's own."""


class Store(MutableMapping[str, Any]):
    """A mapping that keeps its entries in an attribute."""

    def __init__(self, **entries: Any):
        self.store = dict(entries)

    def __getitem__(self, key: str) -> Any:
        return self.store[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.store[key] = value

    def __delitem__(self, key: str) -> None:
        del self.store[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.store)

    def __len__(self) -> int:
        return len(self.store)


class ReadOnly(Store):
    """A configuration that nobody changes."""

    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("read-only")


class Fixed(dict[str, Any]):
    """A dict that is neither changed nor copied."""

    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("read-only")

    def __reduce__(self) -> Any:
        raise TypeError("not copied")


class Ordered(OrderedDict[str, Any]):
    """Keeps its order elsewhere than a dict does."""


class Filled(defaultdict[str, Any]):
    """Makes what is not there."""


class Rows(list[Any]):
    """A list of a library's own."""


class Slotted:
    __slots__ = ("each",)

    def __init__(self, each: Any):
        self.each = each


class Handle:
    """Closes what it holds."""

    def __init__(self, each: Any):
        self.each = each

    def __del__(self) -> None:
        getattr(self, "each", []).clear()


def with_an_attribute(texts: Any, each: Any) -> Any:
    texts.each = each
    return texts


class Recorded(np.ndarray):
    """An array that may hold more than its rows."""


# What holds the lengths of N texts, and how a model gets at them.
DRESSES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Any]]] = {
    "an array": (lambda t: t.numpy(), lambda given: given),
    "an array of small numbers": (lambda t: t.numpy().astype(np.uint16), lambda given: given),
    "an array in a dict": (lambda t: {"each": t.numpy()}, lambda given: given["each"]),
    "a namespace": (lambda t: SimpleNamespace(each=t), lambda given: given.each),
    "a namespace with a list": (lambda t: SimpleNamespace(each=t.tolist()), lambda given: torch.tensor(given.each)),
    "a frozen dataclass": (Lengths, lambda given: given.each),
    "a tokenizer's output": (lambda t: BatchEncoding({"each": t}), lambda given: given.each),
    "a mapping": (lambda t: Texts(each=t), lambda given: given["each"]),
    "a dict of its own": (lambda t: Named(each=t), lambda given: given["each"]),
    "an object in an object": (lambda t: Lengths(SimpleNamespace(each=t.numpy())), lambda given: given.each.each),
    "an attribute that is an entry": (lambda t: ByAttribute(each=t), lambda given: given.each),
    "an entry that is an attribute": (lambda t: ByAttribute(each=t), lambda given: given["each"]),
    "an attribute of a mapping": (
        lambda t: with_an_attribute(Texts(x=torch.zeros(len(t))), t.tolist()),
        lambda given: torch.tensor(given.each),
    ),
    "an object that a dict has": (
        lambda t: with_an_attribute(Named(ids=1), SimpleNamespace(each=t)),
        lambda given: given.each.each,
    ),
    "a mapping that keeps its entries": (lambda t: Store(each=t), lambda given: given["each"]),
    "several mappings": (lambda t: ChainMap({"a": 1}, {"each": t}), lambda given: given["each"]),
    "a mapping that is read-only": (lambda t: ReadOnly(each=t), lambda given: given["each"]),
    "a dict that is read-only": (lambda t: Fixed(each=t), lambda given: given["each"]),
    "an ordered dict": (lambda t: Ordered(a=1, each=t), lambda given: given["each"]),
    "a dict that makes entries": (
        lambda t: Filled(list, each=t),
        lambda given: given["each"] if given["a"] == [] else None,
    ),
    "a part that knows the whole": (Tree, lambda given: given.part.whole.each),
    "a list of parts that know it": (Tree, lambda given: given.parts[0].siblings.each),
    "a method of its own": (Tree, lambda given: given.get()),
    "a slice": (lambda t: slice(None, t), lambda given: given.stop),
    "an array with a mask": (lambda t: np.ma.MaskedArray(t.numpy(), t.numpy() < 0), lambda given: given.filled(0)),
}


class Pooled(nn.Module):
    """The mean of a text's tokens: of its own, or of as many as the longest of the batch has."""

    def __init__(self, dress: str, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.dress, self.kind, self.given = dress, kind, []
        self.inner, self.head = DPLinear(6, 8), DPLinear(8, 3)

    def forward(self, x: Tensor, lengths: Any) -> Tensor:
        self.given.append(lengths)
        each = torch.as_tensor(DRESSES[self.dress][1](lengths)).long()
        if self.kind == "by the longest":
            return self.head(self.inner(x[:, : int(each.max())]).tanh().mean(1))
        used = (torch.arange(x.shape[1]) < each.unsqueeze(1)).unsqueeze(2)
        return self.head((self.inner(x).tanh() * used).sum(1) / each.unsqueeze(1))


@pytest.mark.parametrize("n", [2, 3, 9])
@pytest.mark.parametrize("dress", DRESSES)
def test_what_varies_by_example_in_them_is_seen(dress: str, n: int) -> None:
    model = Pooled(dress, "by the longest")
    optimizer = make_private(model, batch_size=4)
    x, lengths = lengths_of(n)
    with pytest.raises(IsolationError, match="example"):
        train(model, optimizer, x, DRESSES[dress][0](lengths))


@pytest.mark.slow
@pytest.mark.parametrize("dress", DRESSES)
def test_a_model_that_keeps_examples_apart_gets_them_as_they_were(dress: str) -> None:
    model = Pooled(dress, "apart")
    optimizer = make_private(model, batch_size=4)
    for n in (9, 2, 1, 5):
        x, lengths = lengths_of(n)
        train(model, optimizer, x, DRESSES[dress][0](lengths))
    assert len({type(given) for given in model.given}) == 1
    assert {len(DRESSES[dress][1](given)) for given in model.given} >= {1, 2, 4, 5, 9}


@pytest.mark.slow
@pytest.mark.parametrize("dress", DRESSES)
def test_what_the_user_gave_stays_as_it_was(dress: str) -> None:
    for n in (2, 3, 4, 9):
        model = Pooled(dress, "apart")
        optimizer = make_private(model, batch_size=4)
        x, lengths = lengths_of(n)
        before = lengths.clone()
        whole = DRESSES[dress][0](lengths)
        train(model, optimizer, x, whole)
        assert len(model.given) > 3 and model.given[-1] is whole
        assert torch.as_tensor(DRESSES[dress][1](whole)).tolist() == before.tolist()


def test_trials_write_nothing_into_what_the_user_gave() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = DPLinear(6, 3)

        def forward(self, x: Tensor, *given: Any) -> Tensor:
            for mapping in given:
                mapping["calls"] = mapping.get("calls", 0) + 1
            return self.head(x)

    given = [Store(a=1), Texts(a=1), Named(a=1), Ordered(a=1), Filled(int, a=1), ByAttribute(a=1), Counter(a=1)]
    model = Writing()
    optimizer = make_private(model, batch_size=4)
    for count in (1, 2):
        train(model, optimizer, torch.randn(4, 6), *given)
        assert [mapping["calls"] for mapping in given] == [count] * len(given)


def test_the_check_by_hand_takes_them_apart_too() -> None:
    x, lengths = lengths_of(5)
    engine = PrivacyEngine("rdp")
    engine.check_isolation(Pooled("an array", "apart"), {"x": x, "lengths": lengths.numpy()})
    with pytest.raises(IsolationError, match="example"):
        engine.check_isolation(Pooled("an array", "by the longest"), {"x": x, "lengths": lengths.numpy()})


class Masked(nn.Module):
    """Pools by a mask (N, T) that is an array; or takes the padding for text."""

    def __init__(self, looks: bool):
        super().__init__()
        torch.manual_seed(0)
        self.looks, self.inner = looks, DPLinear(6, 3)

    def forward(self, x: Tensor, mask: np.ndarray) -> Tensor:
        used = torch.from_numpy(mask).unsqueeze(2)
        if self.looks:
            used = torch.ones_like(used)
        return (self.inner(x).tanh() * used).sum(1) / used.sum(1)


@pytest.mark.parametrize("looks", [False, True])
def test_a_mask_in_an_array_shows_the_padding(looks: bool) -> None:
    model = Masked(looks)
    optimizer = make_private(model, batch_size=4)

    def run() -> None:
        for width in (7, 5):
            mask = torch.arange(width) < torch.tensor([width, 3, 2, 3]).unsqueeze(1)
            train(model, optimizer, torch.randn(4, width, 6) * mask.unsqueeze(2), mask.numpy())

    if looks:
        with pytest.raises(IsolationError, match="changes with the padding of the batch"):
            run()
    else:
        run()


def test_an_array_in_a_file_is_taken_as_one_in_memory(tmp_path: Path) -> None:
    x, lengths = lengths_of(9)
    kept = np.memmap(tmp_path / "lengths", np.int64, "w+", shape=9)
    kept[:] = lengths.numpy()
    assert isinstance(as_tensors(kept, 9), NumberArray)
    model = Pooled("an array", "by the longest")
    optimizer = make_private(model, batch_size=4)
    with pytest.raises(IsolationError, match="example"):
        train(model, optimizer, x, kept)
    assert kept.tolist() == lengths.tolist()


class Scaled(nn.Module):
    """Multiplies by an array that belongs to no example, and spoils what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.head = DPLinear(6, 3)

    def forward(self, x: Tensor, scale: np.ndarray) -> Tensor:
        out = self.head(x * torch.from_numpy(scale).float())
        scale *= 2
        return out


def test_trials_leave_an_array_as_it_was() -> None:
    model = Scaled()
    optimizer = make_private(model, batch_size=4)
    for _ in range(2):
        scale = np.linspace(1, 2, 6)
        train(model, optimizer, torch.randn(4, 6), scale)
        np.testing.assert_array_equal(scale, 2 * np.linspace(1, 2, 6))


@pytest.mark.parametrize("whole", [lambda number: np.array(number), lambda number: SimpleNamespace(number=number)])
def test_a_number_in_them_that_differs_from_batch_to_batch_is_tried(whole: Callable[[float], Any]) -> None:
    class Divided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = DPLinear(6, 3)

        def forward(self, x: Tensor, by: Any) -> Tensor:
            return self.head(x) / float(getattr(by, "number", by))

    model = Divided()
    optimizer = make_private(model, batch_size=4)
    train(model, optimizer, torch.randn(4, 6), whole(3.0))
    with pytest.raises(IsolationError, match="differs from batch to batch"):
        train(model, optimizer, torch.randn(4, 6), whole(4.0))


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({1: 2}.keys(), "builtins.dict_keys"),
        (iter([1, 2]), "builtins.list_iterator"),
        (Slotted(torch.ones(2)), r"\S*Slotted"),
        (MappingProxyType({"each": torch.ones(2)}), "builtins.mappingproxy"),
        (np.array([None, 1, 2]), "numpy.ndarray"),
        (np.ma.MaskedArray(np.ones(3)), r"numpy.ma.*MaskedArray"),
        (np.ones((3, 2)).view(Recorded), r"\S*Recorded"),
        (np.array(["a"] * 3).view(Recorded), r"\S*Recorded"),
        (slice({torch.ones(2)}), "builtins.set"),
        ({torch.ones(2)}, "builtins.set"),
        (memoryview(b"12"), "builtins.memoryview"),
        (Handle([1]), r"\S*Handle"),
        (Rows([torch.ones(2)]), r"\S*Rows"),
        (with_an_attribute(Texts(), Slotted(1)), r"\S*Slotted"),
        (with_an_attribute(Named(), Slotted(1)), r"\S*Slotted"),
    ],
)
def test_what_cannot_be_taken_apart_is_refused(given: Any, kind: str) -> None:
    class Ignoring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = DPLinear(6, 3)

        def forward(self, x: Tensor, other: Any, texts: list[str] | None) -> Tensor:
            return self.head(x)

    for n, texts in itertools.product((1, 2, 5), (None, ["a", "b", "c", "d", "e"])):
        model = Ignoring()
        make_private(model, batch_size=4)
        with pytest.raises(IsolationError, match=rf"given a {kind} \(\[1\]\['other'\].*: pass tensors, or lists or"):
            model(torch.randn(n, 6), other=given, texts=texts and texts[:n])


def test_a_call_comes_back_as_it_was() -> None:
    texts = Texts(ids=torch.ones(2, 3), more={"row": np.ones((2, 3), np.float16)[:, ::-1]})
    texts.source = "of its own"  # type: ignore[attr-defined]
    call = (
        [texts, Lengths(SimpleNamespace(list=[3, 4], array=np.array([1, 2], ">i4")))],
        {
            "wide": np.array([1, 2**40], np.uint64),
            "number": np.array(2.5),
            "long": np.array([0.5], np.longdouble),
            "shape": torch.Size([2, 3]),
            "flags": np.array([True, False]),
            "queue": deque([np.ones(2)]),
            "bytes": np.array([1, 2], np.uint8),
        },
    )
    given = as_tensors(call, 2)
    leaves = {pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(given)[0]}
    assert leaves["[0][0]['data']['more']['row']"].dtype == torch.float16
    assert leaves["[0][1]['each']['list']"].shape == (2,)
    assert leaves["[1]['shape'][1]"] == 3 and isinstance(given[0][0], Opened)
    (back, inner), rest = as_lists(given)
    assert type(back) is Texts and back is not texts and back.source == "of its own"
    assert back["ids"] is texts["ids"]
    np.testing.assert_array_equal(back["more"]["row"], texts["more"]["row"], strict=True)
    assert type(inner) is Lengths and inner.unit == "tokens" and inner.each.list == [3, 4]
    assert inner.each.array.tolist() == [1, 2] and inner.each.array.dtype == np.int32
    assert rest["wide"].tolist() == [1, 2**40] and rest["flags"].dtype == bool and rest["number"].shape == ()
    assert rest["bytes"].dtype == np.uint8 and rest["long"].dtype == np.float64
    assert rest["shape"] == (2, 3) and type(rest["queue"]) is deque
    assert type(as_lists(as_tensors(BertConfig(), 2))) is BertConfig


def test_what_a_list_of_as_many_holds_by_chance_is_refused() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = DPLinear(6, 3)

        def forward(self, x: Tensor, pair: list[Any]) -> Tensor:
            assert len(pair) == 2
            return self.head(x)

    model = Pairs()
    make_private(model, batch_size=4)
    with pytest.raises(IsolationError, match=r"given a \S*Slotted \(\[1\]\['pair'\]\[0\]\)"):
        model(torch.randn(2, 6), pair=[Slotted(torch.ones(2)), Slotted(torch.ones(2))])
