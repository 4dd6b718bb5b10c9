"""The isolation check: what mixes examples is found and named, what does not passes, and nothing is disturbed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_dp.engine.hooks
from lora_dp import DPEmbedding, DPLinear, DPLoRALinear, IsolationError, LoRAConfig, PrivacyEngine, inject_lora
from lora_dp.isolation.check import Passed
from tests.models import assert_refuses, cross_entropy, examples, mlp, take_step
from tests.support import make_private


class Windows(nn.Module):
    """(N, T, 6) in windows of two tokens through a private layer: rows by example, or (wrongly) by window."""

    def __init__(self, window_major: bool):
        super().__init__()
        self.window_major = window_major
        self.qkv, self.head = DPLoRALinear(6, 6, r=2), DPLinear(6, 3)
        nn.init.normal_(self.qkv.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, d = x.shape
        windows = x.view(n, tokens // 2, 2, d)
        if self.window_major:
            out = self.qkv(windows.transpose(0, 1).reshape(-1, 2, d))
            out = out.view(tokens // 2, n, 2, d).transpose(0, 1)
        else:
            out = self.qkv(windows.reshape(-1, 2, d)).view(n, tokens // 2, 2, d)
        return self.head(out.tanh().mean((1, 2)))


class Standardise(nn.Module):
    """Batch normalisation written by hand."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / x.std(0)


class Centre(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class Neighbour(nn.Module):
    """Attention over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.transpose(0, 1)).softmax(-1) @ x


def mixed(between: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(DPLoRALinear(6, 6, r=2), between, DPLinear(6, 3))
    nn.init.normal_(model[0].lora_B)
    return model.train()


class Leak(nn.Module):
    """Each example takes a little of the batch's mean."""

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        return x + self.share * x.mean(0, keepdim=True)


class Positions(nn.Module):
    """A position table looked up once for the whole batch."""

    def __init__(self, batched: bool):
        super().__init__()
        self.batched = batched
        self.position, self.head = DPEmbedding(8, 6), DPLinear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.arange(x.shape[1])
        table = self.position(tokens.expand(len(x), -1) if self.batched else tokens)
        return self.head((x + table).tanh().mean(1))


def both_ways(model: nn.Module, batch: Tensor, words: str) -> None:
    """Refused by the engine on the first training batch, and by the user's call, with ``words``."""
    engine = PrivacyEngine("rdp", reproducible_seed=0)
    assert_refuses(IsolationError, words, lambda: engine.check_isolation(model, batch))
    make_private(model.train(), batch_size=len(batch), engine=engine)
    assert_refuses(IsolationError, words, lambda: model(batch))


def passes(model: nn.Module, batch: Any, criterion: Callable[..., Tensor] | None = None) -> None:
    PrivacyEngine("rdp").check_isolation(model, batch, criterion)


def test_window_major_rows_are_refused():
    torch.manual_seed(0)
    both_ways(Windows(window_major=True), torch.randn(4, 8, 6), "'qkv'")


def test_example_major_windows_pass():
    torch.manual_seed(0)
    passes(Windows(window_major=False), torch.randn(4, 8, 6))


@pytest.mark.parametrize("between", [Standardise(), Centre(), Neighbour()])
def test_batch_mixing_is_refused_by_the_name_of_the_module(between):
    model, x = mixed(between), examples(4)[0]
    both_ways(model, x, "'0'")  # the private layer whose rows feed the mixture
    frozen = nn.Sequential(nn.Linear(6, 6).requires_grad_(False), between, DPLinear(6, 3))
    both_ways(frozen, x, "the first module where this is seen is '1'")


@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 1e-7), (torch.float32, 3e-3), (torch.bfloat16, 0.3)])
def test_a_small_share_of_the_others_is_refused(dtype, share):
    """A few times what the arithmetic itself may change; a share of zero passes."""
    torch.manual_seed(0)
    x = torch.randn(4, 6).to(dtype)
    assert_refuses(IsolationError, "'0'", lambda: passes(mixed(Leak(share)).to(dtype), x))
    frozen = nn.Sequential(nn.Linear(6, 6).requires_grad_(False), Leak(share), DPLinear(6, 3)).to(dtype).train()
    assert_refuses(IsolationError, "change", lambda: passes(frozen, x))
    passes(mixed(Leak(0.0)).to(dtype), x)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 1e-7), (torch.float32, 3e-3)])
