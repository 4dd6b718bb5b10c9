"""That training fails on private data is no bit: what an example adds to the sum is a function of it alone."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lora_dp.fed.rounds.client
from lora_dp.engine.engine import PrivacyEngine
from lora_dp.engine.optimizer import Clipped, PrivateOptimizer, total
from lora_dp.errors import IsolationError
from lora_dp.fed.rounds.client import Trainer
from lora_dp.fed.rounds.contained_failures import GivenUp
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.messages import Task, Update
from lora_dp.privacy.sampling import PoissonSampler
from tests.fed.small import TRAINING, Doubles, make_examples, make_federation

ONE_STEP = replace(TRAINING, local_steps=1, batch_size=1000)
COUNT = 13
ODD = 4  # the example on which training fails


class Unreadable(Doubles):
    """Examples of which one cannot be fetched."""

    def batch(self, indices: Any) -> dict[str, Tensor]:
        if ODD in [int(i) for i in indices]:
            raise OSError("cannot read the photograph of Jane")
        return super().batch(indices)


class Unknown(Doubles):
    """Examples of which one has a class that the model lacks."""

    def batch(self, indices: Any) -> dict[str, Tensor]:
        found = super().batch(indices)
        found["labels"] = torch.where(torch.as_tensor([int(i) == ODD for i in indices]), 77, found["labels"])
        return found


class Twice(Doubles):
    """Examples of which one comes twice wherever it comes: it would count twice."""

    def batch(self, indices: Any) -> dict[str, Tensor]:
        rows = [int(i) for i in indices]
        return super().batch(rows + [ODD] * (ODD in rows))


def same_as(examples: Doubles, kind: type[Doubles]) -> Doubles:
    made = kind.__new__(kind)
    made.__dict__.update(examples.__dict__)
    return made


def without(examples: Doubles) -> Doubles:
    return examples.subset([i for i in range(len(examples)) if i != ODD])


def in_forward(monkeypatch: pytest.MonkeyPatch, mark: Tensor) -> None:
    """The model raises where it sees the odd example."""
    plain = lora_dp.fed.rounds.client.logits

    def raising(model: nn.Module, batch: dict[str, Tensor], *precision: Any) -> Tensor:
        if any(row.equal(mark) for row in batch["pixel_values"]):
            raise IndexError("index out of range in self")
        return plain(model, batch, *precision)

    monkeypatch.setattr(lora_dp.fed.rounds.client, "logits", raising)


def in_backward(monkeypatch: pytest.MonkeyPatch, mark: Tensor) -> None:
    """The gradient of a batch with the odd example cannot be computed."""
    plain = lora_dp.fed.rounds.client.logits

    def raising(model: nn.Module, batch: dict[str, Tensor], *precision: Any) -> Tensor:
        scores = plain(model, batch, *precision)
        if any(row.equal(mark) for row in batch["pixel_values"]):

            def hook(gradient: Tensor) -> Tensor:
                raise RuntimeError("no gradient for Jane")

            scores.register_hook(hook)
        return scores

    monkeypatch.setattr(lora_dp.fed.rounds.client, "logits", raising)


def deep_in_backward(monkeypatch: pytest.MonkeyPatch, mark: Tensor) -> None:
    """The same, once the later layers have recorded the gradients of their parameters."""
    plain = lora_dp.fed.rounds.client.logits

    def raising(model: nn.Module, batch: dict[str, Tensor], *precision: Any) -> Tensor:
        def hook(gradient: Tensor) -> Tensor:
            raise RuntimeError("no gradient for Jane")

        def watch(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if any(row.equal(mark) for row in batch["pixel_values"]):
                output.register_hook(hook)

        handle = model[1].register_forward_hook(watch)  # type: ignore[index]
        try:
            return plain(model, batch, *precision)
        finally:
            handle.remove()

    monkeypatch.setattr(lora_dp.fed.rounds.client, "logits", raising)


def dropped(monkeypatch: pytest.MonkeyPatch, mark: Tensor) -> None:
    """The model leaves the odd example out of its batch."""
    plain = lora_dp.fed.rounds.client.logits

    def fewer(model: nn.Module, batch: dict[str, Tensor], *precision: Any) -> Tensor:
        kept = torch.tensor([not row.equal(mark) for row in batch["pixel_values"]])
        for name in batch:
            batch[name] = batch[name][kept]
        return plain(model, batch, *precision)

    monkeypatch.setattr(lora_dp.fed.rounds.client, "logits", fewer)


Plant = Callable[[pytest.MonkeyPatch, Tensor], None]
FAILURES: dict[str, tuple[type[Doubles], Plant | None]] = {
    "fetch": (Unreadable, None),
    "class": (Unknown, None),
    "forward": (Doubles, in_forward),
    "backward": (Doubles, in_backward),
    "deep": (Doubles, deep_in_backward),
    "batch": (Doubles, dropped),
    "twice": (Twice, None),
}


def failing(kind: str, monkeypatch: pytest.MonkeyPatch) -> Doubles:
    examples = make_examples(COUNT, 1)
    dataset, plant = FAILURES[kind]
    if plant is not None:
        plant(monkeypatch, examples.batch([ODD])["pixel_values"][0])
    return same_as(examples, dataset)


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


def test_where_training_fails_on_all_the_update_is_noise_alone(monkeypatch, caplog):
    """In every step, as for an empty batch: of the size that the plan says."""

    def raising(*_: Any) -> Tensor:
        raise IndexError("index out of range in self")

    monkeypatch.setattr(lora_dp.fed.rounds.client, "logits", raising)
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


class Mixing(nn.Module):
    """Takes the batch's mean away."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x - x.mean(0, keepdim=True) / 2 if len(x) > 1 else x / 2)


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
    plain, sizes = lora_dp.fed.rounds.client.logits, []

    def once(model: nn.Module, batch: dict[str, Tensor], *precision: Any) -> Tensor:
        sizes.append(len(batch["pixel_values"].unique(dim=0)))  # rows beyond are copies
        if len(sizes) == 2:
            raise IsolationError("seen in one batch alone")
        return plain(model, batch, *precision)

    monkeypatch.setattr(lora_dp.fed.rounds.client, "logits", once)
    federation = make_federation("dp-lora", replace(ONE_STEP, local_steps=3))
    sums_of_a_turn(federation, make_examples(COUNT, 1))
    assert sizes == [COUNT, COUNT] + 2 * COUNT * [1]


