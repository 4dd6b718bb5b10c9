"""Options of small runs and of their audits."""

from lora_dp.fed.auditing import command
from lora_dp.fed.auditing.game import Game, most_exposed
from lora_dp.fed.auditing.options import AuditConfig
from lora_dp.fed.config import RunConfig
from lora_dp.fed.rounds.setup import open_job

SMALL = {"clients": 2, "rounds": 2, "local_steps": 2, "accountant": "rdp", "method": "dp-lora", "epsilon": 2.0}
CLIENTS = {**SMALL, "unit": "client", "delta": 0.01}
# Most of the budget is the sums', so that an audit can tell what is wrong with them.
SUMS = {"features": "unit", "sums_share": 0.98, "rounds": 1, "local_steps": 1, "epsilon": 8.0}
FEW = ["--count", "160"]
# Of 1000 sound audits, one is called violated.
SURE = ["--confidence", "0.999"]


def opened(options):
    config = RunConfig.from_flat(options)
    job = open_job(config)
    return Game(config, job, most_exposed(config, job))


def audited(options, seed=0):
    """The result of an audit that plants 700 gradients or 200 clients."""
    count = 200 if "unit" in options else 700
    return command._play(opened(options), AuditConfig("run.yaml", seed=seed), count)
