"""A client's own data: one odd example stays in the number of examples, contributes nothing, and changes no other."""

import contextlib
import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image as PILImage

from lora_dp.fed.data.encoding import ImageSpec, TextSpec
from lora_dp.fed.data.opening import open_data
from lora_dp.fed.data.options import DataConfig
from lora_dp.fed.data.own_data import open_own
from lora_dp.fed.data.own_rows import MISSING, csv_rows, json_rows
from lora_dp.fed.data.unreadable import UnreadableExample, encode_training
from tests.fed.data.test_datasets import Words

Row = dict[str, Any]
ODD = 11  # its place among the rows


class Tokens(Words):
    """As real tokenizers, it takes what can be written in UTF-8 alone."""

    def __call__(self, texts, pairs, **options):
        [text.encode() for text in [*texts, *(pairs or ())]]
        return super().__call__(texts, pairs, **options)


def plain(count: int = 30) -> list[Row]:
    return [{"text": f"some words {'x' * (i + 1)}", "label": ["ham", "spam", "egg"][i % 3]} for i in range(count)]


def as_jsonl(path: Path, rows: list[Row]) -> None:
    (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_array(path: Path, rows: list[Row]) -> None:
    (path / "train.json").write_text(json.dumps(rows, indent=1))


def as_csv(path: Path, rows: list[Row]) -> None:
    pd.DataFrame(rows).to_csv(path / "train.csv", index=False)


def as_tsv(path: Path, rows: list[Row]) -> None:
    pd.DataFrame(rows).to_csv(path / "train.tsv", index=False, sep="\t")


def as_parquet(path: Path, rows: list[Row]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path / "train.parquet")


WRITERS = {"jsonl": as_jsonl, "array": as_array, "csv": as_csv, "tsv": as_tsv, "parquet": as_parquet}


def folder(path: Path, rows: list[Row], write: Callable[[Path, list[Row]], None]) -> str:
    path.mkdir()
    write(path, rows)
    return str(path)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def assert_odd_alone(clean: str, odd: str, classes: list[str] | None = None, **columns: str) -> None:
    """Of two folders, the second with one example more, at `ODD`, that cannot be read."""
    spec = TextSpec(Tokens(), 16)
    without, found = (open_own(DataConfig(dataset=place, **columns), classes) for place in (clean, odd))
    assert found.label_names == without.label_names and len(found.train_labels) == len(without.train_labels) + 1
    plain_ones, examples = encode_training(without, spec).train, encode_training(found, spec).train
    others = [row for row in range(len(examples)) if row != ODD]
    for i, row in enumerate(others):
        one, other = plain_ones.batch([i]), examples.batch([row])
        assert all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()
    assert examples.shapes_vary and examples.shapes(others) == plain_ones.shapes(range(len(others)))
    assert examples.shapes([ODD])[0] in plain_ones.shapes(range(len(others)))
    with pytest.raises(UnreadableExample):
        examples.batch([ODD])
    with pytest.raises(UnreadableExample):
        examples.batch([0, ODD])


ODD_ROWS = {
    "label null": {"text": "x", "label": None},
    "text null": {"text": None, "label": "ham"},
    "label a number": {"text": "x", "label": 3},
    "label true": {"text": "x", "label": True},
    "label a fraction": {"text": "x", "label": 0.5},
    "label NaN": {"text": "x", "label": float("nan")},
    "label a list": {"text": "x", "label": ["ham"]},
    "label nested": {"text": "x", "label": {"is": {"a": ["ham"]}}},
    "text a number": {"text": 7, "label": "ham"},
    "text a list": {"text": ["x"], "label": "ham"},
    "text nested": {"text": {"a": [1, {"b": None}]}, "label": "ham"},
    "text infinite": {"text": float("inf")},
    "nothing": {},
    "another column": {"title": "x", "label": "ham"},
    "surrogate": {"text": "\ud800", "label": "ham"},
    "label surrogate": {"text": "x", "label": "\ud800"},
    "last surrogate": {"text": "x", "label": "\udfff"},
    "long label": {"text": "x", "label": 10**400},
}


@pytest.mark.parametrize("write", ["jsonl", "array"])
@pytest.mark.parametrize("kind", ODD_ROWS)
def test_an_odd_row_of_json(kind, write, tmp_path):
    rows = plain()
    assert_odd_alone(
        folder(tmp_path / "clean", rows, WRITERS[write]),
        folder(tmp_path / "odd", [*rows[:ODD], ODD_ROWS[kind], *rows[ODD:]], WRITERS[write]),
    )


@pytest.mark.parametrize(
    "line",
    [
        b"no json",
        b'{"text": "x", "label": ',
        b'["ham"]',
        b"7",
        b"null",
        b"\xff\xfe\x00",
        b'{"text": "\xff", "label": "ham"}',
        b'{"text": ' + b"[" * 10**5 + b"]" * 10**5 + b', "label": "ham"}',
        b'{"text": "x", "label": ' + b"1" * 10**4 + b"}",
    ],
)
def test_an_odd_line_of_json(line, tmp_path):
    clean = folder(tmp_path / "clean", plain(), as_jsonl)
    lines = (tmp_path / "clean" / "train.jsonl").read_bytes().splitlines()
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "train.jsonl").write_bytes(b"\n".join([*lines[:ODD], line, *lines[ODD:]]))
    assert_odd_alone(clean, str(odd))


