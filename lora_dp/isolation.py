"""Does each example keep to itself? A proof by trial that rows are attributed to the right example.

A per-example gradient is only that if no other example can change it. Trials on a few examples of a batch, for one of
them, i:

1. every other example is replaced (by copies of i): no row attributed to i, and no output for i, may change;
2. a loss made of i's outputs alone must have no gradient in a row attributed to another example;
3. under the replacement of 1, i's rows of the loss's gradient must not change; and no buffer may take another value,
   for that would be a statistic of the batch, kept without noise;
4. with fewer examples (or twice as many), i's outputs must stay, and its rows of the loss's gradient be what the
   declared reduction makes of them: the same for a sum, and N times them for a mean;
5. with less padding the same, where padding varies from batch to batch;
6. a number among the model's arguments that differs from batch to batch must change nothing.

They catch batch normalisation, window-major orders, tables shared across the batch, losses that mix examples or are
reduced otherwise than declared, models that look at padding, and counts of a batch's tokens.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lora_dp import batch_parts
from lora_dp.loss_graph import IsolationError, LossReduction, tolerance
from lora_dp.loss_watch import LossWatch
from lora_dp.trials import SEED, LossFunction, Trace, Trials

# What a layer whose gradient vanishes has left of it, relative to the largest gradient of all layers.
_ROUNDING = 1e-3
# Examples in a trial: enough to drop some and keep company, few enough to cost little.
FEW = 4
_REMEDY = ("hand the losses of the single examples, (N,), to optimizer.backward (lora_dp.losses has them; leave the "
           "labels out of the model's call)")


class Passed(NamedTuple):
    """What a batch has passed.

    Attributes:
        losses: which of the single numbers that the model returns are losses that keep examples apart.
        padding: whether padding was there to be tried.
        criterion: the shape of the criterion's graph, if one was given.
    """

    losses: frozenset[int] = frozenset()
    padding: bool = False
    criterion: int | None = None


def check_isolation(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], n: int, *,
    targets: Any = None, criterion: LossFunction | None = None, reduction: LossReduction | None = None,
    padding_varies: bool | None = None, other_numbers: Mapping[str, float] | None = None, number_varies: bool = True,
) -> Passed:
    """Run the trials on the batch of ``n`` examples with which ``model(*args, **kwargs)`` would be called.

    Random numbers, buffers, gradients and modes are left as they were. A batch of fewer than two examples passes: it
    has nobody to mix with.

    Args:
        model: in the mode in which it is to be trained.
        args, kwargs: of the forward; tensors whose first dimension is ``n`` hold one entry per example.
        n: number of examples.
        targets: given to ``criterion``, also by example.
        criterion: loss(model output, targets), a scalar or (N,); None uses the model's own loss if its output has one.
        reduction: how a scalar loss is declared to join the examples; None accepts a mean and a sum.
        padding_varies: whether other batches are padded to another width; None if that is not known, and then the
            padding that masks and labels show is tried.
        other_numbers: numbers among the arguments, by name, as they were in an earlier batch.
        number_varies: whether other batches hold another number of examples.

    Raises:
        IsolationError: naming the module, the loss or the argument by which examples meet.
    """
    if n < 2:
        return Passed()
    call: Any = (args, kwargs, targets)
    apart = not batch_parts.of_whole_batch(call, n)
    if apart and n > FEW:
        call, n = batch_parts.take(call, batch_parts.chosen(call, n, FEW), n), FEW
    with Trials(model, criterion) as trials:
        base = trials.run(call)
        for name, output in base.private():
            if output.dim() < 2 or output.shape[0] % n:
                raise IsolationError(
                    f"'{name}' works on {tuple(output.shape)} in a batch of {n} examples: its rows cannot be told "
                    "apart by example; freeze it or leave it out of the private layers.")
        replaced_runs = []
        for i in sorted({0, n - 1} if apart else {0, n - 1, *batch_parts.extremes(call, n)}):
            _check_gradient_rows(base, i, n)
            replaced = _attempt(trials, _only(call, i, n), ragged=not apart)
            if replaced is not None:
                _check_replaced(base, replaced, i, n)
                replaced_runs.append((i, replaced))
        # Masks of one example in batches of different shapes differ: from here on nothing is drawn.
        steady = trials.run(call, still=True) if base.random else base
        # What NumPy or Python draw cannot be stilled: compared by place in batches of one shape alone, as above.
        passed = frozenset(range(len(steady.losses))) if steady.elsewhere or not number_varies else _check_company(
            trials, steady, call, n, apart, criterion, reduction)
        padding = padding_varies is not False and not steady.elsewhere and _check_padding(
            trials, steady, call, n, reduction, passed, padding_varies is True)
        if other_numbers:
            _check_numbers(trials, steady, call, n, other_numbers)
        shape = None if criterion is None else LossWatch().shape_of(steady.losses[0], steady.result)
        return Passed(passed & _kept_apart(base, replaced_runs, n), padding, shape)


def _only(call: Any, i: int, n: int) -> Any:
    def copies(leaf: Any) -> Any:
        return leaf[i : i + 1].expand_as(leaf).clone() if batch_parts.is_by_example(leaf, n) else leaf
    return pytree.tree_map(copies, call)


def _attempt(trials: Trials, call: Any, *, ragged: bool, still: bool = False) -> Trace | None:
    """A pass; None where rows of all examples lie in one tensor, which the changed batch no longer fits."""
    try:
        return trials.run(call, still=still)
    except Exception:  # whatever a model says to a size that it does not take
        if ragged:
            return None
        raise


def _rows(tensor: Tensor, n: int) -> Tensor:
    """Example-major grouping, as the layers do it: (N, everything else)."""
    return tensor.detach().reshape(n, -1)


def _differ(left: Tensor, right: Tensor, least: float = 0.0) -> bool:
    """Whether they differ by more than rounding, of values that are at least as large as ``least``."""
    if left.shape != right.shape:
        return True
    if not left.numel():
        return False
    if not left.is_floating_point():
        return not torch.equal(left, right)
    left, right = left.nan_to_num(), right.nan_to_num()
    return bool((left - right).abs().max()
                > tolerance(left.dtype) * left.abs().max().clamp(min=max(torch.finfo(left.dtype).tiny, least)))


def _least(gradients: Mapping[str, list[Tensor]]) -> float:
    """A layer whose gradient is smaller than this beside the others' has rounding alone."""
    return _ROUNDING * max((float(g.abs().max()) for found in gradients.values() for g in found if g.numel()),
                           default=0.0)


