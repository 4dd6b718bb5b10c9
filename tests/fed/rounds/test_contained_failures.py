"""That training fails on private data is no bit: what an example adds to the sum is a function of it alone."""

import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lora_dp.fed.models.task_losses
from lora_dp.engine.engine import PrivacyEngine
from lora_dp.engine.logical_batch import Clipped
from lora_dp.engine.optimizer import PrivateOptimizer
from lora_dp.errors import IsolationError
from lora_dp.fed.rounds.client import Trainer
from lora_dp.fed.rounds.contained_failures import GivenUp
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.messages import Task, Update
from lora_dp.privacy.adaptive_clipping import QuantileClipping
from lora_dp.privacy.mechanism import total
from lora_dp.privacy.sampling import PoissonSampler
from tests.fed.rounds.failing_models import COUNT, FAILURES, ODD, ONE_STEP, WHOLE, Mixing, failing
from tests.fed.small import Doubles, make_examples, make_federation


def without(examples: Doubles) -> Doubles:
    return examples.subset([i for i in range(len(examples)) if i != ODD])


def sums_of_a_turn(federation: Federation, examples: Doubles) -> tuple[list[dict[str, Tensor]], Update]:
    """What each step of client 1 would have released without noise, and its update."""
    steps: list[dict[str, Tensor]] = []
    sums: dict[int, Tensor] = {}
    take, release = PrivateOptimizer.take, PrivateOptimizer._release

    def noted(self: PrivateOptimizer, clipped: Clipped, n: int, kept: int) -> None:
        for key, part in clipped.sums.items():
            sums[key] = sums.get(key, 0) + total(part).double()
        take(self, clipped, n, kept)

    def released(self: PrivateOptimizer) -> None:
        names = {id(p): name for name, p in federation.model.named_parameters()}
        steps.append({names[key]: tensor for key, tensor in sums.items()})
        sums.clear()
        release(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrivateOptimizer, "take", noted)
        patch.setattr(PrivateOptimizer, "_release", released)
        update = federation.trainer.train(1, examples, Task(0, 0, 2, federation.server.state))
    return steps, update


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dp-lora", "flat-lora:ffa-lora", "deer"])
@pytest.mark.parametrize("kind", FAILURES)
def test_an_example_on_which_training_fails_adds_nothing_and_takes_nothing_away(kind, method, monkeypatch):
    federation = make_federation(method, ONE_STEP)
    expected, _ = sums_of_a_turn(federation, without(make_examples(COUNT, 1)))
    found, update = sums_of_a_turn(federation, failing(kind, monkeypatch))
    assert len(found) == len(expected) == 1
    assert found[0].keys() == expected[0].keys()
    assert max(float(tensor.abs().max()) for tensor in expected[0].values()) > 0.01
    for name, tensor in expected[0].items():
        torch.testing.assert_close(found[0][name], tensor, rtol=0, atol=1e-12)
    assert {name: tensor.shape for name, tensor in update.tensors.items()} == {
        name: tensor.shape for name, tensor in federation.server.state.items() if federation.method.trains(name, 0, 0)
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAILURES)
def test_an_example_on_which_training_fails_is_not_counted_and_every_other_is_once(kind, monkeypatch):
    """Where the bound follows a quantile. Everybody is drawn, and lies within a bound of 1000."""
    counts: list[float] = []
    noisy = QuantileClipping.follow
    monkeypatch.setattr(
        QuantileClipping, "follow", lambda self, count, size: [counts.append(float(count)), noisy(self, count, size)]
    )
    monkeypatch.setattr(PoissonSampler, "draw", lambda self: list(range(self.size)))
    federation = make_federation("dp-lora", ONE_STEP, clipping="adaptive", max_grad_norm=1000.0)
    sums_of_a_turn(federation, failing(kind, monkeypatch))
    assert counts == [(COUNT - 1) / 2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAILURES)
