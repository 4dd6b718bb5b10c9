"""A node's side of a run on Flower: what it trains on, and what it tells of itself."""

import logging
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("flwr")

import lora_dp.fed.flower.without_telemetry  # noqa: F401

# isort: split
from flwr.app import RecordDict

from lora_dp.fed.flower import client as flower_client
from lora_dp.fed.flower import messages
from lora_dp.fed.flower.server import FlowerEngine, connected
from lora_dp.fed.rounds.setup import open_job
from tests.fed.flower.loopback import LoopbackGrid
from tests.fed.flower.node_data import own_folder
from tests.fed.flower.small_deployments import TASK, nodes, tiny


def test_a_client_that_fails_says_no_more_than_the_kind_of_its_failure(caplog):
    def broken(*_: Any) -> None:
        raise ValueError("patient Doe has a fever")

    grid = LoopbackGrid(nodes(1))
    engine = FlowerEngine(grid, tiny(clients=1))
    engine.wait_for_clients()
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(flower_client, "_opened", broken)
        [reply] = engine.train([(0, TASK)], lambda: None)
    assert (reply.failure, reply.detail) == ("raised ValueError", "")
    assert "patient Doe" in caplog.text  # on the client's side


@pytest.mark.slow
def test_a_node_with_a_folder_of_its_own_trains_on_all_of_it(tmp_path):
    config = tiny(clients=2, rounds=1, min_clients=2)
    own = {"partition-id": 1, "data": str(own_folder(tmp_path / "own")), "private": False}  # the run is reproducible
    federation = connected(config, LoopbackGrid([{"partition-id": 0}, own]))
    assert federation.account.sizes.tolist() == [len(open_job(config).parts[0]), 60]
    result = federation.run_round()
    assert result.participants == [0, 1] and not result.failed
    node = flower_client._node(RecordDict({messages.CONFIG: federation.engine._config}), own)
    assert node.trainer.plan == replace(federation.plan, examples=60)
    assert federation.account.event(1) == node.trainer.plan.event(60) != federation.account.event(0)


def introduced(node: dict[str, Any], **options: Any) -> Any:
    config = messages.pack_config(tiny(clients=2, reproducible=False, **options).to_yaml())
    return messages.unpack_introduction(
        flower_client._answered(flower_client._introduce, RecordDict({messages.CONFIG: config}), node)
    )


@pytest.mark.slow
def test_a_node_tells_the_size_of_its_own_data_and_no_more(tmp_path):
    """Held out by the server's fraction, or read from the server's column, sizes would tell how many are of a class."""
    folder = own_folder(tmp_path / "own")
    node = {"partition-id": 1, "data": str(folder), "ledger": str(tmp_path / "ledger.json")}
    asked = [{"validation_fraction": f} for f in (0.1, 0.3, 0.7)] + [{"split_seed": 5}]
    asked += [{"dataset": "somewhere/else", name: "secret"} for name in ("label_column", "validation_split", "subset")]
    assert {introduced(node, **options).examples for options in asked} == {60}
    assert introduced({**node, "label-column": "label"}).examples == 60
    assert introduced({**node, "label-column": "nothing"}) == "cannot open its own data: its log says why"


def test_a_size_that_is_secret_is_told_to_no_run(tmp_path):
    node = {"partition-id": 1, "data": str(own_folder(tmp_path / "own")), "ledger": str(tmp_path / "ledger.json")}
    whole = {"unit": "client", "noise_by": "client"}
    secret = {**node, "unit": "client"}
    assert introduced(secret, **whole).examples is None
    assert introduced(secret) == "keeps a ledger for the unit client, but the run protects the unit example"
    assert "sends nothing" in introduced(secret, epsilon="none")
    assert introduced(node).examples == 60 and isinstance(introduced(node, **whole), str)


def test_one_example_more_in_a_folder_leaves_the_others_where_they_are(tmp_path):
    folder = own_folder(tmp_path / "own")
    config = messages.pack_config(tiny(clients=2).to_yaml())
    content = RecordDict({messages.CONFIG: config})
    before = flower_client._node(content, {"data": str(folder)}).examples(0).batch(range(60))["pixel_values"]
    flower_client._opened.cache_clear()
    own_folder(folder, 61)
    after = flower_client._node(content, {"data": str(folder)}).examples(0).batch(range(61))["pixel_values"]
    rows = {row.numpy().tobytes() for row in before}
    assert sum(row.numpy().tobytes() not in rows for row in after) == 1 and len(rows) == 60