def test_a_failure_is_told_as_what_it_is_and_costs_few_passes(monkeypatch, caplog):
    """Parts of the batch in which nothing fails are trained on together: halving takes twice the logarithm."""
    federation, examples = make_federation("dp-lora", ONE_STEP), failing("forward", monkeypatch)
    raising, sizes = lora_dp.fed.rounds.client.logits, []

    def counted(model: nn.Module, batch: dict[str, Tensor], *precision: Any) -> Tensor:
        # Copies fill a part that is not full.
        sizes.append(len({tuple(image.flatten().tolist()) for image in batch["pixel_values"]}))
        return raising(model, batch, *precision)

    monkeypatch.setattr(lora_dp.fed.rounds.client, "logits", counted)
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


WHOLE: dict[str, Any] = {"unit": "client", "delta": 0.01, "weighting": "equal"}


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
    plain, seen = lora_dp.fed.rounds.client.logits, []

    def noted(model: nn.Module, batch: dict[str, Tensor], *precision: Any) -> Tensor:
        seen.append((len(batch["labels"]), {name: t.detach().clone() for name, t in model.named_parameters()}))
        return plain(model, batch, *precision)

    monkeypatch.setattr(lora_dp.fed.rounds.client, "logits", noted)
    federation.check_model()
    [(count, state)] = seen
    assert count == 3 and all(state[name].equal(tensor) for name, tensor in federation.server.state.items())


@pytest.mark.parametrize("noise_by", ["client", "server"])
def test_examples_may_meet_within_a_client_that_is_protected_as_a_whole(noise_by, monkeypatch, caplog):
    """Its change is clipped as one: nothing is tried for mixing, no loss is followed, and nothing is remembered."""
    plain = lora_dp.fed.rounds.client.classification_loss
    monkeypatch.setattr(
        lora_dp.fed.rounds.client,
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
        trainer._train_by_engine(make_examples(COUNT, 1), task, (1, 0, 0), lambda: None)
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
        expected = federation.trainer._noised(expected, task, event, (1, 0, 0))
        assert all(float((expected[name] - task.state[name]).abs().max()) > 0.1 for name in expected)
    assert all(found[name].equal(expected[name]) for name in found) and found.keys() == expected.keys()


@pytest.mark.parametrize("unit", ["example", "client"])
def test_a_round_does_not_tell_on_whose_data_training_failed(unit, monkeypatch, caplog):
    privacy = {} if unit == "example" else {"unit": "client", "noise_by": "client", "delta": 0.01, "weighting": "equal"}
    federation = make_federation("dp-lora", **privacy)
    federation.engine.parts = [federation.engine.parts[0], failing("fetch", monkeypatch), federation.engine.parts[2]]
    with caplog.at_level(logging.ERROR):
        result = federation.run_round()
    assert result.participants == [0, 1, 2] and result.failed == []
    assert "Jane" in caplog.text  # in the process that runs the clients


def test_an_isolation_error_does_not_come_out_of_a_turn(monkeypatch):
    def raising(*_: Any) -> Tensor:
        raise IsolationError("seen in one batch alone")

    monkeypatch.setattr(lora_dp.fed.rounds.client, "logits", raising)
    federation = make_federation("dp-lora")
    assert federation.run_round().failed == []


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
