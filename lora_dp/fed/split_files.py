"""Which files of a local folder belong to which split: told by its top level alone, so that no file is in two.

``datasets`` looks for words such as "train" and "test" anywhere in the path of a file, and joins what it finds. Then
a class ``train_station`` is read twice, images of a class ``test_tube`` are trained on and validated on, and one more
file ``2024-test.png`` takes the place of all others.
"""

import glob
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import datasets
import yaml
from datasets.packaged_modules import _EXTENSION_TO_MODULE

_SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test"}
_IMAGES = frozenset(extension for extension, (module, _) in _EXTENSION_TO_MODULE.items() if module == "imagefolder")
_DATA = frozenset(_EXTENSION_TO_MODULE) - {".md"} | {".zip"}
_PACKED = frozenset((".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip"))
_TWICE = "{} holds the same as {}, so that every example would come twice: keep one of them"
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def split_files(folder: str) -> dict[str, list[str]] | None:
    """Patterns of the files of each split, as ``datasets`` takes them; None where the folder's README.md lists them.

    The top level is the first at which there is more than one folder with data, or a file with data. There, folders
    named train, validation or test (or training, valid, val, dev, testing, eval) are splits with all that is in them,
    if one of them is for training; so are train_images beside test_images. So are tables whose names have one of these
    words, such as ``train-00000.parquet``. In any other folder all files are for training. An editor's copies, such as
    ``data.csv~`` and ``data.csv.bak``, are not read.

    Raises:
        ValueError: a folder with data beside those of the splits belongs to none; or two files hold the same, so that
            every example would come twice.
    """
    root = Path(folder)
    if _lists_its_files(root):
        return None
    splits = _splits(root)
    for places in splits.values():
        check_distinct([file for place in places for file in _all_files(place)])
    return {split: [pattern for place in places for pattern in _patterns(root, place)]
            for split, places in splits.items()}


def _splits(root: Path) -> dict[str, list[Path]]:
    """The files and folders of each split."""
    everything, top = {"train": [root]}, root
    while not any(_has_data(file) for file in _files(top)) and len(inner := list(_folders(top))) == 1:
        top, = inner
        if top.name.lower() in _SPLITS:
            return everything
    folders = {inner.name: _word(inner.name) for inner in _folders(top)}
    exact = {name for name in folders if name.lower() in _SPLITS}
    if any(_SPLITS[name.lower()] == "train" for name in exact):
        if others := sorted(folders.keys() - exact):
            raise ValueError(
                f"the folder {others[0]} stands beside {sorted(exact)[0]}, which is named as a split: put all that is "
                "for training into one folder train")
        return _by_split(top, folders)
    if len(exact) > 1 and exact == folders.keys():
        return _by_split(top, folders)  # none of them for training
    if "train" in folders.values() and None not in folders.values() and not _are_classes(top, folders):
        return _by_split(top, folders)
    tables = {file.name: _word(file.name) for file in _files(top) if _has_data(file) and not _is_image(file)}
    if len(set(tables.values()) - {None}) > 1 or "train" in tables.values():
        return _by_split(top, tables)
    return everything


def _by_split(top: Path, entries: Mapping[str, str | None]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for name, split in entries.items():
        if split is not None:
            found.setdefault(split, []).append(top / name)
    return found


def _patterns(root: Path, place: Path) -> list[str]:
    if place.is_file():
        return [glob.escape(place.relative_to(root).as_posix())]
    if not any(_is_copy(file) for file in place.rglob("*")):
        return [f"{glob.escape(place.relative_to(root).as_posix())}/**".removeprefix("./")]
    return [glob.escape(file.relative_to(root).as_posix()) for file in _all_files(place)]


def check_distinct(files: Sequence[Path]) -> None:
    """Refuse tables and archives of which two hold the same, be it packed once.

    Raises:
        ValueError: naming both.
    """
    # Equal images are equal examples, not a copy of all of them.
    tables = [file for file in files if not _is_image(file) and file.name not in _METADATA]
    sizes = Counter(file.stat().st_size for file in tables)
    by_stem: dict[Path, list[Path]] = {}
    by_bytes: dict[str, Path] = {}
    for file in tables:
        unpacked = file.with_suffix("") if _is_packed(file) else file
        others = by_stem.setdefault(unpacked.with_suffix(""), [])
        for other in others:
            if _is_packed(file) or _is_packed(other):
                raise ValueError(_TWICE.format(file.name, other.name))
        others.append(file)
        if sizes[file.stat().st_size] > 1 and file.stat().st_size:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            if digest in by_bytes:
                raise ValueError(_TWICE.format(file.name, by_bytes[digest].name))
            by_bytes[digest] = file


def check_apart(files: Mapping[str, Sequence[str]]) -> None:
    """Refuse a data set of which a file is in two splits, or twice in one.

    Args:
        files: those of each split, as ``datasets`` has resolved them.

    Raises:
        ValueError: naming the file.
    """
    seen: dict[str, str] = {}
    for split, names in files.items():
        for name in map(str, names):
            if name in seen:
                where = f"twice in {split}" if seen[name] == split else f"in {seen[name]} and in {split}"
                raise ValueError(
                    f"the file {Path(name).name} is {where}: list the files of each split in the README.md of the data "
                    "set, or rename folders whose names hold words such as train or test")
            seen[name] = str(split)


def _lists_its_files(root: Path) -> bool:
    readme = root / "README.md"
    if (root / ".huggingface.yaml").exists():
        return True
    parts = readme.read_text(encoding="utf-8", errors="replace").split("---", 2) if readme.is_file() else []
    if len(parts) < 3 or parts[0].strip():
        return False
    try:
        head = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return False
    return isinstance(head, dict) and bool(head.get("configs"))


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith((".", "__")))


def _all_files(place: Path) -> list[Path]:
    """Those with data, at any depth, but for hidden ones."""
    if place.is_file():
        return [place]
    return [file for file in sorted(place.rglob("*")) if file.is_file() and _has_data(file) and not any(
        part.startswith((".", "__")) for part in file.relative_to(place).parts)]


def _folders(folder: Path) -> Iterator[Path]:
    """Those that hold data, at any depth."""
    return (inner for inner in sorted(folder.iterdir())
            if inner.is_dir() and not inner.name.startswith((".", "__")) and any(map(_has_data, inner.rglob("*"))))


def _has_data(file: Path) -> bool:
    """By the end of its name: also of train.csv.gz, not of train.csv.bak."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _PACKED - {".zip"}:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in _DATA and file.name not in datasets.data_files.FILES_TO_IGNORE


def _is_copy(file: Path) -> bool:
    """Whether ``datasets`` may take it for data, which it is not."""
    return not _has_data(file) and any(
        f".{part.rstrip('~#').lower()}" in _DATA for part in file.name.split(".")[1:])


def _is_packed(file: Path) -> bool:
    return file.suffix.lower() in _PACKED


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in _IMAGES


def _word(name: str) -> str | None:
    """The split that is named by one word of a name; None of several, or none."""
    found = {_SPLITS[word] for word in re.split(r"[-._ 0-9]+", name.lower()) if word in _SPLITS}
    return found.pop() if len(found) == 1 else None


def _are_classes(top: Path, folders: Mapping[str, str | None]) -> bool:
    """Whether images lie in these folders themselves, with nothing else that tells their classes."""
    return any(_is_image(file) for name in folders for file in _files(top / name)) and not any(
        (top / name / metadata).exists() for name in folders for metadata in _METADATA)
