"""Settings and code among a model's arguments are left as they are, and cost a pass little."""

import datetime
import functools
import logging
import re
import threading
import uuid
from collections import Counter
from enum import Enum
from operator import attrgetter, itemgetter, methodcaller
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import BertConfig, DynamicCache

from lora_dp import DPLinear
from lora_dp.isolation.batches.objects import Settings, check_opened, put_together, take_apart
from tests.isolation.batches.object_arguments import Handed, Lengths, lengths_of, train
from tests.support import make_private


@functools.lru_cache
def remembered(x: int) -> int:
    return x


class Several(Enum):
    ONE = 1


HARMLESS: list[Any] = [
    None,
    True,
    3,
    0.5,
    1j,
    "text",
    b"bytes",
    np.float32(2),
    Several.ONE,
    Path("a"),
    re.compile("a"),
    logging.getLogger("a"),
    torch.float16,
    torch.device("cpu"),
    torch.strided,
    torch.contiguous_format,
    torch.Generator(),
    nn.Linear(2, 2),
    int,
    len,
    lengths_of,
    [].append,
    np,
    functools.partial(len),
    {"a", "b"},
    frozenset({"a"}),
    np.array(["a", "b"]),
    [],
    {},
    datetime.date(2026, 1, 2),
    datetime.datetime(2026, 1, 2),
    datetime.time(3),
    datetime.timedelta(1),
    datetime.UTC,
    uuid.uuid4(),
    range(3),
    slice(1, 2),
    ...,
    NotImplemented,
    object(),
    Tensor.relu,
    str.__len__,
    "a".__len__,
    dict.fromkeys,
    np.tanh,
    remembered,
    torch.ops.aten.relu,
    torch.ops.aten.relu.default,
    vars(dict)["fromkeys"],
    itemgetter(1),
    attrgetter("a"),
    methodcaller("a"),
    np.dtype("f4"),
    list[int],
    int | str,
    np,
    threading.Lock(),
    threading.RLock(),
    {f"word {i}": i for i in range(100)},
    {f"{i}": str(i) for i in range(100)},
    Counter("abc"),
]


@pytest.mark.parametrize("value", HARMLESS, ids=lambda value: type(value).__name__)
def test_settings_and_code_are_left_as_they_are(value: Any) -> None:
    given = take_apart({"it": value, "in": Lengths(value)})
    check_opened(given)
    back = put_together(given)
    assert back["it"] is value or back["it"] == value
    assert back["in"].each is value or back["in"].each == value


@pytest.mark.slow
@pytest.mark.parametrize("value", HARMLESS, ids=lambda value: type(value).__name__)
def test_a_model_takes_them(value: Any) -> None:
    model = Handed()
    optimizer = make_private(model, batch_size=4)
    for n in (2, 5, 1):
        train(model, optimizer, torch.randn(n, 6), value, Lengths(value))
    assert {type(given) for given in model.given} == {type(value)}


def test_a_dict_of_many_settings_is_one() -> None:
    words = {f"word {i}": i for i in range(64)}
    few = dict(list(words.items())[:63])
    given = take_apart({"many": words, "few": few, "held": SimpleNamespace(words=words), "rows": {**words, "x": [1]}})
    assert isinstance(given["many"], Settings) and len(given["few"]) == 63 and len(given["rows"]) == 65
    assert given["held"]["words"] is given["many"] == take_apart(dict(words)) != take_apart({**words, "word 1": 2})
    assert hash(given["many"]) == hash(take_apart(dict(words)))
    back = put_together(given)
    assert back["many"] == words and back["many"] is not words and type(back["held"].words) is dict
    words["word 2"] = 5
    assert given["many"] != take_apart(words) and back["many"]["word 2"] == 2


def test_an_object_of_many_settings_is_taken_apart() -> None:
    given = SimpleNamespace(**{f"option_{i}": i for i in range(100)})
    opened = take_apart(given)
    check_opened(opened)
    assert len(pytree.tree_leaves(opened)) == 100 and put_together(opened) == given


def test_a_configuration_of_many_labels_costs_a_pass_little() -> None:
    class Few(BertConfig):
        pass

    labels, few = BertConfig(num_labels=2000), Few(num_labels=2)
    assert len(pytree.tree_leaves(take_apart(labels))) < len(pytree.tree_leaves(take_apart(few))) + 5
    assert put_together(take_apart(labels)).to_dict() == labels.to_dict()


class Reading(nn.Module):
    """Takes what a transformer is given beside its texts."""

    def __init__(self) -> None:
        super().__init__()
        self.head = DPLinear(6, 3)

    def forward(self, x: Tensor, *, cache: Any, config: Any) -> Tensor:
        assert type(cache) is DynamicCache and type(config) is BertConfig and cache.get_seq_length() == 0
        cache.update(x[:, None, None], x[:, None, None], 0)
        return self.head(x)


def test_an_empty_cache_and_a_config_are_taken() -> None:
    model = Reading()
    optimizer = make_private(model, batch_size=4)
    for n in (2, 5, 1):
        cache, config = DynamicCache(), BertConfig()
        optimizer.backward(model(torch.randn(n, 6), cache=cache, config=config).square().sum(1))
        optimizer.zero_grad()
        optimizer.recorder.discard()
