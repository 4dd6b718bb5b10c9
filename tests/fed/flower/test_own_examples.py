"""A deployed node's own data: what is odd in one row is no bit, from the file to the answer."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("flwr")

import lora_dp.fed.flower.without_telemetry  # noqa: F401

# isort: split
from flwr.app import RecordDict

from lora_dp.fed.flower import client as flower_client
from lora_dp.fed.flower import messages
from lora_dp.fed.flower.ledger import Refused
from lora_dp.fed.rounds.messages import Update
from tests.fed.flower.asking_servers import answer, asking_model, private_node, sent, texts
from tests.fed.flower.node_data import GOOD

COLUMNS = (None,) * len(flower_client._COLUMNS)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return asking_model(tmp_path_factory.mktemp("words") / "model")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    flower_client._opened.cache_clear()


def opened(text: str, folder: Path, classes: str | None) -> Any:
    flower_client._opened.cache_clear()
    return flower_client._opened(text, str(folder), COLUMNS, flower_client._classes(classes))


@pytest.mark.slow
@pytest.mark.parametrize("classes", [None, "0,1"])
@pytest.mark.parametrize(
    "odd", [b"patient 39 has hiv,", b"patient 39 has hiv", b",1", b"patient,39,has hiv,1", b"\xff,1", b"x,positive"]
)
def test_an_odd_row_of_a_nodes_own_data_is_no_bit(odd, classes, words, tmp_path, caplog):
    """It counts, contributes nothing, and leaves the others what they are."""
    options = {"model": str(words), "batch_size": 41}
    text = yaml.safe_dump({**GOOD, **options})
    own = texts(tmp_path / "own", "patient 39 is well")
    without = opened(text, own, classes).examples(0)
    rows = (own / "train.csv").read_bytes().splitlines()
    (own / "train.csv").write_bytes(b"\n".join([*rows[:7], odd, *rows[7:]]) + b"\n")
    node = private_node(tmp_path, own, str(words))
    if classes is not None:
        node["classes"] = classes
    flower_client._opened.cache_clear()
    with caplog.at_level(logging.ERROR):
        said = messages.unpack_introduction(
            flower_client._answered(
                flower_client._introduce, RecordDict({messages.CONFIG: messages.pack_config(text)}), node
            )
        )
        assert isinstance(said, messages.Introduction) and said.examples == 41
        found = opened(text, own, classes)
        examples = found.examples(0)
        assert len(examples) == 41
        for row in range(41):
            if row == 6:
                with pytest.raises(ValueError, match="could not be encoded"):
                    examples.batch([row])
                continue
            one, other = examples.batch([row]), without.batch([row - (row > 6)])
            assert all(torch.equal(one[name], other[name]) for name in one)
        assert isinstance(answer(sent(options, found.trainer.workspace.state()), node), Update)
    assert "1 of 41 examples cannot be read" in caplog.text


def test_a_class_that_one_row_has_changes_nothing_where_the_owner_names_them(words, tmp_path):
    own = texts(tmp_path / "own", "patient 39 is well")
    with open(own / "train.csv", "a") as file:
        file.write("x,2\n")
    text = yaml.safe_dump({**GOOD, "model": str(words)})
    node = opened(text, own, "0, 1")
    assert node.examples(0).labels.tolist() == [i % 2 for i in range(39)] + [1, -1]
    assert flower_client._classes(None) is None
    for wrong in ("", "a", "a,,b", "a,a", 3):
        with pytest.raises(Refused, match="must list each once"):
            flower_client._classes(wrong)


@pytest.mark.parametrize("unit", ["client", "example"])
def test_a_node_takes_part_however_few_examples_it_has(unit, words, tmp_path):
    """With whole clients protected their number is a secret, so that nothing may hang on it."""
    text = yaml.safe_dump(
        {**GOOD, "model": str(words), "unit": unit, **({"noise_by": "client"} if unit == "client" else {})}
    )
    own = texts(tmp_path / "own", "patient 39 is well")
    rows = (own / "train.csv").read_bytes().splitlines()
    for count in (1, 9, 10):
        (own / "train.csv").write_bytes(b"\n".join(rows[: count + 1]) + b"\n")
        assert len(opened(text, own, "0,1").examples(0)) == count
    (own / "train.csv").write_bytes(rows[0] + b"\n")
    with pytest.raises(Refused, match="cannot open its own data: its log says why"):
        opened(text, own, "0,1")


def test_where_a_node_computes_is_its_own_choice(words, tmp_path):
    text = yaml.safe_dump({**GOOD, "model": str(words), "device": "meta"})
    node = opened(text, texts(tmp_path / "own", "patient 39 is well"), "0,1")
    assert {p.device.type for p in node.trainer.workspace.model.parameters()} <= {"cpu", "cuda"}
