"""Does each example keep to itself? A proof by trial that rows are attributed to the right example.

A per-example gradient is only that if no other example can change it. Trials on a few examples of a batch, for one of
them, i:

1. every other example is replaced (by copies of i): no row attributed to i, and no output for i, may change;
2. a loss made of i's outputs alone must have no gradient in a row attributed to another example;
3. under the replacement of 1, i's rows of the gradient must not change, of the loss's and of any; no buffer may take
   another value, for that would be a statistic of the batch, kept without noise; and no parameter may be written to;
4. with fewer examples (or twice as many), i's outputs must stay, and its rows of the loss's gradient be what the
   declared reduction makes of them: the same for a sum, and N times them for a mean;
5. in the whole batch, outputs must be those in a part of it, and each layer have as many rows of each example; the
   gradients of the criterion, or of the model's own losses, be what the declared reduction makes of those in parts;
6. with less padding the same as in 4, where padding varies from batch to batch;
7. what all examples share among the model's arguments must change nothing where it differs from batch to batch;
8. beside noise that is larger than any of them, an example's outputs must stay.

Tables among the arguments (positions, a causal mask) belong to no example: they stay in 1 to 5 and are cut in 6. Where
the model does not take another number or less padding, although batches differ in it, that is no pass.

They catch batch normalisation, window-major orders, tables shared across the batch, losses that mix examples or are
reduced otherwise than declared, models that look at padding, and counts of a batch's tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lora_dp.errors import IsolationError
from lora_dp.isolation.batches import calls as batch_calls
from lora_dp.isolation.batches import kinds as batch_kinds
from lora_dp.isolation.batches.lists import as_tensors, has_lists, other_lists
from lora_dp.isolation.batches.objects import check_opened, take_apart
from lora_dp.isolation.batches.padding import telling_masks
from lora_dp.isolation.batches.sizes import Seen, Sizes
from lora_dp.isolation.batches.tables import set_apart
from lora_dp.isolation.full_precision import in_full_precision
from lora_dp.isolation.loss_checks.graph import LossReduction
from lora_dp.isolation.loss_checks.watch import LossWatch
from lora_dp.isolation.other_batches import (
    FEW,
    REMEDY,
    UNTRIED_NUMBER,
    attempt,
    check_buffers,
    check_choices,
    check_company,
    check_padding,
    check_shared_arguments,
    check_whole,
    warn_of_width,
)
from lora_dp.isolation.trial_values import (
    Gradients,
    calls_in_both,
    differ,
    largest,
    least_of,
    pairs_of,
    rows_of,
    sum_of,
    tolerance,
)
from lora_dp.isolation.trials import LossFunction, Trace, Trials, modes_kept

T = TypeVar("T")


class Passed(NamedTuple):
    """What a batch has passed.

    Attributes:
        losses: which of the single numbers that the model returns are losses that keep examples apart.
        padding: whether padding was there to be tried.
        criterion: the shape of the criterion's graph, if one was given.
        whole: whether the whole batch can be compared with a part of it.
    """

    losses: frozenset[int] = frozenset()
    padding: bool = False
    criterion: int | None = None
    whole: bool = False


def check_isolation(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    n: int,
    *,
    targets: Any = None,
    criterion: LossFunction | None = None,
    reduction: LossReduction | None = None,
    padding_varies: bool | None = None,
    earlier: Mapping[str, Any] | None = None,
    draws: int = 1,
    number_varies: bool = True,
    copies: bool = False,
    seen: Seen | None = None,
    one_width: bool = False,
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
        earlier: what all examples share among the arguments, by name, as it was in an earlier batch, where it differs.
        draws: with how many random states a model that draws is tried.
        number_varies: whether other batches hold another number of examples.
        copies: whether all are copies of the only example of a batch, which meets nobody: what buffers take up of it
            is tried, padding and numbers.
        seen: what the sizes of earlier batches tell of the arguments.
        one_width: whether to warn of a model that looks at padding, where all batches have one width so far.

    Raises:
        IsolationError: naming the module, the loss or the argument by which examples meet.
    """
    if n < 2:
        return Passed()
    return _taken_apart(
        model,
        args,
        kwargs,
        targets,
        n,
        seen,
        lambda call, seen, positional: _check(
            model,
            call,
            positional,
            n,
            criterion,
            reduction,
            padding_varies,
            earlier or {},
            draws,
            number_varies,
            copies,
            seen,
            one_width,
        ),
    )


