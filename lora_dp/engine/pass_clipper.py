"""From one finished pass to its clipped sums."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_dp.engine.logical_batch import Clipped
from lora_dp.engine.validation import PrivateParameter
from lora_dp.isolation.loss_checks.graph import LossReduction
from lora_dp.nn.per_example import Pass
from lora_dp.ops.private_update import ExampleSum
from lora_dp.privacy.mechanism import Mechanism


class PassClipper:
    """Σᵢ mᵢcᵢgᵢ of finished passes: private still, to be noised before anyone sees it. Waits for no device.

    Args:
        covered: the private parameters, by the ``id`` of the parameter.
        loss_reduction: of the losses that were differentiated.
    """

    def __init__(self, covered: Mapping[int, PrivateParameter], loss_reduction: LossReduction):
        self._covered, self._loss_reduction = covered, loss_reduction
        self._layer_numbers: dict[Any, tuple[Tensor, int]] = {}

    def clip_pass(self, mechanism: Mechanism, finished: Pass, mask: Tensor | None) -> Clipped:
        slots = [(key, slot) for key, slot in finished.slots.items() if slot.filled]
        if not slots or finished.n == 0:
            return Clipped({}, 0)
        # Slots hold sums over views, of which the mean is clipped. A mean over all rows has divided by N, too.
        by_mean = self._loss_reduction == "mean" and not finished.summed
        scale = float(finished.n) if by_mean else 1 / finished.views
        with torch.no_grad():
            device = slots[0][1].leaf.device
            sq_norms = torch.stack([slot.norms().to(device) for _, slot in slots]).square_()
            layers, layer_count = self._layers(tuple(key for key, _ in slots), frozenset(finished.slots), device)
            kept = {row: gradient for row, (_, slot) in enumerate(slots) if (gradient := slot.kept) is not None}
            coefficients, by_row = mechanism.clipped_sums(
                kept, sq_norms, layers, layer_count, None if mask is None else mask.to(device), scale
            )
            sums: dict[int, Tensor | ExampleSum] = {
                key: by_row[row] if row in by_row else slot.recomputed_sum(coefficients[row].to(slot.leaf.device))
                for row, (key, slot) in enumerate(slots)
            }
            count = mechanism.centred_count(sq_norms, mask, scale)
            return Clipped(sums, (~torch.isfinite(sq_norms.sum(0))).sum(), count)

    def _layers(self, found: tuple[int, ...], trained: frozenset[int], device: torch.device) -> tuple[Tensor, int]:
        """The number of each found parameter's layer among those trained, and how many these are."""
        key = (found, trained, device)
        if key not in self._layer_numbers:
            numbers = sorted({self._covered[parameter].layer for parameter in trained})
            self._layer_numbers[key] = (
                torch.tensor([numbers.index(self._covered[parameter].layer) for parameter in found], device=device),
                len(numbers),
            )
        return self._layer_numbers[key]
