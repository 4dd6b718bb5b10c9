"""A client's turn: its seeds, its mechanism, its model's mode and dtype, what it leaves, what it may not spend."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_dp.fed.models.task_losses
from lora_dp.engine.data_loader import PrivateDataLoader
from lora_dp.engine.engine import PrivacyEngine
from lora_dp.engine.optimizer import PrivateOptimizer
from lora_dp.fed.data.examples import ImageExamples, TextExamples
from lora_dp.fed.rounds.client import Trainer
from lora_dp.fed.rounds.messages import Task
from lora_dp.fed.rounds.update_statistics import expected_noise
from lora_dp.nn.layers import DPLinear
from lora_dp.nn.lora_linear import DPLoRALinear
from lora_dp.privacy.accounting import PoissonGaussian
from lora_dp.privacy.adaptive_clipping import QuantileClipping
from lora_dp.privacy.clipping import AutomaticClipping, FlatClipping, PerLayerClipping
from lora_dp.privacy.sampling import PoissonSampler
from tests.fed.rounds.small_turns import COUNT, ONE_STEP, trainer_of
from tests.fed.small import TRAINING, Adapted, make_examples
from tests.isolation.text_models import VOCABULARY, Pooling

WHOLE = {"unit": "client", "noise_by": "client", "delta": 0.01}


class Wide(nn.Sequential):
    """In float32, with so many trained numbers that one turn's noise tells its deviation to 0.3 %."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), DPLoRALinear(12, 6, r=2), nn.Tanh(), DPLinear(6, 10_000))
        self[1].weight.requires_grad_(False)


def images() -> ImageExamples:
    examples = make_examples(COUNT, 1)
    return ImageExamples(examples._pixels, examples.labels, (0.5,), (0.5,))


def turn(trainer: Trainer, examples: Any = None) -> dict[str, Tensor]:
    """What client 1 sends in the first round."""
    task = Task(0, 0, trainer.workspace.layers.r, trainer.workspace.state())
    return trainer.train(1, images() if examples is None else examples, task).tensors


# Noise


def test_noise_is_secret_unless_asked_otherwise():
    asked = trainer_of(Adapted(), **WHOLE)
    trainer = Trainer(asked.workspace, asked.method, asked.training, asked.plan, asked.seed)
    task = Task(0, 0, 2, trainer.workspace.state())
    first, second = (trainer.train(1, make_examples(COUNT, 1), task).tensors for _ in range(2))
    assert not any(tensor.equal(second[name]) for name, tensor in first.items())


@pytest.mark.slow
def test_what_torch_draws_in_a_reproducible_run_follows_its_seed_and_its_place(monkeypatch):
    """Dropout masks, say: whatever state torch is in, which is left as it was."""
    trainer = trainer_of(Adapted())
    found, plain = [], lora_dp.fed.models.task_losses.logits

    def noted(*arguments: Any) -> Tensor:
        found.append(torch.rand(()).item())
        return plain(*arguments)

    monkeypatch.setattr(lora_dp.fed.models.task_losses, "logits", noted)
    state = trainer.workspace.state()
    for before, seed, client, index in ((1, 0, 1, 0), (2, 0, 1, 0), (2, 0, 2, 0), (2, 0, 1, 1), (2, 9, 1, 0)):
        with torch.random.fork_rng():
            torch.manual_seed(before)
            replace(trainer, seed=seed).train(client, make_examples(COUNT, 1), Task(index, 0, 2, state))
            assert torch.initial_seed() == before
    assert len(found) == 5 and found[0] == found[1] and len(set(found)) == 4


# The mechanism


@pytest.mark.parametrize(
    "clipping, rule", [("flat", FlatClipping), ("per_layer", PerLayerClipping), ("automatic", AutomaticClipping)]
)
@pytest.mark.parametrize("privacy", [{}, WHOLE, {"epsilon": None}])
def test_a_turn_clips_and_noises_examples_as_planned_or_not_at_all(privacy, clipping, rule):
    seen: list[tuple[int, PrivateOptimizer, PrivateDataLoader]] = []
    trainer = replace(
        trainer_of(Adapted(), clipping=clipping, max_grad_norm=0.7, **privacy), on_turn=lambda *turn: seen.append(turn)
    )
    turn(trainer, make_examples(COUNT, 1))
    [(client, optimizer, batches)] = seen
    event = trainer.plan.event(COUNT)
    assert client == 1 and batches.sample_rate == optimizer.sample_rate == TRAINING.batch_size / COUNT
    if privacy:
        assert (optimizer.noise_multiplier, optimizer.max_grad_norm) == (0, float("inf"))
        assert type(optimizer.mechanism.rule) is FlatClipping
    else:
        assert (optimizer.noise_multiplier, optimizer.max_grad_norm) == (event.noise_multiplier, 0.7)
        assert type(optimizer.mechanism.rule) is rule


def test_a_turn_follows_a_quantile_from_the_planned_bound_on():
    """Anew in each turn, since a client keeps nothing between turns; what the ledger has is the plan's noise."""
    seen: list[tuple[float, PrivateOptimizer]] = []
    trainer = replace(
        trainer_of(Adapted(), clipping="adaptive", max_grad_norm=0.7, clip_quantile=0.8),
        on_turn=lambda _, optimizer, loader: seen.append((optimizer.max_grad_norm, optimizer)),
    )
    for _ in range(2):
        turn(trainer, make_examples(COUNT, 1))
    for begun, optimizer in seen:
        assert begun == 0.7 != optimizer.max_grad_norm
        assert isinstance(optimizer.mechanism.rule, QuantileClipping)
        planned = trainer.plan.event(COUNT).noise_multiplier
        assert optimizer.noise_multiplier == planned
        assert optimizer.mechanism.rule.count_noise == pytest.approx(5 * planned)
    assert expected_noise(trainer, Task(0, 0, 0, trainer.workspace.state()), COUNT, 1.0) is None


