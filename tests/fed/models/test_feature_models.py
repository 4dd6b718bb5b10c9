"""Heads on features of unit length, put into loaded models; and what cannot have one."""

import pytest
import torch
import transformers
from torch import Tensor, nn

from lora_dp.fed.data.encoding import ImageSpec, TextSpec
from lora_dp.fed.data.examples import ImageExamples
from lora_dp.fed.models.feature_models import blank_batch, made_up, on_token_means, put_feature_head
from lora_dp.fed.models.options import ModelConfig
from lora_dp.fed.models.pooling import random_fields
from lora_dp.losses import feature_sums_loss
from lora_dp.nn.feature_head import FeatureHead
from lora_dp.nn.feature_sums import SumWeights, unit_length
from tests.fed.data.word_tokenizer import Words
from tests.fed.models.tiny_texts import LENGTHS, bert, texts
from tests.tiny_models import HEADS, build

PIXELS = ImageSpec(16, 16, 1, (0.5,), (0.5,))
TOKENS = TextSpec(Words(), 20)  # type: ignore[arg-type]


def config(**options) -> ModelConfig:
    return ModelConfig(**{"name": "the model", "features": "mean", **options})


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(2))


# In place of a model's own head


@pytest.mark.parametrize("kind", ["vit", "timm_vit", "timm_swin"])
def test_the_head_is_given_what_the_models_own_was(kind: str) -> None:
    model = build(kind)
    seen: list[Tensor] = []
    handle = model.get_submodule(HEADS[kind]).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    own = model(images())
    handle.remove()
    classes = getattr(own, "logits", own).shape[1]
    put_feature_head(model, [HEADS[kind]], kind)
    head = model.get_submodule(HEADS[kind])
    assert isinstance(head, FeatureHead) and head.out_features == classes
    found = model.eval()(images())
    expected = head.logit_scale * (unit_length(seen[0]) @ head.linear.weight.t() + 0.3 * head.linear.bias)
    torch.testing.assert_close(getattr(found, "logits", found), expected)


@pytest.mark.parametrize("kind", ["vit", "timm_vit"])
def test_a_head_that_is_kept_judges_as_before_up_to_the_features_length(kind: str) -> None:
    model, name = build(kind).eval(), HEADS[kind]
    lengths: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: lengths.append(args[0].norm(dim=-1)))
    before = model(images(64))
    handle.remove()
    weight = model.get_submodule(name).weight.detach().clone()
    put_feature_head(model, [name], kind, PIXELS)
    head = model.get_submodule(name)
    factor = head.logit_scale * head.linear.weight.norm() / weight.norm()
    torch.testing.assert_close(head.linear.weight * head.logit_scale, factor * weight)
    assert 0.5 * lengths[0].mean() < factor < 2 * lengths[0].mean()
    after = model(images(64))
    bias = head.logit_scale * 0.3 * head.linear.bias
    before, after = (getattr(out, "logits", out) - bias for out in (before, after))
    torch.testing.assert_close(after, before * (factor / lengths[0]).unsqueeze(1))


def test_the_length_of_a_language_models_features_is_measured_on_made_up_tokens() -> None:
    """The last normalisation of a decoder leaves every token at the length √d."""
    model = build("gpt2").eval()
    weight = model.score.weight.detach().clone()
    put_feature_head(model, ["score"], "gpt2", TOKENS)
    found = model.score.logit_scale * model.score.linear.weight
    torch.testing.assert_close(found, weight * weight.shape[1] ** 0.5, rtol=1e-3, atol=0)


def test_a_decoder_has_one_on_each_token_and_sums_of_the_one_that_counts() -> None:
    model = build("gpt2")
    put_feature_head(model, ["score"], "gpt2")
    with torch.no_grad():
        states = model.transformer(**texts()).last_hidden_state
    last = torch.stack([states[row, length - 1] for row, length in enumerate(LENGTHS)])
    head = model.score
    expected = head.logit_scale * (unit_length(last) @ head.linear.weight.t() + 0.3 * head.linear.bias)
    torch.testing.assert_close(model(**texts()).logits, expected)
    with model.score.summing(SumWeights()) as sums:
        labels = torch.tensor([2, 0, 2])
        feature_sums_loss(model(**texts()).logits, labels).sum().backward()
        assert sums.by_class.weight.grad is not None and sums.over_all.weight.grad is not None
        found = -sums.by_class.weight.grad
        torch.testing.assert_close(found[2, :16], unit_length(last)[labels == 2].sum(0))
        torch.testing.assert_close(found[:, 16], torch.tensor([0.5, 0.0, 1.0]))
        torch.testing.assert_close(-sums.over_all.weight.grad[0, :16], unit_length(last).sum(0))


@pytest.mark.parametrize("heads", [["classifier"], ["classifier.dense", "classifier.out_proj"]])
def test_a_head_of_two_layers_is_refused(heads: list[str]) -> None:
    model = build("roberta")
    with pytest.raises(ValueError, match=r"^The head of roberta is not one linear layer: choose features own, or mean"):
        put_feature_head(model, heads, "roberta")
    assert not any(isinstance(module, FeatureHead) for module in model.modules())


# On means over tokens


