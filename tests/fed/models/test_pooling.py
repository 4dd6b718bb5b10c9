"""Means over tokens after some blocks, whitening, and made-up images."""

import json

import pytest
import torch
import transformers
from torch import Tensor, nn

from lora_dp.fed.data.encoding import ImageSpec
from lora_dp.fed.models.loading import load_model
from lora_dp.fed.models.options import ModelConfig
from lora_dp.fed.models.pooling import (
    POOLING,
    TokenMeans,
    Whitening,
    blocks_of,
    random_fields,
    says_mean,
    without_pooler,
)
from tests.fed.models.tiny_texts import LENGTHS, bert, texts
from tests.tiny_models import build


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(2))


def default_backbone() -> nn.Module:
    model = load_model(ModelConfig(), 10, "image", adapted=False).model.eval()
    model.reset_classifier(0)
    return model


def units(features: Tensor) -> Tensor:
    return features / features.norm(dim=1, keepdim=True)


@torch.no_grad()
def by_hand(backbone: nn.Module, x: Tensor, block: int, skipped: int = 0) -> Tensor:
    """The mean over a vision transformer's patches after a block, counted from 1; without the tokens in front."""
    tokens = backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(x)))
    for layer in backbone.blocks[:block]:
        tokens = layer(tokens)
    return tokens[:, skipped:].mean(1)


# Images


@pytest.mark.parametrize("blocks", [[4], [-1], [1, 4], [4, 1, 2], [-2, 1], [2, 2]])
def test_an_image_has_the_means_over_its_patches_after_each_block(blocks: list[int]) -> None:
    backbone = default_backbone()
    found = TokenMeans(backbone, nn.Identity(), blocks)(images())
    expected = [units(by_hand(backbone, images(), block if block > 0 else 5 + block)) for block in blocks]
    torch.testing.assert_close(found, torch.cat(expected, 1), rtol=1e-5, atol=1e-6)
    assert found.shape == (3, 64 * len(blocks))


def test_a_class_token_is_not_in_the_mean() -> None:
    backbone = build("timm_vit")
    backbone.reset_classifier(0)
    found = TokenMeans(backbone, nn.Identity(), [1])(images())
    torch.testing.assert_close(found, units(by_hand(backbone, images(), 1, skipped=1)), rtol=1e-5, atol=1e-6)


def test_stages_of_an_image_model_that_keeps_channels_last() -> None:
    backbone = build("timm_swin")
    backbone.reset_classifier(0)
    with torch.no_grad():
        first = backbone.layers[0](backbone.patch_embed(images()))
        found = TokenMeans(backbone, nn.Identity(), [1])(images())
    torch.testing.assert_close(found, units(first.mean((1, 2))), rtol=1e-5, atol=1e-6)


def test_an_image_model_of_transformers_is_averaged_over_all_its_tokens() -> None:
    backbone = build("vit").vit
    with torch.no_grad():
        output = backbone(images(), output_hidden_states=True)
        found = TokenMeans(backbone, nn.Identity(), [1, 2])(images())
    expected = [output.hidden_states[1], output.last_hidden_state]
    torch.testing.assert_close(found, torch.cat([units(state.mean(1)) for state in expected], 1))


@pytest.mark.parametrize("block", [5, -5, 100])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_block_that_is_not_there_is_refused(kind: str, block: int) -> None:
    """And never another in its place, nor the embeddings below the first."""
    with pytest.raises(IndexError, match=f"no block {block} of"):
        if kind == "image":
            TokenMeans(default_backbone(), nn.Identity(), [1, block])(images())
        else:
            TokenMeans(bert(), nn.Identity(), [1, block])(**texts())


# Texts


@pytest.mark.parametrize("blocks", [[3], [-1], [1, 3], [3, 1], [-3, 2]])
def test_a_text_has_the_means_over_its_own_tokens(blocks: list[int]) -> None:
    backbone, batch = bert(), texts()
    with torch.no_grad():
        found = TokenMeans(backbone, nn.Identity(), blocks)(**batch)
        output = backbone(**batch, output_hidden_states=True)
    expected = []
    for block in blocks:
        number = block if block > 0 else 4 + block
        states = output.last_hidden_state if number == 3 else output.hidden_states[number]
        means = [states[row, :length].double().mean(0) for row, length in enumerate(LENGTHS)]
        expected.append(units(torch.stack(means)))
    torch.testing.assert_close(found.double(), torch.cat(expected, 1), rtol=1e-5, atol=1e-6)


