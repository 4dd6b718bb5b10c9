"""Audits of whole clients find updates that are not clipped."""

import pytest

from lora_dp.fed import cli
from tests.fed.auditing.small_runs import CLIENTS, FEW, SURE


@pytest.mark.slow
def test_without_clipping_of_updates_clients_are_violated(configuration, monkeypatch):
    from lora_dp.fed.rounds import client

    monkeypatch.setattr(client, "clipped", lambda change, bound: {n: t.double() for n, t in change.items()})
    assert cli.main(["audit", configuration({**CLIENTS, "noise_by": "client"}), *SURE, *FEW]) == 1
