"""What a data set and a collate function draw while a batch is fetched: never from a state that somebody seeded."""

import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from lora_dp import DPLinear, PrivacyEngine
from lora_dp.engine.data_loader import PrivateDataLoader
from lora_dp.privacy import secret_state
from lora_dp.privacy.randomness import SecureSource, SeededSource
from tests.sources import forks

SIZE = 8
IN_PROCESS = pytest.param(0, id="main process")
BOTH = [IN_PROCESS, pytest.param(2, id="workers", marks=forks)]


@pytest.fixture(autouse=True)
def callers_state() -> Iterator[None]:
    with secret_state.secret_generators():
        yield


class Drawing(Dataset[Any]):
    """Of each example what Python, NumPy and torch draw; after its last example has been drawn for, it calls
    ``seed``."""

    def __init__(self, seed: Callable[[], Any] = lambda: None):
        self.seed = seed

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[float, float, float]:
        drawn = random.random(), float(np.random.rand()), float(torch.rand(()))
        if index == SIZE - 1:
            self.seed()
        return drawn


def seed_both() -> None:
    random.seed(5)
    np.random.seed(5)


def batches(dataset: Dataset[Any], source: Any, **options: Any) -> Iterator[Any]:
    """Four of them, each with everybody: the rate is 1."""
    loader = DataLoader(dataset, batch_size=SIZE, **options)
    return PrivateDataLoader(loader, source, lambda _: None, lambda: None).take(4)


def distinct(columns: list[list[Tensor]]) -> bool:
    values = [torch.stack(list(column)).flatten() for column in zip(*columns, strict=True)]
    return all(len(column.unique()) == column.numel() for column in values)


def test_seeds_set_in_the_training_loop_are_not_those_of_the_next_batch() -> None:
    """As a loop that seeds by its epoch has it: no pass has renewed the state by then."""
    fetched, first = batches(Drawing(), SecureSource()), []
    for _ in range(4):
        seed_both()
        first.append([column[:1] for column in next(fetched)])
    seed_both()
    first.append([torch.tensor([value], dtype=torch.float64) for value in Drawing()[0]])
    assert distinct(first)


@pytest.mark.parametrize("epochs", [1, 3])
def test_an_epoch_of_the_loader_that_make_private_returned(epochs: int) -> None:
    model, engine = nn.Sequential(DPLinear(3, 2)).train(), PrivacyEngine("rdp")
    loader = DataLoader(Drawing(), batch_size=SIZE)
    model, optimizer, private = engine.make_private(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    seen = []
    for _ in range(epochs):
        seed_both()
        for batch in private:
            seen.append(list(batch))
            optimizer.backward(model(torch.stack(batch, 1).float()).square().sum(1))
            optimizer.step()
    seed_both()
    assert len(seen) == epochs and distinct(seen)
    assert not {float(value) for value in seen[-1][0]} & {random.random() for _ in range(100)}
    assert not {float(value) for value in seen[-1][1]} & {float(value) for value in np.random.rand(100)}


@pytest.mark.parametrize("workers", BOTH)
def test_seeds_that_a_data_set_sets_are_not_those_of_its_next_batch(workers: int) -> None:
    assert distinct([list(batch) for batch in batches(Drawing(seed_both), SecureSource(), num_workers=workers)])


def _collate_drawing(examples: Any) -> list[Tensor]:
    return [torch.tensor([random.random()], dtype=torch.float64), torch.tensor([np.random.rand()])]


def _collate_seeding(examples: Any) -> Any:
    seed_both()
    return default_collate(examples)


@pytest.mark.parametrize("workers", BOTH)
def test_nor_of_the_collate_function_after_it(workers: int) -> None:
    assert distinct(list(batches(Drawing(seed_both), SecureSource(), num_workers=workers, collate_fn=_collate_drawing)))


@pytest.mark.parametrize("workers", BOTH)
def test_seeds_that_a_collate_function_sets_are_not_those_of_the_next_batch(workers: int) -> None:
    found = batches(Drawing(), SecureSource(), num_workers=workers, collate_fn=_collate_seeding)
    assert distinct([list(batch) for batch in found])


def test_the_caller_finds_no_seed_of_a_collate_function() -> None:
    """Whoever changes examples in the loop itself."""
    drawn = [
        [torch.tensor([value], dtype=torch.float64) for value in (random.random(), np.random.rand())]
        for _ in batches(Drawing(), SecureSource(), collate_fn=_collate_seeding)
    ]
    assert distinct(drawn)


def test_a_batch_is_not_fetched_after_torch_was_seeded() -> None:
    read: list[int] = []
    fetched = batches(Drawing(lambda: read.append(1)), SecureSource())
    next(fetched)
    assert read
    read.clear()
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="seeded after make_private.*renew_randomness"):
        next(fetched)
    assert not read


@pytest.mark.parametrize("workers", BOTH)
@pytest.mark.parametrize("where", ["data set", "collate function"])
def test_a_seed_of_torchs_that_is_set_while_a_batch_is_read_is_refused(where: str, workers: int) -> None:
    def seed(examples: Any = None) -> Any:
        torch.manual_seed(0)
        return examples

    dataset = Drawing(seed) if where == "data set" else Drawing()
    options = {} if where == "data set" else {"collate_fn": seed}
    with pytest.raises(RuntimeError, match="data set or the collate function seeds torch's generators.*default"):
        next(batches(dataset, SecureSource(), num_workers=workers, **options))


def test_batches_that_begin_in_one_state_draw_for_themselves() -> None:
    fetched, found = batches(Drawing(), SecureSource()), []
    for _ in range(4):
        with torch.random.fork_rng():
            found.append(list(next(fetched)))
    assert distinct(found)


@pytest.mark.slow
def test_under_a_seeded_source_the_seeds_are_the_users() -> None:
    fetched = batches(Drawing(), SeededSource(0))
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        python, numpy, _ = next(fetched)
        assert python.tolist()[0] == random.Random(seed).random()
        assert numpy.tolist() == np.random.RandomState(seed).rand(SIZE).tolist()
    own = secret_state.collation(default_collate, SeededSource(0))
    assert own is default_collate


def test_spawned_workers_can_be_handed_the_collate_function() -> None:
    wrapped = pickle.loads(pickle.dumps(secret_state.collation(default_collate, SecureSource())))
    assert wrapped([1.0, 2.0]).tolist() == [1.0, 2.0]
