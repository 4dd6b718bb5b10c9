"""The tensors and keys that the native library takes, and that nothing beside them is read or written."""

import copy
import math

import pytest
import torch
from torch import Tensor

from lora_dp import _native
from lora_dp.ops.private_update import ExampleSum
from lora_dp.ops.rounded_gaussian import rounded_gaussian_
from tests.ops.plain_chacha20 import refuses
from tests.ops.update_problem import KEY, Problem, plain_sgd, same_bits


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_a_key_of_another_length_is_refused(length: int) -> None:
    refuses(f"key must be 32 bytes long, got {length}", lambda: _native.key_from(bytes(length)))


@pytest.mark.parametrize("examples", [0, 3])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_nothing_beyond_a_tensor_is_read_or_written(threads, examples):
    """All that goes in lies between NaN: the numbers are those of tensors by themselves, and what is around stays."""
    problem = Problem("adamw", torch.float32, strength=2.0, examples=examples)
    wanted = copy.deepcopy(problem).take()
    buffers = []

    def within(tensor: Tensor) -> Tensor:
        buffer = torch.full((tensor.numel() + 16,), math.nan, dtype=tensor.dtype)
        buffers.append(buffer)
        buffer[8 : 8 + tensor.numel()] = tensor.flatten()
        return buffer[8 : 8 + tensor.numel()].view(tensor.shape)

    for name in ("parameters", "first", "second", "gradients"):
        setattr(problem, name, [within(tensor) for tensor in getattr(problem, name)])
    problem.sums = [
        ExampleSum(within(part.gradients), within(part.coefficients)) if examples else within(part)
        for part in problem.sums
    ]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert same_bits(problem.take(), wanted)
    finally:
        torch.set_num_threads(before)
    assert all(buffer[:8].isnan().all() and buffer[-8:].isnan().all() for buffer in buffers)


def test_tensors_beyond_their_storage_and_odd_addresses_are_refused():
    short = torch.zeros(1000)
    short.untyped_storage().resize_(64)
    odd = torch.frombuffer(bytearray(401), dtype=torch.float32, offset=1)
    for bad in (short, odd):
        with pytest.raises(ValueError, match="beyond its storage, or its address is odd"):
            plain_sgd(bad, torch.zeros(len(bad)))
    numbers = torch.zeros(1000, dtype=torch.int64)
    numbers.untyped_storage().resize_(64)
    with pytest.raises(ValueError, match="beyond its storage"):
        rounded_gaussian_(numbers, KEY, 0, 0, 2.0**32)
