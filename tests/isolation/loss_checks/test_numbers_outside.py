"""Numbers by which losses are multiplied outside of the model."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_dp import IsolationError, PrivacyEngine
from lora_dp.isolation.loss_checks.graph import Outputs
from lora_dp.isolation.loss_checks.own_scales import numbers_outside
from tests.isolation.loss_checks.own_losses import Logits, N, batch, rows
from tests.models import assert_refuses
from tests.support import make_private

OUTSIDE: dict[str, tuple[Callable[[Tensor, float], Tensor], str]] = {
    "a bound": (lambda losses, c: losses.clamp(max=c), "6 (Clamp's max), that of an earlier one by 5 (Clamp's max)"),
    "addcmul": (lambda losses, c: torch.addcmul(torch.zeros(()), losses, torch.ones(()), value=c), "Addcmul's value"),
    "a share": (lambda losses, c: torch.add(torch.zeros(()), losses, alpha=c), "6 (Add's alpha)"),
    "a power": (lambda losses, c: losses.clamp(min=1.0) ** c, "6 (Pow's exponent)"),
    "what the constant is divided by": (lambda losses, c: torch.div(torch.tensor(c), 1 + losses), "6 (Div's self)"),
    "Huber": (
        lambda losses, c: F.huber_loss(losses, torch.zeros_like(losses), reduction="none", delta=c),
        "HuberLoss's delta",
    ),
    "two": (lambda losses, c: losses.clamp(max=7).clamp(max=c) ** 2, "by 6 (Clamp's max), that of"),
}


def outside(losses: Callable[[Tensor, float], Tensor], by_example: bool) -> Callable[[int, float], None]:
    model = Logits(lambda out, _: out.mean(1))
    optimizer = make_private(model.train(), batch_size=N)

    def step(n: int, number: float) -> None:
        optimizer.zero_grad()
        found = losses(F.cross_entropy(model(batch(n)), torch.arange(n) % 3, reduction="none"), number)
        optimizer.backward(found) if by_example else found.mean().backward()
        optimizer.batch.expect(n)
        optimizer.step()

    return step


@pytest.mark.slow
@pytest.mark.parametrize("by_example", [False, True])
@pytest.mark.parametrize("name", OUTSIDE)
def test_a_number_of_the_batch_in_losses_outside_of_the_model_is_refused(name, by_example):
    losses, words = OUTSIDE[name]
    step = outside(losses, by_example)
    step(1, 4.0)  # one example's own
    for n in (N, 1, 5):
        step(n, 5.0)
    step(1, 4.0)
    assert_refuses(IsolationError, words, lambda: step(N, 6.0))
    step(9, 5.0)


def test_a_number_outside_of_the_model_is_refused_where_the_criterion_was_tested():
    def criterion(out: Tensor, number: float) -> Tensor:
        return out.square().sum(1).clamp(max=number).exp().mean().log().exp()

    engine, model = PrivacyEngine("rdp", reproducible_seed=0), Logits(lambda out, _: out.mean(1))
    optimizer = make_private(model.train(), batch_size=N, engine=engine)
    engine.check_isolation(model, (batch(N), torch.zeros(N)), lambda out, y: criterion(out, 5.0))
    criterion(model(batch(N)), 5.0).backward()
    optimizer.zero_grad()
    assert_refuses(
        IsolationError, "bounded or bent by 6 (Clamp's max)", lambda: criterion(model(batch(N)), 6.0).backward()
    )


def test_losses_that_are_bounded_otherwise_by_turns_are_taken():
    step = outside(lambda losses, c: losses.clamp(max=c) ** 2 if c > 5 else losses.clamp(max=c), False)
    for number in (5.0, 6.0, 5.0, 6.0):
        step(N, number)


def test_numbers_beside_the_way_to_the_outputs_are_nobodys():
    out, beside = rows(), rows()
    outputs = Outputs.of([out.clamp(max=3)])
    joined = (outputs.tensors[0] ** 2 * 3 / 8 + beside**5).sum()
    assert numbers_outside(joined, outputs) == (("Pow's exponent", 2.0),)
    assert numbers_outside(beside.sum(), outputs) == ()
