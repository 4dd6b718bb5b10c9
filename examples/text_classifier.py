"""A private text classifier: LoRA adapters in a Transformers model, trained on 4,000 reviews at ε = 8.

    python examples/text_classifier.py

Takes about half a minute, and downloads nothing. The adapter ends up in the folder adapter/.
"""

import random

import torch
from torch.utils.data import DataLoader, default_collate
from transformers import RobertaConfig, RobertaForSequenceClassification

from lora_dp import LoRAConfig, PrivacyEngine, inject_lora, save_adapter
from lora_dp.losses import classification_loss

# Made-up reviews: three words of each tell whether the writer liked the film.
LIKED = [["awful", "boring", "clumsy", "dull", "weak"], ["clever", "great", "lovely", "moving", "superb"]]
OTHER = ["the", "a", "film", "plot", "cast", "music", "scene", "was", "is", "and", "with", "very", "so"]
WORDS = ["<s>", "<pad>", "</s>", *OTHER, *LIKED[0], *LIKED[1]]


def review(label: int) -> dict[str, torch.Tensor]:
    words = random.choices(OTHER, k=random.randint(4, 9)) + random.choices(LIKED[label], k=3)
    text = ["<s>", *random.sample(words, len(words)), "</s>"]
    ids = torch.tensor([WORDS.index(word) for word in text + ["<pad>"] * (16 - len(text))])
    return {"input_ids": ids, "attention_mask": (ids != 1).long(), "labels": torch.tensor(label)}


random.seed(0)
torch.manual_seed(0)
reviews = [review(i % 2) for i in range(5000)]
train, test = reviews[:4000], reviews[4000:]

# A small model with random weights. In earnest, take a pretrained one, and texts encoded by its tokenizer:
# model = AutoModelForSequenceClassification.from_pretrained("roberta-base", num_labels=2)
model = RobertaForSequenceClassification(
    RobertaConfig(
        vocab_size=len(WORDS),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=20,
        initializer_range=0.1,
        num_labels=2,
    )
)
model = inject_lora(
    model, LoRAConfig(r=8, alpha=8, target_modules=["query", "value"], trainable_modules=["classifier"])
)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
loader = DataLoader(train, batch_size=256)  # 256 is the expected batch size

engine = PrivacyEngine(accountant="pld")
model, optimizer, loader = engine.make_private_with_epsilon(
    model=model,
    optimizer=optimizer,
    data_loader=loader,
    target_epsilon=8,
    target_delta=1e-5,
    epochs=4,
    max_grad_norm=1.0,
    clipping="flat",
    phases="BA",  # "B", "A", "AB" (both), "BA" (alternating: LA-LoRA)
)
for epoch in range(4):
    model.train()
    for batch in loader:  # Poisson batches; an empty one is a step of noise, taken by the loader
        output = model(batch["input_ids"], attention_mask=batch["attention_mask"])
        losses = classification_loss(output.logits, batch["labels"])  # (N,): one loss for each example
        optimizer.backward(losses)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    batch = default_collate(test)
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    accuracy = (logits.argmax(1) == batch["labels"]).float().mean()
    print(f"epoch {epoch + 1}: accuracy {accuracy:.3f}, ε = {engine.get_epsilon(delta=1e-5):.2f}")
save_adapter(model, "adapter/")  # PEFT's format: PeftModel.from_pretrained opens it
