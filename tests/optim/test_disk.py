"""DiSK against the paper's form with two gradients, and what is in the model when."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_dp import AdamBC, DiSK, GraphedStep, IterateAverage, PrivacyEngine
from lora_dp.optim.known_noise import noise_aware
from tests.models import assert_refuses, examples, loader_of, mlp, moved, one_by_one, snapshot, take_step
from tests.support import brute_force, plain_copy

KAPPA = 0.6


def loss_of(model, batch):
    x, y = batch
    return F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def private(model, make=lambda p: torch.optim.SGD(p, lr=0.5), kappa=KAPPA, engine=None, **options):
    """DiSK on a private model, by default without clip or noise, for hand-made batches of 6."""
    options = {"noise_multiplier": 0.0, "max_grad_norm": math.inf, **options}
    _, optimizer, _ = (engine or PrivacyEngine("rdp", reproducible_seed=3)).make_private(
        model=model,
        optimizer=DiSK(make(list(trained(model).values())), model, kappa=kappa),
        data_loader=loader_of(12, 6),
        **options,
    )
    return optimizer


def oracle(model, batches, *, kappa, gamma, lr, due):
    """The paper's algorithm: two gradients of each example, at any γ, joined before the mean; plain SGD behind it."""
    twin = plain_copy(model)
    parameters = dict(twin.named_parameters())
    x = {name: parameters[name].detach().clone() for name in trained(model)}
    d, filtered = {name: torch.zeros_like(value) for name, value in x.items()}, {}
    c = (1 - kappa) / (kappa * gamma)

    def gradients(at, batch):
        with torch.no_grad():
            for name, value in at.items():
                parameters[name].copy_(value)
        return brute_force(twin, loss_of, one_by_one(batch), set(x))

    points = []
    for step, batch in enumerate(batches):
        ahead = gradients({name: x[name] + gamma * d[name] for name in x}, batch)
        here = gradients(x, batch)
        before = {name: value.clone() for name, value in x.items()}
        for name in due(step):
            g = torch.stack([c * one[name] + (1 - c) * two[name] for one, two in zip(ahead, here, strict=True)]).mean(0)
            filtered[name] = (1 - kappa) * filtered[name] + kappa * g if name in filtered else g
            x[name] = x[name] - lr * filtered[name]
        d = {name: x[name] - before[name] for name in x}
        points.append({name: value.clone() for name, value in x.items()})
    return points


@pytest.mark.slow
@pytest.mark.parametrize("kappa", [0.3, KAPPA, 1.0])
@pytest.mark.parametrize("phases", ["AB", "BA"])
def test_it_is_the_paper_with_two_gradients_at_this_gamma(phases, kappa):
    """After each step the model holds the iterate; so does an eval forward after a training forward."""
    model = mlp(dtype=torch.float64)
    head, factors = {"2.weight", "2.bias"}, {"0.lora_A", "0.lora_B"}

    def due(step):
        return head | (factors if phases == "AB" else {("0.lora_B", "0.lora_A")[step % 2]})

    batches = [examples(6, seed=step) for step in range(6)]
    # γ = 0 would divide by 0: there the two gradients are one whatever γ is.
    gamma = (1 - kappa) / kappa or 1.0
    expected = oracle(model, batches, kappa=kappa, gamma=gamma, lr=0.5, due=due)
    optimizer = private(model, kappa=kappa, phases=phases)
    for batch, point in zip(batches, expected, strict=True):
        take_step(model, optimizer, batch, loss=loss_of)
        for name, value in point.items():
            torch.testing.assert_close(trained(model)[name].detach(), value, rtol=1e-6, atol=1e-7)
    other = oracle(model, batches, kappa=0.4, gamma=0.5, lr=0.5, due=due)[-1]
    assert not torch.allclose(other["2.weight"], expected[-1]["2.weight"], rtol=1e-3)


def test_other_gammas_need_two_gradients():
    """The oracle itself: elsewhere it is not what one gradient gives."""
    model, batches = mlp(dtype=torch.float64), [examples(6, seed=step) for step in range(4)]
    ends = [
        oracle(model, batches, kappa=0.5, gamma=gamma, lr=0.5, due=lambda _: set(trained(model)))[-1]["2.weight"]
        for gamma in (1.0, 0.1)
    ]
    assert not torch.allclose(*ends, rtol=1e-4)


