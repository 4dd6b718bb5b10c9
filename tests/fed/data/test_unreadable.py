"""Examples that cannot be encoded: they keep their place and their label, no batch has them, and the log tells."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lora_dp.fed.data.encoding import ImageSpec, RawData, TextSpec, encode
from lora_dp.fed.data.unreadable import UnreadableExample, encode_training
from tests.fed.data.word_tokenizer import Words

TEXTS = [" ".join("xy"[: 1 + i % 2] for _ in range(1 + 3 * i)) for i in range(8)]  # of 1, 4, … 22 words
TOKENS, PIXELS = TextSpec(Words(), 40), ImageSpec(2, 2, 1, (0.5,), (0.5,))


def raw(inputs, labels=None, kind="text"):
    labels = np.arange(len(inputs)) % 3 if labels is None else np.asarray(labels)
    return RawData(kind, ["a", "b", "c"], inputs, labels, ["of the validation"], np.array([1]), 40)


def with_odd(odd, inputs=TEXTS):
    return [None if row in odd else text for row, text in enumerate(inputs)]


@pytest.mark.parametrize("odd", [[0], [7], [2, 3], [0, 1, 2, 4, 5, 6, 7], [1, 3, 5, 7]])
def test_the_others_are_as_they_are_without_it(odd, caplog):
    with caplog.at_level(logging.ERROR):
        splits = encode_training(raw(with_odd(odd)), TOKENS)
    examples, whole = splits.train, encode(raw(TEXTS), TOKENS).train
    assert len(examples) == 8 and examples.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert len(splits.validation) == 0 and (splits.label_names, splits.kind) == (["a", "b", "c"], "text")
    others = [row for row in range(8) if row not in odd]
    for rows in ([others[0]], others, others[::-1]):
        found, expected = examples.batch(rows), whole.batch(rows)
        assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in found)
        assert examples.shapes(rows) == whole.shapes(rows)
    for rows in (odd, [*others, odd[0]], [odd[0], others[0]]):
        with pytest.raises(UnreadableExample):
            examples.batch(rows)
    assert examples.shapes_vary and examples.shapes([]) == []
    # One that cannot be read has the shape of one that can, whichever.
    assert all(shape in whole.shapes(others) for shape in examples.shapes(odd))
    part = examples.subset([odd[0], others[0]])
    assert part.batch([1])["labels"].tolist() == [others[0] % 3] and len(part.shapes([0, 1])) == 2
    with pytest.raises(UnreadableExample):
        part.batch([0])
    assert "Some of the data cannot be read, and will contribute nothing: ValueError: row" in caplog.text
    assert f"{len(odd)} of 8 examples cannot be read." in caplog.text and "none of the" not in caplog.text


def test_what_can_be_read_is_encoded_as_everywhere_and_nothing_is_told(caplog):
    with caplog.at_level(logging.ERROR):
        splits = encode_training(raw(TEXTS, np.arange(8, dtype=np.int32) % 3), TOKENS)
    whole = encode(raw(TEXTS), TOKENS).train
    assert type(splits.train) is type(whole) and len(splits.validation) == 0 and caplog.text == ""
    assert all(tensor.equal(whole.content()[name]) for name, tensor in splits.train.content().items())


def test_where_nothing_can_be_read_every_batch_is_refused():
    """Its shapes are those of examples that all have one."""
    for inputs in ([None], [None] * 3):
        examples = encode_training(raw(inputs), TOKENS).train
        assert len(examples) == len(inputs) and not examples.shapes_vary
        assert examples.shapes([0]) == [(0, False)] and set(examples.content()) == {"rows", "labels", "places"}
        with pytest.raises(UnreadableExample):
            examples.batch([0])


@pytest.mark.parametrize("odd", [[], [5]])
def test_an_example_of_no_class_counts_and_contributes_nothing(odd, caplog):
    labels = np.array([0, 1, 2, -1, 0, 1, -1, 0], dtype=np.int32)
    with caplog.at_level(logging.ERROR):
        examples = encode_training(raw(with_odd(odd), labels), TOKENS).train
    assert examples.labels.tolist() == labels.tolist() and examples.labels.dtype == torch.long
    readable = [row for row in range(8) if row not in (3, 6, *odd)]
    assert examples.batch(readable)["labels"].tolist() == labels[readable].tolist()
    for row in (3, 6, *odd):
        with pytest.raises(UnreadableExample):
            examples.batch([row])
    assert "2 examples have a label that is none of the 3 classes" in caplog.text
    assert f"{2 + len(odd)} of 8 examples cannot be read." in caplog.text


def test_what_examples_are_made_of_is_all_told():
    """A digest of it tells data apart that differ in one text, or in which text cannot be read."""
    found = [
        encode_training(raw(with_odd([odd], texts)), TOKENS).train.content()
        for odd, texts in ((1, TEXTS), (1, TEXTS), (2, TEXTS), (1, [*TEXTS[:-1], "other words"]))
    ]

    def alike(one, other):
        return all(one[name].equal(other[name]) for name in one)

    assert alike(found[0], found[1]) and not alike(found[0], found[2]) and not alike(found[0], found[3])
    assert found[0].keys() >= {"rows", "labels", "places", "readable ids", "readable lengths"}


def test_images_of_which_one_is_missing():
    images = [None if row == 2 else Image.new("L", (2, 2), 50 * row) for row in range(5)]
    examples = encode_training(raw(images, kind="image"), PIXELS).train
    assert examples.batch([0, 4])["pixel_values"][:, 0, 0, 0].tolist() == pytest.approx([-1.0, 200 / 127.5 - 1])
    assert not examples.shapes_vary and examples.shapes([2, 0]) == [(0, False)] * 2
    with pytest.raises(UnreadableExample):
        examples.batch([2])


def test_a_model_of_another_kind_is_refused_whatever_the_data_hold():
    for inputs in (TEXTS, [None] * 3):
        with pytest.raises(ValueError, match="holds texts but the model takes images"):
            encode_training(raw(inputs), PIXELS)


def test_single_examples_are_joined_as_those_of_whole_data_are():
    examples, whole = encode_training(raw(with_odd([1])), TOKENS).train, encode(raw(TEXTS), TOKENS).train
    found, expected = (kind.collate([kind[0], kind[5]]) for kind in (examples, whole))
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in found)


def completions(pairs):
    none = {"label_names": [], "validation_inputs": [], "validation_labels": np.arange(0)}
    return replace(raw(pairs, np.zeros(len(pairs), dtype=np.int64)), task="causal-lm", **none)


class Ending(Words):
    eos_token_id = 9


PAIRS = [("a bb", "ccc"), ("dddd", "e ff"), ("g", "hhh i jj")]


def test_targets_of_completions_are_those_of_the_texts_that_can_be_read():
    spec = TextSpec(Ending(), 40)
    found = encode_training(completions([PAIRS[0], (None, "x"), *PAIRS[1:]]), spec).train
    whole = encode(completions(PAIRS), spec).train
    for row, other in ((0, 0), (2, 1), (3, 2)):
        assert found.batch([row])["labels"].equal(whole.batch([other])["labels"])
        assert found.targets([row]).equal(whole.targets([other]))
    with pytest.raises(UnreadableExample):
        found.batch([1])
    shape = found.shapes([0])[0]
    drawn = found.made_up_targets(5, shape, 7, torch.Generator().manual_seed(1))
    assert drawn.equal(whole.made_up_targets(5, shape, 7, torch.Generator().manual_seed(1))) and drawn.dim() == 2


def test_where_none_can_be_read_targets_are_classes():
    found = encode_training(raw([None] * 3), TOKENS).train
    assert found.targets([2, 0]).tolist() == [2, 0]
    drawn = found.made_up_targets(5, found.shapes([0])[0], 7, torch.Generator().manual_seed(1))
    assert drawn.shape == (5,)
