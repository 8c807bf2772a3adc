"""float16 and bfloat16 data: converted in registers, computed in float32, rounded once.

What half data share with the other types is tested with them: every size and layout in test_layouts.py, promises about
accuracy and threads in test_accuracy.py, steps in test_split_operations.py, layers in test_layers.py.
"""

import itertools
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import reference
from conftest import (
    BFLOAT16,
    NETWORK_SHAPES,
    assert_same_bits,
    check_step,
    data_dtypes,
    half_dtypes,
    images,
    parameters,
    run_python,
    unchanged,
)

import pybn

# 65536 values in kernels of every kind: planes long and short, few and many of them, rows long and short.
SHAPES_OF_65536 = {
    "planes": ((2, 4, 64, 128), 1),
    "small planes": ((16, 64, 8, 8), 1),
    "odd planes": ((1, 65537 // 3, 3), 1),
    "one plane": ((1, 1, 65536), 1),
    "rows": ((4, 16, 16, 64), -1),
    "odd rows": ((5041, 13), 1),
    "narrow rows": ((21845, 3), 1),
    "wide rows": ((63, 1040), 1),
    "one column": ((65536, 1), 1),
}


def patterns(dtype, shape):
    """Every number, zero, infinity and NaN of a half type, from the start again if the shape has room for more."""
    return np.resize(np.arange(65536, dtype=np.uint16), shape).view(dtype)


def to_half(values, dtype):
    """Rounded to nearest, ties to even, by NumPy or ml_dtypes."""
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def assert_same_numbers(actual, expected, what=""):
    """The same bits, but for those of NaN."""
    assert actual.dtype == expected.dtype, what
    with np.errstate(invalid="ignore"):  # signalling NaN
        nan = np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(actual), nan, err_msg=str(what))
    assert_same_bits(actual[~nan], expected[~nan], what)


IDENTITY = {"running_mean": 0.0, "running_var": 0.75, "bias": -0.0}  # with eps=0.25: z = (x - 0) * 1 + -0.0 = x


@pytest.mark.parametrize(("shape", "channel_axis"), SHAPES_OF_65536.values(), ids=SHAPES_OF_65536)
@half_dtypes
def test_every_bit_pattern_passes_through_the_kernels_as_it_is(instruction_set, dtype, shape, channel_axis):
    x = patterns(dtype, shape)
    with np.errstate(invalid="ignore"):
        rectified, passes = np.abs(np.where(x < 0, 0, x).astype(dtype)), np.where(x <= 0, 0, 1).astype(dtype)
    options = {name: np.full(shape[channel_axis], value, np.float32) for name, value in IDENTITY.items()}
    options.update(eps=0.25, training=False, channel_axis=channel_axis)
    y, saved = pybn.batch_norm_forward(x, **options)
    assert_same_numbers(y, x, "forward")
    assert_same_numbers(pybn.batch_norm_backward(x, saved).dx, x, "backward")

    relu, saved = pybn.batch_norm_forward(x, activation="relu", **options)
    assert_same_numbers(np.abs(relu), rectified, "relu")  # any sign of zero
    dx = pybn.batch_norm_backward(np.ones_like(x), saved).dx
    assert_same_numbers(dx, passes, "relu, backward")

    y, saved = pybn.batch_norm_forward(np.zeros_like(x), residual=x, activation="relu", **options)
    assert_same_numbers(np.abs(y), rectified, "residual")
    dx = pybn.batch_norm_backward(np.ones_like(x), saved).dx
    assert_same_numbers(dx, passes, "residual, backward")


@pytest.mark.parametrize("channel_axis", [1, -1])
@half_dtypes
def test_results_are_rounded_to_nearest_and_ties_to_even(instruction_set, dtype, channel_axis):
    """A channel for each exponent, and a bias of quarters and halves of its spacing: z is exact in float32.

    With denormals, and with numbers beyond the largest, of which the nearest is infinity.
    """
    by_exponent = patterns(dtype, 32768).reshape(-1, 2 ** ml_dtypes.finfo(dtype).nmant)
    numbers = by_exponent[:-1]  # the last are infinity and NaN
    channels = len(numbers)
    steps = reference.spacing(numbers[:, 1].astype(np.float32), dtype)
    for quarters, sign in itertools.product((-3, -2, -1, 1, 2, 3), (1, -1)):
        bias = np.float32(sign * quarters / 4) * steps
        x = (sign * numbers).astype(dtype)
        z = x.astype(np.float32) + bias[:, None]
        assert np.array_equal(z, x.astype(np.float64) + bias.astype(np.float64)[:, None]), "z is to be exact"
        x = np.stack([x, x]) if channel_axis == 1 else np.stack([x.T, x.T])
        expected = to_half(np.stack([z, z]) if channel_axis == 1 else np.stack([z.T, z.T]), dtype)
        mean, var = np.zeros(channels), np.full(channels, 0.75)
        y = pybn.batch_norm(x, mean, var, None, bias, eps=0.25, channel_axis=channel_axis)
        np.testing.assert_array_equal(y.astype(np.float64), expected.astype(np.float64))


@data_dtypes
def test_the_unit_of_rounding_is_the_distance_to_the_next_number(dtype):
    info = ml_dtypes.finfo(dtype)
    values = np.array([0, 1, 1.5, 2, -3, 1000, float(info.smallest_subnormal), float(info.tiny)])
    following = np.nextafter(np.abs(values).astype(dtype), dtype(np.inf)).astype(np.float64)
    np.testing.assert_array_equal(reference.spacing(values, dtype), following - np.abs(values))
    assert reference.error_in_spacings(np.zeros(1, dtype), np.array([3 * float(info.smallest_subnormal)])) == 3


def test_the_test_of_rounding_meets_infinity_and_denormals():
    """What NumPy and ml_dtypes make of the edges, as IEEE 754 has it."""
    edge = np.array([65504, 65519.99, 65520, 2.0**-25, 2.0**-25 * 1.01, 3 * 2.0**-25], np.float32)
    expected = np.array([65504, 65504, np.inf, 0, 2.0**-24, 2.0**-23], np.float16)
    assert_same_bits(to_half(edge, np.float16), expected)
    largest = float(ml_dtypes.finfo(BFLOAT16).max)
    edge = np.array([largest * (1 + 2.0**-10), largest + 2.0**119, 2.0**-134, 3 * 2.0**-134], np.float32)
    expected = np.array([largest, np.inf, 0, 2.0**-132], BFLOAT16)
    assert_same_bits(to_half(edge, BFLOAT16), expected)


@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("mean", [0, 1, 30, 300])
@half_dtypes
def test_a_result_is_the_exact_one_rounded_once(instruction_set, rng, dtype, mean, channel_axis):
    """Half a spacing of the half type, and the 2 ULP (2^-23 * max(|y|, 1)) that float32 arithmetic may be off."""
    for shape, spread in itertools.product([(16, 6, 31, 33), (900, 17, 1, 1), (16, 3, 7, 7)], (0.02, 1.0, 90.0)):
        x = np.clip((rng.standard_normal(shape) + mean) * spread, -6e4, 6e4).astype(dtype)
        x = np.ascontiguousarray(np.moveaxis(x, 1, channel_axis))
        residual = np.ascontiguousarray(x[::-1])
        batch = reference.stats(x, channel_axis)
        for given in (None, residual):
            y = pybn.batch_norm(x, None, None, training=True, residual=given, channel_axis=channel_axis)
            expected = reference.normalize(x, *batch, residual=given, channel_axis=channel_axis)
            slack = 2 * 2.0**-23 * np.maximum(np.abs(expected), 1)
            if given is not None:  # normalized and residual may cancel
                slack += 2.0**-23 * np.abs(residual.astype(np.float64))
            assert reference.error_in_spacings(y, expected, slack) <= 0.5, (shape, spread)


@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("activation", [None, "leaky_relu", "silu"])
@half_dtypes
def test_half_results_are_float32_results_rounded(instruction_set, rng, dtype, activation, channel_axis):
    """Bit for bit: the same statistics, the same arithmetic, one rounding more."""
    for shape in ((8, 5, 20, 21), (700, 24, 1, 1), (9, 33, 7, 7), (1, 2, 300, 301)):
        x, residual, dy = (images(rng, shape, dtype, channel_axis) for _ in range(3))
        weight, bias, mean, var = parameters(rng, shape[1])
        options = {"activation": activation, "channel_axis": channel_axis}
        for given, training in itertools.product((None, residual), (True, False)):
            wide = None if given is None else given.astype(np.float32)
            results = []
            for data, added, gradient in ((x, given, dy), (x.astype(np.float32), wide, dy.astype(np.float32))):
                y, saved = pybn.batch_norm_forward(
                    data, weight, bias, mean.copy(), var.copy(), training=training, residual=added, **options
                )
                results.append([y, saved.mean, saved.invstd, *pybn.batch_norm_backward(gradient, saved)])
            for number, (half, single) in enumerate(zip(*results, strict=True)):
                if single is None:
                    assert half is None
                else:
                    assert_same_bits(half, to_half(single, half.dtype), (number, shape, training))


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@half_dtypes
def test_a_nan_of_any_payload_stays_one(instruction_set, rng, dtype, name):
    """All bits set are what rounding would carry into the sign."""
    x = rng.standard_normal((2, 20, 3, 5)).astype(dtype)
    given = {"weight": np.ones(20), "bias": np.zeros(20), "running_mean": np.zeros(20), "running_var": np.ones(20)}
    given = {key: value.astype(np.float32) for key, value in given.items()}
    given[name].view(np.uint32)[::2] = 0x7FFFFFFF
    y, saved = pybn.batch_norm_forward(x, **given, training=False)
    assert np.isnan(y[:, ::2]).all()
    assert not np.isnan(y[:, 1::2]).any()
    if name in ("weight", "running_var"):
        assert np.isnan(pybn.batch_norm_backward(x, saved).dx[:, ::2]).all()


@half_dtypes
def test_results_too_large_for_the_type_are_infinite_without_a_warning(instruction_set, dtype):
    largest = float(ml_dtypes.finfo(dtype).max)
    x = np.array([[1, -1, 0.5], [-1, 1, 1]], dtype)
    mean, var = np.zeros(3), np.full(3, 0.75)
    beyond = 1 + 3 * 2.0**-10  # and within float32
    weight = np.full(3, largest * beyond)
    for activation, low in ((None, -np.inf), ("relu", 0), ("leaky_relu", -largest)):
        y, saved = pybn.batch_norm_forward(
            x, weight, None, mean, var, training=False, eps=0.25, activation=activation, negative_slope=1 / beyond
        )
        expected = np.array([[np.inf, low, largest / 2 * beyond], [low, np.inf, np.inf]])
        np.testing.assert_allclose(y.astype(np.float64), expected, rtol=float(ml_dtypes.finfo(dtype).eps))
        dx = pybn.batch_norm_backward(np.ones_like(x), saved).dx
        assert dx[0, 0] == np.inf


@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("shape", NETWORK_SHAPES.values(), ids=NETWORK_SHAPES)
@half_dtypes
def test_network_shapes_are_right(instruction_set, rng, dtype, shape, channel_axis):
    x, residual = (images(rng, shape, dtype, channel_axis) for _ in range(2))
    check_step(rng, x, channel_axis, activation="relu", residual=residual)


@pytest.mark.parametrize("channel_axis", [1, -1])
@half_dtypes
def test_gradients_of_parameters_are_float64_sums(instruction_set, rng, dtype, channel_axis):
    """Which half values, nor float32 ones, could not add up: whole numbers, their sum beyond 2^24."""
    x = np.ones((64, 2, 300, 30), dtype)
    x[::2] = -1
    x = np.ascontiguousarray(np.moveaxis(x, 1, channel_axis))
    dy = rng.integers(90, 110, x.shape).astype(dtype)
    weight, bias = np.ones(2, np.float64), np.zeros(2, np.float64)
    _, saved = pybn.batch_norm_forward(x, weight, bias, channel_axis=channel_axis)
    got = pybn.batch_norm_backward(dy, saved)
    axes = tuple(a for a in range(4) if a != channel_axis % 4)
    assert_same_bits(got.dbias, dy.astype(np.float64).sum(axes))
    sum_dy_xmu = (x.astype(np.float64) * dy.astype(np.float64)).sum(axes)
    assert_same_bits(got.dweight, sum_dy_xmu * saved.invstd)
    for ours, exact in zip(
        pybn.batch_norm_backward_reduce(dy, x, np.zeros(2), np.ones(2), channel_axis=channel_axis),
        (dy.astype(np.float64).sum(axes), sum_dy_xmu),
        strict=True,
    ):
        assert_same_bits(ours, exact)


@pytest.mark.parametrize("parameter_dtype", [np.float32, np.float64])
@half_dtypes
def test_parameters_and_their_gradients_have_their_own_type(rng, dtype, parameter_dtype):
    x = images(rng, (6, 5, 7, 7), dtype)
    weight, bias, mean, var = (p.astype(parameter_dtype) for p in parameters(rng, 5))
    y, saved = pybn.batch_norm_forward(x, weight, bias, mean, var)
    got = pybn.batch_norm_backward(x, saved)
    assert {y.dtype, got.dx.dtype} == {x.dtype}
    assert {a.dtype for a in (mean, var, got.dweight, got.dbias)} == {np.dtype(parameter_dtype)}
    assert saved.mean.dtype == saved.invstd.dtype == np.float64
    wide = [np.float64(p) for p in (weight, bias, mean, var)]
    narrow = (weight, bias, mean, var)
    assert_same_bits(
        pybn.batch_norm(x, *narrow[2:], *narrow[:2], activation="silu"),
        pybn.batch_norm(x, *wide[2:], *wide[:2], activation="silu"),
    )


@half_dtypes
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_check_finite_finds_nan_and_inf(rng, dtype, bad):
    x = images(rng, (4, 3, 5, 6), dtype)
    pybn.batch_norm(x, None, None, training=True, check_finite=True)
    x[2, 1, 3, 4] = bad
    with unchanged(x), pytest.raises(ValueError, match=r"^x is not finite in 1 of 3 channels \(1\)"):
        pybn.batch_norm(x, None, None, training=True, check_finite=True)
    x[2, 1, 3, 4] = ml_dtypes.finfo(dtype).max
    pybn.batch_norm(x, None, None, training=True, check_finite=True)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4), (0, 3), (1, 0)])
