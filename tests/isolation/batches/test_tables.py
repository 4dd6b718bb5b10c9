"""Tables among a model's arguments, which belong to no example, and trials that the model does not take."""

import pytest
import torch
from torch import Tensor, nn

from lora_dp import DPLinear, IsolationError, PrivacyEngine
from lora_dp.isolation.batches.calls import doubled, take
from lora_dp.isolation.batches.kinds import structure
from lora_dp.isolation.batches.padding import cut
from lora_dp.isolation.batches.tables import Table, put_back, set_apart
from tests.isolation.text_models import Patches, run, texts
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


# Set apart, cut and put back


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


# Checked by hand


def test_the_check_by_hand_knows_tables_by_the_width():
    engine, model = PrivacyEngine("rdp"), Encoder("pools padding")
    make_private(model.train(), batch_size=4, engine=engine)
    with pytest.raises(IsolationError, match="changes with the padding of the batch"):
        engine.check_isolation(model, with_table("positions", 9, 4, 3, 6))
    engine.check_isolation(Encoder("right"), with_table("causal", 9, 4, 3, 6))
