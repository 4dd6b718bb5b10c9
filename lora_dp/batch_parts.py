"""The arguments of a model's call as a batch of examples: its structure, parts of it, and narrower padding.

Tensors whose first dimension is N hold one entry for each example. Others belong to the batch as a whole: a table of
positions, or the patches of all images in one tensor.
"""

import inspect
import numbers
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_dp.losses import IGNORED
from lora_dp.number_lists import EntrySizes
from lora_dp.opened import WHOLE
from lora_dp.tables import Table
from lora_dp.trial_values import largest

Call = tuple[tuple[Any, ...], dict[str, Any]]
# Names of integer arguments that say of each token or example what it counts for.
_LABELS = ("label", "position", "target")
# Numbers in the name of a group of examples, at most.
_NAME = 8
# And in a row of which one number by itself may be the name.
_NAMES = 4


def _leaves(tree: Any) -> list[tuple[str, Any]]:
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
    return [leaf for _, leaf in _leaves(tree)
            if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] not in (n, 1)]


def structure(tree: Any, n: int) -> Hashable:
    """What of a batch decides which code runs on it: equal for two batches in which the same could mix.

    Names, dtypes and dimensions (each size up to a factor of two), whether labels are ignored or masked and evenly so,
    whether numbers of examples are all equal, or some of them, what is switched, and, where tensors hold rows of all
    examples together, whether those that may describe the grouping are even.
    """
    described: list[Hashable] = []
    leaves, ragged = _leaves(tree), bool(of_whole_batch(tree, n))
    # A mask tells of padding by itself.
    runs = not any("mask" in name and is_by_example(leaf, n) and leaf.dim() == 2 for name, leaf in leaves)
    for name, leaf in leaves:
        if isinstance(leaf, Table):
            described.append((name, "table", leaf.tensor.dtype, *(size.bit_length() for size in leaf.tensor.shape)))
            continue
        if not isinstance(leaf, Tensor):
            described.append((name, type(leaf).__name__, _setting(leaf)))
            continue
        sizes = ["n" if size == n and place == 0 else size.bit_length() for place, size in enumerate(leaf.shape)]
        described.append((name, leaf.dtype, tuple(sizes), _setting(leaf), *_evenness(name, leaf, n, ragged, runs)))
    return tuple(described)


def _evenness(name: str, leaf: Tensor, n: int, ragged: bool, runs: bool) -> tuple[Hashable, ...]:
    if ragged and not is_by_example(leaf, n) and _is_index(leaf):
        # Whose rows are in another order is another case, though all have as many.
        return *map(_even, _groups(leaf)), bool((leaf.diff() >= 0).all())
    if not is_by_example(leaf, n) or not leaf.numel():
        return ()
    if leaf.dim() == 2 and _marks(name, leaf):
        used = leaf.reshape(n, -1).double().sum(1)
        return bool((leaf == 1).all()), _even(used)
    if leaf.dim() > 2 and "mask" in name:
        return (_even((leaf == leaf.max()).reshape(n, -1).sum(1)),)
    ends = [(int(run.max()).bit_length(), _even(run)) for run in _runs(leaf)] if runs else []
    return bool(_shares(name, leaf, n)), *ends, *_whole_numbers(name, leaf, n, ragged)


def _whole_numbers(name: str, leaf: Tensor, n: int, ragged: bool) -> tuple[Hashable, ...]:
    if leaf.is_floating_point() or leaf.dtype == torch.bool or leaf.dim() > 2:
        return ()
    # Labels that are ignored; and lengths, by which a model trims or packs.
    counted = leaf >= 0
    ignored = bool(counted.all()), _even(counted.reshape(n, -1).sum(1))
    return (*ignored, _reach(name, leaf), _even(leaf) if ragged or leaf.dim() == 1 else None)


def _shares(name: str, leaf: Tensor, n: int) -> list[tuple[Tensor, Tensor]]:
    """Where several examples have the same session, patient or query by name, in all numbers or in one of a few: which
    of the names each has, and how many have it. Nothing where entries by example are no names: masks, places in a text,
    labels of tokens, more numbers than a name has."""
    labels = any(word in name for word in _LABELS) and (leaf.dim() > 1 or "position" in name)
    if not 0 < leaf.numel() <= n * _NAME or labels or (leaf.dim() == 2 and _marks(name, leaf)):
        return []
    rows = leaf.reshape(n, -1)
    columns = rows.split(1, dim=1) if 1 < rows.shape[1] <= _NAMES and not rows.is_floating_point() else ()
    found = [part.unique(dim=0, return_inverse=True, return_counts=True)[1:] for part in (rows, *columns)]
    # A number that all have in common names nobody, unless it is the only one.
    return [(own, counts) for place, (own, counts) in enumerate(found) if (place and 1) < len(counts) < n]


