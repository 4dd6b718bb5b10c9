"""The arguments of a model's call as a batch of examples: its structure, parts of it, and narrower padding.

Tensors whose first dimension is N hold one entry for each example. Others belong to the batch as a whole: a table of
positions, or the patches of all images in one tensor.
"""

import numbers
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_dp.losses import IGNORED

Call = tuple[tuple[Any, ...], dict[str, Any]]
# Names of integer arguments that say of each token or example what it counts for.
_LABELS = ("label", "position", "target")


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(tree)[0]]


def is_by_example(leaf: Any, n: int) -> bool:
    """Whether it is a tensor with one entry for each example."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == n


def of_whole_batch(tree: Any, n: int) -> list[Tensor]:
    """Tensors that hold rows of all examples together: no entry for each example, and no single row to broadcast."""
    return [leaf for _, leaf in _leaves(tree)
            if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] not in (n, 1)]


def structure(tree: Any, n: int) -> Hashable:
    """What of a batch decides which code runs on it: equal for two batches in which the same could mix.

    Names, dtypes and dimensions (each size up to a factor of two), whether labels are ignored and evenly so, and, where
    tensors hold rows of all examples together, whether those that may describe the grouping are even.
    """
    described: list[Hashable] = []
    ragged = bool(of_whole_batch(tree, n))
    for name, leaf in _leaves(tree):
        if not isinstance(leaf, Tensor):
            described.append((name, type(leaf).__name__, leaf if isinstance(leaf, bool | str) else None))
            continue
        sizes = ["n" if size == n and place == 0 else size.bit_length() for place, size in enumerate(leaf.shape)]
        described.append((name, leaf.dtype, tuple(sizes), *_evenness(name, leaf, n, ragged)))
    return tuple(described)


def _evenness(name: str, leaf: Tensor, n: int, ragged: bool) -> tuple[Hashable, ...]:
    if not is_by_example(leaf, n) or leaf.is_floating_point() or leaf.dtype == torch.bool or not leaf.numel():
        return ()
    if any(word in name for word in _LABELS) and leaf.dim() <= 2:
        counted = (leaf != IGNORED) & (leaf >= 0)
        counts = counted.reshape(n, -1).sum(1)
        return bool(counted.all()), bool((counts == counts[0]).all()), _outside(name, leaf, n)
    if ragged:
        return (bool((leaf == leaf[:1]).all()),)
    return ()


def _outside(name: str, leaf: Tensor, n: int) -> int:
    # A position of an answer beyond the tokens is passed over: how far positions reach, up to a factor of two.
    return int(leaf.max()).bit_length() if "position" in name and leaf.dim() == 1 else 0


def take(tree: Any, rows: Sequence[int], n: int) -> Any:
    """The same call for these examples alone, in this order; what is not by example stays."""
    def part(leaf: Any) -> Any:
        return leaf[torch.tensor(rows, device=leaf.device)] if is_by_example(leaf, n) else leaf
    return pytree.tree_map(part, tree)


def extremes(tree: Any, n: int) -> set[int]:
    """Examples with the least and the most of every integer entry: of unequal groups, the largest is among them."""
    found: set[int] = set()
    for _, leaf in _leaves(tree):
        if is_by_example(leaf, n) and not leaf.is_floating_point() and leaf.dtype != torch.bool and leaf.numel():
            # Of sizes of a grid, the product counts.
            sizes = leaf.reshape(n, -1)
            for value in (sizes.sum(1), sizes.prod(1)):
                found |= {int(value.argmin()), int(value.argmax())}
    return found


def doubled(tree: Any) -> Any:
    """Every example twice: what can be done to a batch that cannot be taken apart."""
    def twice(leaf: Any) -> Any:
        many = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] > 1
        return torch.cat([leaf, leaf]) if many else leaf
    return pytree.tree_map(twice, tree)


def chosen(tree: Any, n: int, most: int) -> list[int]:
    """Examples for a trial, at most ``most``: the first, the last, and those with the fewest and most labels."""
    if n <= most:
        return list(range(n))
    extremes = [0, n - 1]
    for name, leaf in _leaves(tree):
        if is_by_example(leaf, n) and not leaf.is_floating_point() and any(word in name for word in _LABELS):
            counts = (leaf.reshape(n, -1) >= 0).sum(1)
            extremes += [int(counts.argmin()), int(counts.argmax())]
    lengths = _lengths(tree, n)
    if lengths is not None:
        extremes += [int(lengths.argmin()), int(lengths.argmax())]
    found = sorted(set(extremes))
    if len(found) > most:
        found = sorted({0, *found[-(most - 1):]})
    spare = (i for i in range(n) if i not in found)
    while len(found) < most and (extra := next(spare, None)) is not None:
        found.append(extra)
    return sorted(found)


def _lengths(tree: Any, n: int) -> Tensor | None:
    mask = next((leaf for name, leaf in _leaves(tree) if "mask" in name and is_by_example(leaf, n) and leaf.dim() == 2),
                None)
    return None if mask is None else (mask != 0).sum(1)


def _tokens(tree: Any, n: int) -> dict[int, Tensor]:
    """Where tokens are: for each width T of a sequence in the batch (N, T) bool, False for padding.

    By masks, and labels that are ignored; by the value that ends the rows of an integer matrix where neither tells.
    """
    told: dict[int, Tensor] = {}
    matrices = [(name, leaf) for name, leaf in _leaves(tree)
                if is_by_example(leaf, n) and leaf.dim() == 2 and leaf.shape[1] > 1 and leaf.numel()
                and (not leaf.is_floating_point() or "mask" in name)]
    for name, leaf in matrices:
        if "mask" in name:
            held = told.get(leaf.shape[1])
            told[leaf.shape[1]] = leaf != 0 if held is None else held | (leaf != 0)
    masked = set(told)
    for name, leaf in matrices:
        if "label" in name and leaf.shape[1] not in masked:
            told[leaf.shape[1]] = leaf != IGNORED
    for _, leaf in matrices:
        if leaf.shape[1] not in told and (found := _before_padding(leaf)) is not None:
            told[leaf.shape[1]] = found
    return told


def _before_padding(ids: Tensor) -> Tensor | None:
    """All but each row's last run of the value that ends a row more than once; None if no row ends in a run."""
    repeated = ids[:, -1] == ids[:, -2]
    if not bool(repeated.any()):
        return None
    pad = ids[repeated][0, -1]
    return (ids != pad).flip(1).cummax(1).values.flip(1)


