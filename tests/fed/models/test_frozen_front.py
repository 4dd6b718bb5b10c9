"""The frozen front: what a module is given, without a trace in the model; and the head that goes on from there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_dp import IsolationError
from lora_dp.fed.data.encoding import ImageSpec, TextSpec
from lora_dp.fed.data.kept_activations import ACTIVATIONS
from lora_dp.fed.models.frozen_front import Front, HeadAlone, LastBlocks, head_is_last, passed_over
from lora_dp.fed.models.loading import load_model, logits
from lora_dp.fed.models.options import ModelConfig
from lora_dp.fed.models.pooling import blocks_of
from lora_dp.isolation.check import check_isolation
from tests.fed.data.word_tokenizer import Words
from tests.fed.models.tiny_texts import bert_folder, small_decoder, texts
from tests.tiny_models import HEADS, IMAGES, build

PIXELS = ImageSpec(16, 16, 1, (0.5,), (0.5,))
TOKENS = TextSpec(Words(), 20)  # type: ignore[arg-type]


def batch_for(kind: str) -> dict[str, Tensor]:
    if kind in IMAGES:
        return {"pixel_values": torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))}
    return texts()


class Dropping(nn.Module):
    """Dropout in front of a head, a block after which something else comes, and modes that differ."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.drop, self.head = nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3)
        self.after = 0

    def forward(self, pixel_values: Tensor) -> Tensor:
        scores: Tensor = self.head(self.drop(self.first(pixel_values.flatten(1))))
        self.after += 1
        return scores


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(4, 1, 2, 3, generator=torch.Generator().manual_seed(1))}


def test_the_head_goes_on_where_the_front_ends() -> None:
    model = Dropping().train()
    given = Front(model, "float32", head="head")(pixels())
    assert given.shape == (4, 5) and not given.requires_grad
    torch.testing.assert_close(HeadAlone(model, "head")(given), model.eval()(**pixels()), rtol=0, atol=0)
    named = {ACTIVATIONS: given, "labels": torch.zeros(4)}
    torch.testing.assert_close(logits(HeadAlone(model, "head"), named), model(**pixels()), rtol=0, atol=0)


@pytest.mark.parametrize("features", ["own", "unit", pytest.param("mean", marks=pytest.mark.slow)])
def test_so_it_does_with_each_kind_of_features(features: str) -> None:
    config = ModelConfig(features=features, whitening="made-up" if features == "mean" else "none")  # type: ignore[arg-type]
    loaded = load_model(config, 10, "image", adapted=False)
    [head] = loaded.heads
    batch = batch_for("timm_vit")
    given = Front(loaded.model, "float32", head=head)(batch)
    alone = HeadAlone(loaded.model, head)
    assert given.shape == (3, 64) and head_is_last(loaded.model, loaded.heads, loaded.spec)
    torch.testing.assert_close(alone.eval()(given), logits(loaded.model.eval(), batch), rtol=1e-5, atol=1e-6)
    alone.train()
    assert loaded.model.get_submodule(head).training  # the very same module


def test_modes_hooks_and_graph_are_left_as_they_were() -> None:
    model = Dropping().train()
    model.first.eval()
    before = [module.training for module in model.modules()]
    Front(model, "float32", head="head")(pixels())
    assert [module.training for module in model.modules()] == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError):
        Front(model, "float32", head="head")({"pixel_values": torch.zeros(4, 1, 2, 2)})
    assert [module.training for module in model.modules()] == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    model(**pixels()).sum().backward()  # nothing was switched off
    assert model.first.weight.grad is not None


def test_it_stops_at_its_place() -> None:
    model = Dropping()
    ran: list[str] = []
    model.head.register_forward_hook(lambda *_: ran.append("head"))
    Front(model, "float32", head="head")(pixels())
    assert ran == [] and model.after == 0
    torch.testing.assert_close(Front(model, "float32", head="first")(pixels()), pixels()["pixel_values"].flatten(1))


