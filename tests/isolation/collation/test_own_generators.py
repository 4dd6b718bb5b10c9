"""Data sets and collate functions that draw from a generator of their own are refused, those that do not are taken."""

import collections
import functools
import random
import secrets
import time
from collections.abc import Callable, Iterator
from random import uniform
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from lora_dp import IsolationError, PrivacyEngine
from lora_dp.isolation.collation.own_generators import own_generators, states
from lora_dp.isolation.collation.trial import check_collation
from tests.models import assert_refuses, examples, mlp

OWN = "draws from a generator of its own"
REMEDY = "default generators of torch, NumPy or Python, or from a generator that is made anew for each example"
module_wide = np.random.default_rng(0)


def draws(seed: int) -> Iterator[float]:
    """Where nothing finds its generator."""
    rng = random.Random(seed)
    while True:
        yield rng.random()


unseen = draws(0)


class Augmented(Dataset[Tensor]):
    """24 examples, each times what ``draw`` gives for its index."""

    def __init__(self, draw: Callable[[int], float]) -> None:
        self.x = examples(24)[0]
        self.draw = draw

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        return self.x[index] * self.draw(index)


class Keeps(Augmented):
    """The generator is an attribute, as most write it."""

    def __init__(self, generator: Any, draw: Callable[[Any], float]) -> None:
        super().__init__(lambda index: draw(self.rng))
        self.rng = generator


class OfTheClass(Augmented):
    rng = random.Random(0)

    def __getitem__(self, index: int) -> Tensor:
        return self.x[index] * self.rng.random()


class Reseeded(Augmented):
    """Seeded anew by each example's index: it draws the same whoever else is there."""

    def __init__(self) -> None:
        super().__init__(self._draw)
        self.rng = np.random.RandomState()

    def _draw(self, index: int) -> float:
        self.rng.seed(index)
        return float(self.rng.rand())


def check(dataset: Dataset[Any], collate: Callable[[Any], Any] = default_collate) -> bool:
    indices = list(range(0, 16, 2))
    return check_collation(dataset, collate, indices, collate([dataset[i] for i in indices]))


def torch_draw(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))


KEPT = {
    "RandomState": lambda: Keeps(np.random.RandomState(0), lambda rng: float(rng.choice([-1.0, 1.0]))),
    "numpy": lambda: Keeps(np.random.default_rng(0), lambda rng: float(rng.random())),
    "bits": lambda: Keeps(np.random.PCG64(0), lambda bits: float(bits.random_raw() % 7)),
    "python": lambda: Keeps(random.Random(0), lambda rng: rng.random()),
    "torch": lambda: Keeps(torch.Generator().manual_seed(0), torch_draw),
    "class": lambda: OfTheClass(lambda index: 1.0),
    # Secret, and yet not to be told from the others.
    "unseeded": lambda: Keeps(np.random.default_rng(), lambda rng: float(rng.random())),
}


@pytest.mark.parametrize("kind", KEPT)
def test_a_generator_of_the_data_sets_own_is_refused_by_name(kind):
    with pytest.raises(IsolationError, match=rf"{OWN} \(\w+\.rng, a [\w.]+\), .*{REMEDY}"):
        check(KEPT[kind]())


def test_deep_inside_it_is_found_too():
    dataset = Subset(KEPT["numpy"](), range(20))
    with pytest.raises(IsolationError, match=r"\(Subset\.dataset\.rng, a numpy\.random\._generator\.Generator\)"):
        check(dataset)


def test_in_what_a_function_closes_over_or_is_given():
    rng = np.random.default_rng(0)

    def closes(items: list[Tensor]) -> Tensor:
        return torch.stack([item * rng.random() for item in items])

    def given(items: list[Tensor], other: Any) -> Tensor:
        return closes(items) * other.random()

    plain = Augmented(lambda index: 1.0)
    with pytest.raises(IsolationError, match=r"\(closes\.rng, "):
        check(plain, closes)
    with pytest.raises(IsolationError, match=r"\(partial\.keywords\.other, "):
        check(plain, functools.partial(given, other=random.Random(0)))
    with pytest.raises(IsolationError, match=rf"{OWN} \([\w.<>]+\.module_wide, "):
        check(Augmented(lambda index: module_wide.random()))
    with pytest.raises(IsolationError, match=rf"{OWN} \([\w.]+\.__self__, a random\.Random"):
        bound = random.Random(0).random
        check(Augmented(lambda index: bound()))


