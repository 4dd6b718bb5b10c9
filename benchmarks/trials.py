"""What the trials of isolation cost: one trial beside one private step, and what is looked at in every step.

    python -m benchmarks.trials

Prints, by shape: a step, the same step without what is looked at (structure of the batch, graph of the loss), and a
trial, in milliseconds of process time; and the share of a run of 1,000 steps that its trials take.
"""

import statistics
import sys
import time
from collections.abc import Callable
from unittest import mock

import torch

import lora_dp.engine.hooks
from benchmarks.models import CPU_SHAPES, RANK, batch, build, loss, targets
from lora_dp import LoRAConfig, PrivacyEngine, inject_lora
from lora_dp.isolation.collation.trial import _LATER
from lora_dp.isolation.loss_checks.watch import LossWatch

_ROUNDS = 15
# Images come in one structure; batches of texts bring other widths later.
_STRUCTURES = {"vit": 1, "roberta": 5}


def _seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(name: str) -> tuple[float, float, float]:
    """Seconds of a step, of one without looking, and what a trial adds."""
    shape = CPU_SHAPES[name]
    model = inject_lora(build(shape), LoRAConfig(r=RANK, target_modules=targets(shape))).train()
    inputs, labels = batch(shape)
    data = torch.utils.data.TensorDataset(torch.zeros(len(labels)))
    _, optimizer, _ = PrivacyEngine("rdp").make_private(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3),
        data_loader=torch.utils.data.DataLoader(data, batch_size=len(labels)),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )

    def step() -> None:
        optimizer.batch.expect(len(labels))
        loss(model, inputs, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    def blind() -> None:
        def seen(watch: LossWatch, *_: object) -> None:
            watch.examined = True

        with (
            mock.patch.object(lora_dp.engine.hooks.ModelHooks, "_test", lambda *_: False),
            mock.patch.object(LossWatch, "scalar", seen),
        ):
            step()

    def tried() -> None:
        with mock.patch.object(lora_dp.engine.hooks, "drawn_for_test", lambda: True):
            step()

    calls = (step, blind, tried)
    for call in calls:
        call()
    rounds = [[_seconds(call) for call in calls] for _ in range(_ROUNDS)]
    usual, unseen, with_trial = (statistics.median(column) for column in zip(*rounds, strict=True))
    return usual, unseen, with_trial - usual


def main() -> None:
    torch.set_num_threads(1)
    names = sys.argv[1:] or list(CPU_SHAPES)
    print("| shape | step, ms | without looking | a trial | share of 1,000 steps |\n| --- | --- | --- | --- | --- |")
    for name in names:
        step, blind, trial = measure(name)
        trials = _STRUCTURES[CPU_SHAPES[name].family] + 1000 / _LATER
        share = (step - blind) / step + trials * trial / (1000 * step)
        print(f"| {name} | {1e3 * step:.1f} | {1e3 * blind:.1f} | {1e3 * trial:.1f} | {100 * share:.2f} % |")


if __name__ == "__main__":
    main()
