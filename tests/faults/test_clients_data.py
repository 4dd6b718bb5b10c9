"""What clients train on: the partition's parts, and so no example at two of them."""

import pytest

from lora_dp.fed.config import RunConfig
from lora_dp.fed.rounds.setup import ClientExamples, open_job


@pytest.mark.parametrize("scheme", ["iid", "dirichlet"])
def test_clients_train_on_disjoint_examples(scheme):
    job = open_job(RunConfig.from_flat({"clients": 4, "partition": scheme, "device": "cpu"}))
    rows = [row for part in ClientExamples(job) for row in part._rows.tolist()]
    assert len(rows) == len(set(rows)) == len(job.train) == sum(job.sizes)
