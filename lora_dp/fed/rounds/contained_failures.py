"""Failures of local work, contained: that training fails on an example must not be a bit that no noise covers.

A batch in which it fails is halved, down to single examples; one on which it fails by itself adds nothing to the sum,
as one whose gradient is not finite. What an example adds is so a function of it alone. To leave out the whole batch
would not do: one example would then take away what all others add, many times what the noise is made for.

The number of rows that the model is given stays the same however few examples are left
(:mod:`lora_dp.fed.rounds.fixed_shapes`): the rest are copies of these, and a mask keeps them out of the sum.
"""

import logging
from collections.abc import Callable, Sequence

import torch

from lora_dp.engine.logical_batch import Clipped
from lora_dp.engine.optimizer import PrivateOptimizer
from lora_dp.errors import IsolationError
from lora_dp.fed.safe_text import described
from lora_dp.ops.private_update import ExampleSum
from lora_dp.privacy.mechanism import total

_LOG = logging.getLogger(__name__)


class GivenUp(Exception):
    """Training failed on the data of a client that is protected as a whole: its change is zero.

    Attributes:
        error: what it raised, which may quote the data.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class Failures:
    """What failed in one turn, for whoever runs the client. It holds words and no tensors, and is never sent.

    Attributes:
        examples: how often one contributed nothing.
    """

    def __init__(self) -> None:
        self.examples = 0
        self._first: str | None = None
        self._mixed: str | None = None

    @property
    def mixing(self) -> bool:
        """Whether the model was found to mix examples: each is then trained on by itself."""
        return self._mixed is not None

    def add(self, error: Exception, examples: int) -> None:
        """Notes what training on so many examples raised."""
        if isinstance(error, IsolationError):
            self._mixed = described(error)
        if examples == 1:
            self.examples += 1
            self._first = self._first or described(error)

    def tell(self, client: int, round_index: int) -> None:
        """Writes to the log of this process what there is to know."""
        where = f"Client {client}, round {round_index + 1}"
        if self.mixing:
            _LOG.error(
                "%s: THE MODEL MIXES EXAMPLES, so that each was trained on by itself: choose another model. %s",
                where,
                self._mixed,
            )
        if self.examples:
            _LOG.error(
                "%s: training failed %d times on an example, which contributed nothing; the first time: %s",
                where,
                self.examples,
                self._first,
            )

    @staticmethod
    def tell_whole(client: int, round_index: int, error: Exception) -> None:
        """The same of a turn that was given up as a whole."""
        _LOG.error(
            "Client %d, round %d: training failed, and its update is that of a client without data: %s",
            client,
            round_index + 1,
            described(error),
        )


def accumulate(
    optimizer: PrivateOptimizer,
    rows: Sequence[int],
    backward: Callable[[Sequence[int]], None],
    failures: Failures,
    size: int,
) -> None:
    """Adds the clipped gradients of these examples to the logical batch that ``optimizer.release()`` will noise.

    Args:
        optimizer: active on the model.
        rows: of the client's examples, at most ``size``.
        backward: runs model, loss and backward pass on ``size`` of them; whatever it raises stays here.
        failures: takes note of it.
        size: how many rows the model is given.
    """
    recorder = optimizer.recorder
    if len(rows) == 1 or not failures.mixing:
        try:
            backward([rows[place % len(rows)] for place in range(size)])
            finished = recorder.take()
            if finished.n != size:
                raise RuntimeError(f"The model was given {finished.n} examples where there were {size}.")
            clipped = optimizer.clip(finished, torch.arange(size) < len(rows))
            # Summed at once: where each example is rounded to the noise's grid by itself, its part would hang on
            # whether the batch has a second part.
            sums: dict[int, torch.Tensor | ExampleSum] = {key: total(part) for key, part in clipped.sums.items()}
        except Exception as error:
            recorder.discard()
            failures.add(error, len(rows))
        else:
            optimizer.take(clipped._replace(sums=sums), size, len(rows))
            return
    if len(rows) == 1:
        optimizer.take(Clipped({}, 0), 1, 1)
        return
    middle = len(rows) // 2
    accumulate(optimizer, rows[:middle], backward, failures, size)
    accumulate(optimizer, rows[middle:], backward, failures, size)