def test_an_endless_value_is_an_example_like_others(tmp_path):
    rows = [*plain(), {"text": "y" * 10**7, "label": "ham"}]
    raw = open_own(DataConfig(dataset=folder(tmp_path / "own", rows, as_csv)))
    examples = encode_training(raw, TextSpec(Tokens(), 4)).train
    assert examples.batch([30])["input_ids"].tolist() == [[10**7, 0, 0, 0]]


@pytest.mark.parametrize(
    "line",
    [
        b"x,",
        b"x",
        b",ham",
        b"x,ham,more",
        b"x,NA",
        b"nan,ham",
        b"x,3",
        b"x,0.5",
        b"\xff,ham",
        b"x,\xff",
        b'"",ham',
        b'"x,ham',
        b'"',
        b'"x,ham,"',
        b'x,"ham',
        b'"x"y",z"w,ham',
    ],
)
def test_an_odd_line_of_csv(line, tmp_path):
    """Others have quotes as well, in which an open one might end."""
    rows = plain()
    rows[20]["text"], rows[25]["text"] = "some, words", 'a "quoted" word'
    clean = folder(tmp_path / "clean", rows, as_csv)
    lines = (tmp_path / "clean" / "train.csv").read_bytes().splitlines()
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "train.csv").write_bytes(b"\n".join([*lines[: ODD + 1], line, *lines[ODD + 1 :]]))
    assert_odd_alone(clean, str(odd))


def test_a_missing_cell_turns_no_number_into_another(tmp_path):
    """pandas reads, and writes, a column of integers with a missing one as floats."""
    rows = [{**row, "label": [2, 10, 1][i % 3]} for i, row in enumerate(plain())]
    clean = folder(tmp_path / "clean", rows, as_csv)
    gap = [*rows[:ODD], {"text": "x", "label": None}, *rows[ODD:]]
    for write in ("csv", "tsv", "jsonl", "parquet"):
        assert_odd_alone(clean, folder(tmp_path / write, gap, WRITERS[write]))
    assert "10.0" in (tmp_path / "csv" / "train.csv").read_text()
    frame = pd.DataFrame(gap)
    floats = folder(tmp_path / "floats", gap, lambda path, _: frame.to_parquet(path / "train.parquet"))
    assert frame["label"].dtype == np.float64
    assert_odd_alone(clean, floats)
    assert open_own(DataConfig(dataset=floats)).label_names == ["1", "2", "10"]


