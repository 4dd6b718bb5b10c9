"""The Poisson loader: every draw is a batch or an empty step, in order, with and without workers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from lora_dp.engine.data_loader import PrivateDataLoader
from lora_dp.privacy.randomness import SeededSource
from lora_dp.privacy.sampling import PoissonSampler


class Numbers(Dataset):
    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


def collate(batch: list[int]) -> dict[str, Any]:
    return {"numbers": torch.tensor(batch), "worker": torch.utils.data.get_worker_info() is not None}


def events(size: int, batch_size: int, steps: int, workers: int, seed: int = 0) -> tuple[list[Any], PrivateDataLoader]:
    """What happened, in order: None for an empty draw, (announced size, batch) for a batch."""
    seen: list[Any] = []
    announced: list[int] = []
    options = {"prefetch_factor": 3} if workers else {}
    loader = PrivateDataLoader(
        DataLoader(Numbers(size), batch_size=batch_size, collate_fn=collate, num_workers=workers, **options),
        SeededSource(seed),
        announced.append,
        lambda: seen.append(None),
    )
    for batch in loader.take(steps):
        assert batch["worker"] == (workers > 0)
        seen.append((announced[-1], batch["numbers"].tolist()))
    assert len(announced) == sum(event is not None for event in seen)
    return seen, loader


@pytest.mark.parametrize("workers", [0, 2])
def test_every_draw_is_a_batch_or_an_empty_step_in_its_place(workers):
    seen, _ = events(5, 1, 40, workers)
    expected = list(PoissonSampler(5, 0.2, 40, SeededSource(0)))
    assert len(seen) == 40 and None in seen
    assert [[] if event is None else event[1] for event in seen] == expected
    assert all(event is None or event[0] == len(event[1]) > 0 for event in seen)


@pytest.mark.slow
def test_trailing_empty_draws_are_steps_too():
    """Of 200 seeds some end in an empty draw, some draw nobody at all."""
    ends = [events(2, 1, 2, 0, seed)[0] for seed in range(200)]
    assert all(len(seen) == 2 for seen in ends)
    assert any(seen[-1] is None and seen[0] is not None for seen in ends)
    assert any(seen == [None, None] for seen in ends)


def test_batch_is_announced_before_it_is_handed_out():
    order: list[str] = []
    loader = PrivateDataLoader(
        DataLoader(Numbers(4), batch_size=4), SeededSource(0), lambda n: order.append(f"announced {n}"), lambda: None
    )
    for batch in loader.take(2):
        order.append(f"batch {len(batch)}")
    assert order == ["announced 4", "batch 4"] * 2


def test_rate_one_takes_everybody():
    seen, loader = events(6, 6, 3, 0)
    assert seen == [(6, list(range(6)))] * 3
    assert loader.sample_rate == 1 and len(loader) == 1


def test_length_and_rate():
    _, loader = events(50, 8, 1, 0)
    assert (loader.sample_rate, len(loader), loader.expected_batch_size) == (8 / 50, 6, 8)
    assert len(PoissonSampler(50, 0.1, 7, SeededSource(0))) == 7


def test_one_iteration_is_an_epoch_and_the_next_one_differs():
    members: list[list[list[int]]] = []
    empty: list[None] = []
    loader = PrivateDataLoader(
        DataLoader(Numbers(60), batch_size=6), SeededSource(0), lambda n: None, lambda: empty.append(None)
    )
    for _ in range(2):
        members.append([batch.tolist() for batch in loader])
    assert sum(map(len, members)) + len(empty) == 2 * len(loader) == 20
    assert members[0] != members[1]


@pytest.mark.slow
def test_breaking_off_and_going_on():
    """Draws that workers made ahead and nobody saw are no steps."""
    empty: list[None] = []
    loader = PrivateDataLoader(
        DataLoader(Numbers(9), batch_size=3, num_workers=2), SeededSource(0), lambda n: None, lambda: empty.append(None)
    )
    for seen, _batch in enumerate(loader.take(20)):
        if seen == 2:
            break
    empty.clear()
    assert sum(1 for _ in loader.take(20)) + len(empty) == 20


@pytest.mark.parametrize(("size", "batch_size", "steps"), [(1, 1, 1), (100, 1, 100), (1000, 3, 333), (7, 5, 1)])
def test_an_epoch_has_as_many_steps_as_an_example_is_drawn_once_in(size, batch_size, steps):
    loader = PrivateDataLoader(
        DataLoader(Numbers(size), batch_size=batch_size), SeededSource(0), lambda n: None, lambda: None
    )
    assert len(loader) == steps


def draws(loader: PrivateDataLoader, announced: list[int]) -> int:
    """How many examples ten batches had."""
    announced.clear()
    batches = sum(len(batch) for batch in loader.take(10))
    assert batches == sum(announced)
    return batches


@pytest.mark.parametrize("batch_size", [2_000, 10_000, 18_000])
def test_the_rate_is_the_batch_size_over_the_number_of_examples(batch_size):
    """200,000 draws: a rate that is 2 % too high is seen at rate 0.1 at 3 deviations, at 0.5 at 9, at 0.9 at 27."""
    announced: list[int] = []
    loader = PrivateDataLoader(
        DataLoader(Numbers(20_000), batch_size=batch_size), SeededSource(7), announced.append, lambda: None
    )
    rate = batch_size / 20_000
    assert loader.sample_rate == rate
    assert abs(draws(loader, announced) / 200_000 - rate) < 2.6 * math.sqrt(rate * (1 - rate) / 200_000)


def test_dataset_order_of_the_loader_is_not_used():
    def first(shuffle: bool) -> Tensor:
        loader = PrivateDataLoader(
            DataLoader(Numbers(50), batch_size=25, shuffle=shuffle), SeededSource(0), lambda n: None, lambda: None
        )
        return next(loader.take(1))

    assert torch.equal(first(False), first(True))


def plain_loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(Numbers(6), batch_size=2, **options)


def with_batches(batches: Any) -> DataLoader[Any]:
    """A loader whose batches were exchanged after it was made, as a subclass may do."""
    loader = plain_loader()
    vars(loader)["batch_sampler"] = batches(loader)
    return loader


class OwnBatches(BatchSampler):
    """May leave out whom it likes."""


@pytest.mark.parametrize(
    "loader",
    [
        lambda: plain_loader(sampler=RandomSampler(Numbers(6), replacement=True)),
        lambda: plain_loader(sampler=RandomSampler(Numbers(6), num_samples=3)),
        lambda: plain_loader(sampler=RandomSampler(Numbers(6))),  # of another data set, though of the same size
        lambda: plain_loader(sampler=SequentialSampler(Numbers(6))),
        lambda: with_batches(lambda loader: OwnBatches(loader.sampler, 2, False)),
        lambda: with_batches(lambda loader: BatchSampler([0, 1], 2, False)),
        lambda: with_batches(lambda loader: [[0, 1]]),
    ],
)
def test_an_order_that_a_plain_loader_does_not_make_is_refused(loader):
    with pytest.raises(ValueError, match="no sampler of its own"):
        PrivateDataLoader(loader(), SeededSource(0), lambda size: None, lambda: None)


@pytest.mark.parametrize(
    "options", [{}, {"shuffle": True}, {"shuffle": True, "generator": torch.Generator()}, {"drop_last": True}]
)
def test_the_orders_of_a_plain_loader_are_taken(options):
    private = PrivateDataLoader(plain_loader(**options), SeededSource(0), lambda size: None, lambda: None)
    assert private.sample_rate == 1 / 3


def test_an_order_of_the_same_data_set_with_or_without_repeats():
    numbers = Numbers(6)

    def given(sampler: Any) -> PrivateDataLoader:
        loader = DataLoader(numbers, batch_size=2, sampler=sampler)
        return PrivateDataLoader(loader, SeededSource(0), lambda size: None, lambda: None)

    assert given(RandomSampler(numbers)).sample_rate == given(SequentialSampler(numbers)).sample_rate == 1 / 3
    for some in (RandomSampler(numbers, replacement=True), RandomSampler(numbers, num_samples=3)):
        with pytest.raises(ValueError, match="no sampler of its own"):
            given(some)


def test_what_is_no_loader_is_refused():
    with pytest.raises(TypeError, match="data_loader must be a DataLoader"):
        PrivateDataLoader([[0, 1]], SeededSource(0), lambda size: None, lambda: None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("steps", "error"), [(2.0, TypeError), ("3", TypeError), (None, TypeError), (-1, ValueError)])
def test_steps_are_a_whole_number(steps, error):
    loader = PrivateDataLoader(DataLoader(Numbers(50), batch_size=25), SeededSource(0), lambda _: None, lambda: None)
    with pytest.raises(error, match="steps"):
        next(loader.take(steps))


def test_no_steps_are_no_batches():
    loader = PrivateDataLoader(DataLoader(Numbers(50), batch_size=25), SeededSource(0), lambda _: None, lambda: None)
    assert list(loader.take(0)) == []