def test_the_last_block_is_what_the_model_returns() -> None:
    """Its last normalisation included, which GPT-2 has behind its blocks."""
    backbone = build("gpt2").transformer
    batch = {"input_ids": texts()["input_ids"][:1]}
    with torch.no_grad():
        found = TokenMeans(backbone, nn.Identity(), [2])(**batch)
        whole = backbone(**batch, output_hidden_states=True)
        before = backbone.h[1](backbone.h[0](backbone.wte(batch["input_ids"]) + backbone.wpe(torch.arange(7))))
    torch.testing.assert_close(found, units(whole.last_hidden_state.mean(1)))
    before = before[0] if isinstance(before, tuple) else before
    assert not torch.allclose(found, units(before.mean(1)), atol=1e-3)


def test_neither_padding_nor_company_matters() -> None:
    model = TokenMeans(bert().double(), nn.Identity(), [1, -1])
    with torch.no_grad():
        whole = model(**texts())
        torch.testing.assert_close(model(**texts(width=16)), whole, rtol=1e-12, atol=1e-12)
        for row, length in enumerate(LENGTHS):
            alone = {name: tensor[row : row + 1, :length] for name, tensor in texts().items()}
            torch.testing.assert_close(model(**alone), whole[row : row + 1], rtol=1e-12, atol=1e-12)


def test_without_a_mask_all_tokens_count() -> None:
    model, batch = TokenMeans(bert(), nn.Identity(), [1]), texts()
    with torch.no_grad():
        ones = torch.ones_like(batch["attention_mask"])
        expected = model(input_ids=batch["input_ids"], attention_mask=ones)
        torch.testing.assert_close(model(input_ids=batch["input_ids"]), expected)


# The module


def test_each_mean_has_length_one_before_it_meets_the_others_and_the_head() -> None:
    model = TokenMeans(default_backbone(), nn.Identity(), [1, -1])
    for part in model(images()).split(64, 1):
        torch.testing.assert_close(part.norm(dim=1), torch.ones(3))
    model.head = nn.Linear(128, 2)
    whitening = Whitening(torch.randn(500, 128))
    features = TokenMeans(model.backbone, nn.Identity(), [1, -1])(images())
    torch.testing.assert_close(model(images()), model.head(features))
    model.whitening = whitening
    torch.testing.assert_close(model(images()), model.head(whitening(features)))


def test_it_tells_the_backbones_embeddings_and_configuration() -> None:
    backbone = bert()
    model = TokenMeans(backbone, nn.Identity(), [1])
    assert model.get_input_embeddings() is backbone.embeddings.word_embeddings and model.config is backbone.config
    image_model = TokenMeans(default_backbone(), nn.Identity(), [1])
    assert image_model.get_input_embeddings() is None and image_model.config is None


def test_the_pooler_is_left_out_and_nothing_changes() -> None:
    backbone = bert()
    with torch.no_grad():
        expected = TokenMeans(backbone, nn.Identity(), [1, -1])(**texts())
        assert without_pooler(backbone) is backbone
        torch.testing.assert_close(TokenMeans(backbone, nn.Identity(), [1, -1])(**texts()), expected, rtol=0, atol=0)
    assert not any("pooler" in name for name, _ in backbone.named_parameters())
    other = build("gpt2").transformer
    names = [name for name, _ in without_pooler(other).named_parameters()]
    assert names == [name for name, _ in build("gpt2").transformer.named_parameters()]


# Whitening


