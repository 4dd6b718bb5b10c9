"""Collate functions: what joins the examples of a batch is refused, what stacks and pads them is taken."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lora_dp import IsolationError, PrivacyEngine
from lora_dp.isolation.collation.few_examples import unusual
from lora_dp.isolation.collation.row_equality import padded_alike
from lora_dp.isolation.collation.trial import check_collation
from lora_dp.privacy.randomness import SeededSource
from tests.models import assert_refuses, examples, mlp, private_run
from tests.support import make_private

Collate = Callable[[list[Any]], Any]


class Texts(Dataset[Tensor]):
    """Sequences of 3 to 9 numbers above 0."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Tensor:
        return torch.arange(1, 4 + index % 7) + index


def stacked(items: list[Any]) -> Tensor:
    return torch.stack([item[0] for item in items])


def mixup(items: list[Any]) -> Tensor:
    x = stacked(items)
    return 0.5 * x + 0.5 * x.roll(1, 0)


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


def padded(items: list[Any]) -> dict[str, Tensor]:
    ids = pad_sequence(items, True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def padded_left(items: list[Any]) -> dict[str, Tensor]:
    return {name: tensor.flip(1) for name, tensor in padded([item.flip(0) for item in items]).items()}


def masked(items: list[Any]) -> dict[str, Tensor]:
    """As for masked language models: a draw for each token, labels −100 elsewhere."""
    batch = padded(items)
    chosen = torch.bernoulli(torch.full(batch["input_ids"].shape, 0.3)).bool()
    labels = torch.where(chosen, batch["input_ids"], -100)
    return {**batch, "input_ids": batch["input_ids"].masked_fill(chosen, 1), "labels": labels}


def check(dataset: Dataset[Any], collate: Collate, n: int = 8) -> bool:
    indices = list(range(n))
    return check_collation(dataset, collate, indices, collate([dataset[i] for i in indices]))


def numbers() -> Dataset[Any]:
    return TensorDataset(examples(24)[0])


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("collate", [mixup, random_mixup, python_mixup, centred, in_pairs, last_of_first, counted])
def test_what_joins_examples_is_refused(collate, n):
    with pytest.raises(IsolationError, match="collate function joins examples"):
        check(numbers(), collate, n)


def test_one_unusual_example_among_equal_ones_is_enough():
    """In a batch of equal examples mixing them shows nowhere else."""
    x = torch.zeros(21, 8)
    x[:, 0] = 1
    x[-1, 0] = -1e6
    with pytest.raises(IsolationError, match="collate function joins examples"):
        check(TensorDataset(x), mixup, 21)


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


# What comes beside the rows


def labelled(n: int = 24, rare: int = 17) -> list[tuple[Tensor, int]]:
    return [(x, int(i == rare)) for i, x in enumerate(examples(n)[0])]


CLOCK = itertools.count()


SHARED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "the mean": lambda x, y: x.mean(0),
    "the mean of halves": lambda x, y: x.half().mean(0),
    "as a row": lambda x, y: x.var(0, correction=0, keepdim=True),
    "one number": lambda x, y: x.abs().mean(),
    "of NumPy": lambda x, y: x.mean(0).numpy(),
    "one of NumPy": lambda x, y: x.numpy().mean(),
    "a plain number": lambda x, y: float(x.abs().mean()),
    "in an object": lambda x, y: SimpleNamespace(mean=x.mean(0)),
    "a kernel": lambda x, y: x.t() @ x,
    "as many as a trial has": lambda x, y: x.mean(0)[:4],
    "of each class": lambda x, y: 1 / torch.bincount(y, minlength=3).clamp(min=1).float(),
    "missing at times": lambda x, y: torch.where(x.mean(0) > 0, x.mean(0), torch.nan),
    "beyond float32": lambda x, y: 1e100 * float(x.abs().mean()),
    "in a list with a number that changes": lambda x, y: [float(x.abs().mean()), float(next(CLOCK))],
    "with a number that changes": lambda x, y: [x.mean(0), float(next(CLOCK))],
}


