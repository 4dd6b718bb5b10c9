"""The classes of a client's own data: those that its owner names, or that at least half of its labels are of."""

import pytest

from lora_dp.fed.data.options import DataConfig
from lora_dp.fed.data.own_data import open_own
from tests.fed.data.own_folders import WRITERS, as_csv, as_jsonl, folder, plain


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
