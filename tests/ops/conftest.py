"""Keys and instruction sets of the native library."""

from collections.abc import Iterator

import pytest

from lora_dp import _native
from tests.gaussian_oracle import INSTRUCTIONS, KEY


@pytest.fixture(scope="module")
def key() -> Iterator[int]:
    number = _native.key_from(KEY)
    yield number
    _native.drop_key(number)


@pytest.fixture(scope="module", params=INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest) -> str:
    try:
        _native.keystream(KEY, bytes(12), 0, 0, 0, request.param)
    except ValueError as error:
        assert request.param != "portable" and str(error) == f"this machine runs no kernels called '{request.param}'"
        pytest.skip(str(error))
    return request.param