def beside(statistic: Callable[[Tensor, Tensor], Any]) -> Collate:
    def collate(items: list[Any]) -> Any:
        x, y = torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])
        return {"x": x, "y": y, "it": statistic(x, y)}

    return collate


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 24])
@pytest.mark.parametrize("name", SHARED)
def test_a_statistic_beside_the_rows_is_refused(name, n):
    with pytest.raises(IsolationError, match=r"joins examples: \['it'\]\S*, which has no entry for each example"):
        check(labelled(n, n // 2), beside(SHARED[name]), n)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(
    "of",
    [
        lambda x, y: torch.rand(6),
        lambda x, y: float(np.random.rand()),
        lambda x, y: float(next(CLOCK)),
        lambda x, y: torch.linspace(0, 1, x.shape[1]),
        lambda x, y: torch.ones(6, 6).triu() * -1e4,
        lambda x, y: 1 / len(x),
        lambda x, y: x.reshape(-1),
        lambda x, y: x.reshape(-1, 3),
        lambda x, y: x.t(),
        lambda x, y: len(x) / 4,
    ],
)
def test_what_does_not_follow_the_others_may_come_beside_the_rows(of, n):
    """Drawn once for a batch, a table, its number of examples, the rows of all in one tensor or batch last."""
    assert check(labelled(n), beside(of), n) is False  # type: ignore[arg-type]


def test_what_follows_the_width_may_come_beside_the_rows():
    def collate(items: list[Tensor]) -> dict[str, Any]:
        ids = pad_sequence(items, True)
        width = ids.shape[1]
        return {
            "ids": ids,
            "scale": torch.tensor(width**-0.5),
            "width": float(width),
            "row": torch.full((1, 2), width / 2),
            "causal": torch.full((width, width), -1e4).triu(1),
            "places": torch.linspace(0, 1, width).unsqueeze(0),
        }

    for n in (2, 3, 8, 24):
        assert check(Texts(), collate, n)
    with pytest.raises(IsolationError, match="which has no entry for each example"):
        check(Texts(), lambda items: {**collate(items), "sum": sum(float(item.sum()) for item in items)}, 24)


@pytest.mark.parametrize("n", [2, 3, 8, 24])
def test_images_that_some_examples_have_may_come_beside_the_rows(n):
    """All in one tensor, which is as large with one text more."""

    def collate(items: list[Any]) -> dict[str, Tensor]:
        images = [x for x, y in items if y]
        return {
            "y": torch.tensor([y for _, y in items]),
            "images": torch.stack(images) if images else torch.zeros(0, 6),
        }

    for every in (2, 3):
        data = [(x, int(i % every == 0)) for i, x in enumerate(examples(n)[0])]
        for _ in range(5):
            assert check(data, collate, n) is False  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize(
    "collate",
    [
        list,
        lambda items: tuple(zip(*items, strict=True)),
        lambda items: [{"x": x, "score": float(x[0])} for x, _ in items],
        lambda items: {"x": stacked(items), "scores": [float(x[0]) for x, _ in items]},
        lambda items: [SimpleNamespace(x=x) for x, _ in items],
    ],
)
def test_lists_with_an_entry_for_each_example_may_come_beside_the_rows(collate, n):
    assert check(labelled(n), collate, n) is False  # type: ignore[arg-type]
    with pytest.raises(IsolationError, match="which has no entry for each example"):
        check(labelled(n), lambda items: (collate(items), stacked(items).mean(0)), n)  # type: ignore[arg-type]


def test_one_of_a_rare_class_is_among_those_that_are_tried():
    """Weights of classes change with hardly any other example; others are unusual otherwise."""

    def weighed(items: list[Any]) -> Any:
        found = beside(SHARED["of each class"])(items)
        return {**found, "first": found["x"][:, 0], "second": found["x"][:, 1]}

    for rare in range(0, 40, 3):
        with pytest.raises(IsolationError, match="which has no entry for each example"):
            check(labelled(40, rare), weighed, 40)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (torch.tensor([1, 1, 0, 1, 2]), {2, 4}),
        (torch.tensor([[1, 5], [2, 2], [0, 9], [3, 3], [4, 4]]), {1, 2}),  # of their sums
        ([torch.tensor(row) for row in ([1, 5], [2, 2], [0, 9], [3, 3], [4, 4])], {1, 2}),
        ([{} if x is None else {"x": torch.tensor(x)} for x in (0.5, 0.7, None, 0.6, 0.6)], {1, 2}),
        ([torch.tensor([2048, x], dtype=torch.float16) for x in (1, 0, 1, 1, 0.5)], {0, 1}),
        ({"x": [torch.zeros(2), torch.ones(2), torch.zeros(2)], "y": torch.zeros(5, 0)}, set()),
    ],
    ids=["labels", "rows", "a list", "missing", "halves", "nothing by example"],
)
def test_examples_with_the_least_or_the_most_of_something_are_unusual(batch, found):
    assert unusual(batch, 5) == found