def test_the_models_own_head_is_left_out() -> None:
    for kind in ("timm_vit", "vit"):
        model = on_token_means(build(kind), PIXELS, config(feature_blocks=[1, -1]), 5)
        assert model.head.in_features == 32 and model.head.out_features == 5 and not model.training
        assert model(images()).shape == (3, 5)
        names = {name for name, _ in model.named_parameters() if "head" in name or "classifier" in name}
        assert names == {"head.linear.weight", "head.linear.bias"}
    text = on_token_means(bert(), TOKENS, config(), 4)
    assert text(**texts()).shape == (3, 4)


@pytest.mark.parametrize("blocks", [[3], [-3], [1, 9]])
@pytest.mark.parametrize("kind", ["timm_vit", "vit"])
def test_blocks_that_are_not_there_are_named(kind: str, blocks: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^the model has no blocks .*: correct feature_blocks\.$"):
        on_token_means(build(kind), PIXELS, config(feature_blocks=blocks), 5)


def test_a_model_that_does_not_tell_its_blocks_is_refused() -> None:
    words = r"^the model does not tell its blocks: choose features unit or own\.$"
    with pytest.raises(ValueError, match=words):
        on_token_means(nn.Linear(4, 2), PIXELS, config(), 5)
    resnet = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])
    )
    with pytest.raises(ValueError, match=words):
        on_token_means(resnet, PIXELS, config(), 5)


@pytest.mark.slow
def test_whitening_is_by_made_up_images_prepared_as_private_ones_are() -> None:
    """Features of the very fields have next to no correlation; with contrast the fields are another."""
    found = {}
    for contrast in (False, True):
        spec = ImageSpec(16, 16, 1, (0.5,), (0.5,), (0.2, 0.1), contrast)
        model = on_token_means(build("timm_vit"), spec, config(whitening="made-up"), 5)
        whitening, model.head = model.whitening, nn.Identity()
        assert whitening is not None
        pixels = spec.prepared(random_fields(3000, 16, 16, 1))
        batch = ImageExamples(pixels, torch.zeros(3000), spec.mean, spec.std).batch(range(3000))
        with torch.no_grad():
            features = model(batch["pixel_values"]).double()
            model.whitening = None
            raw = model(batch["pixel_values"]).double()
        torch.testing.assert_close(features.mean(0), torch.zeros(16).double(), rtol=0, atol=1e-3)
        covariance = torch.cov(features.t(), correction=0)
        values = torch.linalg.eigvalsh(torch.cov(raw.t(), correction=0))
        expected = torch.diag(values / (values + 0.03 * values.mean()))
        torch.testing.assert_close(covariance, expected, rtol=0, atol=0.01)
        found[contrast] = whitening.matrix
    assert not torch.allclose(found[True], found[False], rtol=0.1)


def test_made_up_texts_are_between_what_a_real_tokenizer_puts_around_every_text() -> None:
    letters = {letter: place + 5 for place, letter in enumerate("abcdefgh")}
    marks = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    for tokenizer, before, after in (
        (transformers.BertTokenizer(vocab=marks | letters), [2], [3]),
        (
            transformers.GPT2Tokenizer(vocab={"<|endoftext|>": 0} | letters, merges=[], pad_token="<|endoftext|>"),
            [],
            [],
        ),
    ):
        own = set(tokenizer.all_special_ids)
        for batch in made_up(TextSpec(tokenizer, 20), 13):
            for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
                text = ids[: sum(mask)]
                drawn = text[len(before) : len(text) - len(after)]
                assert text == [*before, *drawn, *after] and len(drawn) >= 4 and not own & set(drawn)


def test_whitening_of_texts_is_by_random_tokens_between_those_around_every_text() -> None:
    class Around(Words):
        all_special_ids = (0, 7, 9)
        around = ([7], [9])

    spec = TextSpec(Around(), 20)  # type: ignore[arg-type]
    batches = list(made_up(spec, 40))
    seen: set[int] = set()
    for batch in batches:
        lengths = batch["attention_mask"].sum(1)
        assert int(lengths.min()) >= 6 and int(lengths.max()) <= 20
        for ids, length in zip(batch["input_ids"].tolist(), lengths.tolist(), strict=True):
            assert ids[0] == 7 and ids[length - 1] == 9 and not any(ids[length:])
            seen |= set(ids[1 : length - 1])
    assert sum(len(batch["input_ids"]) for batch in batches) == 1000 and seen == set(range(40)) - {0, 7, 9}
    model = on_token_means(bert(), spec, config(whitening="made-up"), 5)
    whitening, model.head, model.whitening = model.whitening, nn.Identity(), None
    assert whitening is not None
    with torch.no_grad():
        raw = torch.cat([model(**batch) for batch in batches]).double()
    white = torch.cov(whitening.double()(raw).t(), correction=0)
    values = torch.linalg.eigvalsh(torch.cov(raw.t(), correction=0))
    torch.testing.assert_close(white, torch.diag(values / (values + 3 * values.mean())), rtol=0, atol=1e-3)


def test_a_blank_batch_is_one_example_of_what_the_model_takes() -> None:
    image = blank_batch(ImageSpec(3, 4, 2, (0.5,) * 2, (0.5,) * 2))
    assert {name: tensor.shape for name, tensor in image.items()} == {"pixel_values": (1, 2, 3, 4)}
    text = blank_batch(TOKENS)
    assert set(text) == {"input_ids", "attention_mask"} and all(len(tensor) == 1 for tensor in text.values())
