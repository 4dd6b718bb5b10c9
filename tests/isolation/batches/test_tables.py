"""Tables among a model's arguments, which belong to no example, and trials that the model does not take."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_dp import DPLinear, IsolationError, PrivacyEngine
from lora_dp.isolation.batches.calls import doubled, take
from lora_dp.isolation.batches.kinds import structure
from lora_dp.isolation.batches.padding import cut
from lora_dp.isolation.batches.sizes import Sizes
from lora_dp.isolation.batches.tables import Table, put_back, set_apart
from tests.isolation.test_batch_trials import Patches, run, texts
from tests.support import make_private

WORDS = 40
LENGTHS = ((5, 5, 3, 5), (9, 4, 3, 6, 5))


class Encoder(nn.Module):
    """Tokens that look at each other, and a mean over tokens alone or over padding too, or one that counts examples."""

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.words, self.places = kind, nn.Embedding(WORDS, 8), nn.Embedding(64, 8)
        self.words.requires_grad_(False), self.places.requires_grad_(False)
        self.inner, self.head = DPLinear(8, 8), DPLinear(8, 3)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        causal: Tensor | None = None,
        positions: Tensor | None = None,
        distances: Tensor | None = None,
    ) -> Tensor:
        if attention_mask.dim() == 4:
            mask, attention_mask = attention_mask[:, 0], attention_mask[:, 0, 0]
            assert mask.shape[1:] == (input_ids.shape[1],) * 2
        hidden = self.inner(self.words(input_ids)).tanh()
        if positions is not None:
            hidden = hidden + self.places(positions)
        scores = hidden @ hidden.transpose(1, 2) + (attention_mask - 1).unsqueeze(1) * 1e4
        if causal is not None:
            scores = scores.masked_fill(causal, -1e4)
        if distances is not None:
            scores = scores - distances
        hidden = hidden + scores.softmax(2) @ hidden
        weights = torch.ones_like(attention_mask) if self.kind == "pools padding" else attention_mask
        out = self.head((hidden * weights.unsqueeze(2)).sum(1) / weights.sum(1, keepdim=True))
        return out * 8 / len(out) if self.kind == "counts" else out


def with_table(name: str, *lengths: int) -> dict[str, Tensor]:
    batch = texts(*lengths)
    width = max(lengths)
    columns = torch.arange(width)
    distances = (columns.unsqueeze(1) - columns).abs() / 9
    return {
        **batch,
        **{
            "none": {},
            "positions": {"positions": columns},
            "causal": {"causal": columns > columns.unsqueeze(1)},
            "distances": {"distances": distances},
            "one row": {"positions": columns.unsqueeze(0)},
            "four dimensions": {"attention_mask": batch["attention_mask"][:, None, None].expand(-1, 1, width, -1)},
            "of each": {"distances": distances.expand(len(lengths), width, width)},
        }[name],
    }


TABLES = ["none", "positions", "causal", "distances", "one row", "of each", "four dimensions"]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    ("kind", "words"),
    [("pools padding", "changes with the padding of the batch"), ("counts", "changes with the number of examples")],
)
def test_a_table_beside_the_texts_hides_nothing(kind, words, table):
    with pytest.raises(IsolationError, match=words):
        run(Encoder(kind), *[with_table(table, *lengths) for lengths in LENGTHS])
    run(Encoder("right"), *[with_table(table, *lengths) for lengths in LENGTHS])


class Graphs(nn.Module):
    """Nodes and what joins them, padded to the largest graph of the batch."""

    def __init__(self, masked: bool):
        super().__init__()
        torch.manual_seed(0)
        self.masked, self.inner, self.head = masked, DPLinear(4, 8), DPLinear(8, 3)

    def forward(self, joined: Tensor, nodes: Tensor) -> Tensor:
        hidden = (joined if joined.dim() == 3 else joined.sum(3)) @ self.inner(nodes).tanh()
        used = (nodes != 0).any(2, keepdim=True) if self.masked else torch.ones_like(nodes[:, :, :1])
        return self.head((hidden * used).sum(1) / used.sum(1))


def graphs(features: bool, *sizes: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(sizes))
    nodes, joined = torch.zeros(len(sizes), max(sizes), 4), torch.zeros(len(sizes), max(sizes), max(sizes))
    for row, size in enumerate(sizes):
        nodes[row, :size] = torch.randn(size, 4, generator=generator)
        joined[row, :size, :size] = (torch.rand(size, size, generator=generator) > 0.5).float() + torch.eye(size)
    return {"joined": torch.stack([joined, joined], 3) if features else joined, "nodes": nodes}


@pytest.mark.parametrize("features", [False, True])
def test_what_joins_the_nodes_of_a_graph_hides_nothing(features):
    """(N, T, T) and (N, T, T, F), padded in two dimensions."""
    batches = [graphs(features, *sizes) for sizes in ((5, 6, 3, 6), (9, 4, 3, 6))]
    with pytest.raises(IsolationError, match="changes with the padding of the batch"):
        run(Graphs(False), *batches)
    run(Graphs(True), *batches)


# Tables of one size


class Classes(nn.Module):
    """Scores by embeddings of the classes, which the model is given."""

    def __init__(self, kind: str = "right"):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.inner = kind, DPLinear(6, 8)

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        out = self.inner(x) @ classes.t()
        if self.kind == "mixes":
            out = out - 0.1 * out.mean(0)
        return out * 8 / len(out) if self.kind == "counts" else out


def scored(n: int, classes: int = 10) -> dict[str, Tensor]:
    return {"x": torch.randn(n, 6), "classes": torch.linspace(-1, 1, 8 * classes).view(classes, 8).sin()}


def test_a_table_as_long_as_a_later_batch_is_still_one():
    model = Classes()
    optimizer = make_private(model.train(), batch_size=8)
    for n in (8, 9, 10, 4, 10):
        model(**scored(n))
        optimizer.recorder.discard()
    assert not optimizer.recorder.padding_varies  # its rows are no width of an example
    run(Encoder("right"), *[{**texts(*[5] * n, width=16), "positions": torch.arange(16)} for n in (12, 15, 16)])


@pytest.mark.parametrize(
    ("sizes", "kind", "words"),
    [((8, 9), "counts", "changes with the number of examples"), ((8, 9, 10), "mixes", "other examples")],
)
def test_beside_a_table_examples_are_held_to_keep_apart(sizes, kind, words):
    """From the second number of examples on a table is known to be one."""
    with pytest.raises(IsolationError, match=words):
        run(Classes(kind), *[scored(n) for n in sizes])


def test_a_table_of_as_many_rows_as_a_trial_takes_is_one():
    run(Classes(), *[scored(n, classes=4) for n in (8, 9, 4)])


# What sizes tell


def sizes_of(*batches: tuple[int, dict[str, tuple[int, ...]]]) -> Any:
    known = Sizes()
    for n, shapes in batches:
        seen = known.look({name: torch.zeros(shape) for name, shape in shapes.items()}, n)
    return seen


def test_a_tensor_is_a_table_if_it_follows_a_width_or_stays():
    def tables(*batches: Any) -> set[str]:
        return {name.strip("[']") for name in sizes_of(*batches).tables}

    def ids(n: int, width: int, *shape: int) -> tuple[int, dict[str, tuple[int, ...]]]:
        return n, {"ids": (n, width), "it": shape}

    assert tables(ids(4, 9, 9)) == tables(ids(4, 9, 9, 9)) == tables(ids(4, 9, 9, 3)) == {"it"}
    assert tables(ids(4, 9, 7)) == tables(ids(4, 9, 4)) == tables(ids(4, 9, 1, 9)) == tables(ids(9, 9, 9)) == set()
    assert tables(ids(4, 9, 7), ids(5, 8, 7)) == tables(ids(4, 9, 7), ids(7, 8, 7)) == {"it"}
    assert tables(ids(4, 9, 9), ids(8, 8, 8)) == {"it"}
    assert tables(ids(4, 9, 7), ids(4, 9, 7)) == set()  # as many examples as before tell nothing
    assert tables(ids(7, 9, 7), ids(7, 8, 7), ids(5, 8, 7)) == {"it"}
    # Rows of the examples, whose number changes: by example in one batch, as many as a width or as before in another.
    for last in (ids(6, 9, 6), ids(7, 8, 8), ids(5, 9, 6)):
        assert tables(ids(4, 9, 7), ids(5, 9, 6), last) == set()
    # What has always had an entry for each example, whatever else is as long.
    assert tables(ids(4, 4, 4), ids(5, 5, 5), ids(9, 9, 9), ids(4, 9, 4)) == set()
    # Known to have no entry for each example, from the first time on.
    assert tables(ids(4, 4, 4), ids(5, 5, 5), ids(9, 9, 9), ids(4, 9, 9), ids(4, 4, 4)) == {"it"}
    assert tables(ids(4, 9, 7), ids(5, 9, 7), ids(4, 9, 7)) == {"it"}
    assert tables(ids(7, 9, 7), ids(5, 9, 7), ids(8, 9, 7), ids(6, 9, 6), ids(5, 9, 7)) == set()
    assert tables((0, {"ids": (0, 9), "it": (9,)})) == set()
    assert tables(ids(4, 9, 2), ids(5, 9, 2)) == {"it"}
    assert tables(ids(4, 9, 1), ids(5, 9, 1)) == set()  # one row for all examples
    # As long as a width of what is not by example, as another table is.
    assert tables((4, {"ids": (4, 9), "it": (7, 3), "other": (8, 7)})) == set()


def test_what_of_a_table_follows_no_width_is_remembered():
    first, second = (4, {"ids": (4, 9), "it": (9, 8)}), (4, {"ids": (4, 8), "it": (8, 8)})
    assert sizes_of(second).tables == {"['it']": frozenset()}
    assert sizes_of(first, second).tables == {"['it']": frozenset({1})}


def test_what_has_been_of_several_sizes():
    batches = [(4, {"ids": (4, 9), "x": (4, 3, 8), "y": (4,)}), (5, {"ids": (5, 9), "x": (5, 3, 7), "y": (5, 1)})]
    assert sizes_of(batches[0]).varied == set() and not sizes_of(batches[0], batches[0]).number
    assert sizes_of(*batches).varied == {("['x']", 2)} and sizes_of(*batches).number
    assert sizes_of(*batches, (5, {"ids": (5, 9)})).varied == {("['x']", 2)}


def test_a_table_is_left_as_it_is_where_examples_are_taken():
    tree = {"x": torch.rand(4, 3), "table": torch.rand(4, 3)}
    apart = set_apart(tree, {"['table']": frozenset()})
    assert isinstance(apart["table"], Table) and set_apart(tree, {}) is tree
    for changed in (take(apart, [0], 4), doubled(apart, 4)):
        assert put_back(changed)["table"] is tree["table"] and len(changed["x"]) != 4
    assert structure(apart, 4) != structure(tree, 4)
    for other in (torch.rand(4, 3).double(), torch.rand(9, 3)):
        assert structure(apart, 4) != structure(set_apart({**tree, "table": other}, {"['table']": frozenset()}), 4)
    longer = {"x": torch.rand(9, 3), "table": torch.rand(5, 3)}
    assert structure(apart, 4) == structure(set_apart(longer, {"['table']": frozenset()}), 9)


def test_tables_are_cut_with_the_examples():
    tree = {
        "ids": torch.rand(4, 9),
        "pairs": torch.rand(4, 9, 9),
        "joined": torch.rand(4, 9, 9),
        "place": torch.rand(9),
        "causal": torch.rand(9, 9),
        "rows": torch.rand(9, 3),
        "classes": torch.rand(9, 9),
        "bias": torch.rand(4, 2, 9, 9),
    }
    tree["joined"][:, 6:], tree["joined"][:, :, 6:] = 0, 0
    tables = {
        "['place']": frozenset[int](),
        "['causal']": frozenset[int](),
        "['rows']": frozenset({1}),
        "['classes']": frozenset({0}),
    }
    found = {
        way: {
            name: tuple(leaf.shape)
            for name, leaf in put_back(cut(set_apart(tree, tables), "['ids']", 1, 9, slice(0, 6), way)).items()
        }
        for way in ("plain", "padded", "all")
    }
    beside = {"ids": (4, 6), "pairs": (4, 6, 9), "joined": (4, 6, 6), "bias": (4, 2, 9, 9)}
    cut_tables = {"place": (6,), "causal": (6, 6), "rows": (6, 3), "classes": (9, 6)}
    assert found["padded"] == {**beside, **cut_tables}
    assert found["all"] == {**beside, **cut_tables, "pairs": (4, 6, 6), "bias": (4, 2, 6, 6)}
    assert found["plain"] == {
        **{name: tuple(leaf.shape) for name, leaf in tree.items()},
        "ids": (4, 6),
        "pairs": (4, 6, 9),
        "joined": (4, 6, 9),
    }
    left = cut({"joined": tree["joined"].flip(1, 2)}, "['joined']", 1, 9, slice(3, 9), "padded")
    assert torch.equal(left["joined"], tree["joined"].flip(1, 2)[:, 3:, 3:])
    assert cut({"mask": torch.rand(4, 9, 9)}, "['mask']", 2, 9, slice(0, 6), "all")["mask"].shape == (4, 6, 6)
    # Of an image whose height is its width, rows that hold something are kept.
    assert cut({"x": torch.rand(4, 9, 9)}, "['x']", 2, 9, slice(0, 6), "all")["x"].shape == (4, 9, 6)


def test_groups_of_rows_go_on_where_they_ended():
    tree = {
        "rows": torch.rand(7, 2),
        "ends": torch.tensor([0, 3, 3, 7]),
        "of": torch.tensor([0, 0, 0, -1, 2, 2, 2]),
        "x": torch.arange(3),
        "other": torch.tensor([0, 3, 3, 6]),
        "labels": torch.tensor([-2, 0, 1, 2, 2]),
    }
    found = doubled(tree, 3)
    assert found["ends"].tolist() == [0, 3, 3, 7, 10, 10, 14] and found["x"].tolist() == [0, 1, 2, 0, 1, 2]
    assert found["of"].tolist() == [0, 0, 0, -1, 2, 2, 2, 3, 3, 3, -1, 5, 5, 5]
    assert found["other"].tolist() == [0, 3, 3, 6] * 2 and found["rows"].shape == (14, 2)
    assert found["labels"].tolist() == [-2, 0, 1, 2, 2] * 2


# Rows that look like a table


def images_beside(width: int, *sizes: tuple[int, int]) -> dict[str, Tensor]:
    counts = torch.tensor(sizes)
    patches = torch.randn(int(counts.prod(1).sum()), 6, generator=torch.Generator().manual_seed(0))
    return {"input_ids": torch.ones(len(sizes), width, dtype=torch.long), "counts": counts, "patches": patches}


def test_rows_of_all_examples_as_many_as_a_width_are_tried_as_rows():
    even, uneven = ((2, 2),) * 6, ((2, 2), (2, 5), (2, 1), (2, 2), (1, 2), (1, 2))
    run(Patches(), images_beside(24, *even))
    with pytest.raises(IsolationError, match="attributed to other examples"):
        run(Patches(), images_beside(24, *uneven))


# Trials that the model does not take


class Exact(nn.Module):
    """Refuses what does not fit the plain numbers that it is given beside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.inner, self.head = nn.Embedding(WORDS, 8).requires_grad_(False), DPLinear(8, 8), DPLinear(8, 3)

    def forward(self, input_ids: Tensor, places: list[str]) -> Tensor:
        if len(places) != input_ids.shape[1]:
            raise ValueError("another width")
        return self.head(self.inner(self.words(input_ids)).tanh().mean(1))