def test_one_that_draws_now_and_then_is_found_by_its_state():
    """Values may agree by chance: one in 20 is changed."""
    dataset = Keeps(np.random.default_rng(0), lambda rng: 2.0 if rng.random() < 0.05 else 1.0)
    with pytest.raises(IsolationError, match=OWN):
        check(dataset)


@pytest.mark.parametrize(
    "draw",
    [
        lambda index: secrets.SystemRandom().random(),
        lambda index: float(np.random.default_rng().random()),
        lambda index: next(unseen),
    ],
)
def test_what_is_not_found_is_refused_by_its_values(draw):
    with pytest.raises(IsolationError, match=rf"are others in the batch .*{OWN} or remembers .*{REMEDY}"):
        check(Augmented(draw))


def test_what_is_not_found_and_draws_alike_at_first_is_refused():
    """The batch of 8, and the 4 tried of it three times, are as if nothing drew."""
    values = iter([1.0] * 20 + [2.0] * 4 + [1.0] * 1000)
    with pytest.raises(IsolationError, match="are others in the batch"):
        check(Augmented(lambda index: next(values)))


class Running:
    """Features less their mean over all batches so far."""

    def __init__(self) -> None:
        self.mean, self.batches = torch.zeros(6), 0

    def __call__(self, items: list[Tensor]) -> dict[str, Tensor]:
        x = torch.stack(items)
        self.batches += 1
        self.mean = self.mean + (x.mean(0) - self.mean) / self.batches
        return {"x": x - self.mean}


class Last:
    def __init__(self) -> None:
        self.last: Tensor | float = 0.0

    def __call__(self, items: list[Tensor]) -> Tensor:
        x = torch.stack(items)
        found, self.last = x + self.last, x[-1]
        return found


@pytest.mark.parametrize("collate", [Running, Last])
def test_what_remembers_earlier_batches_is_refused(collate):
    with pytest.raises(IsolationError, match="remembers other examples|joins examples"):  # by what is drawn first
        check(Augmented(lambda index: 1.0), collate())


def test_what_changes_by_itself_is_told_what_to_leave_out():
    class Timed(Augmented):
        def __getitem__(self, index: int) -> Any:
            return {"x": self.x[index], "at": time.perf_counter_ns()}

    with pytest.raises(IsolationError, match=r"are others in \['at'\] .*return nothing that changes by itself"):
        check(Timed(lambda index: 1.0))


# What must be taken


def counting() -> Augmented:
    calls: collections.Counter[int] = collections.Counter()

    def draw(index: int) -> float:
        calls[index] += 1
        return 1.0

    return Augmented(draw)


def cached() -> Augmented:
    return Augmented(functools.cache(lambda index: float(torch.rand(()))))


def index_seeded(index: int) -> float:
    return float(np.random.default_rng(index).random())


def drawn_seed(index: int) -> float:
    return torch_draw(torch.Generator().manual_seed(int(torch.randint(2**60, ()))))


HARMLESS = {
    "counting": counting,
    "cached": cached,
    "reseeded": Reseeded,
    "index": lambda: Augmented(index_seeded),
    "drawn seed": lambda: Augmented(drawn_seed),
    "torch": lambda: Augmented(lambda index: float(torch.rand(()))),
    "numpy": lambda: Augmented(lambda index: float(np.random.rand())),
    "python": lambda: Augmented(lambda index: random.random()),
    "method of Python's default": lambda: Augmented(lambda index: uniform(0, 1)),
    "held and not drawn from": lambda: Keeps(random.Random(0), lambda rng: 1.0),
    "torch's default, named": lambda: Keeps(torch.default_generator, torch_draw),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_draws_by_the_default_generators_or_not_at_all_is_taken(kind):
    dataset = HARMLESS[kind]()
    assert not check(dataset)
    assert not check(dataset)


def test_the_order_of_keys_and_times_as_text_do_not_matter():
    def collate(items: list[Tensor]) -> dict[str, Any]:
        x = torch.stack(items)
        parts = [("x", x), ("y", x + 1), ("at", [str(time.perf_counter())] * len(items))]
        secrets.SystemRandom().shuffle(parts)
        return dict(parts)

    for _ in range(10):
        assert not check(Augmented(lambda index: 1.0), collate)


def test_a_data_set_of_hugging_face_that_transforms_at_random():
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"x": [[float(i), 1.0] for i in range(16)]})

    def jitter(rows: dict[str, Any]) -> dict[str, Any]:
        return {"x": [torch.tensor(x) * random.random() for x in rows["x"]]}

    assert not check(dataset.with_transform(jitter))
    rng = random.Random(0)

    def own(rows: dict[str, Any]) -> dict[str, Any]:
        return {"x": [torch.tensor(x) * rng.random() for x in rows["x"]]}

    with pytest.raises(IsolationError, match=r"\(Dataset\.[\w.]*transform\.rng, a random\.Random\)"):
        check(dataset.with_transform(own))