@pytest.mark.parametrize("odd", [{"text": "x", "label": None}, {"text": None, "label": "ham"}])
def test_nulls_of_parquet(odd, tmp_path):
    rows = plain()
    assert_odd_alone(
        folder(tmp_path / "clean", rows, as_parquet),
        folder(tmp_path / "odd", [*rows[:ODD], odd, *rows[ODD:]], as_parquet),
    )


@pytest.mark.parametrize("column", ["text", "label"])
def test_bytes_of_parquet_that_are_no_text(column, tmp_path):
    rows = plain()

    def write(path: Path, rows: list[Row]) -> None:
        columns = {
            name: pa.array([row[name].encode() for row in rows], pa.binary()).view(pa.string())
            for name in ("text", "label")
        }
        odd = pa.array([b"\xff\xfe" if i == ODD else row[column].encode() for i, row in enumerate(rows)], pa.binary())
        pq.write_table(pa.table({**columns, column: odd.view(pa.string())}), path / "train.parquet")

    assert_odd_alone(
        folder(tmp_path / "clean", rows, as_parquet),
        folder(tmp_path / "odd", [*rows[:ODD], {"text": "x", "label": "ham"}, *rows[ODD:]], write),
    )


@pytest.mark.parametrize("value", [-1, None, 2, 9])
def test_a_hidden_class_of_parquet(value, tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = [{"text": f"text {'x' * i}", "label": i % 2} for i in range(20)]

    def write(path: Path, rows: list[Row]) -> None:
        # Other writers than datasets do not check that a number has a name.
        table = datasets.Dataset.from_list([{**row, "label": 0} for row in rows], features=features).data.table
        labels = pa.array([row["label"] for row in rows], pa.int64())
        pq.write_table(table.set_column(1, "label", labels), path / "train.parquet")

    odd = [*rows[:ODD], {"text": "x", "label": value}, *rows[ODD:]]
    assert_odd_alone(folder(tmp_path / "clean", rows, write), folder(tmp_path / "odd", odd, write))
    named = open_own(DataConfig(dataset=str(tmp_path / "odd")), ["yes", "other", "no"])
    assert set(named.train_labels) == {-1, 0, 2} and named.train_labels[1] == 0


def test_a_pair_without_its_second_text(tmp_path):
    rows = [{"a": row["text"], "b": "and more", "label": row["label"]} for row in plain()]
    for i, second in enumerate((None, 3, ["x"], "\ud800")):
        odd = [*rows[:ODD], {"a": "x", "b": second, "label": "ham"}, *rows[ODD:]]
        assert_odd_alone(
            folder(tmp_path / f"clean{i}", rows, as_jsonl),
            folder(tmp_path / f"odd{i}", odd, as_jsonl),
            input_column="a",
            pair_column="b",
        )


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


# Well-kept data are read as everywhere else


@pytest.mark.parametrize(
    "write, labels",
    [
        *((write, labels) for write in WRITERS for labels in (["b", "a", "c"], [10, 2, -1])),
        ("jsonl", ["10", "2", "x"]),
        ("parquet", ["10", "2", "x"]),
    ],
)
def test_data_without_anything_odd_are_those_that_a_run_reads(write, labels, tmp_path):
    rows = [{**row, "label": labels[i % 3], "id": i} for i, row in enumerate(plain())]
    rows[3]["text"] = 'a "quoted" text,\nof two lines'
    rows[4]["text"] = "2020"
    place = folder(tmp_path / "own", rows, WRITERS[write])
    first = next((tmp_path / "own").iterdir())
    (tmp_path / "own" / first.name.replace("train", "validation")).write_bytes(first.read_bytes())
    run, own = open_data(DataConfig(dataset=place)), open_own(DataConfig(dataset=place))
    assert own.label_names == run.label_names and own.kind == run.kind
    assert list(own.train_inputs) == list(run.train_inputs)
    assert own.train_labels.tolist() == run.train_labels.tolist() and len(own.validation_labels) == 0


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


def test_compressed_files_and_several(tmp_path):
    rows = plain()
    (tmp_path / "own").mkdir()
    for part in (0, 1):
        lines = "".join(json.dumps(row) + "\n" for row in rows[15 * part : 15 * part + 15])
        (tmp_path / "own" / f"train-{part}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    raw = open_own(DataConfig(dataset=str(tmp_path / "own")))
    assert list(raw.train_inputs) == [row["text"] for row in rows]


def test_what_is_not_trained_on_is_not_read(tmp_path):
    own = tmp_path / "own"
    place = folder(own, plain(), as_csv)
    (own / "validation.csv").write_bytes(b'"\n\xff,,,,\n')
    (own / "test.csv").write_bytes(b"")
    assert len(open_own(DataConfig(dataset=place)).train_labels) == 30


@pytest.mark.parametrize(
    ("write", "values", "is_text"),
    [
        ("jsonl", ["a", "b", 1, 2], True),
        ("jsonl", ["a", "b", 1, 2, 3], False),
        ("jsonl", ["a", None, None], True),
        ("jsonl", [None, None], False),
        ("jsonl", [1, 2], False),
        ("csv", ["a", "1", "b", "2"], True),
        ("csv", ["a", "1", "b", "2", "3"], False),
        ("csv", ["1", "2"], False),
    ],
)
def test_a_column_is_one_of_texts_where_at_least_half_of_its_values_are(write, values, is_text, tmp_path):
    rows = [{"words": value, "label": "ab"[i % 2]} for i, value in enumerate(values)]
    config = DataConfig(dataset=folder(tmp_path / "own", rows, WRITERS[write]), input_column="words")
    if is_text:
        assert open_own(config, ["a", "b"]).kind == "text"
        return
    with pytest.raises(ValueError, match="column words holds neither images nor texts"):
        open_own(config, ["a", "b"])


def test_columns_are_those_that_at_least_half_of_the_rows_have(tmp_path):
    def opened(name: str, without: int) -> list[str]:
        rows = [{"words": "x", "label": "ab"[i % 2]} for i in range(2)] + [{"label": "a"}] * without
        return open_own(DataConfig(dataset=folder(tmp_path / name, rows, as_jsonl), input_column="words")).label_names

    assert opened("half", 2) == ["a", "b"]
    with pytest.raises(ValueError, match="input_column"):
        opened("less", 3)


def test_a_byte_order_mark_is_no_part_of_a_columns_name(tmp_path):
    own = folder(
        tmp_path / "own",
        plain(),
        lambda path, rows: pd.DataFrame(rows).to_csv(path / "train.csv", index=False, encoding="utf-8-sig"),
    )
    assert len(open_own(DataConfig(dataset=own, input_column="text")).train_inputs) == 30


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


# Classes


def test_classes_that_are_named_are_those_and_no_others(tmp_path):
    rows = [*plain(), {"text": "x", "label": "fish"}]
    place = folder(tmp_path / "own", rows, as_jsonl)
    raw = open_own(DataConfig(dataset=place), ["spam", "ham", "none", "egg"])
    assert raw.label_names == ["spam", "ham", "none", "egg"]
    assert raw.train_labels.tolist() == [1, 0, 3] * 10 + [-1]
    only = folder(tmp_path / "one", [{"text": "x", "label": "ham"}] * 3, as_csv)
    assert open_own(DataConfig(dataset=only), ["ham", "spam"]).train_labels.tolist() == [0, 0, 0]


def test_numbers_are_classes_by_their_value(tmp_path):
    rows = [{"text": "x", "label": label} for label in (1, 2, 10, None, 2.0, "2")]
    for write in ("csv", "jsonl"):
        place = folder(tmp_path / write, rows, WRITERS[write])
        assert open_own(DataConfig(dataset=place), ["1", "2", "10"]).train_labels.tolist() == [0, 1, 2, -1, 1, 1]
    place = folder(tmp_path / "texts", [{"text": "x", "label": label} for label in ("01", "1", "01")], as_csv)
    assert open_own(DataConfig(dataset=place), ["1", "01"]).train_labels.tolist() == [1, 0, 1]


def test_names_and_numbers_in_one_column_of_csv(tmp_path):
    """Most are numbers, so that the others are odd, unless all classes are named."""
    rows = [{"text": "x", "label": label} for label in ("1", "2", "3+") * 3] + [{"text": "x", "label": "1"}]
    place = folder(tmp_path / "own", rows, as_csv)
    assert open_own(DataConfig(dataset=place)).train_labels.tolist() == [0, 1, -1] * 3 + [0]
    assert open_own(DataConfig(dataset=place), ["1", "2", "3+"]).train_labels.tolist() == [0, 1, 2] * 3 + [0]


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (["a", "b", 1, 2], [0, 1, -1, -1]),
        ([1, 2, "a", "b"], [-1, -1, 0, 1]),
        (["a", "b", [1], [2]], [0, 1, -1, -1]),
        (["a", "b", "a", *[[1]] * 4], None),
    ],
)
def test_classes_are_of_one_kind_that_at_least_half_of_the_labels_have(labels, found, tmp_path):
    """Of two kinds with as many they are names."""
    rows = [{"text": "x", "label": label} for label in labels]
    config = DataConfig(dataset=folder(tmp_path / "own", rows, as_jsonl))
    if found is None:
        with pytest.raises(ValueError, match="column label does not hold classes"):
            open_own(config)
        return
    raw = open_own(config)
    assert raw.label_names == ["a", "b"] and raw.train_labels.tolist() == found


