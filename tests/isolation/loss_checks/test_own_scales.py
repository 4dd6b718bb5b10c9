"""By which numbers losses that a model computes itself are multiplied and bounded, whatever is done to them after."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_dp import DPLinear, IsolationError, PrivacyEngine
from lora_dp.isolation.loss_checks.graph import MixingLoss, Outputs
from lora_dp.isolation.loss_checks.own_scales import OwnLosses, own_numbers, summed_up
from tests.isolation.loss_checks.own_losses import Logits, N, batch, rows
from tests.models import assert_refuses
from tests.support import make_private


@pytest.mark.parametrize(
    ("loss", "scales"),
    [
        (lambda out: (out.square() / 8).sum(1).mean(), [1 / 8]),
        (lambda out: out.square().sum(1).mean() / 8, []),
        (lambda out: (3 * (out.square() / 8)).sum(), [1 / 8, 3]),
        (lambda out: (3 * (out / 5) ** 2 / 3 / 7 * 9).sum(), [1 / 7, 1 / 5, 1 / 3, 3, 9]),
        (lambda out: (out / 8).exp().sum(1), [1 / 8]),
        (lambda out: (out * 2).sum(1) / torch.arange(1.0, N + 1), [2]),
        (lambda out: F.linear(out / 8, torch.ones(2, 3)).square().mean(), []),  # the network's own
        (lambda out: torch.stack([row.sum() / (i + 2) for i, row in enumerate(out)]), []),  # each example's own
        (lambda out: torch.stack([out.sum(1) / 3, out.mean(1) / 5]).mean(), [1 / 5, 1 / 3]),
        (lambda out: torch.add(out.detach(), out, alpha=3), [3]),
        (lambda out: torch.sub(out, out.exp(), alpha=3), [3]),
        (lambda out: torch.rsub(out, 5, alpha=3), [3]),
        (lambda out: out + out.exp() - 5, []),
        (lambda out: torch.addcmul(out.detach(), out, torch.ones(3), value=1 / 8), [1 / 8]),
        (lambda out: torch.addcdiv(out.detach(), out, torch.ones(3), value=1 / 8), [1 / 8]),
        (lambda out: torch.addcmul(out.detach(), out, torch.ones(3)), []),
        (lambda out: torch.lerp(torch.zeros(N, 3), out, 1 / 8), [1 / 8]),
        (lambda out: torch.lerp(torch.zeros(N, 3), out, torch.tensor(1 / 8)), [1 / 8]),
        (lambda out: out * torch.tensor(2.0, requires_grad=True), []),  # learned
        (lambda out: out.detach().sum(), []),
    ],
)
def test_by_what_losses_of_the_models_own_are_multiplied_before_they_are_joined(loss, scales):
    assert own_numbers(loss(rows()), N).all_scales == pytest.approx(scales, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "bounds"),
    [
        (lambda out: out.clamp(max=7), {"Clamp's max": (7,)}),
        (lambda out: out.clamp(-1, 7).sum(1), {"Clamp's max": (7,), "Clamp's min": (-1,)}),
        (lambda out: out.clamp_min(3).mean(), {"ClampMin's min": (3,)}),
        (lambda out: out.clamp(max=torch.tensor(7.0)).mean(), {"Clamp's max": (7,)}),
        (lambda out: out.clamp(max=torch.tensor([7.0])).mean(), {"Clamp's max": (7,)}),
        (lambda out: out.clamp(max=torch.tensor([7.0, 8.0, 9.0])).mean(), {}),
        (lambda out: (out**16 + out**3).mean(), {"Pow's exponent": (3, 16)}),
        (lambda out: 3**out, {"Pow's self": (3,)}),
        (lambda out: torch.tensor(3.0) / out, {"Div's self": (3,)}),
        (lambda out: F.huber_loss(out, torch.zeros(N, 3), delta=0.3), {"HuberLoss's delta": (0.3,)}),
        (lambda out: F.huber_loss(out, torch.zeros(N, 3), delta=0.3, reduction="none"), {"HuberLoss's delta": (0.3,)}),
        (lambda out: F.smooth_l1_loss(out, torch.zeros(N, 3), beta=0.3), {"SmoothL1Loss's beta": (0.3,)}),
        (lambda out: F.multi_margin_loss(out, torch.arange(N) % 3, margin=3), {"MultiMarginLoss's margin": (3,)}),
        (
            lambda out: F.binary_cross_entropy_with_logits(out, torch.zeros(N, 3), pos_weight=torch.tensor([3.0])),
            {"BinaryCrossEntropyWithLogits's pos_weight": (3,)},
        ),
        (lambda out: F.leaky_relu(out, 0.3), {"LeakyRelu's negative_slope": (0.3,)}),
        (lambda out: F.softplus(out, 3), {"Softplus's beta": (3,), "Softplus's threshold": (20,)}),
        (lambda out: F.cross_entropy(out, torch.arange(N) % 3), {}),
        (lambda out: F.mse_loss(out, torch.zeros(N, 3)), {}),
        (lambda out: out[:, :2].softmax(1).sum(1, keepdim=True).transpose(0, 1).expand(4, N).cumsum(0)[1], {}),
        (lambda out: out.clamp(max=7).matmul(torch.ones(3, 3)), {}),
    ],
)  # the network's own
def test_by_what_losses_of_the_models_own_are_bounded(loss, bounds):
    found = own_numbers(loss(rows()), N).bounds
    assert set(found) == set(bounds)
    assert all(found[name] == pytest.approx(values, rel=1e-5) for name, values in bounds.items())


def test_a_graph_whose_ways_double_at_each_step_is_gone_through_once():
    out = rows() * 2
    for _ in range(60):
        out = out + out
    assert own_numbers(out.sum(), N).all_scales == (2.0,)
    assert summed_up(out.sum(), Outputs.of([rows()])) == set()


def test_what_was_used_up_or_written_to_is_left_to_its_backward():
    out = rows()
    bounded = out.clamp(max=(bound := torch.tensor(7.0))) / 2
    bound += 1
    assert own_numbers(bounded, N).all_scales == (0.5,)
    divided = out.exp() / torch.tensor(8.0)
    divided.sum().backward()
    assert own_numbers(divided, N) == ((), {}, {})


def test_scales_are_told_apart_by_how_many_follow_one_another():
    out = rows()
    terms = (out[:, 0] * 0.9, out[:, 1] / 2 * 5, out[:, 2] * 0.7)
    for joined in (terms[0] + terms[1] + terms[2], torch.stack(terms), torch.cat(terms)):
        assert own_numbers(joined * 3, N).scales == ((0.9, 0.5, 0.7), (5.0,), (3.0,))
    after_layers = F.linear(out, torch.ones(3, 3)) * 0.9 + out * 0.7
    assert own_numbers(after_layers * 3, N).scales == ((0.9, 0.7), (3.0,))


# Which outputs are losses


@pytest.mark.parametrize(
    ("join", "found"),
    [
        (lambda out: out.sum(), True),
        (lambda out: (out * torch.ones(N, 3)).sum(1), True),
        (lambda out: -(out / 8).mean(1).unsqueeze(0), True),
        (lambda out: out[torch.arange(3)].mean(), True),
        (lambda out: torch.stack([out[:, 0], out[:, 1]]).mean(), True),
        (lambda out: out @ torch.ones(3), True),
        (lambda out: out.masked_fill(out > 0, 0.0).t().sum(0) - 1, True),
        (lambda out: out.clamp(max=7), True),
        (lambda out: out * out.exp(), True),
        (lambda out: out, True),
        (lambda out: F.cross_entropy(out, torch.arange(N) % 3), False),
        (lambda out: out.square().sum(), False),
        (lambda out: F.nll_loss(out, torch.zeros(N, dtype=torch.long), reduction="none").sum(), False),
        (lambda out: F.mse_loss(out, torch.zeros(N, 3)), False),
        (lambda out: out.exp().sum(), False),
    ],
)
def test_what_is_only_weighed_and_added_up_is_a_loss(join, found):
    out, other = rows(), rows()
    outputs = Outputs.of([other, out])
    assert summed_up(join(out), outputs) == ({1} if found else set())


# Over batches


class Own(nn.Module):
    """(N, 4, 4) → losses of tokens (N, 4), of a number that the loop sets on the model."""

    def __init__(self, losses: Callable[[Tensor, float], Tensor]):
        super().__init__()
        self.inner, self.losses, self.number = DPLinear(4, 3), losses, 8.0

    def forward(self, x: Tensor) -> Tensor:
        return self.losses(
            F.cross_entropy(self.inner(x).transpose(1, 2), (x[..., 0] > 0).long(), reduction="none"), self.number
        )


DOORS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "a mean": ("mean", lambda losses: losses.mean()),
    "a sum": ("sum", lambda losses: losses.sum()),
    "masked": ("sum", lambda losses: (losses * torch.ones(losses.shape[1:])).sum()),
    "by example": ("mean", lambda losses: losses.flatten(1).sum(1) if losses.dim() > 1 else losses),
    "by example, weighed": ("mean", lambda losses: 0.3 * losses.flatten(1).sum(1) if losses.dim() > 1 else 5 * losses),
}
FOLLOWING: dict[str, Callable[[Tensor, float], Tensor]] = {
    "(N,)": lambda losses, c: losses.sum(1) / c,
    "(N, 1)": lambda losses, c: losses.sum(1, keepdim=True) / c,
    "(N, T)": lambda losses, c: losses / c,
    "(N, T, 1)": lambda losses, c: (losses / c).unsqueeze(2),
    "a product": lambda losses, c: losses * torch.tensor(1 / c),
    "addcmul": lambda losses, c: torch.addcmul(torch.zeros(()), losses, torch.ones(4), value=1 / c),
    "lerp": lambda losses, c: torch.lerp(torch.zeros(len(losses)), losses.sum(1), 1 / c),
    "a difference": lambda losses, c: torch.sub(torch.zeros(len(losses)), losses.sum(1), alpha=1 / c),
    "a power": lambda losses, c: losses.sum(1) ** (16 / c),
    "a bound": lambda losses, c: losses.sum(1).clamp(max=c),
    "a bound in a tensor": lambda losses, c: losses.clamp(max=torch.tensor(c)),
    "Huber": lambda losses, c: F.huber_loss(losses, torch.zeros_like(losses), reduction="none", delta=c),
}


def steps(model: nn.Module, door: str) -> Callable[[Tensor], None]:
    reduction, join = DOORS[door]
    optimizer = make_private(model.train(), batch_size=N, loss_reduction=reduction)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        loss = join(model(x))
        loss.backward() if loss.dim() == 0 else optimizer.backward(loss)
        optimizer.batch.expect(len(x))
        optimizer.step()

    return step


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", FOLLOWING)
def test_a_number_of_the_batch_in_a_models_own_losses_is_refused_by_every_door(name, door):
    model = Own(FOLLOWING[name])
    step = steps(model, door)
    for n in (N, 5, 1, 9):  # a constant, in batches of other sizes
        step(batch(n))
    model.number = 10.0
    assert_refuses(IsolationError, "earlier one", lambda: step(batch(N)))
    model.number = 8.0
    step(batch(N))


@pytest.mark.parametrize("door", ["a mean", "a sum", "masked"])
@pytest.mark.parametrize(
    ("count", "words"), [(76.0, "looks like a count"), (N, "divided by the number of examples, 6")]
)
def test_a_count_in_a_models_own_losses_is_refused_in_the_first_batch(count, words, door):
    model = Own(FOLLOWING["(N, T)"])
    model.number = count
    assert_refuses(IsolationError, words, lambda: steps(model, door)(batch(N)))
    steps(model, door)(batch(1))  # one example's own


def test_a_number_of_the_batch_is_refused_where_the_criterion_was_tested():
    def criterion(losses: Tensor, _: Tensor) -> Tensor:
        return losses.sum(1).exp().mean().log()

    engine, model = PrivacyEngine("rdp", reproducible_seed=0), Own(lambda losses, c: (losses / c).sum(1, keepdim=True))
    optimizer = make_private(model.train(), batch_size=N, engine=engine)
    engine.check_isolation(model, (batch(N), torch.zeros(N)), lambda losses, y: criterion(losses, y).exp())

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(batch(N)), batch(N)).exp().backward()

    step()
    model.number = 10.0
    assert_refuses(IsolationError, "by 0.1 in this batch, by 0.125 in an earlier one", step)


INNOCENT: dict[str, Callable[[Tensor, int], Tensor]] = {
    "plain": lambda out, _: out.mean(1),
    "a temperature": lambda out, _: out.mean(1) / 0.07,
    "a temperature that falls": lambda out, passes: out.mean(1) * (1 + passes / 10),
    "a mean over the width": lambda out, _: out.sum(1) / out.shape[1],
    "dropout": lambda out, _: F.dropout(out, 0.2).mean(1).clamp(-30, 30),
    "a dropped path": lambda out, _: (out * torch.empty(len(out), 1, 1).bernoulli_(0.8).div_(0.8)).mean(1),
    "a checkpoint": lambda out, _: checkpoint(
        lambda out: F.dropout(out, 0.2).mean(1).clamp(-30, 30) * torch.tensor(0.7), out, use_reentrant=False
    ),
    "probabilities": lambda out, passes: (out.mean(1) / (1 + passes / 10)).log_softmax(1),
}


@pytest.mark.slow
@pytest.mark.parametrize("by_example", [False, True])
@pytest.mark.parametrize("name", INNOCENT)
def test_logits_are_no_losses(name, by_example):
    model = Logits(INNOCENT[name])
    optimizer = make_private(model.train(), batch_size=N)
    for n, width, dtype in ((N, 4, None), (9, 6, None), (1, 3, None), (5, 5, torch.bfloat16), (N, 4, torch.bfloat16)):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            losses = F.cross_entropy(model(batch(n, width)).float(), torch.arange(n) % 3, reduction="none")
        optimizer.backward(losses) if by_example else losses.mean().backward()
        optimizer.batch.expect(n)
        optimizer.step()
    assert optimizer.ledger.steps == 5


@pytest.mark.parametrize("door", ["a mean", "by example"])
def test_a_hook_may_keep_what_losses_are_made_of(door):
    model = Own(
        lambda losses, c: checkpoint(
            lambda losses: (losses * torch.tensor([1.0, 1.0, 0.0, 0.0])).clamp(max=9).sum(1) / c,
            losses,
            use_reentrant=False,
        )
    )
    step = steps(model, door)
    for n in (N, 5):
        with torch.autograd.graph.save_on_cpu():
            step(batch(n))


@pytest.mark.parametrize(("n", "held"), [(1, False), (2, True), (3, True)])
def test_two_examples_can_meet_and_one_cannot(n, held):
    known = OwnLosses()
    known.check_numbers(0, rows(n) * 3, n)
    if held:
        assert_refuses(MixingLoss, "by 4 in this batch, by 3 in", lambda: known.check_numbers(0, rows(n) * 4, n))
    else:
        known.check_numbers(0, rows(n) * 4, n)
        assert not known._numbers


def test_what_a_batch_is_compared_with_stays_the_first_one():
    out, known = rows(), OwnLosses()
    for share in (1.0, 1 + 8e-6):
        known.check_numbers(0, (out * share).clamp(max=share), N)
    assert_refuses(MixingLoss, "multiplies", lambda: known.check_numbers(0, out * (1 + 16e-6), N))
    assert_refuses(MixingLoss, "bounds or bends", lambda: known.check_numbers(0, out.mul(1.0).clamp(max=1 + 16e-6), N))


def test_a_bound_that_comes_later_is_held_to_its_first_value():
    out, known = rows(), OwnLosses()
    for losses in (out.exp(), out.clamp(max=3), out.exp(), out.clamp(max=3) ** 2):
        known.check_numbers(0, losses, N)
    assert_refuses(
        MixingLoss, r"by 4 in this batch (Clamp's max), by 3 in", lambda: known.check_numbers(0, out.clamp(max=4), N)
    )
    assert_refuses(
        MixingLoss, "by 3 in this batch (Pow's exponent), by 2 in", lambda: known.check_numbers(0, out**3, N)
    )
