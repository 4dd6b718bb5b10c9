"""Silent ways to break differential privacy: clipping something else than each example's own gradient.

Each promise is a check that passes on the real engine. Beside it a bug is planted, and the same check must fail.
"""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_dp.privacy.clipping
import lora_dp.privacy.mechanism
from lora_dp import DPLoRALinear
from lora_dp.nn.per_example import Slot
from lora_dp.ops.per_example_norm import ghost_sq_norm
from lora_dp.ops.registry import reference_only
from lora_dp.privacy.mechanism import Mechanism
from tests.models import cross_entropy, examples, flat, mlp, one_by_one, take_step
from tests.support import RULES, assert_close, brute_force, clip_and_sum, make_private

# Clipping each example, not the batch


def check_each_example_is_clipped(rule: str) -> None:
    model, batch, bound = mlp(), examples(7), 0.2
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    gradients = brute_force(model, cross_entropy, one_by_one(batch), names)
    expected = clip_and_sum(gradients, rule, bound, lambda name: name.rpartition(".")[0])
    optimizer = make_private(model, batch_size=7, max_grad_norm=bound, clipping=rule)
    assert_close(flat(take_step(model, optimizer, batch)), flat(expected))


@pytest.mark.parametrize("rule", RULES)
def test_each_example_is_clipped(rule):
    check_each_example_is_clipped(rule)


@pytest.mark.parametrize("rule", RULES)
def test_clipping_the_batch_is_caught(rule, bug):
    def clip_the_sum(self: Mechanism, sums: list[Tensor]) -> list[Tensor]:
        norm = math.sqrt(sum(float(s.square().sum()) for s in sums))
        return [s * min(1.0, self.rule.max_grad_norm / norm) for s in sums]

    bug.setattr(Mechanism, "coefficients", lambda self, sq_norms, layers, count, mask: torch.ones_like(sq_norms))
    bug.setattr(Mechanism, "release", clip_the_sum)
    with pytest.raises(AssertionError):
        check_each_example_is_clipped(rule)


# An example that is not finite


def check_non_finite_examples_contribute_zero(method: str, rule: str) -> None:
    x, y = examples(6)
    clean = mlp()
    expected = flat(
        take_step(
            clean,
            make_private(
                clean, batch_size=6, max_grad_norm=0.3, norm_method=method, clipping=rule, loss_reduction="sum"
            ),
            (x[2:], y[2:]),
            lambda m, b: 4 * cross_entropy(m, b),
        )
    )
    x[0], x[1] = math.nan, math.inf
    model = mlp()
    optimizer = make_private(
        model, batch_size=6, max_grad_norm=0.3, norm_method=method, clipping=rule, loss_reduction="sum"
    )
    actual = flat(take_step(model, optimizer, (x, y), lambda m, b: 6 * cross_entropy(m, b)))
    assert torch.isfinite(actual).all()
    assert_close(actual, expected)
    assert optimizer.steps_taken == optimizer.ledger.steps == 1
    assert int(optimizer.batch.non_finite_examples) == 2


@pytest.mark.parametrize("way", [contextlib.nullcontext, reference_only])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", ["direct", "ghost"])
def test_non_finite_examples_contribute_zero(method, rule, way):
    with way():
        check_non_finite_examples_contribute_zero(method, rule)


def test_coefficients_that_let_nan_through_are_caught(bug):
    bug.setattr(lora_dp.privacy.clipping, "_exclude_non_finite", lambda coefficients, sq_norms: coefficients)
    with pytest.raises(AssertionError):
        check_non_finite_examples_contribute_zero("direct", "flat")


def test_zero_times_nan_is_caught(bug):
    bug.setattr(lora_dp.privacy.mechanism, "clipped_sum_kept", lambda g, c: torch.einsum("n,n...->...", c.to(g), g))
    with pytest.raises(AssertionError), reference_only():
        check_non_finite_examples_contribute_zero("direct", "flat")


