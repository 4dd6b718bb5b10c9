"""A digest of tensors tells apart what differs in a name, a dtype, a shape, a value or their order."""

import torch

from lora_dp.fed.data.content_digest import content_digest


def test_what_differs_has_another_digest() -> None:
    zeros = torch.zeros(2, 3)
    one = zeros.clone()
    one[1, 2] = 1
    different = [
        {"a": zeros},
        {"b": zeros},
        {"a": one},
        {"a": zeros.double()},
        {"a": zeros.t()},
        {"a": zeros.int()},
        {"a": zeros, "b": one},
        {"b": one, "a": zeros},
        {},
    ]
    assert len({content_digest(tensors) for tensors in different}) == len(different)
    assert content_digest({"a": one.t().contiguous().t()}) == content_digest({"a": one})
