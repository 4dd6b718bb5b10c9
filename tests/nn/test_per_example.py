"""Slots and passes: norms of what is really summed, by either method, in any dtype."""

import itertools
import math

import pytest
import torch

from lora_dp.nn.per_example import Slot, prefers_ghost
from lora_dp.ops.clipped_sum import clipped_sum_kept
from lora_dp.ops.per_example_grad import per_example_grad
from tests.models import assert_refuses
from tests.nn.slots import check, give, outer, slot_of, weighted_sum
from tests.support import assert_close


@pytest.mark.parametrize("method", ["auto", "direct", "ghost"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_one_use(tokens, dtype, method):
    torch.manual_seed(0)
    left, right = torch.randn(4, tokens, 3, dtype=dtype), torch.randn(4, tokens, 6, dtype=dtype)
    slot = slot_of((3, 6), 4, method, dtype)
    give(slot, left, right, 1.5)
    assert slot.norms().dtype == torch.float64
    check(slot, outer(left, right, 1.5))


@pytest.mark.parametrize("method", ["direct", "ghost"])
@pytest.mark.parametrize("anew", ["left", "right", "both"])
def test_each_backward_through_one_use_brings_both_factors(anew, method):
    """The layer's input is the right one, or the left one where the weight is stored as (in, out)."""
    torch.manual_seed(0)
    slot, total = slot_of((3, 6), 4, method), torch.zeros(4, 3, 6, dtype=torch.float64)
    left, right = torch.randn(4, 5, 3), torch.randn(4, 5, 6)
    ghost, first, second = slot.receive(left, 3, 6, 1.5)
    for _ in range(3):
        torch.autograd.backward([first, second], list((left, right) if ghost else per_example_grad(left, right, 1.5)))
        total += outer(left, right, 1.5)
        left = left if anew == "right" else torch.randn_like(left)
        right = right if anew == "left" else torch.randn_like(right)
    check(slot, total)


def test_a_slot_tells_how_many_rows_a_layer_was_last_given():
    slot = slot_of((3, 6), 4, "direct")
    assert slot.rows == 0
    for rows in (8, 4):
        slot.group(torch.zeros(rows, 5, 3))
        assert slot.rows == rows


@pytest.mark.parametrize("uses", [1, 2])
def test_what_a_sum_is_made_of_by_ghost_and_directly(uses):
    """Norms, and the factors joined along T or the gradients: what a comparison of single examples looks at."""
    torch.manual_seed(0)
    pairs = [(torch.randn(4, tokens, 3), torch.randn(4, tokens, 6)) for tokens in (2, 5)[:uses]]
    for method in ("ghost", "direct"):
        slot = slot_of((3, 6), 4, method)
        for left, right in pairs:
            give(slot, left, right)
        norms, *parts = slot.by_example()
        expected = (
            [torch.cat(side, 1) for side in zip(*pairs, strict=True)]
            if method == "ghost"
            else [sum(outer(left, right) for left, right in pairs)]
        )
        assert len(parts) == len(expected)
        for part, value in zip(parts, expected, strict=True):
            assert_close(part, value)
        assert_close(norms, sum(outer(left, right) for left, right in pairs).flatten(1).norm(dim=1))


def test_what_a_sum_of_lookups_is_made_of():
    torch.manual_seed(0)
    slot, ids, found = slot_of((7, 3), 4, "auto"), torch.randint(7, (4, 5)), torch.randn(4, 5, 3)
    slot.receive_lookup(ids, torch.float32)  # of which no gradient comes
    _, leaf = slot.receive_lookup(ids, torch.float32)
    leaf.backward(found)
    norms, *parts = slot.by_example()
    assert len(parts) == 1
    assert_close(parts[0], found)
    dense = torch.zeros(4, 7, 3).index_put((torch.arange(4).unsqueeze(1), ids), found, accumulate=True)
    assert_close(norms, dense.flatten(1).norm(dim=1))


@pytest.mark.parametrize("methods", [("ghost", "ghost"), ("ghost", "direct"), ("direct", "direct")])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.0, 2.0)])
def test_uses_of_one_parameter_add_up(methods, scales):
    torch.manual_seed(0)
    slot, total = slot_of((3, 6), 4, "auto"), torch.zeros(4, 3, 6, dtype=torch.float64)
    for method, scale, tokens in zip(methods, scales, (2, 5), strict=True):
        slot.method = method
        left, right = torch.randn(4, tokens, 3), torch.randn(4, tokens, 6)
        give(slot, left, right, scale)
        total += outer(left, right, scale)
    check(slot, total)