def check_larger(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    n: int,
    *,
    reduction: LossReduction | None,
    losses: frozenset[int],
    seen: Seen,
) -> frozenset[int]:
    """Try more examples than any batch had that was tried: what only so many do to each other.

    Args:
        model, args, kwargs, n, reduction, seen: as for :func:`check_isolation`.
        losses: those of the model's that keep examples apart in smaller batches.

    Returns:
        Those that do so here too.

    Raises:
        IsolationError: naming what changes.
    """

    def check(call: Any, _: Seen, positional: tuple[str, ...]) -> frozenset[int]:
        if batch_calls.of_whole_batch(call, n):
            return losses
        with Trials(model, None, positional) as trials:
            return check_whole(trials, (*call[:2], None), n, reduction, losses, everybody=True)

    return _taken_apart(model, args, kwargs, None, n, seen, check)


def _taken_apart(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    targets: Any,
    n: int,
    seen: Seen | None,
    check: Callable[[Any, Seen, tuple[str, ...]], T],
) -> T:
    """What ``check`` says of a call in which entries of the examples are told from what they share, in full
    precision."""
    positional = batch_calls.argument_names(model.forward, len(args))
    by_place: Any = take_apart((args, kwargs, targets))
    plain, call = (
        (*batch_calls.named(positional, tree[:2]), tree[2])
        for tree in (by_place, as_tensors(by_place, n, seen.lists if seen else None))
    )
    check_opened(call)
    seen = seen or Sizes().look(call, n)
    # What the model says if tables hold rows of the examples after all, or a list is of N numbers by chance.
    for assumed in ([set_apart(call, seen.tables)] if seen.tables else []) + ([call] if has_lists(call) else []):
        try:
            return in_full_precision(model, assumed, lambda call: check(call, seen, positional))
        except IsolationError:
            raise
        except Exception:
            pass
    check_opened(plain)
    return in_full_precision(model, plain, lambda call: check(call, seen, positional))


def _check(
    model: nn.Module,
    call: Any,
    positional: tuple[str, ...],
    n: int,
    criterion: LossFunction | None,
    reduction: LossReduction | None,
    padding_varies: bool | None,
    earlier: Mapping[str, Any],
    draws: int,
    number_varies: bool,
    copies: bool,
    seen: Seen,
    one_width: bool,
) -> Passed:
    apart = not batch_calls.of_whole_batch(call, n)
    whole, examples = call, n
    seen.masks.update(telling_masks(call, n))
    if apart and n > FEW:
        rows = batch_kinds.chosen(call, n, FEW)
        call, n = batch_calls.take(call, rows, n), len(rows)
    with Trials(model, criterion, positional) as trials:
        try:
            base = trials.run(call)
        except Exception as error:
            if n < examples and (lists := other_lists(call, examples)):
                raise IsolationError(
                    f"The model was given a list with an entry for each example ({lists[0]}), which cannot be tried on "
                    f"some of them ({type(error).__name__}): give it tensors whose first dimension is the example, or "
                    "lists of numbers."
                ) from error
            raise
        for name, output in base.private():
            if output.dim() < 2 or output.shape[0] % n:
                raise IsolationError(
                    f"'{name}' works on {tuple(output.shape)} in a batch of {n} examples: its rows cannot be told "
                    "apart by example; freeze it or leave it out of the private layers."
                )
        replaced_runs = [] if copies else _replace(trials, base, call, n, apart)
        if copies and (changed := attempt(trials, batch_calls.changed(call, n), ragged=True)) is not None:
            check_buffers(base, changed)
        for _ in range(draws - 1 if not copies and (base.random or base.elsewhere) else 0):
            trials.draw_anew()
            _replace(trials, trials.run(call), call, n, apart)
        # Masks of one example in batches of different shapes differ: from here on nothing is drawn. NumPy and Python
        # cannot be kept from drawing, so that models which draw by them (SpecAugment, say) are tried in evaluation, and
        # by 1 to 3 alone if they draw there, too.
        with modes_kept(model):
            if base.elsewhere:
                model.eval()
            steady = trials.run(call, still=True) if base.random or base.elsewhere else base
            passed: frozenset[int] | None = frozenset(range(len(steady.losses)))
            padding = False
            if not steady.elsewhere:
                if number_varies and not copies:
                    passed = check_company(trials, steady, call, n, apart, criterion, reduction)
                    if passed is None and seen.number:
                        raise IsolationError(UNTRIED_NUMBER)
                if number_varies and examples > n:
                    passed = check_whole(trials, whole, examples, reduction, passed or frozenset())
                if not copies:
                    check_choices(trials, steady, call, n)
                padding = padding_varies is not False and check_padding(
                    trials, steady, call, n, reduction, passed or frozenset(), padding_varies is True, seen
                )
                if one_width:
                    warn_of_width(trials, steady, call, n, reduction, seen)
            check_shared_arguments(trials, steady, call, n, earlier)
        shape = None if criterion is None else LossWatch().shape_of(base.losses[0], base.result)
        return Passed(
            (passed or frozenset()) & _kept_apart(base, replaced_runs, n),
            padding,
            shape,
            apart and number_varies and not copies and not steady.elsewhere,
        )


