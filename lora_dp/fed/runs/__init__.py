"""One run: its folder, checkpoints, results and what it shows."""