def test_the_model_is_ahead_from_the_forward_to_the_step_alone():
    model = mlp()
    optimizer = private(model)
    disk = optimizer.original_optimizer
    before = snapshot(model)
    take_step(model, optimizer, examples(6))
    after = snapshot(model)
    model(examples(6)[0])
    gamma = (1 - KAPPA) / KAPPA
    for name, p in trained(model).items():
        torch.testing.assert_close(p.detach(), after[name] + gamma * (after[name] - before[name]))
    with torch.no_grad():
        model.eval()(examples(6)[0])
    assert moved(model, after) == set()
    optimizer.recorder.discard()
    model.train()(examples(6)[0])
    assert moved(model, after) == set(trained(model))
    saved = model.state_dict()
    assert all(torch.equal(saved[name], after[name]) for name in after)
    optimizer.recorder.discard()
    model(examples(6)[0])
    disk.to_iterate()
    disk.to_iterate()
    assert moved(model, after) == set()


def test_micro_batches_are_taken_at_one_point():
    ends = []
    for parts in (1, 3):
        model = mlp(dtype=torch.float64)
        optimizer = private(model)
        for step in range(3):
            x, y = examples(6, seed=step)
            optimizer.batch.expect(6)
            for i in range(parts):
                part = slice(i * 6 // parts, (i + 1) * 6 // parts)
                optimizer.signal_skip_step(i < parts - 1)
                optimizer.backward(F.cross_entropy(model(x[part].double()), y[part], reduction="none"))
                optimizer.step()
        ends.append(snapshot(model))
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-10, atol=1e-12)


def test_an_empty_batch_is_a_step_of_the_filter():
    model = mlp()
    optimizer = private(model, noise_multiplier=1.0, max_grad_norm=1.0)
    take_step(model, optimizer, examples(6))
    before = snapshot(model)
    optimizer.step_on_empty_batch()
    assert moved(model, before) == set(trained(model)) and optimizer.ledger.steps == 2


@pytest.mark.slow
def test_noise_is_filtered_as_the_docstring_says_and_told():
    """s√(κ/(2 − κ)), which AdamBC behind it takes out of its second moment."""
    model = mlp()
    optimizer = private(model, make=lambda p: AdamBC(p, lr=0.0), kappa=0.4, noise_multiplier=0.8, max_grad_norm=0.3)
    squares = []
    for _ in range(400):
        optimizer.step_on_empty_batch()
        squares.append(torch.cat([p.grad.double().square().flatten() for p in trained(model).values()]).mean())
    s_squared = optimizer.mechanism.noise_std(55) ** 2 / 36
    expected = s_squared * 0.4 / 1.6
    told = optimizer.original_optimizer.inner._told
    assert all(std**2 == pytest.approx(expected, rel=1e-6) for std in told.values()) and len(told) == 4
    late = torch.stack(squares[20:])
    # Neighbours in time share 0.36 of their squares' variation: fewer independent ones.
    deviation = float(late.std()) * math.sqrt(1.36 / 0.64 / len(late))
    assert abs(float(late.mean()) - expected) < 5.4 * deviation < 0.2 * expected


def test_only_an_optimizer_that_asks_is_told():
    model = mlp()
    plain, asks = torch.optim.SGD(model.parameters(), lr=0.1), AdamBC(list(trained(model).values()))
    assert noise_aware(DiSK(plain, model)) is None and noise_aware(DiSK(asks, model)) is not None
    assert_refuses(ValueError, "leave out noise_std", lambda: private(model, make=lambda p: AdamBC(p, noise_std=0.1)))


@pytest.mark.parametrize("make", [lambda p: torch.optim.AdamW(p, lr=0.01), lambda p: AdamBC(p, lr=0.01)])
def test_a_run_goes_on_where_it_was_saved(make):
    def run(save_after):
        engine, model = PrivacyEngine("rdp", reproducible_seed=3), mlp()
        options = {"engine": engine, "make": make, "phases": "BA", "noise_multiplier": 0.5, "max_grad_norm": 1.0}
        optimizer = private(model, **options)
        for step in range(5):
            take_step(model, optimizer, examples(6, seed=step))
            if step == save_after:
                file = io.BytesIO()
                torch.save([part.state_dict() for part in (model, optimizer, engine)], file)
                file.seek(0)
                model, options["engine"] = mlp(seed=7), PrivacyEngine("rdp", reproducible_seed=3)
                optimizer = private(model, **options)
                for part, state in zip((model, optimizer, options["engine"]), torch.load(file), strict=True):
                    part.load_state_dict(state)
        return snapshot(model)

    whole, resumed = run(None), run(2)
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], rtol=1e-6, atol=1e-8)


