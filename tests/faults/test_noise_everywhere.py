"""Every parameter gets its noise in every kind of step: drawn, padded or empty batches, in every phase, on both paths.

Statistical checks reject at |z| > 5.4, which a right implementation does with probability below 1e-7 for each.
"""

import contextlib

import pytest
import torch

from lora_dp.ops.registry import reference_only
from tests.models import examples, mlp, seeded
from tests.support import check_deviation, make_private, private_gradients

WAYS = {"native": contextlib.nullcontext, "torch": reference_only}


@pytest.mark.slow
@pytest.mark.parametrize("phases", ["A", "B", "AB", "BA"])
@pytest.mark.parametrize("batch", ["drawn", "padded", "empty"])
@pytest.mark.parametrize("way", WAYS)
def test_every_parameter_of_every_step_is_noised(way, batch, phases):
    sigma, bound, steps = 0.8, 1.5, 200
    model = mlp()
    optimizer = make_private(
        model, batch_size=4, max_grad_norm=bound, noise_multiplier=sigma, lr=0.0, phases=phases, engine=seeded()
    )
    found: dict[tuple[int, str], list[torch.Tensor]] = {}
    x, _ = examples(4)
    mask = torch.tensor([True, True, False, True]) if batch == "padded" else None
    for number in range(steps):
        with WAYS[way]():
            if batch == "empty":
                optimizer.step_on_empty_batch()
            else:
                optimizer.batch.expect(4 if mask is None else 3)
                (0 * model(x)).mean().backward()
                optimizer.step(mask=mask)
        for name, gradient in private_gradients(model).items():
            found.setdefault((number % 2, name), []).append(gradient * optimizer.expected_batch_size)
    # By every second step: an alternating run trains one factor in each.
    factors = {"A": [["A"], ["A"]], "B": [["B"], ["B"]], "AB": [["A", "B"]] * 2, "BA": [["B"], ["A"]]}[phases]
    assert set(found) == {
        (turn, name)
        for turn in (0, 1)
        for name in ("2.weight", "2.bias", *(f"0.lora_{factor}" for factor in factors[turn]))
    }
    for gradients in found.values():
        check_deviation(torch.stack(gradients).double(), sigma * bound)
