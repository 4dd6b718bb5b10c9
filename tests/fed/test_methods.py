"""The methods and what they promise, on a small model with real private training."""

import contextlib
import gc
import itertools
import math
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_dp.fed.examples import ImageExamples
from lora_dp.fed.lowrank import LowRank
from lora_dp.fed.methods import METHODS, WeightedAverage, factor, get_method
from lora_dp.fed.methods.dp_lora import DPLoRA
from lora_dp.fed.methods.flat_lora import FlatLoRA
from lora_dp.layers import DPLoRALinear
from tests.fed.small import PLAIN, TRAINING, Adapted, make_examples, make_federation, products, updates

MERGING = ("flora", "rac-lora", "galore")


@pytest.mark.parametrize(
    ("method", "phases"),
    [
        ("la-lora", ["BA"] * 3), ("dp-lora", ["AB"] * 3), ("ffa-lora", ["B"] * 3), ("rolora", ["B", "A", "B"]),
        ("flora", ["AB"] * 3), ("flexlora", ["AB"] * 3), ("lora-fair", ["AB"] * 3), ("rac-lora", ["B"] * 3),
        ("galore", ["A", "B", "A"]), ("flat-lora", ["AB"] * 3), ("flat-lora:rolora", ["B", "A", "B"]),
    ],
)
def test_phases_by_round(method, phases):
    assert [get_method(method).phases(index) for index in range(3)] == phases


def test_deer_trains_b_and_then_a_in_every_round():
    deer = get_method("deer")
    assert deer.turns == 2
    assert [[deer.phases(index, turn) for turn in range(2)] for index in range(2)] == [["B", "A"]] * 2


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
        ("rolara", "Did you mean rolora"), ("rolora:deer", "There is no method 'rolora:deer'"),
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


@pytest.mark.parametrize("method", METHODS)
def test_the_default_learning_rate_is_that_of_the_nearest_budget(method):
    made = get_method(method)
    tuned = made.learning_rates
    rates = {epsilon: made.learning_rate(epsilon) for epsilon in (0.1, 1.7, 1.8, 4.8, 5.0, None)}
    assert rates == {0.1: tuned[1], 1.7: tuned[1], 1.8: tuned[3], 4.8: tuned[3], 5.0: tuned[8], None: tuned[math.inf]}


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


@pytest.mark.parametrize("method", ["la-lora", "dp-lora", "ffa-lora", "rolora", "deer"])
def test_a_turn_sends_what_it_trains_and_nothing_else(method):
    federation = make_federation(method)
    for turn in range(federation.method.turns):
        for update in updates(federation, turn):
            phases = federation.method.phases(0, turn)
            assert set(update) == {n for n in federation.server.state if factor(n) is None or factor(n) in phases}
            assert not any(tensor.equal(federation.server.state[name]) for name, tensor in update.items()
                           if factor(name) != "A")  # beside a B of zero, A has no gradient but has noise


# One client without noise or clipping: the centralised optimiser, written out


def plain_step(model, optimizer, batch, trained: str) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(batch["pixel_values"]), batch["labels"]).backward()
    for name, p in model.named_parameters():
        if factor(name) is not None and factor(name) not in trained:
            p.grad = None
    optimizer.step()


def centralised(method: str, training, examples: ImageExamples, rounds: int) -> dict[str, Tensor]:
    """Plain full-batch torch; returns head and adapted weights W. Alternation goes on through the rounds."""
    model = Adapted()
    adapted = {name: m for name, m in model.named_modules() if isinstance(m, DPLoRALinear)}
    batch = examples.batch(range(len(examples)))
    made = get_method(method)
    random = federation_generators(rounds)
    for index in range(rounds):
        begin(method, adapted, index, random[index])
        for turn in range(made.turns):
            groups = [
                {"params": [p], "lr": training.learning_rate * (training.lr_ratio if factor(name) == "B" else 1)}
                for name, p in model.named_parameters() if p.requires_grad
            ]
            optimizer = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[training.optimizer](groups)
            phases = made.phases(index, turn)
            cycle = ("AB",) if phases == "AB" else phases
            for step in range(index * training.local_steps, (index + 1) * training.local_steps):
                plain_step(model, optimizer, batch, cycle[step % len(cycle)])
        finish(method, adapted, index)
    head = {f"4.{n}": p.detach() for n, p in model[4].named_parameters()}
    return {**head, **{n: (m.weight + m.lora_B @ m.lora_A).detach() for n, m in adapted.items()}}


