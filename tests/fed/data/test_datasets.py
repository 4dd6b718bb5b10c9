"""Data sets opened: their splits and columns, wherever they lie, and what is refused."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Features, Image, Value
from PIL import Image as PILImage

from lora_dp.fed.data.encoding import ImageSpec, encode
from lora_dp.fed.data.opening import open_data
from lora_dp.fed.data.options import DataConfig
from tests.fed.data.word_tokenizer import SPEC, write, write_texts


def test_finds_image_and_label_columns_and_the_validation_split(tmp_path):
    features = Features({"id": Value("string"), "picture": Image(), "kind": ClassLabel(names=["cat", "dog"])})
    pictures = [PILImage.new("RGB", (10 + i, 8), (255, 0, 0)) for i in range(4)]
    rows = {"id": list("abcd"), "picture": pictures, "kind": [0, 1, 1, 0]}
    test = {name: column[:2] for name, column in rows.items()}
    folder = write(tmp_path / "pets", features, train=rows, test=test)
    raw = open_data(DataConfig(dataset=folder))
    assert (raw.kind, raw.label_names) == ("image", ["cat", "dog"])
    grey = encode(raw, SPEC)
    assert (len(grey.train), len(grey.validation)) == (4, 2)
    assert grey.train.batch(range(4))["pixel_values"].shape == (4, 1, 16, 16)
    coloured = encode(raw, ImageSpec(6, 5, 3, (0.0,) * 3, (1.0,) * 3)).train[0]["pixel_values"]
    assert torch.equal(coloured, torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 6, 5))


def test_opens_a_folder_of_images(tmp_path):
    for split, count in (("train", 3), ("validation", 2)):
        for label in ("left", "right"):
            (tmp_path / "shapes" / split / label).mkdir(parents=True)
            for i in range(count):
                PILImage.new("L", (8, 8), 30 * i).save(tmp_path / "shapes" / split / label / f"{i}.png")
    splits = encode(open_data(DataConfig(dataset=str(tmp_path / "shapes"))), SPEC)
    assert splits.label_names == ["left", "right"]
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(splits.validation) == 4


def test_holds_out_a_part_of_train(tmp_path):
    folder = write_texts(tmp_path / "one", [0, 1] * 50)
    raw = open_data(DataConfig(dataset=folder, validation_fraction=0.3))
    assert np.bincount(raw.validation_labels).tolist() == [15, 15]
    assert sorted([*raw.train_inputs, *raw.validation_inputs]) == sorted(f"text {i}" for i in range(100))
    # inputs and labels still belong together
    numbers = np.array([int(text.split()[1]) for text in raw.train_inputs])
    assert np.array_equal(numbers % 2, raw.train_labels)


def test_columns_can_be_named(tmp_path):
    columns = {"title": ["t"] * 10, "body": ["b"] * 10, "stars": [1, 2] * 5, "votes": [1, 3] * 5}
    folder = write(tmp_path / "reviews", train=columns)
    raw = open_data(DataConfig(dataset=folder, input_column="title", label_column="votes"))
    assert raw.label_names == ["1", "3"]
    assert set(raw.train_inputs) == {"t"}
    both = "columns of labels and of images or texts: set label_column and input_column to some of title, body, stars"
    with pytest.raises(ValueError, match=both):
        open_data(DataConfig(dataset=folder))
    with pytest.raises(ValueError, match="column of labels: set label_column to one of title, body, stars, votes"):
        open_data(DataConfig(dataset=folder, input_column="body"))
    with pytest.raises(ValueError, match="set input_column to one of title, body, stars, votes"):
        open_data(DataConfig(dataset=folder, label_column="stars"))
    with pytest.raises(ValueError, match="no column topic in the data set: set input_column to one of"):
        open_data(DataConfig(dataset=folder, label_column="stars", input_column="topic"))
    with pytest.raises(ValueError, match="no column score in the data set: set label_column to one of"):
        open_data(DataConfig(dataset=folder, label_column="score"))
    with pytest.raises(ValueError, match="neither images nor texts"):
        open_data(DataConfig(dataset=folder, label_column="stars", input_column="votes"))


def test_all_columns_that_are_missing_are_named_at_once(tmp_path):
    columns = {"title": ["t"] * 10, "stars": [1, 2] * 5}
    wrong = DataConfig(
        dataset=write(tmp_path / "a", train=columns), label_column="s", input_column="t", pair_column="u"
    )
    said = "no column s and t and u in the data set: set label_column and input_column and pair_column to some of title"
    with pytest.raises(ValueError, match=said.replace("column s", "columns s")):
        open_data(wrong)


def test_refuses_labels_that_are_not_classes(tmp_path):
    with pytest.raises(ValueError, match="holds float64, not classes"):
        open_data(DataConfig(dataset=write_texts(tmp_path / "a", [0.5, 1.5])))
    with pytest.raises(ValueError, match="fewer than two classes"):
        open_data(DataConfig(dataset=write_texts(tmp_path / "b", [1, 1])))
    with pytest.raises(ValueError, match="1 rows have a label that the train split does not know"):
        open_data(DataConfig(dataset=write_texts(tmp_path / "c", [0, 1, None])))
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    hidden = {"text": ["x", "y"], "label": [-1, -1]}
    folder = write(tmp_path / "d", features, train={"text": ["x", "y"], "label": [0, 1]}, test=hidden)
    with pytest.raises(ValueError, match="set validation_split to a labelled split"):
        open_data(DataConfig(dataset=folder))


def test_refuses_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no folder .*nowhere: give a folder"):
        open_data(DataConfig(dataset=str(tmp_path / "nowhere")))
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="no data set could be opened in the folder"):
        open_data(DataConfig(dataset=str(tmp_path / "bare")))
    folder = write_texts(tmp_path / "few", [0, 1])
    with pytest.raises(ValueError, match="too few to hold some out: name a validation_split"):
        open_data(DataConfig(dataset=folder))
    with pytest.raises(ValueError, match="has no split dev: set validation_split to one of train"):
        open_data(DataConfig(dataset=folder, validation_split="dev"))
    rows = {"text": ["x", "y"], "label": [0, 1]}
    features = Features({"text": Value("string"), "label": Value("int64")})
    folder = write(tmp_path / "empty", features, train=rows, validation={"text": [], "label": []})
    with pytest.raises(ValueError, match="check its name, and that every split has rows"):
        open_data(DataConfig(dataset=folder))