# One adapter used twice


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = DPLoRALinear(6, 6, r=2)
        nn.init.normal_(self.layer.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


def check_uses_add_up_before_the_norm(method: str) -> None:
    torch.manual_seed(0)
    model, batch = Twice().train(), examples(5)
    gradients = brute_force(model, cross_entropy, one_by_one(batch), {"layer.lora_A", "layer.lora_B"})
    expected = clip_and_sum(gradients, "flat", 0.05, str)
    optimizer = make_private(model, batch_size=5, max_grad_norm=0.05, norm_method=method)
    assert_close(flat(take_step(model, optimizer, batch)), flat(expected))


@pytest.mark.parametrize("method", ["direct", "ghost"])
def test_uses_add_up_before_the_norm(method):
    check_uses_add_up_before_the_norm(method)


def test_adding_norms_of_uses_is_caught(bug):
    def planted(self: Slot) -> Tensor:
        norms = torch.stack([ghost_sq_norm(*pair.factors) for pair in self._pairs]).sum(0)
        self._settle()
        return norms.sqrt()

    bug.setattr(Slot, "norms", planted)
    with pytest.raises(AssertionError):
        check_uses_add_up_before_the_norm("ghost")


# Mixed precision


def check_large_half_gradients_are_clipped_right(kind: str, method: str) -> None:
    """Gradients whose squared norm is beyond 65504, or needs more digits than bfloat16 has, keep norm C."""
    bound = 0.5
    model = mlp(dtype=torch.float16 if kind == "float16" else torch.float32)
    optimizer = make_private(model, batch_size=4, max_grad_norm=bound, norm_method=method, lr=0.0)
    norms = []
    for x, y in one_by_one(examples(12)):
        optimizer.batch.expect(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            logits = model((x * 4).to(model[0].weight.dtype))
            loss = 120 * F.cross_entropy(logits.float(), (y + logits.argmin()) % 3)
        loss.backward()
        slots = list(optimizer._recorder.current.slots.values())
        with torch.no_grad():
            norms.append(math.sqrt(sum(float(slot.norms().square().sum()) for slot in slots)))
        optimizer.signal_skip_step()
        optimizer.step()
        released = flat({str(key): value for key, value in optimizer.batch.collect().items()})
        if norms[-1] > bound:
            assert bound * (1 - 1e-4) < float(released.norm()) <= bound * (1 + 1e-7)
    assert max(norms) > 256


@pytest.mark.parametrize("method", ["direct", "ghost"])
@pytest.mark.parametrize("kind", ["float16", "autocast"])
def test_large_half_gradients_are_clipped_right(kind, method):
    check_large_half_gradients_are_clipped_right(kind, method)


@pytest.mark.parametrize(("kind", "dtype"), [("float16", torch.float16), ("autocast", torch.bfloat16)])
def test_norms_in_half_precision_are_caught(kind, dtype, bug):
    norms = Slot.norms
    bug.setattr(Slot, "norms", lambda self: norms(self).to(dtype).float())
    with pytest.raises(AssertionError):
        check_large_half_gradients_are_clipped_right(kind, "direct")


def check_sums_keep_float32_inside_autocast(method: str) -> None:
    """backward() and step() called inside autocast give the bits that they give outside."""
    released = []
    for inside in (False, True):
        model, (x, y) = mlp(), examples(50)
        optimizer = make_private(model, batch_size=50, max_grad_norm=0.5, norm_method=method)
        optimizer.batch.expect(50)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss.backward()
            optimizer.step()
        released.append(flat({name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert torch.equal(*released)


@pytest.mark.parametrize("way", [contextlib.nullcontext, reference_only])
@pytest.mark.parametrize("method", ["direct", "ghost"])
def test_sums_keep_float32_inside_autocast(method, way):
    with way():
        check_sums_keep_float32_inside_autocast(method)


def test_half_sums_inside_autocast_are_caught(bug):
    bug.setattr(lora_dp.privacy.mechanism, "clipped_sum_kept", lambda g, c: (c.to(g) @ g.flatten(1)).view(g.shape[1:]))
    with pytest.raises(AssertionError), reference_only():
        check_sums_keep_float32_inside_autocast("direct")