def test_padding_that_varies_and_cannot_be_tried_is_refused():
    def exact(*lengths: int, width: int | None = None) -> dict[str, Any]:
        ids = texts(*lengths, width=width)["input_ids"]
        return {"input_ids": ids, "places": ["a place"] * ids.shape[1]}

    with pytest.raises(IsolationError, match="takes none of the same examples with less padding.*to one public width"):
        run(Exact(), exact(9, 4, 3, 6), exact(8, 4, 3, 6))
    run(Exact(), exact(9, 4, 3, 6), exact(8, 4, 3, 6, width=9), exact(4, 4, 3, 2, width=9))


def test_padding_that_the_loader_told_of_is_refused_once_it_varies():
    """Until then it may be of what the model is not given."""
    model = Exact().train()
    optimizer = make_private(model, batch_size=4)
    optimizer.recorder.expect_padding()
    ids = texts(9, 4, 3, 6)["input_ids"]
    for _ in range(2):
        model(ids, ["a place"] * 9)
        optimizer.recorder.discard()
    with pytest.raises(IsolationError, match="takes none of the same examples with less padding"):
        model(ids[:, :8], ["a place"] * 8)


class Short(Exact):
    """Takes texts of five words and more, as a convolution does."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        if input_ids.shape[1] < 5:
            raise ValueError("too short")
        return super().forward(input_ids, [""] * input_ids.shape[1])


def test_one_token_less_is_tried_where_a_model_needs_some():
    with pytest.raises(IsolationError, match="changes with the padding of the batch"):
        run(Short(), *[{"input_ids": texts(*lengths)["input_ids"]} for lengths in ((7, 3, 2, 7), (6, 3, 2, 3))])


class Blocks(Exact):
    """Takes texts in blocks of four words."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,  # type: ignore[override]
        labels: Tensor,
    ) -> Tensor:
        if input_ids.shape[1] % 4:
            raise ValueError("no whole block")
        used = attention_mask.unsqueeze(2)
        return self.head((self.inner(self.words(input_ids)).tanh() * used).sum(1) / used.sum(1))


