"""Kept activations: those of each time anew, computed once, and to the last bit a function of their example alone."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_dp.fed.data.encoding import ImageSpec, RawData, TextSpec, encode
from lora_dp.fed.data.examples import Batch, Examples, ImageExamples, Shape, TextExamples
from lora_dp.fed.data.kept_activations import ACTIVATIONS, KeptActivations, shared_activations
from lora_dp.fed.data.unreadable import UnreadableExample, encode_training
from lora_dp.fed.origin import examples_digest
from tests.fed.data.word_tokenizer import Words

WIDTH, ROWS = 5, 64
LENGTHS = [3, 9, 1, 20, 8, 16]


def images(count: int = 150) -> ImageExamples:
    pixels = torch.randint(0, 256, (count, 1, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageExamples(pixels, torch.arange(count) % 3, [0.5], [0.25])


def texts(lengths: list[int] = LENGTHS) -> TextExamples:
    ids = torch.full((len(lengths), 20), 7, dtype=torch.int32)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.arange(100 + length, 100 + 2 * length)
    return TextExamples(ids, torch.tensor(lengths), torch.arange(len(lengths)) % 2, pad_id=7)


class ImageFront:
    """(N, 5), by arithmetic that goes number by number, so that no row's rounding hangs on another; it counts."""

    def __init__(self, broken: Callable[[Tensor, Tensor], Tensor] = lambda found, x: found) -> None:
        self.rows: list[int] = []
        self._broken = broken

    def __call__(self, batch: Batch) -> Tensor:
        assert "labels" not in batch or batch["labels"].dtype == torch.int64
        x = batch["pixel_values"].flatten(1)
        self.rows.append(len(x))
        return self._broken(torch.stack([(x * (k + 0.3)).sin()[:, k] for k in range(WIDTH)], 1), x)


def token_front(batch: Batch) -> Tensor:
    """(N, T, 2): of each token, its number and whether it is one of the text's."""
    return torch.stack([batch["input_ids"] * 0.37, batch["attention_mask"].float()], 2)


def mean_front(batch: Batch) -> Tensor:
    """(N, 2), of texts."""
    mask = batch["attention_mask"].float()
    return torch.stack([(batch["input_ids"] * mask).sum(1), mask.sum(1)], 1)


def kept(source: Examples, front: Any, **options: Any) -> KeptActivations:
    return KeptActivations(source, front, **{"with_inputs": False, "vocabulary": 300, **options})


# What they are


def test_they_are_those_of_each_time_anew() -> None:
    source, front = images(), ImageFront()
    examples = kept(source, front)
    assert len(examples) == 150 and torch.equal(examples.labels, source.labels) and not examples.shapes_vary
    for rows in ([3], [0, 149, 3], list(range(100, 20, -1)), [7, 7]):
        batch = examples.batch(rows)
        assert set(batch) == {ACTIVATIONS, "labels"} and batch[ACTIVATIONS].dtype == torch.float32
        assert torch.equal(batch["labels"], source.labels[rows])
        alone = torch.cat([front(source.batch([row])) for row in rows])
        assert torch.equal(batch[ACTIVATIONS], alone)
    assert torch.equal(examples[149][ACTIVATIONS], front(source.batch([149]))[0])
    joined = examples.collate([examples[4], examples[2]])
    assert all(torch.equal(joined[name], tensor) for name, tensor in examples.batch([4, 2]).items())


def test_none_is_fine() -> None:
    for source, front in ((images(), ImageFront()), (texts(), mean_front), (texts(), token_front)):
        examples = kept(source, front, with_inputs=front is token_front)
        assert all(tensor.shape[0] == 0 for tensor in examples.batch([]).values())
        assert examples.batch([])[ACTIVATIONS].shape[-1] == (WIDTH if isinstance(front, ImageFront) else 2)
        empty = kept(source.subset([]), front)
        empty.prepare()
        assert len(empty) == 0 and len(empty.batch([])[ACTIVATIONS]) == 0


def test_with_inputs_these_are_beside_them() -> None:
    source = images()
    batch = kept(source, ImageFront(), with_inputs=True).batch([5, 1])
    assert set(batch) == {ACTIVATIONS, "pixel_values", "labels"}
    assert torch.equal(batch["pixel_values"], source.batch([5, 1])["pixel_values"])


