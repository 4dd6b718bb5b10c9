"""Private layers: drop-in modules, their differentiable functions, and where per-example gradients are kept."""
