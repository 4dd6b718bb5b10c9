"""What others put around a model or beside its process, and a private step knows nothing of: refused by name."""

import torch.distributed
from torch import nn

_PARALLEL = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule"}


def check_not_wrapped(model: nn.Module) -> None:
    """Refuse a model that is spread over devices.

    Raises:
        ValueError: naming the module and the wrapper.
    """
    for name, module in model.named_modules():
        where = f"'{name}'" if name else "The model"
        if parallel := _PARALLEL.intersection(base.__name__ for base in type(module).__mro__):
            raise ValueError(
                f"{where} is wrapped in {parallel.pop()}, which sums or splits gradients outside the private step: "
                "give the model inside it (model.module), unsharded, and train in one process on one device."
            )
    for name, parameter in model.named_parameters():
        if "DTensor" in (type(parameter).__name__, type(parameter.data).__name__):
            raise ValueError(
                f"'{name}' is sharded over processes (DTensor): give an unsharded model, and train in one process."
            )


def check_not_prepared(optimizer: object, data_loader: object) -> None:
    """Refuse what Accelerate has wrapped: its loader draws batches of its own, its optimizer decides when to step.

    Raises:
        TypeError: naming the argument.
    """
    for name, given in (("optimizer", optimizer), ("data_loader", data_loader)):
        if type(given).__module__.startswith("accelerate."):
            raise TypeError(
                f"The {name} has been through accelerator.prepare: call make_private first, and hand what it returns "
                "to accelerator.prepare."
            )


def check_one_process() -> None:
    """Refuse training in several processes at once, whose ledgers and noise would each know a part of it alone.

    Raises:
        RuntimeError: torch's default process group has more than one process.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        size = torch.distributed.get_world_size()
        if size > 1:
            raise RuntimeError(
                f"torch.distributed runs {size} processes, over which private training is not supported: train in one "
                "process, or clients by lora_dp.fed."
            )
