"""Who is audited: the client with the largest claim."""

import pytest

from lora_dp.fed.auditing.game import largest_ledger
from lora_dp.fed.rounds.federation import Federation
from tests.fed.auditing.small_runs import SMALL, opened


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"features": "unit", "sums_share": 0.5}], ids=["rounds", "sums"])
def test_the_client_with_the_largest_claim_is_audited(more):
    game = opened({**SMALL, "clients": 5, "clients_per_round": 2, "seed": 1, **more})
    federation = Federation.of_job(game.config, game.job)
    if more:
        federation.account.add_sums(range(5))
    for index in range(2):
        federation.rounds_done = index
        federation.account.add_round(federation.draw())
    epsilons = [federation.account.epsilon(client) for client in range(5)]
    client, ledger = largest_ledger(federation.account, range(5))
    assert game.client == client
    assert epsilons[client] == max(epsilons) == ledger.epsilon(1e-5, "rdp") > min(epsilons)
