"""The Trainers of Transformers and TRL, with the private step in place of theirs."""
