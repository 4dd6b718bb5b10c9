"""The frozen front: what a module is given, without a trace in the model; and the head that goes on from there."""

import pytest
import torch
from torch import Tensor, nn

from lora_dp import IsolationError
from lora_dp.fed.data.encoding import ImageSpec, TextSpec
from lora_dp.fed.data.kept_activations import ACTIVATIONS
from lora_dp.fed.models.frozen_front import Front, HeadAlone, Rest, head_is_last
from lora_dp.fed.models.loading import load_model, logits, vocabulary_of
from lora_dp.fed.models.options import ModelConfig
from lora_dp.isolation.check import check_isolation
from tests.fed.data.word_tokenizer import Words
from tests.fed.models.tiny_texts import bert_folder, texts
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
    given = Front(model, "head", "float32")(pixels())
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
    given = Front(loaded.model, head, "float32")(batch)
    alone = HeadAlone(loaded.model, head)
    assert given.shape == (3, 64) and head_is_last(loaded.model, loaded.heads, loaded.spec)
    torch.testing.assert_close(alone.eval()(given), logits(loaded.model.eval(), batch), rtol=1e-5, atol=1e-6)
    alone.train()
    assert loaded.model.get_submodule(head).training  # the very same module


def test_modes_hooks_and_graph_are_left_as_they_were() -> None:
    model = Dropping().train()
    model.first.eval()
    before = [module.training for module in model.modules()]
    Front(model, "head", "float32")(pixels())
    assert [module.training for module in model.modules()] == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError):
        Front(model, "head", "float32")({"pixel_values": torch.zeros(4, 1, 2, 2)})
    assert [module.training for module in model.modules()] == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    model(**pixels()).sum().backward()  # nothing was switched off
    assert model.first.weight.grad is not None


def test_it_stops_at_its_place() -> None:
    model = Dropping()
    ran: list[str] = []
    model.head.register_forward_hook(lambda *_: ran.append("head"))
    Front(model, "head", "float32")(pixels())
    assert ran == [] and model.after == 0
    torch.testing.assert_close(Front(model, "first", "float32")(pixels()), pixels()["pixel_values"].flatten(1))


def test_half_precision_is_taken_where_it_is_asked_for() -> None:
    given = Front(Dropping(), "head", "bf16")(pixels())
    exact = Front(Dropping(), "head", "float32")(pixels())
    assert given.dtype == torch.bfloat16 and exact.dtype == torch.float32
    torch.testing.assert_close(given.float(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ["vit", "timm_vit", "timm_swin"])
def test_a_classifier_of_vectors_can_be_run_by_itself(kind: str) -> None:
    model = build(kind)
    given = Front(model, HEADS[kind], "float32")(batch_for(kind))
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


def test_the_rest_tells_the_models_embeddings() -> None:
    model = build("gpt2")
    assert Rest(model).get_input_embeddings() is model.get_input_embeddings() and vocabulary_of(Rest(model)) == 40
    assert HeadAlone(model, "score").get_input_embeddings() is None and vocabulary_of(HeadAlone(model, "score")) == 2


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
        given = Front(model, loaded.heads[0], "float32")(batch)
        alone = HeadAlone(model, loaded.heads[0])
        check_isolation(alone, (), {ACTIVATIONS: given}, 3, targets=labels, criterion=losses)

    class Centred(HeadAlone):
        def forward(self, activations: Tensor) -> Tensor:
            return super().forward(activations - activations.mean(0))

    with pytest.raises(IsolationError):
        check_isolation(Centred(model, loaded.heads[0]), (), {ACTIVATIONS: given}, 3, targets=labels, criterion=losses)
