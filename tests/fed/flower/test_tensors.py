"""Tensors in a message, to the edge of what may be sent: a byte or a tensor more is refused, one less is read."""

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

import lora_dp.fed.flower.without_telemetry  # noqa: F401

# isort: split
from flwr.app import Array, ArrayRecord
from safetensors.torch import save

from lora_dp.fed.flower.tensors import pack_tensors, unpack_tensors


def record(content: Any) -> ArrayRecord:
    return ArrayRecord({"safetensors": Array("uint8", (1,), "numpy.ndarray", content)})


def npy(content: bytes, *, head: int = 118, version: bytes = b"\x01\x00", shape: int | None = None) -> ArrayRecord:
    """A NumPy file of these bytes whose head has so many."""
    said = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d,), }" % (len(content) if shape is None else shape)
    said = said.ljust(head - 1) + b"\n"
    return record(b"\x93NUMPY" + version + len(said).to_bytes(2, "little") + said + content)


def headed(header: bytes, length: int | None = None) -> ArrayRecord:
    """A safetensors header behind its length, or what is said to be that."""
    return npy((len(header) if length is None else length).to_bytes(8, "little") + header)


def test_tensors_of_every_kind_come_back_as_they_were_sent():
    sent = {
        "trained": torch.nn.Parameter(torch.randn(3, 5)),
        "turned": torch.randn(3, 5).t(),
        "many": torch.randn(100)[::3],
        "none": torch.zeros(0),
        "half": torch.randn(7).bfloat16(),
        "odd": torch.ones(3).bool(),
    }
    found = unpack_tensors(pack_tensors(sent))
    assert found.keys() == sent.keys()
    assert all(found[name].equal(tensor) and found[name].dtype == tensor.dtype for name, tensor in sent.items())
    assert unpack_tensors(pack_tensors({})) == {}


def test_as_many_bytes_as_may_be_sent_and_no_more():
    packed = npy(save({"a": torch.zeros(60), "b": torch.zeros(40)}))
    assert unpack_tensors(packed, most_bytes=400).keys() == {"a", "b"}
    with pytest.raises(ValueError, match="have 400 bytes, more than 399"):
        unpack_tensors(packed, most_bytes=399)
    # Virtual memory, of which no page is touched.
    with pytest.raises(ValueError, match=f"more than {2**33 + 2**25}"):
        unpack_tensors({"safetensors": FakeArray(np.zeros(2**33 + 2**26, np.uint8).data)})  # type: ignore[arg-type]


class FakeArray:
    def __init__(self, data: memoryview) -> None:
        self.data = data


def test_as_many_tensors_as_may_be_sent_and_no_more():
    three, five = ({f"t{i}": torch.zeros(1) for i in range(count)} for count in (3, 5))
    assert len(unpack_tensors(npy(save(three, {"with": "metadata"})), most_tensors=3)) == 3
    with pytest.raises(ValueError, match="there are more than 3 tensors"):
        unpack_tensors(npy(save(five)), most_tensors=3)
    assert len(unpack_tensors(npy(save({"n" * 500: torch.zeros(1)})))) == 1
    with pytest.raises(ValueError, match="a tensor's name has more than 500 characters"):
        unpack_tensors(npy(save({"n" * 501: torch.zeros(1)})))


@pytest.mark.slow
def test_the_header_of_tensors_is_a_mapping_of_the_length_that_it_says():
    assert unpack_tensors(headed(b"{}")) == {}
    assert unpack_tensors(headed(b"{}".ljust(2**25)), most_bytes=0) == {}
    for wrong in (
        headed(b"{}", 3),
        headed(b"{}", 1),
        headed(b"{}", 0),
        headed(b"{}", 2**63),
        headed(b"1"),
        npy(b""),
        npy(b"1234"),
        headed(b"{}".ljust(2**25 + 1)),
    ):
        with pytest.raises(ValueError, match="the tensors' header is none"):
            unpack_tensors(wrong, most_bytes=0)
    with pytest.raises(ValueError, match="there are more than"):
        unpack_tensors(headed(b"[]"))


def test_the_head_of_the_array_is_of_bytes_of_that_length_and_short():
    content = save({"a": torch.zeros(2)})
    assert len(unpack_tensors(npy(content, head=2048))) == 1
    for wrong in (
        npy(content, head=2049),
        npy(content, version=b"\x02\x00"),
        npy(content, version=b"\x01\x01"),
        record(b"PK\x03\x04" * 10),
        record(b""),
    ):
        with pytest.raises(ValueError, match="the tensors are no array$"):
            unpack_tensors(wrong)
    signed = npy(content)["safetensors"].data.replace(b"|u1", b"|i1")
    for wrong in (npy(content, shape=len(content) + 1), npy(content, shape=0), record(signed)):
        with pytest.raises(ValueError, match="no array of bytes of that length"):
            unpack_tensors(wrong)
