"""Losses of single examples handed to optimizer.backward: what joins them is refused, a public weight is taken."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp import IsolationError, PrivacyEngine
from tests.models import assert_refuses, examples, flat, mlp, take_step
from tests.support import assert_close, make_private, private_gradients

N = 6


@pytest.mark.parametrize("declared", ["mean", "sum"])
@pytest.mark.parametrize(("n", "bound"), [(1, 0.3), (N, 0.3), (N, 1e6)])
def test_a_vector_needs_no_reduction(declared, n, bound):
    model, reference, (x, y) = mlp(), mlp(), examples(n)
    optimizer = make_private(model, batch_size=N, max_grad_norm=bound, loss_reduction=declared)
    optimizer.batch.expect(n)
    optimizer.backward(F.cross_entropy(model(x), y, reduction="none"))
    optimizer.step()
    expected = take_step(reference, make_private(reference, batch_size=N, max_grad_norm=bound), (x, y))
    assert_close(flat(private_gradients(model)) * N, flat(expected), 1e-6)


def test_the_graph_of_a_vector_is_kept_only_where_that_is_asked_for():
    model, (x, y) = mlp(), examples(N)
    optimizer = make_private(model, batch_size=N)
    losses = F.cross_entropy(model(x), y, reduction="none")
    optimizer.backward(losses, retain_graph=True)
    optimizer.backward(losses)
    with pytest.raises((RuntimeError, ValueError), match="second time|used up"):
        optimizer.backward(losses)


def test_a_public_weight_multiplies_every_loss():
    model, reference, (x, y) = mlp(), mlp(), examples(N)
    optimizer = make_private(model, batch_size=N, max_grad_norm=1e6)
    for weight in (0.5, 0.25):  # a schedule
        optimizer.batch.expect(N)
        optimizer.backward(F.cross_entropy(model(x), y, reduction="none"), weight=weight)
        optimizer.step()
        model.load_state_dict(reference.state_dict())
        expected = take_step(mine := mlp(), make_private(mine, batch_size=N, max_grad_norm=1e6), (x, y))
        assert_close(flat(private_gradients(model)) * N, weight * flat(expected), 1e-5)


@pytest.mark.parametrize(
    ("words", "losses"),
    [
        ("divided by the number of examples, 6", lambda out, y: F.cross_entropy(out, y, reduction="none") / 6),
        ("depends on the model's outputs for others", lambda out, y: (out - out.mean(0)).square().sum(1)),
        (
            "depends on the model's outputs for others",
            lambda out, y: F.cross_entropy(out @ out.t(), torch.arange(len(out)), reduction="none"),
        ),
    ],
)
def test_a_vector_that_joins_examples_is_refused(words, losses):
    model, (x, y) = mlp(), examples(N)
    optimizer = make_private(model, batch_size=N)
    assert_refuses(IsolationError, words, lambda: optimizer.backward(losses(model(x), y)))


@pytest.mark.parametrize("n", [2, N])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_vector_divided_by_the_number_of_examples_is_refused_at_once(sign, n):
    model, (x, y) = mlp(), examples(n)
    optimizer = make_private(model, batch_size=N)
    losses = sign * F.cross_entropy(model(x), y, reduction="none") / n
    assert_refuses(IsolationError, f"divided by the number of examples, {n}", lambda: optimizer.backward(losses))


@pytest.mark.parametrize("words", ["weighs an example by 0.5, that of an earlier one by 1", "outputs for others"])
def test_a_vector_of_two_is_looked_at_and_of_one_is_not(words):
    def losses(out: Tensor) -> Tensor:
        return out.square().sum(1) / len(out) if "weighs" in words else (out - out.sum(0)).square().sum(1)

    model = mlp()
    optimizer = make_private(model, batch_size=N)
    optimizer.backward(losses(model(examples(1)[0])))
    optimizer.zero_grad()
    assert_refuses(IsolationError, words, lambda: optimizer.backward(losses(model(examples(2)[0]))))


def test_a_vector_that_was_seen_in_a_batch_of_one_alone_is_looked_at_in_the_next():
    """Though batches of that kind were tried before; and in which order its terms are added is nothing."""
    model = mlp()
    optimizer = make_private(model, batch_size=N)

    def backward(n: int, turn: bool) -> None:
        out = model(examples(n)[0])
        one, other = (
            share * (part - part.sum(0)).square().sum(1) for share, part in ((0.3, out[:, :1]), (0.7, out[:, 1:]))
        )
        optimizer.batch.expect(n)
        optimizer.backward(other + one if turn else one + other)
        optimizer.step()

    x, y = examples(2)
    optimizer.batch.expect(2)
    optimizer.backward(F.cross_entropy(model(x), y, reduction="none"))
    optimizer.step()
    backward(1, False)
    backward(1, True)
    assert_refuses(IsolationError, "outputs for others", lambda: backward(2, False))


def test_a_new_loss_is_looked_at_in_whatever_batch_it_comes():
    model, (x, y) = mlp(), examples(N)
    optimizer = make_private(model, batch_size=N)
    optimizer.batch.expect(N)
    optimizer.backward(F.cross_entropy(model(x), y, reduction="none"))
    optimizer.step()
    out = model(x)
    assert_refuses(
        IsolationError, "outputs for others", lambda: optimizer.backward((out - out.mean(0)).square().sum(1))
    )


def test_a_vector_after_a_forward_that_failed_is_refused():
    model = mlp()
    optimizer = make_private(model, batch_size=N)

    def fail(module: nn.Module, inputs: object, output: Tensor) -> None:
        if not optimizer.recorder.tried:
            raise ArithmeticError

    model[2].register_forward_hook(fail)
    with pytest.raises(ArithmeticError):
        model(examples(1)[0])
    losses = torch.ones(1, requires_grad=True) * 2
    assert_refuses(ValueError, "do not depend on what the model returned", lambda: optimizer.backward(losses))


def test_a_vector_divided_by_what_is_no_constant_is_refused_at_once():
    model, (x, y) = mlp(), examples(N)
    optimizer = make_private(model, batch_size=N)
    losses = F.cross_entropy(model(x), y, reduction="none")
    for count in (2899, 76):
        assert_refuses(
            IsolationError,
            f"multiplied by {1 / count:.6g}, which looks like a count",
            lambda count=count: optimizer.backward(losses / count, retain_graph=True),
        )


@pytest.mark.parametrize("count", [31])
def test_a_vector_divided_by_a_count_is_refused_in_the_next_batch(count):
    model, (x, y) = mlp(), examples(N)
    optimizer = make_private(model, batch_size=N)
    for _ in range(2):
        optimizer.batch.expect(N)
        optimizer.backward(F.cross_entropy(model(x), y, reduction="none") / count)
        optimizer.step()
    losses = F.cross_entropy(model(x), y, reduction="none") / (count + 1)
    assert_refuses(IsolationError, f"weighs an example by {1 / (count + 1):.6g}", lambda: optimizer.backward(losses))


@pytest.mark.parametrize(
    ("words", "losses"),
    [
        ("shape (6,), got ()", lambda out, y: F.cross_entropy(out, y)),
        ("shape (6,), got (6, 3)", lambda out, y: out),
        ("shape (6,), got float", lambda out, y: 0.5),
        ("do not depend on what the model returned", lambda out, y: torch.ones(N, requires_grad=True) * 2),
        ("do not depend on what the model returned", lambda out, y: torch.ones(N)),
    ],
)
def test_what_is_no_vector_of_losses_is_refused(words, losses):
    model, (x, y) = mlp(), examples(N)
    optimizer = make_private(model, batch_size=N)
    assert_refuses(ValueError, words, lambda: optimizer.backward(losses(model(x), y)))


def test_a_vector_needs_a_forward_before():
    model = mlp()
    optimizer = make_private(model, batch_size=N)
    assert_refuses(RuntimeError, "needs a training forward", lambda: optimizer.backward(torch.ones(N)))


def test_micro_batches_of_vectors_equal_one_batch():
    released = []
    for parts in ((N,), (1, 5), (4, 2)):
        model, (x, y) = mlp(), examples(N)
        optimizer = make_private(model, batch_size=N, max_grad_norm=0.3)
        optimizer.batch.expect(N)
        for number, (some, labels) in enumerate(zip(x.split(parts), y.split(parts), strict=True)):
            optimizer.backward(F.cross_entropy(model(some), labels, reduction="none"))
            optimizer.signal_skip_step(number < len(parts) - 1)
            optimizer.step()
        released.append(flat(private_gradients(model)))
    for other in released[1:]:
        assert_close(other, released[0], 1e-6)


# Batch by batch


def test_examples_that_meet_in_a_later_batch_only_are_refused():
    """Those of one group are pulled together; the first batch has one example of each group."""
    model = mlp()
    optimizer = make_private(model, batch_size=N)

    def losses(out: Tensor, groups: Tensor) -> Tensor:
        mates = (groups[:, None] == groups[None]).float() - torch.eye(len(out))
        return out.square().sum(1) + (mates * (out[:, None] - out[None]).square().sum(-1)).sum(1)

    x, _ = examples(N)
    optimizer.backward(losses(model(x), torch.arange(N)))
    optimizer.zero_grad()
    groups = torch.tensor([0, 1, 2, 1, 3, 4])  # neither the first nor the last

    def later() -> None:
        for _ in range(8):  # both mates are weighed alike by chance in one of 64 batches
            optimizer.backward(losses(model(x), groups))
            optimizer.zero_grad()

    assert_refuses(IsolationError, "that of example 1 depends on the model's outputs for others", later)


@pytest.mark.parametrize("inside", [False, True])
def test_a_count_in_a_loop_whose_graph_is_another_in_every_batch_is_refused(inside):
    model = mlp()
    optimizer = make_private(model, batch_size=N)

    def losses(out: Tensor, terms: list[int]) -> Tensor:
        count = sum(terms)
        each = [sum(out[i].square().sum() / (count if inside else 1) for _ in range(k)) for i, k in enumerate(terms)]
        return torch.stack(each) if inside else torch.stack(each) / count

    x, _ = examples(N)
    optimizer.backward(losses(model(x), [1, 2, 1, 2, 1, 2]))
    optimizer.zero_grad()
    optimizer.backward(losses(model(x), [2, 1, 1, 2, 1, 2]))  # as many
    optimizer.zero_grad()
    assert_refuses(
        IsolationError,
        "0.0833333, that of an earlier one by 0.111111",
        lambda: optimizer.backward(losses(model(x), [1, 2, 1, 2, 3, 3])),
    )


def test_a_loop_over_examples_is_taken():
    model, (x, y) = mlp(), examples(N)
    optimizer = make_private(model, batch_size=N)
    for n in (2, N, 3):
        optimizer.batch.expect(n)
        out = model(x[:n])
        optimizer.backward(torch.stack([F.cross_entropy(out[i], y[i]) for i in range(n)]))
        optimizer.step()
        optimizer.zero_grad()


class Beside(nn.Module):
    """Returns something of the whole batch beside its logits."""

    def __init__(self, kind: str):
        super().__init__()
        self.inner, self.kind = mlp(), kind

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.inner(x)
        return out, {"centre": out.mean(0), "number": out.mean(), "rows": out.square()}[self.kind]


@pytest.mark.parametrize("kind", ["centre", "number"])
@pytest.mark.parametrize("scalar", [False, True])
def test_an_output_that_is_not_by_example_is_no_part_of_a_loss(kind, scalar):
    model, (x, y) = Beside(kind), examples(N)
    optimizer = make_private(model, batch_size=N)
    for n in (N, 5, 2):
        out, beside = model(x[:n])
        losses = F.cross_entropy(out, y[:n], reduction="none") + beside.square().sum()
        assert_refuses(
            IsolationError,
            "not by example",
            (losses.mean().backward if scalar else lambda given=losses: optimizer.backward(given)),
        )
        optimizer.zero_grad()
    # Of one example alone it is its own.
    out, beside = model(x[:1])
    losses = F.cross_entropy(out, y[:1], reduction="none") + beside.square().sum()
    losses.mean().backward() if scalar else optimizer.backward(losses)
    optimizer.zero_grad()
    # Returned, and left alone.
    optimizer.backward(F.cross_entropy(model(x)[0], y, reduction="none"))


def test_an_output_by_example_is_part_of_a_loss():
    model, (x, y) = Beside("rows"), examples(N)
    optimizer = make_private(model, batch_size=N)
    optimizer.batch.expect(N)
    out, rows = model(x)
    optimizer.backward(F.cross_entropy(out, y, reduction="none") + rows.mean(1))
    optimizer.step()


class Counted(torch.autograd.Function):
    """A kernel of one's own, with a divisor inside."""

    @staticmethod
    def forward(ctx, losses: Tensor, count: float) -> Tensor:
        ctx.count = count
        return losses / count

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.count, None


