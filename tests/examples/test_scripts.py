"""The scripts in examples/ do what they say, each in a process and a folder of its own, without a network."""

import difflib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas
import peft
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lora_dp import load_adapter

EXAMPLES = Path(__file__).parents[2] / "examples"
NUMBER = r"([\d.]+)"


def printed(script: str, folder: Path, *words: str) -> str:
    """What a script prints, as a user runs it; any attempt to ask a model hub is an error."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *words],
        cwd=folder,
        # The tests beside this one have the other cores.
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_text_classifier(tmp_path: Path) -> None:
    epochs = re.findall(rf"epoch (\d): accuracy {NUMBER}, ε = {NUMBER}", printed("text_classifier.py", tmp_path))
    assert [int(epoch) for epoch, _, _ in epochs] == [1, 2, 3, 4]
    spent = [float(epsilon) for _, _, epsilon in epochs]
    assert spent == sorted(spent) and 7.9 < spent[-1] <= 8
    assert float(epochs[-1][1]) > 0.75  # two classes
    small = RobertaConfig(
        vocab_size=26,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=20,
    )
    load_adapter(RobertaForSequenceClassification(small), tmp_path / "adapter")


@pytest.mark.slow
def test_vision_model(tmp_path: Path) -> None:
    found = re.search(rf"accuracy {NUMBER}, ε = {NUMBER}", printed("vision_model.py", tmp_path))
    assert found
    assert float(found[1]) > 0.8  # ten classes
    assert 7.9 < float(found[2]) <= 8


@pytest.mark.slow
def test_federation(tmp_path: Path) -> None:
    text = printed("federation.py", tmp_path)
    clients = re.findall(rf"client (\d): (\d+) examples, (\d+) private steps, ε = {NUMBER}", text)
    assert [int(client) for client, *_ in clients] == [0, 1, 2, 3, 4]
    assert sum(int(examples) for _, examples, _, _ in clients) == 1438
    assert all(steps == "50" and 7.9 < float(epsilon) <= 8 for _, _, steps, epsilon in clients)
    accuracy = re.search(rf"accuracy {NUMBER} before, {NUMBER} after 5 rounds", text)
    assert accuracy and float(accuracy[2]) > float(accuracy[1])
    [folder] = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_audit_own_loop(tmp_path: Path) -> None:
    planned, less_noise = printed("audit_own_loop.py", tmp_path).splitlines()
    kept = re.match(rf"as planned: not violated: ε ≥ {NUMBER} at δ = 1e-05 .*; claimed: ε = {NUMBER}", planned)
    assert kept and float(kept[1]) <= float(kept[2])
    assert less_noise.startswith("a quarter of the noise: violated: ")


@pytest.mark.slow
def test_own_method(tmp_path: Path) -> None:
    rounds = re.findall(
        rf"round (\d) trained (\w+): accuracy {NUMBER}, ε = {NUMBER}", printed("own_method.py", tmp_path)
    )
    assert [phases for _, phases, _, _ in rounds] == ["B", "B", "AB", "AB"]
    assert float(rounds[-1][2]) > 0.8  # ten classes
    assert 7.9 < float(rounds[-1][3]) <= 8


@pytest.mark.parametrize("page", ["README.md", "docs/reference/methods.md"])
def test_a_page_prints_its_example_as_it_is(page: str) -> None:
    """From the imports on: the page says by itself what the example's docstring says."""
    root = EXAMPLES.parent
    marked = re.findall(
        r"<!-- example: (examples/\w+\.py) -->\n```python\n(?:# .*\.py\n)?(.*?)```",
        (root / page).read_text(),
        re.DOTALL,
    )
    assert marked
    for example, block in marked:
        docstring, code = re.split(r'(?<=""")\n\n', (root / example).read_text(), maxsplit=1)
        assert docstring.startswith('"""') and block == code


