"""A node's own data, and the options of a run that it takes part in."""

from pathlib import Path
from typing import Any


def own_folder(path: Path, rows: int = 60) -> Path:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for row in range(rows):
        place = path / "train" / str(digits.target[row]) / f"{row:03d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[row] * 15).astype("uint8")).save(place)
    return path


GOOD: dict[str, Any] = {
    "clients": 2,
    "rounds": 3,
    "local_steps": 2,
    "batch_size": 16,
    "accountant": "rdp",
    "method": "dp-lora",
    "lr": 0.5,
    "engine": "deployed",
}
