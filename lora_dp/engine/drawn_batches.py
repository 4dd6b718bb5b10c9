"""Batches that the private loader drew and that wait for their step."""

from collections import deque

LEAVE_OUT = (
    "leave out a single example by optimizer.step(mask=mask), whose entry for an example depends on that example alone"
)


class Drawn(deque[int]):
    """How many examples each of them has.

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