def federation_generators(rounds: int) -> list[torch.Generator]:
    """The public generator of each round, as the server makes it."""
    from lora_dp.fed import federation
    from lora_dp.fed.client import derived_seed

    return [torch.Generator().manual_seed(derived_seed(0, federation._BEGIN, index)) for index in range(rounds)]


@torch.no_grad()
def begin(method: str, adapted, index: int, generator: torch.Generator) -> None:
    for layer in adapted.values():
        if method == "rac-lora" or method == "flora" and index:
            drawn = torch.rand(layer.lora_A.shape, generator=generator, dtype=torch.float64) * 2 - 1
            layer.lora_A.copy_(drawn / math.sqrt(layer.in_features))
            layer.lora_B.zero_()
        if method == "galore" and index == 0:
            drawn = torch.randn(layer.lora_B.shape, generator=generator, dtype=torch.float64)
            layer.lora_B.copy_(torch.linalg.qr(drawn)[0])
            layer.lora_A.zero_()


@torch.no_grad()
def finish(method: str, adapted, index: int) -> None:
    for layer in adapted.values():
        if method in MERGING:
            layer.weight.add_(layer.lora_B @ layer.lora_A)
        if method in ("flora", "rac-lora"):
            layer.lora_B.zero_()
        if method == "galore" and index % 2 == 0:
            layer.lora_A.copy_(torch.linalg.qr(layer.lora_A.t())[0].t())
            layer.lora_B.zero_()
        elif method == "galore":
            layer.lora_B.copy_(torch.linalg.qr(layer.lora_B)[0])
            layer.lora_A.zero_()
        if method == "flexlora":
            u, s, vh = torch.linalg.svd(layer.lora_B @ layer.lora_A)
            r = layer.r
            layer.lora_B.copy_(u[:, :r] * s[:r])
            layer.lora_A.copy_(vh[:r])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "flat-lora"])
def test_one_client_without_privacy_is_the_centralised_optimizer(method, optimizer):
    training = replace(PLAIN, optimizer=optimizer, learning_rate=0.05, lr_ratio=3.0)
    federation = make_federation(method, training, sizes=(12,), epsilon=None)
    for _ in range(3):
        federation.run_round([0])
    expected = centralised(method, training, make_examples(12, 0), rounds=3)
    federation.load_global_state()
    model = federation.model
    found = {f"4.{n}": p.detach() for n, p in model[4].named_parameters()}
    found |= {n: (m.weight + m.lora_B @ m.lora_A).detach()
              for n, m in model.named_modules() if isinstance(m, DPLoRALinear)}
    start = Adapted()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-9, msg=name)
    assert not torch.allclose(expected["1"], start[1].weight, rtol=1e-3)


# How averaging treats the products


