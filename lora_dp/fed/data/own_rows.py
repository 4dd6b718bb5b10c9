"""Rows of CSV and JSON files, each read by itself: what is odd in one of them changes nothing in another.

A library that makes typed columns of a file gives one type to all of a column, and fails, or turns numbers into texts,
where one row has another. So values stay what they are: of JSON its own kinds, of CSV texts.
"""

import csv
import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

Row = dict[str, Any]

# What pandas.read_csv takes for a missing value.
MISSING = frozenset(
    (
        "",
        "#N/A",
        "#N/A N/A",
        "#NA",
        "-1.#IND",
        "-1.#QNAN",
        "-NaN",
        "-nan",
        "1.#IND",
        "1.#QNAN",
        "<NA>",
        "N/A",
        "NA",
        "NULL",
        "NaN",
        "None",
        "n/a",
        "nan",
        "null",
    )
)
_LONGEST_FIELD = 2**31 - 1
# Lines that a row may have, so that an open quote does not cost the reading of all that follows.
_MOST_LINES = 1000
_lock = threading.Lock()


def csv_rows(lines: Iterable[str], **dialect: Any) -> list[Row]:
    """The rows below the header. A missing cell is None; a row with more cells than the header is one without values.

    A quote that is not closed as the grammar of CSV has it is odd in its line alone: the next row begins after that.

    Args:
        lines: with their ends, as a file opened with ``newline=""`` gives them.
        dialect: as ``csv.reader`` takes it.
    """
    listed = list(lines)
    with _fields_of_any_length():
        header, place = _record(listed, 0, dialect)
        rows: list[Row] = []
        while place < len(listed):
            cells, place = _record(listed, place, dialect)
            if cells is None:
                rows.append({})
            elif cells:
                rows.append(_named(header or [], cells))
    return rows


def _record(lines: list[str], place: int, dialect: dict[str, Any]) -> tuple[list[str] | None, int]:
    """The cells that begin at a line, None where they cannot be read, and the line after them."""
    following = (lines[i] for i in range(place, min(place + _MOST_LINES, len(lines))))
    reader = csv.reader(following, strict=True, **dialect)
    try:
        return next(reader, []), place + reader.line_num
    except csv.Error:
        pass
    reader = csv.reader([lines[place], "\n"], **dialect)
    try:
        cells = next(reader)
    except csv.Error:
        return None, place + 1
    return cells if reader.line_num == 1 else None, place + 1


def _named(header: list[str], cells: list[str]) -> Row:
    if len(cells) > len(header):
        return {}
    return {name: None if cell in MISSING else cell for name, cell in zip(header, cells, strict=False)}


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    with _lock:  # the limit is that of the process
        limit = csv.field_size_limit(_LONGEST_FIELD)
        try:
            yield
        finally:
            csv.field_size_limit(limit)


def json_rows(data: bytes) -> list[Row]:
    """The rows of JSON lines, or of an array. A line that is no object, or cannot be parsed, is a row without values.

    Raises:
        ValueError: an array that cannot be parsed, or most lines cannot.
    """
    # By lines first: one that begins with a bracket makes no array of those behind it.
    found = [_parsed(line) for line in data.split(b"\n") if line.strip()]
    if 2 * sum(row is not None for row in found) > len(found):
        return [row or {} for row in found]
    if not data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        raise ValueError("most lines are no JSON objects: write one on each line, or an array of them")
    try:
        values = json.loads(data)
    except RecursionError as error:
        raise ValueError("a value of the JSON array is nested too deeply: write JSON lines") from error
    return [value if isinstance(value, dict) else {} for value in values]


def _parsed(line: bytes) -> Row | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError, MemoryError):
        return None
    return value if isinstance(value, dict) else None
