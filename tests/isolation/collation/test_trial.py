"""Collate functions: what joins the examples of a batch is refused, what stacks and pads them is taken."""

import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lora_dp import IsolationError, PrivacyEngine
from lora_dp.isolation.collation.trial import check_collation
from lora_dp.privacy.randomness import SeededSource
from tests.isolation.collation.collate_functions import Texts, check, mixup, padded, padded_left, stacked
from tests.models import assert_refuses, examples, mlp


def random_mixup(items: list[Any]) -> Tensor:
    x, share = stacked(items), np.random.beta(1, 1)
    return share * x + (1 - share) * x[torch.randperm(len(x))]


def centred(items: list[Any]) -> Tensor:
    x = stacked(items)
    return x - x.mean(0)


def in_pairs(items: list[Any]) -> Tensor:
    x, even = stacked(items), len(items) // 2 * 2
    return torch.cat([x[:even] + x[:even].view(-1, 2, 6).flip(1).reshape(-1, 6) if even else x[:0], x[even:]])


def last_of_first(items: list[Any]) -> Tensor:
    x = stacked(items)
    return torch.cat([x[:-1], x[-1:] + x[:1]])


def python_mixup(items: list[Any]) -> Tensor:
    x, order = stacked(items), list(range(len(items)))
    random.shuffle(order)
    return x + random.random() * x[order]


def noisy_by_python(items: list[Any]) -> Tensor:
    return torch.stack([item[0] * random.random() for item in items])


def noisy_by_numpy(items: list[Any]) -> Tensor:
    return torch.stack([item[0] * np.random.rand() for item in items])


def counted(items: list[Any]) -> Tensor:
    """Whole numbers to which one is added for each example of the batch."""
    return (stacked(items) * 1e6).long() + len(items)


def noisy(items: list[Any]) -> Tensor:
    x = stacked(items)
    return x + 0.1 * torch.randn(x.shape)


def masked(items: list[Any]) -> dict[str, Tensor]:
    """As for masked language models: a draw for each token, labels −100 elsewhere."""
    batch = padded(items)
    chosen = torch.bernoulli(torch.full(batch["input_ids"].shape, 0.3)).bool()
    labels = torch.where(chosen, batch["input_ids"], -100)
    return {**batch, "input_ids": batch["input_ids"].masked_fill(chosen, 1), "labels": labels}


def numbers() -> Dataset[Any]:
    return TensorDataset(examples(24)[0])


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("collate", [mixup, random_mixup, python_mixup, centred, in_pairs, last_of_first, counted])
def test_what_joins_examples_is_refused(collate, n):
    with pytest.raises(IsolationError, match="collate function joins examples"):
        check(numbers(), collate, n)


def with_company(items: list[Any]) -> dict[str, Any]:
    """Beside what is stacked, what belongs to the batch; a table as long as a batch of eight; sums that are rounded."""
    x = stacked(items)
    return {
        "x": x * len(x) / len(x),
        "names": ["abcdefgh"] * len(x),
        "count": torch.tensor(len(x)),
        "sizes": torch.full((len(x) + 1,), len(x)),
        "table": torch.arange(8),
        "n": len(x),
        "missing": torch.where(x > 0, x, torch.nan),
    }


@pytest.mark.parametrize(("share", "refused"), [(1e-4, True), (1e-7, False)])
def test_a_small_share_of_another_example_is_seen(share, refused):
    """Above a hundred-thousandth of each value, which is a few roundings of float32."""
    x = 1 + torch.rand(24, 6, generator=torch.Generator().manual_seed(0))

    def joined(items: list[Any]) -> Tensor:
        stack = stacked(items)
        return stack + share * stack.roll(1, 0)

    if refused:
        with pytest.raises(IsolationError, match="collate function joins examples"):
            check(TensorDataset(x), joined)
    else:
        check(TensorDataset(x), joined)


@pytest.mark.parametrize("n", [2, 3, 4, 8])
@pytest.mark.parametrize("collate", [stacked, noisy, noisy_by_python, noisy_by_numpy, with_company])
def test_what_stacks_is_taken(collate, n):
    assert not check(numbers(), collate, n)


