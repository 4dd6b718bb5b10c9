"""Tiny models of texts, their tokenizer, and texts for them."""

from pathlib import Path

import tokenizers
import torch
import transformers
from torch import Tensor, nn

LENGTHS = (7, 3, 5)


def small_tokenizer(folder: Path) -> None:
    """With an end token but none for padding."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<end>": 0, "<unk>": 1, "a": 2, "b": 3}, "<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", unk_token="<unk>", model_max_length=24
    ).save_pretrained(folder)


def bert(vocabulary: int = 40) -> transformers.BertModel:
    """Of three blocks and width 16, in evaluation mode, without dropout, with weights so large that all matter."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=32,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertModel(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def bert_folder(folder: Path) -> str:
    """A BERT on disk, with a tokenizer."""
    small_tokenizer(folder)
    bert(4).save_pretrained(folder)
    return str(folder)


def small_decoder(folder: Path) -> str:
    """A GPT-2."""
    small_tokenizer(folder)
    config = transformers.GPT2Config(vocab_size=4, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    transformers.GPT2Model(config).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def texts(width: int = 7) -> dict[str, Tensor]:
    """Token ids of three texts of 7, 3 and 5 tokens, padded to a width."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros(len(LENGTHS), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.randint(1, 40, (length,), generator=generator)
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}