@pytest.mark.parametrize("privacy", [{}, {"epsilon": None}])
@pytest.mark.parametrize(
    ("method", "exact"),
    [
        ("ffa-lora", True), ("rolora", True), ("deer", True), ("rac-lora", True), ("galore", True), ("flora", True),
        ("la-lora", False), ("dp-lora", False), ("lora-fair", False),
    ],
)
def test_the_average_of_the_products_is_the_product_of_the_averages(method, exact, privacy):
    """Over three rounds, merged weights included; a twin federation shows what each client sent."""
    federation, twin = make_federation(method, **privacy), make_federation(method, **privacy)
    sizes = federation.account.sizes.tolist()
    for index in range(3):
        gap = 0.0
        if federation.method.turns == 1:
            twin.server.begin(index, federation_generators(3)[index])
            before = dict(twin.server.state)
            each = [products({**before, **update}) for update in updates(twin)]
            twin.server.state = before
            twin.run_round([0, 1, 2])
            federation.run_round([0, 1, 2])
            for layer, product in products(federation.server.state).items():
                ideal = sum(size * one[layer] for size, one in zip(sizes, each, strict=True)) / sum(sizes)
                gap = max(gap, float((product - ideal).norm() / ideal.norm()))
        else:
            for turn in range(2):
                before = dict(federation.server.state)
                each = [products({**before, **update}) for update in updates(federation, turn)]
                federation._run_turn(index, turn, [0, 1, 2], lambda: None)
                for layer, product in products(federation.server.state).items():
                    ideal = sum(size * one[layer] for size, one in zip(sizes, each, strict=True)) / sum(sizes)
                    gap = max(gap, float((product - ideal).norm() / ideal.norm()))
            federation.rounds_done += 1
        assert gap < 1e-10 if exact else gap > 1e-4, (index, gap)


@pytest.mark.parametrize("ranks", [None, (2, 1, 4)])
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_flora_merges_the_exact_sum_of_products(ranks, alpha):
    federation = make_federation("flora", r=4, alpha=alpha, ranks=ranks)
    layers = federation.server.layers
    total: dict[str, Tensor] = {layer: torch.zeros(shape).double() for layer, shape in layers.shapes.items()}
    for index in range(3):
        federation.server.begin(index, federation_generators(3)[index])
        sent = updates(federation)
        for update, size in zip(sent, federation.account.sizes.tolist(), strict=True):
            for layer in total:
                a, b = update[f"{layer}.lora_A"], update[f"{layer}.lora_B"]
                total[layer] += size / 41 * (1 if alpha is None else alpha / len(a)) * b @ a
        federation.run_round([0, 1, 2])
        for layer, expected in total.items():
            torch.testing.assert_close(federation.server.state[f"{layer}.merged"], expected, rtol=1e-12, atol=1e-14)
            assert not federation.server.state[f"{layer}.lora_B"].any()
    assert [update["1.lora_A"].shape[0] for update in sent] == list(ranks or (4, 4, 4))


def ideal_products(federation, sent):
    scaling = federation.server.layers.scaling
    sizes = federation.account.sizes.tolist()
    return {
        layer: sum(
            size / sum(sizes) * scaling(len(update[f"{layer}.lora_A"])) * update[f"{layer}.lora_B"]
            @ update[f"{layer}.lora_A"] for size, update in zip(sizes, sent, strict=True))
        for layer in federation.server.layers.shapes
    }


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_flexlora_is_exact_at_full_rank_and_the_best_cut_below(alpha):
    for r, ranks in ((6, (6, 3, 1)), (2, None)):
        federation = make_federation("flexlora", r=r, alpha=alpha, ranks=ranks)
        for _ in range(2):
            ideal = ideal_products(federation, updates(federation))
            federation.run_round([0, 1, 2])
            found = products(federation.server.state, federation.server.layers.scaling(r))
            for layer, matrix in ideal.items():
                tail = torch.linalg.svdvals(matrix)[r:].norm()
                torch.testing.assert_close((found[layer] - matrix).norm(), tail, rtol=1e-6, atol=1e-12)
                assert bool(tail < 1e-12) is (r == 6)


