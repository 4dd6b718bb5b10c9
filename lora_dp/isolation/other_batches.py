"""Does an example keep to itself in other company? Trials among another number of examples, beside noise, with less
padding, and with other numbers among the arguments; part of :mod:`lora_dp.isolation.check`, where they are numbered 4
to 8.
"""

import random
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_dp.errors import IsolationError
from lora_dp.isolation.batches import calls as batch_calls
from lora_dp.isolation.batches import padding as batch_padding
from lora_dp.isolation.batches.shared_arguments import with_shared
from lora_dp.isolation.batches.sizes import Seen
from lora_dp.isolation.loss_checks.graph import LossReduction
from lora_dp.isolation.model_state.buffers import same
from lora_dp.isolation.trial_values import (
    Gradients,
    calls_in_both,
    differ,
    is_another,
    least_of,
    pairs_of,
    rows_of,
    sum_of,
)
from lora_dp.isolation.trials import LossFunction, Quiet, Trace, Trials

# Examples in a trial: enough to drop some and keep company, few enough to cost little.
FEW = 4
# Arguments that are put back in one pass rather than one by one.
_MUCH = 8
# A choice moves what it decides by more than so many times what is seen of other influences.
_SMALL = 100
REMEDY = (
    "hand the losses of the single examples, (N,), to optimizer.backward (lora_dp.losses has them; leave the "
    "labels out of the model's call)"
)

_NO_CACHE = " If it is the cache of keys and values that a language model returns, call it with use_cache=False."
_OWN_TABLES = "have its forward make what has to fit the batch (a causal mask, positions) rather than be given it"
_UNTRIED_PADDING = (
    "Batches are padded to different widths, but the model takes none of the same examples with less padding, so that "
    "it cannot be tried whether the longest example changes the others: pad every batch to one public width, or "
    f"{_OWN_TABLES}."
)
UNTRIED_NUMBER = (
    "Batches hold different numbers of examples, but the model does not take every example of this one twice: it "
    "cannot be tried whether their number changes an example. Give it tensors whose first dimension is the example, or "
    f"{_OWN_TABLES}."
)


def attempt(trials: Trials, call: Any, *, ragged: bool, still: bool = False) -> Trace | None:
    """A pass; None where rows of all examples lie in one tensor, which the changed batch no longer fits."""
    try:
        return trials.run(call, still=still)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a model says to a size that it does not take
        if ragged:
            return None
        raise