def correlated(count: int = 400, d: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(d, d, dtype=torch.float64, generator=generator) * torch.logspace(0, -2, d)[:, None]
    return torch.randn(count, d, dtype=torch.float64, generator=generator) @ mixing + 5


def covariance(features: Tensor) -> Tensor:
    centred = features - features.mean(0)
    return centred.t() @ centred / len(features)


def test_as_the_ridge_goes_to_zero_features_get_the_identity_as_covariance() -> None:
    features = correlated()
    found = Whitening(features, ridge=1e-12)(features)
    torch.testing.assert_close(found.mean(0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(covariance(found), torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-6)


def test_with_a_ridge_each_direction_has_the_variance_of_the_formula() -> None:
    features = correlated()
    values = torch.linalg.eigvalsh(covariance(features))
    found = covariance(Whitening(features, ridge=0.03)(features))
    expected = values / (values + 0.03 * values.mean())
    torch.testing.assert_close(found, torch.diag(expected))
    assert float(expected.min()) < 0.1 and float(expected.max()) > 0.9  # both ends are seen


def test_whitening_is_a_function_of_each_row_and_is_not_trained() -> None:
    features = correlated().float()
    whitening = Whitening(features)
    assert not list(whitening.parameters()) and set(whitening.state_dict()) == {"centre", "matrix"}
    assert whitening(features).dtype == torch.float32
    torch.testing.assert_close(whitening(features)[:1], whitening(features[:1]))
    flat = Whitening(torch.ones(10, 3) * torch.tensor([1.0, 2.0, 3.0]) + torch.eye(10, 3))
    assert bool(flat(torch.randn(2, 3)).isfinite().all())


# Blocks


@pytest.mark.parametrize(
    ("kind", "prefix", "count"),
    [
        ("timm_vit", "blocks", 2),
        ("vit", "vit.layers", 2),
        ("roberta", "roberta.encoder.layer", 2),
        ("gpt2", "transformer.h", 2),
    ],
)
def test_blocks_are_the_longest_list_of_one_kind(kind: str, prefix: str, count: int) -> None:
    assert blocks_of(build(kind)) == [f"{prefix}.{place}" for place in range(count)]


def test_blocks_are_found_where_all_of_them_are_adapted() -> None:
    plain = load_model(ModelConfig(), 10, "image", adapted=False).model
    assert blocks_of(load_model(ModelConfig(adapt_last=4), 10, "image").model) == blocks_of(plain)


def test_a_model_without_a_list_of_blocks_is_refused() -> None:
    for model in (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Tanh()), nn.Sequential(nn.Tanh(), nn.Tanh())):
        with pytest.raises(ValueError, match=r"^adapt_last needs a model that is a list of blocks"):
            blocks_of(model)


# Made-up images


def test_fields_are_the_same_each_time_and_leave_the_global_state() -> None:
    before = torch.get_rng_state()
    fields = random_fields(5, 12, 10, 3)
    assert fields.shape == (5, 3, 12, 10) and fields.dtype == torch.uint8
    assert torch.equal(fields, random_fields(5, 12, 10, 3)) and torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(fields, random_fields(5, 12, 10, 3, seed=1))


def test_fields_have_the_spectra_that_are_said() -> None:
    """Slopes of the logarithms, over frequencies at which neither the cut to 8 bits nor the image's edge matters."""
    fields = random_fields(300, 128, 128, 1).double()[:, 0]
    fields = fields - fields.mean((1, 2), keepdim=True)
    amplitude = torch.fft.rfft2(fields).abs()
    rows, columns = torch.fft.fftfreq(128)[:, None], torch.fft.rfftfreq(128)[None]
    frequency = (rows.square() + columns.square()).sqrt()
    used = (frequency > 0.03) & (frequency < 0.15)
    x, y = frequency[used].log().double(), amplitude[:, used].log()
    x = x - x.mean()
    slopes = -(y - y.mean(1, keepdim=True)) @ x / x.square().sum()
    # Uniform from 1 to 3; a slope is found with a deviation of 0.07.
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert float(slopes.quantile(share)) == pytest.approx(1 + 2 * share, abs=0.2)
    pixels = random_fields(200, 16, 16, 1).double()
    assert float(pixels.mean()) == pytest.approx(128, abs=2) and float(pixels.std()) == pytest.approx(64, abs=3)


# What a model says of itself


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"pooling_mode_mean_tokens": True}, True),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, False),
        ({"word_embedding_dimension": 16}, False),
        (None, False),
    ],
)
def test_a_folder_says_whether_its_embedding_is_the_mean(tmp_path, content: dict | None, expected: bool) -> None:
    if content is not None:
        (tmp_path / POOLING).parent.mkdir()
        (tmp_path / POOLING).write_text(json.dumps(content))
    assert says_mean(str(tmp_path)) is expected


def test_a_name_that_cannot_be_found_says_nothing(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert says_mean("nobody/nothing") is False

    def absent(*_: object, **__: object) -> None:
        raise OSError("nobody/nothing is not a valid model identifier")

    monkeypatch.setattr(transformers.utils, "cached_file", absent)
    assert says_mean("nobody/nothing") is False


def test_made_up_images_have_the_models_shape() -> None:
    spec = load_model(ModelConfig(), 10, "image").spec
    assert isinstance(spec, ImageSpec)
    assert random_fields(2, spec.height, spec.width, spec.channels).shape == (2, 1, 16, 16)
