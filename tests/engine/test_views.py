"""Several views of each example: their gradients are averaged before the clip, whatever way they take."""

import contextlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp import (
    AdaptiveClipping,
    DPEmbedding,
    DPLayerNorm,
    DPLinear,
    DPLoRALinear,
    GraphedStep,
    IsolationError,
    LoRAConfig,
    inject_lora,
)
from lora_dp.losses import classification_loss
from lora_dp.ops.registry import reference_only
from tests.models import CLASSES, WIDTH, assert_refuses, cross_entropy, examples, flat, mlp, private_run, seeded
from tests.models import snapshot as weights_of
from tests.support import RULES, assert_close, brute_force, clip_and_sum, make_private, private_gradients
from tests.tiny_models import HEADS, build

WAYS = {"native": contextlib.nullcontext, "torch": reference_only}
BOUND = 0.3


class Tokens(nn.Module):
    """(N, T) → (N, 3), by a table of rows, a norm, an adapter and a head: all kinds of slots."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm = DPEmbedding(9, 8), DPLayerNorm(8)
        self.adapter, self.head = DPLoRALinear(8, 8, r=2), DPLinear(8, CLASSES)
        nn.init.normal_(self.adapter.lora_B, std=0.3)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.adapter(self.norm(self.table(ids))).tanh().mean(1))
        return out


def vision() -> nn.Module:
    model = inject_lora(build("timm_vit"), LoRAConfig(r=2, trainable_modules=[HEADS["timm_vit"]]))
    for module in model.modules():
        if isinstance(module, DPLoRALinear):
            nn.init.normal_(module.lora_B, std=0.2)
    return model.train()


def inputs(kind: str, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    if kind == "tokens":
        return torch.randint(9, (rows, 5), generator=generator)
    return torch.randn(rows, *((1, 16, 16) if kind == "vision" else (WIDTH,)), generator=generator)


MODELS = {"mlp": mlp, "tokens": lambda: Tokens().train(), "vision": vision}


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    if x.is_floating_point():
        x = x.to(next(model.parameters()).dtype)
    return F.cross_entropy(model(x), y, reduction="none")


def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return losses(model, batch).mean()


def step(model: nn.Module, optimizer: Any, batch: tuple[Tensor, Tensor], how: str = "vector", **options: Any) -> Tensor:
    """One private step on rows by hand; the released sums, by name in order."""
    optimizer.batch.expect(len(batch[0]) // optimizer.views)
    found = losses(model, batch)
    if how == "vector":
        optimizer.backward(found)
    else:
        (found.mean() if how == "mean" else found.sum()).backward()
    optimizer.step(**options)
    gradients = private_gradients(model)
    return flat({name: gradients[name] for name in sorted(gradients)}) * optimizer.expected_batch_size


def oracle(
    model: nn.Module, batch: tuple[Tensor, Tensor], views: int, rule: str, phases: str = "AB", kept: Any = None
) -> Tensor:
    """Σᵢ clip(mean over views of the gradient), in float64 from single rows."""
    dropped = {"A": "lora_B", "B": "lora_A"}.get(phases, "-")
    names = {name for name, p in model.named_parameters() if p.requires_grad and not name.endswith(dropped)}
    x, y = batch
    rows = [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    by_row = brute_force(model, mean_loss, rows, names)
    by_example = [
        {name: sum(row[name] for row in by_row[start : start + views]) / views for name in names}
        for start in range(0, len(by_row), views)
    ]
    chosen = by_example if kept is None else [g for g, keep in zip(by_example, kept, strict=True) if keep]
    sums = clip_and_sum(chosen, rule, BOUND, lambda name: name.rpartition(".")[0])
    return flat({name: sums[name] for name in sorted(sums)})


@pytest.mark.parametrize("method", ["direct", "ghost"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_the_mean_over_the_views_is_clipped(way, kind, method):
    views, n = 3, 4
    model = MODELS[kind]()
    batch = inputs(kind, n * views), torch.arange(n * views) % CLASSES
    expected = oracle(model, batch, views, "flat")
    optimizer = make_private(model, batch_size=5, max_grad_norm=BOUND, norm_method=method, views=views, lr=0.0)
    with WAYS[way]():
        assert_close(step(model, optimizer, batch).double(), expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", ["vector", "mean", "sum"])
def test_however_the_losses_are_joined(how, rule):
    model, views, mask = mlp(), 2, torch.tensor([True, False, True])
    batch = inputs("mlp", 6), torch.arange(6) % CLASSES
    expected = oracle(model, batch, views, rule, kept=mask)
    options = {"loss_reduction": "sum" if how == "sum" else "mean", "clipping": rule, "views": views}
    optimizer = make_private(model, batch_size=3, max_grad_norm=BOUND, lr=0.0, **options)
    assert_close(step(model, optimizer, batch, how, mask=mask).double(), expected)


@pytest.mark.parametrize("phases", ["A", "B"])
def test_in_each_phase_and_over_micro_batches(phases):
    model, views = mlp(), 2
    x, y = inputs("mlp", 10), torch.arange(10) % CLASSES
    expected = oracle(model, (x, y), views, "flat", phases)
    optimizer = make_private(model, batch_size=4, max_grad_norm=BOUND, lr=0.0, views=views, phases=phases)
    optimizer.batch.expect(5)
    for part in ((x[:6], y[:6]), (x[6:], y[6:])):
        optimizer.signal_skip_step(len(part[0]) == 6)
        optimizer.backward(losses(model, part))
        optimizer.step()
    gradients = private_gradients(model)
    assert_close(flat({name: gradients[name] for name in sorted(gradients)}).double() * 4, expected)


@pytest.mark.parametrize("way", WAYS)
def test_one_view_is_to_the_last_bit_none(way):
    found = []
    for options in ({}, {"views": 1}):
        model, optimizer, loader = private_run(seeded(), size=12, batch_size=4, **options)
        with WAYS[way]():
            for x, y in loader.take(4):
                optimizer.backward(classification_loss(model(x), y))
                optimizer.step()
        found.append(weights_of(model))
    assert all(torch.equal(p, found[1][name]) for name, p in found[0].items())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("views", [2, 7])
def test_views_that_are_alike_are_as_one(views, rule):
    model, batch = mlp(), examples(5)
    once = make_private(model, batch_size=5, max_grad_norm=BOUND, clipping=rule, lr=0.0)
    expected = step(model, once, batch)
    several = make_private(model, batch_size=5, max_grad_norm=BOUND, clipping=rule, lr=0.0, views=views)
    rows = tuple(tensor.repeat_interleave(views, 0) for tensor in batch)
    assert_close(step(model, several, rows), expected)


@pytest.mark.parametrize("method", ["direct", "ghost"])
@pytest.mark.parametrize("how", ["vector", "mean"])
def test_an_example_moves_the_sum_by_at_most_the_bound(how, method):
    """However many views it has, of whatever size: they are clipped as one."""
    model, views = mlp(), 6
    optimizer = make_private(model, batch_size=1, max_grad_norm=BOUND, lr=0.0, norm_method=method, views=views)
    x = examples(1)[0].repeat(views, 1) * torch.linspace(1, 1e3, views).unsqueeze(1)
    for _ in range(2):
        found = step(model, optimizer, (x, torch.zeros(views, dtype=torch.int64)), how)
        assert 0.99 * BOUND < float(found.double().norm()) <= BOUND * (1 + 1e-6)


def test_a_quantile_is_of_examples():
    """The bound that follows a quantile counts an example once, by the norm of its mean gradient."""
    model, views = mlp(), 2
    optimizer = make_private(
        model, batch_size=3, max_grad_norm=1e6, lr=0.0, views=views, clipping=AdaptiveClipping(quantile=0.7)
    )
    step(model, optimizer, (inputs("mlp", 8), torch.arange(8) % CLASSES))
    assert optimizer.max_grad_norm == pytest.approx(1e6 * math.exp(-0.2 * (0.5 + 2 / 3 - 0.7)))


# Who may meet whom


class Mixing(nn.Module):
    """Adds to each row the mean of rows: of the whole batch, or of the views of its example."""

    def __init__(self, views: int) -> None:
        super().__init__()
        self.inner, self.views = mlp(), views

    def forward(self, x: Tensor) -> Tensor:
        groups = x.view(-1, self.views, WIDTH) if self.views else x.unsqueeze(0)
        out: Tensor = self.inner((groups + groups.mean(1, keepdim=True)).view_as(x))
        return out


@pytest.mark.parametrize("mixed", [0, 2])
def test_rows_that_meet_are_refused_be_they_views_of_one_example(mixed):
    """A row is a function of itself alone: what views of one example do together, the model does with one row."""
    model = Mixing(mixed)
    optimizer = make_private(model, batch_size=3, views=2)
    optimizer.batch.expect(3)
    assert_refuses(IsolationError, "Rows of 'inner.0' attributed to example 0", lambda: model(inputs("mlp", 6)))


def test_a_loss_in_which_examples_meet_is_refused():
    model = mlp()
    optimizer = make_private(model, batch_size=3, views=2)
    optimizer.batch.expect(3)
    out = model(inputs("mlp", 6))
    mixed = classification_loss(out, torch.zeros(6, dtype=torch.int64)) * out.mean()
    assert_refuses(IsolationError, "mixes examples", lambda: optimizer.backward(mixed))


# What is refused


def test_rows_that_are_not_so_many_of_each_are_refused():
    model = mlp()
    optimizer = make_private(model, batch_size=3, views=2)
    assert_refuses(ValueError, "A batch of 5 rows does not hold 2 views of each", lambda: model(inputs("mlp", 5)))
    out = model(inputs("mlp", 6))
    assert_refuses(ValueError, "each of the 6 rows, shape (6,)", lambda: optimizer.backward(out.sum(1)[:3]))


def test_a_batch_without_its_views_is_refused_before_anything_is_released():
    """Two examples would be clipped as two views of one."""
    model = mlp()
    optimizer = make_private(model, batch_size=4, views=2)
    optimizer.batch.expect(4)
    optimizer.backward(losses(model, examples(4)))
    assert_refuses(RuntimeError, "This step saw 2 examples", optimizer.step)
    assert optimizer.ledger.steps == 0


def test_what_takes_one_row_of_each_is_refused():
    model = mlp()
    optimizer = make_private(model, batch_size=4, views=2)
    assert_refuses(
        ValueError,
        "Several views of each example have no graphed step",
        lambda: GraphedStep(model, optimizer, lambda model, x, y: cross_entropy(model, (x, y)), batch_size=4),
    )
    assert_refuses(ValueError, "views must be at least 1", lambda: make_private(mlp(), batch_size=4, views=0))
    assert_refuses(TypeError, "views must be a whole number", lambda: make_private(mlp(), batch_size=4, views=2.0))
    with pytest.raises(AttributeError, match="'views' is fixed"):
        optimizer.views = 1
