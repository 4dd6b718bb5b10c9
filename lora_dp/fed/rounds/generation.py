"""Texts that a language model goes on with from public prompts, and how near they come to those that people wrote."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lora_dp.extras import needing
from lora_dp.fed.data.completions import CompletionExamples
from lora_dp.fed.models.options import Precision
from lora_dp.isolation.trials import modes_kept

_AT_ONCE = 32
_SEED = 20261130


@dataclass(frozen=True)
class Prompt:
    """One prompt with all completions that the data have of it.

    Attributes:
        tokens: int64 (T,), of at least one token.
        text: the prompt as it was written.
        references: the completions as they were written.

    >>> Prompt(torch.tensor([5]), "Is it so?", ["Yes."]).references
    ['Yes.']
    """

    tokens: Tensor
    text: str
    references: list[str]


@dataclass(frozen=True)
class Quality:
    """How near generated texts come to their references.

    Attributes:
        bleu: of all texts together, 0 … 100, by sacrebleu (Post 2018, arXiv 1804.08771).
        rouge_l: mean F-measure of the longest common subsequence, 0 … 100, against the nearest reference (Lin 2004,
            ROUGE: A package for automatic evaluation of summaries).

    >>> Quality(bleu=40.0, rouge_l=55.0).bleu
    40.0
    """

    bleu: float
    rouge_l: float


@dataclass(frozen=True)
class Generations:
    """Texts from the same prompts before and after training, ready for JSON.

    Attributes:
        texts: of each prompt: "prompt", "references", "before" and "after", the last two None where not generated.
        before, after: their quality.

    >>> Generations([{"prompt": "Is it so?", "references": ["Yes."], "before": "It", "after": None}]).after is None
    True
    """

    texts: list[dict[str, Any]]
    before: dict[str, float] | None = None
    after: dict[str, float] | None = None


class Prompts:
    """Different prompts of public examples, drawn always alike.

    Args:
        examples: to draw from.
        tokenizer: Transformers', of the model.
        count: how many prompts at most.
        limit: most tokens of prompt and completion together.
    """

    def __init__(self, examples: CompletionExamples, tokenizer: Any, count: int, limit: int) -> None:
        self._tokenizer = tokenizer
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for index in range(len(examples)):
            if len(examples.completion(index)):  # nothing is left of others, whose prompts are too long
                by_prompt.setdefault(tuple(examples.prompt(index).tolist()), []).append(index)
        order = torch.randperm(len(by_prompt), generator=torch.Generator().manual_seed(_SEED))[:count].tolist()
        groups = list(by_prompt.items())
        # A text must begin with some token.
        first = next(
            token
            for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
            if token is not None
        )
        self.prompts = [
            Prompt(
                torch.tensor(tokens or (first,)),
                self._text(tokens),
                list(dict.fromkeys(self._text(examples.completion(index).tolist()) for index in indices)),
            )
            for tokens, indices in (groups[place] for place in order)
        ]
        longest = max((len(examples.completion(index)) for index in range(len(examples))), default=0)
        self._most = max(1, min(longest, limit - max((len(p.tokens) for p in self.prompts), default=0)))

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    @torch.no_grad()
    def generate(self, model: nn.Module, precision: Precision = "float32") -> list[str]:
        """What a model goes on with, the likeliest token each time, up to the longest completion of the examples.

        Args:
            model: Transformers', a causal language model; it is left as it was.
            precision: in which it runs.
        """
        found: list[str] = []
        device = next(model.parameters()).device
        with modes_kept(model), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            model.eval()
            for tokens, mask in self._batches():
                whole = model.generate(  # type: ignore[operator]  # its class is Transformers'
                    input_ids=tokens.to(device), attention_mask=mask.to(device), generation_config=self._greedy(model)
                )
                found += [self._text(row) for row in whole[:, tokens.shape[1] :].tolist()]
        return found

    def _greedy(self, model: Any) -> transformers.GenerationConfig:
        return transformers.GenerationConfig(
            max_new_tokens=self._most,
            do_sample=False,
            use_cache=True,
            pad_token_id=self._tokenizer.pad_token_id,
            eos_token_id=model.generation_config.eos_token_id or self._tokenizer.eos_token_id,
        )

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Prompts padded on the left, so that each is followed by what is generated, with masks."""
        for start in range(0, len(self.prompts), _AT_ONCE):
            part = [prompt.tokens.flip(0) for prompt in self.prompts[start : start + _AT_ONCE]]
            tokens = pad_sequence(part, True, self._tokenizer.pad_token_id).flip(1)
            mask = pad_sequence([torch.ones_like(row) for row in part], True, 0).flip(1)
            yield tokens, mask

    def compared(self, before: Sequence[str] | None, after: Sequence[str] | None) -> Generations:
        """Generated texts beside what people wrote, with their quality.

        Args:
            before, after: as :meth:`generate` has returned them; None where it was not asked.
        """
        nothing = [None] * len(self.prompts)
        texts = [
            {"prompt": prompt.text, "references": prompt.references, "before": old, "after": new}
            for prompt, old, new in zip(self.prompts, before or nothing, after or nothing, strict=True)
        ]
        references = [prompt.references for prompt in self.prompts]
        first, last = (None if each is None else asdict(quality(each, references)) for each in (before, after))
        return Generations(texts, first, last)


def quality(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Quality:
    """How near texts come to their references.

    Args:
        texts: generated.
        references: of each text, at least one.

    >>> quality(["the cat sat on the mat"], [["a dog", "the cat sat on the mat"]])
    Quality(bleu=100.0, rouge_l=100.0)
    """
    with needing("BLEU and ROUGE", "fed"):
        import sacrebleu  # at the end of a run of language models alone
        from rouge_score.rouge_scorer import RougeScorer

    most = max(len(each) for each in references)
    streams = [[each[place] if place < len(each) else None for each in references] for place in range(most)]
    bleu = sacrebleu.corpus_bleu(list(texts), streams)  # type: ignore[arg-type]  # None where there is no further one
    scorer = RougeScorer(["rougeL"])
    found = (scorer.score_multi(list(own), text)["rougeL"] for text, own in zip(texts, references, strict=True))
    return Quality(round(bleu.score, 2), round(100 * sum(score.fmeasure for score in found) / len(texts), 2))
