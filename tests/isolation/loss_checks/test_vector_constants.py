"""Constants of a vector of losses: by which numbers all of them are multiplied."""

import pytest
import torch

from lora_dp.isolation.loss_checks.graph import Outputs, follow, is_constant
from lora_dp.isolation.trial_values import tolerance
from tests.isolation.loss_checks.model_outputs import N, edge, model_output


@pytest.mark.parametrize(
    ("join", "factor"),
    [
        (lambda out: out, 1),
        (lambda out: out / 8, 1 / 8),
        (lambda out: 3 * out.square() / 8, 3 / 8),
        (lambda out: (out * 2).exp(), 2),
        (lambda out: out * torch.arange(1.0, N + 1), 1),
        (lambda out: out + 1, 1),
        (lambda out: (out - out.mean()) / 4, 1 / 4),
        (lambda out: torch.tensor(3.0) * out * torch.tensor(5.0), 15),
    ],
)
def test_numbers_by_which_all_losses_are_multiplied(join, factor):
    out = model_output(N)
    joined = join(out)
    found = follow([(joined.grad_fn, joined.output_nr)], Outputs.of([out]))
    assert any(value == pytest.approx(factor, rel=1e-6) for value in (*found.linear, *found.factors))


def test_numbers_before_an_output_and_beside_it_do_not_count():
    hidden, learned = model_output(N), torch.ones(N, requires_grad=True)
    logits = hidden * 3
    outputs = Outputs.of([hidden, logits])
    for joined, factor in ((logits.square(), 1.0), (logits / 8 + learned.exp(), 1 / 8)):
        assert follow([(joined.grad_fn, joined.output_nr)], outputs).factors == (factor,)


@pytest.mark.parametrize(
    ("join", "factors"),
    [
        (lambda out, beside: out / 8 + beside.exp(), [1 / 8]),
        (lambda out, beside: beside.exp() - out / 8, [1 / 8]),
        (lambda out, beside: (out / 19).unsqueeze(1).expand(N, 2).mean(1) / 8, [1 / 8]),
        (lambda out, beside: torch.stack([out[0] / 19, out[1] / 19]) / 8, [1 / 8]),
        (lambda out, beside: (out / 19) * out / 8, [1 / 8]),
    ],
)
@pytest.mark.parametrize("added", [False, True])
def test_numbers_are_followed_down_to_where_losses_are_joined_or_come_from(join, factors, added):
    """Beside them, another way leads to no output."""
    out, beside = model_output(N), torch.ones(N, requires_grad=True)
    if added:
        out = out + 1
    joined = join(out, beside)
    assert follow([(joined.grad_fn, 0)], Outputs.of([out])).linear == pytest.approx(factors, rel=1e-9)


def test_signs_are_no_counts_and_an_output_has_none():
    out = model_output(N)
    outputs = Outputs.of([out])
    assert follow([(edge(out).node, edge(out).output_nr)], outputs).factors == (1.0,)
    for joined in (-out, 1 - out, torch.ones(N) - out, (-out).exp()):
        assert follow([(joined.grad_fn, 0)], outputs).factors == (1.0,)
        assert follow([((joined / 8).grad_fn, 0)], outputs).factors == (1 / 8,)


@pytest.mark.parametrize(("n", "tokens"), [(N, 3), (N, 1), (1, 3), (1, 1)])
def test_a_mean_over_an_examples_tokens_divides_by_their_number(n, tokens):
    out = model_output(n, tokens)
    joined = out.square().mean(1)
    assert follow([(joined.grad_fn, 0)], Outputs.of([out])).factors == pytest.approx((1 / tokens,), rel=1e-5)


@pytest.mark.parametrize(("ways", "followed"), [(64, True), (65, False)])
def test_as_many_as_64_ways_are_followed_through_a_product(ways, followed):
    out = model_output(N)
    shares = [1 + i / 100 for i in range(ways)]
    joined = sum(out.exp() * share for share in shares) / 8
    assert follow([(joined.grad_fn, 0)], Outputs.of([out])).factors == pytest.approx(
        [share / 8 if followed else share for share in shares], rel=1e-5
    )


def test_numbers_below_a_sum_of_vectors_are_found_on_every_way():
    out = model_output(N)
    joined = (out.square() / 7 + out.exp() * 0.3).sum()
    edge = joined.grad_fn.next_functions[0]
    assert follow([edge], Outputs.of([out])).linear == pytest.approx((0.3, 1 / 7))
    inside = (out.tanh() * (out.square() / 19)).mean()
    assert any(
        value == pytest.approx(1 / 19, rel=1e-5) for value in follow([(inside.grad_fn, 0)], Outputs.of([out])).factors
    )


@pytest.mark.parametrize("turned", [False, True])
def test_numbers_are_found_where_ways_part_and_meet_again(turned):
    out = model_output(N)
    square = out.square()
    part = square / 19
    joined = (part + square if turned else square + part).tanh().mean()
    assert follow([(joined.grad_fn, 0)], Outputs.of([out])).factors == pytest.approx((1 / 19, 1.0), rel=1e-5)


def test_leaves_beside_the_outputs_are_told():
    out, beside = model_output(N), torch.ones(N, requires_grad=True)
    joined = (out * beside).sum()
    found = follow([(joined.grad_fn, 0)], Outputs.of([out]))
    assert [leaf is beside for leaf in found.leaves.values()] == [True] and id(beside) in found.leaves
    assert found.shape == follow([((out * beside).sum().grad_fn, 0)], Outputs.of([out])).shape
    assert found.shape != follow([((out + beside).sum().grad_fn, 0)], Outputs.of([out])).shape


@pytest.mark.parametrize(
    ("value", "constant"),
    [
        (1.0, True),
        (0.5, True),
        (-0.3, True),
        (1e-3, True),
        (1 / 3, True),
        (1 / 64, True),
        (100.0, True),
        (1 / 63, True),
        (2.0**-20, True),
        (-(2.0**-20), True),
        (1 / 76, False),
        (-1 / 76, False),
        (8 / 19, False),
        (0.12345, False),
        (1 / 65, False),
        (1 / 65.5, False),
    ],
)
def test_what_looks_like_a_constant(value, constant):
    assert is_constant(value) == constant


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("dtype", "apart", "alike"),
    [(torch.float64, 1e-6, 1e-12), (torch.float32, 1e-2, 1e-6), (torch.bfloat16, 5e-2, 1e-2)],
)
def test_values_are_compared_as_precisely_as_they_were_computed(dtype, apart, alike, autocast):
    """Those of float32 are made of half ones under autocast."""
    with torch.autocast("cpu", enabled=autocast):
        assert tolerance(dtype) > alike
        assert (tolerance(dtype) < apart) != (autocast and dtype == torch.float32)
