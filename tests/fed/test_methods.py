"""The methods and what they promise, on a small model with real private training."""

import gc
import itertools
import math
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp.fed.client import LocalTraining
from lora_dp.fed.examples import ImageExamples
from lora_dp.fed.federation import Federation
from lora_dp.fed.methods import METHODS, WeightedAverage, factor, get_method
from lora_dp.layers import DPLinear, DPLoRALinear

PRIVATE = LocalTraining(
    optimizer="sgd", learning_rate=0.3, lr_ratio=1.0, low_pass=None, low_pass_strength=0.0, batch_size=8, local_steps=3,
    participations=4, epsilon=8.0, delta=1e-5, max_grad_norm=1.0, clipping="flat", accountant="rdp",
)
PLAIN = replace(PRIVATE, epsilon=None, batch_size=1000)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    head = DPLinear.from_linear(nn.Linear(6, 3))
    model = nn.Sequential(nn.Flatten(), DPLoRALinear(12, 6, r=2), nn.Tanh(), DPLoRALinear(6, 6, r=2, alpha=1), head)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("4.") or factor(name) is not None)
    return model.double()


class Doubles(ImageExamples):
    def _inputs(self, rows: Tensor) -> dict[str, Tensor]:
        return {name: tensor.double() for name, tensor in super()._inputs(rows).items()}


def make_examples(count: int, seed: int) -> ImageExamples:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, 3, 4), dtype=torch.uint8, generator=generator)
    return Doubles(pixels, torch.randint(0, 3, (count,), generator=generator), (0.5,), (0.5,))


def make_federation(method: str, training: LocalTraining, sizes: tuple[int, ...] = (12, 20, 9)) -> Federation:
    parts = [make_examples(size, seed) for seed, size in enumerate(sizes)]
    return Federation(make_model(), parts, make_examples(5, 99), get_method(method), training, reproducible=True)


@pytest.mark.parametrize(
    ("method", "phases"),
    [("la-lora", ["BA"] * 3), ("dp-lora", ["AB"] * 3), ("ffa-lora", ["B"] * 3), ("rolora", ["B", "A", "B"])],
)
def test_phases_by_round(method, phases):
    assert [get_method(method).phases(index) for index in range(3)] == phases


@pytest.mark.parametrize("local_steps", [1, 3])
def test_la_lora_alternates_through_the_rounds(local_steps):
    """With an odd number of local steps too, each factor has its turn: the cycle does not begin anew in each round."""
    federation = make_federation("la-lora", replace(PRIVATE, local_steps=local_steps, participations=2))
    start = {name: tensor.clone() for name, tensor in federation.server.state.items()}
    federation.run_round([0])
    middle = {name: tensor.clone() for name, tensor in federation.server.state.items()}
    federation.run_round([0])
    b = next(name for name in start if name.endswith("lora_B"))
    a = next(name for name in start if name.endswith("lora_A"))
    assert not torch.equal(start[b], middle[b])
    if local_steps == 1:
        assert torch.equal(start[a], middle[a]) and torch.equal(middle[b], federation.server.state[b])
    assert not torch.equal(middle[a], federation.server.state[a])


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean rolora"):
        get_method("rolara")


@pytest.mark.parametrize("method", METHODS)
def test_the_default_learning_rate_is_that_of_the_nearest_budget(method):
    tuned = METHODS[method].learning_rates
    rates = {epsilon: METHODS[method]().learning_rate(epsilon) for epsilon in (0.1, 1.7, 1.8, 4.8, 5.0, None)}
    assert rates == {0.1: tuned[1], 1.7: tuned[1], 1.8: tuned[3], 4.8: tuned[3], 5.0: tuned[8], None: tuned[math.inf]}


@pytest.mark.parametrize("method", METHODS)
def test_a_round_changes_what_the_method_trains_and_nothing_else(method):
    federation = make_federation(method, PRIVATE)
    for index in range(2):
        before = dict(federation.server.state)
        federation.run_round([0, 1, 2])
        changed = {name for name, tensor in federation.server.state.items() if not tensor.equal(before[name])}
        phases = federation.method.phases(index)
        assert changed == {name for name in before if factor(name) is None or factor(name) in phases}