def test_labels_that_are_no_classes(tmp_path):
    for i, (labels, words) in enumerate(
        [
            ([0.5, 1.5, 1.0], "does not hold classes"),
            ([None] * 3, "does not hold classes"),
            ([1, 1, 1], "fewer than two classes"),
            ([[1], [2], [1]], "does not hold classes"),
        ]
    ):
        place = folder(tmp_path / f"{i}", [{"text": "x", "label": label} for label in labels], as_jsonl)
        with pytest.raises(ValueError, match=words):
            open_own(DataConfig(dataset=place))


def test_the_log_says_how_many_and_the_remedy(tmp_path, caplog):
    rows = [*plain(), {"text": "x", "label": "fish"}, {"text": None, "label": "egg"}]
    raw = open_own(DataConfig(dataset=folder(tmp_path / "own", rows, as_jsonl)), ["egg", "ham", "spam"])
    with caplog.at_level(logging.ERROR):
        examples = encode_training(raw, TextSpec(Tokens(), 9)).train
    assert "1 examples have a label that is none of the 3 classes" in caplog.text and "classes" in caplog.text
    assert "2 of 32 examples cannot be read" in caplog.text
    assert examples.labels[-2:].tolist() == [-1, 0]


def test_nothing_that_can_be_read_is_a_client_with_nothing_to_add(tmp_path):
    rows = [{"text": "x", "label": "fish"}] * 4
    raw = open_own(DataConfig(dataset=folder(tmp_path / "own", rows, as_jsonl)), ["a", "b"])
    examples = encode_training(raw, TextSpec(Tokens(), 9)).train
    assert len(examples) == 4
    with pytest.raises(UnreadableExample):
        examples.batch([0])


