"""The E2E descriptions of restaurants as a folder that ``--dataset`` takes.

    curl -LO https://github.com/tuetschek/e2e-dataset/releases/download/v1.0.0/e2e-dataset.zip
    unzip e2e-dataset.zip
    python experiments/e2e.py e2e-dataset/devset.csv e2e-dataset/testset_w_refs.csv data/e2e

Source: Novikova, Dušek and Rieser 2017, The E2E dataset, arXiv 1706.09254 (CC BY-SA 4.0). To train on it takes its
development set: 4,672 texts are as many as a small federation may have. To evaluate on takes 50 inputs of its test set,
with all texts of each.
"""

import sys
from pathlib import Path

import pandas as pd

INPUTS = 50
NAMES = {"mr": "meaning_representation", "ref": "human_reference"}


def convert(train: Path, test: Path, folder: Path) -> None:
    """Writes train.parquet and validation.parquet, with the columns meaning_representation and human_reference."""
    folder.mkdir(parents=True, exist_ok=True)
    learned, texts = (pd.read_csv(path).rename(columns=NAMES) for path in (train, test))
    learned.to_parquet(folder / "train.parquet", index=False)
    chosen = texts["meaning_representation"].drop_duplicates().sample(INPUTS, random_state=0)
    texts[texts["meaning_representation"].isin(chosen)].to_parquet(folder / "validation.parquet", index=False)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python experiments/e2e.py devset.csv testset_w_refs.csv FOLDER")
    convert(*map(Path, sys.argv[1:]))
