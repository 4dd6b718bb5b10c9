"""A tiny causal language model on disk with its tokenizer, and data of prompts and completions."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import tokenizers
import torch
import transformers

from tests.language_models import causal_lm

WORDS = [f"w{number}" for number in range(36)]
CHAT = (
    "{% for message in messages %}{{ '<s> ' + message['role'] + ' ' + message['content'] + ' </s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)


def tokenizer_folder(folder: Path, *, chat: bool = False) -> str:
    """A tokenizer of words with a token for padding, one to begin a text and one to end it."""
    names = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({name: rank for rank, name in enumerate(names)}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if chat:
        tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return str(folder)


def language_model(folder: Path, family: str = "llama", *, chat: bool = False) -> str:
    """One of :data:`tests.language_models.FAMILIES`, of two blocks and 40 tokens, with its tokenizer."""
    causal_lm(family, torch.float32).save_pretrained(folder)  # type: ignore[operator]
    return tokenizer_folder(folder, chat=chat)


def pairs(count: int = 40, *, first: int = 0) -> list[dict[str, Any]]:
    """Prompts of one to three words, and completions of one to four that follow from the prompt's first word."""
    rows = []
    for number in range(first, first + count):
        prompt = [WORDS[(7 * number + place) % 36] for place in range(1 + number % 3)]
        completion = [WORDS[(7 * number + 11 + place) % 36] for place in range(1 + number % 4)]
        rows.append({"prompt": " ".join(prompt), "completion": " ".join(completion), "topic": f"t{number % 3}"})
    return rows


def pairs_folder(folder: Path, count: int = 40, validation: int = 10) -> str:
    """JSON lines of such rows: a part to train on, and one to evaluate on."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", pairs(count)), ("validation", pairs(validation, first=count))):
        text = "".join(json.dumps({k: row[k] for k in ("prompt", "completion")}) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return str(folder)


def pairs_csv(path: Path, count: int = 40) -> str:
    """One CSV file, with a column of topics."""
    pd.DataFrame(pairs(count)).to_csv(path, index=False)
    return str(path)