# What cannot be opened at all


def test_files_whose_rows_cannot_be_told_apart(tmp_path):
    for i, (name, data) in enumerate(
        [
            ("train.json", b'[{"text": "x", "label": 0}, {"text": ]'),
            ("train.json", b"[" * 10**5 + b"]" * 10**5),
            ("train.jsonl", json.dumps(plain(), indent=1).encode()[1:]),
            ("train.parquet", b"PAR1"),
            ("train.jsonl.gz", b"no archive"),
        ]
    ):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / name).write_bytes(data)
        with pytest.raises(ValueError, match="no data set could be opened in the folder"):
            open_own(DataConfig(dataset=str(tmp_path / f"{i}")))
    with pytest.raises(ValueError, match="no folder"):
        open_own(DataConfig(dataset=str(tmp_path / "nowhere")))


# Rows


def test_rows_of_csv():
    lines = ["\n", "text,label\n", "a,b\n", "\n", '"two\n', 'lines",c\n', "d\n", "e,f,g\n", "h,\n"]
    assert csv_rows(lines[1:]) == [
        {"text": "a", "label": "b"},
        {"text": "two\nlines", "label": "c"},
        {"text": "d"},
        {},
        {"text": "h", "label": None},
    ]
    assert csv_rows([]) == [] and csv_rows(["a;b\n", "1;2\n"], delimiter=";") == [{"a": "1", "b": "2"}]