def _check_gradient_rows(base: Trace, i: int, n: int) -> None:
    outputs = [output for output in base.by_example(n) if output.requires_grad]
    if not outputs:
        return
    generator = torch.Generator().manual_seed(SEED)
    own = [output.reshape(n, -1)[i] for output in outputs]
    alone = torch.stack([
        (values * torch.randn(values.shape, generator=generator).to(values)).sum() for values in own]).sum()
    for name, gradients in base.backward(alone).items():
        for gradient in gradients:
            rows = _rows(gradient, n).nan_to_num()
            others = torch.cat([rows[:i], rows[i + 1 :]]).abs().max()
            if others > tolerance(rows.dtype) * rows.abs().max():
                raise IsolationError(
                    f"The output of example {i} depends on rows of '{name}' that are attributed to other examples: the "
                    "module's first dimension is not ordered by example (all rows of one example together), or a "
                    "module after it mixes the batch; move the batch dimension first, or leave the module out.")


def _check_replaced(base: Trace, replaced: Trace, i: int, n: int) -> None:
    mixing = next((name for (name, _, left), (_, _, right) in zip(base.outputs, replaced.outputs, strict=False)
                   if _row_changed(left, right, i, n)), "the model itself")
    for (name, left), (_, right) in zip(base.private(), replaced.private(), strict=False):
        if _row_changed(left, right, i, n):
            raise IsolationError(
                f"Rows of '{name}' attributed to example {i} change with the other examples of the batch; the first "
                f"module where this is seen is '{mixing}'. Replace what mixes examples (BatchNorm by GroupNorm, say), "
                "or order rows by example.")
    for (name, left), (_, right) in zip(base.inputs, replaced.inputs, strict=False):
        if _row_changed(left, right, i, n):
            raise IsolationError(
                f"What '{name}' is given of example {i} changes with the other examples of the batch; the first module "
                f"where this is seen is '{mixing}': replace what mixes examples, or order rows by example.")
    for left, right in base.beside(replaced, n, n):
        if _row_changed(left, right, i, n):
            raise IsolationError(
                f"The output for example {i} changes with the other examples of the batch, seen first in '{mixing}': "
                "replace what mixes examples (BatchNorm by GroupNorm, say).")
    for name, buffer in base.buffers.items():
        if name in replaced.buffers and _differ(buffer, replaced.buffers[name]):
            raise IsolationError(
                f"The buffer '{name}' takes up statistics of the examples, which nothing clips or noises: switch them "
                "off (track_running_stats=False, say) or keep that module in eval().")
    if not base.losses or not replaced.losses:
        return
    left_gradients, right_gradients = base.backward(_sum(base.losses[0])), replaced.backward(_sum(replaced.losses[0]))
    least = _least(left_gradients)
    for name, gradients in left_gradients.items():
        for left, right in zip(gradients, right_gradients.get(name, []), strict=False):
            if _differ(_rows(left, n)[i], _rows(right, n)[i], least):
                raise IsolationError(
                    f"The loss mixes examples: the gradient of example {i} at '{name}' changes with the others. Use a "
                    "loss that is a mean or sum of terms of one example each (for token losses: average over each "
                    f"example's tokens first, then over examples): {_REMEDY}.")


