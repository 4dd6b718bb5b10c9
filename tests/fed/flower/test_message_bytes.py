"""The table of docs/reports/million-clients.md says what the real messages weigh."""

from pathlib import Path

import pytest

pytest.importorskip("flwr")

from lora_dp.fed.flower import messages
from lora_dp.fed.rounds.messages import Update
from lora_dp.fed.rounds.server import nbytes
from tests.fed.flower import message_bytes

PAGE = Path(__file__).parents[3] / "docs" / "reports" / "million-clients.md"


def row(method: str) -> list[float]:
    """MB: up, down and news, each at all ranks."""
    [line] = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{method}` |")]
    return [float(cell) for cell in line.strip("| ").split("|")[1:]]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "rank"), [("la-lora", 4), ("rolora", 8), ("deer", 16), ("rac-lora", 4)])
def test_the_page_says_what_messages_weigh(method, rank):
    found, at = message_bytes.usual(method, rank), message_bytes.RANKS.index(rank)
    said = row(method)[at :: len(message_bytes.RANKS)]
    assert [found.up / 1e6, found.down / 1e6, found.news / 1e6] == pytest.approx(said, abs=0.006)


def test_the_page_has_every_method():
    for method in message_bytes.METHODS:
        assert len(row(method)) == 3 * len(message_bytes.RANKS)


@pytest.mark.parametrize("rank", message_bytes.RANKS)
def test_a_message_is_its_tensors_and_less_than_8_kb(rank):
    state = message_bytes.start(rank)
    head = 4 * (768 * 768 + 768 + 2 * 768 + 2)
    assert nbytes(state) == head + 4 * rank * 24 * (768 + 768)  # the page's formula
    travels = message_bytes.travelling(messages.pack_update(Update(state)))
    assert nbytes(state) < travels < nbytes(state) + 8_000
