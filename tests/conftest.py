"""What the tests share: data, instruction sets, threads, subprocesses, and a watch on memory that must not change."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

# Read when OpenMP is loaded, so before pybn and torch are: idle threads that spin would take the cores of the other
# workers of `pytest -n auto`.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# For `examples`; at the end, as pybn in the clone has no compiled core.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import ml_dtypes
import numpy as np
import pytest
import reference
from hypothesis import HealthCheck, settings

import pybn
from pybn import _core
from pybn._config import configure_from_environment

# How long drawing takes says how busy the machine is, not that a test fails.
slowly = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("reproducible", slowly, derandomize=True, max_examples=75)
settings.register_profile("fuzz", slowly, max_examples=7_500)
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
    "rows, wide": (42, 1541, 1, 1),
}

BFLOAT16 = ml_dtypes.bfloat16
HALF_DTYPES = (np.float16, BFLOAT16)
DATA_DTYPES = (np.float32, np.float64, *HALF_DTYPES)

# Of the arithmetic, which is float32 for half data, and of the one rounding of half data at its end.
RELATIVE = {np.float32: 1e-6, np.float64: 1e-13, np.float16: 1e-6, BFLOAT16: 1e-6}
ROUNDING = {np.float32: 0, np.float64: 0, np.float16: 2**-11, BFLOAT16: 2**-8}

data_dtypes = pytest.mark.parametrize("dtype", DATA_DTYPES, ids=lambda dtype: dtype.__name__)
half_dtypes = pytest.mark.parametrize("dtype", HALF_DTYPES, ids=lambda dtype: dtype.__name__)


_SETS = _core.available_instruction_sets()


@pytest.fixture(params=[*((name, _core.is_amd()) for name in _SETS), (_SETS[0], not _core.is_amd())], ids=str)
def instruction_set(request):
    """Runs the test under every instruction set that this machine has, the best one as AMD's processors use it and as
    others do.
    """
    before = _core.instruction_set(), _core.is_amd()
    name, is_amd = request.param
    assert _core.select_instruction_set(name)
    _core.set_is_amd(is_amd)
    yield name
    _core.select_instruction_set(before[0])
    _core.set_is_amd(before[1])


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
    """Weight, bias, running mean and running variance; float32 for half data."""
    dtype = np.float32 if dtype in HALF_DTYPES else dtype
    return (
        rng.uniform(0.5, 2, channels).astype(dtype),
        rng.uniform(-1, 1, channels).astype(dtype),
        rng.uniform(-1, 1, channels).astype(dtype),
        rng.uniform(0.5, 2, channels).astype(dtype),
    )


def assert_close(actual, expected, dtype, what="", roundings=1):
    """Equal up to rounding, for values of the order of one (or larger, relatively).

    Two `roundings` if `expected` is rounded to a half type as `actual` is.
    """
    kind = np.dtype(dtype).type
    rtol, atol = 4 * RELATIVE[kind] + roundings * ROUNDING[kind], 4 * RELATIVE[kind]
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape == expected.shape:  # a third of the time of asking NumPy's test every time
        with np.errstate(invalid="ignore"):
            if np.all(np.abs(actual - expected) <= atol + rtol * np.abs(expected)):
                return
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, err_msg=str(what))


def assert_same_bits(actual, expected, what=""):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype, what
    assert actual.shape == expected.shape, what
    assert actual.tobytes() == expected.tobytes(), (
        f"{what}: {np.sum(actual != expected)} of {actual.size} values differ"
    )


def check_step(rng, x, channel_axis=1, *, training=True, activation=None, negative_slope=0.01, residual=None, what=""):
    """One forward and one backward pass against the float64 reference: all that they return and all that they update.

    The gradient is zero beside the kinks of the activation, where rounding decides which derivative is right.
    """
    channels = x.shape[channel_axis]
    weight, bias, mean, var = parameters(rng, channels, x.dtype)
    batch_mean, batch_var = reference.stats(x, channel_axis)
    used = (batch_mean, batch_var) if training else (mean, var)
    z = reference.normalize(x, *used, weight, bias, residual=residual, channel_axis=channel_axis)
    dy = rng.standard_normal(x.shape).astype(x.dtype)
    dy[reference.near_a_kink(z, activation)] = 0

    running_mean, running_var = mean.copy(), var.copy()
    with unchanged(x, residual, weight, bias, dy):
        y, saved = pybn.batch_norm_forward(
            x, weight, bias, running_mean, running_var, training=training, activation=activation,
            negative_slope=negative_slope, residual=residual, channel_axis=channel_axis,
        )  # fmt: skip
        got = pybn.batch_norm_backward(dy, saved)

    assert y.dtype == got.dx.dtype == x.dtype, what
    assert y.shape == got.dx.shape == x.shape, what
    assert_close(y, reference.activate(z, activation, negative_slope), x.dtype, what)
    if training:
        count = x.size // channels
        assert_close(running_mean, reference.running(mean, batch_mean), mean.dtype, what)
        assert_close(running_var, reference.running(var, reference.unbiased(batch_var, count)), var.dtype, what)
    else:
        assert_same_bits(running_mean, mean, what)
        assert_same_bits(running_var, var, what)

    active = reference.derivative(z, activation, negative_slope)
    expected = reference.backward(dy, x, *used, weight, 1e-5, training, channel_axis, active=active)
    # dx is a difference of three terms of the order of weight * invstd * dy, which the absolute tolerance is for.
    unit = 4 * np.maximum(1, weight / np.sqrt(used[1] + 1e-5))
    unit = unit if channel_axis == -1 else unit.reshape(-1, *[1] * (x.ndim - 2))
    assert_close(got.dx / unit, expected.dx / unit, x.dtype, what)
    per_value = channels / x.size
    assert got.dweight.dtype == got.dbias.dtype == weight.dtype, what
    assert_close(got.dweight * per_value, expected.dweight * per_value, weight.dtype, what)
    assert_close(got.dbias * per_value, expected.dbias * per_value, weight.dtype, what)
    if residual is None:
        assert got.dresidual is None, what
    else:
        assert got.dresidual.dtype == x.dtype, what
        assert_close(got.dresidual, dy.astype(np.float64) * active, x.dtype, what)


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