# Once


def test_each_is_computed_once() -> None:
    front = ImageFront()
    examples = kept(images(), front)
    examples.prepare()
    computed = len(front.rows)
    first = examples.batch(range(150))[ACTIVATIONS]
    examples.prepare()
    examples.subset([3, 5]).prepare()
    assert list(examples.batches(40)) and examples[3] and len(front.rows) == computed
    # 150 rows in parts of 64, which are all of one shape; the size and its trial take made-up rows.
    assert front.rows.count(ROWS) == computed - 1 and computed - 1 == 3 + 4
    assert torch.equal(examples.batch(range(150))[ACTIVATIONS], first)


def test_asked_for_without_preparing_they_are_computed_then() -> None:
    front = ImageFront()
    examples = kept(images(), front)
    assert front.rows == []
    examples.batch([3, 4])
    before = len(front.rows)
    examples.batch([4, 3])
    assert len(front.rows) == before
    examples.batch([4, 5])
    assert len(front.rows) == before + 1


def test_views_share_what_is_known() -> None:
    front, source = ImageFront(), images()
    examples = kept(source, front)
    part = examples.subset([9, 8, 7]).subset([2, 0])
    part.prepare()
    computed = len(front.rows)
    assert torch.equal(examples.batch([7, 9])[ACTIVATIONS], part.batch([0, 1])[ACTIVATIONS])
    assert len(front.rows) == computed and part.labels.tolist() == source.labels[[7, 9]].tolist()
    other = kept(source.subset([9, 8, 7]), front)  # of examples that are themselves a view
    assert torch.equal(other.batch([2, 0])[ACTIVATIONS], part.batch([0, 1])[ACTIVATIONS])


# Texts


def test_texts_are_as_wide_as_the_sources_batch() -> None:
    source = texts()
    examples = kept(source, token_front, with_inputs=True)
    assert examples.shapes_vary and examples.shapes([1, 3]) == source.shapes([1, 3])
    assert examples.subset([3, 1]).shapes([0]) == source.shapes([3])
    for rows in ([0], [1], [3], [0, 2], [5, 0]):
        batch, expected = examples.batch(rows), source.batch(rows)
        assert set(batch) == {ACTIVATIONS, *expected}
        assert all(torch.equal(batch[name], tensor) for name, tensor in expected.items())
        assert batch[ACTIVATIONS].shape == (len(rows), expected["input_ids"].shape[1], 2)
        for place, row in enumerate(rows):
            length = LENGTHS[row]
            assert torch.equal(batch[ACTIVATIONS][place, :length], token_front(source.batch([row]))[0, :length])
            own = source.shapes([row])[0].width  # behind it nothing was computed
            assert not batch[ACTIVATIONS][place, own:].any()
    joined = examples.collate([examples[0], examples[2]])
    assert all(torch.equal(joined[name], tensor) for name, tensor in examples.batch([0, 2]).items())


def test_vectors_of_texts_have_no_width() -> None:
    source = texts()
    examples = kept(source, mean_front)
    assert not examples.shapes_vary and examples.shapes([0, 3]) == [Shape(), Shape()]
    assert examples.batch([3, 0])[ACTIVATIONS][:, 1].tolist() == [20, 3]
    joined = examples.collate([examples[3], examples[0]])
    assert torch.equal(joined[ACTIVATIONS], examples.batch([3, 0])[ACTIVATIONS])


def test_a_text_is_computed_at_its_own_width() -> None:
    """Beside others of one shape alone: models pass over a mask without padding, and add up differently."""
    seen: list[tuple[int, bool]] = []

    def front(batch: Batch) -> Tensor:
        seen.append((batch["input_ids"].shape[1], bool(batch["attention_mask"].all())))
        return mean_front(batch)

    examples = kept(texts(), front)
    examples.batch(range(6))
    assert {width for width, _ in seen} == {8, 16, 20} and {(8, True), (8, False), (16, True), (16, False)} <= set(seen)


# Rows apart


def by_company(found: Tensor, x: Tensor) -> Tensor:
    return found - x.mean(0)[:WIDTH] * 1e-7


def by_place(found: Tensor, x: Tensor) -> Tensor:
    return found * (1 + 1e-6 * (torch.arange(len(x)) % 2))[:, None]