def centralised(method: str, training: LocalTraining, examples: ImageExamples, rounds: int) -> dict[str, Tensor]:
    """Plain full-batch torch, written out: what one client without noise or clipping must do. Alternation goes on
    through the rounds, also after an odd number of steps."""
    model = make_model()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    cycles = {"BA": "BA", "AB": ("AB",), "A": "A", "B": "B"}
    batch = examples.batch(range(len(examples)))
    for index in range(rounds):
        groups = [
            {"params": [p], "lr": training.learning_rate * (training.lr_ratio if factor(name) == "B" else 1)}
            for name, p in parameters.items()
        ]
        optimizer = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[training.optimizer](groups)
        cycle = cycles[get_method(method).phases(index)]
        first = index * training.local_steps
        for step in range(first, first + training.local_steps):
            optimizer.zero_grad()
            F.cross_entropy(model(batch["pixel_values"]), batch["labels"]).backward()
            for name, p in parameters.items():
                if factor(name) is not None and factor(name) not in cycle[step % len(cycle)]:
                    p.grad = None
            optimizer.step()
    return {name: p.detach() for name, p in parameters.items()}


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", METHODS)
def test_one_client_without_privacy_is_the_centralised_optimizer(method, optimizer):
    training = replace(PLAIN, optimizer=optimizer, learning_rate=0.05, lr_ratio=3.0)
    federation = make_federation(method, training, sizes=(12,))
    start = {name: tensor.clone() for name, tensor in federation.server.state.items()}
    for _ in range(3):
        federation.run_round([0])
    expected = centralised(method, training, make_examples(12, 0), rounds=3)
    assert_same(federation.server.state, expected)
    assert any(not tensor.equal(start[name]) for name, tensor in expected.items())


def products(state: dict[str, Tensor]) -> dict[str, Tensor]:
    layers = {name.rpartition(".")[0] for name in state if factor(name)}
    return {layer: state[f"{layer}.lora_B"] @ state[f"{layer}.lora_A"] for layer in layers}


@pytest.mark.parametrize(
    ("method", "exact"), [("ffa-lora", True), ("rolora", True), ("la-lora", False), ("dp-lora", False)]
)
def test_the_average_of_the_products_is_the_product_of_the_averages(method, exact):
    federation = make_federation(method, PRIVATE)
    for index in range(3):
        before = dict(federation.server.state)
        # An identical federation, to see each client's own result.
        twin = make_federation(method, PRIVATE)
        for client, own in zip(federation.clients, twin.clients, strict=True):
            own._engine.load_state_dict(client._engine.state_dict())
        updates = [c.train(twin.model, before, federation.method, index) for c in twin.clients]
        federation.run_round([0, 1, 2])
        sizes = [len(client.examples) for client in federation.clients]
        of_averages = products(federation.server.state)
        each = [products({**before, **update}) for update in updates]
        gap = 0.0
        for layer, product in of_averages.items():
            ideal = sum(size * one[layer] for size, one in zip(sizes, each, strict=True)) / sum(sizes)
            gap = max(gap, float((product - ideal).norm() / ideal.norm()))
        assert gap < 1e-10 if exact else gap > 1e-3


def test_a_round_does_not_depend_on_the_order_of_the_clients():
    states = []
    for order in itertools.permutations(range(3)):
        federation = make_federation("la-lora", PRIVATE)
        federation.run_round(order)
        states.append(federation.server.state)
    for state in states[1:]:
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, states[0][name], rtol=1e-12, atol=1e-14)


def test_weighted_average_is_exact_and_keeps_dtypes():
    average = WeightedAverage()
    average.add({"x": torch.tensor([1.0, 2.0]), "h": torch.tensor([2.0], dtype=torch.bfloat16)}, 3)
    average.add({"x": torch.tensor([5.0, -2.0]), "h": torch.tensor([6.0], dtype=torch.bfloat16)}, 1)
    result = average.result()
    assert result["x"].tolist() == [2.0, 1.0] and result["h"].tolist() == [3.0]
    assert (result["x"].dtype, result["h"].dtype) == (torch.float32, torch.bfloat16)


def test_aggregation_streams():
    """No update is kept: what is alive after a thousand of them is one sum."""
    average = WeightedAverage()
    alive = []
    for number in range(1000):
        tensor = torch.full((50,), float(number))
        alive.append(weakref.ref(tensor))
        average.add({"x": tensor}, 1)
        del tensor
    gc.collect()
    assert not any(reference() is not None for reference in alive)
    assert average.result()["x"].tolist() == [499.5] * 50


def test_an_average_refuses_what_does_not_belong_together():
    average = WeightedAverage()
    with pytest.raises(RuntimeError, match="at least one client"):
        average.result()
    average.add({"x": torch.zeros(2)}, 1)
    with pytest.raises(ValueError, match="these differ: x, y"):
        average.add({"y": torch.zeros(2)}, 1)
    with pytest.raises(ValueError, match="must be positive"):
        average.add({"x": torch.zeros(2)}, 0)


def test_lr_ratio_is_the_learning_rate_of_b_over_that_of_a_and_the_head():
    optimizer = replace(PLAIN, learning_rate=0.1, lr_ratio=2.0).make_optimizer(model := make_model())
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        expected = None if not parameter.requires_grad else 0.2 if factor(name) == "B" else 0.1
        assert rates.get(id(parameter)) == expected


def test_the_low_pass_filter_reaches_the_adapters_and_not_the_head():
    states = {}
    for strength in (0.0, 3.0):
        training = replace(PRIVATE, low_pass="gaussian", low_pass_strength=strength, local_steps=1)
        federation = make_federation("la-lora", training, sizes=(12,))
        federation.run_round([0])
        states[strength] = federation.server.state
    same = {name for name, tensor in states[0.0].items() if tensor.equal(states[3.0][name])}
    assert same == {name for name in states[0.0] if factor(name) != "B"}