def _kept_apart(base: Trace, replaced_runs: list[tuple[int, Trace]], n: int) -> frozenset[int]:
    """Which of the losses after the first one, too, leave an example's gradient alone when the others are replaced."""
    kept = set(range(len(base.losses)))
    for place in range(1, len(base.losses)):
        left = base.backward(_sum(base.losses[place]))
        for i, replaced in replaced_runs:
            right = replaced.backward(_sum(replaced.losses[place])) if place < len(replaced.losses) else {}
            if any(_differ(_rows(a, n)[i], _rows(b, n)[i])
                   for name, found in left.items() for a, b in zip(found, right.get(name, []), strict=False)):
                kept.discard(place)
    return frozenset(kept)


def _sum(loss: Tensor) -> Tensor:
    return loss if loss.dim() == 0 else loss.sum()


def _row_changed(left: Tensor, right: Tensor, i: int, n: int) -> bool:
    if left.dim() == 0 or left.shape[0] % n or not left.is_floating_point() or left.shape != right.shape:
        return False
    return _differ(_rows(left, n)[i], _rows(right, n)[i])


def _check_company(
    trials: Trials, steady: Trace, call: Any, n: int, apart: bool, criterion: LossFunction | None,
    reduction: LossReduction | None,
) -> frozenset[int]:
    """Among another number of examples."""
    # Half of them; two or three are doubled instead, for a batch of one is a case of its own in many models.
    halved = apart and n >= FEW
    rows = range(n // 2) if halved else range(n)
    company = batch_parts.take(call, list(rows), n) if halved else batch_parts.doubled(call)
    other = _attempt(trials, company, ragged=not apart, still=steady.random or steady.still)
    if other is None:
        return frozenset()
    m = len(rows) if halved else 2 * n
    pairs = [("The output for", left, right) for left, right in steady.beside(other, n, m)]
    pairs += [(f"What '{name}' is given of", left, right)
              for (name, left), (_, right) in zip(steady.inputs, other.inputs, strict=False)]
    for what, left, right in pairs:
        if not left.is_floating_point() or left.shape[0] % n or right.shape[0] % m or (
                left.shape[0] // n != right.shape[0] // m or left.shape[1:] != right.shape[1:]):
            continue
        for i in rows:
            if _differ(_rows(left, n)[i], _rows(right, m)[i]):
                raise IsolationError(
                    f"{what} example {i} changes with the number of examples in the batch: find what counts or "
                    "normalises over them.")
    passed = set()
    for place, (loss, other_loss) in enumerate(zip(steady.losses, other.losses, strict=False)):
        whole = steady.backward(_sum(loss))
        part = other.backward(_sum(other_loss))
        fits = {kind for kind in ("mean", "sum") if _scales_as(kind, whole, part, rows, n, m)}
        claimed = "sum" if loss.dim() else reduction
        if fits & ({claimed} if claimed else {"mean", "sum"}):
            # Of two or three, all doubled, a statistic of the batch scales as a mean does.
            if place == 0 or halved:
                passed.add(place)
        elif place == 0:
            raise IsolationError(_misreduced(claimed, fits, call, criterion is None))
    return frozenset(passed)


def _scales_as(
    kind: LossReduction, whole: dict[str, list[Tensor]], part: dict[str, list[Tensor]], rows: range, n: int, m: int
) -> bool:
    scales = (n, m) if kind == "mean" else (1, 1)
    least = scales[0] * _least(whole)
    return all(
        not _differ(_rows(left, n)[i] * scales[0], _rows(right, m)[i] * scales[1], least)
        for name, gradients in whole.items() for left, right in zip(gradients, part.get(name, []), strict=False)
        for i in rows)


def _misreduced(claimed: str | None, fits: set[str], call: Any, own: bool) -> str:
    numbers = ", ".join(sorted(batch_parts.numbers_in(call))) if own else ""
    by = f" (the model was given {numbers}: leave out what counts the batch)" if numbers else ""
    if fits:
        return (f"The loss is a {fits.pop()} over the examples, but was declared a {claimed}: make_private takes "
                f"loss_reduction='mean' or 'sum'{by}; or {_REMEDY}.")
    return (f"The loss mixes examples: it is neither a mean nor a sum over them, since an example's gradient changes "
            f"with their number as neither does{by}; {_REMEDY}.")


def _check_padding(
    trials: Trials, steady: Trace, call: Any, n: int, reduction: LossReduction | None, passed: frozenset[int],
    known: bool,
) -> bool:
    """With less padding: what the longest example of a batch does to all others. Whether some was there."""
    tried = False
    for lengths in batch_parts.narrowed(call, n, by_runs=known):
        for narrow in lengths:
            # A model of one fixed width cannot be padded otherwise; one of blocks takes the next length.
            other = _attempt(trials, narrow.call, ragged=True, still=steady.random or steady.still)
            if other is not None:
                tried = True
                _compare_narrowed(steady, other, narrow, n, reduction, passed)
                break
    return tried


def _compare_narrowed(
    steady: Trace, other: Trace, narrow: batch_parts.Narrowed, n: int, reduction: LossReduction | None,
    passed: frozenset[int],
) -> None:
    m = len(narrow.rows)
    for left, right in steady.beside(other, n, m):
        _compare_padded(left, right, narrow, n, "output")
    for (name, left), (_, right) in zip(steady.inputs, other.inputs, strict=False):
        if left.is_floating_point():
            _compare_padded(left, right, narrow, n, f"input of '{name}'")
    for place, (loss, other_loss) in enumerate(zip(steady.losses, other.losses, strict=False)):
        if (reduction is None and not loss.dim()) or (place and place not in passed):
            continue  # which of the two it is, was not said
        whole, part = steady.backward(_sum(loss)), other.backward(_sum(other_loss))
        factor = n / m if reduction != "sum" and not loss.dim() else 1.0
        for name, gradients in whole.items():
            for left, right in zip(gradients, part.get(name, []), strict=False):
                _compare_padded(left * factor, right, narrow, n, f"gradient at '{name}'")


def _compare_padded(left: Tensor, right: Tensor, narrow: batch_parts.Narrowed, n: int, what: str) -> None:
    """An example's values at its own tokens, or all of them where they do not go by token."""
    tokens, m, columns = narrow.tokens, len(narrow.rows), narrow.mask.shape[1]
    if left.shape[0] == n * tokens and right.shape[0] == m * columns:
        left, right = left.view(n, tokens, *left.shape[1:]), right.view(m, columns, *right.shape[1:])
    if left.shape[0] != n or right.shape[0] != m:
        return
    left = left.detach()[narrow.rows]
    by_token = left.dim() > 1 and left.shape[1] == tokens and right.shape[1] == columns
    if by_token:
        left = left[:, narrow.kept]
    if left.shape != right.shape:
        return
    for row in range(m):
        own = narrow.mask[row] if by_token else slice(None)
        a, b = (left[row][own], right.detach()[row][own]) if by_token else (left[row], right.detach()[row])
        if _differ(a, b):
            raise IsolationError(
                f"The {what} of example {narrow.rows[row]} changes with the padding of the batch, so with its longest "
                f"example ({tokens} or {columns} long): pad every batch to one fixed size, or use a model that passes "
                "over padding (by its attention mask, in pooling too).")


def _check_numbers(
    trials: Trials, steady: Trace, call: Any, n: int, other_numbers: Mapping[str, float]
) -> None:
    """A number that differs from batch to batch."""
    for name, value in other_numbers.items():
        changed = trials.run(batch_parts.with_numbers(call, {name: value}), still=steady.random or steady.still)
        pairs = steady.beside(changed, n, n)
        for loss, other_loss in zip(steady.losses, changed.losses, strict=False):
            left, right = steady.backward(_sum(loss)), changed.backward(_sum(other_loss))
            pairs += [pair for key, found in left.items() for pair in zip(found, right.get(key, []), strict=False)]
        if any(left.shape == right.shape and _differ(left.detach(), right.detach()) for left, right in pairs):
            raise IsolationError(
                f"The argument {name} of the model differs from batch to batch and changes the gradient of every "
                f"example: if it counts what a batch holds, leave it out; {_REMEDY}. A public schedule belongs into an "
                "attribute of the model.")


