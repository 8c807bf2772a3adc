"""Every size and every memory layout: what a kernel does at its edges, and which arrays it takes without a copy."""

import itertools

import numpy as np
import pytest
import reference
from conftest import (
    TAIL_SIZES,
    assert_close,
    assert_same_bits,
    check_step,
    data_dtypes,
    images,
    parameters,
    run_python,
    unchanged,
)

import pybn
from pybn import _core

CHANNELS = (1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 17, 20, 24, 31, 33, 63, 64, 65, 97, 100, 128, 200, 520)
ROWS = (*range(1, 10), 255, 256, 257, 258, 1025)
INNER = (1, 2, 3, 5, 7, 15, 16, 17, 31, 33, 49, 63, 64, 65, 97, 196)


def drawn(rng, x):
    """A fusion, so that every size meets several of them and every fusion meets many sizes."""
    return {
        "training": bool(rng.integers(2)) and x.size > x.shape[1],
        "activation": reference.ACTIVATIONS[rng.integers(6)],
        "negative_slope": rng.choice([0.01, 0.0, -0.5, 2.0]),
        "residual": images(rng, x.shape, x.dtype) if rng.integers(2) else None,
    }


@data_dtypes
def test_rows_of_every_length_and_number_are_right(instruction_set, rng, dtype):
    for channels, rows in itertools.product(CHANNELS, ROWS):
        if channels * rows > 70_000:  # many rows of many channels are in NETWORK_SHAPES
            continue
        x = images(rng, (rows, channels), dtype)
        options = drawn(rng, x)
        check_step(rng, x, **options, what=f"{rows} x {channels}, {options}")


@data_dtypes
def test_planes_of_every_size_are_right(instruction_set, rng, dtype):
    for channels, inner in itertools.product((1, 2, 3, 4, 5, 8, 17, 33, 65), INNER):
        x = images(rng, (rng.choice([1, 2, 9]), channels, inner), dtype)
        options = drawn(rng, x)
        check_step(rng, x, **options, what=f"{x.shape}, {options}")


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 4), (6, 5, 4, 3), (6, 5, 4, 3, 2)], ids=str)
@data_dtypes
def test_every_rank_is_right_with_channels_first_and_last(instruction_set, rng, dtype, shape):
    for channel_axis, training in itertools.product((1, -1), (True, False)):
        x, residual = (images(rng, shape, dtype, channel_axis) for _ in range(2))
        check_step(rng, x, channel_axis, training=training, activation="silu", residual=residual)
        check_step(rng, x, channel_axis, training=training, activation="relu", residual=residual)


# ---- views -----------------------------------------------------------------------------------------------------------

# Views of an array that is contiguous as (N, C, H, W), its channels on axis 1, or as (N, H, W, C), on axis -1.
# The kernels follow these, and treat them as they treat the contiguous copy. (Rows of fewer channels than 64 are taken
# together if they are dense, so sums over a slice of the channels run in another order.)
FOLLOWED = {
    "contiguous": (lambda a: a, lambda a: a),
    "channels": (lambda a: a[:, 2:67], lambda a: a[..., 2:67]),
    "batch": (lambda a: a[2:5], lambda a: a[2:5]),
    "one image": (lambda a: a[3:4], lambda a: a[3:4]),
    "batch and channels": (lambda a: a[1:4, 1:66], lambda a: a[1:4, ..., 1:66]),
    "other axis": (lambda a: np.moveaxis(a, 1, -1), lambda a: np.moveaxis(a, -1, 1)),
    "other axis, channels": (lambda a: np.moveaxis(a[:, 1:65], 1, -1), lambda a: np.moveaxis(a[..., 1:65], -1, 1)),
    "other axis, batch": (lambda a: np.moveaxis(a[1:4], 1, -1), lambda a: np.moveaxis(a[1:4], -1, 1)),
    "every other image": (lambda a: a[::2], None),
    "reversed batch": (lambda a: a[::-1], None),
    "every other channel": (lambda a: a[:, ::2], None),
    "reversed channels": (lambda a: a[:, ::-1], None),
}
# The kernels follow these, too.
FEW_CHANNELS = {
    "one channel": (lambda a: a[:, 3:4], lambda a: a[..., 3:4]),
    "three channels": (lambda a: a[:, 3:6], lambda a: a[..., 3:6]),
    "seven channels": (lambda a: a[:, :7], lambda a: a[..., :7]),
    "other axis, few channels": (lambda a: np.moveaxis(a[:, 1:6], 1, -1), lambda a: np.moveaxis(a[..., 1:6], -1, 1)),
}
# These may be copied.
OTHERS = {
    "every other image": (None, lambda a: a[::2]),
    "reversed batch": (None, lambda a: a[::-1]),
    "every other channel": (None, lambda a: a[..., ::2]),
    "reversed channels": (None, lambda a: a[..., ::-1]),
    "crop": (lambda a: a[:, :, 1:3, 2:5], lambda a: a[:, 1:3, 2:5]),
    "every other row": (lambda a: a[:, :, ::2], lambda a: a[:, ::2]),
    "every other column": (lambda a: a[:, :, :, ::2], lambda a: a[:, :, ::2]),
    "reversed rows": (lambda a: a[:, :, ::-1], lambda a: a[:, ::-1]),
    "everything reversed": (lambda a: a[::-1, ::-1, ::-1, ::-1], lambda a: a[::-1, ::-1, ::-1, ::-1]),
    "transposed planes": (lambda a: a.transpose(0, 1, 3, 2), lambda a: a.transpose(0, 2, 1, 3)),
    "images inside": (lambda a: batch_inside(a), lambda a: batch_inside(a)),
}


