"""The job of a run, opened: the same examples again, and others under another seed."""

from typing import Any

import pytest
import torch
import transformers
from datasets import ClassLabel, Features, Value

from lora_dp.fed.config import RunConfig
from lora_dp.fed.models.frozen_front import LastBlocks
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.head_start import start_head
from lora_dp.fed.rounds.kept_data import data_kept
from lora_dp.fed.rounds.messages import Workspace
from lora_dp.fed.rounds.setup import open_job
from tests.fed.data.word_tokenizer import write
from tests.fed.models.tiny_texts import bert_folder, small_tokenizer

TINY = {"clients": 2, "rounds": 4, "local_steps": 1, "batch_size": 16, "accountant": "rdp", "device": "cpu"}


@pytest.mark.slow
def test_an_opened_job_has_the_same_digest_again_and_another_under_another_seed():
    def of(**options: Any) -> str:
        config = RunConfig.from_flat({**TINY, **options})
        return open_job(config).origin(config).examples

    first = of()
    assert of() == first == of(rounds=9, lr=0.5, evaluate_every=3)
    for options in ({"seed": 1}, {"split_seed": 1}, {"partition": "dirichlet"}, {"validation_fraction": 0.25}):
        assert of(**options) != first


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "texts"])
def test_a_round_on_the_last_blocks_is_that_of_the_whole_model(kind, tmp_path, monkeypatch):
    """What lies before is computed once; the same examples give the same adapters and loss, up to rounding."""
    options: dict[str, Any] = {"method": "dp-lora", "adapt_last": 1, "reproducible": True, "local_steps": 1}
    if kind == "texts":  # of several widths, which meet in one batch where they are evaluated
        texts = [" ".join("ab"[(i * j) % 2] for j in range(10 if i % 3 else 2)) for i in range(24)]
        (tmp_path / "model").mkdir()
        options["dataset"] = write(tmp_path / "data", train={"text": texts, "label": [0, 1] * 12})
        options |= {"model": bert_folder(tmp_path / "model"), "features": "mean", "feature_blocks": [1, -1]}
    found = []
    for apart in (True, False):
        if not apart:
            monkeypatch.setattr(
                "lora_dp.fed.rounds.setup._without_front",
                lambda config, loaded, model, called, splits: (Workspace(model), splits.train, splits.validation),
            )
        federation = Federation.from_config(RunConfig.from_flat({**TINY, **options}))
        assert isinstance(federation.model, LastBlocks) == apart
        result = federation.run_round([0, 1])
        found.append((federation.server.state, result))
    (states, result), (expected, whole) = found
    assert states.keys() == expected.keys() and any("lora_A" in name for name in states)
    for name, tensor in states.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
    assert result.loss == pytest.approx(whole.loss, rel=1e-3) and result.bytes_up == whole.bytes_up


@pytest.mark.slow
@pytest.mark.parametrize("sums_share", [0.0, 0.2])
def test_a_run_begins_with_the_datas_names_of_classes(sums_share, tmp_path):
    """They tell its texts apart before the first round, also when a release has centred the features."""
    (tmp_path / "model").mkdir()
    names = ClassLabel(names=["a_a_a", "b"])
    features = Features({"text": Value("string"), "label": names})
    data = write(tmp_path / "data", features, train={"text": ["b b b", "a a"] * 20, "label": [1, 0] * 20})
    options = {"dataset": data, "model": bert_folder(tmp_path / "model"), "features": "mean", "class_texts": "names"}
    config = RunConfig.from_flat(
        {**TINY, **options, "method": "head-only", "epsilon": "none", "sums_share": sums_share}
    )
    federation = Federation.from_config(config)
    assert config.model.class_texts == ["a a a", "b"]
    assert federation.evaluate()[1] == 1.0
    if sums_share:
        start_head(federation)
        assert federation.evaluate()[1] == 1.0


@pytest.mark.slow
def test_blocks_that_return_tuples_do_so_where_activations_are_shared(tmp_path):
    """A second run on the same front calls none of its blocks, and knows nevertheless what they return."""
    (tmp_path / "model").mkdir()
    small_tokenizer(tmp_path / "model")
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 20}
    config = transformers.MPNetConfig(vocab_size=4, max_position_embeddings=40, pad_token_id=0, **sizes)
    transformers.MPNetModel(config).save_pretrained(tmp_path / "model")
    data = write(tmp_path / "data", train={"text": [" ".join("ab" * 4)] * 24, "label": [0, 1] * 12})
    options = {"method": "dp-lora", "adapt_last": 1, "dataset": data, "model": str(tmp_path / "model")}
    with data_kept():
        losses = [
            Federation.from_config(RunConfig.from_flat({**TINY, **options, "features": "mean"})).evaluate()[0]
            for _ in range(2)
        ]
    assert losses[0] == losses[1]