def test_the_list_of_examples_is_whole() -> None:
    listed = set(re.findall(r"^\| \[(?:[\w.]+/?)\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE))
    there = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb") or path.is_dir()}
    assert listed == there


# Scripts made private, beside what they were


def code_of(script: str) -> list[str]:
    """Its lines after the docstring."""
    return (EXAMPLES / script).read_text(encoding="utf-8").split('"""\n\n', 1)[1].splitlines()


@pytest.mark.parametrize(("page", "pairs"), [("from-opacus", 1), ("from-peft", 1), ("language-models", 2)])
def test_a_page_shows_what_changes_in_a_script(page: str, pairs: int) -> None:
    text = (EXAMPLES.parent / "docs" / "how-to" / f"{page}.md").read_text(encoding="utf-8")
    found = re.findall(r"<!-- changes: examples/(\w+\.py) examples/(\w+\.py) -->\n```diff\n(.*?)\n```", text, re.DOTALL)
    assert len(found) == pairs
    for before, after, shown in found:
        lines = difflib.unified_diff(code_of(before), code_of(after), lineterm="", n=0)
        assert [line for line in lines if not line.startswith(("---", "+++", "@@"))] == shown.splitlines()


def test_a_trl_script_changes_in_its_trainer_alone() -> None:
    before, after = code_of("trl_sft.py"), code_of("trl_sft_private.py")
    assert [line for line in after if line and line not in before and "import" not in line] == [
        "trainer = PrivateSFTTrainer(",
        "    privacy=PrivacyArguments(target_epsilon=8, target_delta=1e-5),",
    ]
    assert [line for line in before if line not in after and "import" not in line] == ["trainer = SFTTrainer("]


@pytest.mark.slow
@pytest.mark.parametrize("library", ["opacus", "peft", "accelerate"])
def test_a_script_and_what_became_of_it(library: str, tmp_path: Path) -> None:
    pytest.importorskip(library)
    original, ported = f"{library}_loop.py", f"{library}_loop_{'ported' if library == 'opacus' else 'private'}.py"
    before, after = printed(original, tmp_path), printed(ported, tmp_path)
    if library == "accelerate":
        # Choices of 2, 3, 2, 4 and 3 make 5 nats in 6.5 tokens: 0.76 is the least.
        assert all(float(re.search(rf"validation loss {NUMBER}", text)[1]) < 1.0 for text in (before, after))
        entries = json.loads((tmp_path / "privacy_ledger.json").read_text())["ledger"]["entries"]
        assert sum(entry["count"] for entry in entries) == 3 * 16
    else:
        assert min(float(re.search(rf"accuracy {NUMBER}", text)[1]) for text in (before, after)) > 0.7
    assert 7.9 < float(re.search(rf"ε = {NUMBER}", after)[1]) <= 8
    if library == "opacus":
        sigmas = [float(re.search(rf"σ = {NUMBER}", text)[1]) for text in (before, after)]
        assert abs(sigmas[0] - sigmas[1]) <= 0.01
    else:
        assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_the_trl_script_trains_resumes_and_is_opened_by_peft(tmp_path: Path) -> None:
    """A tiny model and made-up restaurants in place of what it downloads."""
    pytest.importorskip("trl")
    base = tiny_language_model(tmp_path / "model")
    rows = [
        {"meaning_representation": f"name[{name}], food[{food}]", "human_reference": f"{name} serves {food} food."}
        for name in ("Alimentum", "Aromi", "Cocum", "Zizzi")
        for food in ("Italian", "Indian", "French", "Chinese", "fast", "good", "cheap", "English")
    ]
    (tmp_path / "data").mkdir()
    for split, part in (("train", rows), ("validation", rows * 2)):
        pandas.DataFrame(part).to_parquet(tmp_path / "data" / f"{split}.parquet")
    words = ["--model", str(base), "--data", str(tmp_path / "data"), "--batch", "4", "--parts", "2", "--steps", "10"]
    first = printed("trl_sft_private.py", tmp_path, *words)
    assert re.search(rf"before: validation loss {NUMBER}", first)
    resumed = printed("trl_sft_private.py", tmp_path, *words, "--resume")
    assert re.search(rf"after: validation loss {NUMBER}", resumed)
    card = (tmp_path / "runs" / "e2e" / "README.md").read_text(encoding="utf-8")
    spent = float(re.search(rf"\*\*ε = {NUMBER} at δ = 1e-05\*\*", card)[1])
    assert 7.5 < spent <= 8
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "runs" / "e2e")
    assert model.generate(input_ids=torch.tensor([[1, 2]]), max_new_tokens=2).shape[1] > 2


def tiny_language_model(folder: Path) -> Path:
    """With a tokenizer of words, in a folder as of the hub."""
    said = "Describe the restaurant : name food [ ] , . serves good cheap fast Alimentum Aromi Cocum Zizzi Italian"
    words = ["<pad>", "</s>", *said.split(), "Indian", "French", "Chinese", "English"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
