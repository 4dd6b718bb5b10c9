"""Padding in a batch: which tokens are padding, told by masks, ignored labels or runs of one value; and less of it."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_dp.isolation.batches.calls import is_by_example, named_leaves, take, tensors_in, without_nan
from lora_dp.isolation.batches.tables import Table
from lora_dp.losses import IGNORED


def runs_of(leaf: Tensor) -> list[Tensor]:
    """In how many equal numbers, or slices of one number, each example ends and begins: padding of texts and series
    that no mask shows. Of images that is not asked."""
    if leaf.dim() not in (2, 3) or (leaf.dim() == 3 and not leaf.is_floating_point()):
        return []
    slices = without_nan(leaf.detach()).flatten(2) if leaf.dim() > 2 else without_nan(leaf.detach()).unsqueeze(2)
    return [run_at(slices, at_end=at_end)[1] for at_end in (True, False)]


def run_at(slices: Tensor, *, at_end: bool) -> tuple[Tensor, Tensor]:
    """Of (N, T, …), each example's number at an end, and how many slices there hold nothing else."""
    corner = slices[:, -1 if at_end else 0, 0]
    same = (slices == corner.view(-1, 1, 1)).all(2)
    return corner, (same.flip(1) if at_end else same).long().cumprod(1).sum(1)


class _Room(NamedTuple):
    """One piece of evidence for padding.

    Attributes:
        name: of the tensor that shows it.
        place: the dimension that is padded.
        size: how long it is.
        used: (N, size) bool, False where an example has padding.
    """

    name: str
    place: int
    size: int
    used: Tensor


def telling_masks(tree: Any, n: int) -> set[str]:
    """The names of masks that show padding."""
    return {
        name
        for name, leaf in named_leaves(tree)
        if is_by_example(leaf, n) and leaf.dim() > 1 and "mask" in name and not bool(leaf.all())
    }


def _rooms(tree: Any, n: int, by_runs: bool | Literal["whole numbers"], masks: Collection[str] = ()) -> Iterator[_Room]:
    """By masks, by labels that are ignored, and by runs of one value at the start or end of any dimension.

    Each by itself: a mask of ones says nothing against the zeros that end the rows beside it, if it always was.
    """
    # Where a mask knows of padding, it tells all that is as wide: a text may end in one word twice, an image in black.
    telling = {*telling_masks(tree, n), *masks}
    told = {
        size
        for name, leaf in named_leaves(tree)
        if name in telling and isinstance(leaf, Tensor)
        for size in leaf.shape[1:]
    }
    for name, leaf in named_leaves(tree):
        if not is_by_example(leaf, n) or not leaf.numel():
            continue
        if leaf.dim() == 2 and "mask" in name:
            yield _Room(name, 1, leaf.shape[1], leaf != 0)
            continue
        if leaf.dim() == 2 and "label" in name and not leaf.is_floating_point():
            yield _Room(name, 1, leaf.shape[1], leaf != IGNORED)
        runs = by_runs is True or (by_runs and not leaf.is_floating_point())
        for place in range(1, leaf.dim()) if runs else ():
            if leaf.shape[place] in told and "mask" not in name:
                continue
            if (found := _without_runs(leaf, place)) is not None:
                yield _Room(name, place, leaf.shape[place], found)


def _without_runs(leaf: Tensor, place: int) -> Tensor | None:
    """(N, size) False in each example's last run of slices that hold one value, or its first if no last ones differ."""
    leaf = without_nan(leaf)
    slices = leaf.transpose(1, place).flatten(2) if leaf.dim() > 2 else leaf.unsqueeze(2)
    size = slices.shape[1]
    columns = torch.arange(size, device=leaf.device)
    for at_end in (True, False):
        corner, length = run_at(slices, at_end=at_end)
        # Padding is what most rows end in; of single values, in a run of more than one.
        if int(length.max()) < 2:
            continue
        pad = corner[length > (1 if leaf.dim() == 2 else 0)].mode().values
        if leaf.dim() == 2 and int(((corner == pad) & (length > 1)).sum()) < min(2, len(leaf) - 1):
            continue
        length = torch.where(corner == pad, length, torch.zeros_like(length))
        if bool((length == length[0]).all()) and bool((leaf != leaf[:1]).any()):
            continue  # all alike: a border, say; of one example alone, and its copies, that cannot be told
        length = length.unsqueeze(1)
        return columns < size - length if at_end else columns >= length
    return None


def used_tokens(tree: Any, n: int) -> Tensor | None:
    """(N, T) bool, False where a mask or ignored labels show padding; None where nothing shows it."""
    return next((room.used.as_subclass(Tensor) for room in _rooms(tree, n, by_runs=False)), None)


class Narrowed(NamedTuple):
    """Some examples of a batch, without padding that they have in common.

    Attributes:
        name: of the tensor that showed it.
        rows: their places in the batch.
        place: the dimension that was padded, of the tensor that showed it.
        tokens: how long it was.
        kept: what is left of it.
        mask: (rows, length left) bool, True where an example has no padding.
        call: the same call for them alone.
    """

    name: str
    rows: list[int]
    place: int
    tokens: int
    kept: slice
    mask: Tensor
    call: Any


