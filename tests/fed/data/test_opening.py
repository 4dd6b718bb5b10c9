"""Data opened: the built-in digits, or a file of whatever kind."""

import datasets
import numpy as np
import pytest
import torch

from lora_dp.fed.data.encoding import encode
from lora_dp.fed.data.opening import open_data
from lora_dp.fed.data.options import DataConfig
from lora_dp.fed.data.own_data import open_own
from tests.fed.data.word_tokenizer import SPEC


def test_digits_are_split_the_same_way_every_time():
    raw = open_data(DataConfig())
    splits = encode(raw, SPEC)
    assert (raw.kind, raw.num_labels, raw.label_names) == ("image", 10, list("0123456789"))
    assert len(splits.train) + len(splits.validation) == 1797
    assert len(splits.validation) == pytest.approx(0.2 * 1797, abs=5)
    # stratified: a fifth of each class
    counts = torch.bincount(splits.validation.labels) / torch.bincount(
        torch.cat([splits.train.labels, splits.validation.labels])
    )
    assert counts.sub(0.2).abs().max() < 0.01
    again = encode(open_data(DataConfig()), SPEC)
    assert torch.equal(again.train.batch(range(9))["pixel_values"], splits.train.batch(range(9))["pixel_values"])
    other = open_data(DataConfig(split_seed=1))
    assert not np.array_equal(other.validation_labels, raw.validation_labels)


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "CSV"])
def test_a_file_is_a_data_set(kind, tmp_path):
    path, rows = tmp_path / f"test.{kind}", {"text": [f"text, {i}" for i in range(20)], "label": [0, 1] * 10}
    data = datasets.Dataset.from_dict(rows)
    if kind.lower() in ("csv", "tsv"):
        data.to_csv(path, sep="\t" if kind == "tsv" else ",")
    elif kind == "parquet":
        data.to_parquet(path)
    else:
        data.to_json(path)
    (tmp_path / "train.csv").write_text("beside it, and another data set")
    raw = open_data(DataConfig(dataset=str(path)))
    assert sorted([*raw.train_inputs, *raw.validation_inputs]) == sorted(rows["text"])
    assert (raw.kind, raw.label_names, len(raw.validation_labels)) == ("text", ["0", "1"], 4)
    own = open_own(DataConfig(dataset=str(path)))
    assert [str(text) for text in own.train_inputs] == rows["text"] and own.train_labels.tolist() == rows["label"]


def test_a_file_of_another_kind_or_without_rows_is_refused(tmp_path):
    (tmp_path / "notes.docx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"notes.docx is no file of data: give a folder, or a file ending in .csv"):
        open_data(DataConfig(dataset=str(tmp_path / "notes.docx")))
    with pytest.raises(ValueError, match=r"^no file missing.csv: give a folder or file"):
        open_data(DataConfig(dataset="missing.csv"))
    (tmp_path / "empty.json").write_text("")
    with pytest.raises(ValueError, match="no data set could be opened in .*empty.json"):
        open_data(DataConfig(dataset=str(tmp_path / "empty.json")))
