"""Whether examples meet in a loss, seen at the model's outputs; and whether padding is looked at."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_dp.isolation.loss_checks.gradients import _weights, meeting, meets, reaches_padding
from lora_dp.isolation.loss_checks.graph import Outputs
from lora_dp.isolation.trial_values import tolerance
from tests.isolation.loss_checks.model_outputs import N, edge, model_output


def centred(out: Tensor) -> Tensor:
    return out - out.mean(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("i", [0, 2, N - 1])
@pytest.mark.parametrize(
    "join",
    [
        centred,
        lambda out: -centred(out),
        lambda out: out.cumsum(0).flip(0).cumsum(0),
        lambda out: torch.cat([centred(out[:, :1]), out[:, 1:]], 1),
        lambda out: out + out.roll(1, 0),
    ],
)
def test_examples_that_meet_are_seen(join, i, dtype):
    out = model_output(N, 3, dtype=dtype)
    assert meets(edge(join(out)), i, N, Outputs.of([out]))
    assert not meets(edge(out.square()), i, N, Outputs.of([out]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_share_below_what_arithmetic_changes_is_none(dtype):
    out = model_output(N, 3, dtype=torch.float64)
    for share, seen in ((0.3, False), (3.0, True)):
        cast = out.to(dtype)
        mixed = cast + share * tolerance(dtype) * cast.roll(1, 0)
        assert meets(edge(mixed), 2, N, Outputs.of([cast])) is seen


def test_the_tolerance_of_a_dtype():
    """A few roundings of a sum: far below what an example can do to another by chance."""
    for dtype, units in ((torch.float64, 1e8), (torch.float32, 1e4), (torch.bfloat16, 10), (torch.float16, 50)):
        assert torch.finfo(dtype).eps < tolerance(dtype) < units * torch.finfo(dtype).eps


def test_all_outputs_are_looked_at_and_the_graph_is_kept():
    """Of two outputs the loss may use one, or mix in the second alone; numbers and tables are no rows."""
    out, other, number, table = model_output(N, 3), model_output(N, 2), model_output(1).sum(), model_output(5, 3)
    outputs = Outputs.of([number, table, out, other])
    assert not meets(edge(out.square()), 1, N, outputs)
    mixed = out.square().sum(1) + centred(other).square().sum(1)
    for _ in range(2):
        assert meets(edge(mixed), 1, N, outputs)
    mixed.mean().backward()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_a_gradient_that_is_no_number_hides_nobody_and_fakes_nobody(value, place):
    """The example's own, or one that another example makes of a zero."""
    out = model_output(N, 3)
    broken = out * torch.where(torch.arange(N).unsqueeze(1) == place, value, 1.0)
    assert meets(edge(broken + out.roll(-1, 0)), 1, N, Outputs.of([out]))
    assert not meets(edge(broken.tanh()), 1, N, Outputs.of([out]))
    # Beside what is no number the smallest share is seen; beside a number one that rounding may have made is not.
    assert meets(edge(broken + 1e-8 * out.roll(-1, 0)), 1, N, Outputs.of([out])) is (place == 1)


def test_a_share_is_held_against_the_largest_of_the_example():
    out = model_output(N, 2)
    for share, seen in ((1e-3, False), (1e5, True)):
        assert meets(edge(1e6 * out[:, 0] + share * out[:, 1].roll(1, 0)), 2, N, Outputs.of([out])) is seen


def test_what_has_no_rows_by_example_has_none_that_meet():
    out = model_output(7)
    outputs = Outputs.of([out, model_output(0, 3), model_output(N, 0)])
    assert not meets(edge(out.square()), 0, N, outputs) and not meets(edge(out.mean()), 0, N, outputs)
    assert not meets(edge(model_output(N, 3) * 2), 0, N, outputs)
    rows = model_output(N, 3)
    assert not meets(edge(rows.flatten()[:7] * 2), 0, N, Outputs.of([rows]))


def test_examples_that_meet_in_flattened_outputs_are_seen():
    out = model_output(N * 4, 3)
    outputs = Outputs.of([out])
    assert meets(edge(out @ out.t()), 1, N, outputs) and not meets(edge(out.square()), 1, N, outputs)
    own = out.view(N, 4, 3)
    assert not meets(edge((own - own.mean(1, keepdim=True)).flatten(0, 1)), 1, N, outputs)


