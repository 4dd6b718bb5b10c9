"""Runs of causal language models: methods, units, results, and what is asked of them afterwards."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from rich.console import Console

from lora_dp.fed import launch
from lora_dp.fed.auditing.command import audit_config
from lora_dp.fed.auditing.options import AuditConfig
from lora_dp.fed.config import RunConfig
from lora_dp.fed.diagnostics.inspect import inspect_run
from lora_dp.fed.methods import METHODS
from lora_dp.fed.page import write_page
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.setup import open_job
from tests.fed.tiny_language import language_model, pairs_csv, pairs_folder

QUIET = Console(quiet=True)
NEEDS: dict[str, dict[str, Any]] = {
    "flora": {"ranks": [1, 2]},
    "flexlora": {"ranks": [2, 1]},
    "fedask": {"ranks": [2, 2]},
    "deer": {"rounds": 2},
    "flat-lora": {},
}


def configured(folder: Path, family: str = "llama", **options: Any) -> RunConfig:
    small = {
        "model": language_model(folder / "model", family),
        "dataset": pairs_folder(folder / "data"),
        "clients": 2,
        "rounds": 1,
        "local_steps": 1,
        "batch_size": 8,
        "accountant": "rdp",
        "device": "cpu",
        "generate": 3,
        "output": folder / "run",
    }
    if "ranks" not in options:
        small["r"] = 2
    return RunConfig.from_flat({**small, **options})


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("flat-lora", "head-only")])
def test_every_method_trains_a_language_model(tmp_path: Path, method: str) -> None:
    outcome = launch.run(configured(tmp_path, method=method, task="causal-lm", **NEEDS.get(method, {})), QUIET)
    summary = outcome.summary
    assert summary["status"] == "finished" and 0 < summary["worst_epsilon"] <= 8
    assert summary["perplexity_after"] > 1 and summary["balanced_accuracy_after"] is None
    assert 0 <= summary["accuracy_after"] <= 1 and summary["text_quality_after"].keys() == {"bleu", "rouge_l"}


@pytest.mark.parametrize("noise_by", ["client", "server"])
def test_whole_clients_are_protected(tmp_path: Path, noise_by: str) -> None:
    outcome = launch.run(configured(tmp_path, unit="client", noise_by=noise_by, lr=0.1), QUIET)
    assert outcome.summary["privacy_unit"].startswith("one client") and outcome.summary["worst_epsilon"] <= 8


@pytest.mark.parametrize("adapt_last", [None, 1])
def test_without_privacy_it_learns_what_follows(tmp_path: Path, adapt_last: int | None) -> None:
    """Completions follow from the prompt's first word; the first word is the same in a seventh of all pairs."""
    config = configured(
        tmp_path,
        dataset=pairs_folder(tmp_path / "more", 80, 20),
        epsilon="none",
        rounds=3,
        local_steps=20,
        batch_size=20,
        optimizer="adamw",
        lr=0.03,
        r=8,
        adapt_last=adapt_last,
        evaluate_every=3,
        generate=0,
    )
    summary = launch.run(config, QUIET).summary
    assert summary["perplexity_after"] < 0.35 * summary["perplexity_before"]
    assert "text_quality_after" not in summary and not (tmp_path / "run" / "samples.json").exists()


def test_a_run_of_the_last_blocks_is_the_same_run(tmp_path: Path) -> None:
    """The frozen blocks are computed once; the same layers by name, without that, end in the same state."""
    options = {"epsilon": "none", "reproducible": True, "rounds": 2, "local_steps": 2, "generate": 0}
    kept = configured(tmp_path, adapt_last=1, **options)
    named = configured(tmp_path, target_modules=r".*layers\.1\..*proj", **options)
    states = []
    for config in (kept, named):
        federation = Federation.from_config(config)
        for _ in range(2):
            federation.run_round()
        states.append(federation.server.state)
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    return launch.run(configured(folder, rounds=2, method="ffa-lora"), QUIET).folder


def test_the_configuration_says_what_was_found(finished: Path) -> None:
    config = RunConfig.from_flat({**_yaml(finished / "config.yaml")})
    assert config.data.task == "causal-lm" and config.model.features == "own"
    assert "classes" not in json.loads((finished / "summary.json").read_text())["public"]


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def test_samples_are_those_of_the_models_before_and_after(finished: Path) -> None:
    found = json.loads((finished / "samples.json").read_text())
    assert len(found["texts"]) == 3 and found["before"].keys() == found["after"].keys() == {"bleu", "rouge_l"}
    config = RunConfig.from_flat(_yaml(finished / "config.yaml"))
    assert isinstance(config.model.name, str)
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model.name)
    base = transformers.AutoModelForCausalLM.from_pretrained(config.model.name).eval()
    tuned = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(config.model.name), finished / "adapter"
    ).eval()
    for each in found["texts"]:
        ids = tokenizer(each["prompt"] + "\n", return_tensors="pt").input_ids
        for name, model in (("before", base), ("after", tuned)):
            most = max(len(text.split()) for text in ["a b c d"]) + 1
            whole = model.generate(input_ids=ids, max_new_tokens=most, do_sample=False)
            assert each[name] == tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_the_page_shows_perplexity_and_samples(finished: Path) -> None:
    page = write_page(finished).read_text()
    assert "Perplexity" in page and "What the model writes" in page and "BLEU" in page and "Token accuracy" in page
    for each in json.loads((finished / "samples.json").read_text())["texts"]:
        assert each["prompt"] in page


