"""What the tests share: data, instruction sets, threads, subprocesses, and a watch on memory that must not change."""

import contextlib
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import settings

import pybn
from pybn import _core
from pybn._config import configure_from_environment

settings.register_profile("reproducible", deadline=None, derandomize=True, max_examples=150)
settings.register_profile("fuzz", deadline=None, max_examples=15_000)
settings.load_profile("reproducible")

# Each is or straddles the end of a vector of 4, 8 or 16 values, or of an unrolled step of them.
TAIL_SIZES = (1, 2, 3, 5, 7, 15, 16, 17, 31, 33, 63, 64, 65, 97)

# (N, C, H, W) of small and of large images, and what cuts them into more than one segment or group of channels.
NETWORK_SHAPES = {
    "planes of 7x7": (8, 96, 7, 7),
    "planes of 14x14": (8, 40, 14, 14),
    "planes of 28x28, many images": (40, 4, 28, 28),
    "three channels": (3, 3, 112, 112),
    "planes of several segments": (2, 2, 250, 270),
    "one large plane": (1, 1, 331, 401),
    "rows, few channels": (9001, 3, 1, 1),
    "rows, one channel": (40001, 1, 1, 1),
    "rows, many channels": (1100, 200, 1, 1),
}

RELATIVE = {np.float32: 1e-6, np.float64: 1e-13}


@pytest.fixture(params=_core.available_instruction_sets())
def instruction_set(request):
    """Runs the test under every instruction set that this machine has."""
    before = _core.instruction_set()
    assert _core.select_instruction_set(request.param)
    yield request.param
    _core.select_instruction_set(before)


@pytest.fixture(autouse=True)
def _initial_threads():
    yield
    pybn.set_num_threads(2**20)
    configure_from_environment()


@pytest.fixture
def rng():
    return np.random.default_rng(20240229)


def images(rng, shape, dtype=np.float32, channel_axis=1):
    """Data whose channels differ in mean and spread. `shape` is (N, C, ...), of which -1 makes (N, ..., C)."""
    channels = shape[1]
    along = (1, channels) + (1,) * (len(shape) - 2)
    x = rng.standard_normal(shape) * rng.uniform(0.5, 2, along) + rng.uniform(-3, 3, along)
    if channel_axis == -1:
        x = np.moveaxis(x, 1, -1)
    return np.ascontiguousarray(x, dtype)


def parameters(rng, channels, dtype=np.float32):
    """Weight, bias, running mean and running variance."""
    return (
        rng.uniform(0.5, 2, channels).astype(dtype),
        rng.uniform(-1, 1, channels).astype(dtype),
        rng.uniform(-1, 1, channels).astype(dtype),
        rng.uniform(0.5, 2, channels).astype(dtype),
    )


def assert_close(actual, expected, dtype, what=""):
    """Equal up to rounding, for values of the order of one (or larger, relatively)."""
    tolerance = RELATIVE[np.dtype(dtype).type]
    np.testing.assert_allclose(actual, expected, rtol=4 * tolerance, atol=4 * tolerance, err_msg=str(what))


def assert_same_bits(actual, expected, what=""):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype, what
    assert actual.shape == expected.shape, what
    assert actual.tobytes() == expected.tobytes(), (
        f"{what}: {np.sum(actual != expected)} of {actual.size} values differ"
    )


@contextlib.contextmanager
def unchanged(*arrays):
    """Asserts that not a byte of the arrays changes inside."""
    arrays = [a for a in arrays if isinstance(a, np.ndarray) and a.dtype != object]
    before = [np.array(a).tobytes() for a in arrays]
    yield
    for number, (array, was) in enumerate(zip(arrays, before, strict=True)):
        assert np.array(array).tobytes() == was, f"array {number} of those that must not change, changed"


def run_python(code, tmp_path, env=None, timeout=60):
    """What a program prints in a new interpreter, in a folder without ./pybn; a hang or an error fails the test."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env={**os.environ, **(env or {})},
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()
