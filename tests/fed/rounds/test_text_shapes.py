"""Texts in batches of one shape: none pads another, and one that cannot be read changes no other."""

import pytest
import torch

from lora_dp.fed.data.examples import Shape, TextExamples
from lora_dp.fed.data.unreadable import PartlyReadable
from lora_dp.fed.rounds.federation import Federation
from tests.fed.rounds.failing_models import ONE_STEP
from tests.fed.rounds.shaped_turns import apart, on_outputs, reading, sum_of, texts
from tests.fed.small import make_examples, make_federation


@pytest.mark.slow
def test_a_long_text_does_not_pad_the_others():
    federation = reading()
    found_alike(federation, texts([3, 5, 8, 9, 12, 16, 2, 33]))


@pytest.mark.slow
def test_a_text_with_padding_does_not_give_a_mask_to_those_without():
    """Models leave out a mask that is all ones, and attention then takes another way."""
    found_alike(reading(), texts([8, 8, 16, 16, 8, 16, 16, 13]))
    found_alike(reading(), texts([40, 40, 40, 39]))


def found_alike(federation: Federation, examples: TextExamples) -> None:
    """All but the last example add the same with and without it."""
    state, last = federation.workspace.state(), len(examples) - 1
    with_it, without = (sum_of(federation, state, range(n), examples) for n in (last + 1, last))
    alone = sum_of(federation, state, [last], examples)
    assert apart(alone, {name: torch.zeros_like(t) for name, t in alone.items()}) > 0.1
    assert apart({name: with_it[name] - without[name] for name in alone}, alone) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["texts", "images"])
def test_others_are_computed_alike_beside_an_example_that_cannot_be_read(kind, caplog):
    """Drawn or not: the rows of a part, and whether examples are together at all, must not hang on it."""
    found = []
    for odd in (None, 2):
        federation = reading() if kind == "texts" else make_federation("dp-lora", ONE_STEP)
        readable = texts([3, 5, 9, 12, 16, 2, 33]) if kind == "texts" else make_examples(7, 1)
        examples, rows = readable, list(range(7))
        if odd is not None:
            rows = [row for row in range(8) if row != odd]
            labels = torch.full((8,), -1)
            labels[rows] = readable.labels
            examples = PartlyReadable(readable, rows, labels)
        seen: list[int] = []
        on_outputs(federation.model, seen)
        state = federation.workspace.state()
        found.append((sum_of(federation, state, rows, examples), seen))
        if odd is not None:
            found.append((sum_of(federation, state, [*rows, odd], examples), seen))
    (expected, sizes), *others = found
    assert min(sizes) == 8 and sizes == found[1][1][: len(sizes)]
    assert all(others[0][0][name].equal(tensor) for name, tensor in expected.items())
    assert apart(others[1][0], expected) < 1e-13
    assert "each example is by itself" not in caplog.text


def test_made_up_inputs_have_the_shapes_of_a_batch_and_nothing_of_the_examples():
    for examples, shape in (
        (make_examples(9, 1), Shape()),
        (texts([3, 9, 20]), Shape(16, True)),
        (texts([3, 8, 20]), Shape(8)),
    ):
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        made = examples.made_up(32, shape, 50, generators[0])
        real = examples.batch([0, 1])
        assert made.keys() == real.keys() - {"labels"}
        assert all(made[name].dtype == real[name].dtype and made[name].dim() == real[name].dim() for name in made)
        other = texts([40, 2]) if shape.width else make_examples(4, 2)
        again = other.made_up(32, shape, 50, generators[1])
        assert all(made[name].equal(again[name]) and len(made[name]) == 32 for name in made)
        if shape.width:
            padded = 1 - made["attention_mask"].sum(1).unique() / shape.width
            assert bool((padded > 0).all() if shape.padded else (padded == 0).all()) and padded.max() < 0.5
    assert texts([3, 9, 16, 20, 40]).shapes([4, 0, 1, 2]) == [(40, False), (8, True), (16, True), (16, False)]
    assert make_examples(3, 1).shapes([0, 2]) == [(0, False), (0, False)]
