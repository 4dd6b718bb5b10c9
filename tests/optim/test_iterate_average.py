"""Averages of iterates against their definitions in float64, and the model as it was after one was in it."""

import copy
import io

import pytest
import torch
from torch import nn

from lora_dp import IterateAverage, PrivacyEngine, merge_adapters, unmerge_adapters
from tests.models import assert_refuses, examples, mlp, private_run, snapshot, take_step
from tests.support import make_private


def iterates_of(model, average, steps, seed=0):
    """Random iterates, as (steps, numbers), each taken up."""
    generator, rows = torch.Generator().manual_seed(seed), []
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in range(steps):
        with torch.no_grad():
            for p in trained:
                p.copy_(torch.randn(p.shape, generator=generator))
        rows.append(torch.cat([p.detach().double().flatten() for p in trained]))
        average.update()
    return torch.stack(rows)


def numbers(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("first", [1, 4, 9])
def test_the_tail_is_a_mean(first):
    model = mlp()
    average = IterateAverage(model, tail_from=first)
    rows = iterates_of(model, average, 9)
    with average.applied():
        torch.testing.assert_close(numbers(model), rows[first - 1 :].mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.95])
def test_the_exponential_average_warms_up(decay):
    model = mlp()
    average = IterateAverage(model, decay=decay)
    rows = iterates_of(model, average, 12)
    # Weights of each iterate, from the last back.
    kept, weights = 1.0, []
    for t in range(11, 0, -1):
        d = min(decay, (1 + t) / (10 + t))
        weights.append(kept * (1 - d))
        kept *= d
    weights.append(kept)
    expected = sum(w * row for w, row in zip(weights, rows.flip(0), strict=True))
    assert sum(weights) == pytest.approx(1)
    with average.applied():
        torch.testing.assert_close(numbers(model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_of_private_steps_it_has_the_definitions_value_and_leaves_training_alone():
    """Factors that take turns, and a head: the model goes on from the last iterate bit for bit."""
    ends = []
    for averaged in (True, False):
        engine = PrivacyEngine("rdp", reproducible_seed=3)
        model, optimizer, loader = private_run(engine, phases="BA")
        average, seen = IterateAverage(model, tail_from=3), []
        for x, y in loader:
            optimizer.backward(nn.functional.cross_entropy(model(x), y, reduction="none"))
            optimizer.step()
            if averaged:
                average.update()
                seen.append(numbers(model))
                if len(seen) >= 3:
                    with average.applied():
                        mean = torch.stack(seen[2:]).mean(0)
                        torch.testing.assert_close(numbers(model), mean, rtol=1e-5, atol=1e-6)
                        model.eval()(x)
                    model.train()
        ends.append(snapshot(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_only_what_is_trained_is_kept():
    model = mlp()
    average = IterateAverage(model, decay=0.9)
    average.update()
    held = average.state_dict()["average"]
    assert held.keys() == {"0.lora_A", "0.lora_B", "2.weight", "2.bias"}
    model[2].requires_grad_(False)  # frozen later: it stays as it is, and so does its average
    average.update()
    with average.applied():
        assert torch.equal(model[2].weight, held["2.weight"])


def test_half_precision_is_averaged_in_float32():
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    average = IterateAverage(model, decay=0.999)
    nn.init.constant_(model.weight, 0.0)
    average.update()
    nn.init.constant_(model.weight, 256.0)
    for _ in range(3000):
        average.update()
    assert average.state_dict()["average"]["weight"].dtype == torch.float32
    with average.applied():
        assert model.weight.dtype == torch.bfloat16 and model.weight.item() > 240
    assert model.weight.item() == 256


def test_a_saved_average_goes_on():
    model, other = mlp(), mlp(seed=5)
    whole, part = (IterateAverage(m, tail_from=2) for m in (model, other))
    iterates_of(model, whole, 3)
    iterates_of(other, part, 3)
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    file.seek(0)
    resumed = IterateAverage(other, tail_from=2)
    resumed.load_state_dict(torch.load(file))
    for average, m in ((whole, model), (resumed, other)):
        iterates_of(m, average, 2, seed=1)
    with whole.applied(), resumed.applied():
        assert torch.equal(numbers(model), numbers(other))


def test_parameters_that_were_exchanged_are_found():
    model = mlp()
    average = IterateAverage(model, decay=0.0)
    model.load_state_dict(mlp(seed=1).state_dict(), assign=True)
    average.update()
    with average.applied():
        assert torch.equal(numbers(model), numbers(mlp(seed=1)))


def test_what_is_saved_within_is_the_average_merged_too():
    model = mlp()
    average = IterateAverage(model, tail_from=1)
    iterates_of(model, average, 3)
    before, x = snapshot(model), examples(4)[0]
    with average.applied():
        expected = model.eval()(x)
        merge_adapters(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert not model[0].merged
    for name, tensor in snapshot(model).items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-5 if name == "0.weight" else 0)


# What is refused


def test_an_error_within_leaves_the_iterates():
    model = mlp()
    average = IterateAverage(model, tail_from=1)
    iterates_of(model, average, 2)
    before = snapshot(model)
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(model).items())
    average.update()


def test_training_and_loading_within_are_refused_and_taken_back():
    model = mlp()
    optimizer = make_private(model, batch_size=4)
    average = IterateAverage(model, tail_from=1)
    average.update()
    before = snapshot(model)

    def train():
        with average.applied():
            take_step(model, optimizer, examples(4))

    def load():
        with average.applied():
            model.load_state_dict(mlp(seed=2).state_dict(), assign=True)

    def update():
        with average.applied():
            average.update()

    def again():
        with average.applied(), average.applied():
            pass

    assert_refuses(RuntimeError, "'0.lora_A' was trained or loaded while the average was in the model", train)
    assert_refuses(RuntimeError, "train and load outside of applied()", load)
    for name in ("0.lora_A", "0.lora_B", "2.weight", "2.bias"):
        assert torch.equal(snapshot(model)[name], before[name])
    for twice in (update, again):
        assert_refuses(RuntimeError, "leave applied() first", twice)


def test_merged_adapters_are_refused():
    model = mlp()
    average = IterateAverage(model, tail_from=1)
    average.update()
    merge_adapters(model)
    for action in (average.update, average.applied().__enter__):
        assert_refuses(RuntimeError, "The adapter of '0' is merged: call unmerge_adapters first", action)
    unmerge_adapters(model)
    average.update()


def test_no_average_yet():
    average = IterateAverage(mlp(), tail_from=3)
    average.update()
    assert_refuses(RuntimeError, "no average yet after 1 updates", average.applied().__enter__)


@pytest.mark.parametrize(
    "error, words, options",
    [
        (ValueError, "Give either tail_from", {}),
        (ValueError, "Give either tail_from", {"tail_from": 1, "decay": 0.9}),
        (ValueError, "decay must be in [0, 1), got 1", {"decay": 1}),
        (ValueError, "tail_from must be at least 1", {"tail_from": 0}),
        (TypeError, "decay must be a number", {"decay": "slow"}),
        (TypeError, "tail_from must be a whole number", {"tail_from": 1.5}),
    ],
)
def test_a_wrong_option_is_refused_by_name(error, words, options):
    assert_refuses(error, words, lambda: IterateAverage(mlp(), **options))


def test_a_model_without_anything_to_average_is_refused():
    assert_refuses(ValueError, "nothing to average", lambda: IterateAverage(mlp().requires_grad_(False), tail_from=1))
    assert_refuses(TypeError, "model must be a Module", lambda: IterateAverage([], tail_from=1))


def test_a_state_that_does_not_fit_is_refused():
    average = IterateAverage(mlp(), tail_from=1)
    average.update()
    state = average.state_dict()
    assert_refuses(ValueError, "not the state of an IterateAverage", lambda: average.load_state_dict({"updates": 1}))
    other = IterateAverage(mlp(), decay=0.9)
    assert_refuses(ValueError, "tail_from=1 and decay=None", lambda: other.load_state_dict(state))
    narrow = copy.deepcopy(state)
    narrow["average"]["0.lora_A"] = torch.zeros(1, 6)
    assert_refuses(ValueError, "over other parameters", lambda: average.load_state_dict(narrow))
