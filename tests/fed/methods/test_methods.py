"""The methods and what they promise, on a small model with real private training."""

import contextlib
import math
from dataclasses import replace

import pytest
import torch

from lora_dp.fed.methods import METHODS, LocalTurn, factor, get_method
from lora_dp.fed.methods.dp_lora import DPLoRA
from lora_dp.fed.methods.flat_lora import FlatLoRA
from lora_dp.fed.rounds.messages import Workspace
from lora_dp.lora.config import LoRAConfig
from lora_dp.lora.injection import inject_lora
from tests.fed.small import PLAIN, TRAINING, Adapted, make_federation, products, updates


@pytest.mark.parametrize(
    ("method", "phases"),
    [
        ("la-lora", ["BA"] * 3),
        ("dp-lora", ["AB"] * 3),
        ("ffa-lora", ["B"] * 3),
        ("rolora", ["B", "A", "B"]),
        ("flora", ["AB"] * 3),
        ("flexlora", ["AB"] * 3),
        ("lora-fair", ["AB"] * 3),
        ("rac-lora", ["B"] * 3),
        ("galore", ["A", "B", "A"]),
        ("head-only", ["AB"] * 3),
        ("fedsvd", ["B"] * 3),
        ("lora-xs", ["AB"] * 3),
        ("prism", ["AB"] * 3),
        ("fedask", ["AB"] * 3),
        ("dp-fedadamw", ["AB"] * 3),
        ("flat-lora", ["AB"] * 3),
        ("flat-lora:rolora", ["B", "A", "B"]),
    ],
)
def test_phases_by_round(method, phases):
    assert [get_method(method).phases(index) for index in range(3)] == phases


def test_deer_trains_b_and_then_a_in_every_round():
    deer = get_method("deer")
    assert deer.turns == 2
    assert [[deer.phases(index, turn) for turn in range(2)] for index in range(2)] == [["B", "A"]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("local_steps", [1, 3])
def test_la_lora_alternates_through_the_rounds(local_steps):
    """With an odd number of local steps too, each factor has its turn: the cycle does not begin anew in each round."""
    federation = make_federation("la-lora", replace(TRAINING, local_steps=local_steps))
    start = dict(federation.server.state)
    federation.run_round([0])
    middle = dict(federation.server.state)
    federation.run_round([0])
    b, a = "1.lora_B", "1.lora_A"
    assert not torch.equal(start[b], middle[b])
    if local_steps == 1:
        assert torch.equal(start[a], middle[a]) and torch.equal(middle[b], federation.server.state[b])
    assert not torch.equal(middle[a], federation.server.state[a])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rolara", "Did you mean rolora"),
        ("rolora:deer", "There is no method 'rolora:deer'"),
        ("flat-lora:rolara", "Did you mean rolora"),
    ],
)
def test_an_unknown_method_names_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        get_method(name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("la-lora", {"rho": 1}, "The method la-lora has no option 'rho': it has none"),
        ("lora-fair", {"rho": 1}, "it has regularisation, objective"),
        ("lora-fair", {"objective": "l1"}, "must be ridge or cosine"),
        ("lora-fair", {"regularisation": 0}, "must be positive"),
        ("rac-lora", {"trained": "AB"}, "must be A or B"),
        ("dp-fedadamw", {"pull": 1}, "must be in \\[0, 1\\), not 1.0: 0.5 is usual"),
        ("fedask", {"oversampling": -1}, "must not be negative, not -1: 8 is usual"),
        ("flat-lora", {"rho": -1}, "must not be negative"),
        ("flat-lora:deer", {"rho": "abc"}, "The option rho of flat-lora:deer must be a number, not 'abc'"),
        ("flat-lora", {"rho": math.inf}, "must be a number, not inf"),
        ("lora-fair", {"regularisation": "abc"}, "The option regularisation of lora-fair must be a number, not 'abc'"),
        ("lora-fair", {"regularisation": math.nan}, "must be a number, not nan"),
        ("flat-lora:", {}, "lacks a method to smooth: write flat-lora:dp-lora"),
        ("flat-lora:flat-lora:deer", {}, "lacks a method to smooth"),
    ],
)
def test_a_wrong_option_of_a_method_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_method(name, options)


