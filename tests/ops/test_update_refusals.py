"""What the private update refuses: by name, and with nothing changed."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lora_dp.ops.private_update import can_update
from tests.models import assert_refuses
from tests.ops.update_problem import KEY, SHAPES, Problem, same_bits


def test_sums_that_are_not_finite_are_refused_and_change_nothing():
    for bad in (math.nan, math.inf, -math.inf):
        problem = Problem("adamw", torch.float32)
        problem.sums[7][4000] = bad
        before = copy.deepcopy(problem.tensors)
        assert_refuses(ValueError, "the sum of parameter 7 holds NaN or infinity: nothing was changed", problem.take)
        assert same_bits(problem.tensors, before)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("sum_dtype", [torch.float32, torch.float64])
def test_the_first_sum_that_is_not_finite_is_named_wherever_it_is(sum_dtype, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for first, last in ((7, 4096), (8, 11_199), (3, 0), (1, 0)):
            problem = Problem("adamw", torch.float32, sum_dtype=sum_dtype)
            problem.sums[first].view(-1)[last] = math.inf
            problem.sums[9][-1, -1] = problem.sums[10][-1] = math.nan
            assert_refuses(ValueError, f"the sum of parameter {first} holds NaN or infinity", problem.take)
    finally:
        torch.set_num_threads(before)


def refusals() -> Iterator[Any]:
    yield "optimizer must be one of", {"optimizer": "rprop"}
    yield "scale must lie in", {"scale": 0.5}
    yield "scale must lie in", {"scale": math.nan}
    yield "scale must lie in", {"scale": 2.0**33}
    yield "step be a power of two", {"step": 0.3}
    yield "step be a power of two", {"step": -1.0}
    yield "expected_batch_size must be finite", {"expected_batch_size": 0.0}
    yield "expected_batch_size must be finite", {"expected_batch_size": math.inf}
    yield "filter_strength must be 0 or", {"filter_strength": math.nan}
    yield "filtered must have an entry for each", {"filtered": [False]}
    yield "there is no key 123456789", {"key": 123456789}
    yield "draw must not be negative", {"draw": -1}
    yield "filtered[0] must be False: a filter takes", {"filtered": [True] * len(SHAPES), "filter_strength": 1.0}


@pytest.mark.parametrize(("words", "change"), list(refusals()))
def test_what_is_out_of_range_is_refused(words, change):
    problem = Problem("adamw", torch.float32)
    before = copy.deepcopy(problem.tensors)
    problem.kind = change.get("optimizer", problem.kind)
    others = {name: value for name, value in change.items() if name != "optimizer"}
    assert_refuses(ValueError, words, lambda: problem.take(**others))
    assert same_bits(problem.tensors, before)


@pytest.mark.parametrize("name", ["parameters", "sums", "first", "second", "gradients"])
def test_tensors_that_do_not_fit_are_refused_by_name(name):
    where, p = f"{name}[8]", 8
    for bad, kind, words in [
        (torch.zeros(16, 699), ValueError, f"{where} must have the shape (16, 700), got (16, 699)"),
        (torch.zeros(700, 16).T, ValueError, f"{where} must be contiguous and on cpu"),
        (torch.zeros(16, 700, device="meta"), ValueError, f"{where} must be contiguous and on cpu, got strides"),
        (torch.zeros(16, 700, dtype=torch.int32), TypeError, f"{where} must be float32"),
        ([1.0], TypeError, f"{where} must be a tensor, got list"),
    ]:
        problem = Problem("adamw", torch.float32)
        if name == "parameters" and kind is ValueError and "shape" in words:
            continue  # the others are then what does not fit
        values = getattr(problem, name)
        before = copy.deepcopy([t for t in problem.tensors])
        kept, values[p] = values[p], bad
        assert_refuses(kind, words, problem.take)
        values[p] = kept
        assert same_bits(problem.tensors, before)


def test_a_filter_that_reaches_too_far_is_left_to_torch():
    wide = torch.zeros(4, 2**20)
    assert can_update(wide, 1000.0) and can_update(wide.T.contiguous(), 1000.0)
    far = torch.zeros(2**13, 2**12 + 2**11)
    assert not can_update(far, 2000.0)


def test_the_op_itself_refuses_what_does_not_fit():
    """Without the wrapper: it must raise, not read past the end of a tensor."""
    row = torch.zeros(1, 8, dtype=torch.float64)
    for sums in ([torch.zeros(1)], [torch.zeros(3, dtype=torch.int32)], []):
        with pytest.raises((ValueError, TypeError), match="private_update_: sums"):
            torch.ops.lora_dp.private_update_(
                [torch.zeros(3)], sums, [None], [], [], [], row, [False], 0.0, "sgd", KEY, 0, 0.0, 1.0, 1.0
            )
