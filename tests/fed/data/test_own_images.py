"""Images of a client's own: read as everywhere, and an odd one changes no other."""

import contextlib

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from lora_dp.fed.data.encoding import ImageSpec
from lora_dp.fed.data.opening import open_data
from lora_dp.fed.data.options import DataConfig
from lora_dp.fed.data.own_data import open_own
from lora_dp.fed.data.unreadable import UnreadableExample, encode_training


def test_images(tmp_path):
    """A file that is no image, one that is cut off, one of too many bits, one in a folder of its own."""
    own = tmp_path / "own"
    for i in range(20):
        place = own / "train" / "abc"[i % 3] / f"{i:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        PILImage.new("L", (8, 8), 12 * i).save(place)
    spec = ImageSpec(8, 8, 1, (0.5,), (0.5,))
    before = encode_training(open_own(DataConfig(dataset=str(own))), spec).train
    good = (own / "train" / "a" / "00.png").read_bytes()
    (own / "train" / "a" / "99.png").write_bytes(b"no image")
    (own / "train" / "b" / "99.png").write_bytes(good[:-40])
    (own / "train" / "b" / "98.png").write_bytes(b"")
    PILImage.fromarray(np.zeros((8, 8), np.uint16)).save(own / "train" / "c" / "99.png")
    (own / "train" / "c" / "deep").mkdir()
    (own / "train" / "c" / "deep" / "00.png").write_bytes(good)
    raw = open_own(DataConfig(dataset=str(own)))
    assert raw.label_names == ["a", "b", "c"] and len(raw.train_labels) == 25
    examples = encode_training(raw, spec).train
    found = []
    for row in range(25):
        with contextlib.suppress(UnreadableExample):
            found.append(examples.batch([row]))
    assert len(found) == 20
    for i, batch in enumerate(found):
        assert all(torch.equal(batch[name], before.batch([i])[name]) for name in batch)
    assert sorted(examples.labels.tolist()) == [-1] + [0] * 8 + [1] * 9 + [2] * 7


def test_damaged_images_of_parquet(tmp_path):
    import datasets

    (tmp_path / "own").mkdir()
    PILImage.new("L", (8, 8), 9).save(tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    images = [None if i == 3 else {"bytes": good[:50] if i == 5 else good, "path": None} for i in range(9)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": images, "label": [i % 2 for i in range(9)]}, features=features).to_parquet(
        tmp_path / "own" / "train.parquet"
    )
    examples = encode_training(
        open_own(DataConfig(dataset=str(tmp_path / "own"))), ImageSpec(8, 8, 1, (0.5,), (0.5,))
    ).train
    pixels = examples.batch([0, 1, 2, 4, 6, 7, 8])["pixel_values"]
    assert len(examples) == 9 and bool((pixels == (9 / 255 - 0.5) / 0.5).all())
    for row in (3, 5):
        with pytest.raises(UnreadableExample):
            examples.batch([row])


def test_images_are_those_that_a_run_reads(tmp_path):
    for split in ("train", "validation"):
        for i in range(24):
            place = tmp_path / "own" / split / str(i % 12) / f"{i}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            PILImage.new("RGB", (5, 6), (10 * i, 0, 255)).save(place)
    config = DataConfig(dataset=str(tmp_path / "own"))
    run, own = open_data(config), open_own(config)
    assert own.label_names == run.label_names and own.train_labels.tolist() == run.train_labels.tolist()
    assert [np.asarray(i).tolist() for i in own.train_inputs] == [np.asarray(i).tolist() for i in run.train_inputs]


def test_images_whose_classes_stand_in_a_file_beside_them(tmp_path):
    own = tmp_path / "own" / "train"
    own.mkdir(parents=True)
    for i in range(4):
        PILImage.new("L", (8, 8), i).save(own / f"{i}.png")
    (own / "metadata.csv").write_text("file_name,label\n" + "".join(f"{i}.png,{'yx'[i % 2]}\n" for i in range(4)))
    raw = open_own(DataConfig(dataset=str(tmp_path / "own")))
    assert raw.label_names == ["x", "y"] and raw.train_labels.tolist() == [1, 0, 1, 0]


def test_where_as_many_images_lie_deeper_the_outer_folders_are_the_classes(tmp_path):
    for place in ("a/0", "b/1", "a/deep/2", "b/deep/3"):
        file = tmp_path / "own" / "train" / f"{place}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        PILImage.new("L", (8, 8)).save(file)
    raw = open_own(DataConfig(dataset=str(tmp_path / "own")))
    assert raw.label_names == ["a", "b"] and sorted(raw.train_labels.tolist()) == [-1, -1, 0, 1]
