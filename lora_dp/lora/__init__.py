"""LoRA adapters: put into a model, exchanged, merged, saved and loaded."""