def test_half_precision_is_taken_where_it_is_asked_for() -> None:
    given = Front(Dropping(), "bf16", head="head")(pixels())
    exact = Front(Dropping(), "float32", head="head")(pixels())
    assert given.dtype == torch.bfloat16 and exact.dtype == torch.float32
    torch.testing.assert_close(given.float(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ["vit", "timm_vit", "timm_swin"])
def test_a_classifier_of_vectors_can_be_run_by_itself(kind: str) -> None:
    model = build(kind)
    given = Front(model, "float32", head=HEADS[kind])(batch_for(kind))
    torch.testing.assert_close(HeadAlone(model, HEADS[kind])(given), logits(model, batch_for(kind)))
    assert head_is_last(model, [HEADS[kind]], PIXELS)
    assert not head_is_last(model, [HEADS[kind], HEADS[kind]], PIXELS)


@pytest.mark.parametrize("kind", ["roberta", "gpt2", "llama"])
def test_a_head_of_tokens_cannot(kind: str) -> None:
    """One chooses a token itself; scores of the others are chosen behind it."""
    model = build(kind).train()
    assert not head_is_last(model, [HEADS[kind]], TOKENS)
    assert model.training


def test_a_head_behind_which_something_comes_cannot() -> None:
    class Doubled(Dropping):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return 2 * super().forward(pixel_values)

    spec = ImageSpec(2, 3, 1, (0.5,), (0.5,))
    assert head_is_last(Dropping(), ["head"], spec) and not head_is_last(Doubled(), ["head"], spec)
    assert not head_is_last(Dropping(), ["first"], spec)


# The last blocks


def backbone_of(kind: str, folder: Path) -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    """A model with adapters in its last two blocks, a decoder in its last; an input; the names of its blocks."""
    options: dict[str, Any] = {"adapt_last": 1 if "decoder" in kind else 2, "r": 2}
    if kind.startswith("text"):
        options["name"] = bert_folder(folder) if "decoder" not in kind else small_decoder(folder)
    if "mean" in kind:
        options |= {"features": "mean", "feature_blocks": [1, -1, -2]}
    loaded = load_model(ModelConfig(**options), 3, "text" if kind.startswith("text") else "image")
    torch.manual_seed(1)
    for parameter in loaded.model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    if kind.startswith("text"):
        batch = {name: tensor.clamp(max=3) for name, tensor in texts(8).items()}
    else:
        batch = batch_for("timm_vit")
    return loaded.model, batch, blocks_of(loaded.model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image", "image mean", "text", "text mean", "text decoder"])
def test_last_blocks_go_on_where_the_first_ended(tmp_path, kind: str) -> None:
    """Logits and gradients are those of the whole model, and no first block is run."""
    model, batch, blocks = backbone_of(kind, tmp_path)
    count = len(blocks) - (1 if "decoder" in kind else 2)
    kept = sorted({0, count - 1} if "mean" in kind else {count - 1})
    model.eval()
    expected = logits(model, batch)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    before = [module.training for module in model.modules()]
    front = Front(model, "float32", blocks=blocks[:count], kept=kept)
    given = front(batch)
    assert given.shape[0] == 3 and given.dim() == 3 and not given.requires_grad
    assert [module.training for module in model.modules()] == before
    ran: list[str] = []
    for name in blocks[:count]:
        layer = next(part for part in model.get_submodule(name).modules() if isinstance(part, nn.Linear | Conv1D))
        layer.register_forward_hook(lambda *_: ran.append("first"))
    rest = LastBlocks(model, front)
    found = logits(rest, {ACTIVATIONS: given, **batch})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    again = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert again.keys() == gradients.keys() and ran == []
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))
    # Afterwards the model is whole again.
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=0)
    assert ran and not any("forward" in vars(model.get_submodule(name)) for name in blocks)


