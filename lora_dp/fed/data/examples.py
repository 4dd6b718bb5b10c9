"""Encoded examples as tensors: one store in memory, of which every client's part is a view."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from lora_dp.losses import IGNORED

Batch = dict[str, Tensor]
Indices = Sequence[int] | np.ndarray | Tensor


class Shape(NamedTuple):
    """What of one example may decide how a model computes with its batch.

    Attributes:
        width: of the tensors that :meth:`Examples.batch` makes of it alone; 0 where all examples have one shape.
        padded: whether it is shorter than that: models pass over a mask without padding.
    """

    width: int = 0
    padded: bool = False


class Examples(Dataset[Batch], ABC):
    """Map-style data set of dict[str, Tensor] examples: the model's inputs, and "labels", int64, what it is to say.

    These are classes (N,), or for language models tokens (N, T), −100 where nothing is learned. ``[i]`` is one example;
    a DataLoader fetches a whole batch at once (``__getitems__``) and takes ``collate`` as its collate_fn.
    """

    def __init__(self, labels: Tensor) -> None:
        self._labels = labels
        self._rows = torch.arange(len(labels))

    @abstractmethod
    def _inputs(self, rows: Tensor) -> Batch:
        """The model's inputs for these rows of the store, as one batch."""

    @abstractmethod
    def _store(self) -> dict[str, Tensor]:
        """What the inputs are made of, for all rows of the store."""

    def _targets(self, rows: Tensor) -> Tensor:
        """What the model is to say of these rows of the store: their classes."""
        return self._labels[rows]

    @abstractmethod
    def _join(self, examples: Sequence[Batch]) -> Batch:
        """The model's inputs of single examples, as one batch."""

    def content(self) -> dict[str, Tensor]:
        """All that its batches are made of, by name: the store, and which rows of it are these examples."""
        return {"rows": self._rows, "labels": self._labels, **self._store()}

    def prepare(self) -> None:  # noqa: B027  (nothing, where nothing is kept)
        """Does once what would else be done when an example is first asked for."""

    @property
    def shapes_vary(self) -> bool:
        """Whether examples have shapes of their own, as texts do."""
        return False

    def shapes(self, indices: Indices) -> list[Shape]:
        """The shape of each of these examples."""
        return [Shape()] * len(indices)

    def made_up(self, count: int, shape: Shape, vocabulary: int, generator: torch.Generator) -> Batch:
        """Inputs of the shapes and dtypes of such a batch, drawn at random: they hold nothing of the examples."""
        width = shape.width
        found: Batch = {}
        for name, tensor in self._inputs(self._rows[:0]).items():
            if tensor.is_floating_point():
                found[name] = torch.randn(count, *tensor.shape[1:], generator=generator).to(tensor.dtype)
            elif name == "attention_mask":
                least, most = (max(width - 7, 1), width) if shape.padded else (width, width + 1)
                lengths = torch.randint(least, most, (count, 1), generator=generator)
                found[name] = (torch.arange(width) < lengths).long()
            else:
                values = vocabulary if name == "input_ids" else 2
                found[name] = torch.randint(values, (count, width), generator=generator)
        return found

    def made_up_targets(self, count: int, shape: Shape, vocabulary: int, generator: torch.Generator) -> Tensor:
        """Targets of such a batch, drawn at random: tokens of the vocabulary, or numbers below 2³¹, whose remainder by
        the number of classes is one."""
        return torch.randint(2**31, (count,), generator=generator)

    def with_wrong_targets(self, indices: Indices, rng: np.random.Generator) -> Self:
        """The same examples, these of them with another class, drawn at random.

        Raises:
            ValueError: there is no other.
        """
        classes = int(self.labels.max()) + 1
        if classes < 2:
            raise ValueError("All examples have one label, so that none can have a wrong one: plant gradients instead.")
        rows = self._rows[torch.as_tensor(indices, dtype=torch.long)]
        view = copy.copy(self)
        view._labels = self._labels.clone()
        view._labels[rows] = (view._labels[rows] + torch.from_numpy(rng.integers(1, classes, len(rows)))) % classes
        return view

    @property
    def labels(self) -> Tensor:
        """Classes of all examples, int64 (N,): by them data are split; 0 where there are none."""
        return self._labels[self._rows]

    def targets(self, indices: Indices) -> Tensor:
        """What the model is to say of the examples at these indices, as in :meth:`batch`."""
        return self._targets(self._rows[torch.as_tensor(indices, dtype=torch.long)])

    def subset(self, indices: Indices) -> Self:
        """The examples at these indices, as a view: the tensors are shared, not copied."""
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view._rows = self._rows[torch.as_tensor(indices, dtype=torch.long)]
        return view

    def batch(self, indices: Indices) -> Batch:
        """The examples at these indices (none is fine) as one batch, first dimension len(indices)."""
        rows = self._rows[torch.as_tensor(indices, dtype=torch.long)]
        return {**self._inputs(rows), "labels": self._targets(rows)}

    def batches(self, size: int) -> Iterator[Batch]:
        """All examples in order, ``size`` at a time, for evaluation."""
        for start in range(0, len(self), size):
            yield self.batch(range(start, min(start + size, len(self))))

    def collate(self, items: Batch | Sequence[Batch]) -> Batch:
        """A batch from what ``__getitems__`` returned (as it is) or from a list of single examples."""
        if isinstance(items, dict):
            return items
        targets = [item["labels"] for item in items]
        joined = pad_sequence(targets, True, IGNORED) if targets[0].dim() else torch.stack(targets)
        return {**self._join(items), "labels": joined}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} examples")
        return {name: tensor[0] for name, tensor in self.batch([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self.batch(indices)


class ImageExamples(Examples):
    """Images kept as one uint8 tensor (N, C, H, W) of the model's size, normalised as they are fetched.

    "pixel_values": float32, (pixel / 255 - mean) / std per channel.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(labels)
        self._pixels = pixels
        self._mean = torch.tensor(mean).view(-1, 1, 1) * 255
        self._std = torch.tensor(std).view(-1, 1, 1) * 255

    def _inputs(self, rows: Tensor) -> Batch:
        return {"pixel_values": self._pixels[rows].float().sub_(self._mean).div_(self._std)}

    def _store(self) -> dict[str, Tensor]:
        return {"pixels": self._pixels, "mean": self._mean, "std": self._std}

    def _join(self, examples: Sequence[Batch]) -> Batch:
        return {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}


class TextExamples(Examples):
    """Texts kept as one int32 matrix of token ids (N, longest), padded on the right.

    "input_ids" and "attention_mask" (1 for text, 0 for padding): int64 (batch, T), T the batch's longest text
    rounded up to a multiple of 8 or, if less, the store's width; for pairs of texts and models that want to know,
    "token_type_ids", which text of the pair a token belongs to.
    """

    def __init__(
        self, ids: Tensor, lengths: Tensor, labels: Tensor, pad_id: int, segments: Tensor | None = None
    ) -> None:
        super().__init__(labels)
        self._segments = segments
        self._ids = ids
        self._lengths = lengths
        self._pad_id = pad_id

    def _inputs(self, rows: Tensor) -> Batch:
        lengths = self._lengths[rows]
        width = self._width(int(lengths.max()) if len(rows) else 1)
        mask = (torch.arange(width) < lengths.unsqueeze(1)).long()
        batch = {"input_ids": self._ids[rows, :width].long(), "attention_mask": mask}
        if self._segments is not None:
            batch["token_type_ids"] = self._segments[rows, :width].long()
        return batch

    def _width(self, length: int) -> int:
        """Of a batch whose longest text has so many tokens."""
        return min(multiple_of_8(length), self._ids.shape[1])

    def _store(self) -> dict[str, Tensor]:
        stored = {"ids": self._ids, "lengths": self._lengths, "padding": torch.tensor(self._pad_id)}
        return stored if self._segments is None else {**stored, "segments": self._segments}

    @property
    def shapes_vary(self) -> bool:
        return True

    def shapes(self, indices: Indices) -> list[Shape]:
        lengths = self._lengths[self._rows[torch.as_tensor(indices, dtype=torch.long)]].tolist()
        widths = [self._width(length) for length in lengths]
        return [Shape(width, length < width) for length, width in zip(lengths, widths, strict=True)]

    def _join(self, examples: Sequence[Batch]) -> Batch:
        names = [name for name in examples[0] if name != "labels"]
        return {
            name: pad_sequence([e[name] for e in examples], True, self._pad_id if name == "input_ids" else 0)
            for name in names
        }


def multiple_of_8(length: int) -> int:
    """The smallest multiple of 8 that is not below ``length``: matrix products like such sizes."""
    return -(-length // 8) * 8


def padded_rows(rows: Sequence[Sequence[int]], width: int, fill: int) -> Tensor:
    """int32 (len(rows), width): rows of numbers, filled up at the end."""
    matrix = torch.full((len(rows), width), fill, dtype=torch.int32)
    for row, numbers in zip(matrix, rows, strict=True):
        row[: len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
    return matrix
