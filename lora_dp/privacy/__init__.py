"""The privacy ideas by name: accounting, clipping, noise, sampling, randomness, and the mechanism that joins them."""
