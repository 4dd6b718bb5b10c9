"""Which columns of a data set are read, and so what is learned from it."""

import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from lora_dp.fed.data.encoding import Kind
from lora_dp.fed.data.options import DataConfig, Task

LABEL_NAMES = ("label", "labels", "target", "class", "category", "y")
INPUT_NAMES = ("image", "img", "text", "sentence", "content", "review", "document", "question")
# Columns of prompts and completions as data sets of this kind usually name them.
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("meaning_representation", "human_reference"),
    ("mr", "ref"),
    ("dialogue", "summary"),
    ("document", "summary"),
    ("article", "highlights"),
    ("input", "output"),
)


@dataclass(frozen=True)
class Columns:
    """The columns that are read.

    Attributes:
        task: for which they are.
        kind: of what the model is given.
        label: of classes; None where there are none, for a language model.
        inputs: of images or texts, and of second texts where examples are pairs; for a language model of completions.
        prompt: of a language model, with columns in braces; None where texts are learned from their first word.

    >>> Columns("causal-lm", "text", None, ("answer",), "{question}\\n").prompt_columns
    ['question']
    """

    task: Task
    kind: Kind
    label: str | None
    inputs: tuple[str, ...]
    prompt: str | None = None

    @property
    def prompt_columns(self) -> list[str]:
        """Names of the columns that the prompt is made of."""
        return [] if self.prompt is None else fields(self.prompt)

    @property
    def names(self) -> list[str]:
        """All columns that the model is given something of."""
        return [*self.inputs, *self.prompt_columns]

    def examples(self, columns: Mapping[str, Sequence[Any]]) -> Sequence[Any]:
        """What the model is given: of each row its image, its text or its texts, the prompt before the completion.

        Args:
            columns: values by column. A row that lacks one that it needs has None there.

        >>> read = Columns("causal-lm", "text", None, ("answer",), "{question}\\n")
        >>> read.examples({"question": ["Is it so?", None], "answer": ["Yes.", "No."]})
        [('Is it so?\\n', 'Yes.'), (None, 'No.')]
        """
        first = columns[self.inputs[0]]
        if self.task == "classification":
            return first if len(self.inputs) == 1 else list(zip(first, columns[self.inputs[1]], strict=True))
        if self.prompt is None:
            return [("", completion) for completion in first]
        names, parts = self.prompt_columns, _parts(self.prompt)
        rows = zip(*(columns[name] for name in names), strict=True) if names else (() for _ in first)
        prompts = [_filled(parts, dict(zip(names, row, strict=True))) for row in rows]
        return list(zip(prompts, first, strict=True))


def fields(template: str) -> list[str]:
    """The columns that a template of prompts names in braces, each once.

    Raises:
        ValueError: more than a name stands in braces, or they are not closed.

    >>> fields("{question} ({subject}) {{A}}")
    ['question', 'subject']
    """
    return list(dict.fromkeys(name for _, name in _parts(template) if name is not None))


def _parts(template: str) -> list[tuple[str, str | None]]:
    """Pieces of text, each with the column whose value comes behind it; None at the end where there is none."""
    try:
        found = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"prompt_template cannot be read ({error}): write a brace that is a brace twice") from None
    for _, name, form, conversion in found:
        if name is not None and (not name or form or conversion):
            raise ValueError("prompt_template has braces with more or less than a column's name: write {question}")
    return [(text, name) for text, name, _, _ in found]


def _filled(parts: Sequence[tuple[str, str | None]], row: Mapping[str, Any]) -> str | None:
    """The prompt of one row, None where a value is missing; values stay as they are, whatever braces they have."""
    if any(value is None for value in row.values()):
        return None
    return "".join(text + ("" if name is None else str(row[name])) for text, name in parts)


def check_columns(read: Columns, features: Mapping[str, Any]) -> None:
    """Refuse a split that lacks one of the columns that were found in another.

    Raises:
        ValueError: naming them.
    """
    options = ("completion_column",) if read.task == "causal-lm" else ("input_column", "pair_column")
    wanted: dict[str, str | None] = {"label_column": read.label, **dict(zip(options, read.inputs, strict=False))}
    missing = next((name for name in read.prompt_columns if name not in features), None)
    _check_columns({**wanted, "prompt_column": missing}, features)


def _check_columns(wanted: Mapping[str, str | None], features: Mapping[str, Any]) -> None:
    """Refuse columns that are not there, all of them at once; ``wanted`` by the option that names each."""
    missing = {option: name for option, name in wanted.items() if name is not None and name not in features}
    if missing:
        which = f"column{'s' if len(missing) > 1 else ''} {' and '.join(missing.values())}"
        raise ValueError(
            f"no {which} in the data set: set {' and '.join(missing)} to {_one_of(missing)} {', '.join(features)}"
        )


def _one_of(options: Collection[str]) -> str:
    return "one of" if len(options) == 1 else "some of"


def _only_or_common(candidates: list[str], common: Sequence[str]) -> str | None:
    if len(candidates) == 1:
        return candidates[0]
    return next((name for name in common if name in candidates), None)


