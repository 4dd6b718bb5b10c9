"""Errors that users of several rooms catch."""


class IsolationError(RuntimeError):
    """An example's rows, outputs or gradients depend on other examples of its batch.

    >>> import torch
    >>> from lora_dp import DPLinear, PrivacyEngine, losses
    >>> def contrastive(outputs, _):  # compares each example with all others of its batch
    ...     return losses.classification_loss(outputs @ outputs.T, torch.arange(len(outputs)))
    >>> batch = torch.randn(8, 4), torch.zeros(8)
    >>> PrivacyEngine().check_isolation(DPLinear(4, 2), batch, contrastive)
    Traceback (most recent call last):
    lora_dp.errors.IsolationError: ...
    """


class TooFewClients(RuntimeError):
    """So many clients of a round failed that it cannot be combined.

    Attributes:
        in_full: the message with what clients' exceptions said, which may quote private data: for the console of
            whoever runs them, and for no file.
    """

    def __init__(self, message: str, in_full: str | None = None) -> None:
        super().__init__(message)
        self.in_full = in_full or message