def test_options_reach_the_method_and_the_one_beneath():
    wrapped = get_method("flat-lora:lora-fair", {"rho": 0.2, "objective": "cosine"})
    assert isinstance(wrapped, FlatLoRA) and wrapped.rho == 0.2
    assert wrapped.base == get_method("lora-fair", {"objective": "cosine"})


class OwnWays(DPLoRA):
    """A method that overrides what flat-lora must pass on."""

    def learning_rate(self, epsilon):
        return 0.123

    def trains(self, parameter, round_index, turn=0):
        return parameter.endswith("lora_B")

    def beside(self, state, whole_clients):
        return {"own": torch.ones(1) if whole_clients else torch.zeros(1)}

    def optimizer(self, turn):
        return torch.optim.Rprop(turn.groups)

    @contextlib.contextmanager
    def local_step(self, model, step, steps, generator):
        model.entered = step
        yield


def test_flat_lora_passes_on_all_that_its_base_says():
    wrapped, model = FlatLoRA(OwnWays()), Adapted()
    assert wrapped.learning_rate(8.0) == 0.123
    assert [name for name in ("1.lora_A", "1.lora_B", "4.weight") if wrapped.trains(name, 0)] == ["1.lora_B"]
    with wrapped.local_step(model, 5, 10, torch.Generator().manual_seed(0)):
        assert model.entered == 5
    assert wrapped.beside({}, True) == {"own": torch.ones(1)} and wrapped.beside({}, False) == {"own": torch.zeros(1)}
    turn = LocalTurn(torch.optim.SGD, [{"params": [model[4].weight], "lr": 0.1}], {}, 0, 1)
    assert type(wrapped.optimizer(turn)) is torch.optim.Rprop
    assert get_method("flat-lora:dp-fedadamw").own_optimizer and not wrapped.own_optimizer


@pytest.mark.parametrize("method", METHODS)
def test_the_default_learning_rate_is_that_of_the_nearest_budget(method):
    made = get_method(method)
    tuned = made.learning_rates
    rates = {epsilon: made.learning_rate(epsilon) for epsilon in (0.1, 1.7, 1.8, 4.8, 5.0, None)}
    assert rates == {0.1: tuned[1], 1.7: tuned[1], 1.8: tuned[3], 4.8: tuned[3], 5.0: tuned[8], None: tuned[math.inf]}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_round_changes_the_head_and_each_adapted_weight(method):
    federation = make_federation(method)
    for _ in range(2):
        before = dict(federation.server.state)
        federation.run_round([0, 1, 2])
        after = federation.server.state
        assert not after["4.weight"].equal(before["4.weight"])
        for layer, product in products(after).items():
            assert not torch.allclose(product, products(before)[layer], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["la-lora", "dp-lora", "ffa-lora", "rolora", "deer"])
def test_a_turn_sends_what_it_trains_and_nothing_else(method):
    federation = make_federation(method)
    for turn in range(federation.method.turns):
        for update in updates(federation, turn):
            phases = federation.method.phases(0, turn)
            assert set(update) == {n for n in federation.server.state if factor(n) is None or factor(n) in phases}
            assert not any(
                tensor.equal(federation.server.state[name]) for name, tensor in update.items() if factor(name) != "A"
            )  # beside a B of zero, A has no gradient but has noise


# Flat-LoRA


@pytest.mark.slow
@pytest.mark.parametrize("base", ["dp-lora", "rolora", "flora", "deer"])
def test_flat_lora_without_perturbation_is_its_base(base):
    states = []
    for method, options in ((base, None), (f"flat-lora:{base}", {"rho": 0.0})):
        federation = make_federation(method, options=options)
        federation.run_round([0, 1, 2])
        states.append(federation.server.state)
    assert all(tensor.equal(states[1][name]) for name, tensor in states[0].items())


