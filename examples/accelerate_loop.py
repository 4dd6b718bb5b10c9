"""The next words of made-up sentences: PEFT's LoRA on a small language model, in a loop of Accelerate's."""

import random

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = ["<pad>", "<s>", "</s>", "the", "a", "film", "plot", "cast", "was", "is", "very", "dull", "weak", "great"]


def sentence() -> dict[str, torch.Tensor]:
    degree = ["very"] * random.randint(0, 3)
    words = [random.choice(["the", "a"]), random.choice(["film", "plot", "cast"]), random.choice(["was", "is"])]
    text = ["<s>", *words, *degree, random.choice(["dull", "weak", "great"]), "</s>"]
    ids = torch.tensor([WORDS.index(word) for word in text + ["<pad>"] * (9 - len(text))])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


random.seed(0)
torch.manual_seed(0)
train, test = [sentence() for _ in range(2000)], [sentence() for _ in range(500)]
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
)
model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, modules_to_save=["lm_head"]))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
loader = DataLoader(train, batch_size=128, shuffle=True)
accelerator = Accelerator()
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for _ in range(3):
    model.train()
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
model.eval()
batch = next(iter(DataLoader(test, batch_size=500)))
with torch.no_grad():
    loss = model(**{name: values.to(accelerator.device) for name, values in batch.items()}).loss
print(f"validation loss {loss:.2f}")
accelerator.unwrap_model(model).save_pretrained("adapter")
