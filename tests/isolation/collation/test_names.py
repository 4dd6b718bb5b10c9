"""Names in a batch that come and go with its examples, and entries that are called by their example."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from lora_dp import IsolationError
from lora_dp.engine.data_loader import PrivateDataLoader
from lora_dp.isolation.collation.names import arguments
from lora_dp.isolation.collation.trial import check_collation
from lora_dp.privacy.randomness import SeededSource
from tests.models import examples

Collate = Callable[[list[Any]], Any]


def data(n: int, marked: int) -> list[tuple[Tensor, bool]]:
    """Rows, one of which is marked, or all but one."""
    return [(x, place == marked if marked >= 0 else place != -marked) for place, x in enumerate(examples(n)[0])]


def check(items: list[Any], collate: Collate) -> bool:
    return check_collation(items, collate, range(len(items)), collate(items))


def noisy(x: Tensor) -> Tensor:
    return x + torch.randn(len(x), 1)


# What all examples of a batch have as soon as one has it.
TOGETHER: dict[str, Callable[[list[Any]], Any]] = {
    "tensor": lambda items: torch.stack([x * marked for x, marked in items]),
    "last": lambda items: torch.stack([x * marked for x, marked in items], 1),
    "list": lambda items: [x if marked else None for x, marked in items],
    "list of dicts": lambda items: [{"x": x} if marked else {"x": None} for x, marked in items],
    "numbers": lambda items: [float(marked) for _, marked in items],
    "texts": lambda items: ["yes" if marked else "" for _, marked in items],
    "at random": lambda items: noisy(torch.stack([x * marked for x, marked in items])),
}


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 4, 5, 12])
@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize(
    "dress",
    [
        lambda x, it: {"x": x} if it is None else {"x": x, "it": it},
        lambda x, it: {"x": x, "it": it},
        lambda x, it: SimpleNamespace(x=x, it=it),
        lambda x, it: (x,) if it is None else (x, it),
    ],
    ids=["absent", "None", "object", "tuple"],
)
def test_what_all_have_as_soon_as_one_has_it_is_refused(dress, name, n):
    def collate(items: list[Any], needed: Callable[..., bool]) -> Any:
        x = torch.stack([x for x, _ in items])
        if name == "at random":
            x = noisy(x)
        return dress(x, TOGETHER[name](items) if needed(marked for _, marked in items) else None)

    for needed, marked in ((any, n // 2), (all, -(n // 2)), (any, n - 1)):
        with pytest.raises(IsolationError, match=r"joins examples: \S+, which has rows of all examples, is there with"):
            check(data(n, marked), lambda items, needed=needed: collate(items, needed))


def seen(place: int) -> dict[str, Any]:
    """A text, and images with some."""
    draws = torch.Generator().manual_seed(place)
    return {
        "ids": torch.randint(1, 99, (5 + place % 4,), generator=draws),
        "images": list(torch.randn((0, 1, 0, 2, 1, 0)[place % 6], 3, 4, generator=draws)),
    }


def stacked_images(items: list[Any], *, empty: Any = None, named: bool = True) -> dict[str, Any]:
    images = [image for item in items for image in item["images"]]
    found = {"ids": pad_sequence([item["ids"] for item in items], True)}
    if images:
        return {
            **found,
            "images": torch.stack(images),
            "grid": torch.tensor([[len(image), 4] for image in images]),
            "largest": max(float(image.shape[0]) for image in images),
        }
    return {**found, "images": empty} if named else found


# What comes and goes with the examples, and says nothing of others than those that have it.
INNOCENT: dict[str, tuple[Callable[[int], Any], Collate]] = {
    "images that some have": (seen, lambda items: stacked_images(items, named=False)),
    "None, else images that some have": (seen, stacked_images),
    "nothing, else images that some have": (seen, lambda items: stacked_images(items, empty=torch.zeros(0, 3, 4))),
    "one image each": (lambda place: {**seen(place), "images": seen(1)["images"] * (place % 2)}, stacked_images),
    "entries": (seen, lambda items: [{name: part for name, part in item.items() if len(part)} for item in items]),
    "columns": (seen, lambda items: {name: [item[name] for item in items] for name in items[0]}),
    "by number of examples": (seen, lambda items: {f"of {len(items)}": torch.zeros(len(items))}),
    "by chance": (
        seen,
        lambda items: {
            "x": torch.zeros(len(items)),
            **({"y": torch.zeros(len(items), 2)} if torch.rand(()) < 0.5 else {}),
        },
    ),
    "called by their example": (lambda place: (f"no. {place}", examples(40)[0][place]), dict),
    "called by their example, at random": (
        lambda place: (f"no. {place}", examples(40)[0][place]),
        lambda items: {name: x * torch.rand(()) for name, x in items},
    ),
    "called by their example, deep": (
        lambda place: (place, examples(40)[0][place]),
        lambda items: {
            "of": {number: {"x": x, "name": f"no. {number}"} for number, x in items},
            "x": torch.stack([x for _, x in items]),
        },
    ),
    "called by their example, padded": (
        lambda place: (place, torch.ones(3 + place % 4)),
        lambda items: dict(
            zip([number for number, _ in items], pad_sequence([x for _, x in items], True), strict=True)
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 4, 5, 12, 20])
@pytest.mark.parametrize("name", INNOCENT)
def test_what_comes_and_goes_with_its_example_is_taken(name, n):
    item, collate = INNOCENT[name]
    for start in range(4):
        check([item(start + place) for place in range(n)], collate)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 12])
@pytest.mark.parametrize(
    "own",
    [
        lambda x, other: x + other,
        lambda x, other: {"x": [x.numpy() * other.numpy()]},
        lambda x, other: (x, f"beside {float(other[0])}"),
        lambda x, other: other.argsort(),
    ],
)
def test_entries_that_are_called_by_their_example_may_not_be_joined(own, n):
    items = list(enumerate(examples(n)[0]))
    with pytest.raises(IsolationError, match=r"joins examples: \S*\[\d+\]\S*, which one example alone has, changes"):
        check(
            items,
            lambda items: {"of": {number: own(x, items[place - 1][1]) for place, (number, x) in enumerate(items)}},
        )


@pytest.mark.parametrize("absent", [False, True])
def test_the_first_batch_with_an_argument_that_others_lack_is_tried(absent, monkeypatch):
    """Of a hundred examples one has an image, which the first batch seldom holds."""
    import lora_dp.engine.data_loader

    def collate(items: list[Any]) -> dict[str, Any]:
        marked = [y for _, y in items]
        image = torch.tensor(marked).float() if any(marked) else None
        found = {"x": torch.stack([x for x, _ in items]), "image": image}
        return {name: part for name, part in found.items() if part is not None or not absent}

    tried: list[bool] = []
    monkeypatch.setattr(lora_dp.engine.data_loader, "drawn_for_test", lambda: False)
    monkeypatch.setattr(
        lora_dp.engine.data_loader, "check_collation", lambda *args: bool(tried.append("image" in arguments(args[3])))
    )
    loader = DataLoader(data(100, 7), batch_size=20, collate_fn=collate)  # type: ignore[arg-type]
    list(PrivateDataLoader(loader, SeededSource(0), lambda size: None, lambda: None).take(60))
    assert sorted(tried) == [False, True]


def test_batches_of_other_arguments_each_time_are_not_always_tried(monkeypatch):
    import lora_dp.engine.data_loader

    tried: list[bool] = []
    monkeypatch.setattr(lora_dp.engine.data_loader, "drawn_for_test", lambda: False)
    monkeypatch.setattr(lora_dp.engine.data_loader, "check_collation", lambda *args: bool(tried.append(True)))
    loader: Any = DataLoader(list(range(100)), batch_size=20, collate_fn=lambda items: dict.fromkeys(items, 1))  # type: ignore[arg-type]
    list(PrivateDataLoader(loader, SeededSource(0), lambda size: None, lambda: None).take(20))
    assert len(tried) == 8


def test_arguments_are_what_has_something():
    assert arguments({"x": 1, "y": None}) == {"x"} and arguments((None, 1)) == {1} and arguments([1]) == set()