def test_the_steps_and_the_ledger_are_those_of_any_turn(kind, monkeypatch):
    """A failure in the second of three steps ends nothing."""
    steps = []
    federation = make_federation("dp-lora", replace(ONE_STEP, local_steps=3))
    draws = [[0, 1], [3, ODD, 5], [6, ODD]]
    monkeypatch.setattr(PoissonSampler, "draw", lambda self: draws.pop(0))
    examples = failing(kind, monkeypatch)
    released, _ = sums_of_a_turn(federation, examples)
    assert len(released) == 3 and all(step for step in released)
    draws = [[1], [2], [ODD]]
    federation.trainer.train(1, examples, Task(0, 0, 2, federation.server.state), lambda: steps.append(1))
    assert len(steps) == 3


@pytest.mark.slow
def test_where_training_fails_on_all_the_update_is_noise_alone(monkeypatch, caplog):
    """In every step, as for an empty batch: of the size that the plan says."""

    def raising(*_: Any) -> Tensor:
        raise IndexError("index out of range in self")

    monkeypatch.setattr(lora_dp.fed.models.task_losses, "logits", raising)
    federation = make_federation("dp-lora", ONE_STEP, reproducible=False)
    steps, _ = sums_of_a_turn(federation, make_examples(COUNT, 1))
    assert steps == [{}]
    start = federation.server.state["4.weight"]
    task = Task(0, 0, 2, federation.server.state)
    with caplog.at_level(logging.ERROR):
        moved = torch.stack(
            [federation.trainer.train(1, make_examples(COUNT, 1), task).tensors["4.weight"] - start for _ in range(200)]
        )
    deviation = federation.plan.event(COUNT).noise_multiplier * ONE_STEP.learning_rate / COUNT
    assert abs(float(moved.std()) / deviation - 1) < 0.06 and abs(float(moved.mean())) < deviation / 10
    assert "training failed 13 times on an example" in caplog.text and "first time: IndexError" in caplog.text


def test_a_batch_of_fewer_rows_than_were_asked_for_contributes_nothing(monkeypatch, caplog):
    """A mask for more rows would fit a single one, too."""
    federation, examples = make_federation("dp-lora", ONE_STEP), make_examples(COUNT, 1)
    whole = type(examples).batch
    monkeypatch.setattr(type(examples), "batch", lambda self, rows: whole(self, list(rows)[:1]))
    with caplog.at_level(logging.ERROR):
        steps, _ = sums_of_a_turn(federation, examples)
    assert steps == [{}] and "was given 1 examples where there were" in caplog.text


@pytest.mark.slow
def test_a_model_that_mixes_examples_trains_on_each_alone_and_its_owner_is_told(caplog):
    federation = make_federation("dp-lora", ONE_STEP)
    model = federation.model
    model[1] = Mixing(model[1])
    trainer: Trainer = replace(federation.trainer, workspace=type(federation.workspace)(model))
    federation.trainer, federation.workspace = trainer, trainer.workspace
    federation.server.state = trainer.workspace.state()
    examples = make_examples(COUNT, 1)
    with caplog.at_level(logging.ERROR):
        [together], _ = sums_of_a_turn(federation, examples)
    assert "THE MODEL MIXES EXAMPLES" in caplog.text and "contributed nothing" not in caplog.text
    alone = [sums_of_a_turn(federation, examples.subset([i]))[0][0] for i in range(COUNT)]
    for name, tensor in together.items():
        torch.testing.assert_close(tensor, sum(part[name] for part in alone), rtol=0, atol=1e-12)


def test_once_it_is_seen_to_mix_nothing_is_trained_together_any_more(monkeypatch):
    """What passes a check in one part of a batch is no better for it."""
    plain, sizes = lora_dp.fed.models.task_losses.logits, []

    def once(model: nn.Module, batch: dict[str, Tensor], *precision: Any) -> Tensor:
        sizes.append(len(batch["pixel_values"].unique(dim=0)))  # rows beyond are copies
        if len(sizes) == 2:
            raise IsolationError("seen in one batch alone")
        return plain(model, batch, *precision)

    monkeypatch.setattr(lora_dp.fed.models.task_losses, "logits", once)
    federation = make_federation("dp-lora", replace(ONE_STEP, local_steps=3))
    sums_of_a_turn(federation, make_examples(COUNT, 1))
    assert sizes == [COUNT, COUNT] + 2 * COUNT * [1]


