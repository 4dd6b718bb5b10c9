"""The loss of a causal language model, without keeping its scores."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import lora_dp.fed.models.completion_loss
from lora_dp import LoRAConfig, inject_lora
from lora_dp.engine.engine import PrivacyEngine
from lora_dp.fed.models.completion_loss import CompletionLoss
from lora_dp.losses import causal_lm_loss
from tests.language_models import FAMILIES, causal_lm, completions, stacked
from tests.support import brute_force, clip_and_sum


def adapted(family: str) -> nn.Module:
    model = inject_lora(causal_lm(family), LoRAConfig(r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)
    return model


def batch(n: int = 5) -> tuple[dict[str, Tensor], Tensor]:
    found = stacked(completions(n))
    targets = found.pop("labels")
    return found, targets


@pytest.fixture(params=["picked out", "weighted"])
def learned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How learned tokens are told: as on a CPU, or as on a GPU."""
    if request.param == "weighted":
        monkeypatch.setattr(lora_dp.fed.models.completion_loss, "_SELECT_ON", ())


@pytest.mark.usefixtures("learned")
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_the_models_scores(family: str, mode: str) -> None:
    model = getattr(adapted(family), mode)()
    inputs, targets = batch()
    weights = torch.rand(5, dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = causal_lm_loss(model(**inputs).logits, targets)
    found = getattr(CompletionLoss(model), mode)()(targets, **inputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad((losses * weights).sum(), parameters) for losses in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_all_tokens_are_kept_for_no_batch(family: str) -> None:
    """The output layer is given the learned tokens of one example at a time, and nothing of prompts and padding."""
    model = adapted(family)
    given = []
    real = torch.nn.functional.linear

    def noted(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.shape[0] == 40:
            given.append(tuple(states.shape))
        return real(states, weight, bias)

    loss = CompletionLoss(model)
    inputs, targets = batch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_dp.fed.models.completion_loss.F, "linear", noted)
        loss(targets, **inputs)
    assert given == [(int((row[1:] >= 0).sum()), 16) for row in targets]


@pytest.mark.usefixtures("learned")
def test_an_example_in_which_nothing_is_learned_has_no_loss_and_no_gradient() -> None:
    model = adapted("llama")
    inputs, targets = batch()
    targets[1] = -100
    targets[2, 1:] = -100  # the first token follows from nothing
    targets[3, 4:], targets[3, 3] = -100, 7  # one alone
    expected = causal_lm_loss(model(**inputs).logits, targets)
    for loss in (CompletionLoss(model).train(), CompletionLoss(model).eval()):
        found = loss(targets, **inputs)
        torch.testing.assert_close(found, expected)
        assert found[1:3].tolist() == [0, 0] and (found[[0, 3, 4]] > 0).all()
        gradients = torch.autograd.grad(found[1:3].sum(), [p for p in model.parameters() if p.requires_grad])
        assert all(not gradient.any() for gradient in gradients)


@pytest.mark.usefixtures("learned")
@pytest.mark.parametrize("plain", [True, False])
def test_tokens_are_counted(plain: bool) -> None:
    model = adapted("qwen3").eval()
    loss = CompletionLoss(model)
    if not plain:
        loss._head = None
    inputs, targets = batch()
    targets[3] = -100
    targets[0, 5] = 0  # a token like any other, which is learned
    counts = loss(targets, counted=True, **inputs)
    scores = model(**inputs).logits
    learned = targets[:, 1:] >= 0
    right = (scores[:, :-1].argmax(-1) == targets[:, 1:]) & learned
    torch.testing.assert_close(counts[:, 0], causal_lm_loss(scores, targets, reduction="sum"))
    assert counts[:, 1].tolist() == learned.sum(1).tolist() and counts[:, 2].tolist() == right.sum(1).tolist()
    assert counts.dtype == torch.float64 and counts[3].tolist() == [0, 0, 0]


def capped() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.05,
    )
    return transformers.Gemma2ForCausalLM(config).double().requires_grad_(False).train()


def trained_head() -> nn.Module:
    model = causal_lm("llama").requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    return model


def adapted_head() -> nn.Module:
    return inject_lora(causal_lm("llama"), LoRAConfig(r=2, target_modules=["lm_head"]))


@pytest.mark.parametrize("make", [capped, trained_head, adapted_head])
def test_models_whose_scores_are_not_a_frozen_layers_compute_them(make) -> None:
    model = make()
    loss, (inputs, targets) = CompletionLoss(model), batch()
    assert loss._head is None and CompletionLoss(adapted("llama"))._head is not None
    torch.testing.assert_close(loss(targets, **inputs), causal_lm_loss(model(**inputs).logits, targets))


def test_in_half_precision_it_is_near() -> None:
    model = adapted("llama").float()
    inputs, targets = batch()
    loss = CompletionLoss(model)
    exact = loss(targets, **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        near = loss(targets, **inputs)
    assert near.dtype == torch.float32
    torch.testing.assert_close(near, exact, rtol=0.05, atol=0.05)
    near.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_second_derivatives_are_there_in_evaluation() -> None:
    model = adapted("llama").eval()
    inputs, targets = batch()
    parameter = next(p for p in model.parameters() if p.requires_grad)
    found = []
    with sdpa_kernel(SDPBackend.MATH):  # the others have none
        losses = CompletionLoss(model).eval()(targets, **inputs), causal_lm_loss(model(**inputs).logits, targets)
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss.sum(), parameter, create_graph=True)
        found += torch.autograd.grad(gradient.square().sum(), parameter)
    torch.testing.assert_close(*found)


def scores_loss(model: Any, row: dict[str, Tensor]) -> Tensor:
    """Of one text, from the model's own scores."""
    inputs = {name: tensor.unsqueeze(0) for name, tensor in row.items()}
    targets = inputs.pop("labels")
    return causal_lm_loss(model(**inputs).logits, targets).sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_private_step_clips_each_example_by_itself(family: str) -> None:
    """Against brute force: each example's gradient alone, from the model's own scores, clipped and added up."""
    model = adapted(family).train()
    inputs, targets = batch(4)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    alone = brute_force(model, scores_loss, completions(4), set(trained))
    expected = clip_and_sum(alone, "flat", 0.1, layer_of=lambda name: name)
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    loader = torch.utils.data.DataLoader(list(range(4)), batch_size=4)
    private, optimizer, batches = PrivacyEngine().make_private(
        model=CompletionLoss(model),
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=1e-6,
        max_grad_norm=0.1,
        clipping="flat",
    )
    before = {name: p.detach().clone() for name, p in trained.items()}
    for _ in batches:  # all four, since each joins with probability 1
        optimizer.backward(private(targets, **inputs))
        optimizer.step()
    for name, p in trained.items():
        torch.testing.assert_close((before[name] - p.detach()) * 4, expected[name], rtol=1e-4, atol=1e-5)
