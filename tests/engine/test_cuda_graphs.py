"""A graphed step on padded batches is the ordinary step, on a CPU without and on a GPU with a CUDA graph."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp import DPEmbedding, PrivacyEngine
from lora_dp.engine.cuda_graphs import GraphedStep
from lora_dp.errors import IsolationError
from tests.models import assert_refuses, examples, loader_of, mlp, snapshot
from tests.support import assert_close, make_private

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
    ),
]


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("phases", ["B", "A", "AB", "BA"])
@pytest.mark.parametrize("method", ["direct", "auto"])
def test_same_steps_as_without(device, phases, method):
    """Batches of several sizes, one of them larger than the padded size."""
    ends = []
    for graphed in (False, True):
        model = mlp().to(device)
        engine = PrivacyEngine("rdp", reproducible_seed=4)
        optimizer = make_private(
            model, batch_size=4, phases=phases, norm_method=method, engine=engine, noise_multiplier=0.5, lr=0.1
        )
        step = GraphedStep(model, optimizer, loss, batch_size=5)
        for seed, n in enumerate((4, 2, 5, 1, 3, 7, 4)):
            x, y = (tensor.to(device) for tensor in examples(n, seed))
            optimizer.batch.expect(n)
            if graphed:
                step(x, y)
            else:
                loss(model, x, y).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert engine.ledger.steps == 7
        ends.append(snapshot(model))
    for name, value in ends[0].items():
        assert_close(ends[1][name], value, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_replays_do_not_repeat_noise(device):
    """Gradients alike, noise of its own in each of many replays; and every replay is in the ledger."""
    model = mlp().to(device)
    engine = PrivacyEngine("rdp")
    optimizer = make_private(model, batch_size=4, engine=engine, noise_multiplier=1.0, lr=1e-3)
    step, before, moves = GraphedStep(model, optimizer, loss, batch_size=4), snapshot(model), []
    x, y = (tensor.to(device) for tensor in examples(3))
    for _ in range(12):
        optimizer.batch.expect(3)
        step(x, y)
        after = snapshot(model)
        moves.append(torch.cat([(after[name] - before[name]).flatten() for name in after]))
        before = after
    assert engine.ledger.steps == 12
    moved = torch.stack(moves)[:, moves[0] != 0].double()
    correlation = torch.corrcoef(moved - moved.mean(0)) - torch.eye(12, device=device)
    # 55 numbers a step: noise that repeats would be correlated near 1.
    assert float(correlation.abs().max()) < 0.8


@pytest.mark.parametrize("device", DEVICES)
def test_padding_has_no_weight(device):
    """The same drawn examples, padded to 4 or to 64."""
    ends = []
    for size in (4, 64):
        model = mlp().to(device)
        optimizer = make_private(model, batch_size=4)
        optimizer.batch.expect(3)
        GraphedStep(model, optimizer, loss, batch_size=size)(*(tensor.to(device) for tensor in examples(3)))
        ends.append(snapshot(model))
    for name, value in ends[0].items():
        assert_close(ends[1][name], value, 1e-5)


def test_on_the_private_loader():
    engine, model = PrivacyEngine("rdp"), mlp()
    model, optimizer, loader = engine.make_private(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        data_loader=loader_of(40, 8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    step = GraphedStep(model, optimizer, loss, batch_size=16)
    for x, y in loader:
        step(x, y)
    assert engine.ledger.steps == len(loader)


class Mixing(nn.Module):
    """Subtracts the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x - x.mean(0))


def test_padding_does_not_hide_that_examples_mix():
    """A batch of one, padded with itself, would prove anything."""
    model = Mixing()
    optimizer = make_private(model, batch_size=4)
    step = GraphedStep(model, optimizer, loss, batch_size=4)
    optimizer.batch.expect(1)
    step(*examples(1))
    optimizer.batch.expect(3)
    assert_refuses(IsolationError, "", lambda: step(*examples(3)))


class Tokens(nn.Module):
    """A mean over the tokens of the batch, with labels as a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(x)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_labels_of_uneven_lengths_are_checked_when_they_come():
    model = Tokens()
    optimizer = make_private(model, batch_size=4)
    step = GraphedStep(model, optimizer, lambda model, x, labels: model(x, labels=labels)["loss"], batch_size=6)
    x, labels = torch.randn(4, 3, 6), torch.randint(3, (4, 3))
    for _ in range(5):
        optimizer.batch.expect(4)
        step(x, labels)
    labels[0, 1:] = -100
    optimizer.batch.expect(4)
    assert_refuses(IsolationError, "The loss mixes examples", lambda: step(x, labels))


def test_a_trainable_embedding_is_refused():
    model = nn.Sequential(DPEmbedding(5, 6), nn.Flatten(0, 1), mlp())
    optimizer = make_private(model, batch_size=4)
    assert_refuses(
        ValueError, "'0' is a trainable embedding", lambda: GraphedStep(model, optimizer, loss, batch_size=4)
    )


def test_mistakes_are_refused():
    model = mlp()
    optimizer = make_private(model, batch_size=4)
    step, (x, y) = GraphedStep(model, optimizer, loss, batch_size=4), examples(4)
    optimizer.batch.expect(4)
    step(x, y)  # an ordinary step, for the isolation check
    assert_refuses(ValueError, "at least one", lambda: step(x[:0], y[:0]))
    assert_refuses(ValueError, "same number of examples", lambda: step(x, y[:2]))
    assert_refuses(ValueError, "the shapes and dtypes of the first call", lambda: step(x.double(), y))
    assert_refuses(
        ValueError, "batch_size must be at least 1", lambda: GraphedStep(model, optimizer, loss, batch_size=0)
    )
    assert_refuses(TypeError, "a graph takes no dict", lambda: step({"x": x, "y": y}))
    optimizer.signal_skip_step()
    assert_refuses(RuntimeError, "A logical batch", lambda: step(x, y))
    optimizer.signal_skip_step(False)
    optimizer.batch.expect(3)
    assert_refuses(RuntimeError, "no batch that the private loader drew", lambda: step(x[:1], y[:1]))