def test_a_failure_is_told_as_what_it_is_and_costs_few_passes(monkeypatch, caplog):
    """Parts of the batch in which nothing fails are trained on together: halving takes twice the logarithm."""
    federation, examples = make_federation("dp-lora", ONE_STEP), failing("forward", monkeypatch)
    raising, sizes = lora_dp.fed.models.task_losses.logits, []

    def counted(model: nn.Module, batch: dict[str, Tensor], *precision: Any) -> Tensor:
        # Copies fill a part that is not full.
        sizes.append(len({tuple(image.flatten().tolist()) for image in batch["pixel_values"]}))
        return raising(model, batch, *precision)

    monkeypatch.setattr(lora_dp.fed.models.task_losses, "logits", counted)
    with caplog.at_level(logging.ERROR):
        sums_of_a_turn(federation, examples)
    assert len(sizes) <= 1 + 2 * math.ceil(math.log2(COUNT)) and sizes.count(1) == 3
    assert "Client 1, round 1: training failed 1 times on an example" in caplog.text and "MIXES" not in caplog.text


def test_a_model_that_mixes_is_refused_at_the_start_on_public_data():
    federation = make_federation("dp-lora")
    federation.check_model()
    federation.model[1] = Mixing(federation.model[1])
    with pytest.raises(IsolationError, match="change with the other examples"):
        federation.check_model()
    plain = make_federation("dp-lora", epsilon=None)
    plain.model[1] = Mixing(plain.model[1])
    plain.check_model()


@pytest.mark.parametrize("privacy", [{}, WHOLE, {"epsilon": None}], ids=["example", "client", "none"])
def test_no_turn_leaves_its_way_of_trying_to_whoever_trains_the_model_next(privacy, monkeypatch):
    federation, found = make_federation("dp-lora", ONE_STEP, **privacy), []

    def noted(client: int, optimizer: PrivateOptimizer, batches: Any) -> None:
        found.append(optimizer.recorder)
        assert optimizer.recorder.per_example == (privacy != WHOLE)

    trainer = replace(federation.trainer, on_turn=noted)
    task = Task(0, 0, 2, federation.server.state)
    for examples in (make_examples(COUNT, 1), failing("fetch", monkeypatch)):
        try:
            trainer.train(1, examples, task)
        except OSError:
            assert privacy == {"epsilon": None}
        recorder = found[-1]
        assert recorder.per_example and not recorder.sizes_fixed
        assert not recorder.tested and recorder.widths is None and not recorder.padding_varies
    assert len(found) == 2


def test_what_a_model_was_trained_on_before_a_turn_is_not_remembered_in_it():
    federation, found = make_federation("dp-lora", ONE_STEP), []
    model, examples = federation.model, make_examples(COUNT, 1)
    _, optimizer, _ = PrivacyEngine("rdp", reproducible_seed=0).make_private(
        model=model,
        optimizer=ONE_STEP.make_optimizer(model),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        data_loader=DataLoader(examples, batch_size=4, collate_fn=examples.collate),
    )
    batch = examples.batch(range(5))
    optimizer.backward(nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"], reduction="none"))
    optimizer.zero_grad()
    assert optimizer.recorder.tested and optimizer.recorder.widths is not None
    trainer = replace(
        federation.trainer,
        on_turn=lambda client, own, batches: found.append(
            (own.recorder, dict(own.recorder.tested), own.recorder.widths)
        ),
    )
    trainer.train(1, examples, Task(0, 0, 2, federation.server.state))
    assert found == [(optimizer.recorder, {}, None)]


def test_that_a_turn_is_given_up_says_nothing_of_the_data():
    error = OSError("cannot read the photograph of Jane")
    given_up = GivenUp(error)
    assert given_up.error is error and "Jane" not in f"{given_up} {given_up!r}"


def test_without_privacy_a_failure_is_one(monkeypatch):
    federation = make_federation("dp-lora", ONE_STEP, epsilon=None)
    with pytest.raises(OSError, match="Jane"):
        federation.trainer.train(1, failing("fetch", monkeypatch), Task(0, 0, 2, federation.server.state))


def test_an_isolation_error_does_not_come_out_of_a_turn(monkeypatch):
    def raising(*_: Any) -> Tensor:
        raise IsolationError("seen in one batch alone")

    monkeypatch.setattr(lora_dp.fed.models.task_losses, "logits", raising)
    federation = make_federation("dp-lora")
    assert federation.run_round().failed == []
