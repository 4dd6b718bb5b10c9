"""Tensors in a message, read as what they are: bytes from somebody who may wish harm."""

import json
from io import BytesIO

import lora_dp.fed.flower.without_telemetry  # noqa: F401  (before Flower)

# isort: split
import numpy as np
from flwr.app import Array, ArrayRecord
from safetensors.torch import load, save

from lora_dp.fed.methods import State

_FORMAT = "safetensors"
MOST_BYTES = 2**33
MOST_TENSORS = 100_000
_MOST_NAME = 500
_MOST_HEADER = 2**25


def pack_tensors(state: State) -> ArrayRecord:
    """Tensors by name, in one array of bytes: a SuperLink is asked for every array of a record by itself."""
    data = save({name: tensor.cpu().contiguous() for name, tensor in state.items()})
    return ArrayRecord({_FORMAT: Array(np.frombuffer(data, dtype=np.uint8))})


def unpack_tensors(record: ArrayRecord, most_bytes: int = MOST_BYTES, most_tensors: int = MOST_TENSORS) -> State:
    """Tensors by name, on the CPU. Nothing is allocated that the bytes only announce.

    Args:
        record: of a message.
        most_bytes: of all tensors.
        most_tensors: how many.

    Raises:
        ValueError: more of either, or bytes that are no tensors.
        Exception: of another kind, where the bytes are damaged.
    """
    data = _bytes(record[_FORMAT].data, most_bytes + _MOST_HEADER)
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(_MOST_HEADER, len(data) - 8):
        raise ValueError("the tensors' header is none")
    if len(data) - 8 - length > most_bytes:
        raise ValueError(f"the tensors have {len(data) - 8 - length} bytes, more than {most_bytes}")
    header = json.loads(bytes(data[8 : 8 + length]))
    if not isinstance(header, dict) or len(header) > most_tensors + 1:
        raise ValueError(f"there are more than {most_tensors} tensors")
    if any(len(name) > _MOST_NAME for name in header):
        raise ValueError(f"a tensor's name has more than {_MOST_NAME} characters")
    return load(bytes(data))


def _bytes(data: bytes, most: int) -> memoryview:
    """The content of a NumPy file that holds bytes. numpy.load would first make room for as many as its head claims.

    Raises:
        ValueError: it holds something else, or more than ``most``.
    """
    if len(data) > most + 2**10:
        raise ValueError(f"the tensors have {len(data)} bytes, more than {most}")
    file = BytesIO(data[: 2**12])
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("another version")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=2**11)
    except (ValueError, TypeError, SyntaxError) as error:
        raise ValueError("the tensors are no array") from error
    content = memoryview(data)[file.tell() :]
    if dtype != np.dtype(np.uint8) or shape != (len(content),):
        raise ValueError("the tensors are no array of bytes of that length")
    return content
