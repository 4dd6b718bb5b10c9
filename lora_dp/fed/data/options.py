"""Options of the data: which data set, and where to find things in it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_dp.fed.option_types import check_types

# What opens a file by itself, and with which options.
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}

Task = Literal["classification", "causal-lm"]
OF_LANGUAGE_MODELS = ("prompt_column", "prompt_template", "completion_column", "chat")


@dataclass
class DataConfig:
    """The data set and where to find things in it."""

    dataset: str = "digits"
    """"digits" (scikit-learn's 1,797), or a local folder, file or hub name that datasets.load_dataset opens."""
    subset: str | None = None
    """Configuration of a hub data set that has several, e.g. sst2 of nyu-mll/glue."""
    task: Task | Literal["auto"] = "auto"
    """What is learned: classification, a class for each image or text; causal-lm, a language model that goes on from a
    prompt; auto: causal-lm where columns of prompts or completions are named, or are all that there is."""
    input_column: str | None = None
    """Column of images or texts; found by itself when left out."""
    pair_column: str | None = None
    """Column of second texts, where an example is a pair as of premise and hypothesis; input_column is the first."""
    label_column: str | None = None
    """Column of labels; found by itself when left out. With causal-lm nothing learns them: partition dirichlet does."""
    prompt_column: str | None = None
    """For causal-lm, the column of prompts, which are given and not learned; a line break comes behind each."""
    prompt_template: str | None = None
    """For causal-lm, the prompt with columns in braces, as in "Question: {question} Answer: ", in place of a column."""
    completion_column: str | None = None
    """For causal-lm, the column of texts to learn; found by itself when left out."""
    chat: bool = False
    """For causal-lm, put prompt and completion into the model's chat template, as a question and its answer."""
    validation_split: str | None = None
    """Split to evaluate on; by default validation, valid, val, dev or test, else a part of train."""
    validation_fraction: float = 0.2
    """Part of train held out (stratified by label) when the data set has no split to evaluate on."""
    split_seed: int = 0
    """Seed of that held-out part: public, and independent of the run's seed."""
    max_length: int = 128
    """Longest text in tokens; the rest is cut off."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}: it must lie between 0 and 1")
        if self.split_seed < 0:
            raise ValueError(f"split_seed is {self.split_seed}: it must not be negative")
        for name in ("subset", "input_column", "pair_column", "label_column", "validation_split"):
            if self.dataset == "digits" and getattr(self, name) is not None:
                raise ValueError(f"{name} has no meaning for the built-in digits: leave it out, or name a --dataset")
        if self.pair_column is not None and self.pair_column == self.input_column:
            raise ValueError(f"pair_column and input_column are both {self.pair_column}: name two columns")
        named = [name for name in OF_LANGUAGE_MODELS if getattr(self, name)]
        if named and self.task == "classification":
            raise ValueError(f"{named[0]} is for language models: leave it out, or set task causal-lm")
        if self.dataset == "digits" and (named or self.task == "causal-lm"):
            raise ValueError("the built-in digits are images, which no language model learns: name a --dataset")
        if self.prompt_column is not None and self.prompt_template is not None:
            raise ValueError("prompt_column and prompt_template both say what the prompt is: leave one of them out")
        if named:
            self.task = "causal-lm"
        if self.task == "causal-lm" and (self.input_column or self.pair_column):
            raise ValueError(
                "input_column and pair_column are for classification: name prompt_column and completion_column instead"
            )
        if self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length}: it must be at least 1")


def is_path(name: str) -> bool:
    """Whether a name is meant as one of a local folder or file, rather than one on the hub."""
    written_so = name.startswith(("/", ".", "~")) or name.count("/") > 1
    return written_so or Path(name).suffix.lower() in FILES or Path(name).expanduser().exists()


def check_place(name: str) -> None:
    """Refuse the name of a data set that is meant as a path, with nothing there that can be opened.

    Raises:
        ValueError: saying so.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix.lower() not in FILES:
        raise ValueError(f"{name} is no file of data: give a folder, or a file ending in {', '.join(FILES)}")
    if is_path(name) and not path.exists():
        what = "file" if path.suffix.lower() in FILES else "folder"
        raise ValueError(f"no {what} {name}: give a folder or file that datasets.load_dataset opens, or a hub name")
