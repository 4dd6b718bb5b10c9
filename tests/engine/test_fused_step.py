"""When the native update takes a whole step, and that it is then the step that torch would have taken."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from lora_dp import AdamBC, GaussianFilter, LaplacianFilter, PrivacyEngine
from lora_dp.engine import fused_step
from lora_dp.engine.logical_batch import Clipped
from lora_dp.ops import private_update
from lora_dp.ops.private_update import ExampleSum
from lora_dp.ops.registry import reference_only
from lora_dp.privacy.mechanism import total
from tests.models import examples, flat, mlp, snapshot
from tests.support import make_private, private_gradients

KNOWN = [
    lambda p: torch.optim.SGD(p, lr=0.1),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
]


@pytest.fixture
def taken(monkeypatch):
    """The sums of every native update."""
    seen, update = [], fused_step.private_update_
    monkeypatch.setattr(
        fused_step,
        "private_update_",
        lambda parameters, sums, *rest, **options: (seen.append(sums), update(parameters, sums, *rest, **options)),
    )
    return seen


def private_mlp(make, *, low_pass=None, dtype=torch.float32, **options):
    model = mlp(dtype=dtype)
    optimizer = make_private(model, batch_size=6, low_pass=low_pass, max_grad_norm=0.3, **options)
    optimizer.original_optimizer = make([p for p in model.parameters() if p.requires_grad])
    return model, optimizer


def step(model, optimizer, seed):
    x, y = examples(6, seed)
    optimizer.batch.expect(6)
    F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y).backward()
    optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("phases", ["AB", "BA"])
@pytest.mark.parametrize("low_pass", [None, GaussianFilter(0.6), GaussianFilter(1e-160)])
@pytest.mark.parametrize("make", KNOWN)
def test_steps_are_torchs_with_the_same_noise(make, low_pass, phases, taken):
    """The noise is a function of the seed, whoever adds it; every third step is torch's, with the state as it is."""
    ends, gradients = [], []
    for native in (True, False):
        model, optimizer = private_mlp(
            make,
            low_pass=low_pass,
            phases=phases,
            noise_multiplier=0.7,
            engine=PrivacyEngine("rdp", reproducible_seed=5),
        )
        for number in range(6):
            with contextlib.nullcontext() if native and number % 3 else reference_only():
                step(model, optimizer, number)
                gradients.append(flat(private_gradients(model)))
            optimizer.zero_grad()
        ends.append(snapshot(model))
    assert len(taken) == 4
    for mine, its in zip(gradients[:6], gradients[6:], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("sigma", [0.7, 1e4])
def test_the_grid_is_that_of_all_parameters_together(sigma, taken):
    """On an empty batch there is noise alone, and in float64 the same numbers, whoever releases them: a grid for the
    largest parameter alone would be of another size by 1e-9 at least."""
    found = []
    for native in (True, False):
        model, optimizer = private_mlp(
            KNOWN[0], noise_multiplier=sigma, dtype=torch.float64, engine=PrivacyEngine("rdp", reproducible_seed=5)
        )
        with contextlib.nullcontext() if native else reference_only():
            optimizer.step_on_empty_batch()
        found.append(flat(private_gradients(model)))
    assert len(taken) == 1
    torch.testing.assert_close(found[0], found[1], rtol=1e-14, atol=0)


@pytest.mark.parametrize("engine", [lambda: PrivacyEngine("rdp"), lambda: PrivacyEngine("rdp", reproducible_seed=1)])
def test_default_noise_takes_the_native_update_and_leaves_the_gradient(engine, taken):
    model, optimizer = private_mlp(KNOWN[0], noise_multiplier=1.0, engine=engine())
    before = snapshot(model)
    step(model, optimizer, 0)
    assert len(taken) == 1
    for name, gradient in private_gradients(model).items():
        torch.testing.assert_close(before[name] - 0.1 * gradient, dict(model.named_parameters())[name].detach())


def test_a_whole_batch_is_summed_by_the_update_and_parts_of_one_before(taken):
    model, optimizer = private_mlp(KNOWN[0], norm_method="direct")
    step(model, optimizer, 0)
    assert all(isinstance(part, ExampleSum) for part in taken[0])
    x, y = examples(6)
    optimizer.batch.expect(6)
    for part in (slice(0, 2), slice(2, 6)):
        (F.cross_entropy(model(x[part]), y[part])).backward()
        optimizer.signal_skip_step(part.start == 0)
        optimizer.step()
    assert len(taken) == 2 and all(isinstance(part, torch.Tensor) for part in taken[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_take_it_too(dtype, taken):
    model, optimizer = private_mlp(KNOWN[4], dtype=dtype, noise_multiplier=0.5)
    before = snapshot(model)
    step(model, optimizer, 0)
    step(model, optimizer, 1)
    assert len(taken) == 2 and not torch.equal(before["2.weight"], model[2].weight)
    assert optimizer.state[model[2].weight]["exp_avg"].dtype == dtype


@pytest.mark.parametrize("make", KNOWN)
def test_in_float64_a_step_is_torchs_to_the_last_digits(make, taken):
    """A factor such as 1 / (1 − βᵗ) that was worked out in float32 would be off by 1e-7."""
    ends = []
    for native in (True, False):
        model, optimizer = private_mlp(make, dtype=torch.float64)
        with contextlib.nullcontext() if native else reference_only():
            for number in range(3):
                step(model, optimizer, number)
        ends.append(flat(snapshot(model)))
    assert len(taken) == 3
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-12)


def test_a_sum_of_another_layout_is_left_to_torch(taken, monkeypatch):
    ends = []
    for transposed in (False, True):
        model, optimizer = private_mlp(KNOWN[0])
        clip = optimizer.clip
        monkeypatch.setattr(
            optimizer,
            "clip",
            lambda *a, clip=clip, transposed=transposed: Clipped(
                {key: total(part).t().contiguous().t() if transposed else part for key, part in clip(*a).sums.items()},
                0,
            ),
        )
        step(model, optimizer, 0)
        ends.append(flat(snapshot(model)))
    assert len(taken) == 1
    torch.testing.assert_close(*ends)


def test_a_state_of_another_layout_is_taken_as_it_is(taken):
    """As a checkpoint may hold it."""
    ends = []
    for transposed in (False, True):
        model, optimizer = private_mlp(KNOWN[1])
        step(model, optimizer, 0)
        for state in optimizer.state.values() if transposed else ():
            state["momentum_buffer"] = state["momentum_buffer"].t().contiguous().t()
        step(model, optimizer, 1)
        ends.append(flat(snapshot(model)))
    assert len(taken) == 4
    assert torch.equal(*ends)


def test_a_filter_too_wide_for_the_update_is_left_to_torch(taken, monkeypatch):
    monkeypatch.setitem(private_update._MOST_HALO, "cpu", 3)
    for strength in (0.5, 2.0):
        model, optimizer = private_mlp(KNOWN[0], low_pass=GaussianFilter(strength), phases="A")
        step(model, optimizer, 0)
        assert len(taken) == 1 and optimizer.steps_taken == 1


class Derived(torch.optim.SGD):
    """May do anything in its step."""


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.RMSprop(p, lr=0.1),
        lambda p: Derived(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, maximize=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1)),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, decoupled_weight_decay=True),
        lambda p: AdamBC(p, lr=0.1),
        lambda p: torch.optim.SGD([{"params": p[:1], "momentum": 0.9}, {"params": p[1:]}], lr=0.1),
    ],
)
def test_what_has_another_formula_is_left_to_torch(make, taken):
    model, optimizer = private_mlp(make)
    step(model, optimizer, 0)
    assert not taken and optimizer.steps_taken == 1


