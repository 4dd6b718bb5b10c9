"""Where a node's ledger lies: one place, whatever folder the node is started from and by whatever links it is named."""

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

import lora_dp.fed.flower.without_telemetry  # noqa: F401

# isort: split
from flwr.app import RecordDict

from lora_dp.atomic_files import write_atomically
from lora_dp.fed.config import RunConfig
from lora_dp.fed.flower import client as flower_client
from lora_dp.fed.flower import messages
from lora_dp.fed.flower.ledger import ClientLedger, Refused
from lora_dp.fed.flower.policy import Policy
from lora_dp.fed.methods import get_method
from lora_dp.fed.rounds.messages import Task
from lora_dp.privacy.accounting import Ledger, PoissonGaussian
from tests.fed.small import TRAINING, plan_for

PLAN, EVENT = plan_for(get_method("dp-lora"), TRAINING), PoissonGaussian(1.5, 0.25)


def spend(named: Path, **budget: float) -> None:
    """One turn of a node that names its ledger so."""
    ledger = ClientLedger.of_node({"ledger": str(named), **budget})
    assert ledger is not None
    ledger.spend(PLAN, EVENT, reproducible=False)


def turns(path: Path) -> int:
    return Ledger.load(path).steps // PLAN.releases_per_turn


def refused(node: dict[str, Any]) -> set[str]:
    """What a node says of its settings, to a server that asks who it is and to one that asks for a turn."""
    config = messages.pack_config(RunConfig.from_flat({"clients": 2, "engine": "deployed"}).to_yaml())
    asked, task = RecordDict({messages.CONFIG: config}), Task(0, 0, 4, {})
    introduced = messages.unpack_introduction(flower_client._answered(flower_client._introduce, asked, node))
    content = messages.pack_task(config, task, messages.pack_tensors({}))
    answered = messages.unpack_answer(flower_client._answered(flower_client._train, content, node))
    assert isinstance(introduced, str) and isinstance(answered, str)
    return {introduced, answered}


@pytest.mark.parametrize("name", ["ledger", "policy", "data"])
@pytest.mark.parametrize("path", ["own", "./own", "../own", "~/own", ""])
def test_a_relative_path_is_refused_whatever_lies_there(tmp_path, monkeypatch, name, path):
    """It would be another one in another folder: a ledger there would begin a second budget."""
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    node = {"partition-id": 0, "ledger": str(tmp_path / "ledger.json"), name: path}
    assert refused(node) == {
        f"cannot tell which {name} is meant: its node-config must name it by an absolute path, since a relative one is "
        "another in each folder that the node is started from"
    }
    assert not list(tmp_path.rglob("*.json*"))


def test_policies_are_not_read_by_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy.yaml").write_text("epsilon: 1.0\n")
    with pytest.raises(Refused, match="cannot tell which policy is meant"):
        Policy.of_node({"policy": "policy.yaml"}, budget=False)
    assert not Policy.of_node({"policy": str(tmp_path / "policy.yaml")}, budget=False).rules["epsilon"].admits(8.0)


def test_a_ledger_at_the_end_of_a_link_stays_there(tmp_path):
    """Not there yet, as on a volume that was just made; the container with the link is then made anew, twice."""
    image, volume = tmp_path / "image", tmp_path / "volume"
    volume.mkdir()
    for done in (1, 2, 3):
        shutil.rmtree(image, ignore_errors=True)
        image.mkdir()
        (image / "ledger.json").symlink_to(volume / "ledger.json")
        spend(image / "ledger.json")
        assert [path.name for path in image.iterdir()] == ["ledger.json"] and (image / "ledger.json").is_symlink()
        names = {path.name for path in volume.iterdir()}
        assert names == {"ledger.json", "ledger.json.heads", "ledger.json.lock"}
        assert turns(volume / "ledger.json") == done


def test_all_names_of_a_ledger_are_one_ledger(tmp_path):
    """A link, a link to that, a link to its folder, and a way round: one budget."""
    (tmp_path / "own").mkdir()
    path = tmp_path / "own" / "ledger.json"
    (tmp_path / "other.json").symlink_to(path)
    (tmp_path / "third.json").symlink_to("other.json")
    (tmp_path / "folder").symlink_to(tmp_path / "own")
    names = [
        path,
        tmp_path / "other.json",
        tmp_path / "third.json",
        tmp_path / "folder" / "ledger.json",
        tmp_path / "own" / ".." / "own" / "ledger.json",
    ]
    once = Ledger()
    once.append(EVENT, len(names) * PLAN.releases_per_turn)
    budget = {"epsilon": once.epsilon(1e-5, "rdp"), "delta": 1e-5}
    for done, name in enumerate(names, 1):
        spend(name, **budget)
        assert turns(path) == done
    for name in names:
        with pytest.raises(Refused, match="no budget left"):
            spend(name, **budget)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "other.json", "own", "third.json"]


def test_links_in_a_circle_are_refused(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    try:
        spend(tmp_path / "a")
    except (Refused, OSError):
        pass
    else:
        pytest.fail("a turn was counted nowhere")


def test_a_file_that_is_replaced_stays_at_the_end_of_its_link(tmp_path):
    """As a ledger that a training loop saves: the link is not the file."""
    (tmp_path / "volume").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "volume" / "ledger.json")
    for text in ("one", "two"):
        write_atomically(tmp_path / "link.json", text)
        assert (tmp_path / "link.json").is_symlink() and (tmp_path / "volume" / "ledger.json").read_text() == text
    assert [path.name for path in (tmp_path / "volume").iterdir()] == ["ledger.json"]