def test_one_longer_text_is_among_those_that_are_tried():
    """A sum in the mask's own type would be rounded to 256 tokens."""

    def counted(items: list[Tensor]) -> dict[str, Any]:
        mask = torch.stack(items)
        return {"mask": mask, "it": 1 / (1 + int((mask[:, 256] > 0).sum()))}

    for rare in range(1, 40, 4):
        masks = [(torch.arange(260) < (257 if i == rare else 256)).bfloat16() for i in range(40)]
        with pytest.raises(IsolationError, match="which has no entry for each example"):
            check(masks, counted, 40)  # type: ignore[arg-type]


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


@pytest.mark.parametrize("n", [3, 8])
def test_missing_values_hide_no_mixture(n):
    """A value that is not equal to itself is no sign of chance."""
    x = examples(24)[0]
    x[:, 2] = torch.nan
    with pytest.raises(IsolationError, match="collate function joins examples"):
        check(TensorDataset(x), mixup, n)


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


def padded_and_joined(items: list[Tensor]) -> Tensor:
    ids = pad_sequence(items, True)
    return ids + ids.roll(1, 0)


def padded_with_the_longest(items: list[Tensor]) -> Tensor:
    longest = max(items, key=len)
    return torch.stack([torch.cat([item, longest[len(item) :]]) for item in items])


@pytest.mark.parametrize(
    "collate",
    [
        padded_and_joined,
        padded_with_the_longest,
        lambda items: padded_and_joined([item.float() for item in items]).flip(1),
    ],
)
def test_what_joins_examples_of_several_lengths_is_refused(collate):
    for n in (3, 8):
        with pytest.raises(IsolationError, match="collate function joins examples"):
            check(Texts(), collate, n)