def test_a_small_share_of_the_others_in_the_loss_is_refused(dtype, share):
    torch.manual_seed(0)
    x, y = torch.randn(4, 6).to(dtype), torch.randint(0, 3, (4,))
    model = nn.Sequential(DPLinear(6, 3)).to(dtype).train()

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits + share * logits.mean(0), targets)

    passes(model, (x, y), F.cross_entropy)
    assert_refuses(IsolationError, "mixes examples", lambda: passes(model, (x, y), loss))


def test_running_statistics_are_refused_too():
    """Forwards of torch's own BatchNorm; the set-up refuses it before."""
    model = mixed(nn.BatchNorm1d(6))
    assert_refuses(IsolationError, "'0'", lambda: PrivacyEngine("rdp").check_isolation(model, examples(4)[0]))
    assert not model[1].running_mean.any()


@pytest.mark.parametrize(
    ("n", "words"),
    [
        (3, "'position' works on (8, 6) in a batch of 3 examples"),  # not divisible
        (4, "rows of 'position' that are attributed to other examples"),  # divisible, which is worse
        (8, "rows of 'position' that are attributed to other examples"),
    ],
)
def test_table_shared_by_the_batch_is_refused(n, words):
    torch.manual_seed(0)
    both_ways(Positions(batched=False), torch.randn(n, 8, 6), words)


def test_table_looked_up_by_example_passes():
    torch.manual_seed(0)
    passes(Positions(batched=True), torch.randn(4, 8, 6))


def test_rows_that_n_does_not_divide_are_refused_by_name_in_a_later_batch(monkeypatch):
    """The first batch hides it: its trials see even numbers of examples alone."""
    monkeypatch.setattr(lora_dp.engine.hooks, "drawn_for_test", lambda: False)
    torch.manual_seed(0)

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = DPLinear(6, 6)
            self.head = DPLinear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) if len(x) % 2 == 0 else self.head(x) + self.inner(x[:2]).mean()

    model = Pooled().train()
    make_private(model, batch_size=4)
    with torch.no_grad():
        model(examples(3)[0])
    model(examples(2)[0])
    assert_refuses(
        ValueError,
        "'inner.weight' received an input of shape (2, 6) in a batch of 3 examples",
        lambda: model(examples(3)[0]),
    )


# Losses


def contrastive(features: Tensor, _: Any) -> Tensor:
    similarity = F.normalize(features, dim=1) @ F.normalize(features, dim=1).t()
    return F.cross_entropy(similarity, torch.arange(len(features)))