def test_ghost_norm_of_tokens_that_cancel():
    """Two tokens of 1e4 and opposite sign leave a difference of 1: in float32 the Gram sum would lose it."""
    torch.manual_seed(0)
    left = torch.randn(3, 1, 4).repeat(1, 2, 1) * 1e4
    right = torch.randn(3, 1, 5).repeat(1, 2, 1)
    right[:, 1] *= -1
    right[:, 1, 0] += 1e-4
    slot = slot_of((4, 5), 3, "ghost")
    give(slot, left, right)
    assert_close(slot.norms().square(), outer(left, right).square().sum((1, 2)), 1e-5)


@pytest.mark.parametrize("tokens", [2, 6])
def test_ghost_sum_of_tokens_that_cancel(tokens):
    """What float32 would leave of terms of 1e4 is far beyond what their norm, about 1, counts."""
    torch.manual_seed(0)
    left = torch.randn(3, 1, 4).repeat(1, tokens, 1) * 1e4
    right = torch.randn(3, 1, 5).repeat(1, tokens, 1)
    right[:, 1::2] *= -1
    right[:, 1, 0] += 1e-4
    slot, gradients = slot_of((4, 5), 3, "ghost"), outer(left, right)
    give(slot, left, right)
    coefficients = torch.linspace(0, 1, 3)
    expected = torch.einsum("n,npq->pq", coefficients.double(), gradients)
    assert_close(weighted_sum(slot, coefficients), expected, 1e-6)
    # Never below, and above by no more than what float64 may have lost of terms of this size.
    lost = (tokens + 4 + 5) * 2.0**-52 * (left.double().norm(dim=2) * right.double().norm(dim=2)).sum(1).square()
    squares, true = slot.norms().double().square(), gradients.square().sum((1, 2))
    assert bool(((true * (1 - 1e-6) <= squares) & (squares <= (true + lost) * (1 + 1e-6))).all())
    for i, norm in enumerate(slot.norms().double()):
        alone = torch.zeros(3, dtype=torch.float64)
        alone[i] = 1 / norm
        assert float(weighted_sum(slot, alone.float()).double().norm()) <= 1 + 1e-6


@pytest.mark.parametrize("method", ["direct", "ghost"])
def test_tiny_times_huge_keeps_its_norm(method):
    """Squares of 1e-24 vanish in float32, those of 1e19 nearly overflow: their product does neither."""
    slot = slot_of((4, 5), 2, method)
    give(slot, torch.full((2, 1, 4), 1e-24), torch.full((2, 1, 5), 1e19))
    assert_close(slot.norms().square().double(), torch.full((2,), 20e-10, dtype=torch.float64), 1e-5)