def test_numbers_that_are_whole_in_some_batches_are_taken():
    values = [1, 2, 3, 4, 5, 6, 7, 0.5]
    assert check_collation(values, torch.tensor, range(8), torch.tensor(values)) is False


def test_of_one_example_nothing_is_told():
    assert check(Texts(), padded, 1) is False


@pytest.mark.parametrize("collate", [padded, padded_left])
def test_what_pads_is_taken_and_its_width_noticed(collate):
    assert check(Texts(), collate)
    assert not check(Texts(), lambda items: {"x": torch.stack([item[:3] for item in items])})


@dataclass
class Joined:
    """A batch as an object of the user's own."""

    inner: SimpleNamespace
    number: int = 3


def test_a_batch_that_is_an_object_is_looked_into():
    def plain(items: list[Any]) -> Joined:
        return Joined(SimpleNamespace(x=stacked(items)))

    assert check(numbers(), plain) is False
    with pytest.raises(IsolationError, match=r"an example's rows in \S*x\S* change with the others"):
        check(numbers(), lambda items: Joined(SimpleNamespace(x=centred(items))))


@pytest.mark.parametrize(("depth", "seen"), [(9, True), (10, False)])
def test_objects_in_objects_are_looked_into_nine_deep(depth, seen):
    def nested(items: list[Any]) -> Any:
        batch: Any = centred(items)
        for _ in range(depth):
            batch = SimpleNamespace(x=batch)
        return batch

    if seen:
        with pytest.raises(IsolationError, match="joins examples"):
            check(numbers(), nested)
    else:
        assert check(numbers(), nested) is False


def test_a_part_that_comes_and_goes_is_refused():
    calls: list[int] = []

    def changing(items: list[Any]) -> dict[str, Tensor]:
        calls.append(len(items))
        return {"x": stacked(items), f"part {len(calls)}": stacked(items)}

    with pytest.raises(IsolationError, match=r"The same examples are others in \['part \d'\]"):
        check(numbers(), changing)


def sorted_rows(items: list[Any]) -> Tensor:
    x = stacked(items)
    return x[x[:, 0].argsort()]


def sorted_and_centred(items: list[Any]) -> Tensor:
    return centred([(row,) for row in sorted_rows(items)])


def sorted_and_one_twice(items: list[Any]) -> Tensor:
    """In small batches the first of them takes the place of the second."""
    x = sorted_rows(items)
    return torch.cat([x[:1], x[:1], x[2:]]) if len(x) <= 4 else x


def test_a_batch_that_is_sorted_may_not_be_joined_as_well():
    x = torch.tensor([[3.0, 1], [5, 2], [7, 3], [4, 4], [8, 5], [6, 6], [2, 7], [9, 8]])
    for start in range(8):  # with the first of a part in its place, and elsewhere
        dataset = TensorDataset(x.roll(start, 0))
        assert check(dataset, sorted_rows) is False
        for collate in (sorted_and_centred, sorted_and_one_twice):
            with pytest.raises(IsolationError, match="joins examples"):
                check(dataset, collate)


def with_the_label_of_the_next(items: list[Any]) -> dict[str, Tensor]:
    x, y = (torch.stack(parts) for parts in zip(*items, strict=True))
    return {"x": x, "y": y.roll(1)}


def test_equal_examples_show_no_sorting():
    """Though each row with another's label stands elsewhere too: the first four are equal in whatever order."""
    values = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
    with pytest.raises(IsolationError, match="joins examples"):
        check(TensorDataset(values, values), with_the_label_of_the_next)


def by_length(items: list[Tensor]) -> dict[str, Tensor]:
    return padded(sorted(items, key=len, reverse=True))


def test_a_batch_that_is_sorted_is_taken_and_one_whose_rows_are_dealt_anew_is_not():
    """As a packed sequence wants it; labels in another order than their inputs belong to others."""
    texts = [torch.arange(1, length + 1) for length in (3, 5, 2, 4, 1, 6, 2, 3)]
    assert check(texts, by_length) is True

    def dealt(items: list[Tensor]) -> dict[str, Tensor]:
        return {**padded(items), "labels": torch.tensor([float(item.sum()) for item in items]).sort().values}

    with pytest.raises(IsolationError, match="joins examples"):
        check(texts, dealt)


