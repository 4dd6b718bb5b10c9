"""Prompts and completions as tokens."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from lora_dp.fed.data.completions import CompletionExamples, completion_examples, width_of_texts
from lora_dp.fed.data.encoding import RawData, TextSpec
from lora_dp.fed.data.examples import Shape
from lora_dp.fed.data.kept_activations import KeptActivations
from lora_dp.fed.data.unreadable import encode_training
from tests.fed.tiny_language import tokenizer_folder

PAD, BEGIN, END = 0, 1, 2
TEXTS = [("w0 w1", "w2"), ("w3", "w4 w5 w6"), ("", "w7 w8")]


def tokenizer(folder: Path, **options):
    return transformers.AutoTokenizer.from_pretrained(tokenizer_folder(folder, **options))


def examples(folder: Path, texts=TEXTS, limit: int = 32, **options) -> CompletionExamples:
    labels = torch.zeros(len(texts), dtype=torch.long)
    return completion_examples(texts, labels, tokenizer(folder, chat="chat" in options), limit, **options)


def test_completions_alone_are_learned_with_their_end(tmp_path: Path) -> None:
    batch = examples(tmp_path).batch([0, 1, 2])
    assert batch["input_ids"].shape == (3, 16) and batch["input_ids"][:, :5].tolist() == [
        [4, 5, 6, END, PAD],
        [7, 8, 9, 10, END],
        [11, 12, END, PAD, PAD],
    ]
    assert batch["labels"][:, :5].tolist() == [
        [-100, -100, 6, END, -100],
        [-100, 8, 9, 10, END],
        [11, 12, END, -100, -100],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [4, 5, 3] and (batch["labels"][:, 5:] == -100).all()


def test_a_batch_is_as_wide_as_its_longest_and_labels_are_as_wide(tmp_path: Path) -> None:
    long = ("w1 " * 30, "w2 " * 10)
    found = examples(tmp_path, [*TEXTS, long], limit=64)
    for indices, width in (([0, 1], 16), ([0, 3], 48), ([3], 48), ([], 16)):
        batch = found.batch(indices)
        assert {tensor.shape for tensor in batch.values()} == {(len(indices), width)}
    assert found.shapes([0, 3]) == [Shape(16, True), Shape(48, True)] and found.shapes_vary
    assert examples(tmp_path, [long], limit=40).shapes([0]) == [Shape(40, False)]


def test_prompt_and_completion_of_one_example(tmp_path: Path) -> None:
    view = examples(tmp_path).subset([2, 0])
    assert view.prompt(1).tolist() == [4, 5] and view.completion(1).tolist() == [6, END]
    assert view.prompt(0).tolist() == [] and view.completion(0).tolist() == [11, 12, END]
    assert view.prompt(0).dtype == view.completion(0).dtype == torch.int64


def test_what_is_too_long_is_cut_at_its_end(tmp_path: Path) -> None:
    found = examples(tmp_path, [("w0 w1 w2", "w3 w4"), ("w0 w1 w2 w3 w4", "w5")], limit=4)
    assert found.batch([0, 1])["labels"].tolist() == [[-100, -100, -100, 7], [-100, -100, -100, -100]]
    assert found.learned == 1 and found.subset([1]).learned == 0 and found.subset([]).learned == 0
    assert examples(tmp_path, [("", "w0")], limit=1).learned == 0  # the first is told by nothing
    assert examples(tmp_path, [("", "w0"), ("w1", "w2 w3")]).learned == 1 + 3


def test_whether_a_text_can_be_read_hangs_on_it_alone(tmp_path: Path) -> None:
    """Else one text that fits would decide whether those that do not fit count in what is released of all."""
    long = ("w0 " * 8, "w1")
    spec = TextSpec(tokenizer(tmp_path), 32)
    for others in ([], [TEXTS[0]], [(None, "w1")], [TEXTS[0], (None, "w1")]):
        pairs = [long] * 5 + others
        raw = RawData("text", [], pairs, np.zeros(len(pairs), dtype=np.int64), [], np.arange(0), 6, "causal-lm")
        found = encode_training(raw, spec).train
        assert all((found.batch([row])["labels"] == -100).all() for row in range(5))


@pytest.mark.parametrize("texts", [[("w0", "w1"), (None, "w1")], [("w0", None)], [("w0", 3)]])
def test_a_missing_text_is_told_by_its_row(tmp_path: Path, texts) -> None:
    with pytest.raises(ValueError, match=f"row {len(texts) - 1} has no text"):
        examples(tmp_path, texts)


def test_no_examples_are_fine(tmp_path: Path) -> None:
    found = examples(tmp_path, [])
    assert len(found) == 0 and found.batch([])["labels"].shape[0] == 0


def test_a_chat_template_puts_its_own_marks_around_both(tmp_path: Path) -> None:
    found = examples(tmp_path, TEXTS[:2], chat=True)
    words = tokenizer(tmp_path, chat=True)
    assert words.decode(found.prompt(0)) == "<s> <unk> w0 w1 </s> <s> <unk>"
    assert words.decode(found.completion(1)) == "w4 w5 w6 </s>"
    with pytest.raises(ValueError, match="no chat template: leave chat out"):
        completion_examples(TEXTS, torch.zeros(3).long(), tokenizer(tmp_path / "plain"), 32, chat=True)


def test_a_chat_template_that_begins_an_answer_otherwise_is_refused(tmp_path: Path) -> None:
    words = tokenizer(tmp_path, chat=True)
    words.chat_template = words.chat_template.replace("'<s> assistant '", "'<s> w1 '")
    with pytest.raises(ValueError, match="does not begin an answer as it asks for one"):
        completion_examples(TEXTS, torch.zeros(3).long(), words, 32, chat=True)


def test_a_template_that_writes_the_date_gives_the_same_tokens_on_any_day(tmp_path: Path) -> None:
    words = tokenizer(tmp_path, chat=True)
    plain = completion_examples(TEXTS, torch.zeros(3).long(), words, 32, chat=True)
    words.chat_template = "{% if strftime_now('%Y') == '1 January 2026' %}w1 {% endif %}" + words.chat_template
    found = completion_examples(TEXTS, torch.zeros(3).long(), words, 32, chat=True)
    assert found.prompt(0).tolist() == [5, *plain.prompt(0).tolist()]


def test_what_a_template_puts_behind_the_end_is_not_learned(tmp_path: Path) -> None:
    words = tokenizer(tmp_path, chat=True)
    words.chat_template = words.chat_template.replace("' </s>'", "' </s> w0'")
    found = completion_examples(TEXTS, torch.zeros(3).long(), words, 32, chat=True)
    assert found.completion(0).tolist() == [6, END]


def test_a_tokenizer_that_ends_every_text_does_not_end_a_prompt(tmp_path: Path) -> None:
    words = tokenizer(tmp_path)

    class Ending:
        eos_token_id, pad_token_id = END, PAD

        def __call__(self, texts, *, add_special_tokens, return_attention_mask):
            found = words(texts, add_special_tokens=False)["input_ids"]
            return {"input_ids": [[BEGIN, *ids, END] if add_special_tokens else ids for ids in found]}

    found = completion_examples(TEXTS, torch.zeros(3).long(), Ending(), 32)
    assert [found.prompt(index).tolist() for index in range(3)] == [[BEGIN, 4, 5], [BEGIN, 7], [BEGIN]]


def test_wrong_targets_are_other_completions_of_these_examples_alone(tmp_path: Path) -> None:
    found = examples(tmp_path, TEXTS * 10)
    wrong = found.with_wrong_targets([1, 4], np.random.default_rng(0))
    before, after = found.batch(range(30)), wrong.batch(range(30))
    changed = (before["input_ids"] != after["input_ids"]).any(1)
    assert changed.nonzero().flatten().tolist() == [1, 4]
    assert before["attention_mask"].equal(after["attention_mask"])
    assert after["input_ids"][1, 0] == before["input_ids"][1, 0]  # the prompt
    assert after["labels"][1, 1:5].equal(after["input_ids"][1, 1:5])


def test_what_a_front_makes_of_a_wrong_completion_is_computed_anew(tmp_path: Path) -> None:
    found = examples(tmp_path, TEXTS * 4)
    kept = KeptActivations(found, lambda batch: batch["input_ids"].float().unsqueeze(-1), with_inputs=True)
    kept.prepare()
    view = kept.subset([3, 4, 5])
    wrong = view.with_wrong_targets([1], np.random.default_rng(1))
    batch, before = wrong.batch([0, 1, 2]), view.batch([0, 1, 2])
    assert batch["activations"].squeeze(-1).equal(batch["input_ids"].float())
    changed = (batch["input_ids"] != before["input_ids"]).any(1)
    assert changed.tolist() == [False, True, False] and not batch["labels"].equal(before["labels"])
    assert view.batch([0, 1, 2])["activations"].equal(before["activations"])


def test_content_tells_where_a_prompt_ends(tmp_path: Path) -> None:
    one = examples(tmp_path, [("w0", "w1 w2")]).content()
    other = examples(tmp_path, [("w0 w1", "w2")]).content()
    assert one["ids"].equal(other["ids"]) and not one["starts"].equal(other["starts"])


def test_made_up_targets_are_tokens(tmp_path: Path) -> None:
    drawn = examples(tmp_path).made_up_targets(500, Shape(16, True), 40, torch.Generator().manual_seed(0))
    assert drawn.shape == (500, 16) and set(drawn.unique().tolist()) == set(range(40))


def test_examples_are_collated_one_by_one(tmp_path: Path) -> None:
    found = examples(tmp_path)
    whole, joined = found.batch([0, 1]), found.collate([found[0], found[1]])
    assert all(whole[name].equal(joined[name]) for name in whole)


def test_widths_grow_by_at_most_a_half_and_hold_every_length() -> None:
    widths = sorted({width_of_texts(length) for length in range(1, 2049)})
    assert widths[0] == 16 and widths[-1] == 2048 and len(widths) == 14
    assert all(width_of_texts(width) == width for width in widths)
    assert all(length <= width_of_texts(length) < max(33, 1.5 * length) for length in range(1, 2049))
