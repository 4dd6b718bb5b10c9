"""Restaurants described from their attributes: LoRA on a small language model by TRL's SFTTrainer, with ε = 8."""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig

from lora_dp import PrivacyArguments, PrivateSFTTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--data", default="tuetschek/e2e_nlg", help="as experiments/e2e.py makes it")
parser.add_argument("--output", default="runs/e2e")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--batch", type=int, default=16, help="texts that fit the memory")
parser.add_argument("--parts", type=int, default=8, help="so many of them are a step")
parser.add_argument("--resume", action="store_true")
options = parser.parse_args()

data = load_dataset(options.data).map(
    lambda row: {
        "prompt": f"Describe the restaurant: {row['meaning_representation']}\n",
        "completion": row["human_reference"],
    },
    remove_columns=["meaning_representation", "human_reference"],
)
trainer = PrivateSFTTrainer(
    model=options.model,
    args=SFTConfig(
        options.output,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.parts,
        max_length=128,
        logging_steps=5,
        save_steps=10,
        report_to="none",
        gradient_checkpointing=False,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=data["train"],
    eval_dataset=data["validation"].select(range(50)),
    peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    privacy=PrivacyArguments(target_epsilon=8, target_delta=1e-5),
)
print(f"before: validation loss {trainer.evaluate()['eval_loss']:.3f}")
trainer.train(resume_from_checkpoint=options.resume)
print(f"after: validation loss {trainer.evaluate()['eval_loss']:.3f}")
trainer.save_model()
asked = trainer.processing_class(data["validation"][0]["prompt"], return_tensors="pt").to(trainer.model.device)
written = trainer.model.generate(**asked, max_new_tokens=40, do_sample=False)
print(trainer.processing_class.decode(written[0], skip_special_tokens=True))