def test_weights_that_were_loaded_are_where_it_goes_on_from():
    """At the loaded weights and the last move, not at a point from before."""
    model = mlp()
    optimizer = private(model)
    take_step(model, optimizer, examples(6))
    model.load_state_dict(mlp(seed=5).state_dict())
    before = snapshot(model)
    optimizer.param_groups[0]["lr"] = 0.0
    take_step(model, optimizer, examples(6))
    assert moved(model, before) == set()


def test_averages_are_of_iterates():
    model = mlp()
    optimizer, average, seen = private(model), IterateAverage(model, tail_from=1), []
    for step in range(3):
        take_step(model, optimizer, examples(6, seed=step))
        average.update()
        seen.append(snapshot(model)["2.weight"])
    with average.applied():
        torch.testing.assert_close(model[2].weight.detach(), torch.stack(seen).mean(0))


def test_the_check_of_isolation_takes_the_model():
    model = mlp()
    engine = PrivacyEngine("rdp", reproducible_seed=3)
    optimizer = private(model, engine=engine)
    take_step(model, optimizer, examples(6))
    engine.check_isolation(model, examples(6), F.cross_entropy)
    take_step(model, optimizer, examples(6, seed=2))
    assert optimizer.steps_taken == 2


# What is refused


def test_copies_of_the_model_are_left_alone_and_of_the_optimizer_refused():
    model = nn.Linear(3, 2)
    disk = DiSK(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        disk.step()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = snapshot(twin)
        twin(torch.ones(1, 3))
        assert moved(twin, before) == set() and moved(model, before) == set()
    assert_refuses(TypeError, "cannot be copied or pickled", lambda: copy.deepcopy(disk))


@pytest.mark.parametrize("kappa", [0, 1.1, math.nan])
def test_a_kappa_out_of_range_is_refused(kappa):
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    assert_refuses(ValueError, "kappa must be in (0, 1]", lambda: DiSK(sgd, model, kappa=kappa))


def test_what_cannot_be_wrapped_is_refused():
    model = mlp()
    optimizer = private(model)
    for wrong in (optimizer, optimizer.original_optimizer):
        assert_refuses(ValueError, "give the plain one here, and DiSK to make_private", lambda w=wrong: DiSK(w, model))
    lbfgs = torch.optim.LBFGS(list(trained(model).values()))
    assert_refuses(TypeError, "one gradient a step", lambda: DiSK(lbfgs, model))
    state = optimizer.original_optimizer.state_dict()
    other = DiSK(torch.optim.SGD(list(trained(model).values()), lr=0.1), mlp(), kappa=0.9)
    assert_refuses(ValueError, "of DiSK(kappa=0.6), and this one has 0.9", lambda: other.load_state_dict(state))


def test_the_last_one_made_for_a_model_moves_it_alone():
    """Also where the model is private already, whose own hook counts what is written after it."""
    model = mlp()
    first = private(model)
    take_step(model, first, examples(6))
    model(examples(6)[0])  # ahead, and left there
    second = private(model)
    for step in range(3):
        before = snapshot(model)
        take_step(model, second, examples(6, seed=step))
    after = snapshot(model)
    model(examples(6)[0])
    gamma = (1 - KAPPA) / KAPPA
    for name, p in trained(model).items():
        torch.testing.assert_close(p.detach(), after[name] + gamma * (after[name] - before[name]))
    second.recorder.discard()
    assert_refuses(RuntimeError, "go on with that one", first.original_optimizer.step)


def test_graphs_are_refused():
    """A replay runs no hooks, so that gradients would be taken at the iterate."""
    model = mlp()
    optimizer = private(model)
    assert_refuses(
        ValueError,
        "a replayed graph does not move the model ahead",
        lambda: GraphedStep(model, optimizer, loss_of, batch_size=6),
    )