def test_filters_hooks_and_the_reference_are_left_to_torch(taken):
    model, optimizer = private_mlp(KNOWN[0], low_pass=LaplacianFilter(1.0))
    step(model, optimizer, 0)
    model, optimizer = private_mlp(KNOWN[0])
    seen = []
    handle = optimizer.register_step_pre_hook(lambda *_: seen.append(flat(private_gradients(model))))
    step(model, optimizer, 0)
    assert len(seen) == 1 and seen[0].any()
    handle.remove()
    with reference_only():
        step(model, optimizer, 1)
    assert not taken
    step(model, optimizer, 2)
    assert len(taken) == 1


def test_states_of_another_dtype_are_left_to_torch(taken):
    model, optimizer = private_mlp(KNOWN[4])
    step(model, optimizer, 0)
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].double()
    with contextlib.suppress(RuntimeError):  # torch itself may refuse it
        step(model, optimizer, 1)
    assert len(taken) == 1


def test_hooks_on_every_optimizer_and_wrapped_steps_are_left_to_torch(taken):
    model, optimizer = private_mlp(KNOWN[0])
    seen = []
    handle = register_optimizer_step_post_hook(lambda *_: seen.append(1))
    try:
        step(model, optimizer, 0)
    finally:
        handle.remove()
    assert seen == [1] and not taken
    own, inner = [], optimizer.original_optimizer
    inside = inner.step
    inner.step = lambda *arguments: (own.append(1), inside(*arguments))
    step(model, optimizer, 1)
    assert own == [1] and not taken


@pytest.mark.filterwarnings("error")
def test_a_scheduler_of_the_wrapped_optimizer_counts_the_steps(taken):
    model, optimizer = private_mlp(KNOWN[0])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer.original_optimizer, 0.5)
    for number in range(3):
        step(model, optimizer, number)
        scheduler.step()
    assert len(taken) == 3 and optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_adams_count_is_not_rounded(dtype, taken):
    model, optimizer = private_mlp(KNOWN[4])
    torch.set_default_dtype(dtype)
    try:
        for _ in range(300):
            optimizer.step_on_empty_batch()
    finally:
        torch.set_default_dtype(torch.float32)
    steps = {(int(state["step"]), state["step"].dtype) for state in optimizer.state.values()}
    # The count's dtype is torch's own for this default.
    assert steps == {(300, torch.float64 if dtype == torch.float64 else torch.float32)} and len(taken) == 300


def test_phases_whose_factors_the_optimizer_lacks_are_refused():
    model = mlp()
    optimizer = make_private(model, batch_size=6, phases="B")
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p is not model[0].lora_A]
    with pytest.raises(ValueError, match="lora_A"):
        optimizer.set_phases("AB")
    step(model, optimizer, 0)


def test_a_step_that_fails_leaves_no_trace_in_the_wrapped_optimizer():
    model, optimizer = private_mlp(KNOWN[4])
    step(model, optimizer, 0)
    before = snapshot(model)
    optimizer.param_groups[0]["lr"] = float("inf")
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="hyper must be finite"):
        step(model, optimizer, 1)
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_step_is_not_captured():
    model = mlp().cuda()
    optimizer = make_private(model, batch_size=6, noise_multiplier=1.0)
    optimizer.step_on_empty_batch()
    steps = optimizer.ledger.steps
    with pytest.raises(RuntimeError, match="captured graph would repeat"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step_on_empty_batch()
    assert optimizer.ledger.steps == steps