def test_flexlora_gives_each_client_the_best_cut_at_its_rank():
    federation = make_federation("flexlora", r=4, alpha=2.0, ranks=(4, 2, 1))
    federation.run_round([0, 1, 2])
    layers, state = federation.server.layers, federation.server.state
    whole = products(state, layers.scaling(4))
    for rank in (4, 2, 1):
        cut = products(federation.method.for_client(state, layers, rank), layers.scaling(rank))
        for layer, matrix in whole.items():
            tail = torch.linalg.svdvals(matrix)[rank:].norm()
            torch.testing.assert_close((cut[layer] - matrix).norm(), tail, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("objective", ["ridge", "cosine"])
def test_lora_fair_is_never_further_from_the_ideal_than_plain_averaging(objective):
    federation = make_federation("lora-fair", options={"objective": objective})
    plain = make_federation("dp-lora")
    for index in range(3):
        sent = updates(federation)
        ideal = ideal_products(federation, sent)
        plain.server.state, plain.rounds_done = dict(federation.server.state), index
        plain.run_round([0, 1, 2])
        federation.run_round([0, 1, 2])
        for layer, matrix in ideal.items():
            corrected, averaged = (products(f.server.state)[layer] for f in (federation, plain))
            if objective == "ridge":
                assert (corrected - matrix).norm() < (averaged - matrix).norm()
            cosines = [F.cosine_similarity(p.flatten(), matrix.flatten(), dim=0) for p in (corrected, averaged)]
            assert cosines[0] > cosines[1] - (0 if objective == "cosine" else 1)


def test_lora_fair_solves_its_ridge_regression():
    generator = torch.Generator().manual_seed(0)
    a, b, m = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 7), (5, 2), (5, 7)))
    fair = get_method("lora-fair", {"regularisation": 0.1})
    found = fair._correction(a, b, m, 1.0)
    weight = 0.1 * (a @ a.t()).diagonal().mean()
    variable = found.clone().requires_grad_(True)
    (((b + variable) @ a - m).square().sum() + weight * variable.square().sum()).backward()
    assert variable.grad.abs().max() < 1e-12
    low = LowRank(m, torch.eye(7, dtype=torch.float64))
    torch.testing.assert_close(fair._correction(a, b, low, 1.0), found)


def test_rac_lora_draws_a_fresh_frozen_factor_each_round():
    for trained, frozen in (("B", "A"), ("A", "B")):
        federation = make_federation("rac-lora", options={"trained": trained})
        seen = []
        for index in range(3):
            federation.server.begin(index, federation_generators(3)[index])
            seen.append(federation.server.state[f"1.lora_{frozen}"])
            assert all(set(update) == {f"1.lora_{trained}", f"3.lora_{trained}", "4.weight", "4.bias"}
                       for update in updates(federation))
            federation.run_round([0, 1, 2])
            assert not federation.server.state[f"1.lora_{trained}"].any()
        assert not any(a.equal(b) for a, b in itertools.combinations(seen, 2))


def test_galore_finds_the_leading_subspace_of_the_gradient():
    """With a constant gradient, alternating sides is subspace iteration: the movement of a round approaches the part of
    the gradient in its leading singular directions."""
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(6, 12, generator=generator, dtype=torch.float64)
    galore = get_method("galore")
    federation = make_federation("galore")
    layers = federation.server.layers
    state = dict(federation.server.state)
    state |= galore.begin(state, layers, 0, generator)
    best = torch.linalg.svdvals(gradient)[:2].norm()
    caught = []
    for index in range(40):
        a, b = state["1.lora_A"], state["1.lora_B"]
        mean = {name: tensor for name, tensor in state.items() if factor(name) == galore.phases(index)}
        mean["1.lora_" + galore.phases(index)] = b.t() @ gradient if index % 2 == 0 else gradient @ a.t()
        combined = galore.combine(mean, state, layers, index)
        moved = combined["1.merged"]
        caught.append(float((moved.left @ moved.right).norm() / best))
        state |= {n: t for n, t in combined.items() if not n.endswith(".merged")}
    assert caught[0] < 0.9 and caught[-1] == pytest.approx(1, abs=1e-3)
    assert all(later > earlier - 1e-9 for earlier, later in itertools.pairwise(caught[2:]))


# Flat-LoRA


