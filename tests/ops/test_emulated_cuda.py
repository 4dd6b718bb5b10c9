"""The CUDA source, compiled for a CPU, against the CPU kernels: bit for bit.

A block is 128 threads that wait for each other as on a GPU. What nvcc makes of the source only a GPU can show
(tests marked ``gpu``); what the source says is shown here, on any machine.
"""

import copy
import ctypes

import numpy as np
import pytest
import torch

from lora_dp.ops.native import native
from tests.compiled import opened
from tests.ops.update_problem import DTYPES, KEY, OPTIMIZERS, Problem, same_bits

KEY_BYTES = bytes(range(32))
SHAPES = [(), (7,), (5, 3), (0, 4), (1025,), (3, 700), (300, 8)]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return opened("emulated_cuda", tmp_path_factory.mktemp("emulated"), "-std=c++20", "-pthread")


def address(value: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(value)


@pytest.mark.slow
@pytest.mark.parametrize("n_bytes", [4, 64, 72, 64 * 127, 64 * 128, 64 * 1000 - 4])
def test_keystream(emulated, n_bytes):
    nonce = bytes(range(100, 112))
    ours, theirs = np.zeros(n_bytes, np.uint8), np.zeros(n_bytes, np.uint8)
    native.keystream(KEY_BYTES, nonce, 2**32 - 1000, ours.ctypes.data, n_bytes)
    assert (
        emulated.emulated_keystream(
            KEY_BYTES, nonce, ctypes.c_uint32(2**32 - 1000), address(theirs.ctypes.data), ctypes.c_int64(n_bytes)
        )
        == 0
    )
    assert np.array_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 7, 8, 9, 1023, 1024, 50_001])
def test_rounded_gaussians(emulated, n):
    scale = 1.7 * 2**32
    ours, theirs = np.zeros(n, np.int64), np.zeros(n, np.int64)
    native.rounded_gaussians(KEY, 3, 11, scale, ours.ctypes.data, n)
    assert (
        emulated.emulated_gaussians(
            KEY_BYTES,
            ctypes.c_uint32(3),
            ctypes.c_uint64(11),
            ctypes.c_double(scale),
            ctypes.c_int64(n),
            address(theirs.ctypes.data),
        )
        == 0
    )
    assert np.array_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("examples", [0, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_private_update(emulated, optimizer, examples, strength, monkeypatch):
    def update(key, draw, rows, hyper, count, number, noisy, scale, step, expected_batch_size, weights, *_):
        assert (
            emulated.emulated_update(
                KEY_BYTES,
                ctypes.c_uint64(draw),
                address(rows),
                address(hyper),
                ctypes.c_int64(count),
                ctypes.c_int64(number),
                ctypes.c_int(noisy),
                ctypes.c_double(scale),
                ctypes.c_double(step),
                ctypes.c_double(expected_batch_size),
                address(weights),
            )
            == 0
        )

    for dtype in DTYPES:
        for noisy in (True, False):
            problem = Problem(optimizer, dtype, SHAPES, examples=examples, strength=strength, noisy=noisy)
            twin = copy.deepcopy(problem)
            with monkeypatch.context() as during:
                during.setattr(native, "private_update", update)
                found = problem.take()
            assert same_bits(found, twin.take())


@pytest.mark.slow
def test_widest_filter_fits_the_shared_memory(emulated, monkeypatch):
    test_private_update(emulated, "sgd", 0, 64.0, monkeypatch)  # 256 entries to either side of 8 numbers each


def test_a_filter_beyond_the_shared_memory_is_refused(emulated):
    problem = Problem("sgd", torch.float32, [(300, 16)], strength=33.0)  # 132 entries of 16 numbers
    from lora_dp.ops import private_update

    hyper = torch.zeros(8, dtype=torch.float64)
    update = private_update.UpdateArguments(
        problem.parameters, problem.sums, [None], [], [], [], hyper, [True], 33.0, "sgd", 0, 0, 0.0, 1.0, 1.0
    )
    rows = torch.tensor(private_update._table(update), dtype=torch.int64)
    weights = torch.ones(133, dtype=torch.float64)
    before = problem.parameters[0].clone()
    assert (
        emulated.emulated_update(
            KEY_BYTES,
            ctypes.c_uint64(0),
            address(rows.data_ptr()),
            address(hyper.data_ptr()),
            ctypes.c_int64(1),
            ctypes.c_int64(0),
            ctypes.c_int(0),
            ctypes.c_double(0),
            ctypes.c_double(1),
            ctypes.c_double(1),
            address(weights.data_ptr()),
        )
        == 1
    )
    assert torch.equal(problem.parameters[0], before)
