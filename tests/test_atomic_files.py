import os
from pathlib import Path

import pytest

from lora_dp.atomic_files import KeptFile, write_atomically


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "ledger.json", "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "ledger.json", "new")
    assert (tmp_path / "ledger.json").read_text() == "old"


def test_a_kept_file_is_written_by_one_alone(tmp_path: Path) -> None:
    path, number = tmp_path / "kept", iter(range(10))
    kept = KeptFile(path, lambda: str(next(number)))
    kept.write()
    kept.write()
    assert path.read_text() == "1"
    path.write_text("other")
    with pytest.raises(RuntimeError, match="another run writes to it"):
        kept.write()
    assert path.read_text() == "other"
    path.unlink()
    with pytest.raises(RuntimeError, match="or it was removed"):
        kept.write()