def _replace(trials: Trials, base: Trace, call: Any, n: int, apart: bool) -> list[tuple[int, Trace]]:
    """The first and the last example, each beside copies of itself."""
    runs, alone = [], {}
    for i in sorted({0, n - 1} if apart else {0, n - 1, *batch_kinds.extremes(call, n)}):
        alone[i] = _check_gradient_rows(base, i, n)
        replaced = attempt(trials, _only(call, i, n), ragged=not apart)
        if replaced is not None:
            _check_replaced(base, replaced, i, n)
            _check_called(alone[i], replaced, i, n)
            runs.append((i, replaced))
    _check_backward(base, alone, n)
    return runs


def _only(call: Any, i: int, n: int) -> Any:
    def copies(leaf: Any) -> Any:
        return leaf[i : i + 1].expand_as(leaf) if batch_calls.is_by_example(leaf, n) else leaf

    return pytree.tree_map(copies, call)


def _weighted(base: Trace, n: int, i: int | None = None) -> Tensor | None:
    """Outputs, of example ``i`` or of all, times random weights, summed up; None if none has a gradient."""
    generator, sums = torch.Generator().manual_seed(base.seed), []
    for output in base.by_example(n):
        if output.requires_grad:
            values = rows_of(output, n)
            weights = torch.randn(values.shape, generator=generator).to(values)
            # A sum that is NaN by one example has a gradient all the same.
            sums.append((values * weights if i is None else values[i] * weights[i]).sum().double())
    return torch.stack(sums).sum() if sums else None


def _check_gradient_rows(base: Trace, i: int, n: int) -> dict[str, list[Tensor]]:
    """The gradients of ``i``'s outputs, of which no other example's rows may have a part."""
    alone = _weighted(base, n, i)
    found = {} if alone is None else base.backward(alone)
    for name, gradients in found.items():
        for gradient in gradients:
            rows = rows_of(gradient, n)
            # Zero times what is infinite or NaN in another example is NaN, which exceeds nothing: no dependence.
            others = torch.cat([rows[:i], rows[i + 1 :]]).abs()
            if bool((others > tolerance(rows.dtype) * largest(rows[i])).any()):
                raise IsolationError(
                    f"The output of example {i} depends on rows of '{name}' that are attributed to other examples: the "
                    "module's first dimension is not ordered by example (all rows of one example together), or a "
                    "module after it mixes the batch; move the batch dimension first, or leave the module out."
                )
    return found


