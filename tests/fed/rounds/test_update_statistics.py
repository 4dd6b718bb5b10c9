"""The line of a round, and the noise in an update against what the engine really adds."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lora_dp.fed.config import RunConfig
from lora_dp.fed.methods import factor
from lora_dp.fed.rounds import update_statistics
from lora_dp.fed.rounds.messages import Task
from lora_dp.fed.rounds.privacy_plan import PrivacyPlan
from lora_dp.fed.rounds.setup import Job, open_job
from lora_dp.fed.rounds.update_statistics import UpdateRecorder, expected_noise_norm
from lora_dp.privacy.accounting import PoissonGaussian

START = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3.0]), "frozen": torch.zeros(4)}


def update(*change: float) -> dict[str, torch.Tensor]:
    return {"b": START["b"] + change[2], "a": START["a"] + torch.tensor([change[:2]])}


def test_norms_cosines_and_shares():
    recorder = UpdateRecorder(range(5, 9))
    changes = np.array([[3.0, 0.0, 4.0], [-6.0, 0.0, -8.0], [0.0, 2.0, 0.0], [1.0, 1.0, 0.0]])
    for client, (change, noise) in enumerate(zip(changes, (4.0, None, 2.0, 1.0), strict=True)):
        recorder.add(client + 5, update(*change), START, noise)
    summary = recorder.summary()
    lengths = np.linalg.norm(changes, axis=1)
    assert summary["clients"] == [5, 6, 7, 8] and summary["left_out"] == 0
    assert summary["norms"] == pytest.approx(lengths)
    np.testing.assert_allclose(summary["cosine"], changes @ changes.T / np.outer(lengths, lengths), atol=1e-7)
    assert summary["noise_share"] == pytest.approx([16 / 25, None, 1.0, 0.5])
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_what_cannot_be_compared_is_null():
    recorder = UpdateRecorder(range(4))
    recorder.add(0, update(1, 0, 0), START, 1.0)
    recorder.add(1, update(0, 0, 0), START, 1.0)
    other = {"a": torch.ones(3, 2), "b": START["b"]}
    recorder.add(2, other, {**START, "a": torch.zeros(3, 2)}, None)
    recorder.add(3, {"b": START["b"] * math.nan}, START, 1.0)
    summary = recorder.summary()
    assert summary["cosine"] == [[1.0, None, None, None], [None] * 4, [None, None, 1.0, None], [None] * 4]
    assert summary["norms"] == [1.0, 0.0, pytest.approx(math.sqrt(6)), None]
    assert summary["noise_share"] == [1.0, None, None, None]
    json.dumps(summary, allow_nan=False)


def test_differences_are_taken_in_float64():
    # 1e-3 beside 1e4 is lost in float32.
    start = {"a": torch.full((2,), 1e4, dtype=torch.float64)}
    recorder = UpdateRecorder([0])
    recorder.add(0, {"a": start["a"] + 1e-5}, start, None)
    assert recorder.summary()["norms"] == pytest.approx([1e-5 * math.sqrt(2)], rel=1e-6)


def test_no_more_updates_than_32_are_kept():
    recorder = UpdateRecorder(range(40))
    for client in reversed(range(40)):
        recorder.add(client, update(client, 1, 1), START, None)
    summary = recorder.summary()
    assert summary["clients"] == list(range(32)) and summary["left_out"] == 8
    assert len(summary["cosine"]) == 32 and all(len(row) == 32 for row in summary["cosine"])


def test_no_more_bytes_than_the_limit_are_kept(monkeypatch):
    monkeypatch.setattr(update_statistics, "MOST_BYTES", 2 * 12)
    recorder = UpdateRecorder(range(4))
    for client in (3, 1, 2, 0):
        recorder.add(client, update(1, 2, 3), START, None)
    assert recorder.summary()["clients"] == [0, 1] and recorder.summary()["left_out"] == 2
    assert sum(tensor.nbytes for tensor in recorder._changes) == 24


def test_nothing_was_added():
    assert UpdateRecorder([3]).summary() == {"clients": [], "norms": [], "cosine": [], "noise_share": [], "left_out": 0}


@pytest.mark.parametrize("wrong", [{}, {"c": torch.ones(1)}, {"a": torch.ones(2, 2)}])
def test_an_update_that_does_not_fit_is_refused(wrong):
    with pytest.raises(ValueError, match="client 7 does not fit"):
        UpdateRecorder([7]).add(7, wrong, START, None)


NOISE_MULTIPLIER = 1000.0
BASE = {
    "clients": 2,
    "rounds": 4,
    "local_steps": 5,
    "batch_size": 16,
    "accountant": "rdp",
    "device": "cpu",
    "lr": 1e-4,
    "reproducible": True,
}


def opened(monkeypatch: pytest.MonkeyPatch, **options) -> Job:
    """A run whose noise is so strong that gradients are a millionth of an update's energy."""
    event = PrivacyPlan.event
    monkeypatch.setattr(
        PrivacyPlan,
        "event",
        lambda plan, n: PoissonGaussian(NOISE_MULTIPLIER, event(replace(plan, epsilon=8.0), n).sample_rate),
    )
    return open_job(RunConfig.from_flat({**BASE, **options}))