def test_padding_that_one_tensor_shows_need_not_be_tried_by_another():
    """By the mask a block can be left out, by labels of all but two words none."""

    def blocks(width: int) -> dict[str, Tensor]:
        labels = torch.zeros(4, width, dtype=torch.long)
        labels[:, width - 2 :] = -100
        return {**texts(width, 3, 2, width), "labels": labels}

    run(Blocks(), blocks(16), blocks(12))


class Counted(nn.Module):
    """Rows of all examples and how many each has, in a tuple; of some numbers of examples alone."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.inner, self.most = DPLinear(6, 3), most

    def forward(self, labels: Tensor, rows: Tensor, counts: tuple[int, ...]) -> Tensor:
        assert len(counts) == len(labels) < self.most
        return torch.stack([part.mean(0) for part in self.inner(rows).split(list(counts))]) + 0 * labels.unsqueeze(1)


def test_a_number_of_examples_that_varies_and_cannot_be_tried_is_refused():
    def counted(n: int) -> dict[str, Any]:
        return {"labels": torch.arange(n), "rows": torch.randn(2 * n, 6), "counts": (2,) * n}

    run(Counted(8), counted(4), counted(4))  # one structure, in which it is wanted from the second number on
    run(Counted(11), counted(4), counted(5))
    with pytest.raises(IsolationError, match="does not take every example of this one twice.*whose first dimension is"):
        run(Counted(8), counted(4), counted(5))


def test_the_check_by_hand_knows_tables_by_the_width():
    engine, model = PrivacyEngine("rdp"), Encoder("pools padding")
    make_private(model.train(), batch_size=4, engine=engine)
    with pytest.raises(IsolationError, match="changes with the padding of the batch"):
        engine.check_isolation(model, with_table("positions", 9, 4, 3, 6))
    engine.check_isolation(Encoder("right"), with_table("causal", 9, 4, 3, 6))


class Sideways(nn.Module):
    """Given something of each example along another dimension than the first."""

    def __init__(self) -> None:
        super().__init__()
        self.head = DPLinear(6, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.head(x / (1 + lengths.max())) if lengths.dim() == 2 else self.head(x)


@pytest.mark.parametrize(
    ("lengths", "place"),
    [(lambda n: torch.ones(1, n), 1), (lambda n: torch.ones(2, n), 1), (lambda n: torch.ones(3, 1, n), 2)],
)
def test_examples_in_another_dimension_are_refused_once_it_follows_their_number(lengths, place):
    model = Sideways().train()
    optimizer = make_private(model, batch_size=8)
    for n in (8, 8):
        model(torch.randn(n, 6), lengths(n))
        optimizer.recorder.discard()
    with pytest.raises(IsolationError, match=rf"as long as the batch in dimension {place}"):
        model(torch.randn(9, 6), lengths(9))


def test_a_width_that_is_the_number_of_one_batch_alone_follows_nobody():
    sizes, x = Sizes(), torch.ones(4, 2)
    for n, width in ((4, 4), (4, 4), (6, 5), (5, 5), (7, 7)):
        assert not sizes.look({"x": torch.ones(n, 2), "row": torch.ones(1, width)}, n).sideways
    sizes = Sizes()
    for n in (1, 0, 4, 4):
        assert not sizes.look({"x": torch.ones(n, 2), "row": torch.ones(1, n), "square": torch.ones(n, n)}, n).sideways
    assert sizes.look({"x": x[:3], "row": torch.ones(1, 3), "square": torch.ones(3, 3)}, 3).sideways == {"['row']": 1}
