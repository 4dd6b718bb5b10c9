"""Which files of a local folder belong to which split: told by its top level alone, so that no file is in two.

``datasets`` looks for words such as "train" and "test" anywhere in the path of a file, and joins what it finds. Then
a class ``train_station`` is read twice, images of a class ``test_tube`` are trained on and validated on, and one more
file ``2024-test.png`` takes the place of all others.
"""

import glob
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import datasets
import yaml
from datasets.packaged_modules import _EXTENSION_TO_MODULE

_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
_PACKED = frozenset((".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip"))
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# What datasets writes beside its own files, and what explains data.
_NO_DATA = {*datasets.data_files.FILES_TO_IGNORE, "state.json", *_METADATA}
_ARCHIVE = "archive"
_TWICE = "{} holds the same as {}, so that every example would come twice: keep one of them"


def split_files(folder: str) -> dict[str, list[str]] | None:
    """Patterns of the files of each split, as ``datasets`` takes them; None where the folder's README.md lists them.

    The top level is the first at which there is more than one folder with data, or a file with data. There, folders
    named train, validation or test (or training, valid, val, dev, testing, eval) are splits with all that is in them,
    if one of them is for training; so are train_images beside test_images. So are tables whose names have one of these
    words, such as ``train-00000.parquet``. In any other folder all files are for training. Data are the files of the
    kind that there are most of: texts beside images are none, nor are an editor's copies, such as ``data.csv~``.

    Raises:
        ValueError: a folder with data beside those of the splits belongs to none; or two files hold the same, so that
            every example would come twice.
    """
    root = Path(folder)
    return None if _lists_its_files(root) else _Folder(root).split()


def check_distinct(files: Sequence[Path]) -> None:
    """Refuse tables and archives of which two hold the same, be it packed once.

    Raises:
        ValueError: naming both.
    """
    sizes = Counter(file.stat().st_size for file in files)
    by_stem: dict[Path, list[Path]] = {}
    by_bytes: dict[str, Path] = {}
    for file in files:
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
                    "set, or rename folders whose names hold words such as train or test"
                )
            seen[name] = str(split)


class _Folder:
    """The data in a folder: its files of the kind that there are most of."""

    def __init__(self, root: Path):
        self.root, self.visible = root, _visible(root)
        kinds = Counter(kind for file in self.visible if (kind := _kind(file)) is not None)
        if len(kinds) > 1:
            del kinds["text"]  # a licence, a list of the classes
        self.kind = max(kinds, key=lambda kind: (kinds[kind], kind), default=None)
        self.data = [file for file in self.visible if _kind(file) in {self.kind, _ARCHIVE} - {None}]
        self.images = self.kind == "imagefolder"

    def split(self) -> dict[str, list[str]]:
        found = {}
        for split, places in self._splits().items():
            files = [file for file in self.data if any(file == place or place in file.parents for place in places)]
            if not self.images:  # equal images are equal examples, not a copy of all of them
                check_distinct(files)
            found[split] = self._patterns(files, places)
        return found

    def _splits(self) -> dict[str, list[Path]]:
        """The files and folders of each split."""
        everything, top = {"train": [self.root]}, self.root
        while not self._files(top) and len(inner := self._folders(top)) == 1:
            top = top / inner[0]
            if top.name.lower() in _SPLITS:
                return everything
        words = {name: _word(name) for name in self._folders(top)}
        exact = {name: _SPLITS[name.lower()] for name in words if name.lower() in _SPLITS}
        if "train" in exact.values():
            if others := sorted(words.keys() - exact.keys()):
                train = next(name for name, split in exact.items() if split == "train")
                raise ValueError(
                    f"the folder {others[0]} stands beside {train}, which is named as a split: put all that is for "
                    f"training into {train}, and what is not elsewhere"
                )
            return _by_split({top / name: split for name, split in exact.items()})
        if len(exact) > 1 and exact.keys() == words.keys():
            return _by_split({top / name: split for name, split in exact.items()})  # none of them for training
        if "train" in words.values() and None not in words.values() and not self._are_classes(top, words):
            return _by_split({top / name: split for name, split in words.items()})
        tables = {} if self.images else {file: _word(file.name) for file in self.data}
        if len(set(tables.values()) - {None}) > 1 or "train" in tables.values():
            return _by_split(tables)
        return everything

    def _files(self, folder: Path) -> list[Path]:
        return [file for file in self.data if file.parent == folder]

    def _folders(self, folder: Path) -> list[str]:
        """Names of those that hold data, at any depth."""
        below = [file.relative_to(folder).parts for file in self.data if folder in file.parents]
        return sorted({parts[0] for parts in below if len(parts) > 1})

    def _are_classes(self, top: Path, folders: Iterable[str]) -> bool:
        """Whether images lie in these folders themselves, with nothing else that tells their classes."""
        return (
            self.images
            and any(self._files(top / name) for name in folders)
            and not any((top / name / metadata).exists() for name in folders for metadata in _METADATA)
        )

    def _patterns(self, files: list[Path], places: list[Path]) -> list[str]:
        """All files one by one; folders of images, which may be many, whole where nothing in them could be taken for
        an image."""
        if not self.images or any(_is_copy(file) for place in places for file in place.rglob("*")):
            listed = files + [file for file in self.visible if self.images and file.name in _METADATA]
            return [glob.escape(file.relative_to(self.root).as_posix()) for file in listed] or ["**"]
        return [f"{glob.escape(place.relative_to(self.root).as_posix())}/**".removeprefix("./") for place in places]


def _by_split(places: Mapping[Path, str | None]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for split in ("train", "validation", "test"):
        if named := [place for place, other in places.items() if other == split]:
            found[split] = named
    return found


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


def _visible(folder: Path) -> list[Path]:
    """All files, at any depth, but for hidden ones."""
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
    ]


def _kind(file: Path) -> str | None:
    """Which of datasets' modules reads it, by the end of its name: also of train.csv.gz, not of train.csv.bak."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] == ".zip":
        return _ARCHIVE
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    if not suffixes or suffixes[-1] == ".md" or file.name in _NO_DATA:
        return None
    return _EXTENSION_TO_MODULE.get(suffixes[-1], (None,))[0]


def _is_copy(file: Path) -> bool:
    """Whether ``datasets`` may take it for data, which it is not."""
    return (
        _kind(file) is None
        and file.name not in _NO_DATA
        and any(f".{part.rstrip('~#').lower()}" in _EXTENSION_TO_MODULE for part in file.name.split(".")[1:])
    )


def _is_packed(file: Path) -> bool:
    return file.suffix.lower() in _PACKED


def _word(name: str) -> str | None:
    """The split that is named by one word of a name; None of several, or none."""
    found = {_SPLITS[word] for word in re.split(r"[-._ 0-9]+", name.lower()) if word in _SPLITS}
    return found.pop() if len(found) == 1 else None
