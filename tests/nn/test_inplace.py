"""An operation in place right after a private layer, as torch and PEFT allow: the same gradients as without."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_dp import DPEmbedding, DPLayerNorm, DPLinear, DPLoRALinear, LoRAConfig, PrivacyEngine, inject_lora
from tests.models import loader_of
from tests.support import assert_close, brute_force, clip_and_sum, make_private, private_gradients

WIDTH, TOKENS, N, BOUND = 6, 4, 5, 0.4


def zero_first(y: Tensor) -> Tensor:
    y[..., 0] = 0
    return y


def masked(y: Tensor) -> Tensor:
    y[y < 0] *= 0.5
    return y


def added(y: Tensor) -> Tensor:
    y += 0.3
    y.view(-1, y.shape[-1]).mul_(1.5)
    return y


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.ReLU(inplace=True),
    "dropout": nn.Dropout(1e-6, inplace=True),
    "add": added,
    "tanh": torch.tanh_,
    "index": zero_first,
    "mask": masked,
}


def lora(**options: Any) -> DPLoRALinear:
    layer = DPLoRALinear(WIDTH, WIDTH, r=2, **options)
    nn.init.normal_(layer.lora_B)
    if layer.bias is not None:
        layer.bias.requires_grad_(True)
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "lora": lora,
    "lora without bias": lambda: lora(bias=False),
    "lora with dropout": lambda: lora(dropout=1e-7),
    "transposed": lambda: lora(fan_in_fan_out=True),
    "linear": lambda: DPLinear(WIDTH, WIDTH),
    "norm": lambda: DPLayerNorm(WIDTH),
    "embedding": lambda: DPEmbedding(9, WIDTH),
}


class Net(nn.Module):
    """A private layer, something in place on its output, a residual added in place, and a head."""

    def __init__(self, layer: str, operation: str, checkpointing: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.operation, self.checkpointing = LAYERS[layer](), OPERATIONS[operation], checkpointing
        self.second, self.head = lora(), DPLinear(WIDTH, 3)

    def inner(self, x: Tensor) -> Tensor:
        hidden = self.operation(self.layer(x))
        out = self.second(hidden)
        out += hidden
        return out

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing is None or not torch.is_grad_enabled():
            return self.head(self.inner(x))
        if x.is_floating_point():
            x = x.clone().requires_grad_()
        return self.head(checkpoint(self.inner, x, use_reentrant=self.checkpointing))


def batch_for(layer: str, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (N, tokens) if tokens else (N,)
    x = (
        torch.randint(9, shape, generator=generator)
        if layer == "embedding"
        else torch.randn(*shape, WIDTH, generator=generator)
    )
    return x, torch.randn(*shape, 3, generator=generator)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, weights = batch
    dtype = next(model.parameters()).dtype
    out = model(x.to(dtype) if x.is_floating_point() else x)
    return (out.square() * weights.to(dtype)).flatten(1).sum(1).mean()


def check(model: Net, batch: tuple[Tensor, Tensor], run: nn.Module | None = None, **options: Any) -> None:
    """One private step without noise against a float64 loop over examples."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    one_by_one = [tuple(part[i : i + 1] for part in batch) for i in range(N)]
    expected = clip_and_sum(brute_force(model, loss_of, one_by_one, trained), "flat", BOUND, str)
    optimizer = make_private(model, batch_size=N, max_grad_norm=BOUND, lr=0.0, **options)
    optimizer.batch.expect(N)
    loss_of(model if run is None else run, batch).backward()
    optimizer.step()
    released = private_gradients(model)
    assert released.keys() == expected.keys()
    for name in expected:
        assert_close(released[name] * N, expected[name], 2e-5, scale=BOUND)


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_per_example_gradients_are_those_of_the_loop(layer, operation):
    check(Net(layer, operation), batch_for(layer))


@pytest.mark.parametrize("method", ["direct", "ghost"])
@pytest.mark.parametrize("layer", LAYERS)
def test_vectors_and_either_norm(layer, method):
    """(N, d): where the output has two dimensions it is no view to begin with."""
    check(Net(layer, "relu"), batch_for(layer, tokens=0), norm_method=method)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layer", ["lora", "lora with dropout", "linear", "norm"])
def test_checkpointed(layer, reentrant):
    check(Net(layer, "add", reentrant), batch_for(layer))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("operation", ["relu", "add", "index"])
@pytest.mark.parametrize("layer", [name for name in LAYERS if name != "embedding"])
def test_compiled(layer, operation, backend):
    model = Net(layer, operation)
    check(model, batch_for(layer), torch.compile(model, fullgraph=True, backend=backend))


def test_the_saved_input_is_guarded():
    """What a backward still reads may not be modified: torch says so, and no wrong gradient comes out."""

    class Spoilt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = lora()

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1.0
            y = self.layer(x)
            if torch.is_grad_enabled():
                x.zero_()
            return y

    model = Spoilt()
    optimizer = make_private(model, batch_size=N, phases="A")
    optimizer.batch.expect(N)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(batch_for("lora")[0]).sum().backward()


def test_no_copy_of_the_output():
    """The output shares the memory that the product wrote: in-place operations cost nothing where there are none."""
    model = nn.Sequential(lora())
    make_private(model, batch_size=N).batch.expect(N)
    product: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:

        def spy(*inputs: Any) -> tuple[Tensor, Tensor]:
            y, h = plain(*inputs)
            product.append(y)
            return y, h

        from lora_dp.nn import functional

        plain = functional.lora_forward
        patch.setattr(functional, "lora_forward", spy)
        y = model(batch_for("lora")[0])
    assert y.data_ptr() == product[-1].data_ptr() and not y._is_view()


def test_falcon_trains():
    """Its decoder adds attention to the MLP's output in place."""
    torch.manual_seed(0)
    model = inject_lora(
        tf.FalconForSequenceClassification(
            tf.FalconConfig(
                vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_labels=3, pad_token_id=0
            )
        ),
        LoRAConfig(r=2, trainable_modules=["score"]),
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model, optimizer, loader = PrivacyEngine("rdp").make_private(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        data_loader=loader_of(16, 8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    model.train()
    ids = torch.randint(1, 40, (64, 7))
    for x, y in loader:
        F.cross_entropy(model(input_ids=ids[: len(x)]).logits, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)
