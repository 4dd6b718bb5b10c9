"""The hub where it cannot be reached: one sentence at once, no retries to watch, and the cache is used."""

import logging
import socket

import datasets
import pytest
from huggingface_hub import constants

from lora_dp.fed import hub
from lora_dp.fed.data.opening import open_data
from lora_dp.fed.data.options import DataConfig
from lora_dp.fed.models.loading import load_model
from lora_dp.fed.models.options import ModelConfig


@pytest.fixture(autouse=True)
def asked_anew():
    hub.reachable.cache_clear()
    yield
    hub.reachable.cache_clear()


@pytest.fixture
def cut_off(monkeypatch):
    """A machine without network; counts how often somebody tries."""
    tries = []

    def refuse(address, *args, **kwargs):
        tries.append(address)
        raise OSError("no route to host")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    return tries


def test_a_data_set_that_cannot_be_reached_is_told_at_once(cut_off, caplog):
    said = "huggingface.co cannot be reached and nobody/nothing is not in the cache: check the network"
    for _ in range(2):
        with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match=said):
            open_data(DataConfig(dataset="nobody/nothing"))
    assert len(cut_off) == 1 and caplog.records == []


@pytest.mark.parametrize(("name", "kind"), [("nobody/nothing", "text"), ("vit_tiny_patch16_224", "image")])
def test_a_model_that_cannot_be_reached_is_told_at_once(name, kind, cut_off, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match=f"could not load {name}.* cannot be reach"):
        load_model(ModelConfig(name=name), 2, kind)
    assert len(cut_off) == 1 and caplog.records == []


def test_libraries_are_offline_inside_alone(cut_off):
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    with hub.hub("nobody/nothing"):
        assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    assert before == (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    with pytest.raises(KeyError), hub.hub("nobody/nothing"):
        raise KeyError
    assert before == (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)


def test_a_hub_that_answers_is_used(monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.reachable() and hub.host() == "127.0.0.1"
    with hub.hub("nobody/nothing"):
        assert not constants.HF_HUB_OFFLINE


def test_behind_a_proxy_it_is_taken_for_granted(cut_off, monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy:3128"})
    assert hub.reachable() and cut_off == []


def test_nothing_is_asked_of_the_network_for_what_is_here(cut_off, tmp_path):
    with hub.hub(str(tmp_path)):
        assert not constants.HF_HUB_OFFLINE
    load_model(ModelConfig(name="vit_tiny_patch16_224", pretrained=False), 2, "image")
    assert cut_off == []