def by_sameness(found: Tensor, x: Tensor) -> Tensor:
    """Where all are alike, by another algorithm."""
    return found * (1 + 1e-6 * bool((x == x[0]).all()))


def by_number(found: Tensor, x: Tensor) -> Tensor:
    return found * (1 + 1e-6 * (len(x) % 7))


@pytest.mark.parametrize("broken", [by_company, by_place, by_sameness])
def test_where_rounding_hangs_on_company_each_is_by_itself(broken: Callable[[Tensor, Tensor], Tensor]) -> None:
    source, front = images(70), ImageFront(broken)
    examples = kept(source, front)
    examples.prepare()
    assert front.rows.count(1) == 70 + 1  # and one to see the size
    for rows in ([3, 9], [69], list(range(70))):
        alone = torch.cat([ImageFront(broken)(source.batch([row])) for row in rows])
        assert torch.equal(examples.batch(rows)[ACTIVATIONS], alone)


def test_all_parts_have_one_number_of_rows() -> None:
    """So that no example decides by which algorithm others are computed."""
    sizes = (1, 3, 64, 70)
    found = []
    for size in sizes:
        front = ImageFront(by_number)
        examples = kept(images(150).subset(range(size)), front)
        examples.prepare()
        assert set(front.rows) == {ROWS, 1} and front.rows.count(1) == 1  # by which the size is seen
        found.append(examples.batch([0])[ACTIVATIONS])
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_front_that_fails_in_the_trial_is_told_and_takes_each_by_itself(caplog) -> None:
    def front(batch: Batch) -> Tensor:
        if len(batch["pixel_values"]) > 1:
            raise RuntimeError("one at a time")
        return ImageFront()(batch)

    examples = kept(images(5), front)
    with caplog.at_level(logging.WARNING):
        assert examples.batch(range(5))[ACTIVATIONS].shape == (5, WIDTH)
    assert "each example is by itself: RuntimeError: one at a time" in caplog.text


def test_each_shape_is_tried_once() -> None:
    shapes: list[tuple[int, int]] = []

    def front(batch: Batch) -> Tensor:
        shapes.append(tuple(batch["input_ids"].shape))
        return mean_front(batch)

    examples = kept(texts([3, 4, 5, 9, 10]), front)
    examples.batch([0])
    assert shapes.count((ROWS, 8)) == 5  # four of the trial, one of the example
    examples.batch([1])
    assert shapes.count((ROWS, 8)) == 6
    examples.subset([3]).batch([0])
    assert shapes.count((ROWS, 16)) == 5


# What cannot be read


def unreadable(odd: list[int], kind: str) -> Examples:
    labels = np.arange(8) % 3
    if kind == "text":
        inputs: list[Any] = [" ".join("xy"[: 1 + i % 2] for _ in range(1 + 3 * i)) for i in range(8)]
        spec: Any = TextSpec(Words(), 40)  # type: ignore[arg-type]
    else:
        from PIL import Image

        inputs = [Image.fromarray(np.full((2, 2), 30 * i, dtype=np.uint8)) for i in range(8)]
        spec = ImageSpec(2, 2, 1, (0.5,), (0.5,))
    inputs = [None if row in odd else value for row, value in enumerate(inputs)]
    raw = RawData(kind, ["a", "b", "c"], inputs, labels, inputs[-1:], labels[-1:], 40)  # type: ignore[arg-type]
    if odd:
        return encode_training(raw, spec).train
    return encode(raw, spec).train


def pixel_front(batch: Batch) -> Tensor:
    return batch["pixel_values"].flatten(1)


@pytest.mark.parametrize("odd", [[0], [7], [2, 3], [0, 1, 2, 3, 4, 5, 6]])
@pytest.mark.parametrize(("kind", "front"), [("image", pixel_front), ("text", mean_front), ("text", token_front)])
def test_one_that_cannot_be_read_stops_no_other(kind: str, front: Any, odd: list[int]) -> None:
    """Wherever it stands: the first one as well, by which sizes might be seen."""
    inputs = front is token_front
    examples = kept(unreadable(odd, kind), front, with_inputs=inputs)
    whole = kept(unreadable([], kind), front, with_inputs=inputs)
    examples.prepare()  # raises nothing
    generator = torch.Generator().manual_seed(0)
    made = examples.made_up(4, examples.shapes([0])[0], 9, generator)
    assert made[ACTIVATIONS].shape[0] == 4
    others = [row for row in range(8) if row not in odd]
    for row in others:
        found, expected = examples.batch([row]), whole.batch([row])
        assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)
    found, expected = examples.batch(others), whole.batch(others)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    for rows in (odd, [others[0], odd[0]]):
        with pytest.raises(UnreadableExample):
            examples.batch(rows)