def check_company(
    trials: Trials,
    steady: Trace,
    call: Any,
    n: int,
    apart: bool,
    criterion: LossFunction | None,
    reduction: LossReduction | None,
) -> frozenset[int] | None:
    """Among another number of examples, each in another place if they can be taken apart; None if the model takes no
    other."""
    # Half of them; two or three are doubled instead, for a batch of one is a case of its own in many models.
    halved = apart and n >= FEW
    turned = list(reversed(range(n)))
    turned = turned[: n // 2] if halved else [*turned, *turned]
    company = batch_calls.take(call, turned, n) if apart else batch_calls.doubled(call, n)
    other = attempt(trials, company, ragged=not apart, still=steady.still)
    if other is None:
        return None
    m = len(turned)
    places = {i: place for place, i in enumerate(turned)} if apart else {i: i for i in range(n)}
    pairs = [("The output for", left, right, True) for left, right in steady.beside(other, n, m)]
    pairs += [
        (f"What '{name}' is given of", left, right, False)
        for name, left, right in calls_in_both(steady.inputs, other.inputs)
    ]
    for what, left, right, scores in pairs:
        if left.shape[0] * m != right.shape[0] * n or left.shape[1:] != right.shape[1:]:
            continue
        for i, place in places.items():
            if differ(rows_of(left, n)[i], rows_of(right, m)[place], masked=scores):
                raise IsolationError(_counted(what, i))
    passed = set()
    for place, (loss, other_loss) in enumerate(zip(steady.losses, other.losses, strict=False)):
        whole = steady.backward(sum_of(loss))
        part = other.backward(sum_of(other_loss))
        fits = {kind for kind in ("mean", "sum") if _scales_as(kind, whole, part, places, n, m)}
        claimed = "sum" if loss.dim() else reduction
        if fits & ({claimed} if claimed else {"mean", "sum"}):
            # Of two or three, all doubled, a statistic of the batch scales as a mean does.
            if place == 0 or halved:
                passed.add(place)
        elif place == 0:
            raise IsolationError(_misreduced(claimed, fits, call, criterion is None))
    return frozenset(passed)


def _scales_as(
    kind: LossReduction, whole: Gradients, part: Gradients, places: Mapping[int, int], n: int, m: int
) -> bool:
    scales = (n, m) if kind == "mean" else (1, 1)
    return all(
        not differ(rows_of(left, n)[i] * scales[0], rows_of(right, m)[place] * scales[1], scales[0] * least)
        for i, place in places.items()
        for least in [least_of(whole, i, n)]
        for _, left, right in pairs_of(whole, part)
    )


def _misreduced(claimed: str | None, fits: set[str], call: Any, own: bool) -> str:
    numbers = ", ".join(batch_calls.numbers_in(call)) if own else ""
    by = f" (the model was given {numbers}: leave out what counts the batch)" if numbers else ""
    if fits:
        return (
            f"The loss is a {fits.pop()} over the examples, but was declared a {claimed}: make_private takes "
            f"loss_reduction='mean' or 'sum'{by}; or {REMEDY}."
        )
    return (
        f"The loss mixes examples: it is neither a mean nor a sum over them, since an example's gradient changes "
        f"with their number as neither does{by}; {REMEDY}."
    )


def _counted(what: str, i: int) -> str:
    return (
        f"{what} example {i} changes with the number of examples in the batch, or with its place among them: find "
        "what counts them, normalises over them or goes by their order (positions belong to the second dimension)."
    )


def check_whole(
    trials: Trials,
    call: Any,
    n: int,
    reduction: LossReduction | None = None,
    passed: frozenset[int] = frozenset(),
    *,
    everybody: bool = False,
) -> frozenset[int]:
    """All examples beside some of them, most drawn in secret: what only many do to each other, such as a capacity that
    they fill together, or being the hardest of all. Nothing is drawn at random in the model.

    Args:
        reduction: as declared; None for either.
        passed: which losses, the criterion's or the model's own, are compared by their gradients; without any, no
            gradient is taken.
        everybody: whether all examples are compared where there is no such loss, and not a quarter of them.

    Returns:
        Those that passed here too.

    Raises:
        IsolationError: an output changes, a layer has not as many rows of every example, or the first loss does not
            weigh an example in the whole batch as in a part of it.
    """
    # The first and the last among them: what has room for so many drops those that come last.
    some = [0, *random.SystemRandom().sample(range(1, n - 1), max(n // 4, FEW) - 2), n - 1]
    parts = [some, *(_others(some, n) if passed or everybody else [])]
    kept = sorted({i for rows in parts for i in rows})
    whole = trials.outputs(call, n, kept, passed)
    for rows in parts:
        part = trials.outputs(batch_calls.take(call, rows, n), len(rows), list(range(len(rows))), passed)
        _compare_part(whole, part, kept, rows, n)
        for place in passed:
            if (found := _chosen_for(whole, part, place, rows, n, reduction)) is None:
                continue
            if place == 0:
                raise IsolationError(
                    f"The loss mixes examples: what example {found} has of it is another in a batch of {n} than in one "
                    f"of {len(rows)}, as where the hardest of all are chosen. Use a loss that is a mean or sum of "
                    f"terms of one example each: {REMEDY}."
                )
            passed -= {place}
    return passed


def _compare_part(whole: Quiet, part: Quiet, kept: list[int], rows: list[int], n: int) -> None:
    """What layers and outputs have of the examples ``rows``, which are ``part`` of a batch."""
    m, places = len(rows), [kept.index(i) for i in rows]

    def changed(lefts: list[Tensor], rights: list[Tensor], *, scores: bool) -> int | None:
        return next(
            (
                i
                for i, place, right in zip(rows, places, rights, strict=False)
                if place < len(lefts)
                and (not scores or lefts[place].shape == right.shape)
                and differ(lefts[place], right, masked=scores)
            ),
            None,
        )

    for name, first, other in calls_in_both(whole.layers, part.layers):
        if first.rows * m != other.rows * n:
            raise IsolationError(
                f"'{name}' works on {first.rows} rows in a batch of {n} examples and on {other.rows} in one of {m}: "
                "not on as many of each, so that they cannot be told apart by example. Keep padding in (PyTorch's own "
                "attention does), or leave the module out of the private layers."
            )
        if (i := changed(first.given, other.given, scores=False)) is not None:
            raise IsolationError(_counted(f"What '{name}' is given of", i))
    for lefts, rights in zip(whole.outputs, part.outputs, strict=False):
        if (i := changed(lefts, rights, scores=True)) is not None:
            raise IsolationError(_counted("The output for", i))


def _others(some: list[int], n: int) -> list[list[int]]:
    """The examples that are not among these, in parts of about as many; of two at least."""
    rest = sorted(set(range(n)) - set(some))
    if len(rest) == 1:
        rest.append(some[0])
    count = max(len(rest) // len(some), 1)
    return [rest[start::count] for start in range(count)]


def _chosen_for(
    whole: Quiet, part: Quiet, place: int, rows: list[int], n: int, reduction: LossReduction | None
) -> int | None:
    """An example for which the loss at this place is another in the whole batch than in the part with these rows."""
    vector = place in whole.values
    if vector:
        changed = is_another({"": [whole.values[place]]}, {"": [part.values[place]]}, rows, n)
        if changed is not None:
            return changed
    kinds = ("sum",) if vector else (reduction,) if reduction else ("mean", "sum")
    found = [
        is_another(
            whole.gradients.get(place, {}),
            part.gradients.get(place, {}),
            rows,
            n,
            (n, len(rows)) if kind == "mean" else (1, 1),
        )
        for kind in kinds
    ]
    return None if None in found else found[0]


def check_choices(trials: Trials, steady: Trace, call: Any, n: int) -> None:
    """The first example beside noise: what all of a batch choose together, such as the frequencies that are kept, is
    the same for any examples that are alike, and another for these.

    Raises:
        IsolationError: an output changes, or what a layer is given.
    """
    noisy = batch_calls.beside_noise(call, n, trials.seed)
    other = None if noisy is None else attempt(trials, noisy, ragged=True, still=steady.still)
    if other is None:
        return
    pairs = [("output", left, right) for left, right in steady.beside(other, n, n)]
    pairs += [(f"input of '{name}'", left, right) for name, left, right in calls_in_both(steady.inputs, other.inputs)]
    for what, left, right in pairs:
        if left.shape != right.shape or left.shape[0] % n:
            continue
        own, found = rows_of(left, n)[0], rows_of(right, n)[0]
        if own.is_floating_point():  # a choice is no small matter, and the others are large
            found = own + (found - own) / _SMALL
        if differ(own, found, masked=what == "output"):
            raise IsolationError(
                f"The {what} of an example changes where the others are noise: find what is chosen for all examples of "
                "a batch together, and choose it for each, or once for all data by public numbers."
            )


def check_buffers(base: Trace, other: Trace) -> None:
    """Refuse where a buffer is another after the one pass than after the other, whose examples differ.

    Raises:
        IsolationError: naming the buffer.
    """
    for name, buffer in base.buffers.items():
        # To the bit: however slowly it takes them up, nothing hides it.
        if name not in other.buffers or not same(buffer, other.buffers[name]):
            raise IsolationError(
                f"The buffer '{name}' takes up statistics of the examples, which nothing clips or noises: switch them "
                "off (track_running_stats=False, say) or keep that module in eval()."
            )


def check_written(trials: Trials, call: Any, n: int, *, ragged: bool) -> None:
    """Refuse where buffers change with the examples of this batch: each half of them is put in the other's place.

    Args:
        trials, call, n: as above.
        ragged: whether the model need not take what its buffers hold now, which is no value of its own.

    Raises:
        IsolationError: naming the buffer.
    """
    rows, half = list(range(n)), n // 2
    others = (
        [batch_calls.changed(call, n)]
        if n == 1
        else [batch_calls.take(call, (part * n)[:n], n) for part in (rows[:half], rows[half:])]
    )
    if (base := attempt(trials, call, ragged=ragged)) is None:
        return
    ragged |= bool(batch_calls.of_whole_batch(call, n))
    for other in others:
        if (found := attempt(trials, other, ragged=ragged)) is not None:
            check_buffers(base, found)


def check_padding(
    trials: Trials,
    steady: Trace,
    call: Any,
    n: int,
    reduction: LossReduction | None,
    passed: frozenset[int],
    known: bool,
    seen: Seen,
) -> bool:
    """With less padding: what the longest example of a batch does to all others. Whether some was there.

    Raises:
        IsolationError: that changes with it; or the model takes none of the narrower batches, although what is padded
            has been of several sizes.
    """
    tried, untried = set(), set()
    for lengths in batch_padding.narrowed(call, n, by_runs=known, least=True, each=True, masks=seen.masks):
        for narrow in lengths:
            # A model of one fixed width cannot be padded otherwise; one of blocks takes the next length.
            other = attempt(trials, narrow.call, ragged=True, still=steady.still)
            if other is not None:
                tried.add(narrow.tokens)
                _compare_narrowed(steady, other, narrow, n, reduction, passed)
                break
        else:
            if known and (lengths[0].name, lengths[0].place) in seen.varied:
                untried.add(lengths[0].tokens)
    if untried - tried:
        raise IsolationError(_UNTRIED_PADDING)
    return bool(tried)


def warn_of_width(
    trials: Trials, steady: Trace, call: Any, n: int, reduction: LossReduction | None, seen: Seen
) -> None:
    """Warn where all batches have one width so far, and the model looks at padding: nobody can tell whether that width
    is a public number or the longest example of the data, which would then move all others."""
    for lengths in batch_padding.narrowed(call, n, by_runs="whole numbers", masks=seen.masks):
        for narrow in lengths:
            if (other := attempt(trials, narrow.call, ragged=True, still=steady.still)) is not None:
                break
        else:
            continue
        try:
            _compare_narrowed(steady, other, narrow, n, reduction, frozenset())
        except IsolationError:
            warnings.warn(
                f"The model looks at padding, and all batches are {narrow.tokens} wide: let that be a public number, "
                "as by padding='max_length', and never the longest of your data, by which one example would move all "
                "others.",
                stacklevel=2,
            )
            break


def _compare_narrowed(
    steady: Trace,
    other: Trace,
    narrow: batch_padding.Narrowed,
    n: int,
    reduction: LossReduction | None,
    passed: frozenset[int],
) -> None:
    m = len(narrow.rows)
    cached = getattr(steady.result, "past_key_values", None) is not None
    for left, right in steady.beside(other, n, m):
        _compare_padded(left, right, narrow, n, "output", masked=True, remedy=_NO_CACHE if cached else "")
    for name, left, right in calls_in_both(steady.inputs, other.inputs):
        _compare_padded(left, right, narrow, n, f"input of '{name}'")
    for place, (loss, other_loss) in enumerate(zip(steady.losses, other.losses, strict=False)):
        if (reduction is None and not loss.dim()) or (place and place not in passed):
            continue  # which of the two it is, was not said
        whole, part = steady.backward(sum_of(loss)), other.backward(sum_of(other_loss))
        factor = n / m if reduction != "sum" and not loss.dim() else 1.0
        for name, left, right in pairs_of(whole, part):
            _compare_padded(left * factor, right, narrow, n, f"gradient at '{name}'", summed=True)


def _compare_padded(
    left: Tensor,
    right: Tensor,
    narrow: batch_padding.Narrowed,
    n: int,
    what: str,
    *,
    summed: bool = False,
    masked: bool = False,
    remedy: str = "",
) -> None:
    """An example's values at its own tokens, or all of them where they do not go by token.

    Gradients are ``summed`` over tokens: there must be none at what was cut.
    """
    tokens, m, columns = narrow.tokens, len(narrow.rows), narrow.mask.shape[1]
    if right.shape[0] % m:
        return
    left, right = left.unflatten(0, (n, -1))[narrow.rows], right.unflatten(0, (m, -1))
    if left.shape[1] == right.shape[1] == 1:
        left, right = left.squeeze(1), right.squeeze(1)
    own: Any = [...] * m
    if left.dim() > 1 and left.shape[1] == tokens and right.shape[1] == columns:
        own = narrow.mask
        if summed:
            wide, own = torch.zeros_like(left), torch.ones(m, tokens, dtype=torch.bool, device=left.device)
            wide[:, narrow.kept], own[:, narrow.kept] = right, narrow.mask
            right = wide
        else:
            left = left[:, narrow.kept]
    if left.shape != right.shape:
        return
    for row in range(m):
        if differ(left[row][own[row]], right[row][own[row]], masked=masked):
            raise IsolationError(
                f"The {what} of example {narrow.rows[row]} changes with the padding of the batch, so with its longest "
                f"example ({tokens} or {columns} long): pad every batch to one public width, or use a model that "
                f"passes over padding (by its attention mask, in pooling too).{remedy}"
            )


def check_shared_arguments(trials: Trials, steady: Trace, call: Any, n: int, earlier: Mapping[str, Any]) -> None:
    """What all examples share and differs from batch to batch, put in as it was ``earlier``: one by one, or all at once
    where it is much."""
    for values in [{name: value} for name, value in earlier.items()] if len(earlier) <= _MUCH else [earlier]:
        name = next(iter(values))
        try:
            changed = trials.run(with_shared(call, values), still=steady.still)
        except Exception as error:  # whatever a model says to what does not fit
            raise IsolationError(
                f"The argument {name} of the model differs from batch to batch, and the model does not take it as it "
                f"was in an earlier one ({type(error).__name__}), so that it cannot be tried whether examples meet by "
                "it: leave it out, or let forward make it from what each example has."
            ) from error
        pairs = steady.beside(changed, n, n)
        for loss, other_loss in zip(steady.losses, changed.losses, strict=False):
            pairs += [
                (left, right)
                for _, left, right in pairs_of(steady.backward(sum_of(loss)), changed.backward(sum_of(other_loss)))
            ]
        if any(left.shape == right.shape and differ(left, right) for left, right in pairs):
            raise IsolationError(
                f"The argument {name} of the model differs from batch to batch and changes the gradient of every "
                f"example: if it counts what a batch holds, leave it out; {REMEDY}. A public schedule belongs into an "
                "attribute of the model."
            )
