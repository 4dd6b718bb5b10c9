"""The optimizer of a turn: its learning rates, and whose turn its factors have."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_dp.fed.models.task_losses
from lora_dp.engine.recorder import recorder_of
from lora_dp.fed.rounds.local_training import SUM_WEIGHTS, LocalSteps, summing
from lora_dp.fed.rounds.messages import Task
from lora_dp.privacy.accounting import PoissonGaussian
from tests.fed.rounds.small_turns import COUNT, ONE_STEP, trainer_of
from tests.fed.rounds.summed import Featured
from tests.fed.small import TRAINING, Adapted, make_examples


def test_every_factor_b_has_its_own_learning_rate():
    model = Adapted()
    rates = {
        id(p): group["lr"]
        for group in replace(ONE_STEP, lr_ratio=4.0).make_optimizer(model).param_groups
        for p in group["params"]
    }
    found = {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert found == {name: 1.2 if name.endswith("lora_B") else 0.3 for name in found} and len(found) == len(rates) == 6


def test_factors_that_take_turns_go_on_where_the_round_before_ended(monkeypatch):
    """With an odd number of steps, too: else one factor would have more of them."""
    trained, plain = [], lora_dp.fed.models.task_losses.logits

    def noted(model: nn.Module, *arguments: Any) -> Tensor:
        recorder = recorder_of(model)
        assert recorder is not None
        trained.append("".join(f for f in "AB" if id(getattr(model[1], f"lora_{f}")) in recorder.trained))
        return plain(model, *arguments)

    monkeypatch.setattr(lora_dp.fed.models.task_losses, "logits", noted)
    trainer = trainer_of(Adapted(), TRAINING, "la-lora")
    for index in range(3):
        trainer.train(1, make_examples(COUNT, 1), Task(index, 0, 2, trainer.workspace.state()))
    assert TRAINING.local_steps == 3 and "".join(trained) in ("ABABABABA", "BABABABAB")


@pytest.mark.parametrize("training", [False, True])
def test_inside_summing_the_sums_alone_are_trained_and_dropout_is_off(training):
    """Afterwards all is as it was, also where it ended by an error."""
    model = Featured().train(training)
    model[2].train(not training)
    modes = [module.training for module in model.modules()]
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    images = torch.rand(5, 12, dtype=torch.float64)
    with pytest.raises(ZeroDivisionError), summing(model) as sums:
        assert model.training and model[4].training and not model[3].training
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
            f"4._sums.{name}" for name, _ in sums.named_parameters()
        }
        assert model(images).shape == (5, 4) and model(images).equal(model(images))
        assert sums.sensitivity == SUM_WEIGHTS.sensitivity
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained
    assert model(images).shape == (5, 3)


def test_sums_are_one_step_on_all_examples_clipped_where_there_is_noise():
    sums = Featured()[4].empty_sums(SUM_WEIGHTS)
    loud = LocalSteps.of_sums(PoissonGaussian(2.0, 1.0), sums, 8, range(20))
    assert (loud.count, loud.batch_size, loud.rows, loud.bound, loud.clipping) == (1, 20, 8, sums.sensitivity, "flat")
    assert loud.low_pass is None and not loud.regulate_noise and loud.sums
    [group] = loud.optimizer(Adapted()).param_groups
    assert group["lr"] == 1 and [id(p) for p in group["params"]] == [id(p) for p in sums.parameters()]
    assert LocalSteps.of_sums(PoissonGaussian(0.0, 1.0), sums, 8, range(20)).bound == float("inf")


def test_a_model_without_a_feature_head_has_no_sums():
    with pytest.raises(ValueError, match="choose features unit or mean"), summing(Adapted()):
        pass