def batch_inside(a):
    """The same values, the batch axis innermost in memory."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 0, -1)), -1, 0)


def views(table):
    """Of both kinds of arrays: the view, the channel axis of its base, and its own."""
    return [
        pytest.param(view, axis, -axis if name.startswith("other axis") else axis, id=f"{name} of {layout}")
        for name, of_layouts in table.items()
        for view, axis, layout in zip(of_layouts, (1, -1), ("NCHW", "NHWC"), strict=True)
        if view is not None
    ]


every_view = pytest.mark.parametrize(
    ("view", "axis", "view_axis"), views(FOLLOWED) + views(FEW_CHANNELS) + views(OTHERS)
)
followed_view = pytest.mark.parametrize(("view", "axis", "view_axis"), views(FOLLOWED) + views(FEW_CHANNELS))


def viewed(rng, view, axis, dtype):
    """A view of data that fill more memory than it."""
    return view(images(rng, (6, 67, 3, 5), dtype, axis))


def results_of(x, residual, dy, channel_axis, activation):
    """What every operation gives, to be compared bit by bit."""
    rng = np.random.default_rng(5)
    weight, bias, mean, var = parameters(rng, x.shape[channel_axis])
    options = {"activation": activation, "residual": residual, "channel_axis": channel_axis}
    y, saved = pybn.batch_norm_forward(x, weight, bias, **options)
    dx, dweight, dbias, dresidual = pybn.batch_norm_backward(dy, saved)
    batch_mean, batch_var, count = pybn.batch_norm_stats(x, channel_axis=channel_axis)
    sums = pybn.batch_norm_backward_reduce(dy, x, mean, var, weight, bias, **options)
    return {
        "y": y,
        "mean": saved.mean,
        "invstd": saved.invstd,
        "dx": dx,
        "dweight": dweight,
        "dbias": dbias,
        "dresidual": dresidual,
        "evaluation": pybn.batch_norm(x, mean, var, weight, bias, **options),
        "batch mean": batch_mean,
        "batch var": batch_var,
        "elemt": pybn.batch_norm_elemt(x, mean, var, weight, bias, **options),
        "sum_dy": sums[0],
        "sum_dy_xmu": sums[1],
        "backward elemt": pybn.batch_norm_backward_elemt(dy, x, mean, var, *sums, count, weight, bias, **options),
    }


@pytest.mark.parametrize(("view", "axis", "view_axis"), views(FOLLOWED))
@data_dtypes
def test_a_view_gives_the_bits_of_a_contiguous_copy_of_its_layout(instruction_set, rng, dtype, view, axis, view_axis):
    x, residual, dy = (viewed(rng, view, axis, dtype) for _ in range(3))
    copies = [np.moveaxis(a, view_axis, axis).copy() for a in (x, residual, dy)]  # contiguous as the base is
    for activation in ("relu", "silu"):
        with unchanged(x, residual, dy):
            got = results_of(x, residual, dy, view_axis, activation)
        expected = results_of(*copies, axis, activation)
        for name, value in got.items():
            same = np.moveaxis(expected[name], axis, view_axis) if value.ndim > 1 else expected[name]
            assert_same_bits(np.ascontiguousarray(value), np.ascontiguousarray(same), (name, activation))


@every_view
@data_dtypes
def test_a_view_gives_the_results_of_its_contiguous_copy(instruction_set, rng, dtype, view, axis, view_axis):
    x, residual, dy = (viewed(rng, view, axis, dtype) for _ in range(3))
    with unchanged(x, residual, dy):
        ours = results_of(x, residual, dy, view_axis, "silu")
    expected = results_of(x.copy(), residual.copy(), dy.copy(), view_axis, "silu")
    for name, value in ours.items():
        per_value = x.shape[view_axis] / x.size if value.ndim == 1 else 0.25
        same = expected[name].astype(np.float64) * per_value
        assert_close(value.astype(np.float64) * per_value, same, dtype, name, roundings=2)


@followed_view
@data_dtypes
def test_views_are_not_copied(rng, dtype, view, axis, view_axis):
    x, residual, dy, out = (viewed(rng, view, axis, dtype) for _ in range(4))
    assert _core.layout(view_axis % 4, x)
    assert _core.layout(view_axis % 4, x, residual, dy, out)
    assert _core.layout(view_axis % 4, x, x.copy(order="K")), "a new result, dense and in the order of x"


@every_view
@data_dtypes
def test_nothing_beside_a_view_is_written(instruction_set, rng, dtype, view, axis, view_axis):
    x, residual, dy = (viewed(rng, view, axis, dtype) for _ in range(3))
    weight, bias, mean, var = parameters(rng, x.shape[view_axis])
    options = {"channel_axis": view_axis, "residual": residual}
    out = viewed(rng, view, axis, dtype)
    bits = np.dtype(f"u{out.itemsize}")
    memory, canary = (out if out.base is None else out.base).view(bits), np.iinfo(bits).max
    for activation in ("relu", "hardswish"):
        memory[...] = canary
        expected, saved = pybn.batch_norm_forward(x, weight, bias, activation=activation, **options)
        assert pybn.batch_norm(x, None, None, weight, bias, True, activation=activation, out=out, **options) is out
        assert_same_bits(np.ascontiguousarray(out), np.ascontiguousarray(expected), activation)
        pybn.batch_norm(x, mean, var, weight, bias, activation=activation, out=out, **options)
        expected = pybn.batch_norm_backward(dy, saved).dx
        assert pybn.batch_norm_backward(dy, saved, out=out).dx is out
        assert_same_bits(np.ascontiguousarray(out), np.ascontiguousarray(expected), activation)
        pybn.batch_norm_backward_elemt(
            dy, x, mean, var, mean, mean, 7, weight, bias, activation=activation, out=out, **options
        )
        out.view(bits)[...] = canary
        assert np.all(memory == canary), activation


@pytest.mark.parametrize("training", [True, False])
@data_dtypes
def test_in_place_on_views_of_one_array(instruction_set, rng, dtype, training):
    """Each half of the channels, of odd number, in its own call: nothing of the other half changes."""
    for channel_axis, channels in itertools.product((1, -1), (7, 33)):
        whole = images(rng, (3, 2 * channels, 5, 7), dtype, channel_axis)
        expected = whole.copy()
        for part in (slice(0, channels), slice(channels, None)):
            index = (slice(None), part) if channel_axis == 1 else (..., part)
            x, before = whole[index], whole.copy()
            _, _, mean, var = parameters(rng, channels)
            options = {"training": training, "activation": "relu", "channel_axis": channel_axis}
            expected[index] = pybn.batch_norm(before[index], mean.copy(), var.copy(), **options)
            pybn.batch_norm(x, mean.copy(), var.copy(), out=x, **options)
            assert_same_bits(whole, expected)


def test_operands_of_different_layouts_give_the_results_of_equal_ones(rng):
    """One in planes, one in rows, one reversed: copied where they must be."""
    x, residual, dy = (images(rng, (6, 5, 8, 9)) for _ in range(3))
    mixed = [
        x,
        np.moveaxis(np.ascontiguousarray(np.moveaxis(residual, 1, -1)), -1, 1),
        np.ascontiguousarray(dy[:, :, ::-1])[:, :, ::-1],
    ]
    for activation, order in itertools.product(("relu", "silu"), ((0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0))):
        with unchanged(*mixed):
            got = results_of(*(mixed[i] for i in order), 1, activation)
        expected = results_of(*((x, residual, dy)[i] for i in order), 1, activation)
        for name in ("y", "mean", "invstd", "evaluation", "elemt"):
            assert_close(got[name], expected[name], np.float32, (name, activation, order))
        if activation == "silu":  # no mask that rounding could change
            for name in ("dx", "dweight", "dbias", "dresidual"):
                np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


# ---- the ends of memory ----------------------------------------------------------------------------------------------

GUARDED = """
import ctypes, itertools, mmap
import ml_dtypes
import numpy as np, pybn
from pybn import _core

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