def test_a_quote_that_is_not_closed_is_odd_in_its_line_alone():
    lines = ["a,b\n", '"open,1\n', "x,2\n", '"y, z",3\n', '"two\n', 'lines",4\n', '"q"r,5\n', '"open,6']
    rows = [{"a": "x", "b": "2"}, {"a": "y, z", "b": "3"}, {"a": "two\nlines", "b": "4"}, {"a": "qr", "b": "5"}]
    assert csv_rows(lines) == [{}, *rows, {}]
    many = ["a\n", '"\n', *["x\n"] * 2000, '"\n']
    assert len(csv_rows(many)) == 2002


def test_a_field_that_cannot_be_read_is_a_row_without_values(monkeypatch):
    import csv

    monkeypatch.setattr("lora_dp.fed.data.own_rows._LONGEST_FIELD", 5)
    limit = csv.field_size_limit()
    assert csv_rows(["a,b\n", "1,2\n", "123456,2\n", "3,4\n"]) == [{"a": "1", "b": "2"}, {}, {"a": "3", "b": "4"}]
    assert csv.field_size_limit() == limit


def test_missing_values_are_those_of_pandas(tmp_path):
    listed = sorted(MISSING)
    pd.DataFrame({"text": [*listed, "a", "none", "N"]}).to_csv(tmp_path / "x.csv")
    assert pd.read_csv(tmp_path / "x.csv")["text"].isna().tolist() == [True] * len(listed) + [False] * 3
    from pandas._libs.parsers import STR_NA_VALUES

    assert set(STR_NA_VALUES) == MISSING


def test_rows_of_json():
    assert json_rows(b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": [2]}\n3\n') == [{"a": 1}, {"a": [2]}, {}]
    assert json_rows(b' \n[{"a": 1}, 2]') == [{"a": 1}, {}]
    with pytest.raises(ValueError, match="write one on each line"):
        json_rows(b'{"a":\n [1,\n 2]}\n')


def test_json_lines_are_those_of_which_more_than_half_are_objects():
    line, odd = b'{"a": 1}\n', b"{\n"
    assert json_rows(3 * line + 2 * odd) == 3 * [{"a": 1}] + 2 * [{}]
    for data in (b"", line + odd, 2 * line + 3 * odd):
        with pytest.raises(ValueError, match="write one on each line"):
            json_rows(data)


@pytest.mark.parametrize("odd", [b"[[[[[[[[[[", b"[1]", b"[", b"[{"])
def test_a_first_line_with_a_bracket_is_an_odd_one_as_any_other(odd):
    lines = [b'{"a": 1}', b'{"a": 2}', b'{"a": 3}']
    assert json_rows(b"\n".join([odd, *lines])) == [{}, {"a": 1}, {"a": 2}, {"a": 3}]
    assert json_rows(b"[\n" + b",\n".join(lines) + b"\n]") == [{"a": 1}, {"a": 2}, {"a": 3}]
