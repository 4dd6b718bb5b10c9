"""SHA-256 of tensors: what tells whether two of them are the same without keeping either."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from lora_dp.hash_chain import canonical


def add_values(digest: Any, name: str, values: np.ndarray) -> None:
    """Takes an array with its name, dtype and shape into a digest of hashlib's."""
    digest.update(canonical([name, str(values.dtype), list(values.shape)]).encode())
    digest.update(np.ascontiguousarray(values).data)


def content_digest(tensors: Mapping[str, Tensor]) -> str:
    """Of tensors and their names, in their order: 64 hexadecimal digits.

    Args:
        tensors: of dtypes that numpy has.

    >>> import torch
    >>> content_digest({"a": torch.zeros(2)}) == content_digest({"a": torch.zeros(1, 2)})
    False
    """
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        add_values(digest, name, tensor.detach().cpu().numpy())
    return digest.hexdigest()