def test_a_finished_run_is_inspected(finished: Path) -> None:
    inspect_run(finished, QUIET)
    report = json.loads((finished / "inspect.json").read_text())
    assert report["sharpness"]["top_eigenvalue"] is not None and report["intruder_dimensions"]["layers"]


@pytest.mark.parametrize("canaries", ["planted", "examples"])
@pytest.mark.parametrize("adapt_last", [None, 1])
def test_a_run_is_audited(tmp_path: Path, canaries: str, adapt_last: int | None) -> None:
    config = configured(tmp_path, rounds=1, generate=0, adapt_last=adapt_last)
    path = tmp_path / "audited.yaml"
    path.write_text(config.to_yaml())
    count = {"planted": 20, "examples": 6}[canaries]
    options = AuditConfig(target=path, canaries=canaries, count=count, output=tmp_path / "audit")  # type: ignore[arg-type]
    result = audit_config(options, QUIET)
    assert 7.9 < result.claimed_epsilon <= 8 and not result.violated


@pytest.mark.parametrize(("generate", "kept"), [(3, True), (2, True), (5, False)])
def test_an_interrupted_run_goes_on_with_its_first_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generate: int, kept: bool
) -> None:
    """Where more prompts are asked for than before, there is no text from before of all of them."""
    config, real = configured(tmp_path, rounds=2), Federation.run_round

    def once(self: Federation, *args: Any, **named: Any) -> Any:
        if self.rounds_done:
            raise KeyboardInterrupt
        return real(self, *args, **named)

    monkeypatch.setattr(Federation, "run_round", once)
    outcome = launch.run(config, QUIET)
    assert outcome.interrupted
    before = [each["before"] for each in json.loads((outcome.folder / "samples.json").read_text())["texts"]]
    monkeypatch.setattr(Federation, "run_round", real)
    text = (outcome.folder / "config.yaml").read_text()
    (outcome.folder / "config.yaml").write_text(text.replace("generate: 3", f"generate: {generate}"))
    assert launch.resume(outcome.folder, QUIET).summary["status"] == "finished"
    found = json.loads((outcome.folder / "samples.json").read_text())
    expected = before[:generate] if kept else [None] * generate
    assert [each["before"] for each in found["texts"]] == expected
    assert (found["before"] is not None) == kept and found["after"] and len(found["texts"]) == generate


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "head-only", "task": "causal-lm"}, "head-only trains a head that classifies"),
        ({"method": "quiet-lora"}, "features is for classification.*quiet-lora's recipe sets it, name task causal-lm"),
        ({"features": "mean"}, "features is for classification: leave it out.$"),
        ({"class_texts": "names"}, "class_texts is for classification"),
        ({"sums_share": 0.1, "features": "own"}, "sums_share is for classification"),
        ({"partition": "dirichlet"}, "partition dirichlet shares out classes, of which these data have none"),
    ],
)
def test_options_of_classification_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        open_job(configured(tmp_path, **options))


def test_validation_texts_that_leave_nothing_to_learn_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no token of any completion of the validation data lies within max_length 1"):
        open_job(configured(tmp_path, max_length=1))


def test_classes_share_out_texts(tmp_path: Path) -> None:
    config = configured(
        tmp_path, dataset=pairs_csv(tmp_path / "pairs.csv", 60), label_column="topic", partition="dirichlet",
        dirichlet_alpha=0.3, task="causal-lm",
    )  # fmt: skip
    job = open_job(config)
    shares = [job.train.labels[torch.from_numpy(part)].bincount(minlength=3) / len(part) for part in job.parts]
    assert (shares[0] - shares[1]).abs().max() > 0.2
    assert job.examples(0).batch([0])["labels"].dim() == 2


def test_an_encoder_learns_no_texts_and_a_language_model_no_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the default model takes images, and is no language model"):
        open_job(configured(tmp_path, model="default"))
    with pytest.raises(ValueError, match="digits are images, which no language model learns"):
        configured(tmp_path, dataset="digits", task="causal-lm")
