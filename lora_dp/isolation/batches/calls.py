"""A model's call as a batch of examples: its tensors, whose rows belong to which, and other batches made of it.

Tensors whose first dimension is N hold one entry for each example. Others belong to the batch as a whole: a table of
positions, or the patches of all images in one tensor.
"""

import inspect
import numbers
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_dp.isolation.batches.objects import WHOLE
from lora_dp.isolation.trial_values import largest

Call = tuple[tuple[Any, ...], dict[str, Any]]


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(tree)[0]]


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in what a model returned, in order: in containers of any kind, and in objects by their attributes.

    What several lists or objects hold counts where it is met first: objects may know each other.
    """
    found, known, left = [], set(), [tree]
    while left:
        part = left.pop()
        if isinstance(part, Tensor):
            found.append(part)
        if id(part) in known or isinstance(part, (Tensor, WHOLE)):
            continue
        if isinstance(part, dict):
            inner = list(part.values())
        elif isinstance(part, list | tuple | set):
            inner = list(part)
        else:
            inner = list(vars(part).values()) if hasattr(part, "__dict__") else []
        known.add(id(part))
        left += reversed(inner)
    return found


def argument_names(forward: Callable[..., Any], count: int) -> tuple[str, ...]:
    """What a function calls its first ``count`` arguments; () where they have no names of their own."""
    try:
        parameters = list(inspect.signature(forward).parameters.values())[:count]
    except ValueError:  # one of C's
        return ()
    known = len(parameters) == count and all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    return tuple(p.name for p in parameters) if known else ()


def named(names: tuple[str, ...], call: Call) -> Call:
    """The same call by keywords, so that what arguments are called is known."""
    args, kwargs = call
    return ((), {**dict(zip(names, args, strict=True)), **kwargs}) if len(names) == len(args) else call


def is_by_example(leaf: Any, n: int) -> bool:
    """Whether it is a tensor with one entry for each example."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == n


def of_whole_batch(tree: Any, n: int) -> list[Tensor]:
    """Tensors that hold rows of all examples together: no entry for each example, and no single row to broadcast."""
    return [
        leaf
        for _, leaf in named_leaves(tree)
        if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] not in (n, 1)
    ]


def is_index(leaf: Tensor) -> bool:
    """Offsets of groups, or for each row the group that it belongs to."""
    return leaf.dim() == 1 and leaf.numel() > 1 and leaf.dtype in (torch.int32, torch.int64) and int(leaf.max()) < 2**24


def groups_of(leaf: Tensor) -> tuple[Tensor, Tensor]:
    """How large the groups are, if these are their offsets, and if these are the groups to which rows belong."""
    return leaf.diff(), torch.bincount(leaf.clamp(min=0))


def even(values: Tensor) -> bool:
    return bool((values == values[:1]).all())


def take(tree: Any, rows: Sequence[int], n: int) -> Any:
    """The same call for these examples alone, in this order; what is not by example stays."""

    def part(leaf: Any) -> Any:
        return leaf[torch.tensor(rows, device=leaf.device)] if is_by_example(leaf, n) else leaf

    return pytree.tree_map(part, tree)


def doubled(tree: Any, n: int) -> Any:
    """Every example twice: what can be done to a batch that cannot be taken apart. Of ``n`` examples, the offsets of
    groups of rows, and the groups to which rows belong, go on where they ended."""
    rows = {len(leaf) for leaf in of_whole_batch(tree, n)}

    def twice(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] == 1:
            return leaf
        if not is_by_example(leaf, n) and is_index(leaf):
            if len(leaf) == n + 1 and leaf[0] == 0 and bool((leaf.diff() >= 0).all()) and int(leaf[-1]) in rows:
                return torch.cat([leaf, leaf[1:] + leaf[-1]])
            if int(leaf.min()) >= -1 and int(leaf.max()) == n - 1:
                return torch.cat([leaf, torch.where(leaf < 0, leaf, leaf + n)])
        return torch.cat([leaf, leaf])

    return pytree.tree_map(twice, tree)


def without_nan(values: Tensor) -> Tensor:
    """The same values, NaN as a number that equals itself: padding may be NaN, as any other value."""
    return (
        values.nan_to_num(torch.finfo(values.dtype).max / 3, torch.inf, -torch.inf)
        if values.is_floating_point()
        else values
    )


def widths(tree: Any, n: int) -> Hashable:
    """The sizes of what an example holds: where they differ from batch to batch, somebody is padded."""
    return tuple(tuple(leaf.shape[1:]) for _, leaf in named_leaves(tree) if is_by_example(leaf, n))


def changed(tree: Any, n: int) -> Any:
    """Other examples, as a model would take them: other numbers, and tokens that stand in the batch themselves."""

    def other(leaf: Any) -> Any:
        if is_by_example(leaf, n) and leaf.is_floating_point():
            return leaf * 1.5 + 0.25
        if is_by_example(leaf, n) and leaf.dim() == 1 and leaf.dtype != torch.bool:
            return torch.where(leaf > 0, leaf - 1, torch.where(leaf == 0, 1, leaf))  # an id or a label beside it
        return leaf[..., :1].expand_as(leaf) if is_by_example(leaf, n) and leaf.dim() > 1 else leaf

    return pytree.tree_map(other, tree)


def beside_noise(tree: Any, n: int, seed: int) -> Any:
    """The first example beside noise ten times as large as any of them; None where no numbers but masks are given."""
    generator, found = torch.Generator().manual_seed(seed), False

    def other(leaf: Any) -> Any:
        nonlocal found
        if (
            not is_by_example(leaf, n)
            or leaf.dim() < 2
            or not leaf.is_floating_point()
            or bool(((leaf == 0) | (leaf == 1)).all())
        ):
            return leaf
        found = True
        noisy = leaf.clone()  # of the same strides, by which kernels are chosen, and so their rounding
        noisy[1:] = torch.randn(noisy[1:].shape, generator=generator) * (10 * largest(leaf.detach()))
        return noisy

    changed_tree = pytree.tree_map(other, tree)
    return changed_tree if found else None


def numbers_in(tree: Any) -> dict[str, float]:
    """Numbers among the arguments, by name: such as how many tokens the batch has."""
    found = {}
    for name, leaf in named_leaves(tree):
        single = isinstance(leaf, Tensor) and leaf.dim() == 0 and leaf.dtype != torch.bool
        if single or (isinstance(leaf, numbers.Real) and not isinstance(leaf, bool)):
            found[name] = float(leaf)
    return found