def token_mean(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def example_mean(logits: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return (losses.sum(1) / (targets != -100).sum(1)).mean()


def tagging_batch() -> tuple[Tensor, Tensor]:
    targets = torch.randint(3, (4, 6))
    for row, length in enumerate((6, 2, 4, 3)):
        targets[row, length:] = -100
    return torch.randn(4, 6, 6), targets


def test_contrastive_loss_is_refused():
    x, y = examples(4)
    assert_refuses(IsolationError, "The loss mixes examples", lambda: passes(mlp(), (x, y), contrastive))
    passes(mlp(), (x, y), F.cross_entropy)
    passes(mlp(), (x, y), lambda out, target: F.cross_entropy(out, target, reduction="sum"))


def test_token_mean_with_unequal_lengths_is_refused():
    torch.manual_seed(0)
    engine, batch = PrivacyEngine("rdp"), tagging_batch()
    assert_refuses(
        IsolationError,
        "average over each example's tokens first",
        lambda: engine.check_isolation(mlp(), batch, token_mean),
    )
    passes(mlp(), batch, example_mean)
    passes(mlp(), (batch[0], batch[1].abs() % 3), token_mean)  # equal lengths: a mean of example means


def tagger() -> nn.Module:
    import transformers as tf

    torch.manual_seed(0)
    return inject_lora(
        tf.RobertaForTokenClassification(
            tf.RobertaConfig(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=20,
                max_position_embeddings=20,
                vocab_size=40,
                num_labels=3,
                pad_token_id=0,
            )
        ),
        LoRAConfig(r=2, trainable_modules=["classifier"]),
    )


@pytest.mark.slow
def test_the_models_own_token_mean_is_refused():
    """Labels in a dict: the loss that the model computes is checked, also on the first batch."""
    model, (_, labels) = tagger(), tagging_batch()
    batch = {"input_ids": torch.randint(3, 40, (4, 6)), "labels": labels}
    assert_refuses(IsolationError, "The loss mixes examples", lambda: passes(model, batch))
    passes(model, {**batch, "labels": labels.abs() % 3})
    passes(model, {"input_ids": batch["input_ids"]})
    make_private(model.train(), batch_size=4)
    assert_refuses(IsolationError, "The loss mixes examples", lambda: model(**batch))


# Real models pass


def swin() -> tuple[nn.Module, Any]:
    import timm

    model = timm.models.swin_transformer.SwinTransformer(
        img_size=16,
        patch_size=2,
        in_chans=1,
        num_classes=3,
        embed_dim=8,
        depths=(2, 2),
        num_heads=(2, 2),
        window_size=4,
        drop_path_rate=0.3,
        proj_drop_rate=0.1,
    )
    assert any(getattr(block, "shift_size", (0, 0))[0] for block in model.layers[0].blocks)
    return inject_lora(model, LoRAConfig(r=2, dropout=0.1, trainable_modules=["head"])), torch.randn(3, 1, 16, 16)


def vit() -> tuple[nn.Module, Any]:
    import transformers as tf

    model = tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=20,
            image_size=8,
            patch_size=4,
            num_channels=1,
            num_labels=3,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
        )
    )
    return (
        inject_lora(model, LoRAConfig(r=2, dropout=0.1, trainable_modules=["classifier", "layernorm_before"])),
        {"pixel_values": torch.randn(3, 1, 8, 8), "labels": torch.tensor([0, 1, 2])},
    )


def roberta() -> tuple[nn.Module, Any]:
    import transformers as tf

    model = tf.RobertaForSequenceClassification(
        tf.RobertaConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=20,
            max_position_embeddings=20,
            vocab_size=40,
            num_labels=3,
            pad_token_id=0,
        )
    )
    ids = torch.randint(3, 40, (3, 7))
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 4:] = 0, 0
    return (
        inject_lora(model, LoRAConfig(r=2, dropout=0.1, trainable_modules=["classifier"])),
        {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2])},
    )


def checkpointed_vit() -> tuple[nn.Module, Any]:
    model, batch = vit()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model, batch


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.block, self.mix = DPLinear(6, 6), DPLoRALinear(6, 6, r=2), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(checkpoint(lambda h: self.block(h).tanh(), self.first(x), use_reentrant=self.reentrant))