# What others make of them


def test_made_up_batches_have_the_shapes_of_real_ones_and_nothing_of_them() -> None:
    cases = [(images(), ImageFront(), False), (images(), ImageFront(), True), (texts(), mean_front, False)]
    for source, front, inputs in [*cases, (texts(), token_front, True)]:
        examples = kept(source, front, with_inputs=inputs)
        for row in (0, 4, 3):
            shape, real = examples.shapes([row])[0], examples.batch([row])
            made = examples.made_up(6, shape, 50, torch.Generator().manual_seed(1))
            assert set(made) == set(real) - {"labels"}
            for name, tensor in made.items():
                assert tensor.dtype == real[name].dtype and tensor.shape == (6, *real[name].shape[1:]), name
            again = kept(source.subset([3, 4, 0]), front, with_inputs=inputs)
            same = again.made_up(6, shape, 50, torch.Generator().manual_seed(1))
            assert torch.equal(made[ACTIVATIONS], same[ACTIVATIONS])


def digest(examples: Examples) -> str:
    return examples_digest(examples, [range(2)], examples)


def test_their_content_is_the_sources_and_not_what_was_computed() -> None:
    front, source = ImageFront(), images()
    examples = kept(source, front)
    before = digest(examples)
    assert front.rows == []  # nothing is computed for it
    examples.prepare()
    assert digest(examples) == before == digest(kept(images(), ImageFront(by_company)))
    content = examples.content()
    assert all(torch.equal(content[name], tensor) for name, tensor in source.content().items())
    pixels = source.content()["pixels"].clone()
    pixels[5, 0, 0, 0] ^= 1
    assert digest(kept(ImageExamples(pixels, source.labels, [0.5], [0.25]), front)) != before
    assert digest(examples.subset([1, 0])) != digest(examples.subset([0, 1]))


# Shared by the runs of one process


def test_runs_share_what_one_front_makes_of_the_same_examples() -> None:
    """Another front, other examples, or a run outside get nothing of it."""

    def computed(source: Examples, front_digest: str | None) -> int:
        front = ImageFront()
        examples = kept(source, front, front_digest=None if front_digest is None else lambda: front_digest)
        examples.prepare()
        assert torch.equal(examples.batch([7])[ACTIVATIONS], ImageFront()(source.batch([7])))
        return len(front.rows)

    with shared_activations():
        assert computed(images(), "one") > 0
        assert computed(images(), "one") == 0
        assert computed(images(), "other") > 0
        assert computed(images(149), "one") > 0
        assert computed(images(), None) > 0
    assert computed(images(), "one") > 0


def test_a_run_that_shares_nothing_does_not_ask_what_its_front_is() -> None:
    def asked() -> str:
        raise AssertionError("all weights were read for nothing")

    kept(images(), ImageFront(), front_digest=asked).prepare()


@pytest.mark.parametrize("kind", ["grouped", "by what is in it"])
def test_a_front_whose_ops_hang_on_company_is_given_each_example_by_itself(kind: str) -> None:
    """As mixed experts: a row's rounding hangs on how many rows go with it, which few made-up rows may not show."""
    table = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    sizes: list[int] = []

    def front(batch: Batch) -> Tensor:
        ids = batch["input_ids"]
        sizes.append(len(ids))
        if kind == "grouped":
            starts = torch.arange(0, ids.numel(), ids.shape[1])
            sums = torch.nn.functional.embedding_bag(ids.flatten(), table, starts)
            return sums.unsqueeze(1).expand(-1, ids.shape[1], -1)
        found = table[ids]
        chosen = ids[:, 0] % 2 == 0
        found[chosen] = found[chosen] + 1
        return found

    examples = kept(texts([3, 4, 5]), front)
    examples.batch([0, 1, 2])
    assert sizes[-3:] == [1, 1, 1]