@pytest.mark.parametrize("privacy", [{"max_grad_norm": 0.5}, {**WHOLE, "max_update_norm": 0.5}])
def test_the_noise_of_a_turn_has_the_planned_deviation(privacy, monkeypatch):
    """With nobody in its batch: to one percent, where the plan's own numbers are off by none."""
    monkeypatch.setattr(PoissonSampler, "draw", lambda self: [])
    trainer = trainer_of(Wide(), **privacy)
    start = trainer.workspace.state()
    sent = turn(trainer)
    noise = torch.cat([(tensor.double() - start[name].double()).flatten() for name, tensor in sent.items()])
    deviation = trainer.plan.event(COUNT).noise_multiplier * 0.5
    if not trainer.plan.client_adds_noise:
        deviation *= ONE_STEP.learning_rate / ONE_STEP.batch_size
    assert abs(float(noise.std()) / deviation - 1) < 0.01
    assert abs(float(noise.mean())) < 4 * deviation / len(noise) ** 0.5
    assert all(tensor.dtype == start[name].dtype == torch.float32 for name, tensor in sent.items())


def test_a_change_that_is_not_finite_is_to_the_last_bit_no_change(caplog):
    """Noise that was rounded otherwise would tell that training diverged."""
    sent = [turn(trainer_of(Wide(), replace(ONE_STEP, learning_rate=rate), **WHOLE)) for rate in (0.0, 1e300)]
    assert all(tensor.equal(sent[1][name]) for name, tensor in sent[0].items())
    assert "training failed" not in caplog.text


# What was spent


@pytest.mark.parametrize(
    "changed",
    [
        lambda asked: asked.update(noise_multiplier=asked["noise_multiplier"] * 0.999),
        lambda asked: asked.update(
            data_loader=torch.utils.data.DataLoader(
                asked["data_loader"].dataset, batch_size=TRAINING.batch_size + 1, collate_fn=list
            )
        ),
    ],
    ids=["noise", "rate"],
)
def test_a_turn_that_is_less_private_than_its_plan_sends_nothing(changed, monkeypatch):
    make_private = PrivacyEngine.make_private

    def weakened(self: PrivacyEngine, **asked: Any) -> Any:
        changed(asked)
        return make_private(self, **asked)

    monkeypatch.setattr(PrivacyEngine, "make_private", weakened)
    with pytest.raises(RuntimeError, match="not those that the budget was planned for"):
        turn(trainer_of(Adapted()), make_examples(COUNT, 1))


def another_step(optimizer: PrivateOptimizer) -> None:
    optimizer.step_on_empty_batch()


def other_steps(optimizer: PrivateOptimizer) -> None:
    optimizer.ledger.append(PoissonGaussian(2 * optimizer.noise_multiplier, optimizer.sample_rate), 1)


@pytest.mark.parametrize("more", [another_step, other_steps])
def test_a_turn_of_more_steps_than_planned_sends_nothing(more: Callable[[PrivateOptimizer], None]):
    trainer = replace(trainer_of(Adapted()), on_turn=lambda client, optimizer, batches: more(optimizer))
    with pytest.raises(RuntimeError, match="not those that the budget was planned for"):
        turn(trainer, make_examples(COUNT, 1))


# The model


@pytest.mark.parametrize("privacy", [{}, WHOLE])
def test_a_model_that_was_evaluated_trains_in_training_mode_again(privacy, monkeypatch):
    modes, plain = [], lora_dp.fed.models.task_losses.logits

    def noted(model: nn.Module, *arguments: Any) -> Tensor:
        modes.append(model.training)
        return plain(model, *arguments)

    monkeypatch.setattr(lora_dp.fed.models.task_losses, "logits", noted)
    trainer = trainer_of(Adapted().eval(), **privacy)
    turn(trainer, make_examples(COUNT, 1))
    assert modes and all(modes)


@pytest.mark.parametrize("privacy", [{}, WHOLE, {"epsilon": None}])
def test_no_gradient_of_a_client_is_left_on_the_model(privacy):
    trainer = trainer_of(Adapted(), **privacy)
    turn(trainer, make_examples(COUNT, 1))
    assert all(p.grad is None for p in trainer.workspace.model.parameters())


@pytest.mark.parametrize("masked", [True, False])
def test_a_text_is_padded_to_its_own_width_so_that_a_model_may_look_at_padding(masked, caplog):
    """No other text's length is in it: nothing is refused, and each adds what it adds alone."""
    lengths = torch.tensor([9, 4, 3, 6])
    ids = torch.randint(1, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    ids *= torch.arange(9) < lengths[:, None]
    trainer = trainer_of(Pooling(masked=masked), replace(ONE_STEP, batch_size=4))
    examples = TextExamples(ids, lengths, torch.tensor([0, 1, 2, 1]), pad_id=0)
    with caplog.at_level(logging.ERROR):
        turn(trainer, examples)
    assert caplog.text == ""
    # multiples of 8, and no wider than the longest
    assert [shape.width for shape in examples.shapes([0, 1, 2, 3])] == [9, 8, 8, 8]
