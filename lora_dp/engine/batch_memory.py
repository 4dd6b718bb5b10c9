"""Logical batches in parts that fit the memory, for loops that know nothing of them."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from lora_dp.argument_checks import check_count, check_kind
from lora_dp.engine.data_loader import PrivateDataLoader
from lora_dp.engine.optimizer import PrivateOptimizer


class BatchMemoryManager:
    """Inside, the loader yields parts of its batches, and the optimizer updates after the last part of each.

    As Opacus' class of this name. The loop stays as it is: forward, backward, ``step``, ``zero_grad`` for each part.

    Args:
        data_loader: the private loader.
        max_physical_batch_size: the most examples in a part.
        optimizer: the private optimizer.

    Raises:
        TypeError: another kind of loader or optimizer.
        ValueError: a size below 1.

    >>> import torch
    >>> from torch.utils.data import DataLoader
    >>> from lora_dp import DPLinear, PrivacyEngine
    >>> model = DPLinear(4, 2)
    >>> model, optimizer, loader = PrivacyEngine().make_private(
    ...     model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    ...     data_loader=DataLoader(torch.randn(200, 4), batch_size=100), noise_multiplier=1.0, max_grad_norm=1.0)
    >>> with BatchMemoryManager(data_loader=loader, max_physical_batch_size=16, optimizer=optimizer) as parts:
    ...     for x in parts:
    ...         optimizer.backward(model(x).square().sum(1))
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    >>> optimizer.steps_taken, len(x) <= 16
    (2, True)
    """

    def __init__(self, *, data_loader: PrivateDataLoader, max_physical_batch_size: int, optimizer: PrivateOptimizer):
        check_kind("data_loader", data_loader, PrivateDataLoader, "give the one that make_private returned")
        check_kind("optimizer", optimizer, PrivateOptimizer, "give the one that make_private returned")
        check_count("max_physical_batch_size", max_physical_batch_size, least=1)
        self._loader, self._size, self._optimizer = data_loader, max_physical_batch_size, optimizer

    def __enter__(self) -> "BatchMemoryManager":
        return self

    def __exit__(self, *raised: object) -> None:
        """Nothing is to be put back."""

    def __len__(self) -> int:
        """Logical batches in a pass."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            parts = list(parts_of(batch, self._size))
            for number, part in enumerate(parts):
                self._optimizer.signal_skip_step(number < len(parts) - 1)
                yield part


def parts_of(batch: Any, size: int) -> Iterator[Any]:
    """A batch of N examples in parts of at most ``size``, at least one part.

    Args:
        batch: a tensor (N, …), or a dict, tuple or list that holds such, and lists of N. Other values go with every
            part.
        size: examples in a part.

    Raises:
        ValueError: no tensor; or one of another first dimension, in a batch that has to be split.

    >>> import torch
    >>> [part["input_ids"].shape for part in parts_of({"input_ids": torch.zeros(5, 7)}, 2)]
    [torch.Size([2, 7]), torch.Size([2, 7]), torch.Size([1, 7])]
    """
    n = _examples(batch)
    if n is None:
        raise ValueError(f"A batch of {type(batch).__name__} holds no tensor, by which it would be split.")
    for start in range(0, max(n, 1), size):
        yield batch if n <= size else _part(batch, n, start, size, "The batch")


def _examples(batch: Any) -> int | None:
    """N: the first dimension of the first tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else None
    inner = batch.values() if hasattr(batch, "values") else batch if isinstance(batch, list | tuple) else ()
    return next((n for value in inner if (n := _examples(value)) is not None), None)


def _part(value: Any, n: int, start: int, size: int, name: str) -> Any:
    if hasattr(value, "shape"):  # an array too
        shape = tuple(value.shape)
        if shape and shape[0] != n:
            raise ValueError(
                f"{name} has the shape {shape} in a batch of {n} examples and cannot be split: collate it "
                "with the examples in its first dimension."
            )
        return value[start : start + size] if shape else value
    if hasattr(value, "items"):
        return {key: _part(inner, n, start, size, f"'{key}'") for key, inner in value.items()}
    if isinstance(value, list | tuple) and any(isinstance(inner, Tensor) for inner in value):
        parts = [_part(inner, n, start, size, name) for inner in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value[start : start + size] if isinstance(value, list | tuple) and len(value) == n else value
