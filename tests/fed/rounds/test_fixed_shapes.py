"""What one example adds hangs on it alone to the last bit, whatever model a server sends."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import lora_dp.fed.models.task_losses
from lora_dp.fed.config import RunConfig
from lora_dp.fed.data.augmentation import Views
from lora_dp.fed.methods import State
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.fixed_shapes import OneShape, rows_of_a_part
from lora_dp.fed.rounds.messages import Task
from lora_dp.fed.run_options import FederationConfig
from lora_dp.privacy.sampling import PoissonSampler
from tests.fed.rounds.failing_models import ONE_STEP
from tests.fed.rounds.shaped_turns import apart, on_outputs, reading, sum_of, texts, tried
from tests.fed.small import make_examples, make_federation

C = 1.0  # the default clip bound


@pytest.fixture(scope="module")
def default() -> Federation:
    return Federation.from_config(RunConfig(FederationConfig(method="dp-lora", local_steps=1, batch_size=8)))


def hooks_of(model: nn.Module) -> int:
    return len(model._forward_pre_hooks) + len(model._forward_hooks)


def amplifying(federation: Federation, factor: float, quiet: float) -> State:
    """A state whose first two logits are rounding alone, times a large number: what the last normalisation returns,
    divided by its weight, sums to a constant. ``quiet`` is the last logit."""
    state = {name: tensor.clone() for name, tensor in federation.server.state.items()}
    norm = [
        m for name, m in federation.model.named_modules() if name in ("norm", "fc_norm") and isinstance(m, nn.LayerNorm)
    ][-1]
    row = 1 / norm.weight.detach().double()
    constant = float((row * norm.bias.detach().double()).sum())
    weight, bias = state["head.weight"].zero_(), state["head.bias"].zero_()
    for place, sign in ((0, 1), (1, -1)):
        weight[place], bias[place] = (sign * factor * row).float(), -sign * factor * constant
    bias[2:9], bias[9] = -30.0, quiet
    return state


# With the last logit at −1e9, trials that compare relatively to the largest value see nothing.
@pytest.mark.slow
@pytest.mark.parametrize("quiet", [-1e9, -30.0])
@pytest.mark.parametrize("factor", [3e6, 3e7])
def test_a_server_cannot_amplify_rounding(factor, quiet, default, caplog):
    """One example more or less, where products over the batch would take another algorithm."""
    state = amplifying(default, factor, quiet)
    with caplog.at_level(logging.WARNING):
        for rows in ([10], [40], [61], [10, 11, 12], [20, 21, 22], list(range(100, 115)), list(range(200, 232))):
            with_it = sum_of(default, state, [*rows, 99])
            without = sum_of(default, state, rows)
            alone = sum_of(default, state, [99])
            assert 0.5 * C < apart(alone, {name: torch.zeros_like(t) for name, t in alone.items()}) <= C
            difference = {name: with_it[name] - without[name] for name in with_it}
            assert apart(with_it, without) <= C
            assert apart(difference, alone) < 1e-12
    assert caplog.text == ""  # no trial failed either, which would tell of the examples in it


@pytest.mark.slow
def test_the_state_of_these_tests_is_one_that_amplifies(default):
    """Without parts of one shape, one example more moves the sum further than the noise is made for."""
    state, found = amplifying(default, 3e7, -1e9), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OneShape, "parts", lambda self, rows: [(list(rows), len(rows))])
        for rows in ([10], [40], [50], [60], [61], [62], [63], [10, 11, 12], [20, 21, 22], [30, 31, 32]):
            found.append(apart(sum_of(default, state, [*rows, 99]), sum_of(default, state, rows)))
    if max(found) < C:
        pytest.skip("the matrix products of this machine round alike for 1, 2, 3 and 4 rows")
    assert max(found) > 1.1 * C


class Placed(nn.Module):
    """A row's last bits hang on its place, as where rows are not aligned in memory."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 1e-14 * torch.arange(len(x), dtype=x.dtype).view(-1, 1))


class Aligned(nn.Module):
    """Every second row is rounded in another way, as where the width is odd and two rows are read at once."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 1e-14 * (torch.arange(len(x), dtype=x.dtype) % 2).view(-1, 1))


class Accompanied(nn.Module):
    """A row's last bits hang on the values of others."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 1e-14 * (x.detach().abs().amax() > 10).double())


class AccompaniedLater(nn.Module):
    """The same of all rows but the first four."""

    def forward(self, x: Tensor) -> Tensor:
        later = torch.arange(len(x)).view(-1, 1) >= 4
        return x * (1 + 1e-14 * (later & (x.detach().abs().amax() > 10)).double())


