"""What two passes gave one example is compared."""

import math

import pytest
import torch
from torch import Tensor

from lora_dp.isolation.trial_values import _lengths, differ, is_another


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([1.0, -1e9], [1.0 + 1e-5, -1e9], False),
        ([1.0, -1e9], [1.001, -1e9], True),
        ([1.0, -1e4], [1.0, -1e4 - 2], True),
        ([1.0, -1e4], [1.0, -1e4 - 0.1], False),
        ([5e5, 2e3], [5e5, 2e3 + 1], True),
        ([100.0, 1e-3], [100.0, 2e-3], False),
        ([-math.inf, 1.0], [-math.inf, 1.0], False),
        ([5.0, -1e4], [5.1, -1e4], True),
        ([5.0, -1e9], [5.001, -1e9], True),
    ],
)
def test_large_scores_are_compared_with_themselves(left, right, expected):
    assert differ(torch.tensor(left), torch.tensor(right), masked=True) is expected


def test_scores_of_a_model_whose_weights_have_grown_round_each_other():
    scores = [-0.3364410400390625, -7408.07861328125, -4704.8388671875, 1601.9840087890625]
    assert not differ(torch.tensor(scores), torch.tensor([-0.3361968994140625, *scores[1:]]), masked=True)
    assert differ(torch.tensor(scores), torch.tensor([-0.33, *scores[1:]]), masked=True)


@pytest.mark.parametrize(("share", "expected"), [(1e-6, False), (1e-2, True)])
def test_gradients_are_compared_with_the_largest_of_them(share, expected):
    left = torch.tensor([-1e6, 1.0])
    assert differ(left, left + torch.tensor([0.0, share * 1e6])) is expected


def test_another_shape_or_another_infinity_is_a_difference():
    assert differ(torch.zeros(2), torch.zeros(3)) and differ(torch.zeros(2), torch.zeros(2, 1))
    assert differ(torch.tensor([math.inf, 1.0]), torch.tensor([1.0, 1.0]))


def rows(*changes: tuple[int, float], n: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    """Gradients of n examples, each of length 10 in a hundred numbers; with numbers added to one of an example's."""
    made = torch.ones(n, 100)
    for i, value in changes:
        made[i, 0] += value
    return {"layer": [made.to(dtype)]}


def test_numbers_that_are_not_finite_add_nothing_to_a_length():
    rows = torch.tensor([[3.0, math.inf, 4.0], [3.0, -math.inf, 4.0], [3.0, math.nan, 4.0]])
    assert _lengths(rows).tolist() == [5, 5, 5]


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 0.625), (torch.float64, 0.625), (torch.bfloat16, 2.5)])
def test_a_gradient_is_another_by_the_length_of_the_difference(dtype, least):
    plain = rows(dtype=dtype)
    for added, found in ((least * 0.98, None), (least * 1.02, 2), (math.nan, 2), (math.inf, 2)):
        assert is_another(plain, rows((2, added), dtype=dtype), [0, 1, 2, 3], 4) == found
        assert is_another(rows((2, -added), dtype=dtype), plain, [0, 1, 2, 3], 4) == found


def test_what_is_not_finite_in_both_hides_nothing_beside_it():
    broken = rows((1, math.nan), (2, math.inf))
    assert is_another(broken, broken, [0, 1, 2, 3], 4) is None
    assert is_another(broken, rows((1, math.nan), (2, math.inf), (3, 5.0)), [0, 1, 2, 3], 4) == 3


def test_gradients_of_some_are_compared_with_their_own_among_all():
    whole = {"layer": [torch.arange(1.0, 7).unsqueeze(1).expand(6, 5)]}
    part = {"layer": [torch.tensor([2.0, 5.0]).unsqueeze(1).expand(2, 5)]}
    assert is_another(whole, part, [1, 4], 6) is None
    assert is_another(whole, part, [1, 3], 6) == 3
    assert is_another(whole, {"layer": [part["layer"][0] * 3]}, [1, 4], 6, (6, 2)) is None
    assert is_another(whole, {"layer": [part["layer"][0] * 3]}, [1, 4], 6) == 1


def test_rounding_is_no_change_where_an_example_has_next_to_no_gradient():
    one, other = rows(), rows()
    for found, size in ((one, 1e-5), (other, 2e-5)):
        found["layer"][0][1] *= size
    assert is_another(one, other, [0, 1, 2, 3], 4) is None
    for found, size in ((one, 100.0), (other, 100.0)):
        found["layer"][0][1] *= size
    assert is_another(one, other, [0, 1, 2, 3], 4) == 1


def test_gradients_of_other_shapes_are_another():
    assert is_another({"layer": [torch.ones(4, 3)]}, {"layer": [torch.ones(2, 4)]}, [1, 3], 4) == 1
    assert is_another({}, {}, [1, 3], 4) is None


def test_a_layer_with_next_to_no_gradient_beside_another_has_rounding_alone():
    small, other = ({"layer": [torch.ones(4, 3)], "last": [torch.full((4, 3), size)]} for size in (1e-5, 2e-5))
    assert is_another(small, other, [0, 1, 2, 3], 4) is None


def test_no_gradient_at_all_is_the_same():
    assert is_another({"layer": [torch.zeros(4, 3)]}, {"layer": [torch.zeros(4, 3)]}, [0, 1, 2, 3], 4) is None


def test_lengths_beyond_half_precision_are_compared():
    """Lengths of 300,000, where float16 ends at 65,504."""
    whole = torch.full((4, 100), 3e4, dtype=torch.float16)
    part = whole.clone()
    assert is_another({"layer": [whole]}, {"layer": [part]}, [0, 1, 2, 3], 4, (4, 4)) is None
    part[2] = 0
    assert is_another({"layer": [whole]}, {"layer": [part]}, [0, 1, 2, 3], 4, (4, 4)) == 2
