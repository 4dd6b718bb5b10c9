"""Made-up reviews told apart by PEFT's LoRA, without privacy: what peft_loop_private.py is written after."""

import random

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import RobertaConfig, RobertaForSequenceClassification

LIKED = [["awful", "boring", "clumsy", "dull", "weak"], ["clever", "great", "lovely", "moving", "superb"]]
WORDS = ["<s>", "<pad>", "</s>", "the", "a", "film", "plot", "cast", "was", "is", "very", *LIKED[0], *LIKED[1]]


def review(label: int) -> dict[str, torch.Tensor]:
    words = random.choices(WORDS[3:11], k=random.randint(4, 9)) + random.choices(LIKED[label], k=3)
    text = ["<s>", *random.sample(words, len(words)), "</s>"]
    ids = torch.tensor([WORDS.index(word) for word in text + ["<pad>"] * (16 - len(text))])
    return {"input_ids": ids, "attention_mask": (ids != 1).long(), "labels": torch.tensor(label)}


random.seed(0)
torch.manual_seed(0)
train, test = [review(i % 2) for i in range(4000)], [review(i % 2) for i in range(1000)]
model = RobertaForSequenceClassification(
    RobertaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=20,
        initializer_range=0.1,
    )
)
model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"]))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
loader = DataLoader(train, batch_size=256, shuffle=True)
for _ in range(3):
    model.train()
    for batch in loader:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
model.eval()
batch = next(iter(DataLoader(test, batch_size=1000)))
with torch.no_grad():
    accuracy = (model(**batch).logits.argmax(1) == batch["labels"]).float().mean()
print(f"accuracy {accuracy:.3f}")
model.save_pretrained("adapter")
