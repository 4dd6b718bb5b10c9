"""Checkpoints of a run: tensors and numbers, atomic, versioned, with a digest; the last two are kept.

``checkpoints/round-000007.safetensors`` holds the tensors, ``round-000007.json`` the numbers with the digest of both.
The JSON file is written last: a checkpoint without it does not exist.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from lora_dp.atomic_files import write_atomically, write_bytes_atomically

FOLDER = "checkpoints"
KEPT = 2
_FORMAT, _VERSION = "lora-dp federation checkpoint", 2


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not what was written, or that this version cannot read."""


def _digest(tensors: bytes, numbers: str) -> str:
    return hashlib.sha256(tensors + numbers.encode()).hexdigest()


def _stem(folder: Path, number: int) -> Path:
    return folder / FOLDER / f"round-{number:06d}"


def write(folder: Path, number: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Writes the checkpoint after round ``number``; on the disk when this returns. Older ones than the last two go."""
    stem = _stem(folder, number)
    stem.parent.mkdir(exist_ok=True)
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    content = json.dumps(numbers, sort_keys=True)
    write_bytes_atomically(stem.with_suffix(".safetensors"), data)
    head = {"format": _FORMAT, "version": _VERSION, "digest": _digest(data, content), "numbers": json.loads(content)}
    write_atomically(stem.with_suffix(".json"), json.dumps(head))
    for old in rounds(folder)[:-KEPT]:
        _stem(folder, old).with_suffix(".json").unlink(missing_ok=True)
        _stem(folder, old).with_suffix(".safetensors").unlink(missing_ok=True)


def rounds(folder: Path) -> list[int]:
    """Numbers of the checkpoints there are, ascending."""
    found = (re.fullmatch(r"round-(\d+)\.json", path.name) for path in (folder / FOLDER).glob("round-*.json"))
    return sorted(int(match[1]) for match in found if match)


def read(folder: Path, number: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and numbers of one checkpoint.

    Raises:
        DamagedCheckpoint: in one sentence.
    """
    stem = _stem(folder, number)
    try:
        head = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        data = stem.with_suffix(".safetensors").read_bytes()
        if head.get("format") != _FORMAT or head.get("version") != _VERSION:
            raise DamagedCheckpoint(
                f"The checkpoint {stem} is of format {head.get('format')!r}, version {head.get('version')!r}: read it "
                "with the lora-dp that wrote it."
            )
        if _digest(data, json.dumps(head["numbers"], sort_keys=True)) != head["digest"]:
            raise DamagedCheckpoint(f"The checkpoint {stem} is damaged: its content does not match its digest.")
        return load(data), head["numbers"]
    except DamagedCheckpoint:
        raise
    except Exception as error:
        raise DamagedCheckpoint(f"The checkpoint {stem} cannot be read ({type(error).__name__}: {error}).") from error


def newest(folder: Path) -> tuple[tuple[dict[str, Tensor], dict[str, Any]] | None, list[str]]:
    """The newest checkpoint that is whole, or None where there is none; and what is wrong with newer ones.

    Raises:
        DamagedCheckpoint: there are checkpoints, but none is whole.
    """
    problems: list[str] = []
    found = rounds(folder)
    for number in reversed(found):
        try:
            return read(folder, number), problems
        except DamagedCheckpoint as error:
            problems.append(str(error))
    if found:
        raise DamagedCheckpoint(
            f"No checkpoint in {folder / FOLDER} is whole ({problems[0]}): restore one from a backup, or run anew with "
            "another --output."
        )
    return None, problems