@pytest.mark.parametrize("training", [True, False])
@half_dtypes
def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(rng, dtype, training, shape):
    x = np.zeros(shape, dtype)
    weight, bias, mean, var = parameters(rng, shape[1])
    with unchanged(mean, var):
        y, saved = pybn.batch_norm_forward(x, weight, bias, mean, var, training=training, activation="silu", residual=x)
    got = pybn.batch_norm_backward(x, saved)
    for result in (y, got.dx, got.dresidual):
        assert (result.shape, result.dtype) == (shape, x.dtype)
    assert_same_bits(got.dweight, np.zeros(shape[1], np.float32))


# ---- memory ---------------------------------------------------------------------------------------------------------


def peak_of(operation):
    """Bytes that NumPy allocates."""
    tracemalloc.start()
    operation()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("channel_axis", [1, -1])
@half_dtypes
def test_half_data_are_never_copied_to_float32(instruction_set, rng, dtype, channel_axis):
    x = images(rng, (16, 8, 64, 65), dtype, channel_axis)
    out, residual = np.empty_like(x), x.copy()
    mean, var = np.zeros(8), np.ones(8)
    options = {"channel_axis": channel_axis, "activation": "silu", "residual": residual}
    _, saved = pybn.batch_norm_forward(x, out=out, **options)
    for name, operation in {
        "training": lambda: pybn.batch_norm_forward(x, out=out, **options),
        "evaluation": lambda: pybn.batch_norm(x, mean, var, out=out, **options),
        "statistics": lambda: pybn.batch_norm_stats(x, channel_axis=channel_axis),
        "elemt": lambda: pybn.batch_norm_elemt(x, mean, var, out=out, **options),
        "backward": lambda: pybn.batch_norm_backward(x, saved, out=out, output_mask=(True, True, True, False)),
        "reduce": lambda: pybn.batch_norm_backward_reduce(x, x, mean, var, **options),
        "backward elemt": lambda: pybn.batch_norm_backward_elemt(x, x, mean, var, mean, mean, 1, out=out, **options),
    }.items():
        assert peak_of(operation) < x.nbytes / 8, name