def test_what_draws_on_a_gpu_is_taken_and_its_state_left_alone(monkeypatch):
    default = torch.Generator().manual_seed(5)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_generators", (default,))
    dataset = Augmented(lambda index: torch_draw(default))
    indices = list(range(8))
    batch = default_collate([dataset[i] for i in indices])
    before = default.get_state()
    assert not check_collation(dataset, default_collate, indices, batch)
    assert torch.equal(default.get_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_private_loader_refuses_before_anything_is_released(workers):
    def batches(dataset: Dataset[Any]) -> tuple[PrivacyEngine, Any]:
        engine, model = PrivacyEngine("rdp"), mlp()
        _, _, loader = engine.make_private(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            data_loader=DataLoader(dataset, batch_size=12, num_workers=workers),
        )
        return engine, loader

    engine, loader = batches(KEPT["RandomState"]())
    assert_refuses(IsolationError, OWN, lambda: next(iter(loader)))
    assert engine.ledger.steps == 0
    _, loader = batches(HARMLESS["torch"]())
    assert len(next(iter(loader))) > 0


# The search


def test_a_search_runs_no_code_and_ends():
    class Odd:
        __slots__ = ("rng",)

        def __getattr__(self, name: str) -> Any:
            raise AssertionError("asked")

        @property
        def other(self) -> Any:
            raise AssertionError("asked")

    class Key:
        def __str__(self) -> str:
            raise AssertionError("asked")

    circle: list[Any] = [Odd(), {Key(): random.Random(0)}, range(10**9)]
    circle.append(circle)
    assert list(own_generators(circle)) == ["list.1.…"]
    assert own_generators([list(range(10**6))] * 50) == {}


def test_a_search_goes_six_steps_deep():
    inner: Any = random.Random(0)
    for _ in range(6):
        inner = [inner]
    assert list(own_generators(inner)) == ["list.0.0.0.0.0.0"]
    assert own_generators([inner]) == {}


@pytest.mark.parametrize("kind", [list, lambda items: {str(place): item for place, item in enumerate(items)}])
def test_a_search_leaves_out_what_has_more_than_a_hundred_items(kind):
    items = [*range(99), random.Random(0)]
    assert len(own_generators(kind(items))) == 1 and own_generators(kind([0, *items])) == {}


@pytest.mark.parametrize(("place", "found"), [(5000, 1), (5001, 0)])
def test_a_search_looks_at_five_thousand_objects(place, found):
    """The list and the hundred lists in it come first."""
    objects: list[Any] = [object() for _ in range(10_000)]
    objects[place - 102] = random.Random(0)
    assert len(own_generators([objects[begin : begin + 100] for begin in range(0, 10_000, 100)])) == found


def test_what_a_library_keeps_is_not_the_users():
    """A function of torch whose default is torch's own generator, and one without a module."""
    assert own_generators(torch.utils.data.random_split) == {}

    def nameless() -> float:
        return module_wide.random()

    nameless.__module__ = None  # type: ignore[assignment]
    assert list(own_generators(nameless)) == ["nameless.module_wide"]


def test_the_operating_systems_generator_has_no_state():
    found = own_generators([secrets.SystemRandom(), random.Random(0)])
    assert list(states(found)) == ["list.1"] and len(found) == 2


def test_a_closure_that_is_not_filled_yet():
    def outer() -> Callable[[], Any]:
        def inner() -> Any:
            return later

        assert own_generators(inner) == {}
        later = random.Random(0)
        return inner

    assert list(own_generators(outer())) == ["inner.later"]
