"""Errors that users of several rooms catch."""


class IsolationError(RuntimeError):
    """An example's rows, outputs or gradients depend on other examples of its batch."""
