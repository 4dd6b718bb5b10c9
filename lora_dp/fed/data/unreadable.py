"""Examples of which some cannot be encoded: they count, and contribute nothing."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lora_dp.fed.data.encoding import InputSpec, RawData, Splits, check_data_kind, encode
from lora_dp.fed.data.examples import Batch, Examples, Indices, Shape
from lora_dp.fed.safe_text import described

_LOG = logging.getLogger(__name__)


class UnreadableExample(ValueError):
    """A batch holds an example that could not be encoded."""


class PartlyReadable(Examples):
    """Examples of which some cannot be fetched: a batch with one of them raises :class:`UnreadableExample`.

    Args:
        readable: those that can; None if there are none.
        rows: which of all they are, ascending.
        labels: of all, int64 (N,); −1 where unknown.
    """

    def __init__(self, readable: Examples | None, rows: Sequence[int], labels: Tensor) -> None:
        super().__init__(labels)
        self._readable = readable
        self._places = torch.full((len(labels),), -1)
        self._places[torch.tensor(rows, dtype=torch.long)] = torch.arange(len(rows))

    @property
    def shapes_vary(self) -> bool:
        return self._readable is not None and self._readable.shapes_vary

    def shapes(self, indices: Indices) -> list[Shape]:
        """Of those that cannot be read, any one: how others are computed must not hang on them."""
        if self._readable is None:
            return super().shapes(indices)
        places = self._places[self._rows[torch.as_tensor(indices, dtype=torch.long)]]
        return self._readable.shapes(places)  # −1 is the last

    def _inputs(self, rows: Tensor) -> Batch:
        places = self._places[rows]
        if self._readable is None or bool((places < 0).any()):
            raise UnreadableExample("an example of this batch could not be encoded")
        return {name: tensor for name, tensor in self._readable.batch(places).items() if name != "labels"}

    def _targets(self, rows: Tensor) -> Tensor:
        return super()._targets(rows) if self._readable is None else self._readable.targets(self._places[rows])

    def made_up_targets(self, count: int, shape: Shape, vocabulary: int, generator: torch.Generator) -> Tensor:
        """As of those that can be read."""
        if self._readable is None:
            return super().made_up_targets(count, shape, vocabulary, generator)
        return self._readable.made_up_targets(count, shape, vocabulary, generator)

    def _store(self) -> dict[str, Tensor]:
        readable = {} if self._readable is None else self._readable.content()
        return {"places": self._places, **{f"readable {name}": tensor for name, tensor in readable.items()}}

    def _join(self, examples: Sequence[Batch]) -> Batch:
        assert self._readable is not None
        return self._readable._join(examples)


def encode_training(raw: RawData, spec: InputSpec) -> Splits:
    """As :func:`lora_dp.fed.data.encoding.encode`, of the examples to train on alone, and whatever they hold.

    An example that cannot be encoded, by itself, or that has none of the classes, stays in the number of examples; how
    many, and why, this process's log tells.

    Raises:
        ValueError: the model takes another kind of input than the data have.
    """
    check_data_kind(raw, spec)
    raw = replace(raw, validation_inputs=[], validation_labels=np.arange(0))
    labels = torch.as_tensor(raw.train_labels, dtype=torch.long)
    known = np.flatnonzero(raw.train_labels >= 0).tolist()
    if len(known) == len(labels):
        try:
            return encode(raw, spec)
        except Exception as error:
            _LOG.error("Some of the data cannot be read, and will contribute nothing: %s", described(error))
    else:
        _LOG.error(
            "%d examples have a label that is none of the %d classes, and will contribute nothing: correct them, or "
            "name all classes in the node-config's classes.",
            len(labels) - len(known),
            raw.num_labels,
        )
    rows = _readable_rows(raw, spec, known)
    train = PartlyReadable(encode(_only(raw, rows), spec).train if rows else None, rows, labels)
    _LOG.error("%d of %d examples cannot be read.", len(labels) - len(rows), len(labels))
    return Splits(train, train.subset([]), raw.label_names, raw.kind)


def _only(raw: RawData, rows: Sequence[int]) -> RawData:
    return replace(raw, train_inputs=[raw.train_inputs[row] for row in rows], train_labels=raw.train_labels[list(rows)])


def _readable_rows(raw: RawData, spec: InputSpec, rows: Sequence[int]) -> list[int]:
    try:
        encode(_only(raw, rows), spec)
    except Exception:
        if len(rows) <= 1:
            return []
        middle = len(rows) // 2
        return _readable_rows(raw, spec, rows[:middle]) + _readable_rows(raw, spec, rows[middle:])
    return list(rows)
