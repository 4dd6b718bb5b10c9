"""Parameters that a forward writes to: refused before it does, or once it has."""

import pytest
import torch
from torch import Tensor, nn

from lora_dp import DPLinear, IsolationError, LoRAConfig, inject_lora
from lora_dp.isolation.model_state.parameters import Unwritten
from tests.models import assert_refuses, examples, mlp, set_up
from tests.support import make_private


class Centre(nn.Module):
    """Keeps a running centre in a frozen parameter."""

    def __init__(self, way: str):
        super().__init__()
        self.inner, self.ways = mlp(), [way]
        self.other = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.centre = nn.Parameter(torch.zeros(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        before = out - self.centre
        with torch.no_grad():
            if self.ways[0] == "in place" or (self.ways[0] == "later" and len(x) == 3):
                self.centre.mul_(0.9).add_(0.1 * out.mean(0))
            elif self.ways[0] == "data":
                self.centre.data.copy_(out.mean(0))
            elif self.ways[0] == "other data":
                self.centre.data = out.mean(0)
            elif self.ways[0] == "another":
                self.centre = nn.Parameter(out.mean(0), requires_grad=False)
            elif self.ways[0] == "no other":
                self.centre = None
        return before if "other" in self.ways[0] else out - self.centre


@pytest.mark.parametrize("way", ["in place", "data"])
def test_a_parameter_that_a_forward_writes_to_is_refused_before_it_does(way):
    model = Centre(way).train()
    make_private(model, batch_size=4)
    assert_refuses(IsolationError, "writes to its parameter 'centre'", lambda: model(examples(4)[0]))
    assert not model.centre.any()


def test_a_parameter_that_a_later_forward_writes_to_is_refused():
    model = Centre("later").train()
    make_private(model, batch_size=4)
    model(examples(4)[0])
    assert_refuses(IsolationError, "writes to its parameter 'centre'", lambda: model(examples(3)[0]))


@pytest.mark.usefixtures("none_drawn")
@pytest.mark.parametrize("way", ["in place", "other data", "another", "no other"])
def test_what_a_forward_that_was_tried_writes_later_is_refused(way):
    """One batch in a thousand is tried again; the others are looked at once they have been written."""
    model = Centre("not yet").train()
    make_private(model, batch_size=4)
    x = examples(4)[0]
    for _ in range(2):
        model(x)
    model.ways[0] = way
    assert_refuses(IsolationError, "writes to its parameter 'centre'", lambda: model(x))


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.mul_(2),
        lambda p: torch.abs(torch.ones(3), out=p),
        lambda p: torch.add(p, 1, out=p),
        lambda p: torch._foreach_add_([torch.zeros(3), p], 1),
        lambda p: p[1:].zero_(),
    ],
)
def test_every_way_to_write_is_seen_before_it_is_done(write):
    model = nn.Linear(3, 2).requires_grad_(False)
    bias = nn.Parameter(torch.ones(3), requires_grad=False)
    model.register_parameter("centre", bias)
    with torch.no_grad(), Unwritten(model), pytest.raises(IsolationError, match="its parameter 'centre'"):
        write(bias)
    assert torch.equal(bias, torch.ones(3))


