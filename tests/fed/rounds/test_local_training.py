"""The optimizer of a turn: its learning rates, and whose turn its factors have."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

import lora_dp.fed.rounds.client
from lora_dp.engine.recorder import recorder_of
from lora_dp.fed.rounds.messages import Task
from tests.fed.rounds.small_turns import COUNT, ONE_STEP, trainer_of
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
    trained, plain = [], lora_dp.fed.rounds.client.logits

    def noted(model: nn.Module, *arguments: Any) -> Tensor:
        recorder = recorder_of(model)
        assert recorder is not None
        trained.append("".join(f for f in "AB" if id(getattr(model[1], f"lora_{f}")) in recorder.trained))
        return plain(model, *arguments)

    monkeypatch.setattr(lora_dp.fed.rounds.client, "logits", noted)
    trainer = trainer_of(Adapted(), TRAINING, "la-lora")
    for index in range(3):
        trainer.train(1, make_examples(COUNT, 1), Task(index, 0, 2, trainer.workspace.state()))
    assert TRAINING.local_steps == 3 and "".join(trained) in ("ABABABABA", "BABABABAB")
