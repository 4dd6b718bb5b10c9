"""Silent ways to break differential privacy: parameters that are not covered, and examples that meet.

Each promise is a check that passes on the real engine. Beside it a bug is planted, and the same check must fail.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_dp.engine.engine
import lora_dp.engine.hooks
import lora_dp.engine.optimizer
import lora_dp.engine.validation
from lora_dp import DPLinear, DPLoRALinear
from lora_dp.isolation.check import Passed
from tests.models import assert_refuses, examples, mlp, snapshot, take_step
from tests.support import make_private

# Every trainable parameter is covered


def check_uncovered_parameter_is_refused() -> None:
    model = nn.Sequential(DPLoRALinear(6, 8, r=2), nn.Linear(8, 3))
    assert_refuses(ValueError, "'1.weight' is trainable", lambda: make_private(model, batch_size=4))


def test_uncovered_parameter_is_refused_by_name():
    check_uncovered_parameter_is_refused()


def test_overlooking_an_uncovered_parameter_is_caught(bug):
    cover = lora_dp.engine.validation.cover
    bug.setattr(lora_dp.engine.engine, "cover", lambda model: cover(model[0]))
    bug.setattr(lora_dp.engine.optimizer, "check_optimizer", lambda optimizer, covered: None)
    with pytest.raises(AssertionError):
        check_uncovered_parameter_is_refused()


def check_parameter_added_later_is_refused() -> None:
    model = mlp()
    optimizer = make_private(model, batch_size=4)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(5, 7))]})
    before = snapshot(model)
    assert_refuses(ValueError, "shape (5, 7)", lambda: take_step(model, optimizer, examples(4)))
    assert optimizer.ledger.steps == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_parameter_added_later_is_refused():
    check_parameter_added_later_is_refused()


def test_forgetting_parameters_added_later_is_caught(bug):
    bug.setattr(lora_dp.engine.optimizer, "check_optimizer", lambda optimizer, covered: None)
    with pytest.raises(AssertionError):
        check_parameter_added_later_is_refused()


# Nothing mixes examples


def check_batch_norm_is_refused() -> None:
    for norm in (nn.BatchNorm1d(8), nn.BatchNorm1d(8, affine=False), nn.SyncBatchNorm(8).requires_grad_(False)):
        model = nn.Sequential(DPLoRALinear(6, 8, r=2), nn.Sequential(norm.requires_grad_(False)))
        assert_refuses(ValueError, f"'1.0' is a {type(norm).__name__}", lambda m=model: make_private(m, batch_size=4))


def test_batch_norm_is_refused_by_name():
    check_batch_norm_is_refused()


def test_overlooking_batch_norm_is_caught(bug):
    bug.setattr(nn.modules.batchnorm, "_BatchNorm", type("Never", (), {}))
    with pytest.raises(AssertionError):
        check_batch_norm_is_refused()


class Balanced(nn.Module):
    """Two experts, with a balancing loss over the batch as mixtures of experts have it."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = DPLinear(6, 2), DPLinear(6, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        share = self.router(x).softmax(-1)
        loss = F.cross_entropy(self.head(x) * share[:, :1], labels) + share.mean(0).square().sum()
        return {"loss": loss, "logits": self.head(x)}


def check_balancing_loss_is_refused() -> None:
    torch.manual_seed(0)
    model = Balanced().train()
    make_private(model, batch_size=4)
    x, y = examples(4)
    assert_refuses(RuntimeError, "The loss mixes examples: the gradient of example 0 at 'router'", lambda: model(x, y))


def test_balancing_loss_is_refused_on_the_first_batch():
    check_balancing_loss_is_refused()


def test_no_isolation_check_is_caught(bug):
    bug.setattr(lora_dp.engine.hooks, "check_isolation", lambda *args, **options: Passed())
    with pytest.raises(AssertionError):
        check_balancing_loss_is_refused()
