"""Heads that begin with texts about the classes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lora_dp.fed.config import RunConfig
from lora_dp.fed.data.encoding import ImageSpec, TextSpec
from lora_dp.fed.models.class_texts import start_from_texts, texts_of_names
from lora_dp.fed.models.feature_models import on_token_means
from lora_dp.fed.models.loading import load_model
from lora_dp.fed.models.options import ModelConfig
from lora_dp.nn.feature_sums import unit_length
from tests.fed.data.word_tokenizer import Words
from tests.fed.models.tiny_texts import bert, bert_folder
from tests.fed.option_ways import WAYS

TOKENS = TextSpec(Words(), 20)  # type: ignore[arg-type]
TEXTS = ["a bb ccc", "dddd", "ee a ggggg ccc"]


def model_of(classes: int = 3, **options) -> nn.Module:
    config = ModelConfig(name="the model", features="mean", **options)
    return on_token_means(bert(), TOKENS, config, classes).train()


@pytest.mark.parametrize("whitening", ["none", "made-up"])
@pytest.mark.parametrize("blocks", [[-1], [1, 2]])
def test_each_text_is_of_its_own_class_by_the_cosine(whitening: str, blocks: list[int]) -> None:
    """Logits of an example differ between classes as ten times the cosines to their texts do."""
    model = model_of(whitening=whitening, feature_blocks=blocks)
    start_from_texts(model, TOKENS, TEXTS)
    assert model.training
    model.eval()
    lengths = [[len(word) for word in text.split()] for text in TEXTS]
    rows = [torch.tensor([row]) for row in lengths]
    with torch.no_grad():
        units = [unit_length(model.features(row, attention_mask=torch.ones_like(row)))[0] for row in rows]
        for place, row in enumerate(rows):
            found = model(row, attention_mask=torch.ones_like(row))[0]
            assert int(found.argmax()) == place
            expected = torch.stack([10 * units[place] @ (unit - torch.stack(units).mean(0)) for unit in units])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_text_that_is_too_long_is_cut() -> None:
    model, short = model_of(), model_of()
    short.load_state_dict(model.state_dict())
    start_from_texts(model, TOKENS, ["a " * 25, "bb", "ccc"])
    start_from_texts(short, TOKENS, ["a " * 20, "bb", "ccc"])
    torch.testing.assert_close(model.head.linear.weight, short.head.linear.weight)


def test_a_tokenizer_that_names_no_limit_has_one() -> None:
    class Endless(Words):
        def __call__(self, texts, pairs=None, truncation=False, max_length=None, **more):
            assert max_length is None or max_length <= 512
            return super().__call__(texts, pairs, truncation, max_length, **more)

    start_from_texts(model_of(), TextSpec(Endless(), int(1e30)), TEXTS)  # type: ignore[arg-type]


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^class_texts has 2 texts, but the data have 3 classes: give one for each"):
        start_from_texts(model_of(), TOKENS, TEXTS[:2])
    with pytest.raises(ValueError, match="for a model that takes texts"):
        start_from_texts(model_of(), ImageSpec(16, 16, 1, (0.5,), (0.5,)), TEXTS)
    for features in ("own", "unit"):
        with pytest.raises(ValueError, match="class_texts start a new head on features mean"):
            ModelConfig(features=features, class_texts=TEXTS)
    with pytest.raises(ValueError, match="warm_start and class_texts both say where the head begins"):
        RunConfig.from_flat({"method": "head-only", "class_texts": TEXTS, "warm_start": True})
    folder = bert_folder(tmp_path)
    with pytest.raises(ValueError, match="names of classes, which a model does not know"):
        load_model(ModelConfig(name=folder, features="mean", class_texts="names"), 2, "text")
    with pytest.raises(ValueError, match="class_texts start a new head on features mean, not own: leave them out"):
        load_model(ModelConfig(class_texts=["a", "b"]), 2, "image")
    with pytest.raises(ValueError, match="which are numbers: give texts yourself"):
        texts_of_names(["0", "1"])
    assert texts_of_names(["0", "Refund_not  showing_up"]) == ["0", "Refund not showing up"]


@pytest.mark.parametrize("way", WAYS)
def test_texts_are_a_list_or_one_word(way) -> None:
    for wrong in ("name", "", [1, 2], 3, True, {"a": "b"}):
        with pytest.raises(ValueError, match="^class_texts must be "):
            way("class_texts", wrong)


def test_the_names_of_classes_stand_in_the_runs_configuration() -> None:
    """So that whoever resumes, or has data of other names, begins from the same head."""
    given = RunConfig.from_flat({"features": "mean", "class_texts": "names"})
    stored = RunConfig.from_flat({"features": "mean", "class_texts": ["one", "two"]})
    assert given.settled_as(stored).model.class_texts == ["one", "two"]
    without = RunConfig.from_flat({"features": "mean"})
    assert given.settled_as(without).model.class_texts == "names"  # so that it is told from that one
    other = RunConfig.from_flat({"features": "mean", "class_texts": ["three", "two"]})
    assert other.settled_as(stored).model.class_texts == ["three", "two"]
