"""Errors that users of several rooms catch."""


class IsolationError(RuntimeError):
    """An example's rows, outputs or gradients depend on other examples of its batch."""


class TooFewClients(RuntimeError):
    """So many clients of a round failed that it cannot be combined.

    Attributes:
        in_full: the message with what clients' exceptions said, which may quote private data: for the console of
            whoever runs them, and for no file.
    """

    def __init__(self, message: str, in_full: str | None = None) -> None:
        super().__init__(message)
        self.in_full = in_full or message