def task_of(job: Job, round_index: int, turn: int = 0) -> Task:
    """Factors of common sizes, so that neither is zero."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in job.trainer.workspace.state().items()
    }
    return Task(round_index, turn, 4, state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "round_index", "turn"),
    [
        ({"method": "la-lora"}, 0, 0),  # B, A, B, A, B and a Gaussian filter
        ({"method": "la-lora", "low_pass_strength": 2.0}, 1, 0),  # A, B, A, B, A
        ({"method": "dp-lora", "low_pass": "laplacian", "low_pass_strength": 0.5}, 0, 0),
        ({"method": "ffa-lora", "clipping": "per_layer", "max_grad_norm": 0.3}, 0, 0),
        ({"method": "rolora", "lr_ratio": 3.0, "clipping": "flat"}, 1, 0),
        ({"method": "deer"}, 0, 0),
        ({"method": "deer"}, 0, 1),
        ({"method": "deer", "low_pass": "gaussian", "low_pass_strength": 1.0}, 0, 0),
        ({"method": "deer", "low_pass": "laplacian", "low_pass_strength": 1.0}, 0, 1),
        ({"method": "dp-lora", "batch_size": 4000}, 0, 0),  # more than a client has
        ({"method": "dp-lora", "unit": "client", "noise_by": "client", "max_update_norm": 0.2}, 0, 0),
        ({"method": "deer", "unit": "client", "noise_by": "client"}, 0, 1),
    ],
)
def test_the_noise_is_what_the_engine_adds(monkeypatch, options, round_index, turn):
    job = opened(monkeypatch, **options)
    task, examples = task_of(job, round_index, turn), job.examples(0)
    sent = job.trainer.train(0, examples, task).tensors
    for which in ("A", "B", None):
        part = [name for name in sent if factor(name) == which]
        if not part:
            continue
        # The other factor stays there: a regulator needs it.
        others = {name: t for name, t in task.state.items() if name in part or name not in sent}
        expected = expected_noise_norm(
            job.trainer, Task(task.round, task.turn, task.rank, others), len(examples), NOISE_MULTIPLIER
        )
        measured = math.sqrt(sum(float((sent[n].double() - task.state[n].double()).square().sum()) for n in part))
        # Five deviations of the norm of that much filtered noise.
        numbers = sum(sent[name].numel() for name in part)
        assert measured == pytest.approx(expected, rel=max(0.05, 5 / math.sqrt(numbers))), which


def test_all_tensors_together_are_the_root_of_the_sum_of_squares(monkeypatch):
    job = opened(monkeypatch, method="la-lora")
    task = task_of(job, 0)
    whole = expected_noise_norm(job.trainer, task, 719, 1.5)
    parts = [
        expected_noise_norm(job.trainer, replace(task, state={name: tensor}), 719, 1.5)
        for name, tensor in task.state.items()
    ]
    assert whole == pytest.approx(math.sqrt(sum(part**2 for part in parts)))
    assert expected_noise_norm(job.trainer, task, 719, 3.0) == pytest.approx(2 * whole)
    merged = {**task.state, "blocks.0.mlp.fc1.merged": torch.zeros(128, 64)}
    assert expected_noise_norm(job.trainer, replace(task, state=merged), 719, 1.5) == whole


@pytest.mark.parametrize(
    "options", [{"epsilon": "none"}, {"optimizer": "adamw"}, {"unit": "client"}, {"mechanism": "as-released"}]
)
def test_none_where_there_is_no_such_noise(options):
    job = open_job(RunConfig.from_flat({**BASE, **options}))
    assert expected_noise_norm(job.trainer, task_of(job, 0), 719, 1.0) is None


@pytest.mark.slow
def test_adamw_matters_not_to_noise_on_whole_updates():
    options = {"unit": "client", "noise_by": "client", "max_update_norm": 0.5, "method": "dp-lora"}
    norms = []
    for optimizer in ("sgd", "adamw"):
        job = open_job(RunConfig.from_flat({**BASE, **options, "optimizer": optimizer}))
        task = task_of(job, 0)
        norms.append(expected_noise_norm(job.trainer, task, 719, 2.0))
    numbers = sum(tensor.numel() for tensor in task.state.values())
    assert norms == pytest.approx([2.0 * 0.5 * math.sqrt(numbers)] * 2)


def test_nothing_tells_in_which_order_they_came():
    """It is that of how long they took, and so of how large their batches were."""
    changes = {7: (3.0, 0.0, 4.0), 2: (-6.0, 0.0, -8.0), 5: (0.0, 2.0, 0.0), 9: (1.0, 1.0, 0.0)}
    found = []
    for order in ((7, 2, 5, 9), (2, 9, 5, 7), (9, 7, 5, 2)):
        recorder = UpdateRecorder(sorted(changes))
        for client in order:
            recorder.add(client, update(*changes[client]), START, float(client))
        found.append(recorder.summary())
    assert found[0]["clients"] == [2, 5, 7, 9] and found[0]["norms"] == pytest.approx([10, 2, 5, math.sqrt(2)])
    assert found[0]["cosine"][0] == pytest.approx([1, 0, -1, -6 / 10 / math.sqrt(2)])
    assert found[0] == found[1] == found[2]
