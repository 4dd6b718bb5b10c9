"""What servers ask of a node, in harmful words and in harmless ones, and its answers."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("flwr")

from lora_dp.fed.flower import client as flower_client
from lora_dp.fed.flower import messages
from lora_dp.fed.rounds.messages import Task, Update
from tests.fed.flower.node_data import GOOD

WHOLE = {"unit": "client", "noise_by": "client"}
SPOILT = "a\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\u2028\r\n\x00z"
ODD = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\u200e\u200f]")


def sent(options: dict[str, Any] | str, state: dict[str, torch.Tensor], task: tuple[int, int, int] = (0, 0, 4)) -> Any:
    """What a server asks for with a configuration, which need not be one that a server of ours would send."""
    text = options if isinstance(options, str) else yaml.safe_dump({**GOOD, **options})
    return messages.pack_task(messages.pack_config(text), Task(*task, state), messages.pack_tensors(state))


def answer(content: Any, node: dict[str, Any]) -> Update | str:
    return messages.unpack_answer(flower_client._answered(flower_client._train, content, node))


# The owner's own words


def policy(path: Path, text: str | dict[str, Any]) -> str:
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    return str(path)


def private_node(folder: Path, own: Path, model: str) -> dict[str, Any]:
    """The configuration of the first client's node: data of its own, a ledger, and a policy that admits a model."""
    return {
        "partition-id": 0,
        "data": str(own),
        "ledger": str(folder / "ledger.json"),
        "epsilon": 8.0,
        "delta": 1e-5,
        "policy": policy(folder / "policy.yaml", {"model": model}),
    }


# A failure is no bit


def asking_model(path: Path) -> Path:
    """A model whose tokenizer knows a word that its embedding has no row for: it asks whether a text has the word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "hiv": 900}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(path)
    BertForSequenceClassification(
        BertConfig(
            vocab_size=10,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=2,
        )
    ).save_pretrained(path)
    return path


def texts(path: Path, last: str) -> Path:
    path.mkdir()
    rows = [f"patient {i} is well,{i % 2}" for i in range(39)] + [f"{last},1"]
    (path / "train.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return path
