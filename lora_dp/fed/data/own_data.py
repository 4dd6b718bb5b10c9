"""A client's own data, opened so that what is odd in one example is no bit: it stays in the number of examples.

Which columns there are, what they hold and which classes there are is taken to be public. Where that has to be seen
from the data, it is what most rows say, so that one row without a label, or with a number for a text, does not change
it. An example whose label is none of the classes has the class −1, and :mod:`lora_dp.fed.data.unreadable` leaves it
out.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import datasets
import fsspec
import numpy as np

from lora_dp.fed.data.columns import fields, find_columns
from lora_dp.fed.data.datasets import failures_to_open, find_builder, train_name
from lora_dp.fed.data.encoding import RawData
from lora_dp.fed.data.options import DataConfig, check_place
from lora_dp.fed.data.own_rows import Row, csv_rows, json_rows
from lora_dp.fed.data.split_files import check_apart
from lora_dp.fed.hub import hub

UNKNOWN = -1
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
# Of as many digits as a float has.
_WHOLE = re.compile(r"\s*[+-]?\d{1,15}(\.0*)?\s*")
_TEXT, _OTHER = datasets.Value("string"), datasets.Value("null")


@dataclass(frozen=True)
class _Table:
    """Columns with their kinds; ``typed`` unless all values are texts, as in CSV, that may be meant as numbers."""

    features: Mapping[str, Any]
    columns: Mapping[str, Sequence[Any]]
    typed: bool = True


def open_own(config: DataConfig, classes: Sequence[str] | None = None) -> RawData:
    """Opens a folder whose examples are all trained on: its train split, and no other.

    Args:
        config: where it is.
        classes: their names in the order of the run; else those that the data have, in sorted order.

    Returns:
        No validation data; labels −1 where an example has none of the classes.

    Raises:
        ValueError: folder, files or column missing or not recognised; fewer than two classes.
    """
    check_place(config.dataset)
    with failures_to_open(config.dataset), hub(config.dataset):
        table = _read(config)
    columns = find_columns(_meant_as_texts(table, config), config)
    names: list[str] = []
    if columns.label is None:
        labels = np.zeros(len(table.columns[columns.inputs[0]]), dtype=np.int64)
    else:
        names, labels = _classes(table, columns.label, classes)
    read = {name: table.columns[name] for name in columns.names}
    if columns.kind == "text":
        read = {name: _values(values) for name, values in read.items()}
    inputs = columns.examples(read)
    return RawData(columns.kind, names, inputs, labels, [], np.arange(0), config.max_length, columns.task, config.chat)


def _meant_as_texts(table: _Table, config: DataConfig) -> Mapping[str, Any]:
    """Kinds of columns: where values have no kind of their own, those that an owner names for a language model are
    texts, numbers though most of them may look."""
    template = config.prompt_template
    named = {config.prompt_column, config.completion_column, *(() if template is None else fields(template))}
    found = {} if table.typed else dict.fromkeys(named & table.features.keys(), _TEXT)
    return {**table.features, **found}


def _read(config: DataConfig) -> _Table:
    builder = find_builder(config)
    by_split = builder.config.data_files
    check_apart(by_split)
    files = [str(file) for file in by_split[train_name([str(name) for name in by_split], config)]]
    plain = not any(file.endswith(".zip") for file in files)  # of an archive, datasets knows what is inside
    if builder.name == "csv" and plain:
        return _of_rows([row for file in files for row in _csv(file, builder.config)], typed=False)
    if builder.name == "json" and plain:
        return _of_rows([row for file in files for row in _json(file)])
    extensions = getattr(builder, "EXTENSIONS", ())
    if builder.name == "imagefolder" and all(PurePath(file).suffix.lower() in extensions for file in files):
        return _of_images(files)
    split = datasets.load_dataset(builder.name, data_files={"train": files}, split="train")
    return _Table(split.features, {name: split[name] for name in split.column_names})


def _csv(file: str, config: Any) -> list[Row]:
    # What is no text in this encoding is kept as lone surrogates, which no tokenizer takes.
    with fsspec.open(
        file, "rt", compression="infer", encoding=config.encoding or "utf-8-sig", errors="surrogateescape", newline=""
    ) as lines:
        return csv_rows(
            lines,
            delimiter=config.sep,
            quotechar=config.quotechar,
            doublequote=config.doublequote,
            escapechar=config.escapechar,
            skipinitialspace=config.skipinitialspace,
        )


def _json(file: str) -> list[Row]:
    with fsspec.open(file, "rb", compression="infer") as stream:
        return json_rows(stream.read())


def _of_rows(rows: list[Row], typed: bool = True) -> _Table:
    """Columns are the names that at least half of the rows have, of texts where most values are."""
    counts = Counter(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in counts if 2 * counts[name] >= len(rows)}
    features = {name: _TEXT if _is_of_texts(values, typed) else _OTHER for name, values in columns.items()}
    return _Table(features, columns, typed)


def _is_of_texts(values: Sequence[Any], typed: bool) -> bool:
    given = [value for value in values if value is not None]
    texts = sum(isinstance(value, str) and (typed or not _NUMBER.fullmatch(value)) for value in given)
    return 2 * texts >= len(given) > 0


def _of_images(files: list[str]) -> _Table:
    """Images of a class lie in its folder, all at one depth; the class of one that lies elsewhere is unknown."""
    depths = Counter(len(PurePath(file).parts) for file in files)
    depth = max(depths, key=lambda depth: (depths[depth], -depth))
    labels = [PurePath(file).parent.name if len(PurePath(file).parts) == depth else None for file in files]
    features = datasets.Features({"image": datasets.Image()})
    images = datasets.Dataset.from_dict({"image": files}, features=features)["image"]
    return _Table({**features, "label": _TEXT}, {"image": images, "label": labels})


def _values(column: Sequence[Any]) -> list[Any]:
    """All values; None for one that cannot be read, such as bytes that are no text."""
    try:
        return list(column)
    except Exception:
        return [_value(column, row) for row in range(len(column))]


def _value(column: Sequence[Any], row: int) -> Any:
    try:
        return column[row]
    except Exception:
        return None


def _classes(table: _Table, column: str, classes: Sequence[str] | None) -> tuple[list[str], np.ndarray]:
    """Names of the classes, and the class of each row, int64."""
    feature, values = table.features[column], _values(table.columns[column])
    if isinstance(feature, datasets.ClassLabel):
        values = [
            feature.names[value] if value is not None and 0 <= value < len(feature.names) else None for value in values
        ]
        classes = feature.names if classes is None else classes
    labels = [_label(value, table.typed) for value in values]
    if classes is None:
        labels, classes = _of_most(column, values, labels)
    ranks = {name: rank for rank, name in enumerate(classes)}
    found = [UNKNOWN if label is None else ranks.get(str(label), UNKNOWN) for label in labels]
    if not table.typed:
        # As it is written comes first: "01" may be a name.
        found = [ranks.get(value, rank) for value, rank in zip(values, found, strict=True)]
    return list(classes), np.array(found, dtype=np.int64)


def _label(value: Any, typed: bool) -> str | int | bool | None:
    """A class as its column has it, None for what names none. A float is a whole number, where a cell was missing."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and not typed and _NUMBER.fullmatch(value):
        return int(float(value)) if _WHOLE.fullmatch(value) else None
    if isinstance(value, str):
        return value if _is_encodable(value) else None
    return value if isinstance(value, int) else None


def _is_encodable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _of_most(column: str, values: list[Any], labels: list[Any]) -> tuple[list[Any], list[str]]:
    """The labels of the kind that most have, None for others, and the classes that they are."""
    kinds = Counter(type(label) for label in labels if label is not None)
    kind = max(kinds, key=lambda kind: (kinds[kind], kind is str), default=None)
    if kind is None or 2 * kinds[kind] < sum(value is not None for value in values):
        raise ValueError(f"column {column} does not hold classes: name integers or strings as label_column")
    labels = [label if type(label) is kind else None for label in labels]
    classes = [str(label) for label in sorted({label for label in labels if label is not None})]
    if len(classes) < 2:
        raise ValueError(f"column {column} holds fewer than two classes: set label_column to another column")
    return labels, classes
