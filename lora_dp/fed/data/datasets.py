"""A data set opened by ``datasets``: its splits, its columns and its classes."""

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetsError

from lora_dp.fed.data.columns import check_columns, find_columns
from lora_dp.fed.data.encoding import RawData
from lora_dp.fed.data.options import FILES, DataConfig, check_place, is_path
from lora_dp.fed.data.partition import hold_out
from lora_dp.fed.data.split_files import check_apart, split_files
from lora_dp.fed.hub import hub, reachable, unreachable

VALIDATION_NAMES = ("validation", "valid", "val", "dev", "test")


def open_dataset(config: DataConfig) -> RawData:
    """Opens a data set by ``datasets``, and finds its splits, its columns and its classes.

    Integer and string labels become 0, 1, … in sorted order of the train split's values. Where no split is there to
    evaluate on, some of train is held out.

    Raises:
        ValueError: data set, split or column missing or not recognised; no examples; labels not classes.
    """
    train_split, validation_split = _find_splits(_load(config), config)
    columns = find_columns(train_split.features, config)
    names, classes = ([], {}) if columns.label is None else _classes(train_split, columns.label)
    labels = _as_classes(train_split, columns.label, classes)
    if validation_split is None:
        train, held_out = hold_out(labels, config)
        validation_split, validation_labels = train_split.select(held_out), labels[held_out]
        train_split, labels = train_split.select(train), labels[train]
    else:
        check_columns(columns, validation_split.features)
        validation_labels = _as_classes(validation_split, columns.label, classes)
    return RawData(
        kind=columns.kind,
        label_names=names,
        train_inputs=columns.examples({name: train_split[name] for name in columns.names}),
        train_labels=labels,
        validation_inputs=columns.examples({name: validation_split[name] for name in columns.names}),
        validation_labels=validation_labels,
        max_length=config.max_length,
        task=columns.task,
        chat=config.chat,
    )


def _load(config: DataConfig) -> datasets.DatasetDict:
    check_place(config.dataset)
    with failures_to_open(config.dataset), hub(config.dataset):
        builder = find_builder(config)
        check_apart(builder.config.data_files or {})
        builder.download_and_prepare()
        return builder.as_dataset()


def find_builder(config: DataConfig) -> datasets.DatasetBuilder:
    """What opens the data set: a local folder with its splits, one local file to train on, or a name on the hub.

    It must have passed :func:`lora_dp.fed.data.options.check_place`.
    """
    name, path = config.dataset, Path(config.dataset).expanduser()
    if path.is_file():
        module, options = FILES[path.suffix.lower()]
        return datasets.load_dataset_builder(module, config.subset, data_files={"train": [str(path)]}, **options)
    if path.is_dir():
        return datasets.load_dataset_builder(str(path), config.subset, data_files=split_files(str(path)))
    return datasets.load_dataset_builder(name, config.subset)


@contextmanager
def failures_to_open(name: str) -> Iterator[None]:
    """What a library raises over a data set, in one sentence."""
    try:
        yield
    # An empty file of JSON ends in a StopIteration.
    except (OSError, ValueError, IndexError, StopIteration, zipfile.BadZipFile, DatasetsError) as error:
        if not is_path(name) and not reachable():
            raise ValueError(f"no data set could be opened: {unreachable(name)}") from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        where = ("in" if Path(name).is_file() else "in the folder") if is_path(name) else "on the hub"
        remedy = "check its name, and that every split has rows"
        raise ValueError(f"no data set could be opened {where} {name} ({reason}): {remedy}") from error


def train_name(names: Sequence[str], config: DataConfig) -> str:
    """The split to train on; ValueError where several are there and none says that it is this."""
    if "train" not in names and len(names) > 1:
        raise ValueError(
            f"{config.dataset} has the splits {', '.join(names)} but none called train: rename one of them"
        )
    return "train" if "train" in names else names[0]


def _find_splits(opened: datasets.DatasetDict, config: DataConfig) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    names = list(opened)
    train = train_name(names, config)
    wanted = config.validation_split or next((name for name in VALIDATION_NAMES if name in names), None)
    if wanted is not None and wanted not in names:
        raise ValueError(f"{config.dataset} has no split {wanted}: set validation_split to one of {', '.join(names)}")
    validation_name = None if wanted == train else wanted
    return opened[train], opened[validation_name] if validation_name else None


def _classes(split: datasets.Dataset, column: str) -> tuple[list[str], dict[Any, int]]:
    """Names of the classes, and the class of each label value."""
    feature = split.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names, classes = list(feature.names), {value: value for value in range(feature.num_classes)}
    else:
        dtype = str(getattr(feature, "dtype", feature))
        if not dtype.startswith(("int", "uint", "bool", "string", "large_string")):
            raise ValueError(f"column {column} holds {dtype}, not classes: name integers or strings as label_column")
        values = sorted({value for value in split[column] if value is not None})
        names, classes = [str(value) for value in values], {value: rank for rank, value in enumerate(values)}
    if len(names) < 2:
        raise ValueError(f"column {column} holds fewer than two classes: set label_column to another column")
    return names, classes


def _as_classes(split: datasets.Dataset, column: str | None, classes: dict[Any, int]) -> np.ndarray:
    """The class of each row, int64; all are of one where no column has any."""
    if column is None:
        return np.zeros(len(split), dtype=np.int64)
    labels = split[column]
    if unknown := [value for value in labels if value not in classes]:
        raise ValueError(
            f"{len(unknown)} rows have a {column} that the train split does not know ({unknown[0]!r}): "
            "remove them, or set validation_split to a labelled split"
        )
    return np.array([classes[value] for value in labels], dtype=np.int64)