@half_dtypes
def test_byte_swapped_data_are_copied_once_and_give_the_same(rng, dtype):
    x = images(rng, (16, 8, 64, 65), dtype)
    swapped = x.astype(x.dtype.newbyteorder())
    assert not swapped.dtype.isnative
    assert_same_bits(pybn.batch_norm_stats(swapped)[0], pybn.batch_norm_stats(x)[0])
    out = np.empty_like(x)
    y = pybn.batch_norm(swapped, None, None, training=True)
    assert_same_bits(y, pybn.batch_norm(x, None, None, training=True))
    assert peak_of(lambda: pybn.batch_norm(swapped, None, None, training=True, out=out)) < 1.1 * x.nbytes
    assert_same_bits(out, y)
    _, saved = pybn.batch_norm_forward(swapped, residual=swapped, activation="silu")
    _, expected = pybn.batch_norm_forward(x, residual=x, activation="silu")
    for ours, native in zip(
        pybn.batch_norm_backward(swapped, saved), pybn.batch_norm_backward(x, expected), strict=True
    ):
        assert (ours is None) == (native is None)
        if ours is not None:
            assert_same_bits(ours, native)


@half_dtypes
def test_large_half_results_are_recycled_as_what_they_are(rng, dtype):
    x = images(rng, (16, 16, 64, 65), dtype)
    y = pybn.batch_norm(x, None, None, training=True)
    expected, address = y.copy(), y.ctypes.data
    assert y.dtype == dtype
    del y
    wide = pybn.batch_norm(x[:8].astype(np.float32), None, None, training=True)  # as many bytes
    assert wide.ctypes.data == address
    del wide
    again = pybn.batch_norm(x, None, None, training=True)
    assert again.ctypes.data == address
    assert_same_bits(again, expected)


def test_bfloat16_needs_ml_dtypes_only_from_those_who_have_it(tmp_path):
    code = """
import sys
import numpy as np, pybn
x = np.arange(24, dtype=np.float16).reshape(8, 3)
y, saved = pybn.batch_norm_forward(x, activation="silu")
pybn.batch_norm_backward(x, saved)
assert "ml_dtypes" not in sys.modules
import ml_dtypes
y, saved = pybn.batch_norm_forward(x.astype(ml_dtypes.bfloat16))
print(y.dtype == ml_dtypes.bfloat16, pybn.batch_norm_backward(y, saved).dx.dtype, y[0, 0])
"""
    assert run_python(code, tmp_path) == "True bfloat16 -1.53125"
