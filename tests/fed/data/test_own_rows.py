"""The rows of a file of a client's own, of which each is read by itself."""

import pandas as pd
import pytest

from lora_dp.fed.data.own_rows import MISSING, csv_rows, json_rows


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
