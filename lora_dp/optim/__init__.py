"""Optimizers and averages for noisy gradients: all post-processing of what was released."""