@pytest.mark.parametrize("base", ["dp-lora", "rolora", "flora", "deer"])
def test_flat_lora_without_perturbation_is_its_base(base):
    states = []
    for method, options in ((base, None), (f"flat-lora:{base}", {"rho": 0.0})):
        federation = make_federation(method, options=options)
        federation.run_round([0, 1, 2])
        states.append(federation.server.state)
    assert all(tensor.equal(states[1][name]) for name, tensor in states[0].items())


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


# Aggregation


@pytest.mark.parametrize("method", METHODS)
def test_a_round_does_not_depend_on_the_order_of_the_clients(method):
    states = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        federation = make_federation(method)
        federation.run_round(order)
        states.append({**federation.server.state, **products(federation.server.state)})
    for state in states[1:]:
        for name, tensor in state.items():
            if factor(name) is None or method != "flexlora":  # singular vectors have signs of their own
                torch.testing.assert_close(tensor, states[0][name], rtol=1e-9, atol=1e-12)


def test_weighted_average_is_exact_and_keeps_dtypes():
    average = WeightedAverage()
    average.add({"x": torch.tensor([1.0, 2.0]), "h": torch.tensor([2.0], dtype=torch.bfloat16)}, 3)
    average.add({"x": torch.tensor([5.0, -2.0]), "h": torch.tensor([6.0], dtype=torch.bfloat16)}, 1)
    result = average.result()
    assert result["x"].tolist() == [2.0, 1.0] and result["h"].tolist() == [3.0]
    assert (result["x"].dtype, result["h"].dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("method", METHODS)
def test_aggregation_streams(method):
    """No update is kept: what is alive after hundreds of them is bounded by the model."""
    made = get_method(method)
    layers = make_federation(method).server.layers
    average = made.aggregation()
    generator = torch.Generator().manual_seed(0)
    alive = []
    for _ in range(300):
        update = {"4.weight": torch.randn(3, 6, generator=generator)}
        for layer, (d_out, d_in) in layers.shapes.items():
            update[f"{layer}.lora_A"] = torch.randn(2, d_in, generator=generator)
            update[f"{layer}.lora_B"] = torch.randn(d_out, 2, generator=generator)
        alive += [weakref.ref(tensor) for tensor in update.values()]
        average.add(made.contribution(update, layers), 1)
        del update
    gc.collect()
    assert not any(reference() is not None for reference in alive)
    held = sum(t.numel() for t in _tensors(average))
    assert held <= 2 * (18 + sum(d_out * d_in + 2 * (d_out + d_in) for d_out, d_in in layers.shapes.values()))


def _tensors(value):
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for each in value.values() for t in _tensors(each)]
    if isinstance(value, list):
        return [t for each in value for t in _tensors(each)]
    return _tensors(vars(value)) if hasattr(value, "__dict__") else []


def test_an_average_refuses_what_does_not_belong_together():
    average = WeightedAverage()
    with pytest.raises(RuntimeError, match="at least one client"):
        average.result()
    average.add({"x": torch.zeros(2)}, 1)
    with pytest.raises(ValueError, match="these differ: x, y"):
        average.add({"y": torch.zeros(2)}, 1)
    with pytest.raises(ValueError, match="must be positive"):
        average.add({"x": torch.zeros(2)}, 0)


# Local settings


def test_lr_ratio_is_the_learning_rate_of_b_over_that_of_a_and_the_head():
    optimizer = replace(PLAIN, learning_rate=0.1, lr_ratio=2.0).make_optimizer(model := Adapted())
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        expected = None if not parameter.requires_grad else 0.2 if factor(name) == "B" else 0.1
        assert rates.get(id(parameter)) == expected


def test_the_low_pass_filter_reaches_the_adapters_and_not_the_head():
    states = {}
    for strength in (0.0, 3.0):
        training = replace(TRAINING, low_pass="gaussian", low_pass_strength=strength, local_steps=1)
        federation = make_federation("la-lora", training, sizes=(12,))
        federation.run_round([0])
        states[strength] = federation.server.state
    same = {name for name, tensor in states[0.0].items() if tensor.equal(states[3.0][name])}
    assert same == {name for name in states[0.0] if factor(name) != "B"}
