"""One finished pass against the clipped sum of brute-force gradients in float64."""

import pytest
import torch
from torch import Tensor, nn

from lora_dp import PrivateOptimizer
from lora_dp.engine.logical_batch import Clipped
from lora_dp.privacy.mechanism import total
from tests.models import cross_entropy, examples, mlp, one_by_one
from tests.support import RULES, assert_close, brute_force, clip_and_sum, make_private

BOUND = 0.3


def clipped(
    optimizer: PrivateOptimizer, model: nn.Module, batch: tuple[Tensor, Tensor], mask: Tensor | None
) -> Clipped:
    cross_entropy(model, batch).backward()
    return optimizer.clip(optimizer.recorder.take(), mask)


@pytest.mark.parametrize("phases", ["A", "B", "AB"])
@pytest.mark.parametrize("rule", RULES)
def test_the_sums_are_those_of_the_definition(rule, phases):
    """Each phase after another, for the layers among which a per-layer bound is shared are those of the phase."""
    batch, mask, model = examples(5), torch.tensor([True, False, True, True, False]), mlp()
    optimizer = make_private(model, batch_size=5, max_grad_norm=BOUND, clipping=rule)
    for chosen in ("AB", phases):
        optimizer.set_phases(chosen)
        frozen = {"A": {"0.lora_B"}, "B": {"0.lora_A"}, "AB": set[str]()}[chosen]
        names = {name: id(p) for name, p in model.named_parameters() if p.requires_grad and name not in frozen}
        found = clipped(optimizer, model, batch, mask)
        assert found.sums.keys() == set(names.values())
        gradients = brute_force(model, cross_entropy, one_by_one(batch), set(names))
        kept = [gradient for gradient, shown in zip(gradients, mask, strict=True) if shown]
        for name, expected in clip_and_sum(kept, rule, BOUND, lambda name: name.split(".")[0]).items():
            assert_close(total(found.sums[names[name]]).double(), expected)


def test_examples_that_are_not_finite_are_counted_and_add_nothing():
    batch, model = examples(4), mlp()
    optimizer = make_private(model, batch_size=4, max_grad_norm=BOUND)
    whole = clipped(optimizer, model, batch, torch.tensor([True, False, True, True]))
    batch[0][1] = torch.nan
    found = clipped(optimizer, model, batch, None)
    assert int(whole.non_finite) == 0 and int(found.non_finite) == 1
    for key, part in found.sums.items():
        torch.testing.assert_close(total(part), total(whole.sums[key]))


def test_a_pass_without_examples_has_no_sums():
    model = mlp()
    optimizer = make_private(model, batch_size=4, max_grad_norm=BOUND)
    x, y = examples(0)
    (0 * model(x).sum()).backward()
    assert optimizer.clip(optimizer.recorder.take(), None) == Clipped({}, 0)
