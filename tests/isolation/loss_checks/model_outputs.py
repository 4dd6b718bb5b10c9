"""Outputs of a model, and the edges of a graph."""

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

N = 6


def model_output(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() * 1.0


def edge(tensor: Tensor) -> GradientEdge:
    assert tensor.grad_fn is not None
    return GradientEdge(tensor.grad_fn, tensor.output_nr)