def test_what_an_example_has_in_one_batch_alone_is_no_padding():
    row = torch.ones(2)
    assert [padded_alike(*pair) for pair in ((row, None), (None, row), (None, None), (row, row))] == [
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("collate", [padded, padded_left])
def test_an_empty_text_is_padded_like_any_other(collate):
    texts = [torch.arange(0), torch.arange(1, 4), torch.arange(0)]
    assert not check_collation(texts, collate, range(3), collate(texts))
    assert check_collation(texts, collate, [0, 1], collate(texts[:2]))


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


# Batches that are drawn and never stepped


def test_a_batch_that_is_skipped_is_noticed():
    model, optimizer, loader = private_run(PrivacyEngine("rdp", reproducible_seed=0))
    batches = iter(loader)
    x, y = next(batches)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    next(batches)  # looked at, and left out
    assert_refuses(RuntimeError, "was never stepped", lambda: next(batches))


def test_the_refusal_names_the_mask_as_the_remedy():
    model, optimizer, loader = private_run(PrivacyEngine("rdp", reproducible_seed=0))
    batches = loader.take(2)
    next(batches)
    assert_refuses(
        RuntimeError,
        "step every batch once, and leave out a single example by optimizer.step(mask=mask), whose entry "
        "for an example depends on that example alone",
        lambda: next(batches),
    )


def test_the_last_batch_is_noticed_too():
    model, optimizer, loader = private_run(PrivacyEngine("rdp", reproducible_seed=0))

    def skip_all() -> None:
        for _ in loader.take(1):
            pass

    assert_refuses(RuntimeError, "was never stepped", skip_all)


def test_a_new_iteration_does_not_forget_a_skipped_batch():
    model, optimizer, loader = private_run(PrivacyEngine("rdp", reproducible_seed=0))
    for number, (x, y) in enumerate(loader):
        if number == 1:
            break
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert_refuses(RuntimeError, "was never stepped", lambda: next(iter(loader)))


def test_looking_at_a_batch_before_training_is_no_skip():
    model, optimizer, loader = private_run(PrivacyEngine("rdp", reproducible_seed=0))
    next(iter(loader))
    for x, y in loader.take(2):
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert optimizer.ledger.steps == 2


def test_one_batch_may_be_looked_at_before_training_and_no_second():
    _, _, loader = private_run(PrivacyEngine("rdp", reproducible_seed=0))
    next(iter(loader))
    next(iter(loader))
    assert_refuses(RuntimeError, "was never stepped", lambda: next(iter(loader)))


def test_what_was_looked_at_is_no_batch_that_waits_for_its_step():
    """Of two batches of one size, the second is the one that is stepped."""
    model, (x, y) = mlp(), examples(4)
    optimizer = make_private(model, batch_size=4)
    for _ in range(2):
        optimizer.begin_batches()
        optimizer.expect_batch(4)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.check_stepped()


@pytest.mark.parametrize("micro", [False, True])
def test_a_batch_that_was_not_stepped_is_refused_for_good(micro):
    """A loop that passes over the error of one epoch, and goes on, tells by what is missing in it."""
    model, (x, y) = mlp(), examples(4)
    optimizer = make_private(model, batch_size=4)
    optimizer.expect_batch(4)
    if micro:
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.signal_skip_step()
        optimizer.step()
        optimizer.recorder.discard()
    assert_refuses(RuntimeError, "drew (4 examples) was never stepped", optimizer.check_stepped)
    before = model[2].weight.detach().clone()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    for again in (optimizer.check_stepped, optimizer.begin_batches, optimizer.step, optimizer.step_on_empty_batch):
        assert_refuses(RuntimeError, "tells of its examples: call make_private again", again)
    assert optimizer.ledger.steps == 0 and torch.equal(model[2].weight, before)


def test_a_step_on_another_batch_than_was_drawn_is_refused_for_good():
    """Who leaves an odd example out of a batch, and passes over the refusal, leaves out the batch."""
    model, (x, y) = mlp(), examples(4)
    optimizer = make_private(model, batch_size=4)
    optimizer.expect_batch(4)
    torch.nn.functional.cross_entropy(model(x[1:]), y[1:]).backward()
    assert_refuses(RuntimeError, "This step saw 3 examples", optimizer.step)
    optimizer.zero_grad()
    optimizer.expect_batch(4)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    assert_refuses(RuntimeError, "This step saw 3 examples", optimizer.step)
    assert optimizer.ledger.steps == 0


@pytest.mark.parametrize("options", [{}, {"set_to_none": True}, {"set_to_none": False}])
def test_gradients_are_forgotten_as_torch_forgets_them(options):
    model, (x, y) = mlp(), examples(4)
    optimizer = make_private(model, batch_size=4)
    optimizer.expect_batch(4)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad(**options)
    left = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is None if options.get("set_to_none", True) else not grad.any() for grad in left)


def test_noise_alone_may_not_stand_for_a_batch():
    """Who left a batch out for what one example holds would take away what all others add."""
    model, optimizer, loader = private_run(PrivacyEngine("rdp", reproducible_seed=0))
    for number, (x, y) in enumerate(loader.take(3)):
        if number == 1:
            before = model[2].weight.detach().clone()
            assert_refuses(
                RuntimeError,
                f"the private loader drew ({len(x)} examples) cannot be left out, since one example would take away "
                "what all others add: step it, and leave out a single example by optimizer.step(mask=mask)",
                optimizer.step_on_empty_batch,
            )
            assert torch.equal(model[2].weight, before) and optimizer.ledger.steps == 1
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert optimizer.ledger.steps == number + 1