# Models that work on blocks take some lengths only: a multiple of these is tried where another fails.
_BLOCKS = (1, 2, 8, 16, 64)


def narrowed(
    tree: Any,
    n: int,
    *,
    by_runs: bool | Literal["whole numbers"] = True,
    least: bool = False,
    each: bool = False,
    masks: Collection[str] = (),
) -> Iterator[list[Narrowed]]:
    """For each piece of evidence and each end: the call for some examples with less padding, in lengths to try in turn
    until the model takes one; what else has that width is cut in one way after the other.

    Args:
        tree, n: the batch, of at least two examples.
        by_runs: whether a run of one value is evidence, too: only where batches are known to differ in size, since
            images have borders; in tensors of whole numbers, or in any.
        least: whether to end with one token less, which models take that need some.
        each: whether every padded example comes without any padding, too, beside itself: a model that takes a maximum
            looks at the padding of some of them only.
        masks: names of those that have shown padding in another batch.
    """
    for evidence in _rooms(tree, n, by_runs, masks):
        _, _, size, used = evidence
        columns = torch.arange(size, device=used.device)
        anything = used.any(1)
        first, last = torch.where(used, columns, size).amin(1), torch.where(used, columns, -1).amax(1)
        for left, room in ((False, size - 1 - last), (True, first)):
            room = torch.where(anything, room, torch.zeros_like(room))
            ranked = torch.argsort(room, descending=True, stable=True)
            # Two with the most room, so that they have company; one if nobody else is padded.
            padded = [i for i in ranked.tolist() if int(room[i]) > 0]
            if not padded:
                continue
            together = sorted(padded[:2])
            alone = [[i, i] for i in padded if i not in together or room[i] > room[together].min()]
            for rows in (together, *(alone if each else ())):
                if found := _without_padding(tree, n, evidence, rows, size - int(room[rows].min()), left, least):
                    yield found


def _without_padding(
    tree: Any, n: int, evidence: _Room, rows: list[int], needed: int, left: bool, least: bool
) -> list[Narrowed]:
    """The call for these examples in lengths of ``needed`` and more, cut at the ``left`` or the right."""
    name, place, size, used = evidence
    lengths = {-(-needed // block) * block for block in _BLOCKS} | ({size - 1} if least else set())
    part, found, shapes = take(tree, rows, n), [], set()
    for way in ("padded", "all", "plain"):
        for length in (length for length in sorted(lengths) if needed <= length < size):
            kept = slice(size - length, size) if left else slice(0, length)
            call = cut(part, name, place, size, kept, way)
            made = tuple(tensor.shape for tensor in tensors_in(call))
            if made not in shapes:
                shapes.add(made)
                found.append(Narrowed(name, rows, place, size, kept, used[rows][:, kept], call))
    return found


Way = Literal["plain", "padded", "all"]


def cut(tree: Any, name: str, place: int, size: int, kept: slice, way: Way = "plain") -> Any:
    """The same tree with this part alone of the dimension ``place`` of tensor ``name``, and of what goes with it.

    Beside (N, T, …), that is a mask of pixels, and matrices of attention, which have the length twice.

    Args:
        way: "plain" for these alone; "padded" for tables, too, and for any dimension in which nothing but padding is
            cut off, as in adjacency (N, T, T); "all" for whatever has that size, in the tensor itself
            if it is a mask.
    """

    def one(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, Table):
            return Table(
                _kept(
                    leaf.tensor,
                    [
                        dimension
                        for dimension in range(leaf.tensor.dim())
                        if way != "plain" and dimension not in leaf.free and leaf.tensor.shape[dimension] == size
                    ],
                    kept,
                ),
                leaf.free,
            )
        if not isinstance(leaf, Tensor):
            return leaf
        own, masks = pytree.keystr(path) == name, "mask" in pytree.keystr(path)

        def goes_with(dimension: int) -> bool:
            if own:
                return dimension == place or (masks and way == "all")
            return dimension in (1, place) or way == "all" or (masks and leaf.dim() in (4, dimension + 1))

        same = [dimension for dimension in range(1, leaf.dim()) if leaf.shape[dimension] == size]
        chosen = [dimension for dimension in same if goes_with(dimension)]
        if chosen and way != "plain":
            chosen += [
                dimension
                for dimension in same
                if dimension not in chosen and _ends_alike(_kept(leaf, chosen, kept), dimension, kept)
            ]
        return _kept(leaf, chosen, kept)

    return pytree.tree_map_with_path(one, tree)


def _kept(leaf: Tensor, dimensions: Sequence[int], kept: slice) -> Tensor:
    for dimension in dimensions:
        leaf = leaf[(slice(None),) * dimension + (kept,)]
    return leaf


def _ends_alike(leaf: Tensor, dimension: int, kept: slice) -> bool:
    """Whether what would be cut off is one value."""
    size = leaf.shape[dimension]
    rest = without_nan(leaf.narrow(dimension, *((0, kept.start) if kept.start else (kept.stop, size - kept.stop))))
    return bool((rest == rest.flatten()[:1]).all())
