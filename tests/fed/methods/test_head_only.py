"""The head alone: what is trained, sent and kept of a run, under both units of privacy."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_dp.fed.config import RunConfig
from lora_dp.fed.data.encoding import encode
from lora_dp.fed.data.kept_activations import KeptActivations
from lora_dp.fed.data.opening import open_data
from lora_dp.fed.launch import run
from lora_dp.fed.methods import get_method
from lora_dp.fed.models.frozen_front import HeadAlone
from lora_dp.fed.models.loading import load_model
from lora_dp.fed.rounds.evaluation import Evaluation, evaluate
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.runs.results import load_result
from tests.fed.data.word_tokenizer import write
from tests.fed.models.tiny_texts import small_decoder
from tests.fed.tiny_runs import adapter, tiny

CPU = torch.device("cpu")


def loaded_again(folder: Path, config: RunConfig) -> Evaluation:
    """What is achieved by what a run has left, in a model that is opened anew from its configuration."""
    raw = open_data(config.data)
    loaded = load_model(config.model, raw.num_labels, raw.kind, seed=7, adapted=False)
    load_result(loaded.model, folder)
    return evaluate(loaded.model, encode(raw, loaded.spec).validation, CPU)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"unit": "client", "features": "own"},
        {"features": "mean", "feature_blocks": [1, -1], "whitening": "made-up", "contrast": "model", "lr": 3.0},
    ],
    ids=["client", "example"],
)
def test_what_a_run_leaves_is_as_good_when_it_is_loaded_again(tmp_path, options: dict[str, Any]) -> None:
    config = tiny(tmp_path / "run", method="head-only", **options)
    outcome = run(config)
    last = outcome.rounds[-1]
    before = outcome.rounds[0]
    assert last.loss is not None and last.loss != before.loss and 0 < last.epsilon <= 8
    found = loaded_again(tmp_path / "run", config)
    assert found == pytest.approx((last.loss, last.accuracy, last.balanced_accuracy), rel=1e-4)
    tensors = {name.removeprefix("base_model.model.") for name in adapter(tmp_path / "run")}
    if options["features"] == "own":
        assert tensors == {"head.weight", "head.bias"}
    else:
        statistics = {f"head.{name}" for name in ("feature_mean", "feature_scale", "class_prior")}
        assert tensors == {"head.linear.weight", "head.linear.bias", *statistics}


def test_head_only_has_no_adapters_and_averages_in_every_round() -> None:
    method = get_method("head-only")
    assert not method.has_adapters and method.averages_factors
    assert get_method("flat-lora:head-only").has_adapters is False
    assert all(get_method(other).has_adapters for other in ("dp-lora", "flora", "flat-lora:dp-lora"))
    names = ("head.linear.weight", "head.linear.bias", "head.weight", "head.feature_mean", "head.class_prior")
    assert [method.trains(name, 3) for name in names] == [True, True, True, False, False]


@pytest.mark.slow
def test_the_head_is_trained_on_what_the_front_gives_once() -> None:
    """The backbone is never run in training, and the whole model is what is evaluated, saved and exchanged."""
    federation = Federation.from_config(tiny(method="head-only", features="own"))
    assert isinstance(federation.model, HeadAlone) and federation.workspace.names == ["head.weight", "head.bias"]
    assert federation.workspace.layers.shapes == {} and federation.workspace.layers.r == 0
    whole = federation.workspace.whole
    backbone = {name: tensor.clone() for name, tensor in whole.state_dict().items() if not name.startswith("head")}
    before = {name: tensor.clone() for name, tensor in federation.server.state.items()}
    assert all(isinstance(part, KeptActivations) for part in (federation.validation, federation.engine.parts[0]))
    result = federation.run_round([0, 1])
    assert result.bytes_up == 2 * 4 * (64 * 10 + 10)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in federation.server.state.items())
    passes: list[int] = []
    whole.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    federation.run_round([0, 1])
    assert passes == []
    state = whole.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in backbone.items())


@pytest.mark.slow
def test_a_round_is_that_of_the_whole_model(monkeypatch) -> None:
    """Where the head is trained behind the backbone instead, the same examples give the same head, up to rounding."""
    states = []
    for apart in (True, False):
        if not apart:
            monkeypatch.setattr("lora_dp.fed.rounds.setup.head_is_last", lambda *_: False)
        federation = Federation.from_config(tiny(method="head-only", reproducible=True))
        assert isinstance(federation.model, HeadAlone) == apart
        federation.run_round([0, 1])
        states.append(federation.server.state)
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_decoders_head_is_trained_behind_the_whole_model(tmp_path) -> None:
    """Its scores are of all tokens, so that it cannot be run by itself."""
    words = ["a b", "b b a", "a", "b a a b"] * 10
    (tmp_path / "model").mkdir()
    data = write(tmp_path / "data", train={"text": words, "label": [0, 1] * 20})
    options = {"model": small_decoder(tmp_path / "model"), "dataset": data, "features": "unit"}
    federation = Federation.from_config(tiny(method="head-only", local_steps=1, **options))
    assert not isinstance(federation.model, HeadAlone) and not isinstance(federation.validation, KeptActivations)
    before = {name: tensor.clone() for name, tensor in federation.server.state.items()}
    federation.run_round([0, 1])
    trained = {name for name, tensor in federation.server.state.items() if not torch.equal(tensor, before[name])}
    assert trained == {"score.linear.weight", "score.linear.bias"}
