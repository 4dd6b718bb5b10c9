"""Examples of a language model: a prompt, which is given, and the completion that is learned."""

import copy
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from lora_dp.fed.data.examples import Indices, Shape, TextExamples, padded_rows
from lora_dp.losses import IGNORED

# Some templates write today's date. Tokens must be the same tomorrow, when a run goes on.
_SAME_DAY = "{%- macro strftime_now(form) -%}1 January 2026{%- endmacro -%}"


class CompletionExamples(TextExamples):
    """Prompts and completions kept as one int32 matrix of token ids (N, longest), padded on the right.

    "labels": int64 (batch, T), the tokens of the completions, −100 for prompts and padding. "input_ids" and
    "attention_mask" are as of texts, but T comes from 16, 32, 48, 64, 96, 128, …: each is tried by itself before it is
    used, which takes seconds for a language model.

    Args:
        ids: token ids (N, longest), int32.
        lengths: tokens of each example, (N,).
        starts: tokens of each prompt, at most its length, (N,).
        labels: classes by which data are split, (N,).
        pad_id: token that fills rows up.

    >>> ids = torch.tensor([[5, 6, 7, 2], [8, 9, 2, 0]], dtype=torch.int32)
    >>> examples = CompletionExamples(ids, torch.tensor([4, 3]), torch.tensor([2, 1]), torch.zeros(2).long(), pad_id=0)
    >>> examples.batch([0, 1])["labels"]
    tensor([[-100, -100,    7,    2],
            [-100,    9,    2, -100]])
    """

    def __init__(self, ids: Tensor, lengths: Tensor, starts: Tensor, labels: Tensor, pad_id: int) -> None:
        super().__init__(ids, lengths, labels, pad_id)
        self._starts = starts

    def _width(self, length: int) -> int:
        return min(width_of_texts(length), self._ids.shape[1])

    def _targets(self, rows: Tensor) -> Tensor:
        width = self._width(int(self._lengths[rows].max()) if len(rows) else 1)
        place = torch.arange(width)
        learned = (place >= self._starts[rows].unsqueeze(1)) & (place < self._lengths[rows].unsqueeze(1))
        return self._ids[rows, :width].long().where(learned, IGNORED)

    def made_up_targets(self, count: int, shape: Shape, vocabulary: int, generator: torch.Generator) -> Tensor:
        """Tokens (count, T), all of them learned."""
        return torch.randint(vocabulary, (count, shape.width), generator=generator)

    def with_wrong_targets(self, indices: Indices, rng: np.random.Generator) -> Self:
        """The same examples, in the completions of these of them other tokens, drawn at random of all that occur.

        Such canaries are of Carlini et al. 2019, The secret sharer, arXiv 1802.08232.
        """
        rows = self._rows[torch.as_tensor(indices, dtype=torch.long)]
        words = np.unique(self._ids.numpy())
        view = copy.copy(self)
        view._ids = self._ids.clone()
        for row in rows.tolist():
            start, end = int(self._starts[row]), int(self._lengths[row])
            view._ids[row, start:end] = torch.from_numpy(rng.choice(words, end - start))
        return view

    def prompt(self, index: int) -> Tensor:
        """The tokens of one example's prompt, int64."""
        row = int(self._rows[index])
        return self._ids[row, : int(self._starts[row])].long()

    def completion(self, index: int) -> Tensor:
        """The tokens of one example's completion, int64, with the one that ends it unless it was cut off."""
        row = int(self._rows[index])
        return self._ids[row, int(self._starts[row]) : int(self._lengths[row])].long()

    @property
    def learned(self) -> int:
        """How many tokens there are to learn. A text's first has nothing before it that it could follow from."""
        tokens = self._lengths[self._rows] - self._starts[self._rows].clamp(min=1)
        return int(tokens.clamp(min=0).sum())

    def _store(self) -> dict[str, Tensor]:
        return {**super()._store(), "starts": self._starts}


def width_of_texts(length: int) -> int:
    """The least of 16, 32, 48, 64, 96, 128, 192, … that is not below ``length``.

    >>> [width_of_texts(length) for length in (1, 33, 65, 129, 1000)]
    [16, 48, 96, 192, 1024]
    """
    width, following = 16, 32
    while width < length:
        width, following = following, 2 * width if width > 16 else 48
    return width


def completion_examples(
    texts: Sequence[tuple[Any, Any]], labels: Tensor, tokenizer: Any, limit: int, *, chat: bool = False
) -> CompletionExamples:
    """Prompts and completions as tokens, each example cut to ``limit`` tokens.

    The two are made tokens one by one, so that a prompt is the same whatever follows. The tokenizer's token that ends a
    text comes behind each completion.

    Args:
        texts: (prompt, completion) by example.
        labels: classes by which data are split, (N,).
        tokenizer: of Transformers, with a padding token.
        limit: most tokens of an example.
        chat: whether they are put into the tokenizer's chat template, as a user's words and an assistant's answer.

    Raises:
        ValueError: a missing text; no chat template, or none that fits.
    """
    for row, parts in enumerate(texts):
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"row {row} has no text: remove such rows from the data set")
    if chat:
        pairs = [_chat_tokens(tokenizer, *parts) for parts in texts]
    else:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        prompts = _tokens(tokenizer, [prompt for prompt, _ in texts], special=True)
        completions = _tokens(tokenizer, [completion for _, completion in texts], special=False)
        # Some tokenizers end each text, a prompt too.
        prompts = [ids[:-1] if ids[-1:] == end and len(ids) > 1 else ids for ids in prompts]
        pairs = [(prompt, completion + end) for prompt, completion in zip(prompts, completions, strict=True)]
    pad_id = tokenizer.pad_token_id
    rows = [([*prompt, *completion] or [pad_id])[:limit] for prompt, completion in pairs]
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    starts = torch.tensor([len(prompt) for prompt, _ in pairs], dtype=torch.long).minimum(lengths)
    width = min(width_of_texts(int(lengths.max())), limit) if len(rows) else 1
    return CompletionExamples(padded_rows(rows, width, pad_id), lengths, starts, labels, pad_id)


def _tokens(tokenizer: Any, texts: list[str], *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    found: list[list[int]] = tokenizer(texts, add_special_tokens=special, return_attention_mask=False)["input_ids"]
    return found


def _chat_tokens(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the model has no chat template: leave chat out, and write a prompt_template")
    asked = [{"role": "user", "content": prompt}]
    answered = [*asked, {"role": "assistant", "content": completion}]
    how: dict[str, Any] = {"return_dict": False, "chat_template": _SAME_DAY + tokenizer.get_chat_template()}
    given: list[int] = tokenizer.apply_chat_template(asked, add_generation_prompt=True, **how)
    whole: list[int] = tokenizer.apply_chat_template(answered, **how)
    if whole[: len(given)] != given:
        raise ValueError(
            "the model's chat template does not begin an answer as it asks for one: leave chat out, and write a "
            "prompt_template"
        )
    learned = whole[len(given) :]
    if tokenizer.eos_token_id in learned:  # some put a line break behind it
        learned = learned[: learned.index(tokenizer.eos_token_id) + 1]
    return given, learned