def test_what_writes_elsewhere_is_done_as_it_was_asked():
    model = nn.Linear(3, 2)
    with torch.no_grad(), Unwritten(model):
        found = torch.zeros(3, dtype=torch.float64).add_(model.weight[0], alpha=2.0)
        torch.mul(found, 2, out=found)
    assert found.dtype == torch.float64 and torch.allclose(found, 4 * model.weight[0].double())


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_frozen_table_with_a_maximal_norm_is_refused_at_set_up(kind):
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = kind(50, 4, max_norm=1.0).requires_grad_(False)
            self.head = nn.Linear(4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            found = self.table(ids)
            return self.head(found if found.dim() == 2 else found.mean(1))

    model = inject_lora(Bag(), LoRAConfig(r=2, target_modules=["head"]))
    assert_refuses(ValueError, "'table' has max_norm", lambda: set_up(model))


class Switches(nn.Module):
    """Computes otherwise for good, once a batch is short."""

    def __init__(self, way: str):
        super().__init__()
        self.inner, self.way, self.kind, self.late = mlp(), way, "long", None
        self.act: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.late is None:
            self.late = nn.Identity()  # made when it is needed first
        if len(x) == 3 and self.way == "module":
            self.act = nn.Tanh()
        elif len(x) == 3 and self.way == "word":
            self.kind = "short"
        out: Tensor = self.act(self.inner(x))
        return out


@pytest.mark.parametrize(("way", "name"), [("module", "act"), ("word", "kind")])
@pytest.mark.parametrize("first", [True, False])
def test_a_model_that_one_batch_changes_for_good_is_refused(way, name, first):
    model = nn.Sequential(Switches(way)).train()
    optimizer = make_private(model, batch_size=4)
    if not first:
        for _ in range(2):
            model(examples(4)[0])
            optimizer.recorder.discard()
    assert_refuses(IsolationError, f"changed its '0.{name}' for good", lambda: model(examples(3)[0]))


def test_what_the_user_changes_between_two_passes_is_taken():
    model = Switches("word").train()
    optimizer = make_private(model, batch_size=4)
    model(examples(4)[0])
    optimizer.recorder.discard()
    model.kind, model.act = "short", nn.Tanh()
    model(examples(3)[0])


@pytest.mark.slow
def test_bigbird_is_refused_where_it_gives_up_sparse_attention():
    """Already in the trial, whose passes differ by it."""
    transformers = pytest.importorskip("transformers")
    model = inject_lora(
        transformers.BigBirdForSequenceClassification(
            transformers.BigBirdConfig(
                vocab_size=40,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                block_size=4,
                num_random_blocks=1,
                max_position_embeddings=128,
                attention_type="block_sparse",
                num_labels=3,
            )
        ),
        LoRAConfig(r=2, target_modules=["query"], trainable_modules=["classifier"]),
    ).train()
    optimizer = make_private(model, batch_size=2)
    ids = torch.randint(40, (2, 64))
    model(ids)
    optimizer.recorder.discard()
    assert_refuses(IsolationError, "", lambda: model(ids[:, :8]))
    optimizer.recorder.discard()
    model.bert.set_attention_type("original_full")
    model(ids[:, :8])


def add_to(kept: Tensor, gradient: Tensor) -> None:
    kept.add_(gradient.mean(0))


@pytest.mark.usefixtures("none_drawn")
@pytest.mark.parametrize("scalar", [True, False])
@pytest.mark.parametrize("target", ["buffer", "parameter"])
def test_what_a_backward_writes_is_refused_before_the_step(target, scalar):
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.writes: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x)
            for kept in self.writes:
                out.register_hook(lambda gradient, kept=kept: add_to(kept, gradient))
            return out

    model = Kept().train()
    kept = torch.zeros(3)
    if target == "buffer":
        model.register_buffer("kept", kept)
    else:
        kept = model.kept = nn.Parameter(kept, requires_grad=False)
    optimizer = make_private(model, batch_size=4)
    x = examples(4)[0]
    for writes in (False, False, True):
        model.writes[:] = [kept] if writes else []
        optimizer.batch.expect(4)
        losses = model(x).square().sum(1)

        def backward(losses: Tensor = losses) -> None:
            losses.mean().backward() if scalar else optimizer.backward(losses)

        if writes:
            assert_refuses(IsolationError, "'kept'", backward)
        else:
            backward()
            optimizer.step()
    assert optimizer.ledger.steps == 2


def test_weights_that_are_perturbed_around_forward_and_backward_may_be_put_back():
    """As sharpness-aware training does, by public random numbers."""
    model = nn.Sequential(nn.Linear(6, 6).requires_grad_(False), DPLinear(6, 3)).train()
    optimizer, weight = make_private(model, batch_size=4), model[0].weight
    for _ in range(2):
        before = weight.clone()
        weight.add_(0.1)
        optimizer.batch.expect(4)
        optimizer.backward(model(torch.randn(4, 6)).square().sum(1))
        weight.copy_(before)
        optimizer.step()
    assert optimizer.ledger.steps == 2


def test_a_step_without_a_forward_says_so():
    optimizer = make_private(mlp(), batch_size=4)
    optimizer.batch.expect(4)
    assert_refuses(RuntimeError, "No per-example gradient was recorded", optimizer.step)