class Routed(nn.Module):
    """Each of two experts is given the rows that are sent to it, which rounds alike here for any number of them."""

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, :1].detach() > x[:, 1:2].detach()
        for chosen in (first, ~first):
            rows = chosen.flatten().nonzero().flatten()
            x = x.index_add(0, rows, 0 * x[rows])
        return x


class Grouped(nn.Module):
    """As one product for all experts does it: how many rows each has, a tensor says."""

    def forward(self, x: Tensor) -> Tensor:
        starts = torch.arange(len(x))
        bags = nn.functional.embedding_bag(torch.zeros_like(starts), x.new_zeros(1, x.shape[1]), starts)
        return x + bags


class Segmented(nn.Module):
    """The same by an op that takes where groups begin by name alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.segment_reduce(0 * x, "sum", offsets=torch.arange(len(x) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("planted", [Placed, Aligned, Accompanied, AccompaniedLater, Routed, Grouped, Segmented])
@pytest.mark.parametrize(("method", "state"), [("dp-lora", "as it is"), ("dp-lora", "zeros"), ("deer", "zeros")])
def test_where_place_or_company_matter_each_example_is_by_itself(planted, method, state, caplog):
    """Whatever the server sent: what it sends cannot hide it from the trial."""
    federation = make_federation(method, ONE_STEP)
    sent = {name: tensor.clone() * (state != "zeros") for name, tensor in federation.server.state.items()}
    examples, seen = make_examples(13, 1), []
    federation.model[2] = nn.Sequential(planted(), federation.model[2])
    federation.model[2].register_forward_hook(
        lambda module, given, output: seen.append(len(output)) if not tried(federation.model) else None
    )
    with caplog.at_level(logging.WARNING):
        together = sum_of(federation, sent, range(13), examples)
    assert seen[-13:] == 13 * [1] and "each example is by itself" in caplog.text
    alone = [sum_of(federation, sent, [i], examples) for i in range(13)]
    assert all(tensor.equal(sum(part[name] for part in alone)) for name, tensor in together.items())


def test_the_trial_is_made_once_for_a_shape_and_leaves_everything_as_it_was():
    federation = make_federation("dp-lora", ONE_STEP)
    layer = federation.model[1]
    merged = {"1.merged": torch.randn(6, 12, dtype=torch.float64)}
    state = {**federation.server.state, **merged}
    federation.workspace.load(state)
    held, weight = federation.workspace.state(), layer.weight.clone()
    with federation.workspace.at_random(torch.Generator().manual_seed(0)):
        assert layer.weight.equal(layer.original_weight)
        assert not any(p.equal(held[name]) for name, p in federation.workspace.state().items())
    assert layer.weight.equal(weight) and not weight.equal(layer.original_weight)
    assert all(p.equal(held[name]) for name, p in federation.workspace.state().items())
    calls: list[int] = []
    on_outputs(federation.model, calls)
    sum_of(federation, state, [], make_examples(20, 1))  # tries no shape
    hooks = hooks_of(federation.model)
    for _ in range(2):
        sum_of(federation, state, range(9), make_examples(20, 1))
        assert not _get_current_dispatch_mode_stack() and hooks_of(federation.model) == hooks
    assert calls == 6 * [24]  # four passes of the trial, two steps


@pytest.mark.parametrize("method", ["dp-lora", "deer"])
def test_a_step_is_the_same_whether_its_shape_was_tried_before_or_not(method):
    """What regulates it too, which is worked out from the factors."""
    federation, examples = make_federation(method, ONE_STEP), make_examples(20, 1)
    state = {name: torch.randn_like(tensor) for name, tensor in federation.server.state.items()}
    first, second = (sum_of(federation, state, range(9), examples) for _ in range(2))
    assert all(tensor.equal(second[name]) for name, tensor in first.items())


def test_nothing_of_the_trial_comes_from_a_server_or_from_the_seed_of_the_run():
    found = []
    for number in range(2):
        federation, seen = make_federation("deer", ONE_STEP, seed=number), []

        def look(module: nn.Module, given: Any, output: Tensor, seen: list[list[Tensor]] = seen) -> None:
            if not tried(module):
                seen.append([output.detach().clone()])
                output.register_hook(seen[-1].append)

        federation.model.register_forward_hook(look)
        state = {name: number * torch.randn_like(tensor) for name, tensor in federation.server.state.items()}
        sum_of(federation, state, range(9), make_examples(20, number))
        found.append(seen)
    *tries, step = zip(*found, strict=True)
    # The scores and their gradient, which comes last: those before it look for examples that meet in the loss.
    assert len(tries) == 4 and all(a[0].equal(b[0]) and a[-1].equal(b[-1]) for a, b in tries)
    assert not step[0][0].equal(step[1][0])


class Touchy(nn.Module):
    """Does what it must not where ``wrong`` says so of its rows, in the forward pass or in the backward pass."""

    def __init__(self, what: str, wrong: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.what, self.wrong = what, wrong

    def forward(self, x: Tensor) -> Tensor:
        if not self.wrong(x):
            return x
        if self.what == "mixes":
            return x + x.mean(0)

        def fail(gradient: Tensor) -> None:
            raise RuntimeError("no backward for so many rows")

        found = x.clone()
        found.register_hook(fail)
        return found


@pytest.mark.slow
def test_what_the_trial_left_of_a_failed_backward_is_no_part_of_a_step(caplog):
    federation, examples = make_federation("dp-lora", ONE_STEP), make_examples(13, 1)
    expected = [sum_of(make_federation("dp-lora", ONE_STEP), federation.server.state, [i], examples) for i in range(13)]
    federation.model[2] = nn.Sequential(federation.model[2], Touchy("fails", lambda x: len(x) == 16))
    with caplog.at_level(logging.WARNING):
        found = sum_of(federation, federation.server.state, range(13), examples)
    assert "each example is by itself" in caplog.text and "contributed nothing" not in caplog.text
    assert apart(found, {name: sum(part[name] for part in expected) for name in found}) < 1e-12


def test_that_the_trial_saw_examples_mixed_is_told_to_the_owner(caplog):
    federation = make_federation("dp-lora", ONE_STEP)
    federation.model[2] = nn.Sequential(federation.model[2], Touchy("mixes", lambda x: len(x) > 2))
    with caplog.at_level(logging.WARNING):
        sum_of(federation, federation.server.state, range(13), make_examples(13, 1))
    assert "THE MODEL MIXES EXAMPLES" in caplog.text


@pytest.mark.slow
def test_a_model_that_mixes_private_examples_alone_is_found_out(caplog):
    """That made-up inputs keep to themselves says nothing of others."""
    federation = make_federation("dp-lora", ONE_STEP)
    examples = make_examples(13, 1)
    examples._pixels[:] = 255 * (examples._pixels > 127)
    federation.model[0] = nn.Sequential(
        nn.Flatten(), Touchy("mixes", lambda x: len(x) > 2 and bool((x.detach().abs() == 1).all(1).any()))
    )
    with caplog.at_level(logging.WARNING):
        sum_of(federation, federation.server.state, range(13), examples)
    assert "THE MODEL MIXES EXAMPLES" in caplog.text and "each example is by itself" not in caplog.text


@pytest.mark.slow
def test_private_examples_are_tried_as_often_whether_made_up_ones_were_before_or_not():
    """The first batch of a model that draws is tried several times, in the hope of seeing it mix."""
    federation, calls = make_federation("dp-lora", ONE_STEP), []
    federation.model[2] = nn.Sequential(federation.model[2], nn.Dropout(0.1))
    federation.model.register_forward_hook(lambda module, given, output: calls.append(tried(module)))
    for _ in range(2):
        sum_of(federation, federation.server.state, range(9), make_examples(20, 1))
    made_up = [number for number, trial in enumerate(calls) if not trial][3]
    first, second, last = "".join("t" if trial else "." for trial in calls[made_up + 1 :]).split(".")
    assert first == second != "" and last == ""


@pytest.mark.slow
def test_in_which_order_shapes_were_drawn_does_not_matter():
    federation, examples = reading(), texts([3, 5, 12, 14, 20, 40, 8, 16])
    state = federation.workspace.state()
    first, second = (
        sum_of(federation, state, rows, examples) for rows in ([0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 2, 3, 0, 1])
    )
    assert all(tensor.equal(second[name]) for name, tensor in first.items())


def test_copies_that_fill_a_part_add_nothing_and_are_no_other_example():
    federation, seen = make_federation("dp-lora", ONE_STEP), []
    examples = make_examples(20, 1)
    federation.model.register_forward_pre_hook(
        lambda module, given: seen.append(given[0]) if not tried(module) else None
    )
    state = federation.server.state
    found = sum_of(federation, state, [3, 7, 11], examples)
    own = examples.batch([3, 7, 11])["pixel_values"]
    assert seen[-1].equal(own[torch.arange(24) % 3])
    expected = [sum_of(federation, state, [i], examples) for i in (3, 7, 11)]
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, sum(part[name] for part in expected), rtol=0, atol=1e-13)


@pytest.mark.slow
def test_the_release_does_not_hang_on_the_number_of_parts(monkeypatch):
    """Were each example of a single part rounded to the noise's grid by itself, and two parts together, one example
    more could move the sum by a step of the grid for each other example."""
    found = []
    for rows in (16, 24, 24):
        monkeypatch.setattr("lora_dp.fed.rounds.fixed_shapes.rows_of_a_part", lambda *_, rows=rows: rows)
        monkeypatch.setattr(PoissonSampler, "draw", lambda self: list(range(20)))
        federation = make_federation("dp-lora", ONE_STEP)
        task = Task(0, 0, 2, federation.server.state)
        found.append(federation.trainer.train(1, make_examples(20, 1), task).tensors)
    assert all(tensor.equal(found[2][name]) for name, tensor in found[1].items())
    assert all(tensor.equal(found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize(
    ("batch_size", "examples", "vary", "rows"),
    [
        (64, 287, False, 80),
        (64, 70, False, 72),
        (64, 64, False, 64),
        (1, 1, False, 8),
        (4, 1000, False, 8),
        (64, 287, True, 16),
        (65, 287, True, 24),
        (256, 1000, True, 64),
    ],
)
def test_how_many_rows_a_part_has_is_public(batch_size, examples, vary, rows):
    assert rows_of_a_part(batch_size, examples, vary) == rows


def test_what_is_left_of_a_part_on_which_training_fails_has_its_shape(monkeypatch):
    federation = make_federation("dp-lora", ONE_STEP)
    examples, state, calls = make_examples(20, 1), federation.server.state, []
    bad, logits = examples.batch([6])["pixel_values"][0], lora_dp.fed.models.task_losses.logits

    def raising(model: nn.Module, batch: dict[str, Tensor], *precision: Any) -> Tensor:
        calls.append(batch["pixel_values"])
        if any(row.equal(bad) for row in batch["pixel_values"]):
            raise RuntimeError("no")
        return logits(model, batch, *precision)

    expected = sum_of(federation, state, [4, 9], examples)
    monkeypatch.setattr(lora_dp.fed.models.task_losses, "logits", raising)
    found = sum_of(federation, state, [4, 6, 9], examples)
    assert [len(rows.unique(dim=0)) for rows in calls] == [3, 1, 2, 1, 1] and {len(rows) for rows in calls} == {24}
    assert apart(found, expected) < 1e-13


def test_without_privacy_batches_are_given_as_they_are():
    federation, seen = make_federation("dp-lora", ONE_STEP, epsilon=None), []
    on_outputs(federation.model, seen)
    federation.trainer.train(1, make_examples(13, 1), Task(0, 0, 2, federation.server.state))
    assert seen == [13] and not federation.workspace.rows_apart


# Several views of an example


def repeated(self: Views, batch: Any) -> Any:
    return {name: tensor.repeat_interleave(self.count, 0) for name, tensor in batch.items()}


@pytest.mark.parametrize("rows", [[3], [0, 1, 2, 5, 7], list(range(12))])
def test_views_that_are_alike_add_what_one_adds(rows, monkeypatch, caplog):
    """Each example once, and none of the copies that fill a part; the shape of all rows is tried before."""
    plain = make_federation("dp-lora", ONE_STEP)
    expected = sum_of(plain, plain.server.state, rows)
    monkeypatch.setattr(Views, "__call__", repeated)
    seen: list[int] = []
    several = make_federation("dp-lora", replace(ONE_STEP, views=Views(3)))
    on_outputs(several.model, seen)
    with caplog.at_level(logging.WARNING):
        found = sum_of(several, several.server.state, rows)
    assert apart(found, expected) < 1e-12
    assert set(seen) == {3 * rows_of_a_part(ONE_STEP.batch_size, 12, False)} and caplog.text == ""


def test_an_example_of_several_views_adds_at_most_the_bound_alone_and_beside_others():
    federation = make_federation("dp-lora", replace(ONE_STEP, views=Views(4)), max_grad_norm=0.01)
    state, sums = federation.server.state, []
    for rows in ([0], [0, 1, 2, 3]):
        found = sum_of(federation, state, rows)
        sums.append(apart(found, {name: torch.zeros_like(tensor) for name, tensor in found.items()}))
    assert 0.0099 < sums[0] <= 0.01 and sums[1] <= 0.04


def test_what_is_evaluated_has_no_views(monkeypatch):
    calls: list[int] = []

    def counted(self: Views, batch: Any) -> Any:
        calls.append(len(batch["labels"]))
        return repeated(self, batch)

    monkeypatch.setattr(Views, "__call__", counted)
    federation = make_federation("dp-lora", replace(ONE_STEP, views=Views(2)))
    federation.evaluate()
    assert calls == []
    federation.run_round([0])
    assert calls
