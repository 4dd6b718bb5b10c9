"""What a loss's graph tells: its terms and their constants, how each joins the examples, whether examples meet."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_dp.isolation.loss_checks.graph import MixingLoss, Outputs, Term, UnknownLoss, is_plain, terms, weight
from lora_dp.isolation.loss_checks.own_scales import own_factors, own_weights
from tests.isolation.loss_checks.model_outputs import N, edge, model_output
from tests.models import assert_refuses

# Constants on the way from the means to the loss


ONE_TERM: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "itself": (lambda m: m, 1),
    "negative": (lambda m: -m, -1),
    "times": (lambda m: m * 3, 3),
    "times from the left": (lambda m: 3 * m, 3),
    "times a tensor": (lambda m: m * torch.tensor(3.0), 3),
    "a tensor times": (lambda m: torch.tensor(3.0) * m, 3),
    "divided": (lambda m: m / 4, 0.25),
    "divided by a tensor": (lambda m: m / torch.tensor(4.0), 0.25),
    "by a tensor of one": (lambda m: m * torch.ones(1), 1),
    "plus a constant": (lambda m: m + 5, 1),
    "a constant plus": (lambda m: torch.tensor(5.0) + m, 1),
    "less a constant": (lambda m: m - 5, 1),
    "a constant less": (lambda m: torch.tensor(5.0) - m, -1),
    "added to one in parts": (lambda m: torch.add(torch.tensor(5.0), m, alpha=0.5), 0.5),
    "of another dtype": (lambda m: m.double() / 2, 0.5),
    "in other shapes": (lambda m: m.view(1, 1).squeeze(0).clone(), 1),
    "a mean of one": (lambda m: m.mean(), 1),
    "a sum of one": (lambda m: m.unsqueeze(0).sum() * 2, 2),
    "stacked with a constant": (lambda m: torch.stack([torch.tensor(5.0), m]).sum(), 1),
    "several": (lambda m: -(2 * m / 4) * 3, -1.5),
}
TWO_TERMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[float, float]]] = {
    "sum": (lambda a, b: a + b, (1, 1)),
    "difference": (lambda a, b: a - b, (1, -1)),
    "sum with a share": (lambda a, b: torch.add(a, b, alpha=0.25), (1, 0.25)),
    "difference with a share": (lambda a, b: torch.sub(a, b, alpha=3), (1, -3)),
    "sum with nothing": (lambda a, b: torch.add(a, b, alpha=0), (1, 0)),
    "sum of a stack": (lambda a, b: torch.stack([a, b]).sum(), (1, 1)),
    "mean of a stack": (lambda a, b: torch.stack([a, b]).mean(), (0.5, 0.5)),
    "nested": (lambda a, b: 2 * (a - 3 * b) + b / 2, (2, -5.5)),
}
UNKNOWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product of two": lambda a, b: a * b,
    "quotient of two": lambda a, b: a / b,
    "reciprocal": lambda a, b: torch.tensor(2.0) / a,
    "times nothing": lambda a, b: a * 0.0,
    "root": lambda a, b: a.sqrt(),
    "loss of one number": lambda a, b: F.mse_loss(a, torch.zeros(()), reduction="none"),
    "exponential": lambda a, b: a.exp(),
    "greater of two": torch.maximum,
    "several at once": lambda a, b: torch.stack([a, b]).max(),
    "by several": lambda a, b: (a * torch.tensor([1.0, 2.0])).max(),
}


@pytest.mark.parametrize("n", [2, N])
@pytest.mark.parametrize("name", ONE_TERM)
def test_the_constant_of_one_term_is_read_off_its_graph(name, n):
    join, factor = ONE_TERM[name]
    out = model_output(n)
    (found,) = terms(join(out.mean()), n, Outputs.of([out]))
    assert found[:4] == ("outside", n, "mean", pytest.approx(factor, rel=1e-12))
    assert found.joined == edge(out)


@pytest.mark.parametrize("name", TWO_TERMS)
def test_the_constants_of_two_terms_are_read_off_their_graph(name):
    join, factors = TWO_TERMS[name]
    out, other = model_output(N), model_output(N)
    found = terms(join(out.mean(), other.sum()), N, Outputs.of([out, other]))
    for tensor, reduction, factor in ((out, "mean", factors[0]), (other, "sum", factors[1])):
        own = [term for term in found if term.joined == edge(tensor)]
        assert {term.reduction for term in own} == {reduction}
        assert sum(term.factor for term in own) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_linear_is_not_guessed(name):
    out, other = model_output(N), model_output(N)
    with pytest.raises(UnknownLoss):
        terms(UNKNOWN[name](out.mean(), other.mean()), N, Outputs.of([out, other]))


def test_a_constant_that_is_trained_is_none():
    """A learned weight beside the model: a product with it is linear in the mean alone."""
    out, learned = model_output(N), torch.tensor(2.0, requires_grad=True)
    (found,) = terms(out.mean() * learned, N, Outputs.of([out]))
    assert found.factor == 2


def test_a_loss_that_depends_on_no_output_has_no_term():
    out, other = model_output(N), model_output(N)
    outputs = Outputs.of([out])
    assert terms(other.mean(), N, outputs) == [] == terms(torch.ones(()), N, outputs)
    assert len(terms(other.mean() + out.mean(), N, outputs)) == 1
    assert not outputs.below(None, 0, {})


def test_the_only_number_of_the_only_example_is_joined():
    out = model_output(1)
    (found,) = terms(out.mean(), 1, Outputs.of([out]))
    assert (found.kind, found.elements, found.reduction, found.joined) == ("outside", 1, "mean", edge(out))


def test_a_graph_that_is_used_up_is_refused():
    out = model_output(N)
    loss = F.cross_entropy(out.view(2, 3), torch.zeros(2, dtype=torch.long))
    loss.backward()
    assert_refuses(UnknownLoss, "used up", lambda: terms(loss, 2, Outputs.of([out])))


def test_outputs_are_told_apart_by_their_place_in_a_node():
    """Two parts of one split: a loss of the one does not depend on the other."""
    first, second = model_output(2 * N).split(N)
    outputs = Outputs.of([second, torch.ones(N)])
    assert len(outputs.tensors) == 1
    assert terms(first.mean(), N, outputs) == []
    (found,) = terms(second.square().mean() + first.mean(), N, outputs)
    assert found.joined is not None and found.joined != edge(second)


def test_a_number_that_the_model_returned_is_a_term_of_its_own():
    out = model_output(N)
    number = out.square().mean()
    outputs = Outputs.of([out, number])
    (found,) = terms(-2 * number, N, outputs)
    assert found == Term("own", 1, "sum", -2.0, None, 1)


def test_a_vector_that_is_an_output_is_no_loss():
    out = model_output(2)
    assert_refuses(UnknownLoss, "the operation 'Mul'", lambda: terms(out, 2, Outputs.of([out])))


@pytest.mark.parametrize(
    ("loss", "elements", "reduction"),
    [
        (lambda out: F.nll_loss(out, torch.zeros(N, dtype=torch.long)), N, "mean"),
        (lambda out: F.nll_loss(out, torch.zeros(N, dtype=torch.long), reduction="sum"), N, "sum"),
        (lambda out: F.mse_loss(out, torch.zeros(N, 3)), 3 * N, "mean"),
        (lambda out: F.mse_loss(out, torch.zeros(N, 3), reduction="sum"), 3 * N, "sum"),
        (lambda out: out.mean((0, 1)), 3 * N, "mean"),
        (lambda out: out.sum(), 3 * N, "sum"),
        (lambda out: torch.stack([out, out.exp()]).mean(), 6 * N, "mean"),
    ],
)
def test_how_many_numbers_are_joined_and_how(loss, elements, reduction):
    out = model_output(N, 3)
    (found,) = terms(loss(out), N, Outputs.of([out]))
    assert (found.elements, found.reduction, found.factor) == (elements, reduction, 1.0)


@pytest.mark.parametrize(
    "loss",
    [lambda out, y: F.mse_loss(out, 1 - out), lambda out, y: out.mean(0).max(), lambda out, y: out.sum(1).prod()],
)
def test_joining_of_another_kind_is_not_guessed(loss):
    out = model_output(N, 3)
    with pytest.raises(UnknownLoss):
        terms(loss(out, None), N, Outputs.of([out]))


@pytest.mark.parametrize(
    ("options", "words"), [({"weight": torch.ones(3)}, "weighted by classes"), ({"ignore_index": 0}, "not ignored")]
)
def test_means_divided_by_what_the_labels_hold_mix(options, words):
    out, labels = model_output(N, 3), torch.tensor([0, 1, 2, 1, 2, 1])
    assert_refuses(MixingLoss, words, lambda: terms(F.nll_loss(out, labels, **options), N, Outputs.of([out])))
    terms(F.nll_loss(out, labels, reduction="sum", **options), N, Outputs.of([out]))


@pytest.mark.parametrize(
    ("loss", "weights"),
    [
        (F.nll_loss, [1 / 2]),
        (lambda out, y: 0.5 * F.nll_loss(out, y), [1 / 4]),
        (lambda out, y: F.nll_loss(out, y) / 2, [1 / 4]),
        (lambda out, y: F.nll_loss(out, y).clone().view(1).squeeze(), [1 / 2]),
        (lambda out, y: F.nll_loss(out, y, ignore_index=0), [6 / 9]),
        (lambda out, y: F.nll_loss(out, y, torch.tensor([1.0, 3.0, 5.0])), [6 / 36]),
        (lambda out, y: F.nll_loss(out, y, reduction="sum"), [6]),
        (lambda out, y: F.mse_loss(out, out.detach()), [1 / 6]),
        (lambda out, y: (out.square() * (y > 0).float()[:, None]).sum() / (y > 0).sum(), [6 / 9]),
        (lambda out, y: F.nll_loss(out, y) + out.mean(), [1 / 6, 1 / 2]),
    ],
)
def test_by_what_a_loss_of_the_models_own_weighs_its_numbers(loss, weights):
    out, labels = model_output(2 * N, 3), torch.tensor([0, 1, 2, 1] * 3)
    means, sums = (list(map(float, own_weights(loss(out, labels), N, claimed))) for claimed in ("mean", "sum"))
    assert means == pytest.approx(weights, rel=1e-12)
    assert sums == pytest.approx([value / N for value in weights], rel=1e-12)


def test_a_loss_of_the_models_own_that_is_no_sum_of_means_is_not_understood():
    out, labels = model_output(2 * N, 3), torch.tensor([0, 1, 2, 1] * 3)
    assert_refuses(UnknownLoss, "the operation 'Exp'", lambda: own_weights(F.nll_loss(out, labels).exp(), N, "mean"))
    assert own_weights(out.detach().mean(), N, "mean") == ()


@pytest.mark.parametrize(
    ("losses", "factors"),
    [
        (lambda out: out.square().sum(1), [1]),
        (lambda out: out.square().sum(1) / torch.tensor(4.0), [1 / 4]),
        (lambda out: out.sum(1) / torch.tensor([8.0]), [1 / 8]),
        (lambda out: 3 * out.sum(1) + 2 * out.mean(1), [3, 2]),
        (lambda out: out.sum(1) / torch.arange(1.0, N + 1), [1]),
    ],
)
def test_by_which_single_numbers_losses_of_the_models_own_were_multiplied(losses, factors):
    assert sorted(own_factors(losses(model_output(N, 3)))) == pytest.approx(sorted(factors), rel=1e-6)
    one = own_factors(model_output(1, 3).sum(1) / torch.tensor([8.0]))
    assert one == (1.0,)  # an example's own count
    assert own_factors(torch.ones(3)) == ()


# What a term makes of an example


def term(reduction: str, factor: float, elements: int = N) -> Term:
    return Term("outside", elements, reduction, factor)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "claimed", "expected"),
    [
        (term("mean", 0.5), "mean", 0.5),
        (term("mean", 0.5), "sum", 0.5 / N),
        (term("sum", 0.5), "sum", 0.5),
        (term("sum", 0.5), "mean", 0.5 * N),
        (term("mean", 1.0, 3 * N), "mean", 1 / 3),
        (term("sum", 1.0, 3 * N), "sum", 1.0),
        (Term("own", 1, "sum", 0.3), "mean", 0.3),
        (Term("own", 1, "sum", 0.3), "sum", 0.3),
    ],
)
def test_the_weight_of_an_example(found, claimed, expected):
    assert weight(found, N, claimed) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("elements", [1, N - 1, N + 1, 2 * N + 3])
def test_numbers_that_no_example_has_a_share_of_are_refused(elements):
    assert_refuses(
        UnknownLoss, f"joins {elements} numbers in a batch of 6", lambda: weight(term("mean", 1.0, elements), N, "mean")
    )


@pytest.mark.parametrize(
    ("found", "claimed", "plain"),
    [
        # As claimed, with any constant but the one that undoes it.
        (term("mean", 1.0), "mean", True),
        (term("mean", 0.123), "mean", True),
        (term("mean", 1 / N), "mean", True),
        (term("mean", N), "mean", False),
        (term("mean", -N), "mean", False),
        (term("sum", 1.0), "sum", True),
        (term("sum", N), "sum", True),
        (term("sum", 2 / N), "sum", True),
        (term("sum", 1 / N), "sum", False),
        (term("sum", -1 / N), "sum", False),
        # A sum divided by hand: by N, or a multiple of it.
        (term("sum", 1 / N), "mean", True),
        (term("sum", -1 / N), "mean", True),
        (term("sum", 1 / (2 * N)), "mean", True),
        (term("sum", -1 / (2 * N)), "mean", True),
        (term("sum", (1 + 1e-7) / N), "mean", True),
        (term("sum", (1 + 2e-5) / N), "mean", False),
        (term("sum", 1.0), "mean", False),
        (term("sum", 1 / 19), "mean", False),
        (term("sum", -1 / 19), "mean", False),
        (term("sum", 0.0), "mean", False),
        (term("sum", 0.7 / N), "mean", True),
        # A mean multiplied by N.
        (term("mean", N), "sum", True),
        (term("mean", -N), "sum", True),
        (term("mean", N / 7), "sum", True),
        (term("mean", N, 3 * N), "sum", True),
        (term("mean", 1.0), "sum", False),
        (term("mean", 0.5), "sum", False),
        (term("mean", 2.0), "sum", True),
        (term("mean", 0.0), "sum", False),
        (term("mean", 0.207 * N), "sum", False),
        (Term("own", 1, "sum", 0.3), "mean", True),
    ],
)
def test_a_term_joins_as_claimed_or_not(found, claimed, plain):
    assert is_plain(found, weight(found, N, claimed), N, claimed) is plain


@pytest.mark.parametrize("claimed", ["mean", "sum"])
def test_rounding_of_the_constants_does_not_matter(claimed):
    """1 / (1 / 49) is not 49 in floating point."""
    n = 49
    assert 1 / (1 / n) != n
    found = term("mean" if claimed == "sum" else "sum", 1.0 if claimed == "sum" else 1 / n, n)
    assert is_plain(found, weight(found, n, claimed), n, claimed) is (claimed == "mean")


def test_of_one_example_every_term_is_what_is_claimed():
    assert is_plain(term("sum", 1 / 19, 3), 3 / 19, 1, "mean")
    assert not is_plain(term("sum", 1 / 19, 4), 2 / 19, 2, "mean")
