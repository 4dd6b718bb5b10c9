"""Who is audited: the client with the largest claim."""

import pytest

from lora_dp.fed.auditing.game import largest_ledger
from lora_dp.fed.rounds.federation import Federation
from tests.fed.auditing.small_runs import SMALL, opened


@pytest.mark.slow
def test_the_client_with_the_largest_claim_is_audited():
    game = opened({**SMALL, "clients": 5, "clients_per_round": 2, "seed": 1})
    federation = Federation.of_job(game.config, game.job)
    for index in range(2):
        federation.rounds_done = index
        federation.account.add_round(federation.draw())
    epsilons = [federation.account.epsilon(client) for client in range(5)]
    client, ledger = largest_ledger(federation.account, range(5))
    assert game.client == client
    assert epsilons[client] == max(epsilons) == ledger.epsilon(1e-5, "rdp") > min(epsilons)
