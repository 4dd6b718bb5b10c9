"""The batch that the next step releases: how many examples were drawn for it, and what its micro-batches add up to."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from lora_dp.ops.private_update import ExampleSum
from lora_dp.privacy.mechanism import total

LEAVE_OUT = (
    "leave out a single example by optimizer.step(mask=mask), whose entry for an example depends on that example alone"
)


class Drawn(deque[int]):
    """Batches that the private loader drew and that wait for their step: how many examples each of them has.

    Attributes:
        given: whether a training forward of the model began since the last of them was drawn.
    """

    given = False

    def draw(self, size: int) -> None:
        """A batch of ``size`` examples was drawn."""
        self.append(size)
        self.given = False

    def give(self) -> None:
        """A training forward of the model begins."""
        self.given = True


class Clipped(NamedTuple):
    """What a pass adds, private still.

    Attributes:
        sums: clipped sums, some not yet formed, by the ``id`` of their parameter.
        non_finite: how many examples were not finite.
        centred_count: Σᵢ mᵢ(bᵢ − ½) where the clip bound follows a quantile, else 0.
    """

    sums: dict[int, Tensor | ExampleSum]
    non_finite: Tensor | int
    centred_count: Tensor | float = 0.0


class LogicalBatch:
    """From the draw to the release: told of batches by the private loader, of micro-batches by the optimizer.

    Attributes:
        examples: how many the micro-batches have that were added, those that a mask hid included.
        more_follows: whether the next micro-batch is not the last one.
        stepped: whether a step has been taken.
        non_finite_examples: how many had a gradient that is not finite. It depends on private data: for debugging
            only, and never released.
        centred_count: of the micro-batches that were added; private, and released with noise alone.
    """

    def __init__(self, drawn: Drawn):
        self._drawn = drawn
        self._sums: dict[int, Tensor | ExampleSum] = {}
        self.examples = self._kept = 0
        self._lost: str | None = None
        self.more_follows = self.stepped = self._looked = False
        self.non_finite_examples: Tensor | int = 0
        self.centred_count: Tensor | float = 0.0

    def expect(self, size: int) -> None:
        """Told by the private loader: a batch of ``size`` examples was drawn."""
        self._drawn.draw(size)

    def begin(self) -> None:
        """Told by the private loader: it begins to draw. One batch may have been looked at before any step,
        unless it went through the model in training.

        Raises:
            RuntimeError: a batch that was drawn before has not been stepped.
        """
        if self.stepped or self._looked or self._drawn.given:
            self.check_stepped()
        self.check_not_lost()
        self._looked = bool(self._drawn)
        self._drawn.clear()

    def add_micro_batch(self, clipped: Clipped, examples: int, kept: int) -> None:
        """One micro-batch more: its sums, its size, and how many of its examples no mask hid."""
        self.examples += examples
        self._kept += kept
        self.non_finite_examples = self.non_finite_examples + clipped.non_finite
        self.centred_count = self.centred_count + clipped.centred_count
        # A whole batch stays as it is, to be summed, noised and used in one pass; parts of one are added up.
        whole = not self._sums and not self.more_follows
        for key, part in clipped.sums.items():
            if whole:
                self._sums[key] = part
            else:
                before = self._sums.get(key)
                self._sums[key] = total(part) if before is None else total(before) + total(part)

    def collect(self) -> dict[int, Tensor | ExampleSum]:
        """What was added, and the next batch begins."""
        sums, self._sums, self.examples, self._kept, self.centred_count = self._sums, {}, 0, 0, 0.0
        return sums

    def check_whole(self) -> None:
        """Refuse where micro-batches are being added up.

        Raises:
            RuntimeError: there are some, or more are to follow.
        """
        if self.examples or self.more_follows:
            raise RuntimeError("A logical batch of several micro-batches is under way: step() it before the next one.")

    def check_stepped(self) -> None:
        """Refuse to go on after a batch that was drawn and never stepped: who decides that by looking at the data,
        tells of them by what is missing.

        Raises:
            RuntimeError: there is one.
        """
        if self._lost is None and (self._drawn or self.examples):
            sizes = ", ".join(map(str, self._drawn)) or "of several micro-batches"
            self._lose(
                f"A batch that the private loader drew ({sizes} examples) was never stepped (for gradient "
                f"accumulation there is BatchMemoryManager): step every batch once, and {LEAVE_OUT}"
            )
        self.check_not_lost()

    def check_drawn(self) -> None:
        """Refuse to release what is no batch that was drawn.

        Raises:
            RuntimeError: no batch waits that has as many examples.
        """
        self.check_not_lost()
        while self._drawn:
            # Equal but for a mask, which may drop padding and drawn examples, never add any.
            if self._kept <= self._drawn.popleft() <= self.examples:
                return
        self._lose(
            f"This step saw {self.examples} examples, which is no batch that the private loader drew: train on the "
            "loader that make_private returned, each batch once and whole (micro-batches add up to it)"
        )
        self.check_not_lost()

    def check_empty(self) -> None:
        """Refuse the step of an empty batch where one with examples waits.

        Raises:
            RuntimeError: a logical batch is under way, or a batch with examples was drawn.
        """
        self.check_not_lost()
        if self.examples:
            raise RuntimeError("A logical batch is under way: step() it before the next one.")
        if any(self._drawn):
            raise RuntimeError(
                f"A batch that the private loader drew ({max(self._drawn)} examples) cannot be left out, since one "
                f"example would take away what all others add: step it, and {LEAVE_OUT}."
            )
        self._drawn.clear()

    def check_not_lost(self) -> None:
        """Refuse for good, once a batch was left out.

        Raises:
            RuntimeError: one was.
        """
        if self._lost is not None:
            raise RuntimeError(self._lost)

    @contextmanager
    def whole_or_lost(self) -> Iterator[None]:
        """While a batch that was collected gets its noise: refuse for good where that fails, out of memory say."""
        try:
            yield
        except BaseException as error:
            self._lose(f"A step failed before its batch had its noise ({type(error).__name__})")
            raise

    def _lose(self, why: str) -> None:
        """Refuse from here on: a loop that passes over this error would go on without what the batch's examples add."""
        self._drawn.clear()
        self.collect()
        self._lost = f"{why}. That it is missing tells of its examples: call make_private again to go on without it."
