"""Examples encoded for a model: grey levels, contrast, classes, tokens and pairs of texts."""

import numpy as np
import pytest
import torch
from datasets import Features, Image, Value
from PIL import Image as PILImage

from lora_dp.fed.data.encoding import ImageSpec, TextSpec, encode
from lora_dp.fed.data.opening import open_data
from lora_dp.fed.data.options import DataConfig
from tests.fed.data.word_tokenizer import SPEC, Words, write, write_texts


def test_digits_keep_their_grey_levels():
    train = encode(open_data(DataConfig()), ImageSpec(8, 8, 1, (0.0,), (1.0,))).train
    pixels = train.batch(range(50))["pixel_values"]
    assert pixels.min() == 0 and pixels.max() == 1
    assert (pixels * 16 - (pixels * 16).round()).abs().max() < 0.04


def mixed_images(count: int) -> torch.Tensor:
    """uint8 (N, 3, 6, 5), of contrasts from none to much."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, 3, 6, 5, generator=generator) * torch.linspace(0, 90, count)[:, None, None, None]
    return (values + 255 * torch.rand(count, 1, 1, 1, generator=generator)).clamp(0, 255).to(torch.uint8)


def test_each_image_is_given_the_usual_mean_and_deviation():
    spec = ImageSpec(6, 5, 3, (0.1, 0.2, 0.3), (0.2, 0.3, 0.4), usual=(0.4, 0.15), contrast=True)
    pixels = mixed_images(20)
    found = spec.prepared(pixels)
    assert found.dtype == torch.uint8 and found.shape == pixels.shape
    values = pixels.double() / 255
    mean, deviation = values.mean((1, 2, 3), keepdim=True), values.std((1, 2, 3), keepdim=True)
    expected = ((values - mean) / deviation.clamp(min=0.02) * 0.15 + 0.4).clamp(0, 1) * 255
    assert float((found.double() - expected).abs().max()) <= 0.5 + 1e-3  # to the nearest grey level
    contrasted = found[10:].double() / 255
    assert contrasted.mean((1, 2, 3)).sub(0.4).abs().max() < 0.02
    assert contrasted.std((1, 2, 3)).sub(0.15).abs().max() < 0.02


def test_without_a_usual_contrast_it_is_the_one_that_is_normalised_by():
    spec = ImageSpec(6, 5, 3, (0.4, 0.5, 0.6), (0.1, 0.1, 0.25), contrast=True)
    named = ImageSpec(6, 5, 3, (0.0,) * 3, (1.0,) * 3, usual=(0.5, 0.15), contrast=True)
    pixels = mixed_images(20)
    assert int((spec.prepared(pixels).int() - named.prepared(pixels).int()).abs().max()) <= 1


def test_a_flat_image_is_not_blown_up():
    spec = ImageSpec(6, 5, 1, (0.5,), (0.5,), usual=(0.4, 0.2), contrast=True)
    flat = torch.full((1, 1, 6, 5), 200, dtype=torch.uint8)
    assert torch.equal(spec.prepared(flat), torch.full_like(flat, 102))
    flat[0, 0, 2, 2] = 201  # a grey level beside the others: 1/255 of contrast, over 0.02
    assert int(spec.prepared(flat).max()) <= 102 + 11


def test_each_image_is_prepared_by_itself():
    spec = ImageSpec(6, 5, 3, (0.5,) * 3, (0.5,) * 3, usual=(0.4, 0.2), contrast=True)
    pixels = mixed_images(300)  # more than are taken at once
    found = spec.prepared(pixels)
    assert torch.equal(found, torch.cat([spec.prepared(pixels[row : row + 1]) for row in range(300)]))
    assert torch.equal(spec.prepared(pixels.flip(0)), found.flip(0))
    assert spec.prepared(pixels[:0]).shape == (0, 3, 6, 5)


def test_as_they_are_images_stay():
    pixels = mixed_images(4)
    assert ImageSpec(6, 5, 3, (0.5,) * 3, (0.5,) * 3, usual=(0.4, 0.2)).prepared(pixels) is pixels


def test_both_splits_are_prepared():
    plain, prepared = (
        encode(open_data(DataConfig()), ImageSpec(8, 8, 1, (0.0,), (1.0,), (0.3, 0.1), contrast))
        for contrast in (False, True)
    )
    for before, after in ((plain.train, prepared.train), (plain.validation, prepared.validation)):
        means = after.batch(range(50))["pixel_values"].mean((1, 2, 3))
        assert float((means - 0.3).abs().max()) < 0.03
        assert float((before.batch(range(50))["pixel_values"].mean((1, 2, 3)) - 0.3).abs().max()) > 0.03


def test_string_labels_become_classes_and_texts_tokens(tmp_path):
    folder = write(
        tmp_path / "mail",
        train={"text": ["a bb ccc", "dddd", "", "e"], "label": ["spam", "ham", "spam", "ham"]},
        validation={"text": ["a b c d e f g h i j"], "label": ["spam"]},
    )
    raw = open_data(DataConfig(dataset=folder))
    assert (raw.kind, raw.label_names) == ("text", ["ham", "spam"])
    splits = encode(raw, TextSpec(Words(), 9))
    assert splits.train.labels.tolist() == [1, 0, 1, 0]
    batch = splits.train.batch(range(3))
    assert batch["input_ids"][:, :4].tolist() == [[1, 2, 3, 0], [4, 0, 0, 0], [0, 0, 0, 0]]
    # a text without tokens still has something to attend to
    assert batch["attention_mask"].sum(1).tolist() == [3, 1, 1]
    assert splits.validation.batch([0])["input_ids"].shape == (1, 9)
    shorter = encode(open_data(DataConfig(dataset=folder, max_length=2)), TextSpec(Words(), 9))
    assert shorter.validation.batch([0])["input_ids"].tolist() == [[1, 1]]


def test_integer_labels_are_counted_from_zero(tmp_path):
    raw = open_data(DataConfig(dataset=write_texts(tmp_path / "stars", [5, -1, 3] * 10)))
    assert raw.label_names == ["-1", "3", "5"]
    assert set(raw.train_labels) == {0, 1, 2}


def test_refuses_missing_inputs_and_deep_images(tmp_path):
    folder = write(tmp_path / "holes", train={"text": ["x", None] * 5, "label": [0, 1] * 5})
    with pytest.raises(ValueError, match="row 1 has no text"):
        encode(open_data(DataConfig(dataset=folder)), TextSpec(Words(), 9))
    features = Features({"image": Image(), "label": Value("int64")})
    deep = [PILImage.fromarray(np.full((4, 4), 40_000, dtype=np.uint16))] * 10
    folder = write(tmp_path / "deep", features, train={"image": deep, "label": [0, 1] * 5})
    with pytest.raises(ValueError, match="more than 8 bits"):
        encode(open_data(DataConfig(dataset=folder)), SPEC)
    folder = write(tmp_path / "gaps", features, train={"image": [None] * 10, "label": [0, 1] * 5})
    with pytest.raises(ValueError, match="row 0 has no image"):
        encode(open_data(DataConfig(dataset=folder)), SPEC)


def test_refuses_a_model_for_another_kind():
    with pytest.raises(ValueError, match="the data set holds images but the model takes texts"):
        encode(open_data(DataConfig()), TextSpec(Words(), 9))


def test_pairs_of_texts(tmp_path):
    columns = {
        "premise": ["a man", "two dogs run"],
        "hypothesis": ["someone", "dogs are running"],
        "label": [0, 1],
        "idx": [0, 1],
    }
    folder = write(tmp_path / "data", train=columns, validation=columns)
    raw = open_data(DataConfig(dataset=folder, input_column="premise", pair_column="hypothesis"))
    assert raw.kind == "text" and raw.train_inputs[1] == ("two dogs run", "dogs are running")
    examples = encode(raw, TextSpec(Words(), 5)).train
    batch = examples.batch([1, 0])
    assert batch["input_ids"].tolist() == [[3, 4, 3, 4, 3], [1, 3, 7, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    joined = examples.collate([examples[1], examples[0]])
    assert all(torch.equal(joined[name], batch[name]) for name in batch)
    # The second column is no candidate for the first.
    renamed = write(tmp_path / "other", train={"one": ["a"] * 4, "two": ["b"] * 4, "label": [0, 0, 1, 1]})
    assert (
        open_data(DataConfig(dataset=renamed, pair_column="two", validation_fraction=0.5)).train_inputs
        == [("a", "b")] * 2
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pair_column": "nothing"}, "no column nothing in the data set: set pair_column to one of"),
        ({"pair_column": "label"}, "column label holds no texts: set pair_column"),
        ({"input_column": "text", "pair_column": "text"}, "pair_column and input_column are both text"),
    ],
)
def test_pairs_that_cannot_be(tmp_path, options, message):
    folder = write_texts(tmp_path / "data", [0, 1, 0, 1])
    with pytest.raises(ValueError, match=message):
        open_data(DataConfig(dataset=folder, **options))


def test_a_pair_without_its_second_text_is_named(tmp_path):
    folder = write(tmp_path / "data", train={"a": ["x"] * 4, "b": ["y", None, "y", "y"], "label": [0, 1, 0, 1]})
    raw = open_data(DataConfig(dataset=folder, input_column="a", pair_column="b", validation_fraction=0.5))
    with pytest.raises(ValueError, match="has no text"):
        encode(raw, TextSpec(Words(), 5))