def test_a_front_of_blocks_stops_behind_the_last_of_them() -> None:
    model = build("timm_vit")
    ran: list[int] = []
    for place, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, place=place: ran.append(place))
    given = Front(model, "float32", blocks=["blocks.0"], kept=[0])(batch_for("timm_vit"))
    assert ran == [0]
    both = Front(model, "float32", blocks=["blocks.0", "blocks.1"], kept=[0, 1])(batch_for("timm_vit"))
    torch.testing.assert_close(both[..., :16], given, rtol=0, atol=0)
    assert both.shape == (3, 5, 32) and not any(block._forward_hooks for block in [model.head, model.norm])


def test_blocks_that_are_passed_over_come_back_after_an_exception() -> None:
    blocks = [nn.Linear(2, 2), nn.Linear(2, 2)]
    x = torch.randn(3, 2)
    expected = [block(x) for block in blocks]
    with pytest.raises(KeyError), passed_over(blocks, {0: torch.ones(3, 2)}, as_tuple=False):
        assert torch.equal(blocks[0](x), torch.ones(3, 2)) and blocks[1](x) is x
        raise KeyError
    assert all(torch.equal(block(x), right) for block, right in zip(blocks, expected, strict=True))
    with passed_over(blocks, {}, as_tuple=True):
        assert blocks[0](x, attention_mask=None) == (x,)


# Isolation


def losses(scores: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(getattr(scores, "logits", scores), labels, reduction="none")


@pytest.mark.slow
def test_models_with_such_heads_keep_examples_apart(tmp_path) -> None:
    """As a whole, with adapters in the backbone, and as the head alone."""
    labels = torch.tensor([0, 1, 1])
    image = ModelConfig(features="mean", feature_blocks=[1, -1], whitening="made-up", target_modules=["qkv"])
    text = ModelConfig(name=bert_folder(tmp_path), features="mean", target_modules=["query"])
    tokens = {name: tensor.clamp(max=3) for name, tensor in texts().items()}
    for loaded, batch in (
        (load_model(image, 2, "image"), batch_for("timm_vit")),
        (load_model(ModelConfig(features="unit", target_modules=["qkv"]), 2, "image"), batch_for("timm_vit")),
        (load_model(text, 2, "text"), tokens),
    ):
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
        model = loaded.model.eval()
        args, named = ((batch["pixel_values"],), {}) if "pixel_values" in batch else ((), batch)
        check_isolation(model, args, named, 3, targets=labels, criterion=losses)
        given = Front(model, "float32", head=loaded.heads[0])(batch)
        alone = HeadAlone(model, loaded.heads[0])
        check_isolation(alone, (), {ACTIVATIONS: given}, 3, targets=labels, criterion=losses)

    class Centred(HeadAlone):
        def forward(self, activations: Tensor) -> Tensor:
            return super().forward(activations - activations.mean(0))

    with pytest.raises(IsolationError):
        check_isolation(Centred(model, loaded.heads[0]), (), {ACTIVATIONS: given}, 3, targets=labels, criterion=losses)


def test_a_front_is_told_by_what_its_values_follow_from() -> None:
    """Starts of heads and adapters are not among them; weights, blocks and options are."""

    def told(seed: int = 0, change: str | None = None, last: int = 1, **options: Any) -> str:
        config = ModelConfig(adapt_last=last, **options)
        loaded = load_model(config, 3, "image", seed=seed)
        blocks = blocks_of(loaded.model)
        if change is not None:
            next(loaded.model.get_submodule(change).parameters()).data.view(-1)[0] += 1e-3
        front = Front(loaded.model, "float32", blocks=blocks[:-last], kept=[len(blocks) - last - 1])
        return front.digest(loaded.heads, config)

    blocks = blocks_of(load_model(ModelConfig(), 3, "image").model)
    assert told() == told(seed=1) == told(r=2, alpha=3.0)
    others = [told(change=blocks[0]), told(last=2), told(features="mean"), told(features="mean", feature_blocks=[1])]
    assert len({told(), *others}) == 1 + len(others)
