"""Whole clients on whose data training fails: their update changes nothing, and nobody is told."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_dp.fed.models.task_losses
from lora_dp.fed.rounds.messages import Task
from lora_dp.fed.rounds.seeds import Stream
from lora_dp.privacy.sampling import PoissonSampler
from tests.fed.rounds.failing_models import COUNT, FAILURES, ODD, ONE_STEP, WHOLE, Mixing, failing
from tests.fed.small import TRAINING, Doubles, make_examples, make_federation


@pytest.mark.parametrize("kind", ["forward", "backward", "deep", "batch"])
@pytest.mark.parametrize("noise_by", ["client", "server"])
@pytest.mark.parametrize("batch_size", [2, 1000])
def test_where_training_fails_on_public_data_no_run_of_whole_clients_begins(kind, noise_by, batch_size, monkeypatch):
    """It would end in order, with noise alone."""
    training = replace(ONE_STEP, batch_size=batch_size)
    federation = make_federation("dp-lora", training, noise_by=noise_by, **WHOLE)
    before = federation.workspace.state()
    federation.check_model()
    assert all(tensor.equal(before[name]) for name, tensor in federation.workspace.state().items())
    FAILURES[kind][1](monkeypatch, federation.validation.batch([0])["pixel_values"][0])  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"fails on validation data \((Index|Runtime|Value)Error: .*noise alone"):
        federation.check_model()
    assert all(tensor.equal(before[name]) for name, tensor in federation.workspace.state().items())
    plain = make_federation("dp-lora", training, epsilon=None)
    plain.check_model()


def test_whole_clients_are_tried_in_the_state_that_a_run_goes_on_from(monkeypatch):
    federation = make_federation("dp-lora", replace(ONE_STEP, batch_size=3), noise_by="server", **WHOLE)
    federation.server.state = {name: tensor + 1 for name, tensor in federation.server.state.items()}
    plain, seen = lora_dp.fed.models.task_losses.logits, []

    def noted(model: nn.Module, batch: dict[str, Tensor], *precision: Any) -> Tensor:
        seen.append((len(batch["labels"]), {name: t.detach().clone() for name, t in model.named_parameters()}))
        return plain(model, batch, *precision)

    monkeypatch.setattr(lora_dp.fed.models.task_losses, "logits", noted)
    federation.check_model()
    [(count, state)] = seen
    assert count == 3 and all(state[name].equal(tensor) for name, tensor in federation.server.state.items())


@pytest.mark.parametrize("noise_by", ["client", "server"])
def test_examples_may_meet_within_a_client_that_is_protected_as_a_whole(noise_by, monkeypatch, caplog):
    """Its change is clipped as one: nothing is tried for mixing, no loss is followed, and nothing is remembered."""
    plain = lora_dp.fed.models.task_losses.classification_loss
    monkeypatch.setattr(
        lora_dp.fed.models.task_losses,
        "classification_loss",
        lambda *given: (found := plain(*given)) * found.detach().mean(),
    )
    federation = make_federation("dp-lora", replace(ONE_STEP, local_steps=3), noise_by=noise_by, **WHOLE)
    federation.model[1] = Mixing(federation.model[1])
    federation.check_model()
    trainer = replace(federation.trainer, workspace=type(federation.workspace)(federation.model))
    passes = []
    federation.model.register_forward_hook(lambda model, args, output: passes.append(len(output)))
    task = Task(0, 0, 2, trainer.workspace.state())
    with caplog.at_level(logging.ERROR):
        examples = make_examples(COUNT, 1)
        trainer._train_by_engine(examples, task, (1, 0, 0), lambda: None, trainer._training_steps(examples, task))
    assert passes == [COUNT] * 3 and caplog.text == ""
    assert any(bool((tensor != task.state[name]).any()) for name, tensor in trainer.workspace.state().items())


class SequenceFirst(nn.Module):
    """Gives its layer (3 tokens, N, d), and one row for the batch as a whole."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.stack([x, x.flip(1), -x])
        return self.inner(tokens).tanh().mean(0) + self.inner(x.mean(0, keepdim=True))