@pytest.mark.parametrize("scalar", [False, True])
def test_a_function_of_pythons_is_taken_once_it_was_tested(scalar):
    model, (x, y) = mlp(), examples(N)
    optimizer = make_private(model, batch_size=N)

    def criterion(count: float):
        def losses(out: Tensor, y: Tensor) -> Tensor:
            return Counted.apply(F.cross_entropy(out, y, reduction="none"), count or float(len(out)))

        return losses

    def backward(count: float) -> None:
        losses = criterion(count)(model(x), y)
        losses.mean().backward() if scalar else optimizer.backward(losses)

    assert_refuses(IsolationError, "no graph shows what 'Counted' does", lambda: backward(2.0))
    optimizer.zero_grad()
    assert_refuses(IsolationError, "", lambda: PrivacyEngine().check_isolation(model, (x, y), criterion(0)))
    PrivacyEngine().check_isolation(model, (x, y), criterion(2.0))
    optimizer.batch.expect(N)
    backward(2.0)
    optimizer.step()


@pytest.mark.parametrize("way", ["tensor", "list", "keyword"])
def test_a_gradient_given_to_backward_is_refused(way):
    model, (x, y) = mlp(), examples(N)
    make_private(model, batch_size=N)
    loss, factor = F.cross_entropy(model(x), y), torch.tensor(9.0)
    assert_refuses(
        IsolationError,
        "a public schedule is optimizer.backward",
        lambda: {
            "tensor": lambda: loss.backward(factor),
            "list": lambda: torch.autograd.backward([loss], [factor]),
            "keyword": lambda: torch.autograd.backward(loss, grad_tensors=factor),
        }[way](),
    )


# Beside other losses


@pytest.mark.parametrize("n", [1, 2, 6])
@pytest.mark.parametrize("first", ["mean", "vector"])
def test_a_mean_and_losses_of_single_examples_are_not_joined_in_one_pass(first, n):
    model, (x, y) = mlp(), examples(n)
    optimizer = make_private(model, batch_size=6)
    out = model(x)
    vector = F.cross_entropy(out, y, reduction="none")
    backwards = [
        lambda: out.square().mean().backward(retain_graph=True),
        lambda: optimizer.backward(vector, retain_graph=True),
    ]
    one, other = backwards if first == "mean" else backwards[::-1]
    one()
    if n == 1:  # of which both are the same
        other()
    else:
        assert_refuses(IsolationError, "joined otherwise", other)


def test_sums_of_one_pass_are_added():
    model, (x, y) = mlp(), examples(6)
    optimizer = make_private(model, batch_size=6, loss_reduction="sum")
    optimizer.batch.expect(6)
    out = model(x)
    out.square().sum().backward(retain_graph=True)
    optimizer.backward(F.cross_entropy(out, y, reduction="none"))
    optimizer.step()
