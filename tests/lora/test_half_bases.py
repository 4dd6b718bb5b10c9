"""Models in half precision: what is trained is float32, in training, evaluation, on disk and in an exchange."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_dp import (
    DPEmbedding,
    DPLayerNorm,
    DPLinear,
    LoRAConfig,
    PrivacyEngine,
    inject_lora,
    load_adapter,
    merge_adapters,
    save_adapter,
)
from lora_dp.lora.adapters import adapter_state, load_adapter_state
from tests.models import loader_of
from tests.support import brute_force, make_private
from tests.tiny_models import HEADS, IMAGES, KINDS, TARGETS, build, logits, randomise

HALF = [torch.bfloat16, torch.float16]
ROUNDOFF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def half(kind: str = "roberta", dtype: torch.dtype = torch.bfloat16, **settings: Any) -> nn.Module:
    settings = {"r": 2, "target_modules": TARGETS[kind], "trainable_modules": [HEADS[kind]]} | settings
    return inject_lora(build(kind).to(dtype), LoRAConfig(**settings))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def inputs(kind: str, n: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind in IMAGES:
        return torch.randn(n, 1, 16, 16, generator=generator).to(dtype)
    return torch.randint(1, 40, (n, 7), generator=generator)


def scores(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("dtype", HALF)
def test_a_model_that_was_converted_after_its_adapters_is_warned_of(dtype):
    def made(model: nn.Module) -> None:
        PrivacyEngine("rdp").make_private(
            model=model,
            optimizer=torch.optim.SGD(trained(model).values(), lr=0.1),
            data_loader=loader_of(8, 4),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )

    with pytest.warns(UserWarning, match=r"trained parameters are in half precision, '.*lora_A' the first") as caught:
        made(half("roberta").to(dtype=torch.float32).to(dtype))
    assert [warning.filename for warning in caught if "half precision" in str(warning.message)] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(half("roberta", dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS)
def test_trains_and_evaluates_in_the_models_dtype(kind, dtype):
    """Two private steps with AdamW, whose state is float32 as well; frozen weights stay as they are."""
    model = half(kind, dtype, bias="all")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    optimizer = torch.optim.AdamW(list(trained(model).values()), lr=1e-4)
    model, private, loader = PrivacyEngine("rdp").make_private(
        model=model, optimizer=optimizer, data_loader=loader_of(8, 4), noise_multiplier=1.0, max_grad_norm=1.0
    )
    x = inputs(kind, 64, dtype)
    model.train()
    for _, y in loader:
        out = scores(model, x[: len(y)])
        assert out.dtype == dtype
        F.cross_entropy(out.float(), y).backward()
        private.step()
        private.zero_grad()
    assert scores(model.eval(), x[:2]).dtype == dtype
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


def test_a_small_rate_moves_all_of_a():
    """20 steps at 1e-4: in bfloat16 three quarters of A would still be what they were."""
    model = half(trainable_modules=[])
    start = {name: p.detach().clone() for name, p in trained(model).items() if name.endswith("lora_A")}
    optimizer = make_private(model, batch_size=4, noise_multiplier=1.0, lr=1e-4)
    for _ in range(20):
        optimizer.step_on_empty_batch()
    changed = torch.cat([(trained(model)[name] != p).flatten() for name, p in start.items()])
    assert changed.float().mean() == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("method", ["direct", "ghost"])
def test_per_example_gradients(method, dtype):
    """Of every private layer, against a float64 loop: no rougher than the half-precision model itself."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(9, 16), nn.LayerNorm(16)
            self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(self.norm(self.table(ids)))).mean(1))

    model = randomise(
        inject_lora(
            Net().to(dtype),
            LoRAConfig(r=2, target_modules=["body"], trainable_modules=["table", "norm", "head"], bias="all"),
        )
    )
    kinds = {type(module) for module in model.children()}
    assert {DPEmbedding, DPLayerNorm, DPLinear} < kinds
    assert {p.dtype for p in trained(model).values()} == {torch.float32}

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        out = model(ids)
        return (out.double() * torch.tensor([1.0, -2.0, 0.5])).sum(1).tanh().mean()

    ids = torch.randint(9, (4, 5))
    expected = brute_force(model, loss, list(ids.unsqueeze(1)), set(trained(model)))
    optimizer = make_private(model, batch_size=4, norm_method=method)
    optimizer.batch.expect(4)
    loss(model, ids).backward()
    current = optimizer._recorder.current
    squares = torch.stack([slot.norms().double().square() for slot in current.slots.values()]).sum(0)
    assert len(current.slots) == len(trained(model)) == 8
    for i, gradient in enumerate(expected):
        norm = torch.cat([g.flatten() for g in gradient.values()]).norm() / 4
        assert abs(squares[i].sqrt() - norm) < 8 * ROUNDOFF[dtype] * norm


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
def test_a_models_own_cast_is_obeyed(dtype):
    """After ``model.to(...)`` everything has that dtype, embeddings' rows too, and still trains."""
    model = half("gpt2", dtype, trainable_modules=["wte", "score"])
    for wanted in (torch.float32, dtype):
        model.to(wanted)
        assert {p.dtype for p in model.parameters()} == {wanted}
        optimizer = make_private(model.train(), batch_size=2, lr=0.0)
        optimizer.batch.expect(2)
        out = scores(model, inputs("gpt2", 2, wanted))
        assert out.dtype == wanted
        out.float().square().sum(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


# On disk and in an exchange


def test_what_peft_saved_in_float32_is_taken_whole(tmp_path):
    plain = build("roberta").to(torch.bfloat16)
    theirs = randomise(
        peft.get_peft_model(
            copy.deepcopy(plain), peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
        ).eval()
    )
    theirs.save_pretrained(tmp_path)
    model = load_adapter(copy.deepcopy(plain), tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.roberta.encoder.layer.0.attention.self.query.lora_A.weight"
    assert stored[key].dtype == torch.float32 and not torch.equal(stored[key], stored[key].bfloat16().float())
    layer = model.roberta.encoder.layer[0].attention.self.query
    assert layer.lora_A.dtype == torch.float32 and torch.equal(layer.lora_A, stored[key])
    expected = logits(theirs, "roberta")
    assert (expected - logits(plain, "roberta")).abs().max() > 1e-2
    torch.testing.assert_close(logits(model, "roberta"), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.slow
def test_what_we_save_is_float32_and_peft_keeps_it(tmp_path):
    plain = build("roberta").to(torch.bfloat16)
    model = randomise(inject_lora(copy.deepcopy(plain), LoRAConfig(r=2, trainable_modules=["classifier"])))
    save_adapter(model, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    layer = theirs.base_model.model.roberta.encoder.layer[1].output.dense
    assert torch.equal(layer.lora_A["default"].weight, model.roberta.encoder.layer[1].output.dense.lora_A)
    torch.testing.assert_close(logits(theirs.eval(), "roberta"), logits(model, "roberta"), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("cast", [False, True])
def test_no_load_truncates(cast, tmp_path):
    """Not even into adapters that were cast to half precision: they become float32 again."""
    source = randomise(half())
    save_adapter(source, tmp_path)
    state = adapter_state(source)
    for load in (lambda model: load_adapter_state(model, state), lambda model: load_adapter(model, tmp_path)):
        model = half()
        parameters = dict(model.named_parameters())
        load(model.to(torch.bfloat16) if cast else model)
        for name, tensor in state.items():
            assert torch.equal(parameters[name], tensor) and parameters[name].dtype == torch.float32
        assert torch.equal(logits(model, "roberta"), logits(source, "roberta"))


@pytest.mark.parametrize("dtype", HALF)
def test_merging_rounds_once(dtype):
    """The weight is the nearest of its dtype to W0 + s·B·A: at most half a unit in the last place away."""
    layer = randomise(half(dtype=dtype, alpha=3)).roberta.encoder.layer[0].attention.self.query
    exact = layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    merge_adapters(layer)
    assert layer.weight.dtype == dtype
    assert ((layer.weight.double() - exact).abs() <= 1.0001 * ROUNDOFF[dtype] * exact.abs() + 1e-7).all()


def test_a_stored_file_of_half_precision_is_taken_too(tmp_path: Path):
    """Adapters that were saved in bfloat16 before are loaded exactly."""
    model = half().to(torch.bfloat16)
    save_adapter(model, tmp_path)
    fresh = load_adapter(build("roberta").to(torch.bfloat16), tmp_path)
    for name, tensor in adapter_state(model).items():
        assert torch.equal(adapter_state(fresh)[name], tensor.float())
