"""Which files of a folder belong to which split, whatever words are in their names."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_dp.fed.data.opening import open_data
from lora_dp.fed.data.options import DataConfig
from lora_dp.fed.data.own_data import open_own
from lora_dp.fed.data.split_files import check_apart, check_distinct, split_files

ROWS = [{"text": f"word {row} and more", "label": ("ham", "spam")[row % 2]} for row in range(20)]


def write_rows(place: Path, rows: Any = ROWS) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_images(folder: Path, *classes: str, each: int = 10) -> None:
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for row in range(each):
            pixels = np.full((8, 8), 20 * number + row, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"img{row:03d}.png")


def pixels(images: Any) -> list[int]:
    return [int(np.asarray(image.convert("L"))[0, 0]) for image in images]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize(
    "name",
    [
        "data.jsonl",
        "train.jsonl",
        "training.jsonl",
        "train/training.jsonl",
        "training/train-1.jsonl",
        "train-training.jsonl",
        "train_2024_training.jsonl",
        "data/train/train.jsonl",
        "training-data/train/a.jsonl",
        "pre-training/train.jsonl",
        "2024/training/train/part.jsonl",
        "data/train-00000-of-00001.jsonl",
        "test.jsonl",
        "my-test-set/a.jsonl",
    ],
)
def test_every_row_of_a_file_comes_once(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / name)
    config = DataConfig(dataset=str(tmp_path))
    raw = open_data(config)
    assert sorted([*raw.train_inputs, *raw.validation_inputs]) == sorted(row["text"] for row in ROWS)
    assert sorted(open_own(config).train_inputs) == sorted(row["text"] for row in ROWS)


def test_a_name_with_brackets_is_no_pattern(tmp_path: Path) -> None:
    write_rows(tmp_path / "train-[1].jsonl")
    write_rows(tmp_path / "train-2.jsonl", ROWS[:4])
    write_rows(tmp_path / "test.jsonl", ROWS[:2])
    raw = open_data(DataConfig(dataset=str(tmp_path)))
    assert (len(raw.train_labels), len(raw.validation_labels)) == (24, 2)


@pytest.mark.slow
@pytest.mark.parametrize("within", ["", "train", "data/train"])
@pytest.mark.parametrize(
    "classes",
    [
        ("bus", "train_station"),
        ("beaker", "test tube"),
        ("dev_board", "arduino"),
        ("valid", "invalid"),
        ("eval", "other"),
        ("positive test", "negative test"),
        ("pre-training", "post"),
        ("train_station", "test_tube"),
    ],
)
def test_the_name_of_a_class_is_no_split(tmp_path: Path, classes: tuple[str, str], within: str) -> None:
    write_images(tmp_path / within, *classes)
    config = DataConfig(dataset=str(tmp_path))
    raw = open_data(config)
    assert raw.label_names == sorted(classes) and len(raw.validation_labels) == 4
    assert sorted(pixels([*raw.train_inputs, *raw.validation_inputs])) == [*range(10), *range(20, 30)]
    assert sorted(pixels(open_own(config, classes).train_inputs)) == [*range(10), *range(20, 30)]


@pytest.mark.parametrize("classes", [("bus", "train"), ("bus", "training"), ("other", "test")])
def test_below_a_folder_train_any_name_is_a_class(tmp_path: Path, classes: tuple[str, str]) -> None:
    write_images(tmp_path / "train", *classes)
    raw = open_data(DataConfig(dataset=str(tmp_path)))
    assert raw.label_names == sorted(classes) and len(raw.train_labels) + len(raw.validation_labels) == 20


def test_a_class_named_as_a_split_says_what_to_do(tmp_path: Path) -> None:
    write_images(tmp_path, "bus", "train")
    for read in (open_data, open_own):
        with pytest.raises(ValueError, match="folder bus stands beside train, which is named as a split: put all that"):
            read(DataConfig(dataset=str(tmp_path)))


@pytest.mark.parametrize(
    "name", ["img_test_030.png", "test.png", "eval-3.png", "2024-dev-1.png", "train-3.png", "val.PNG"]
)
@pytest.mark.parametrize("within", ["", "train"])
def test_one_more_image_changes_nothing_of_the_others(tmp_path: Path, name: str, within: str) -> None:
    write_images(tmp_path / within, "cats", "dogs")
    Image.new("L", (8, 8), 99).save(tmp_path / within / "cats" / name)
    config = DataConfig(dataset=str(tmp_path))
    assert sorted(pixels(open_own(config, ("cats", "dogs")).train_inputs)) == [*range(10), *range(20, 30), 99]
    raw = open_data(config)
    assert len(raw.train_labels) + len(raw.validation_labels) == 21


@pytest.mark.parametrize("name", ["test", "val", "training"])
def test_an_image_deeper_than_the_others_is_an_odd_one(tmp_path: Path, name: str) -> None:
    write_images(tmp_path, "cats", "dogs")
    (tmp_path / "cats" / name).mkdir()
    Image.new("L", (8, 8), 99).save(tmp_path / "cats" / name / "img1.png")
    raw = open_own(DataConfig(dataset=str(tmp_path)), ("cats", "dogs"))
    assert len(raw.train_labels) == 21 and (raw.train_labels < 0).sum() == 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["train.csv", "test.csv"], {"train": ["train.csv"], "test": ["test.csv"]}),
        (["train.csv", "dev.csv", "notes.csv"], {"train": ["train.csv"], "validation": ["dev.csv"]}),
        (["sst_train.csv.gz", "sst_valid.csv.gz"], {"train": ["sst_train.csv.gz"], "validation": ["sst_valid.csv.gz"]}),
        (
            [
                "data/train-00000-of-00002.parquet",
                "data/train-00001-of-00002.parquet",
                "data/test-00000-of-00001.parquet",
            ],
            {
                "train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
                "test": ["data/test-00000-of-00001.parquet"],
            },
        ),
        (["train/a.csv", "val/a.csv", "README.md"], {"train": ["train/a.csv"], "validation": ["val/a.csv"]}),
        (["Training/x.csv", "Testing/x.csv"], {"train": ["Training/x.csv"], "test": ["Testing/x.csv"]}),
        (["train_images/a/1.png", "test_images/a/2.png"], {"train": ["train_images/**"], "test": ["test_images/**"]}),
        (
            ["train2017/1.png", "train2017/metadata.csv", "val2017/2.png"],
            {"train": ["train2017/**"], "validation": ["val2017/**"]},
        ),
        (["train/x/1.png", "labels.csv"], {"train": ["**"]}),
        (["train/x/1.png", "test/x/1.png", "labels.csv"], {"train": ["train/**"], "test": ["test/**"]}),
        (["train-[1].csv", "test.csv"], {"train": ["train-[[]1].csv"], "test": ["test.csv"]}),
        (["one.csv", "two.csv"], {"train": ["one.csv", "two.csv"]}),
        (["train-test.csv", "other.csv"], {"train": ["other.csv", "train-test.csv"]}),
        (["a/1.png", "b/2.png"], {"train": ["**"]}),
        (["test/1.csv", "dev/1.csv"], {"validation": ["dev/1.csv"], "test": ["test/1.csv"]}),
        (["test.csv", "dev.csv"], {"validation": ["dev.csv"], "test": ["test.csv"]}),
        (["__MACOSX/train/a.csv", ".cache/train.csv", "a.csv"], {"train": ["a.csv"]}),
        (["README.md"], {"train": ["**"]}),
        (["LICENSE.txt"], {"train": ["LICENSE.txt"]}),
        (["a.csv", "a.csv~"], {"train": ["a.csv"]}),
        (["train.csv", "train.csv.bak", "test.csv"], {"train": ["train.csv"], "test": ["test.csv"]}),
        (
            ["train/a.csv", "train/a.csv.orig", "train/.git/b.csv", "val/a.csv"],
            {"train": ["train/a.csv"], "validation": ["val/a.csv"]},
        ),
        (
            ["a/[1].png", "a/[1].png.bak", "b/2.png", "metadata.csv"],
            {"train": ["a/[[]1].png", "b/2.png", "metadata.csv"]},
        ),
        (["a/1.png", "b/2.png", "Thumbs.db", "LICENSE"], {"train": ["**"]}),
        (
            ["images/train/a/1.png", "images/val/a/1.png", "classes.txt"],
            {"train": ["images/train/**"], "validation": ["images/val/**"]},
        ),
        (["data/train.csv", "data/test.csv", "LICENSE.txt"], {"train": ["data/train.csv"], "test": ["data/test.csv"]}),
        (
            ["train/1.jpg", "train/2.jpg", "test/3.jpg", "annotations/x.json"],
            {"train": ["train/**"], "test": ["test/**"]},
        ),
        (
            ["train/a.csv", "train/b.csv", "test/c.csv", "figures/plot.png"],
            {"train": ["train/a.csv", "train/b.csv"], "test": ["test/c.csv"]},
        ),
        (
            [
                "train/data-00000.arrow",
                "train/state.json",
                "train/dataset_info.json",
                "test/data-00000.arrow",
                "test/state.json",
                "dataset_dict.json",
            ],
            {"train": ["train/data-00000.arrow"], "test": ["test/data-00000.arrow"]},
        ),
        (
            ["2023/train.csv", "2024/train.csv", "2024/test.csv"],
            {"train": ["2023/train.csv", "2024/train.csv"], "test": ["2024/test.csv"]},
        ),
        (["a.csv", "1.txt", "2.txt", "3.txt"], {"train": ["a.csv"]}),
        (["a.csv", "test/b.csv"], {"train": ["a.csv", "test/b.csv"]}),
        (["a.csv", "validation.csv"], {"train": ["a.csv", "validation.csv"]}),
        (["train/a.csv", "test/b.csv", "classes.csv"], {"train": ["train/a.csv"], "test": ["test/b.csv"]}),
    ],
)
def test_splits_are_told_at_the_top(tmp_path: Path, files: list[str], expected: dict[str, list[str]]) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(f"text,label\na,{file}\n")
    assert split_files(str(tmp_path)) == expected


@pytest.mark.parametrize(
    ("name", "text", "listed"),
    [
        ("README.md", "---\nconfigs:\n- config_name: default\n  data_files: a.csv\n---\n", True),
        (".huggingface.yaml", "configs: []\n", True),
        ("README.md", "---\nlicense: mit\n---\n# Data\n", False),
        ("README.md", "# Data\n---\nconfigs:\n---\n", False),
        ("README.md", "---\nconfigs: [\n---\n", False),
        ("README.md", "---\n- configs\n---\n", False),
    ],
)
def test_what_the_folder_lists_itself_is_left_to_it(tmp_path: Path, name: str, text: str, listed: bool) -> None:
    (tmp_path / name).write_text(text)
    assert (split_files(str(tmp_path)) is None) is listed


def test_a_file_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a.jsonl\n"
        "  - split: test\n    path: '*.jsonl'\n---\n"
    )
    for read in (open_data, open_own):
        with pytest.raises(ValueError, match=r"the file a.jsonl is in train and in test: list the files of each split"):
            read(DataConfig(dataset=str(tmp_path)))


@pytest.mark.parametrize("copy", ["data.jsonl~", "data.jsonl.bak", "data.jsonl.orig", "#data.jsonl#"])
@pytest.mark.parametrize("within", ["", "train"])
def test_an_editors_copy_is_no_data(tmp_path: Path, copy: str, within: str) -> None:
    write_rows(tmp_path / within / "data.jsonl")
    write_rows(tmp_path / within / copy)
    config = DataConfig(dataset=str(tmp_path))
    raw = open_data(config)
    assert len(raw.train_labels) + len(raw.validation_labels) == len(open_own(config).train_labels) == len(ROWS)


def test_a_copy_of_an_image_is_no_data(tmp_path: Path) -> None:
    write_images(tmp_path, "cats", "dogs")
    shutil.copy(tmp_path / "cats" / "img000.png", tmp_path / "cats" / "img000.png.bak")
    config = DataConfig(dataset=str(tmp_path))
    raw = open_data(config)
    assert len(raw.train_labels) + len(raw.validation_labels) == len(open_own(config).train_labels) == 20


@pytest.mark.parametrize(
    ("first", "copy"),
    [("data.jsonl", "data - Copy.jsonl"), ("data.jsonl", "backup/data.jsonl"), ("train/data.jsonl", "train/old.jsonl")],
)
def test_two_files_of_the_same_bytes_are_refused(tmp_path: Path, first: str, copy: str) -> None:
    write_rows(tmp_path / first)
    write_rows(tmp_path / copy)
    for read in (open_data, open_own):
        with pytest.raises(ValueError, match="holds the same as .*, so that every example would come twice: keep one"):
            read(DataConfig(dataset=str(tmp_path)))


@pytest.mark.parametrize("packed", ["data.jsonl.gz", "data.zip", "data.jsonl.xz"])
def test_a_file_beside_what_it_was_unpacked_from_is_refused(tmp_path: Path, packed: str) -> None:
    write_rows(tmp_path / "data.jsonl")
    (tmp_path / packed).write_bytes(b"packed")
    with pytest.raises(ValueError, match="holds the same as"):
        open_data(DataConfig(dataset=str(tmp_path)))


def test_the_order_of_a_folder_is_that_of_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order in which the file system has them: rows are drawn by number."""
    names = [f"{letter}.jsonl" for letter in "cabd"]
    for number, name in enumerate(names):
        write_rows(tmp_path / name, ROWS[number:])
    found = []
    for order in (sorted, lambda paths: sorted(paths, reverse=True)):
        monkeypatch.setattr(Path, "rglob", lambda self, pattern, order=order: iter(order(self.glob(f"**/{pattern}"))))
        found.append(split_files(str(tmp_path)))
    assert found[0] == found[1] == {"train": sorted(names)}


def test_empty_files_are_no_copies_of_one_another(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.csv").touch()
    check_distinct([tmp_path / "a.csv", tmp_path / "b.csv"])


def test_files_that_differ_are_all_read(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ROWS[:10])
    write_rows(tmp_path / "b.jsonl", ROWS[10:])
    assert len(open_own(DataConfig(dataset=str(tmp_path))).train_labels) == 20


def test_a_file_is_named_that_is_twice_in_one_split() -> None:
    check_apart({"train": ["x/a.csv", "b.csv"], "test": ["y/a.csv"]})
    with pytest.raises(ValueError, match="the file a.csv is twice in train"):
        check_apart({"train": ["x/a.csv", "x/a.csv"]})


def test_what_cannot_be_opened_is_said_in_one_sentence(tmp_path: Path) -> None:
    write_images(tmp_path, "cats", "dogs")
    (tmp_path / "cats" / "a.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="no data set could be opened in the folder"):
        open_data(DataConfig(dataset=str(tmp_path)))