# Under weights of all examples at once


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pair", [(1, 2), (0, 5), (4, 3)])
def test_two_that_meet_are_found_wherever_they_are(pair, dtype):
    """By chance both have one weight in one of 64 draws, of float16 in one of 16."""
    out = model_output(N, 3, dtype=dtype)
    taken = torch.zeros(N, N, dtype=dtype)
    taken[pair] = 1
    mixed = out + taken @ out
    found = [meeting(edge(mixed), N, Outputs.of([out])) for _ in range(12)]
    assert pair[0] in found and set(found) <= {None, pair[0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "loss",
    [
        lambda out: F.cross_entropy(out, torch.arange(N) % 3, reduction="none"),
        lambda out: F.cross_entropy(40 * out, torch.arange(N) % 3, reduction="none"),  # sure of itself: tiny gradients
        lambda out: F.cross_entropy(1e-4 * out, torch.arange(N) % 3, reduction="none"),
        lambda out: out.square().sum(1).sqrt(),
        lambda out: (out.double() * 1e-3).tanh().sum(1),
        lambda out: out.masked_fill(torch.eye(N, 3).bool(), -torch.inf).logsumexp(1),
    ],
)
def test_nobody_is_found_where_all_keep_to_themselves(loss, dtype):
    out, backwards = model_output(N, 3, dtype=dtype), []
    between = out * 1.0
    between.register_hook(backwards.append)
    for _ in range(12):
        assert meeting(edge(loss(between)), N, Outputs.of([out])) is None
    assert len(backwards) == 24  # two each: nobody had to be looked at alone


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 10), (torch.bfloat16, 10), (torch.float16, 18)])
@pytest.mark.parametrize("scale", [1.0, -1.0, 1e-3])
def test_two_that_meet_are_missed_only_where_they_have_one_weight(dtype, most, scale):
    """Binomial: of 60 draws a share of 1/64 or, of float16, 1/16; above ``most`` by a probability of 1e-7."""
    out = model_output(N, 3, dtype=dtype)
    taken = torch.zeros(N, N, dtype=dtype)
    taken[1, 4] = 1
    mixed = scale * (out + taken @ out)
    assert sum(meeting(edge(mixed), N, Outputs.of([out])) is None for _ in range(60)) <= most


def test_what_becomes_infinite_under_weights_is_looked_at_alone():
    out = model_output(N, 3, dtype=torch.float16)
    mixed = out + 3e4 * out.roll(1, 0)
    assert all(meeting(edge(mixed), N, Outputs.of([out])) is not None for _ in range(12))


@pytest.mark.parametrize(("dtype", "exponents"), [(torch.float32, 32), (torch.float16, 8)])
def test_weights_are_signed_powers_of_two_each_as_likely(dtype, exponents):
    drawn = _weights(64_000, dtype)
    expected = {sign * 2.0**power for sign in (1, -1) for power in range(-exponents // 2, exponents // 2)}
    values, counts = drawn.unique(return_counts=True)
    assert set(values.tolist()) == expected
    mean = 64_000 / len(expected)
    assert float((counts - mean).abs().max()) < 6 * mean**0.5


def test_flattened_outputs_and_several_are_looked_at():
    out, other = model_output(4 * N, 3), model_output(N, 2)
    outputs = Outputs.of([out, other, model_output(())])
    own = out.view(N, 12).square().sum(1) + other.sum(1)
    assert meeting(edge(own), N, outputs) is None
    found = {meeting(edge(own + other.roll(1, 0).sum(1)), N, outputs) for _ in range(3)}
    assert found != {None}
    # No rows by example, nobody to find.
    assert meeting(edge(out.sum()), N, outputs) is None and meeting(edge(own[:5]), N, outputs) is None


def test_what_is_infinite_or_nan_hides_nobody():
    out = model_output(N, 3)
    factors = torch.ones(N, 1)
    factors[0], factors[1] = math.inf, math.nan
    backwards: list[Tensor] = []
    between = out * 1.0
    between.register_hook(backwards.append)
    assert meeting(edge((between * factors).sum(1)), N, Outputs.of([out])) is None
    assert len(backwards) == 2
    assert {meeting(edge((out * factors + out.roll(3, 0)).sum(1)), N, Outputs.of([out])) for _ in range(3)} != {None}


# Padding


USED = torch.arange(5) < torch.tensor([[5], [2], [3], [1], [4], [5]])


@pytest.mark.parametrize(
    ("loss", "seen"),
    [
        (lambda out: (out * USED).square().sum(1), False),
        (lambda out: out.square().sum(1), True),
        (lambda out: out.masked_fill(~USED, -1e9).log_softmax(1)[:, 0], False),
        (lambda out: out.log_softmax(1)[:, 0], True),
        (lambda out: (out * USED).sum(1) + 1e-6 * out.sum(1), False),
        (lambda out: 1e4 * ((out * USED).sum(1) + 1e-6 * out.sum(1)), False),
        (lambda out: out[:, 0] * math.inf + 1e-8 * out[:, 1:].sum(1), True),
        (lambda out: out[:, 0] * -math.inf + 1e-8 * out[:, 1:].sum(1), True),
        (lambda out: out[:, 0] * math.nan, False),
    ],
)
def test_losses_that_depend_on_padding_are_told(loss, seen):
    out = model_output(N, 5)
    for _ in range(2):  # the graph is kept
        assert reaches_padding(edge(loss(out)), USED, Outputs.of([out])) is seen
    wide = model_output(N, 5, 2)
    assert reaches_padding(edge(loss(wide.sum(2))), USED, Outputs.of([wide])) is seen
    assert reaches_padding(edge(loss(wide[..., 0])), USED, Outputs.of([out, wide])) is seen  # one is not used
    assert not reaches_padding(edge(loss(wide[..., 0])), USED[:, :4], Outputs.of([wide]))
    pooled = model_output(N)
    assert not reaches_padding(edge(pooled * 2), USED, Outputs.of([pooled]))
