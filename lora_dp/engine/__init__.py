"""The engine: makes a model, an optimizer and a loader private, takes the private step and keeps the account."""