def _check_replaced(base: Trace, replaced: Trace, i: int, n: int) -> None:
    def first() -> str:
        found = [[(name, output) for name, _, output in trace.outputs] for trace in (base, replaced)]
        return next(
            (name for name, left, right in calls_in_both(*found) if _row_changed(left, right, i, n)), "the model itself"
        )

    for name, left, right in calls_in_both(base.private(), replaced.private()):
        if _row_changed(left, right, i, n):
            raise IsolationError(
                f"Rows of '{name}' attributed to example {i} change with the other examples of the batch; the first "
                f"module where this is seen is '{first()}'. Replace what mixes examples (BatchNorm by GroupNorm, say), "
                "or order rows by example."
            )
    for name, left, right in calls_in_both(base.inputs, replaced.inputs):
        if _row_changed(left, right, i, n):
            raise IsolationError(
                f"What '{name}' is given of example {i} changes with the other examples of the batch; the first module "
                f"where this is seen is '{first()}': replace what mixes examples, or order rows by example."
            )
    for left, right in base.beside(replaced, n, n):
        if _row_changed(left, right, i, n, masked=True):
            raise IsolationError(
                f"The output for example {i} changes with the other examples of the batch, seen first in '{first()}': "
                "replace what mixes examples (BatchNorm by GroupNorm, say)."
            )
    check_buffers(base, replaced)
    if not base.losses or not replaced.losses:
        return
    left_gradients = base.backward(sum_of(base.losses[0]))
    right_gradients = replaced.backward(sum_of(replaced.losses[0]))
    least = least_of(left_gradients, i, n)
    for name, left, right in pairs_of(left_gradients, right_gradients):
        if differ(rows_of(left, n)[i], rows_of(right, n)[i], least):
            raise IsolationError(
                f"The loss mixes examples: the gradient of example {i} at '{name}' changes with the others. Use a loss "
                "that is a mean or sum of terms of one example each (for token losses: average over each example's "
                f"tokens first, then over examples): {REMEDY}."
            )


def _check_called(own: Gradients, replaced: Trace, i: int, n: int) -> None:
    """Of a layer that only one of both passes called, the example has no gradient: ``own``, in the one, is of its
    outputs."""
    if own.keys() == {name for name, _ in replaced.inputs} or (outputs := _weighted(replaced, n, i)) is None:
        return
    other = replaced.backward(outputs)
    for one, without in ((own, other), (other, own)):
        for name in one.keys() - without.keys():
            if any(largest(rows_of(gradient, n)[i]) > 0 for gradient in one[name]):
                raise IsolationError(
                    f"'{name}' is called for example {i} in some company and not in other: let each example decide for "
                    "itself which layers it passes (torch.where)."
                )


def _check_backward(base: Trace, alone: Mapping[int, Gradients], n: int) -> None:
    """Where all examples' outputs have a gradient, an example's rows get what they get of its outputs alone."""
    if (everybody := _weighted(base, n)) is None:
        return
    found = base.backward(everybody)
    for i, own in alone.items():
        least = least_of(own, i, n)
        for name, one, other in pairs_of(own, found):
            if differ(rows_of(one, n)[i], rows_of(other, n)[i], least):
                raise IsolationError(
                    f"The gradient of example {i} at '{name}' changes with the other examples of the batch: something "
                    "in the model's backward looks at all of them (a hook that normalises gradients, say)."
                )


def _kept_apart(base: Trace, replaced_runs: list[tuple[int, Trace]], n: int) -> frozenset[int]:
    """Which of the losses after the first one, too, leave an example's gradient alone when the others are replaced."""
    kept = set(range(len(base.losses)))
    for place in range(1, len(base.losses)):
        left = base.backward(sum_of(base.losses[place]))
        for i, replaced in replaced_runs:
            right = replaced.backward(sum_of(replaced.losses[place])) if place < len(replaced.losses) else {}
            if any(differ(rows_of(a, n)[i], rows_of(b, n)[i]) for _, a, b in pairs_of(left, right)):
                kept.discard(place)
    return frozenset(kept)


def _row_changed(left: Tensor, right: Tensor, i: int, n: int, *, masked: bool = False) -> bool:
    if left.dim() == 0 or left.shape[0] % n or left.shape != right.shape:
        return False
    return differ(rows_of(left, n)[i], rows_of(right, n)[i], masked=masked)