@pytest.mark.slow
def test_flat_lora_perturbs_each_row_in_proportion_and_leaves_the_weight_as_it_was():
    model = Adapted(r=2)
    layer = model[1]
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(6, 2, dtype=torch.float64))
    before = layer.weight.data
    kept = before.clone()
    flat = get_method("flat-lora", {"rho": 0.1})
    noise = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(3000):
        with flat.local_step(model, 9, 10, generator):
            noise.append(layer.weight.data - before)
    assert layer.weight.data_ptr() == before.data_ptr() and before.equal(kept)
    drawn = torch.stack(noise)
    expected = 0.1 * (before + layer.lora_B @ layer.lora_A).detach().norm(dim=1) / math.sqrt(12)
    found = drawn.square().mean((0, 2)).sqrt()
    # 36,000 values a row: a relative deviation of 0.0037
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    assert drawn.mean(0).abs().max() < 5 * expected.max() / math.sqrt(3000)


def test_flat_lora_rises_on_a_half_cosine_and_survives_an_exception():
    model = Adapted()
    weight = model[1].weight.data
    flat = get_method("flat-lora", {"rho": 1.0})
    sizes = []
    for step in (0, 4, 9):
        with flat.local_step(model, step, 10, torch.Generator().manual_seed(0)):
            sizes.append(float((model[1].weight.data - weight).norm()))
    shares = [size / sizes[-1] for size in sizes]
    assert shares == pytest.approx([(1 - math.cos(math.pi * step / 10)) / 2 for step in (1, 5, 10)])
    with pytest.raises(KeyError), flat.local_step(model, 5, 10, torch.Generator()):
        raise KeyError
    assert model[1].weight.data_ptr() == weight.data_ptr()


# The start of A


@pytest.mark.parametrize(("init_a", "orthonormal"), [("kaiming", False), ("orthonormal", True)])
@pytest.mark.parametrize(("method", "drawn"), [("flora", "A"), ("rac-lora", "A"), ("rac-lora", "B")])
def test_a_factor_that_is_drawn_anew_starts_as_the_model_s_own(method, drawn, init_a, orthonormal):
    made = get_method(method, {"trained": "AB".replace(drawn, "")} if method == "rac-lora" else None)
    model = inject_lora(
        torch.nn.Sequential(torch.nn.Linear(9, 7)), LoRAConfig(r=3, target_modules=["0"], init_a=init_a)
    )
    workspace = Workspace(model)
    fresh = made.begin(workspace.state(), workspace.layers, 1, torch.Generator().manual_seed(0))
    rows = fresh[f"0.lora_{drawn}"] if drawn == "A" else fresh["0.lora_B"].t()
    assert torch.allclose(rows @ rows.t(), torch.eye(3) / 3, atol=1e-6) is orthonormal
    assert 0 < rows.abs().max() <= 1 / math.sqrt(rows.shape[1]) or orthonormal


# Local settings


def test_lr_ratio_is_the_learning_rate_of_b_over_that_of_a_and_the_head():
    optimizer = replace(PLAIN, learning_rate=0.1, lr_ratio=2.0).make_optimizer(model := Adapted())
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        expected = None if not parameter.requires_grad else 0.2 if factor(name) == "B" else 0.1
        assert rates.get(id(parameter)) == expected


@pytest.mark.slow
def test_the_low_pass_filter_reaches_the_adapters_and_not_the_head():
    states = {}
    for strength in (0.0, 3.0):
        training = replace(TRAINING, low_pass="gaussian", low_pass_strength=strength, local_steps=1)
        federation = make_federation("la-lora", training, sizes=(12,))
        federation.run_round([0])
        states[strength] = federation.server.state
    same = {name for name, tensor in states[0.0].items() if tensor.equal(states[3.0][name])}
    assert same == {name for name in states[0.0] if factor(name) != "B"}