@pytest.mark.slow
@pytest.mark.parametrize("build", [swin, vit, roberta, checkpointed_vit])
def test_real_models_pass_with_dropout_and_stay_undisturbed(build):
    torch.manual_seed(0)
    model, batch = build()
    model.train()
    for module in model.modules():
        if isinstance(module, DPLoRALinear):
            nn.init.normal_(module.lora_B, std=0.2)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    marked = next(p for p in model.parameters() if p.requires_grad)
    marked.grad = torch.ones_like(marked)
    kept = marked.grad
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    passes(model, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert marked.grad is kept and bool((kept == 1).all())
    assert all(p.grad is None for p in model.parameters() if p is not marked)
    assert not any(module._forward_hooks for module in model.modules())


def test_no_hooks_are_left_where_all_examples_of_a_larger_batch_were_tried():
    model = mlp().train()
    passes(model, examples(8)[0])
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_hides_nothing(reentrant):
    torch.manual_seed(0)
    model, x = Checkpointed(reentrant), examples(4)[0].requires_grad_()
    nn.init.normal_(model.block.lora_B)
    passes(model, x)
    model.mix = Standardise()
    assert_refuses(IsolationError, "'", lambda: passes(model, x))


def test_buffers_and_modes_are_restored_after_a_refusal():
    model = mixed(nn.BatchNorm1d(6)).eval()
    model[0].train()
    assert_refuses(IsolationError, "", lambda: passes(model, examples(4)[0]))
    assert [module.training for module in model] == [True, False, False]
    assert int(model[1].num_batches_tracked) == 0 and bool((model[1].running_var == 1).all())


def test_first_batch_check_leaves_the_step_as_it_would_be():
    """Dropout of the training forward after the check is the one that the seed gives without a check."""
    released = []
    for batches in (1, 2):
        model = nn.Sequential(DPLinear(6, 6), nn.Dropout(0.5), DPLinear(6, 3)).train()
        torch.manual_seed(0)
        for p in model.parameters():
            nn.init.normal_(p)
        optimizer = make_private(model, batch_size=4, lr=0.0)
        for _ in range(batches):  # the second batch is not checked
            torch.manual_seed(5)
            result = take_step(model, optimizer, examples(4))
        released.append(result)
    assert all(torch.equal(released[0][name], released[1][name]) for name in released[0])


def test_the_first_batch_of_one_example_defers_the_check():
    model = mixed(Centre())
    optimizer = make_private(model, batch_size=4)
    optimizer.batch.expect(1)
    model(examples(1)[0])
    assert_refuses(IsolationError, "'0'", lambda: model(examples(4)[0]))


def test_each_model_is_checked_once(monkeypatch):
    import lora_dp.engine.hooks

    calls = []
    monkeypatch.setattr(lora_dp.engine.hooks, "check_isolation", lambda *args, **options: calls.append(1) or Passed())
    monkeypatch.setattr(lora_dp.engine.hooks, "drawn_for_test", lambda: False)
    model = mlp()
    optimizer = make_private(model, batch_size=4)
    for _ in range(3):
        take_step(model, optimizer, examples(4))
    assert len(calls) == 1


def test_batches_that_cannot_be_checked_are_refused():
    engine, (x, y) = PrivacyEngine("rdp"), examples(4)
    assert_refuses(ValueError, "at least two examples, got 1", lambda: engine.check_isolation(mlp(), x[:1]))
    assert_refuses(ValueError, "needs the criterion", lambda: engine.check_isolation(mlp(), (x, y)))


def test_nan_examples_do_not_hide_nor_fake_a_mixture():
    x, y = examples(4)
    x[0] = torch.nan
    passes(mlp(), (x, y), F.cross_entropy)
    assert_refuses(IsolationError, "", lambda: passes(mixed(Neighbour()), (x, y), F.cross_entropy))


def test_half_precision_passes():
    model, (x, y) = mlp(dtype=torch.bfloat16), examples(4)
    passes(model, (x.bfloat16(), y), F.cross_entropy)
    with torch.autocast("cpu", torch.bfloat16):
        passes(mlp(), (x, y), F.cross_entropy)
    assert cross_entropy(model, (x, y)).isfinite()


@pytest.mark.slow
@pytest.mark.parametrize("model", [lambda: DPLinear(4, 2), lambda: DPLoRALinear(4, 2, r=2)])
@pytest.mark.parametrize(
    "criterion",
    [
        lambda o, t: (o / o.abs().max() - t).square().sum(1),
        lambda o, t: (o - o.mean(0) - t).square().sum(1),
        lambda o, t: (o - o.mean(0) - t).square().mean(),
    ],
)
def test_losses_of_a_model_that_is_one_private_layer_are_tried_too(model, criterion):
    """Nothing stood between its output and the loss whose gradient was looked at: a tenth of such losses passed."""
    for seed in range(60):
        torch.manual_seed(seed)
        batch = torch.randn(8, 4), torch.randn(8, 2)
        with pytest.raises(IsolationError, match="The loss mixes examples"):
            PrivacyEngine().check_isolation(model(), batch, criterion)


@pytest.mark.slow
@pytest.mark.parametrize("model", [lambda: DPLinear(4, 2), lambda: DPLoRALinear(4, 2, r=2)])
def test_a_model_that_is_one_private_layer_passes_with_a_loss_of_each_example(model):
    for seed in range(20):
        torch.manual_seed(seed)
        batch = torch.randn(8, 4), torch.randn(8, 2)
        PrivacyEngine().check_isolation(model(), batch, lambda o, t: (o - t).square().sum(1))
        PrivacyEngine().check_isolation(model(), batch, lambda o, t: (o - t).square().mean())
