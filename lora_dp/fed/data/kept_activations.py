"""Examples with what a model's frozen front makes of them, computed once and kept in memory."""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_dp.fed.data.content_digest import content_digest
from lora_dp.fed.data.examples import Batch, Examples, Indices, Shape
from lora_dp.fed.data.other_company import Ops, in_other_company, rows_stayed
from lora_dp.fed.safe_text import described

_LOG = logging.getLogger(__name__)
ACTIVATIONS = "activations"
_SEED = 20261130
_WIDTH = 8  # of texts, where there are none


def model_inputs(batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """What a model is called with for an encoded batch: arguments by place and by name."""
    if "pixel_values" in batch and ACTIVATIONS not in batch:
        return (batch["pixel_values"],), {}
    return (), {name: tensor for name, tensor in batch.items() if name != "labels"}


class _Store(NamedTuple):
    """What is known of a source's activations. All views of it have one, and within :func:`shared_activations` all
    runs."""

    known: Tensor
    values: list[Tensor]  # empty until the first activations say how large they are
    apart: dict[Shape, bool]


_shared: dict[str, _Store] | None = None


@contextlib.contextmanager
def shared_activations() -> Iterator[None]:
    """Inside, runs of one process on the same examples and the same frozen front share their activations.

    They are found by the content of both, so that a run never gets another's. Memory is given back at the end.
    """
    global _shared
    before = _shared
    _shared = {}
    try:
        yield
    finally:
        _shared = before


class KeptActivations(Examples):
    """Examples whose batches have ``activations``, float32: (N, d), or (N, T, d) with the T of the source's batch.

    They are computed when they are first asked for, or by :meth:`prepare`.

    An example's activations hang on it alone, to the last bit: the front is given batches of one shape, and where a
    trial on made-up inputs shows that a row's rounding hangs on its company, each example by itself. Who reads the
    rounding of one example would else learn of others.

    Args:
        source: the examples.
        front: activations of one of its batches, a function of each row alone up to rounding.
        with_inputs: whether batches have the source's inputs, too.
        vocabulary: number of tokens, for made-up texts.
        rows: that the front is given at once.
        front_digest: tells of all that the front's values follow from, asked inside :func:`shared_activations` alone;
            None: other runs' activations are never taken.

    >>> from lora_dp.fed.data.examples import ImageExamples
    >>> images = ImageExamples(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1, 1]), [0.0], [1.0])
    >>> kept = KeptActivations(images, lambda batch: batch["pixel_values"].flatten(1)[:, :2], with_inputs=False)
    >>> kept.prepare()
    >>> kept.batch([2, 0])["activations"].shape
    torch.Size([2, 2])
    """

    def __init__(
        self,
        source: Examples,
        front: Callable[[Batch], Tensor],
        *,
        with_inputs: bool,
        vocabulary: int = 2,
        rows: int = 64,
        front_digest: Callable[[], str] | None = None,
    ) -> None:
        super().__init__(source.labels)
        self._source, self._front, self._with_inputs, self._vocabulary = source, front, with_inputs, vocabulary
        self._rows_at_once = rows
        self._kept = _Store(torch.zeros(len(source), dtype=torch.bool), [], {})
        if _shared is not None and front_digest is not None:
            self._kept = _shared.setdefault(f"{front_digest()} {content_digest(source.content())}", self._kept)

    @property
    def shapes_vary(self) -> bool:
        return self._with_inputs and self._source.shapes_vary

    def shapes(self, indices: Indices) -> list[Shape]:
        rows = self._rows[torch.as_tensor(indices, dtype=torch.long)]
        return self._source.shapes(rows) if self.shapes_vary else super().shapes(indices)

    def content(self) -> dict[str, Tensor]:
        """The source's, and which of it these are: what is kept is computed from that."""
        return {"view": self._rows, **self._source.content()}

    def made_up(self, count: int, shape: Shape, vocabulary: int, generator: torch.Generator) -> Batch:
        """As the source's, with activations drawn at random."""
        store = self._store_of_all()
        sizes = (count, shape.width, store.shape[2]) if self.shapes_vary else (count, *store.shape[1:])
        made = self._source.made_up(count, shape, self._vocabulary, generator) if self._with_inputs else {}
        return {ACTIVATIONS: torch.randn(sizes, generator=generator), **made}

    def prepare(self) -> None:
        """Computes what is not known of these examples; what cannot be is left to the batch that asks for it."""
        unknown = self._rows[~self._kept.known[self._rows]].tolist()
        try:
            self._fill(unknown)  # all at once: each shape is then few batches
        except Exception:
            for row in unknown:
                with contextlib.suppress(Exception):
                    self._fill([row])

    def _inputs(self, rows: Tensor) -> Batch:
        self._fill(rows.tolist())
        kept = self._store_of_all()[rows]
        if not self._with_inputs:
            return {ACTIVATIONS: kept}
        inputs = self._source.batch(rows)
        del inputs["labels"]
        if self.shapes_vary:
            kept = kept[:, : next(iter(inputs.values())).shape[1]]
        return {ACTIVATIONS: kept, **inputs}

    def _targets(self, rows: Tensor) -> Tensor:
        return self._source.targets(rows)

    def made_up_targets(self, count: int, shape: Shape, vocabulary: int, generator: torch.Generator) -> Tensor:
        """As the source's."""
        return self._source.made_up_targets(count, shape, vocabulary, generator)

    def with_wrong_targets(self, indices: Indices, rng: np.random.Generator) -> Self:
        """As the source's; what the front makes of these examples is computed anew."""
        rows = self._rows[torch.as_tensor(indices, dtype=torch.long)]
        view = copy.copy(self)
        view._source = self._source.with_wrong_targets(rows, rng)
        view._labels = view._source.labels
        known = self._kept.known.clone()
        known[rows] = False
        view._kept = _Store(known, [tensor.clone() for tensor in self._kept.values], self._kept.apart)
        return view

    def _store(self) -> dict[str, Tensor]:
        return self._source.content()

    def _join(self, examples: Sequence[Batch]) -> Batch:
        kept = [example[ACTIVATIONS] for example in examples]
        joined = pad_sequence(kept, True) if self.shapes_vary else torch.stack(kept)
        return {ACTIVATIONS: joined, **(self._source._join(examples) if self._with_inputs else {})}

    def _store_of_all(self) -> Tensor:
        """Where activations are kept, (all examples, …); made-up inputs tell how large they are.

        No example is asked, which might be one that cannot be read. What is never written takes no memory: the tails of
        short texts.
        """
        if not self._kept.values:
            shape = max(self._source.shapes(range(len(self._source))), default=Shape(_WIDTH))
            generator = torch.Generator().manual_seed(_SEED)
            one = self._front(self._source.made_up(1, shape, self._vocabulary, generator))[0]
            self._kept.values.append(torch.zeros(len(self._source), *one.shape, dtype=torch.float32))
        return self._kept.values[0]

    def _fill(self, rows: Sequence[int]) -> None:
        unknown = sorted({row for row in rows if not self._kept.known[row]})
        by_shape: dict[Shape, list[int]] = {}
        for row, shape in zip(unknown, self._source.shapes(unknown), strict=True):
            by_shape.setdefault(shape, []).append(row)
        for shape, alike in by_shape.items():
            size = self._rows_at_once if self._rows_apart(shape) else 1
            for start in range(0, len(alike), size):
                part = alike[start : start + size]
                whole = [part[place % len(part)] for place in range(size)]
                found = self._front(self._source.batch(whole))[: len(part)].float().cpu()
                store = self._store_of_all()
                if self.shapes_vary:
                    store[part, : found.shape[1]] = found
                else:
                    store[part] = found
                self._kept.known[part] = True

    def _rows_apart(self, shape: Shape) -> bool:
        """Whether each row's activations are the same to the last bit wherever it stands, and beside whomever."""
        if shape not in self._kept.apart:
            self._kept.apart[shape] = self._try(shape)
        return self._kept.apart[shape]

    def _try(self, shape: Shape) -> bool:
        generator = torch.Generator().manual_seed(_SEED)
        batch, others = (self._source.made_up(self._rows_at_once, shape, self._vocabulary, generator) for _ in range(2))
        try:
            companies = in_other_company(batch, others)
            with Ops() as ops:
                found = [(self._front(company), ops.taken()) for company in companies]
            same = all(done == found[0][1] for _, done in found)
            return same and not ops.grouped and rows_stayed([activations for activations, _ in found])
        except Exception as error:
            _LOG.warning("A model's frozen part cannot be tried, so each example is by itself: %s", described(error))
            return False
