"""A data set opened by ``datasets``: its splits, its columns and its classes."""

import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetsError

from lora_dp.fed.data.encoding import Kind, RawData
from lora_dp.fed.data.options import FILES, DataConfig, check_place, is_path
from lora_dp.fed.data.partition import hold_out
from lora_dp.fed.data.split_files import check_apart, split_files
from lora_dp.fed.hub import hub, reachable, unreachable

VALIDATION_NAMES = ("validation", "valid", "val", "dev", "test")
LABEL_NAMES = ("label", "labels", "target", "class", "category", "y")
INPUT_NAMES = ("image", "img", "text", "sentence", "content", "review", "document", "question")


def open_dataset(config: DataConfig) -> RawData:
    """Opens a data set by ``datasets``, and finds its splits, input column, label column and classes.

    Integer and string labels become 0, 1, … in sorted order of the train split's values. Where no split is there to
    evaluate on, some of train is held out.

    Raises:
        ValueError: data set, split or column missing or not recognised; no examples; labels not classes.
    """
    train_split, validation_split = _find_splits(_load(config), config)
    label_column, input_column, kind = find_columns(train_split.features, config)
    names, classes = _classes(train_split, label_column)
    labels = _as_classes(train_split, label_column, classes)
    if validation_split is None:
        train, held_out = hold_out(labels, config)
        validation_split, validation_labels = train_split.select(held_out), labels[held_out]
        train_split, labels = train_split.select(train), labels[train]
    else:
        wanted = {"label_column": label_column, "input_column": input_column, "pair_column": config.pair_column}
        _check_columns(wanted, validation_split.features)
        validation_labels = _as_classes(validation_split, label_column, classes)
    return RawData(
        kind=kind,
        label_names=names,
        train_inputs=_inputs(train_split, input_column, config.pair_column),
        train_labels=labels,
        validation_inputs=_inputs(validation_split, input_column, config.pair_column),
        validation_labels=validation_labels,
        max_length=config.max_length,
    )


def _inputs(split: datasets.Dataset, column: str, pair_column: str | None) -> Sequence[Any]:
    inputs: Sequence[Any] = split[column]
    return inputs if pair_column is None else list(zip(inputs, split[pair_column], strict=True))


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


def _check_columns(wanted: Mapping[str, str | None], features: Mapping[str, Any]) -> None:
    """Refuse columns that are not there, all of them at once; ``wanted`` by the option that names each."""
    missing = {option: name for option, name in wanted.items() if name is not None and name not in features}
    if missing:
        which = f"column{'s' if len(missing) > 1 else ''} {' and '.join(missing.values())}"
        raise ValueError(
            f"no {which} in the data set: set {' and '.join(missing)} to {_one_of(missing)} {', '.join(features)}"
        )


def _one_of(options: Collection[str]) -> str:
    return "one of" if len(options) == 1 else "some of"


def _only_or_common(candidates: list[str], common: Sequence[str]) -> str | None:
    if len(candidates) == 1:
        return candidates[0]
    return next((name for name in common if name in candidates), None)


def find_columns(features: Mapping[str, Any], config: DataConfig) -> tuple[str, str, Kind]:
    """The columns of labels and of inputs that are configured, or else can be told; and what the inputs are.

    Raises:
        ValueError: columns that are not there or cannot be told, all at once; or one that holds something else.
    """
    pair = config.pair_column
    _check_columns(
        {"label_column": config.label_column, "input_column": config.input_column, "pair_column": pair}, features
    )
    kinds = _kinds(features)
    labels = config.label_column or _label_column(features)
    column = config.input_column
    if column is None:
        images = [name for name, kind in kinds.items() if kind == "image" and name != labels]
        texts = [name for name, kind in kinds.items() if kind == "text" and name not in (labels, pair)]
        column = _only_or_common(images or texts, INPUT_NAMES)
    told = {"label_column": (labels, "labels"), "input_column": (column, "images or texts")}
    if untold := {option: what for option, (found, what) in told.items() if found is None}:
        raise ValueError(
            f"cannot tell the column{'s' if len(untold) > 1 else ''} of {' and of '.join(untold.values())}: "
            f"set {' and '.join(untold)} to {_one_of(untold)} {', '.join(features)}"
        )
    assert labels is not None and column is not None
    if pair is not None and kinds.get(pair) != "text":
        raise ValueError(f"column {pair} holds no texts: set pair_column to one that does")
    if column not in kinds:
        raise ValueError(f"column {column} holds neither images nor texts: set input_column to one that does")
    if pair is not None and kinds[column] != "text":
        raise ValueError(f"column {column} holds images, which have no pair_column: leave it out")
    return labels, column, kinds[column]


def _kinds(features: Mapping[str, Any]) -> dict[str, Kind]:
    """The columns of images and of texts."""
    kinds: dict[str, Kind] = {}
    for name, feature in features.items():
        if isinstance(feature, datasets.Image):
            kinds[name] = "image"
        elif isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
            kinds[name] = "text"
    return kinds


def _label_column(features: Mapping[str, Any]) -> str | None:
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    return _only_or_common(typed or [name for name in features if name in LABEL_NAMES], LABEL_NAMES)


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


def _as_classes(split: datasets.Dataset, column: str, classes: dict[Any, int]) -> np.ndarray:
    labels = split[column]
    if unknown := [value for value in labels if value not in classes]:
        raise ValueError(
            f"{len(unknown)} rows have a {column} that the train split does not know ({unknown[0]!r}): "
            "remove them, or set validation_split to a labelled split"
        )
    return np.array([classes[value] for value in labels], dtype=np.int64)