def find_columns(features: Mapping[str, Any], config: DataConfig) -> Columns:
    """The columns that are configured, or else can be told.

    Where the task is to be found, columns of prompts and completions make it causal-lm if there are no labels.

    Raises:
        ValueError: columns that are not there or cannot be told, all at once; or one that holds something else.
    """
    if config.task == "causal-lm" or config.task == "auto" and _is_causal(features, config):
        return _of_language_model(features, config)
    pair = config.pair_column
    _check_columns(
        {"label_column": config.label_column, "input_column": config.input_column, "pair_column": pair}, features
    )
    kinds = _kinds(features)
    labels = config.label_column or _label_column(features)
    column = config.input_column
    if column is None:
        images = [name for name, kind in kinds.items() if kind == "image" and name != labels]
        texts = [name for name, kind in kinds.items() if kind == "text" and name not in (labels, pair)]
        column = _only_or_common(images or texts, INPUT_NAMES)
    told = {"label_column": (labels, "labels"), "input_column": (column, "images or texts")}
    if untold := {option: what for option, (found, what) in told.items() if found is None}:
        others = "; or, for a language model, completion_column" if "text" in kinds.values() else ""
        if config.task == "auto" and _pair(features) is not None:
            others = "; or, for a language model that goes on from prompts, set task causal-lm"
        raise ValueError(
            f"cannot tell the column{'s' if len(untold) > 1 else ''} of {' and of '.join(untold.values())}: "
            f"set {' and '.join(untold)} to {_one_of(untold)} {', '.join(features)}{others}"
        )
    assert labels is not None and column is not None
    if pair is not None and kinds.get(pair) != "text":
        raise ValueError(f"column {pair} holds no texts: set pair_column to one that does")
    if column not in kinds:
        raise ValueError(f"column {column} holds neither images nor texts: set input_column to one that does")
    if pair is not None and kinds[column] != "text":
        raise ValueError(f"column {column} holds images, which have no pair_column: leave it out")
    inputs = (column,) if pair is None else (column, pair)
    return Columns("classification", kinds[column], labels, inputs)


def _is_causal(features: Mapping[str, Any], config: DataConfig) -> bool:
    named = config.label_column or config.input_column or config.pair_column
    return not named and _label_column(features) is None and _pair(features) is not None


def _pair(features: Mapping[str, Any]) -> tuple[str, str] | None:
    """The columns of prompts and completions, by their usual names."""
    kinds = _kinds(features)
    return next((pair for pair in PAIRS if all(kinds.get(name) == "text" for name in pair)), None)


def _of_language_model(features: Mapping[str, Any], config: DataConfig) -> Columns:
    template, kinds = config.prompt_template, _kinds(features)
    named = [] if template is None else fields(template)
    wanted = {
        "label_column": config.label_column,
        "prompt_column": config.prompt_column,
        "completion_column": config.completion_column,
    }
    _check_columns(wanted, features)
    if missing := [name for name in named if name not in features]:
        raise ValueError(
            f"prompt_template names {' and '.join(missing)}, but the data set has the columns {', '.join(features)}"
        )
    if other := [name for name in named if kinds.get(name) != "text"]:
        # A library types a column by all of its rows: one of them would rewrite the numbers of all others.
        raise ValueError(f"column {other[0]} holds no texts: name columns of texts in prompt_template")
    completion, prompt = config.completion_column, config.prompt_column
    pair = _pair(features)
    if completion is None and pair is not None and prompt in (None, pair[0]):
        completion = pair[1]
        prompt = pair[0] if template is None else None
    if completion is None:
        read = {prompt, config.label_column, *named}
        texts = [name for name, kind in kinds.items() if kind == "text" and name not in read]
        completion = _only_or_common(texts, INPUT_NAMES if template is None and prompt is None else ())
    if completion is None:
        raise ValueError(
            f"cannot tell the column of completions: set completion_column to one of {', '.join(features)}"
        )
    for option, name in (("completion_column", completion), ("prompt_column", prompt)):
        if name is not None and kinds.get(name) != "text":
            raise ValueError(f"column {name} holds no texts: set {option} to one that does")
    if prompt is not None:
        if prompt == completion:
            raise ValueError(f"prompt_column and completion_column are both {prompt}: name two columns")
        if set(prompt) & set("{}:!"):
            raise ValueError(f"column {prompt} has one of {{}}:! in its name: rename it")
        # A chat template sets its own marks between the two.
        template = f"{{{prompt}}}" if config.chat else f"{{{prompt}}}\n"
    return Columns("causal-lm", "text", config.label_column, (completion,), template)


def _kinds(features: Mapping[str, Any]) -> dict[str, Kind]:
    """The columns of images and of texts."""
    kinds: dict[str, Kind] = {}
    for name, feature in features.items():
        if isinstance(feature, datasets.Image):
            kinds[name] = "image"
        elif isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
            kinds[name] = "text"
    return kinds


def _label_column(features: Mapping[str, Any]) -> str | None:
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    return _only_or_common(typed or [name for name in features if name in LABEL_NAMES], LABEL_NAMES)