def noisy_by_rank(items: list[Any]) -> Tensor:
    """A draw for each example: the smallest has the first."""
    x = stacked(items)
    return x * torch.rand(len(x), 1)[x[:, 0].argsort(stable=True).argsort()]


def test_draws_that_are_dealt_out_by_the_other_examples_are_refused():
    """Beside copies of itself an example has each of the draws somewhere."""
    x = examples(8)[0]
    x[0, 0] = 9
    with pytest.raises(IsolationError, match="joins examples"):
        check(TensorDataset(x), noisy_by_rank)


def test_random_masks_are_taken():
    """Widths differ, and with them the masks: of one width they are compared."""
    assert check(Texts(), masked)
    assert not check(numbers(), lambda items: masked([(item[0] * 9).long().abs() + 1 for item in items]))


def test_a_loader_that_mixes_is_refused_before_anything_is_released():
    engine = PrivacyEngine("rdp", reproducible_seed=0)
    model = mlp()
    loader = DataLoader(numbers(), batch_size=8, collate_fn=mixup)
    _, optimizer, batches = engine.make_private(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    assert_refuses(IsolationError, "collate function joins examples", lambda: next(iter(batches)))
    assert engine.ledger.steps == 0


def test_later_batches_are_tried_in_secret(monkeypatch):
    """A collate function that begins to mix after the first batches."""
    import lora_dp.engine.data_loader

    calls = []

    def later(items: list[Any]) -> Tensor:
        calls.append(len(items))
        return mixup(items) if len(calls) > 12 else stacked(items)

    monkeypatch.setattr(lora_dp.engine.data_loader, "drawn_for_test", lambda: len(calls) > 14)
    model = mlp()
    _, optimizer, batches = PrivacyEngine("rdp", reproducible_seed=0).make_private(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(numbers(), batch_size=8, collate_fn=later),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )

    def run() -> None:
        for x in batches.take(20):
            optimizer.backward(model(x).square().sum(1))
            optimizer.step()

    assert_refuses(IsolationError, "collate function joins examples", run)


@pytest.mark.parametrize("n", [1, 2, 8])
def test_a_loader_is_tried_on_its_first_batch_that_two_examples_share(n, monkeypatch):
    import lora_dp.engine.data_loader

    tried = []
    monkeypatch.setattr(lora_dp.engine.data_loader, "check_collation", lambda *args: bool(tried.append(len(args[2]))))
    monkeypatch.setattr(lora_dp.engine.data_loader, "drawn_for_test", lambda: False)
    loader = DataLoader(TensorDataset(examples(n)[0]), batch_size=n)
    batches = lora_dp.engine.data_loader.PrivateDataLoader(loader, SeededSource(0), lambda size: None, lambda: None)
    assert len(list(batches.take(3))) == 3
    assert tried == ([n] if n > 1 else [])


@pytest.mark.parametrize("collate", [padded, lambda items: torch.stack([item[:3] for item in items])])
def test_a_loader_tells_once_that_widths_vary(collate, monkeypatch):
    import lora_dp.engine.data_loader

    told: list[bool] = []
    monkeypatch.setattr(lora_dp.engine.data_loader, "drawn_for_test", lambda: False)
    batches = lora_dp.engine.data_loader.PrivateDataLoader(
        DataLoader(Texts(), batch_size=24, collate_fn=collate),
        SeededSource(0),
        lambda size: None,
        lambda: None,
        on_varying_width=lambda: told.append(True),
    )
    assert len(list(batches.take(2))) == 2
    assert told == ([True] if collate is padded else [])


def test_the_trial_leaves_random_numbers_alone():
    dataset = numbers()
    batch = noisy([dataset[i] for i in range(8)])
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for collate in (noisy, noisy_by_numpy, noisy_by_python):
        check_collation(dataset, collate, range(8), batch)
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


def test_about_one_later_batch_in_a_thousand_is_tried():
    from lora_dp.isolation.collation.trial import drawn_for_test

    # Binomial: 100,000 draws at 1/1000 lie within 5.5 deviations but for a probability of 4e-8.
    assert abs(sum(drawn_for_test() for _ in range(100_000)) - 100) < 5.5 * 100**0.5