def test_a_whole_clients_step_is_that_of_its_batch_whatever_rows_layers_are_given(caplog):
    federation = make_federation("dp-lora", ONE_STEP, noise_by="server", **WHOLE)
    federation.model[1] = SequenceFirst(federation.model[1])
    trainer = replace(federation.trainer, workspace=type(federation.workspace)(federation.model))
    model, examples = federation.model, make_examples(COUNT, 1)
    generator = torch.Generator().manual_seed(3)
    start = {
        name: torch.randn(t.shape, generator=generator, dtype=t.dtype) / 3
        for name, t in trainer.workspace.state().items()
    }
    with caplog.at_level(logging.ERROR):
        update = trainer.train(1, examples, Task(0, 0, 2, start))
    assert caplog.text == ""
    trainer.workspace.load(start, 2)
    batch = examples.batch(range(COUNT))
    loss = torch.nn.functional.cross_entropy(model.eval()(batch["pixel_values"]), batch["labels"])
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, [named[name] for name in start])
    for (name, before), gradient in zip(start.items(), gradients, strict=True):
        assert float(gradient.abs().max()) > 1e-4
        torch.testing.assert_close(update.tensors[name], before - ONE_STEP.learning_rate * gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["fetch", "class", "forward", "backward", "deep"])
@pytest.mark.parametrize("noise_by", ["client", "server"])
def test_a_whole_client_on_whose_data_training_fails_changes_nothing(kind, noise_by, monkeypatch, caplog):
    privacy = {"unit": "client", "noise_by": noise_by, "delta": 0.01, "weighting": "equal"}
    federation = make_federation("dp-lora", replace(ONE_STEP, local_steps=2), **privacy)
    task = Task(0, 0, 2, federation.server.state)
    draws = [[0, 1, 2], [ODD, 3]]  # after a step that has moved the model
    monkeypatch.setattr(PoissonSampler, "draw", lambda self: draws.pop(0))
    with caplog.at_level(logging.ERROR):
        found = federation.trainer.train(1, failing(kind, monkeypatch), task).tensors
    assert "Client 1, round 1: training failed, and its update is that of a client without data" in caplog.text
    expected = dict(task.state)
    if noise_by == "client":
        event = federation.plan.event(COUNT)
        bound = federation.plan.max_update_norm
        expected = federation.trainer._noised(expected, task, event, bound, (1, 0, 0), Stream.NOISE)
        assert all(float((expected[name] - task.state[name]).abs().max()) > 0.1 for name in expected)
    assert all(found[name].equal(expected[name]) for name in found) and found.keys() == expected.keys()


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["example", "client"])
def test_a_round_does_not_tell_on_whose_data_training_failed(unit, monkeypatch, caplog):
    privacy = {} if unit == "example" else {"unit": "client", "noise_by": "client", "delta": 0.01, "weighting": "equal"}
    federation = make_federation("dp-lora", **privacy)
    federation.engine.parts = [federation.engine.parts[0], failing("fetch", monkeypatch), federation.engine.parts[2]]
    with caplog.at_level(logging.ERROR):
        result = federation.run_round()
    assert result.participants == [0, 1, 2] and result.failed == []
    assert "Jane" in caplog.text  # in the process that runs the clients


class Widths(Doubles):
    """Rows that are padded with zeros to a width of their own batch."""

    def __init__(self, count: int, widths: tuple[int, ...]) -> None:
        made = make_examples(count, 3)
        self.__dict__.update(made.__dict__)
        self.widths, self.calls = widths, 0

    def batch(self, indices: Any) -> dict[str, Tensor]:
        found = super().batch(indices)
        width = self.widths[self.calls % len(self.widths)]
        self.calls += 1
        padded = torch.zeros(len(found["labels"]), width, dtype=torch.float64)
        padded[:, :12] = found.pop("pixel_values").flatten(1)[:, :12]
        return {"pixel_values": padded, **found}


class Averages(nn.Module):
    """Looks at padding: by how much wider the batch is, all features are smaller."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x[:, :12] * 12 / x.shape[1])


def test_what_a_clients_batches_were_does_not_decide_whether_another_one_trains(caplog):
    """A model that looks at padding: tried for it, a client would be given up where widths vary."""
    changes = []
    for clients in ([1], [0, 1], [1, 0]):
        federation = make_federation(
            "dp-lora",
            replace(TRAINING, batch_size=1000),
            unit="client",
            noise_by="server",
            delta=0.01,
            weighting="equal",
        )
        model = federation.model
        model[1] = nn.Sequential(Averages(model[1]))
        task = Task(0, 0, 2, {name: t for name, t in federation.workspace.state().items()})
        parts = [Widths(9, (20, 24)), Widths(9, (20,))]
        found = [federation.trainer.train(client, parts[client], task).tensors for client in clients][-1]
        changes.append({name: tensor - task.state[name] for name, tensor in found.items()})
    assert any(bool(change.any()) for change in changes[0].values())
    assert all(change.equal(changes[1][name]) for name, change in changes[0].items())
    assert any(bool(change.any()) for change in changes[2].values()) and caplog.text == ""
