"""TRL's SFTTrainer with private steps: prompts and completions, chats, what is refused, and a script of two changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lora_dp import PrivacyArguments, PrivateSFTTrainer
from lora_dp.losses import causal_lm_loss
from tests.language_models import causal_lm
from tests.support import brute_force, clip_and_sum
from tests.trainers.training import Crash, hub_of_folders

trl = pytest.importorskip("trl")

WORDS = ["<pad>", "<s>", "</s>", "user", "assistant", "name", ":", "is", "a", "cheap", "Italian", "place", "Alimentum"]
CHAT = (
    "{% for message in messages %}{{ message['role'] + ' : ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + ' </s> ' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
)


def tokenizer(side: str = "right") -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side=side
    )
    made.chat_template = CHAT
    return made


PROMPTED = Dataset.from_dict(
    {
        "prompt": ["name : Alimentum"] * 6,
        "completion": [" is a cheap place"[: 5 + 4 * (i % 4)].rstrip() + " a" * i for i in range(6)],
    }
)
CHATS = Dataset.from_dict(
    {
        "messages": [
            [
                {"role": "user", "content": "name : Alimentum"},
                {"role": "assistant", "content": "is a cheap" + " Italian" * i + " place"},
            ]
            for i in range(6)
        ]
    }
)

ADAPTERS = LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def sft(folder: Path, data: Dataset, *, side: str = "right", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    privacy, callbacks = options.pop("privacy", {"noise_multiplier": 1.0}), options.pop("callbacks", None)
    training = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "logging_steps": 1,
        **options,
    }
    return PrivateSFTTrainer(
        model=causal_lm("llama", dtype),
        args=trl.SFTConfig(str(folder), **training),
        train_dataset=data,
        processing_class=tokenizer(side),
        peft_config=ADAPTERS,
        callbacks=callbacks,
        privacy=PrivacyArguments(target_delta=1e-3, **privacy),
    )


def one_loss(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
    return causal_lm_loss(model(input_ids=row["input_ids"][None]).logits, row["labels"][None])[0]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["completions", "chats"])
def test_a_step_is_that_of_brute_force_on_labelled_tokens_alone(tmp_path: Path, kind: str, side: str) -> None:
    torch.set_default_dtype(torch.float64)  # by which TRL's fused head computes, too
    try:
        trainer = sft(
            tmp_path,
            CHATS if kind == "chats" else PROMPTED,
            side=side,
            dtype=torch.float64,
            assistant_only_loss=kind == "chats",
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            privacy={"noise_multiplier": 0.0, "clip_bound": 0.05},
        )
        model = trainer.model.double()
        rows = [
            {"input_ids": torch.tensor(row["input_ids"]), "labels": torch.tensor(row["labels"])}
            for row in trainer.train_dataset
        ]
        assert len({len(row["input_ids"]) for row in rows}) > 2
        labelled = [int((row["labels"] != -100).sum()) for row in rows]
        assert len(set(labelled)) > 2
        assert all(0 < count < len(row["labels"]) for count, row in zip(labelled, rows, strict=True))
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        # TRL replaces the model's forward by one that stays with this very model, so that no copy of it will do.
        reference = get_peft_model(causal_lm("llama"), ADAPTERS, autocast_adapter_dtype=False)
        reference.load_state_dict(model.state_dict())
        gradients = brute_force(reference, one_loss, rows, names)
        assert all(any(bool(g.any()) for g in each.values()) for each in gradients)
        expected = clip_and_sum(gradients, "flat", 0.05, lambda name: name)
        before = {name: model.get_parameter(name).detach().clone() for name in names}
        trainer.train()
        for name in names:
            change = (before[name] - model.get_parameter(name).detach()) * 6
            torch.testing.assert_close(change, expected[name], rtol=1e-5, atol=1e-7, msg=name)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_defaults_of_trl_checkpoints_and_bfloat16_train(tmp_path: Path) -> None:
    trainer = sft(tmp_path, PROMPTED, bf16=None, max_steps=2)
    assert trainer.args.bf16
    assert trainer.args.gradient_checkpointing
    trainer.train()
    assert trainer.engine.ledger.steps == 2


def test_it_resumes_is_pushed_and_opened_by_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, pushed = tmp_path / "out", hub_of_folders(monkeypatch, tmp_path / "hub")
    saved = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "privacy": {"target_epsilon": 8.0}}
    with pytest.raises(KeyboardInterrupt):
        sft(folder, PROMPTED, callbacks=[Crash(3)], **saved).train()
    resumed = sft(folder, PROMPTED, **saved)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.engine.ledger.steps == 6  # of which one was lost by the crash
    assert resumed.state.global_step == 5
    resumed.push_to_hub()
    opened = PeftModel.from_pretrained(causal_lm("llama", torch.float32), pushed).eval()
    words = tokenizer()("name : Alimentum", return_tensors="pt")
    written = opened.generate(input_ids=words["input_ids"], max_new_tokens=3, do_sample=False)
    assert written.shape[1] > 3
    assert f"ε = {resumed.epsilon():.4g} at δ = 0.001" in (pushed / "README.md").read_text()


def test_data_without_texts_are_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no texts that TRL knows, but mr, ref: name their column by SFTConfig\(data"):
        sft(tmp_path, Dataset.from_dict({"mr": ["name"], "ref": ["a"]}))
    sft(tmp_path, Dataset.from_dict({"ref": ["name : Alimentum"] * 6}), dataset_text_field="ref")


def test_no_metric_of_private_batches_is_logged(tmp_path: Path) -> None:
    trainer = sft(tmp_path, PROMPTED, max_steps=2)
    trainer.train()
    for entry in trainer.state.log_history:
        assert not entry.keys() & {"loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm"}
    assert any("epsilon" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"packing": True, "max_length": 32}, "packing cannot be used in private training, since several texts"),
        ({"padding_free": True, "max_length": None}, "padding_free cannot be used"),
        ({"loss_type": "dft"}, "choose 'nll'"),
    ],
    ids=["packing", "padding-free", "dft"],
)
def test_rows_of_several_texts_are_refused_with_the_remedy(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sft(tmp_path, PROMPTED, **options)
