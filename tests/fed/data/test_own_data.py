"""A client's own data: one odd example stays in the number of examples, contributes nothing, and changes no other."""

import gzip
import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lora_dp.fed.data.encoding import TextSpec
from lora_dp.fed.data.opening import open_data
from lora_dp.fed.data.options import DataConfig
from lora_dp.fed.data.own_data import open_own
from lora_dp.fed.data.unreadable import UnreadableExample, encode_training
from tests.fed.data.own_folders import WRITERS, Row, as_csv, as_jsonl, as_parquet, folder, plain
from tests.fed.data.word_tokenizer import Words

ODD = 11  # its place among the rows


class Tokens(Words):
    """As real tokenizers, it takes what can be written in UTF-8 alone."""

    def __call__(self, texts, pairs, **options):
        [text.encode() for text in [*texts, *(pairs or ())]]
        return super().__call__(texts, pairs, **options)


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


@pytest.mark.parametrize("odd", ["3.5", "x", "", "1e3"])
def test_numbers_that_an_owner_names_as_texts_stay_as_they_are_written(odd: str, tmp_path: Path) -> None:
    rows = [f"{i:03d},{2000 + i},{i}" for i in range(8)]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "train.csv").write_text("\n".join(["code,year,answer", *rows, f"{odd},{odd},{odd}"]) + "\n")
    named = {"prompt_template": "{code} {year}: ", "completion_column": "answer"}
    found = open_own(DataConfig(dataset=str(tmp_path / "own"), **named))
    assert list(found.train_inputs)[:8] == [(f"{i:03d} {2000 + i}: ", str(i)) for i in range(8)]


def test_values_are_read_one_by_one_where_not_all_can_be(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    texts = pa.array([b"\xff\xfe" if i == 2 else f"a {i}".encode() for i in range(6)], pa.binary())
    table = pa.table({"text": texts, "label": ["x", "y"] * 3})
    table = table.cast(pa.schema([("text", pa.string()), ("label", pa.string())]), safe=False)
    pq.write_table(table, tmp_path / "own" / "train.parquet")
    found = open_own(DataConfig(dataset=str(tmp_path / "own")))
    assert found.train_inputs == ["a 0", "a 1", None, "a 3", "a 4", "a 5"]


@pytest.mark.parametrize("kind", WRITERS)
def test_prompts_and_completions_have_no_classes_unless_a_column_is_named(kind: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"a{i}", "completion": f"b{i} c", "topic": "xy"[i % 2]} for i in range(12)]
    name = folder(tmp_path / "own", rows, WRITERS[kind])
    found = open_own(DataConfig(dataset=name))
    assert (found.task, found.kind, found.label_names, found.max_length) == ("causal-lm", "text", [], 128)
    assert list(found.train_inputs) == [(f"a{i}\n", f"b{i} c") for i in range(12)]
    assert found.train_labels.tolist() == [0] * 12 and found.train_labels.dtype == np.int64
    assert len(found.validation_inputs) == 0 and not found.chat
    named = open_own(DataConfig(dataset=name, task="causal-lm", label_column="topic", chat=True))
    assert named.label_names == ["x", "y"] and named.train_labels.tolist() == [0, 1] * 6 and named.chat
    assert list(named.train_inputs)[0] == ("a0", "b0 c")