def widths(tree: Any, n: int) -> frozenset[int]:
    """How wide the sequences of the batch are, in tokens."""
    return frozenset(leaf.shape[1] for name, leaf in _leaves(tree)
                     if is_by_example(leaf, n) and leaf.dim() == 2 and ("mask" in name or not leaf.is_floating_point()))


class Narrowed(NamedTuple):
    """Some examples of a batch, without padding that they have in common.

    Attributes:
        rows: their places in the batch.
        tokens: how wide the padded sequences were.
        kept: which columns are left.
        mask: (rows, columns left) bool, True for their tokens.
        call: the same call for them alone.
    """

    rows: list[int]
    tokens: int
    kept: slice
    mask: Tensor
    call: Any


def narrowed(tree: Any, n: int) -> Iterator[Narrowed]:
    """For each width and each end at which examples are padded: the call for some of them with less padding."""
    for tokens, mask in _tokens(tree, n).items():
        columns = torch.arange(tokens, device=mask.device)
        any_token = mask.any(1)
        first, last = torch.where(mask, columns, tokens).amin(1), torch.where(mask, columns, -1).amax(1)
        for left, room in ((False, tokens - 1 - last), (True, first)):
            room = torch.where(any_token, room, torch.zeros_like(room))
            ranked = torch.argsort(room, descending=True, stable=True)
            # Two with the most room, so that they have company; one if nobody else is padded.
            places = sorted(ranked[:2].tolist()) if n > 1 and int(room[ranked[1]]) > 0 else ranked[:1].tolist()
            cut = int(room[torch.tensor(places, device=room.device)].min())
            if cut == 0:
                continue
            kept = slice(cut, tokens) if left else slice(0, tokens - cut)
            part = cut_columns(take(tree, places, n), tokens, kept)
            yield Narrowed(places, tokens, kept, mask[places][:, kept], part)


def cut_columns(tree: Any, tokens: int, kept: slice) -> Any:
    """The same tree with these columns alone of everything that is ``tokens`` wide."""
    def cut(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        for place in range(1, leaf.dim()):
            # (N, T, …); and matrices of attention, which have the width twice.
            if leaf.shape[place] == tokens and (place == 1 or (leaf.dim() == 4 and "mask" in pytree.keystr(path))):
                leaf = leaf[(slice(None),) * place + (kept,)]
        return leaf
    return pytree.tree_map_with_path(cut, tree)


def numbers_in(tree: Any) -> dict[str, float]:
    """Numbers among the arguments, by name: such as how many tokens the batch has."""
    found = {}
    for name, leaf in _leaves(tree):
        single = isinstance(leaf, Tensor) and leaf.dim() == 0 and leaf.dtype != torch.bool
        if single or (isinstance(leaf, numbers.Real) and not isinstance(leaf, bool)):
            found[name] = float(leaf)
    return found


def with_numbers(tree: Any, values: dict[str, float]) -> Any:
    """The same call with these numbers in place of its own."""
    flat, form = pytree.tree_flatten_with_path(tree)
    replaced = []
    for path, leaf in flat:
        value = values.get(pytree.keystr(path))
        if value is None:
            replaced.append(leaf)
        else:
            replaced.append(torch.full_like(leaf, value) if isinstance(leaf, Tensor) else type(leaf)(value))
    return pytree.tree_unflatten(replaced, form)
