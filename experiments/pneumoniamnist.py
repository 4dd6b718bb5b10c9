"""PneumoniaMNIST as a folder that ``--dataset`` takes.

    curl -L -o pneumoniamnist.npz https://zenodo.org/record/6496656/files/pneumoniamnist.npz
    python experiments/pneumoniamnist.py pneumoniamnist.npz data/pneumoniamnist

Source: MedMNIST v2 (https://medmnist.com, CC BY 4.0), Yang et al., Scientific Data 10, 41 (2023).
"""

import sys
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

FEATURES = Features({"image": Image(), "label": ClassLabel(names=["normal", "pneumonia"])})


def convert(source: Path, folder: Path) -> None:
    """Writes train.parquet and validation.parquet; the test images are left where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    with np.load(source) as arrays:
        for name, part in (("train", "train"), ("validation", "val")):
            images = [PILImage.fromarray(pixels) for pixels in arrays[f"{part}_images"]]
            labels = arrays[f"{part}_labels"].ravel().tolist()
            Dataset.from_dict({"image": images, "label": labels}, FEATURES).to_parquet(folder / f"{name}.parquet")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/pneumoniamnist.py pneumoniamnist.npz FOLDER")
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