class Guarded:
    'Memory between two pages of which not a byte can be read.'
    def __init__(self, bytes):
        self.pages = -(-bytes // PAGE)
        self.address = libc.mmap(None, (self.pages + 2) * PAGE, mmap.PROT_READ | mmap.PROT_WRITE,
                                 mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        for page in (0, self.pages + 1):
            assert libc.mprotect(self.address + page * PAGE, PAGE, 0) == 0

    def array(self, values, at_end):
        'A copy of values that begins, or ends, where the memory does.'
        values = np.ascontiguousarray(values)
        begin = self.address + PAGE + (self.pages * PAGE - values.nbytes if at_end else 0)
        buffer = (ctypes.c_char * values.nbytes).from_address(begin)
        array = np.frombuffer(buffer, values.dtype).reshape(values.shape)
        array[...] = values
        return array

memories = [Guarded(70000) for _ in range(9)]
rng = np.random.default_rng(0)
activations = (None, "relu", "relu6", "leaky_relu", "silu", "hardswish")
calls = 0
for dtype, at_end in itertools.product(DTYPES, (False, True)):
    for shape in SHAPES:
        x, residual, dy, out = (m.array(rng.standard_normal(shape).astype(dtype), at_end) for m in memories[:4])
        weight, bias, mean, var = (
            m.array(rng.uniform(0.5, 2, shape[1]).astype(np.float32), at_end) for m in memories[4:8])
        activation = activations[calls % 6]
        for isa in _core.available_instruction_sets():
            _core.select_instruction_set(isa)
            options = dict(activation=activation, residual=(None, residual)[calls // 6 % 2])
            pybn.batch_norm(x, mean, var, weight, bias, out=out, **options)
            pybn.batch_norm_stats(x)
            pybn.batch_norm_backward_reduce(dy, x, mean, var, weight, bias, **options)
            for training in (True, False)[x.size == shape[1]:]:
                _, saved = pybn.batch_norm_forward(
                    x, weight, bias, mean, var, training=training, out=out, **options)
                pybn.batch_norm_backward(dy, saved, out=out)
                pybn.batch_norm(x, mean, var, weight, bias, training, **options)
        calls += 1
print(calls)
"""


@pytest.mark.skipif("not sys.platform.startswith('linux')", reason="needs mprotect")
@pytest.mark.parametrize("dtype", ["np.float32", "np.float64", "np.float16", "ml_dtypes.bfloat16"])
def test_no_kernel_reads_or_writes_a_byte_beyond_its_arrays(tmp_path, dtype):
    """Vectors that end beyond the array would cross into a page that ends the process."""
    sizes = TAIL_SIZES[:-1]
    shapes = [(rows, channels) for rows in (1, 2, 5, 9, 33) for channels in (*sizes, 100, 130)]
    shapes += [(n, channels, inner) for n in (1, 2) for channels in (1, 3, 17) for inner in (*sizes, 49, 130)]
    code = f"import numpy as np, ml_dtypes\nDTYPES, SHAPES = [{dtype}], {shapes}\n" + GUARDED
    assert run_python(code, tmp_path) == str(2 * len(shapes))
