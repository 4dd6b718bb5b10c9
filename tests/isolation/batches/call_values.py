"""Numbers for the arguments of a call."""

import torch
from torch import Tensor

N = 4


def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)
