"""Folders of a client's own data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]


def plain(count: int = 30) -> list[Row]:
    return [{"text": f"some words {'x' * (i + 1)}", "label": ["ham", "spam", "egg"][i % 3]} for i in range(count)]


def as_jsonl(path: Path, rows: list[Row]) -> None:
    (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_array(path: Path, rows: list[Row]) -> None:
    (path / "train.json").write_text(json.dumps(rows, indent=1))


def as_csv(path: Path, rows: list[Row]) -> None:
    pd.DataFrame(rows).to_csv(path / "train.csv", index=False)


def as_tsv(path: Path, rows: list[Row]) -> None:
    pd.DataFrame(rows).to_csv(path / "train.tsv", index=False, sep="\t")


def as_parquet(path: Path, rows: list[Row]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path / "train.parquet")


WRITERS = {"jsonl": as_jsonl, "array": as_array, "csv": as_csv, "tsv": as_tsv, "parquet": as_parquet}


def folder(path: Path, rows: list[Row], write: Callable[[Path, list[Row]], None]) -> str:
    path.mkdir()
    write(path, rows)
    return str(path)
