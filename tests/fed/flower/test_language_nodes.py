"""Language models on Flower: the same run as in one process, and nodes with texts of their own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("flwr")

from lora_dp.fed.config import RunConfig
from lora_dp.fed.flower import client as flower_client
from lora_dp.fed.flower.ledger import Refused
from lora_dp.fed.flower.server import connected
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.messages import Update
from tests.fed.flower.asking_servers import answer, policy, private_node, sent
from tests.fed.flower.loopback import LoopbackGrid
from tests.fed.flower.small_deployments import nodes, tiny
from tests.fed.tiny_language import language_model, pairs, pairs_folder

COLUMNS = (None,) * len(flower_client._COLUMNS)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    flower_client._opened.cache_clear()


def configured(folder: Path, **options: Any) -> RunConfig:
    return tiny(model=language_model(folder / "model"), dataset=pairs_folder(folder / "data"), r=2, **options)


@pytest.mark.parametrize("adapt_last", [None, 1])
def test_nodes_end_in_the_same_state_as_one_process(tmp_path: Path, adapt_last: int | None) -> None:
    config = configured(tmp_path, adapt_last=adapt_last)
    on_flower = connected(config, LoopbackGrid(nodes()))
    here = Federation.from_config(configured(tmp_path, adapt_last=adapt_last))
    for federation in (on_flower, here):
        for _ in range(2):
            federation.run_round()
    for name, tensor in here.server.state.items():
        assert torch.equal(tensor, on_flower.server.state[name]), name


def own_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def opened(text: str, folder: Path, columns: tuple[str | None, ...] = COLUMNS) -> Any:
    flower_client._opened.cache_clear()
    return flower_client._opened(text, str(folder), columns)


def text_of(config: RunConfig) -> str:
    options = yaml.safe_load(config.to_yaml())
    return yaml.safe_dump({**options, "task": "causal-lm", "reproducible": False, "engine": "deployed"})


@pytest.mark.parametrize(
    "odd",
    [
        {"prompt": "w1", "completion": None},
        {"prompt": 3, "completion": "w1"},
        {"prompt": "w1"},
        {"prompt": "w1", "completion": ["w1"]},
        {"other": "w1"},
    ],
)
def test_an_odd_row_of_a_nodes_own_texts_is_no_bit(tmp_path: Path, odd: dict[str, Any]) -> None:
    """It counts, and leaves the others what they are. A number in a prompt is read as it is written."""
    text = text_of(configured(tmp_path))
    rows = pairs(20)
    rows = [{name: row[name] for name in ("prompt", "completion")} for row in rows]
    whole = opened(text, own_rows(tmp_path / "whole", rows)).examples(0)
    found = opened(text, own_rows(tmp_path / "odd", [*rows[:7], odd, *rows[7:]])).examples(0)
    assert len(found) == 21
    for row in [*range(7), *range(8, 21)]:
        one, other = found.batch([row]), whole.batch([row - (row > 7)])
        assert all(torch.equal(one[name], other[name]) for name in one)
    if odd != {"prompt": 3, "completion": "w1"}:
        with pytest.raises(ValueError, match="could not be encoded"):
            found.batch([7])


def test_a_node_takes_part_with_an_odd_row_under_its_policy(tmp_path: Path) -> None:
    config = configured(tmp_path)
    own = own_rows(tmp_path / "own", [*pairs(20), {"prompt": None, "completion": "w1"}])
    node = private_node(tmp_path, own, config.model.name)
    text = text_of(config)
    state = opened(text, own).trainer.workspace.state()
    assert isinstance(answer(sent(text, state, (0, 0, 2)), node), Update)
    assert "model is" in str(answer(sent(text, state, (0, 0, 2)), {**node, "policy": policy(tmp_path / "other", {})}))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"completion-column": "topic"}, ["", "t0"]),
        ({"prompt-column": "completion", "completion-column": "prompt"}, ["w11", "w0"]),
        ({"prompt-template": "{topic} {prompt} is ", "completion-column": "completion"}, ["t0 w0 is", "w11"]),
    ],
)
def test_a_node_says_itself_which_of_its_columns_are_read(tmp_path: Path, said, expected) -> None:
    text = text_of(configured(tmp_path))
    own = own_rows(tmp_path / "own", pairs(20))
    columns = tuple(said.get(name) for name in flower_client._COLUMNS)
    example = opened(text, own, columns).examples(0)
    prompt, completion = ([4 + int(word[1:]) if word[0] == "w" else 3 for word in part.split()] for part in expected)
    batch = example.batch([0])
    assert batch["input_ids"][0][: len(prompt)].tolist() == prompt
    assert batch["labels"][0][batch["labels"][0] >= 0].tolist() == [*completion, 2]


@pytest.mark.parametrize("options", [{"task": "causal-lm"}, {"task": "auto", "chat": True}])
def test_the_server_does_not_choose_what_a_nodes_data_are_for(tmp_path: Path, options: dict[str, Any]) -> None:
    """Texts with labels are classified, though there are questions and answers beside them."""
    rows = [{"text": "w1", "label": "ab"[i % 2], "question": "w2", "answer": "w3"} for i in range(20)]
    own = own_rows(tmp_path / "own", rows)
    config = tiny(model=language_model(tmp_path / "model", chat=True), dataset=pairs_folder(tmp_path / "data"), r=2)
    text = yaml.safe_dump({**yaml.safe_load(text_of(config)), **options})
    with pytest.raises((Refused, ValueError), match="has data for classification, but|default model|takes"):
        opened(text, own)
    named = tuple({"completion-column": "answer"}.get(name) for name in flower_client._COLUMNS)
    assert opened(text, own, named).job.train.batch([0])["labels"].dim() == 2


def test_a_chat_template_is_the_servers_choice(tmp_path: Path) -> None:
    config = tiny(model=language_model(tmp_path / "model", chat=True), dataset=pairs_folder(tmp_path / "data"), r=2)
    own = own_rows(tmp_path / "own", [{name: row[name] for name in ("prompt", "completion")} for row in pairs(20)])
    text = yaml.safe_dump({**yaml.safe_load(text_of(config)), "chat": True})
    assert opened(text, own).examples(0).batch([0])["input_ids"][0][:2].tolist() == [1, 3]  # <s> user


def test_what_the_server_says_of_columns_is_not_read_there(tmp_path: Path) -> None:
    rows = pairs(20)
    own = own_rows(tmp_path / "own", [{name: row[name] for name in ("prompt", "completion")} for row in rows])
    text = yaml.safe_dump({**yaml.safe_load(text_of(configured(tmp_path))), "prompt_column": "another"})
    assert opened(text, own).examples(0).batch([0])["labels"].shape[0] == 1
