"""Several random views of each image, by torchvision's transforms (De et al. 2022, arXiv 2204.13650)."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_dp.fed.data.examples import Batch

# Of the side, to either end of it: 4 pixels of 32, as is usual.
_SHIFT = 8


@dataclass(frozen=True)
class Views:
    """Makes a batch of so many views of each image, each shifted at random by up to an eighth of the side.

    What moves in repeats the edge. The draws are of torch's generator of the CPU: secret in a client's turn, or of the
    turn's seed in a reproducible run.

    Attributes:
        count: K; 1 leaves a batch as it is.
        mirror: whether a view is mirrored, left for right, with probability ½.

    >>> batch = {"pixel_values": torch.arange(32.0).view(2, 1, 4, 4), "labels": torch.tensor([0, 1])}
    >>> views = Views(3)(batch)
    >>> views["pixel_values"].shape, views["labels"]
    (torch.Size([6, 1, 4, 4]), tensor([0, 0, 0, 1, 1, 1]))
    """

    count: int = 1
    mirror: bool = False

    def __call__(self, batch: Batch) -> Batch:
        """All views of one example after those of another.

        Args:
            batch: "pixel_values" (N, C, H, W), floating-point, on the CPU; what else it has is repeated.

        Returns:
            First dimensions N·K.
        """
        if self.count == 1:
            return batch
        found = {name: tensor.repeat_interleave(self.count, 0) for name, tensor in batch.items()}
        images = found["pixel_values"]
        if len(images):
            change = _transform(images.shape[-2], images.shape[-1], self.mirror)
            # One call draws for all that it is given.
            found["pixel_values"] = torch.stack([change(image) for image in images])
        return found

    def spread(self, batch: Batch) -> Batch:
        """The rows of a batch whose tensors are (N, K, …), in the same order; labels (N,) are repeated."""
        return {
            name: tensor.repeat_interleave(self.count, 0) if name == "labels" else tensor.flatten(0, 1)
            for name, tensor in batch.items()
        }

    def gathered(self, rows: Tensor) -> Tensor:
        """(N·K, …) as (N, K, …)."""
        return rows.unflatten(0, (-1, self.count))


@functools.cache
def _transform(height: int, width: int, mirror: bool) -> Any:
    from torchvision.transforms import v2

    margins = [width // _SHIFT, height // _SHIFT]
    shift = v2.RandomCrop((height, width), padding=margins, padding_mode="edge")
    return v2.Compose([shift, v2.RandomHorizontalFlip()]) if mirror else shift
