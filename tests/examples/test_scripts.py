"""The scripts in examples/ do what they say, each in a process and a folder of its own, without a network."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import RobertaConfig, RobertaForSequenceClassification

from lora_dp import load_adapter

EXAMPLES = Path(__file__).parents[2] / "examples"
NUMBER = r"([\d.]+)"


def printed(script: str, folder: Path) -> str:
    """What a script prints, as a user runs it; any attempt to ask a model hub is an error."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / script],
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
