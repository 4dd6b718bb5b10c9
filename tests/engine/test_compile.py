"""torch.compile(fullgraph=True) of private models: the same norms and the same step as without."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp import IsolationError, LoRAConfig, PrivacyEngine, inject_lora
from tests.models import assert_refuses, examples, loader_of, mlp, train
from tests.support import assert_close, make_private, private_gradients
from tests.tiny_models import HEADS, IMAGES, TARGETS, build, randomise


class Net(nn.Module):
    """A bare nn.Sequential is torch's own code, which is compiled together with its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def norms_and_step(model: nn.Module, run: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> tuple[Tensor, dict]:
    """Per-example norms by parameter (P, N), and what one step of σ = 0 releases."""
    optimizer.zero_grad()
    optimizer.batch.expect(len(x))
    out = run(x)
    F.cross_entropy(getattr(out, "logits", out), y).backward()
    norms = torch.stack([slot.norms() for slot in optimizer._recorder.current.slots.values()])
    optimizer.step()
    return norms, private_gradients(model)


def check_same(model: nn.Module, run: nn.Module, x: Tensor, y: Tensor, sizes: tuple[int, ...], **options: Any) -> None:
    optimizer = make_private(model, batch_size=len(x), lr=0.0, **options)
    for n in sizes:
        plain_norms, plain = norms_and_step(model, model, optimizer, x[:n], y[:n])
        norms, released = norms_and_step(model, run, optimizer, x[:n], y[:n])
        assert_close(norms, plain_norms, 1e-4)
        assert released.keys() == plain.keys()
        for name in plain:
            assert_close(released[name], plain[name], 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("phases", ["B", "A", "AB"])
def test_same_norms_and_step(phases):
    """Batches of several sizes, as Poisson sampling draws them."""
    model = Net()
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    check_same(model, run, *examples(7), (7, 4, 5, 1), phases=phases)


@pytest.mark.slow
def test_batches_of_many_sizes_share_a_graph():
    """Poisson sampling draws dozens of sizes; a graph for each would soon pass the compiler's limit."""
    model = Net()
    optimizer = make_private(model, batch_size=16, lr=0.0, phases="BA")
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for n in (*range(2, 20), 1):
        norms_and_step(model, run, optimizer, *examples(n))
    # For each of the two phases: the first size, sizes at large, and a single example.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6


@pytest.mark.slow
def test_alternating_phases():
    model = Net()
    optimizer = make_private(model, batch_size=6, lr=0.0, phases="BA")
    run, (x, y) = torch.compile(model, fullgraph=True, backend="aot_eager"), examples(6)
    trained = []
    for _ in range(4):
        _, released = norms_and_step(model, run, optimizer, x, y)
        trained.append({name[-1] for name in released if "lora" in name})
    assert trained == [{"B"}, {"A"}] * 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["roberta", "gpt2", "llama", "vit", "timm_vit", "timm_swin"])
def test_whole_models(kind):
    model = randomise(
        inject_lora(build(kind), LoRAConfig(r=2, target_modules=TARGETS[kind], trainable_modules=[HEADS[kind]]))
    ).train()
    generator = torch.Generator().manual_seed(1)
    x = (
        torch.randn(4, 1, 16, 16, generator=generator)
        if kind in IMAGES
        else torch.randint(1, 40, (4, 7), generator=generator)
    )
    check_same(model, torch.compile(model, fullgraph=True, backend="aot_eager"), x, torch.tensor([0, 1, 2, 0]), (4,))


@pytest.mark.slow
def test_inductor():
    """The compiler that users get."""
    model = Net()
    run, (x, y) = torch.compile(model, fullgraph=True), examples(6)
    check_same(model, run, x, y, (6, 3))


@pytest.mark.slow
def test_autocast():
    model, (x, y) = Net(), examples(6)
    optimizer = make_private(model, batch_size=6, lr=0.0)
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(norms_and_step(model, run, optimizer, x, y)[0])
    assert_close(found[1], found[0], 2e-2)


@pytest.mark.slow
def test_compiled_before_it_is_made_private():
    model = Net()
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    run(examples(3)[0])
    check_same(model, run, *examples(5), (5, 4))


def test_a_compiled_model_is_not_made_private():
    model = torch.compile(Net(), backend="aot_eager")
    assert_refuses(TypeError, "torch.compile what make_private returns", lambda: make_private(model, batch_size=4))


@pytest.mark.slow
def test_evaluation_is_not_recorded():
    model, (x, y) = Net(), examples(5)
    optimizer = make_private(model, batch_size=5, lr=0.0)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    norms_and_step(model, run, optimizer, x, y)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x))
    model.eval()
    torch.testing.assert_close(run(x), model(x))
    assert optimizer._recorder.current is None


@pytest.mark.slow
def test_an_engine_trains_a_compiled_model():
    """The README's loop with one line more, down to the ledger."""
    model, engine = Net(), PrivacyEngine("rdp")
    before = model.layers[0].lora_B.detach().clone()
    model, optimizer, loader = engine.make_private(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        data_loader=loader_of(40, 8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    train(torch.compile(model, fullgraph=True, backend="aot_eager"), optimizer, loader)
    assert engine.ledger.steps == len(loader) == 5
    assert not torch.equal(model.layers[0].lora_B, before)


def trained_by(compiler: Any) -> Tensor:
    """The parameters after five steps whose backward and step went through ``compiler``."""
    torch.manual_seed(0)
    model, engine = Net(), PrivacyEngine("rdp", reproducible_seed=3)
    model, optimizer, loader = engine.make_private(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        data_loader=loader_of(40, 8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )

    def finish(losses: Tensor) -> None:
        optimizer.backward(losses)
        optimizer.step()
        optimizer.zero_grad()

    run = compiler(finish)
    for x, y in loader:
        run(F.cross_entropy(model(x), y, reduction="none"))
    assert engine.ledger.steps == len(loader) == 5
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_compiled_step_draws_and_counts_as_any():
    """torch's own advice for optimizers: were it compiled, what was drawn once would come back."""
    compiled = trained_by(lambda finish: torch.compile(finish, backend="aot_eager"))
    torch.testing.assert_close(compiled, trained_by(lambda finish: finish), rtol=0, atol=0)


def test_a_bare_container_is_refused_with_the_remedy():
    model = mlp()
    optimizer = make_private(model, batch_size=5)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_refuses(
        RuntimeError, "put it into a module of your own", lambda: norms_and_step(model, run, optimizer, *examples(5))
    )


@pytest.mark.slow
@pytest.mark.parametrize("vector", [True, False])
def test_a_compiled_loss_is_tried_and_taken(vector):
    """A trial goes back through it more often than once."""

    @torch.compile(backend="aot_eager")
    def criterion(output: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(output, y, reduction="none", label_smoothing=0.1)
        return losses if vector else losses.mean()

    model, engine = Net(), PrivacyEngine("rdp")
    model, optimizer, loader = engine.make_private(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        data_loader=loader_of(40, 8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    first = x, y = examples(8)
    optimizer.batch.expect(8)
    with pytest.raises(IsolationError, match="no graph shows|cannot be told"):
        loss = criterion(model(x), y)
        optimizer.backward(loss) if vector else loss.backward()
    engine.check_isolation(model, first, criterion)
    optimizer.zero_grad()
    for x, y in itertools.chain([first], loader):
        loss = criterion(model(x), y)
        optimizer.backward(loss) if vector else loss.backward()
        optimizer.step()
        optimizer.zero_grad()
