"""Texts that a language model goes on with, and their quality."""

from pathlib import Path

import pytest
import torch
import transformers

from lora_dp.fed.data.completions import completion_examples
from lora_dp.fed.rounds.generation import Generations, Prompts, Quality, quality
from tests.fed.tiny_language import language_model, pairs
from tests.language_models import FAMILIES

END = 2


def opened(folder: Path, rows=None, family: str = "llama", count: int = 50, limit: int = 32):
    name = language_model(folder, family)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    rows = [(row["prompt"], row["completion"]) for row in pairs(12)] if rows is None else rows
    examples = completion_examples(rows, torch.zeros(len(rows)).long(), tokenizer, 32)
    model = transformers.AutoModelForCausalLM.from_pretrained(name)
    return Prompts(examples, tokenizer, count, limit), model, tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_each_text_is_what_the_likeliest_tokens_make_of_its_prompt_alone(tmp_path: Path, family: str) -> None:
    prompts, model, tokenizer = opened(tmp_path, family=family)
    model.train()
    found = prompts.generate(model)
    assert model.training and len(found) == len(prompts.prompts) == 12
    model.eval()
    for prompt, text in zip(prompts.prompts, found, strict=True):
        ids = prompt.tokens
        for _ in range(5):  # the longest completion has four words and an end
            following = model(ids.unsqueeze(0)).logits[0, -1].argmax().unsqueeze(0)
            if int(following) == END:
                break
            ids = torch.cat([ids, following])
        assert text == tokenizer.decode(ids[len(prompt.tokens) :], skip_special_tokens=True).strip()


def test_completions_of_one_prompt_are_references_of_one_another(tmp_path: Path) -> None:
    rows = [("w0", "w1"), ("w2", "w3"), ("w0", "w4 w5"), ("w0", "w1")]
    prompts, _, _ = opened(tmp_path, rows)
    assert {prompt.text: prompt.references for prompt in prompts.prompts} == {"w0": ["w1", "w4 w5"], "w2": ["w3"]}


def test_a_prompt_that_leaves_no_room_for_a_completion_is_left_out(tmp_path: Path) -> None:
    prompts, _, _ = opened(tmp_path, [("w0 " * 40, "w1"), ("w2", "w3")])
    assert [prompt.text for prompt in prompts.prompts] == ["w2"]


def test_prompts_are_drawn_always_alike_and_no_more_than_asked(tmp_path: Path) -> None:
    rows = [(f"w{number}", "w1") for number in range(20)]
    few, again = (opened(tmp_path, rows, count=5)[0].prompts for _ in range(2))
    assert [p.text for p in few] == [p.text for p in again] and len(few) == 5
    assert [p.text for p in few] != [f"w{number}" for number in range(5)]


def test_a_prompt_without_tokens_begins_with_the_token_that_begins_texts(tmp_path: Path) -> None:
    prompts, model, _ = opened(tmp_path, [("", "w1 w2")])
    assert prompts.prompts[0].tokens.tolist() == [1] and len(prompts.generate(model)) == 1


def test_no_text_is_longer_than_the_model_has_room_for(tmp_path: Path) -> None:
    rows = [("w0 w1 w2", "w3 " * 20)]
    prompts, model, tokenizer = opened(tmp_path, rows, limit=7)
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    assert prompts._most == 4 and len(prompts.generate(model)[0].split()) <= 4


def test_texts_are_compared_with_what_people_wrote(tmp_path: Path) -> None:
    prompts, _, _ = opened(tmp_path, [("w0", "w1 w2 w3 w4"), ("w5", "w6 w7 w8 w9")])
    perfect = [prompt.references[0] for prompt in prompts.prompts]
    found = prompts.compared(None, perfect)
    assert found.before is None and found.after == {"bleu": 100.0, "rouge_l": 100.0}
    assert [each["after"] for each in found.texts] == perfect and found.texts[0]["before"] is None
    assert isinstance(found, Generations)
    both = prompts.compared(["w9 w9"] * 2, perfect)
    assert both.before is not None and both.before["bleu"] == 0 and both.texts[1]["before"] == "w9 w9"


def test_quality_takes_the_nearest_reference_of_each_text() -> None:
    references = [["x y", "the cat sat on the mat"], ["b c d e g"]]
    found = quality(["the cat sat on the mat", "b c d e f"], references)
    # 4/5 of the words in order, both ways; the other text is perfect.
    assert found.rouge_l == 90.0 and 0 < found.bleu < 100
    # A further reference of another text is none of this one's: it is too short for its own all the same.
    short = quality(["a b c d e f", "a b c d e f g h"], [["a b c d e f g h"], ["a b c d e f g h", "zz"]])
    assert short.bleu == quality(["a b c d e f", "a b c d e f g h"], [["a b c d e f g h"]] * 2).bleu < 100
    assert quality(["", "nothing at all of this"], references) == Quality(0.0, 0.0)


def test_quality_names_the_extra_where_its_packages_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=r"BLEU and ROUGE needs sacrebleu.*fed"):
        quality(["a"], [["a"]])
