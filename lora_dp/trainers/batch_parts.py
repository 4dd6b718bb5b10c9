"""A batch in parts that fit the memory."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lora_dp.engine.validation import batch_size


def parts_of(inputs: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """A batch of N examples in parts of at most ``size``, at least one part.

    Args:
        inputs: what is collated, by name: tensors (N, …), and lists of N. Other values go with every part.
        size: examples in a part.

    Raises:
        ValueError: a tensor of another first dimension, in a batch that has to be split.

    >>> import torch
    >>> [part["input_ids"].shape for part in parts_of({"input_ids": torch.zeros(5, 7)}, 2)]
    [torch.Size([2, 7]), torch.Size([2, 7]), torch.Size([1, 7])]
    """
    n = batch_size((), dict(inputs))
    for start in range(0, max(n, 1), size):
        yield {name: _rows(name, value, n, start, size) for name, value in inputs.items()}


def _rows(name: str, value: Any, n: int, start: int, size: int) -> Any:
    if isinstance(value, Tensor) and value.dim() and value.shape[0] != n and n > size:
        raise ValueError(
            f"'{name}' has the shape {tuple(value.shape)} in a batch of {n} examples and cannot be split: collate it "
            "with the examples in its first dimension."
        )
    split = value.shape[:1] == (n,) if isinstance(value, Tensor) else isinstance(value, list) and len(value) == n
    return value[start : start + size] if split else value
