"""Which columns are read, and which task they make."""

import datasets
import pytest

from lora_dp.fed.data.columns import PAIRS, Columns, check_columns, fields, find_columns
from lora_dp.fed.data.options import DataConfig

TEXT, LABEL, NUMBER = datasets.Value("string"), datasets.ClassLabel(names=["a", "b"]), datasets.Value("int64")


def found(features, **options) -> Columns:
    return find_columns(features, DataConfig(dataset="elsewhere", **options))


@pytest.mark.parametrize("pair", PAIRS)
def test_columns_of_prompts_and_completions_make_a_language_model(pair: tuple[str, str]) -> None:
    read = found({pair[0]: TEXT, pair[1]: TEXT, "id": NUMBER})
    assert read == Columns("causal-lm", "text", None, (pair[1],), f"{{{pair[0]}}}\n")
    assert read.names == [pair[1], pair[0]] and read.prompt_columns == [pair[0]]


@pytest.mark.parametrize(
    "options",
    [{"label_column": "kind", "input_column": "prompt"}, {"task": "classification", "input_column": "prompt"}],
)
def test_labels_make_a_classifier_even_where_there_are_pairs(options) -> None:
    features = {"prompt": TEXT, "completion": TEXT, "kind": LABEL}
    assert found(features, **options) == Columns("classification", "text", "kind", ("prompt",))


def test_a_column_of_labels_alone_makes_a_classifier() -> None:
    assert found({"text": TEXT, "label": LABEL}).task == "classification"
    assert found({"prompt": TEXT, "completion": TEXT, "text": TEXT, "label": LABEL}).inputs == ("text",)


@pytest.mark.parametrize(
    ("options", "prompt", "completion", "label"),
    [
        ({}, "{prompt}\n", "completion", None),
        ({"chat": True}, "{prompt}", "completion", None),
        ({"prompt_column": "note"}, "{note}\n", None, None),
        ({"prompt_column": "note", "completion_column": "prompt"}, "{note}\n", "prompt", None),
        ({"completion_column": "note"}, None, "note", None),
        ({"prompt_template": "{note}: {prompt} "}, "{note}: {prompt} ", "completion", None),
        ({"label_column": "number"}, "{prompt}\n", "completion", "number"),
    ],
)
def test_what_is_named_is_read(options, prompt, completion, label) -> None:
    features = {"prompt": TEXT, "completion": TEXT, "note": TEXT, "number": NUMBER}
    if completion is None:
        with pytest.raises(ValueError, match="completion_column to one of prompt, completion, note, number"):
            found(features, task="causal-lm", **options)
        return
    assert found(features, task="causal-lm", **options) == Columns("causal-lm", "text", label, (completion,), prompt)


def test_one_column_of_texts_is_learned_from_its_first_word() -> None:
    read = found({"text": TEXT, "number": NUMBER}, task="causal-lm")
    assert read == Columns("causal-lm", "text", None, ("text",))
    assert read.examples({"text": ["a", None]}) == [("", "a"), ("", None)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"completion_column": "answr"}, "no column answr"),
        ({"prompt_column": "qestion", "completion_column": "answer"}, "no column qestion"),
        ({"completion_column": "number"}, "column number holds no texts: set completion_column"),
        ({"prompt_column": "number", "completion_column": "answer"}, "column number holds no texts: set prompt_column"),
        ({"prompt_template": "{qestion}", "completion_column": "answer"}, "prompt_template names qestion, but"),
        ({"prompt_template": "{question!r}", "completion_column": "answer"}, "more or less than a column's name"),
        ({"prompt_template": "{question", "completion_column": "answer"}, "cannot be read"),
        ({"prompt_template": "{}", "completion_column": "answer"}, "more or less than a column's name"),
        ({"prompt_column": "a{b}", "completion_column": "answer"}, "has one of {}:! in its name: rename it"),
        ({"prompt_column": "a:b", "completion_column": "answer"}, "has one of {}:! in its name"),
        ({"prompt_column": "answer", "completion_column": "answer"}, "are both answer: name two columns"),
        ({"prompt_template": "{number}", "completion_column": "answer"}, "column number holds no texts: name columns"),
        ({"task": "causal-lm"}, "cannot tell the column of completions"),
    ],
)
def test_what_is_not_there_is_told_with_the_remedy(options, words) -> None:
    features = {"question": TEXT, "answer": TEXT, "number": NUMBER, "a{b}": TEXT, "a:b": TEXT}
    if options == {"task": "causal-lm"}:
        features = {"left": TEXT, "right": TEXT}
    with pytest.raises(ValueError, match=words):
        found(features, **options)


def test_without_labels_or_pairs_both_tasks_are_named() -> None:
    with pytest.raises(ValueError, match=r"set label_column to one of left, right; or, for a language model, compl"):
        found({"left": TEXT, "right": TEXT}, input_column="left")


def test_labels_beside_prompts_are_told_both_ways_on() -> None:
    features = {"prompt": TEXT, "completion": TEXT, "topic": TEXT}
    with pytest.raises(ValueError, match="or, for a language model that goes on from prompts, set task causal-lm"):
        found(features, label_column="topic")
    assert found(features, label_column="topic", task="causal-lm").label == "topic"


def test_values_go_into_a_template_as_they_are() -> None:
    read = Columns("causal-lm", "text", None, ("b",), "{{x}} {a}{a}:{c}")
    assert read.prompt_columns == ["a", "c"] == fields("{{x}} {a}{a}:{c}")
    assert read.examples({"a": ["{c}", "é", None], "b": ["1", "2", "3"], "c": [1, 2.5, 3]}) == [
        ("{x} {c}{c}:1", "1"),
        ("{x} éé:2.5", "2"),
        (None, "3"),
    ]
    constant = Columns("causal-lm", "text", None, ("b",), "Say: ")
    assert constant.examples({"b": ["1", "2"]}) == [("Say: ", "1"), ("Say: ", "2")]


def test_pairs_of_texts_are_pairs_and_images_stay_as_they_are() -> None:
    assert Columns("classification", "text", "y", ("a", "b")).examples({"a": ["1"], "b": ["2"]}) == [("1", "2")]
    images = ["an image"]
    assert Columns("classification", "image", "y", ("a",)).examples({"a": images}) is images


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (Columns("causal-lm", "text", None, ("answer",), "{question}\n"), "no column question .*prompt_column"),
        (Columns("causal-lm", "text", None, ("reply",)), "no column reply .*completion_column"),
        (Columns("causal-lm", "text", "kind", ("answer",)), "no column kind .*label_column"),
        (Columns("classification", "text", "kind", ("answer", "reply")), "no columns kind and reply"),
    ],
)
def test_a_split_that_lacks_a_column_is_refused(read: Columns, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_columns(read, {"answer": TEXT})
    check_columns(read, dict.fromkeys(("answer", "question", "reply", "kind"), TEXT))
