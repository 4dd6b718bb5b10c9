"""The batches of a private loader for a loop that counts steps: a draw that nobody was in is one of them."""

from collections.abc import Callable, Iterator
from typing import Any

from lora_dp.engine.data_loader import PrivateDataLoader
from lora_dp.engine.optimizer import PrivateOptimizer
from lora_dp.privacy.accounting import PrivacyBudgetExceeded

EMPTY: dict[str, Any] = {}
"""Stands for a draw in which nobody was: the loader has taken its step."""


class EveryDraw:
    """Yields one item for each draw, :data:`EMPTY` for one of nobody, and ends early when the budget is spent.

    Args:
        loader: a private loader.
        optimizer: the private optimizer that steps its batches.
        on_spent: called when the next step would overrun the target ε.
        steps: how many draws an iteration has; None for as many as a pass over the data.

    >>> import torch
    >>> from torch.utils.data import DataLoader
    >>> from lora_dp import DPLinear, PrivacyEngine
    >>> model = DPLinear(4, 2)
    >>> model, optimizer, loader = PrivacyEngine().make_private(
    ...     model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    ...     data_loader=DataLoader(torch.randn(8, 4), batch_size=1), noise_multiplier=1.0, max_grad_norm=1.0)
    >>> draws = EveryDraw(loader, optimizer, on_spent=lambda: None)
    >>> steps = 0
    >>> for batch in draws:
    ...     if batch is not EMPTY:
    ...         optimizer.backward(model(batch).square().sum(1))
    ...         optimizer.step()
    ...     steps += 1
    >>> steps, optimizer.steps_taken
    (8, 8)
    """

    def __init__(
        self,
        loader: PrivateDataLoader,
        optimizer: PrivateOptimizer,
        on_spent: Callable[[], None],
        *,
        steps: int | None = None,
    ):
        self.loader, self.optimizer, self._on_spent = loader, optimizer, on_spent
        self.dataset, self.batch_size = loader.dataset, loader.expected_batch_size
        self._steps = len(loader) if steps is None else steps

    def __len__(self) -> int:
        return self._steps

    def after(self, steps: int) -> "EveryDraw":
        """The same, fewer by so many steps, which were taken before.

        >>> len(draws.after(6))
        2
        """
        return EveryDraw(self.loader, self.optimizer, self._on_spent, steps=len(self) - steps)

    def __iter__(self) -> Iterator[Any]:
        batches = self.loader.take(len(self), empty=EMPTY)
        try:
            for _ in range(len(self)):
                self.optimizer.check_budget()  # before a batch is drawn, whatever it holds
                yield next(batches)
            next(batches, None)  # looks whether the last was stepped
        except PrivacyBudgetExceeded:
            self._on_spent()
