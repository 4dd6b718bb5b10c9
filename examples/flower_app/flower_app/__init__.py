"""Private federated fine-tuning as a Flower app."""