def _runs(leaf: Tensor) -> list[Tensor]:
    """In how many equal numbers, or slices of one number, each example ends and begins: padding of texts and series
    that no mask shows. Of images that is not asked."""
    if leaf.dim() not in (2, 3) or (leaf.dim() == 3 and not leaf.is_floating_point()):
        return []
    slices = without_nan(leaf.detach()).flatten(2) if leaf.dim() > 2 else without_nan(leaf.detach()).unsqueeze(2)
    return [_run(slices, at_end=at_end)[1] for at_end in (True, False)]


def _run(slices: Tensor, *, at_end: bool) -> tuple[Tensor, Tensor]:
    """Of (N, T, …), each example's number at an end, and how many slices there hold nothing else."""
    corner = slices[:, -1 if at_end else 0, 0]
    same = (slices == corner.view(-1, 1, 1)).all(2)
    return corner, (same.flip(1) if at_end else same).long().cumprod(1).sum(1)


def _marks(name: str, leaf: Tensor) -> bool:
    """Whether it says of each token how much it counts."""
    return any(word in name for word in ("mask", "weight")) or (
        (leaf.is_floating_point() or leaf.dtype == torch.bool) and bool(((leaf == 0) | (leaf == 1)).all()))


def _is_index(leaf: Tensor) -> bool:
    """Offsets of groups, or for each row the group that it belongs to."""
    return leaf.dim() == 1 and leaf.numel() > 1 and leaf.dtype in (torch.int32, torch.int64) and int(leaf.max()) < 2**24


def _groups(leaf: Tensor) -> tuple[Tensor, Tensor]:
    """How large the groups are, if these are their offsets, and if these are the groups to which rows belong."""
    return leaf.diff(), torch.bincount(leaf.clamp(min=0))


def _even(values: Tensor) -> bool:
    return bool((values == values[:1]).all())


def _has_reach(name: str, leaf: Tensor) -> bool:
    """A position beyond an example's tokens is passed over."""
    return "position" in name and leaf.dim() == 1


def _reach(name: str, leaf: Tensor) -> int | None:
    return int(leaf.max()) if _has_reach(name, leaf) else None


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
        elif isinstance(leaf, Tensor) and _is_index(leaf):
            for value in _groups(leaf):
                found |= {place for place in (int(value.argmin()), int(value.argmax())) if place < n}
    return found


def doubled(tree: Any, n: int) -> Any:
    """Every example twice: what can be done to a batch that cannot be taken apart. Of ``n`` examples, the offsets of
    groups of rows, and the groups to which rows belong, go on where they ended."""
    rows = {len(leaf) for leaf in of_whole_batch(tree, n)}

    def twice(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] == 1:
            return leaf
        if not is_by_example(leaf, n) and _is_index(leaf):
            if len(leaf) == n + 1 and leaf[0] == 0 and bool((leaf.diff() >= 0).all()) and int(leaf[-1]) in rows:
                return torch.cat([leaf, leaf[1:] + leaf[-1]])
            if int(leaf.min()) >= -1 and int(leaf.max()) == n - 1:
                return torch.cat([leaf, torch.where(leaf < 0, leaf, leaf + n)])
        return torch.cat([leaf, leaf])
    return pytree.tree_map(twice, tree)


def chosen(tree: Any, n: int, most: int) -> list[int]:
    """Examples for a trial, at most ``most``: two that may be of one group, where labels or positions are unusual, two
    of one class, the shortest, the longest, and the first and last; and two more that may be of one group otherwise."""
    unusual, usual = [], []
    groups: list[tuple[Tensor, Tensor]] = []
    classes: list[tuple[Tensor, Tensor]] = []
    for name, leaf in _leaves(tree):
        if is_by_example(leaf, n):
            (classes if any(word in name for word in _LABELS) else groups).extend(_shares(name, leaf, n))
        if is_by_example(leaf, n) and not leaf.is_floating_point() and any(word in name for word in _LABELS):
            entries = leaf.reshape(n, -1)
            counts = (entries >= 0).sum(1)
            if not _even(counts):
                unusual.append(int(counts.argmin()))
                usual.append(int(counts.argmax()))
            if _has_reach(name, leaf):
                unusual.append(int(leaf.argmax()))
    lengths = _lengths(tree, n)
    if lengths is not None:
        unusual.append(int(lengths.argmin()))
        usual.append(int(lengths.argmax()))
    # Two of the smallest groups first; and where there are more than fit, those first that a loss may pass over.
    groups.sort(key=lambda group: -len(group[1]))
    together = [place for group in groups[:1] for place in _two_of(group)]
    of_a_class = [place for group in classes for place in _two_of(group)]
    found = list(dict.fromkeys([*together, *unusual, *of_a_class, *usual, 0, n - 1, *range(n)]))[:most]
    for group in groups[1:2]:
        if len(group[0][found].unique()) == len(found):  # no two of one group yet
            found += _two_of(group)
    return sorted(set(found))


