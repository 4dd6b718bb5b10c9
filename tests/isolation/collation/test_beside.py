"""What comes beside the rows of examples: a statistic of them is refused, what follows widths is taken."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_dp import IsolationError
from tests.isolation.collation.collate_functions import CLOCK, SHARED, Texts, beside, check, labelled, stacked
from tests.models import examples


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 24])
@pytest.mark.parametrize("name", SHARED)
def test_a_statistic_beside_the_rows_is_refused(name, n):
    with pytest.raises(IsolationError, match=r"joins examples: \['it'\]\S*, which has no entry for each example"):
        check(labelled(n, n // 2), beside(SHARED[name]), n)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(
    "of",
    [
        lambda x, y: torch.rand(6),
        lambda x, y: float(np.random.rand()),
        lambda x, y: float(next(CLOCK)),
        lambda x, y: torch.linspace(0, 1, x.shape[1]),
        lambda x, y: torch.ones(6, 6).triu() * -1e4,
        lambda x, y: 1 / len(x),
        lambda x, y: x.reshape(-1),
        lambda x, y: x.reshape(-1, 3),
        lambda x, y: x.t(),
        lambda x, y: len(x) / 4,
    ],
)
def test_what_does_not_follow_the_others_may_come_beside_the_rows(of, n):
    """Drawn once for a batch, a table, its number of examples, the rows of all in one tensor or batch last."""
    assert check(labelled(n), beside(of), n) is False  # type: ignore[arg-type]


def test_what_follows_the_width_may_come_beside_the_rows():
    def collate(items: list[Tensor]) -> dict[str, Any]:
        ids = pad_sequence(items, True)
        width = ids.shape[1]
        return {
            "ids": ids,
            "scale": torch.tensor(width**-0.5),
            "width": float(width),
            "row": torch.full((1, 2), width / 2),
            "causal": torch.full((width, width), -1e4).triu(1),
            "places": torch.linspace(0, 1, width).unsqueeze(0),
        }

    for n in (2, 3, 8, 24):
        assert check(Texts(), collate, n)
    with pytest.raises(IsolationError, match="which has no entry for each example"):
        check(Texts(), lambda items: {**collate(items), "sum": sum(float(item.sum()) for item in items)}, 24)


@pytest.mark.parametrize("n", [2, 3, 8, 24])
def test_images_that_some_examples_have_may_come_beside_the_rows(n):
    """All in one tensor, which is as large with one text more."""

    def collate(items: list[Any]) -> dict[str, Tensor]:
        images = [x for x, y in items if y]
        return {
            "y": torch.tensor([y for _, y in items]),
            "images": torch.stack(images) if images else torch.zeros(0, 6),
        }

    for every in (2, 3):
        data = [(x, int(i % every == 0)) for i, x in enumerate(examples(n)[0])]
        for _ in range(5):
            assert check(data, collate, n) is False  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize(
    "collate",
    [
        list,
        lambda items: tuple(zip(*items, strict=True)),
        lambda items: [{"x": x, "score": float(x[0])} for x, _ in items],
        lambda items: {"x": stacked(items), "scores": [float(x[0]) for x, _ in items]},
        lambda items: [SimpleNamespace(x=x) for x, _ in items],
    ],
)
def test_lists_with_an_entry_for_each_example_may_come_beside_the_rows(collate, n):
    assert check(labelled(n), collate, n) is False  # type: ignore[arg-type]
    with pytest.raises(IsolationError, match="which has no entry for each example"):
        check(labelled(n), lambda items: (collate(items), stacked(items).mean(0)), n)  # type: ignore[arg-type]
