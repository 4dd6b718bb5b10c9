"""Options of small runs and of their audits."""

from lora_dp.fed.auditing.game import Game, most_exposed
from lora_dp.fed.config import RunConfig
from lora_dp.fed.rounds.setup import open_job

SMALL = {"clients": 2, "rounds": 2, "local_steps": 2, "accountant": "rdp", "method": "dp-lora", "epsilon": 2.0}
CLIENTS = {**SMALL, "unit": "client", "delta": 0.01}
FEW = ["--count", "160"]
# Of 1000 sound audits, one is called violated.
SURE = ["--confidence", "0.999"]


def opened(options):
    config = RunConfig.from_flat(options)
    job = open_job(config)
    return Game(config, job, most_exposed(config, job))