def _two_of(group: tuple[Tensor, Tensor]) -> list[int]:
    """Two examples of the largest of some groups."""
    own, counts = group
    return (own == counts.argmax()).nonzero()[:2, 0].tolist()


def _lengths(tree: Any, n: int) -> Tensor | None:
    for name, leaf in _leaves(tree):
        if is_by_example(leaf, n) and ("mask" in name and leaf.dim() == 2 or isinstance(leaf, EntrySizes)):
            return leaf.as_subclass(Tensor) if leaf.dim() == 1 else (leaf != 0).sum(1)
    # Padding that no mask shows.
    for _, leaf in _leaves(tree):
        if is_by_example(leaf, n) and leaf.numel() and (runs := _runs(leaf)):
            longest = torch.stack(runs).amax(0)
            if not _even(longest):
                return leaf.shape[1] - longest
    return None


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


def _rooms(tree: Any, n: int, by_runs: bool | Literal["whole numbers"]) -> Iterator[_Room]:
    """By masks, by labels that are ignored, and by runs of one value at the start or end of any dimension.

    Each by itself: a mask of ones says nothing against the zeros that end the rows beside it.
    """
    # Where a mask knows of padding, it tells all: a text may end in one word twice, an image in black.
    told = any(is_by_example(leaf, n) and leaf.dim() > 1 and "mask" in name and not bool(leaf.all())
               for name, leaf in _leaves(tree))
    for name, leaf in _leaves(tree):
        if not is_by_example(leaf, n) or not leaf.numel():
            continue
        if leaf.dim() == 2 and "mask" in name:
            yield _Room(name, 1, leaf.shape[1], leaf != 0)
            continue
        if leaf.dim() == 2 and "label" in name and not leaf.is_floating_point():
            yield _Room(name, 1, leaf.shape[1], leaf != IGNORED)
        runs = by_runs is True or (by_runs and not leaf.is_floating_point())
        for place in range(1, leaf.dim()) if runs and ("mask" in name or not told) else ():
            if (found := _without_runs(leaf, place)) is not None:
                yield _Room(name, place, leaf.shape[place], found)


def without_nan(values: Tensor) -> Tensor:
    """The same values, NaN as a number that equals itself: padding may be NaN, as any other value."""
    return values.nan_to_num(torch.finfo(values.dtype).max / 3, torch.inf, -torch.inf) \
        if values.is_floating_point() else values


def _without_runs(leaf: Tensor, place: int) -> Tensor | None:
    """(N, size) False in each example's last run of slices that hold one value, or its first if no last ones differ."""
    leaf = without_nan(leaf)
    slices = leaf.transpose(1, place).flatten(2) if leaf.dim() > 2 else leaf.unsqueeze(2)
    size = slices.shape[1]
    columns = torch.arange(size, device=leaf.device)
    for at_end in (True, False):
        corner, length = _run(slices, at_end=at_end)
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


def widths(tree: Any, n: int) -> Hashable:
    """The sizes of what an example holds: where they differ from batch to batch, somebody is padded."""
    return tuple(tuple(leaf.shape[1:]) for _, leaf in _leaves(tree) if is_by_example(leaf, n))


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
    tree: Any, n: int, *, by_runs: bool | Literal["whole numbers"] = True, least: bool = False, each: bool = False
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
    """
    for evidence in _rooms(tree, n, by_runs):
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
        if not is_by_example(leaf, n) or leaf.dim() < 2 or not leaf.is_floating_point() or bool(
                ((leaf == 0) | (leaf == 1)).all()):
            return leaf
        found = True
        noisy = leaf.clone()  # of the same strides, by which kernels are chosen, and so their rounding
        noisy[1:] = torch.randn(noisy[1:].shape, generator=generator) * (10 * largest(leaf.detach()))
        return noisy

    changed_tree = pytree.tree_map(other, tree)
    return changed_tree if found else None


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
            return Table(_kept(leaf.tensor, [
                dimension for dimension in range(leaf.tensor.dim())
                if way != "plain" and dimension not in leaf.free and leaf.tensor.shape[dimension] == size], kept),
                leaf.free)
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
            chosen += [dimension for dimension in same if dimension not in chosen
                       and _ends_alike(_kept(leaf, chosen, kept), dimension, kept)]
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


def numbers_in(tree: Any) -> dict[str, float]:
    """Numbers among the arguments, by name: such as how many tokens the batch has."""
    found = {}
    for name, leaf in _leaves(tree):
        single = isinstance(leaf, Tensor) and leaf.dim() == 0 and leaf.dtype != torch.bool
        if single or (isinstance(leaf, numbers.Real) and not isinstance(leaf, bool)):
            found[name] = float(leaf)
    return found


def _setting(leaf: Any) -> bool | str | None:
    if isinstance(leaf, bool | str):
        return leaf
    return bool(leaf) if isinstance(leaf, Tensor) and leaf.dim() == 0 and leaf.dtype == torch.bool else None