@pytest.mark.parametrize("method", ["direct", "ghost"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_excluded_example_adds_exactly_nothing(bad, method):
    torch.manual_seed(0)
    left, right = torch.randn(3, 4, 2), torch.randn(3, 4, 5)
    left[1, 2] = bad
    slot = slot_of((2, 5), 3, method)
    give(slot, left, right)
    assert torch.isfinite(slot.norms().square()).tolist() == [True, False, True]
    total = weighted_sum(slot, torch.tensor([1.0, 0.0, 0.5]))
    kept = outer(left, right)
    assert_close(total, kept[0] + 0.5 * kept[2])


def test_embedding_tokens_add_up_before_the_norm():
    ids = torch.tensor([[1, 1, 3], [0, 2, 0]])
    gradient = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    table = torch.zeros(2, 5, 4, dtype=torch.float64)
    for i in range(2):
        table[i].index_add_(0, ids[i], gradient[i].double())
    slot = slot_of((5, 4), 2, "auto")
    for tokens in (slice(2), slice(2, 3)):  # two lookups in one table
        _, leaf = slot.receive_lookup(ids[:, tokens], torch.float32)
        leaf.backward(gradient[:, tokens])
    check(slot, table)


@pytest.mark.parametrize("api", ["legacy", "new"])
def test_sums_are_exact_whatever_products_torch_allows(api):
    matmul = torch.backends.cuda.matmul
    legacy = torch.get_float32_matmul_precision()
    before = matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    try:
        if api == "legacy":
            torch.set_float32_matmul_precision("medium")
        else:
            matmul.fp32_precision = "tf32"
        allowed = matmul.fp32_precision
        gradients, coefficients = torch.randn(64, 50), torch.rand(64)
        expected = coefficients.double() @ gradients.double()
        assert_close(clipped_sum_kept(gradients, coefficients), expected, 1e-6)
        assert matmul.fp32_precision == allowed
    finally:
        torch.set_float32_matmul_precision(legacy)
        matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.parametrize("uses", ["ghost", "ghost ghost", "ghost direct", "direct direct", "lookup lookup"])
def test_the_order_in_which_a_slot_is_asked_does_not_matter(uses):
    """Whether norms, what is kept, or the sum come first."""

    def fresh() -> Slot:
        generator = torch.Generator().manual_seed(0)
        slot = slot_of((3, 6), 4, "auto")
        for use in uses.split():
            if use == "lookup":
                _, leaf = slot.receive_lookup(torch.randint(3, (4, 2), generator=generator), torch.float32)
                leaf.backward(torch.randn(4, 2, 6, generator=generator))
            else:
                slot.method = use
                give(slot, torch.randn(4, 2, 3, generator=generator), torch.randn(4, 2, 6, generator=generator))
        return slot

    coefficients = torch.linspace(0.1, 1, 4)
    slot, norms = fresh(), fresh().norms()
    expected = weighted_sum(slot, coefficients)
    assert_close(slot.norms(), norms)
    assert_close(weighted_sum(slot, coefficients), expected)
    again = fresh()
    assert again.filled
    if again.kept is None:
        assert_close(fresh().recomputed_sum(coefficients), expected)
        assert again.filled
    else:
        assert_close(again.kept, slot.kept)


def test_no_gradient_is_a_norm_of_zero():
    norms = slot_of((3, 6), 4, "auto").norms()
    assert norms.dtype == torch.float64 and norms.tolist() == [0.0] * 4


def test_the_cheaper_method_is_taken():
    """Operations of either, counted in full; what moves costs 16 a number."""
    widths = (1, 2, 4, 7, 16, 30, 64, 100, 300, 768, 2000)
    for tokens, left, right in itertools.product(range(1, 130), widths, widths):
        product = 2 * tokens * left * right
        direct = product + 16 * 3 * left * right
        grams = 2 * tokens**2 * left + 2 * tokens**2 * right
        ghost = grams + 16 * (3 * tokens**2 + 8 * (tokens * left + tokens * right)) + product
        assert prefers_ghost(tokens, left, right) == (ghost < direct), (tokens, left, right)


def test_method_by_cost():
    assert prefers_ghost(1, 768, 1000)  # a head: the norm is a product of two
    assert not prefers_ghost(197, 768, 16)  # an adapter on the tokens of an image
    assert not prefers_ghost(4096, 4096, 16)
    slot = slot_of((768, 1000), 2, "auto")
    assert slot.receive(torch.randn(2, 1, 768), 768, 1000).ghost
    assert not slot_of((768, 16), 2, "auto").receive(torch.randn(2, 197, 768), 768, 16).ghost


@pytest.mark.parametrize(("shape", "n"), [((7, 5), 4), ((3, 2, 5), 4), ((5,), 4), ((4,), 4), ((5,), 1), ((0,), 0)])
def test_rows_that_n_does_not_divide_are_refused_by_name(shape, n):
    """Nor are those of one example that have no dimension for examples."""
    slot = slot_of((2, 5), n, "auto")
    uses = [lambda rows: slot.receive(rows, 2, 5), slot.receive_whole]
    if len(shape) > 1:
        uses.append(lambda rows: slot.receive_lookup(rows[..., 0].long(), torch.float32))
    for use in uses:
        with pytest.raises(ValueError, match=rf"'layer.weight' received an input of shape .* in a batch of {n} examp"):
            use(torch.zeros(shape))


def test_what_a_graph_cannot_hold(monkeypatch):
    """A leaf made inside a compiled one never comes out: the one that is there already is taken, or none is."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    slot = slot_of((3, 6), 4, "ghost")
    assert slot.receive(torch.zeros(4, 2, 3), 3, 6)[:2] == (False, slot.leaf)
    assert_refuses(
        NotImplementedError,
        "'layer.weight' is a trainable embedding",
        lambda: slot.receive_lookup(torch.zeros(4, 2, dtype=torch.long), torch.float32),
    )


@pytest.mark.parametrize(
    ("shape", "grouped"),
    [((4, 5), (4, 1, 5)), ((4, 3, 5), (4, 3, 5)), ((4, 2, 3, 5), (4, 6, 5)), ((8, 3, 5), (4, 6, 5))],
)
def test_rows_are_grouped_by_example(shape, grouped):
    rows = torch.arange(4).repeat_interleave(shape[0] // 4).view(-1, *[1] * (len(shape) - 1)).expand(shape)
    actual = slot_of((2, 5), 4, "auto").group(rows)
    assert actual.shape == grouped
    assert torch.equal(actual, torch.arange(4).view(4, 1, 1).expand(grouped))


def test_no_examples():
    assert slot_of((2, 5), 0, "auto").group(torch.zeros(0, 3, 5)).shape[0] == 0
    assert_refuses(ValueError, "in a batch of 0 examples", lambda: slot_of((2, 5), 0, "auto").group(torch.zeros(3, 5)))


def test_a_leaf_takes_no_memory():
    slot = slot_of((1000, 1000), 1000, "auto")
    assert slot.leaf.shape == (1000, 1000, 1000)
    assert slot.leaf.untyped_storage().nbytes() == 4
