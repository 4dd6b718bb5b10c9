"""A federation in Python: five clients fine-tune adapters on digits of their own, each at ε = 8 by itself.

    python examples/federation.py

Takes about half a minute, and downloads nothing. The run's folder, under runs/, holds the adapter and every ledger.
`lora-dp --rounds 5 --partition dirichlet` does the same; its options are those given here.
"""

import json

from lora_dp.fed import RunConfig, run

config = RunConfig.from_flat(
    {
        "method": "la-lora",
        "clients": 5,
        "rounds": 5,
        "local_steps": 10,
        "partition": "dirichlet",  # clients differ in which digits they have
        "epsilon": 8.0,  # of every client, towards the server and all others
        "delta": 1e-5,
    }
)
outcome = run(config)  # prints as it goes

first, last = outcome.rounds[0], outcome.rounds[-1]
print(f"accuracy {first.accuracy:.3f} before, {last.accuracy:.3f} after {last.round} rounds")
for client in json.loads((outcome.folder / "ledger.json").read_text())["clients"]:
    print("client {client}: {examples} examples, {steps} private steps, ε = {epsilon:.2f}".format(**client))
