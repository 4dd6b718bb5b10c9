"""Data of the federation: opens a data set and finds its columns.

Two steps, because the model needs the number of classes and the data need the model's input format:

    raw = open_data(config)                                       # nothing encoded yet
    loaded = load_model(model_config, raw.num_labels, raw.kind)
    splits = encode(raw, loaded.spec)

The names and number of classes are taken to be public.
"""

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from lora_dp.fed.data.encoding import Kind, RawData
from lora_dp.fed.data.options import DataConfig
from lora_dp.fed.data.split_files import check_apart, split_files

VALIDATION_NAMES = ("validation", "valid", "val", "dev", "test")
LABEL_NAMES = ("label", "labels", "target", "class", "category", "y")
INPUT_NAMES = ("image", "img", "text", "sentence", "content", "review", "document", "question")


def open_data(config: DataConfig) -> RawData:
    """Opens the data set and finds its splits, input column, label column and classes.

    Integer and string labels become 0, 1, … in sorted order of the train split's values. Where no split is there to
    evaluate on, some of train is held out.

    Raises:
        ValueError: data set, split or column missing or not recognised; no examples; labels not classes.
    """
    if config.dataset == "digits":
        return _open_digits(config)
    train_split, validation_split = _find_splits(_load(config), config)
    label_column = find_label_column(train_split.features, config)
    input_column, kind = find_input_column(train_split.features, label_column, config)
    names, classes = _classes(train_split, label_column)
    labels = _as_classes(train_split, label_column, classes)
    if validation_split is None:
        train, held_out = _hold_out(labels, config)
        validation_split, validation_labels = train_split.select(held_out), labels[held_out]
        train_split, labels = train_split.select(train), labels[train]
    else:
        validation_labels = _as_classes(validation_split, label_column, classes)
        _check_column(input_column, validation_split.features, "input_column")
        if config.pair_column is not None:
            _check_column(config.pair_column, validation_split.features, "pair_column")
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


def _open_digits(config: DataConfig) -> RawData:
    digits = load_digits()
    # their grey levels run from 0 to 16
    images = [Image.fromarray(pixels) for pixels in np.rint(digits.images * (255 / 16)).astype(np.uint8)]
    train, held_out = _hold_out(digits.target, config)
    return RawData(
        kind="image",
        label_names=[str(name) for name in digits.target_names],
        train_inputs=[images[row] for row in train],
        train_labels=digits.target[train],
        validation_inputs=[images[row] for row in held_out],
        validation_labels=digits.target[held_out],
        max_length=config.max_length,
    )


def _load(config: DataConfig) -> datasets.DatasetDict:
    place, files = local_or_hub(config.dataset), own_files(config.dataset)
    with failures_to_open(config.dataset):
        builder = datasets.load_dataset_builder(place, config.subset, data_files=files)
        check_apart(builder.config.data_files or {})
        builder.download_and_prepare()
        return builder.as_dataset()


def own_files(name: str) -> dict[str, list[str]] | None:
    """The files of each split of a local folder; None for a name on the hub, or where the folder lists them itself."""
    place = local_or_hub(name)
    return split_files(place) if Path(place).is_dir() else None


def local_or_hub(name: str) -> str:
    """Path of a local folder, or a name on the hub; ValueError where it is a path and there is no such folder."""
    path = Path(name).expanduser()
    if not (path.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1):
        return name
    if not path.is_dir():
        raise ValueError(f"no folder {name}: give a folder that datasets.load_dataset opens, or a hub name")
    return str(path)


@contextmanager
def failures_to_open(name: str) -> Iterator[None]:
    """What a library raises over a data set, in one sentence."""
    try:
        yield
    except (OSError, ValueError, IndexError, zipfile.BadZipFile, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        where = "on the hub" if local_or_hub(name) == name and not Path(name).exists() else "in the folder"
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


def _check_column(name: str, features: Mapping[str, Any], option: str) -> str:
    if name not in features:
        raise ValueError(f"no column {name} in the data set: set {option} to one of {', '.join(features)}")
    return name


def _only_or_common(candidates: list[str], common: Sequence[str]) -> str | None:
    if len(candidates) == 1:
        return candidates[0]
    return next((name for name in common if name in candidates), None)


def find_label_column(features: Mapping[str, Any], config: DataConfig) -> str:
    """The column of labels that is configured, or else can be told; ValueError where there is none."""
    if config.label_column is not None:
        return _check_column(config.label_column, features, "label_column")
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    column = _only_or_common(typed or [name for name in features if name in LABEL_NAMES], LABEL_NAMES)
    if column is None:
        raise ValueError(f"cannot tell the column of labels: set label_column to one of {', '.join(features)}")
    return column


def find_input_column(features: Mapping[str, Any], labels: str, config: DataConfig) -> tuple[str, Kind]:
    """The same of inputs, and what they are."""
    kinds: dict[str, Kind] = {}
    for name, feature in features.items():
        if isinstance(feature, datasets.Image):
            kinds[name] = "image"
        elif isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
            kinds[name] = "text"
    column, pair = config.input_column, config.pair_column
    if pair is not None and kinds.get(_check_column(pair, features, "pair_column")) != "text":
        raise ValueError(f"column {pair} holds no texts: set pair_column to one that does")
    if column is None:
        images = [name for name, kind in kinds.items() if kind == "image" and name != labels]
        texts = [name for name, kind in kinds.items() if kind == "text" and name not in (labels, pair)]
        column = _only_or_common(images or texts, INPUT_NAMES)
        if column is None:
            listed = ", ".join(features)
            raise ValueError(f"cannot tell the column of images or texts: set input_column to one of {listed}")
    if _check_column(column, features, "input_column") not in kinds:
        raise ValueError(f"column {column} holds neither images nor texts: set input_column to one that does")
    if pair is not None and kinds[column] != "text":
        raise ValueError(f"column {column} holds images, which have no pair_column: leave it out")
    return column, kinds[column]


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
    _check_column(column, split.features, "label_column")
    labels = split[column]
    if unknown := [value for value in labels if value not in classes]:
        raise ValueError(
            f"{len(unknown)} rows have a {column} that the train split does not know ({unknown[0]!r}): "
            "remove them, or set validation_split to a labelled split"
        )
    return np.array([classes[value] for value in labels], dtype=np.int64)


def _hold_out(labels: np.ndarray, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the part to train on and of the held-out part, stratified by label, both in order."""
    rng = np.random.default_rng(config.split_seed)
    held_out: list[int] = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        held_out.extend(members[: round(config.validation_fraction * len(members))])
    if not 0 < len(held_out) < len(labels):
        raise ValueError(f"{len(labels)} examples are too few to hold some out: name a validation_split")
    return np.setdiff1d(np.arange(len(labels)), held_out), np.sort(held_out)
