"""What the functions accept and refuse; every error names its argument and comes before anything is written."""

import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import reference
import torch
from conftest import (
    BFLOAT16,
    DATA_DTYPES,
    ROUNDING,
    assert_close,
    assert_same_bits,
    data_dtypes,
    images,
    parameters,
    unchanged,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.lib.stride_tricks import as_strided

import pybn
from pybn import _core

SHAPE = (4, 3, 5, 6)


def arguments_of(name, dtype=np.float32, shape=SHAPE):
    """A valid call: the function, its arguments, and of what kind each array is."""
    rng = np.random.default_rng(7)
    x, dy = (images(rng, shape, dtype) for _ in range(2))
    residual = {"residual": images(rng, shape, dtype)}
    weight, bias, mean, var = parameters(rng, 3)
    affine = {"weight": weight, "bias": bias}
    running = {"running_mean": mean, "running_var": var}
    given = {"mean": mean, "var": var}
    sums = {"sum_dy": np.zeros(3), "sum_dy_xmu": np.zeros(3), "count": x.size // 3}
    out = {"out": np.full(shape, 7, dtype)}
    kinds = {
        "x": "data",
        "dy": "like",
        "residual": "like",
        "out": "out",
        "running_mean": "updated",
        "running_var": "updated",
        "var": "variance",
    }
    function, arguments = {
        "batch_norm": (pybn.batch_norm, {"x": x, **running, **affine, **residual, "training": True, **out}),
        "batch_norm in evaluation": (
            pybn.batch_norm,
            {"x": x, **running, **affine, **residual, "training": False, **out},
        ),
        "batch_norm_forward": (pybn.batch_norm_forward, {"x": x, **affine, **running, **residual, **out}),
        "batch_norm_backward": (
            pybn.batch_norm_backward,
            {"dy": dy, "saved": pybn.batch_norm_forward(x, weight)[1], **out},
        ),
        "batch_norm_stats": (pybn.batch_norm_stats, {"x": x}),
        "batch_norm_elemt": (pybn.batch_norm_elemt, {"x": x, **given, **affine, **residual, **out}),
        "batch_norm_backward_reduce": (
            pybn.batch_norm_backward_reduce,
            {"dy": dy, "x": x, **given, **affine, **residual},
        ),
        "batch_norm_backward_elemt": (
            pybn.batch_norm_backward_elemt,
            {"dy": dy, "x": x, **given, **sums, **affine, **residual, **out},
        ),
    }[name]
    if name.endswith("evaluation"):
        kinds.update(running_mean="channel", running_var="variance")
    arrays = {key: kinds.get(key, "channel") for key, value in arguments.items() if isinstance(value, np.ndarray)}
    return function, arguments, arrays


OPERATIONS = (
    "batch_norm",
    "batch_norm in evaluation",
    "batch_norm_forward",
    "batch_norm_backward",
    "batch_norm_stats",
    "batch_norm_elemt",
    "batch_norm_backward_reduce",
    "batch_norm_backward_elemt",
)


def byte_swapped(a):
    return a.astype(a.dtype.newbyteorder())


def unaligned(a):
    """The same values one byte off."""
    memory = np.zeros(a.nbytes + 1, np.uint8)[1:]
    view = memory.view(a.dtype).reshape(a.shape)
    view[...] = a
    assert not view.flags.aligned
    return view


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def negative_in_channel_1(a):
    a = a.copy()
    a[1] = -0.5
    return a


WRONG_TYPES = [
    ("int", lambda a: a.astype(np.int32), TypeError, "{name} has dtype int32, expected {types}"),
    ("bool", lambda a: a > 0, TypeError, "{name} has dtype bool, expected {types}"),
    ("object", lambda a: a.astype(object), TypeError, "{name} has dtype object, expected {types}"),
    ("complex", lambda a: a.astype(complex), TypeError, "{name} has dtype complex128, expected {types}"),
    ("text", lambda a: a.astype("U4"), TypeError, "{name} has dtype <U4, expected {types}"),
    ("bytes", lambda a: a.astype(np.float16).view("V2"), TypeError, r"{name} has dtype \|V2, expected {types}"),
    (
        "fields",
        lambda a: a.astype(np.float16).view([("bfloat16", "u2")]),
        TypeError,
        r"{name} has dtype \[\('bfloat16', '<u2'\)\], expected {types}",
    ),
    (
        "float8",
        lambda a: a.astype(ml_dtypes.float8_e4m3fn),
        TypeError,
        "{name} has dtype float8_e4m3fn, expected {types}",
    ),
    ("int4", lambda a: a.astype(ml_dtypes.int4), TypeError, "{name} has dtype int4, expected {types}"),
    (
        "masked",
        np.ma.masked_array,
        TypeError,
        r"{name} is a masked array, .*; pass {name}\.data",
    ),
]
if np.finfo(np.longdouble).bits > 64:  # on some platforms it is float64
    longdouble = f"{{name}} has dtype {np.dtype(np.longdouble)}, expected {{types}}"
    WRONG_TYPES.append(("longdouble", lambda a: a.astype(np.longdouble), TypeError, longdouble))
HALVES = [
    ("half", lambda a: a.astype(np.float16), TypeError, "{name} has dtype float16, expected float32 or float64"),
    ("bfloat16", lambda a: a.astype(BFLOAT16), TypeError, "{name} has dtype bfloat16, expected float32 or float64"),
    (
        "swapped half",
        lambda a: byte_swapped(a.astype(np.float16)),
        TypeError,
        "{name} has dtype >f2, expected float32 or float64",
    ),
]
OTHER_TYPES = [
    (
        dtype.__name__,
        lambda a, dtype=dtype: a.astype(dtype),
        TypeError,
        f"{{name}} has dtype {dtype.__name__}, expected float32, the dtype of x",
    )
    for dtype in (np.float64, np.float16, BFLOAT16)
]
RAGGED = (
    "ragged list",
    lambda a: [[1.0], [1.0, 2.0]],
    TypeError,
    "{name} is a list, which cannot become a NumPy",
)
WRONG_LENGTHS = [
    (
        "one more",
        lambda a: np.ones(4, a.dtype),
        ValueError,
        r"{name} has shape \(4,\), expected \(3,\) to match axis 1",
    ),
    ("one for all", lambda a: np.ones(1, a.dtype), ValueError, r"{name} has shape \(1,\), expected \(3,\) to match"),
    ("a column", lambda a: a[:, None], ValueError, r"{name} has shape \(3, 1\), expected \(3,\) to match axis 1 of x"),
    ("a scalar", lambda a: a[0], ValueError, r"{name} has shape \(\), expected \(3,\) to match axis 1 of x"),
]
BAD = {
    "data": [
        *WRONG_TYPES,
        RAGGED,
        ("no axis", lambda a: a[0, 0, 0, 0], ValueError, r"{name} has shape \(\), expected at least 2 axes"),
        ("one axis", lambda a: a[0, 0, 0], ValueError, r"{name} has shape \(6,\), expected at least 2 axes"),
        ("None", lambda a: None, TypeError, "{name} has dtype object, expected {types}"),
    ],
    "like": [
        *WRONG_TYPES,
        RAGGED,
        (
            "cut",
            lambda a: a[1:],
            ValueError,
            r"{name} has shape \(3, 3, 5, 6\), expected \(4, 3, 5, 6\), the shape",
        ),
        (
            "broadcast",
            lambda a: a[:1],
            ValueError,
            r"{name} has shape \(1, 3, 5, 6\), expected \(4, 3, 5, 6\), the shape",
        ),
        *OTHER_TYPES,
    ],
    "channel": [*WRONG_TYPES, *HALVES, RAGGED, *WRONG_LENGTHS],
    "variance": [
        *WRONG_TYPES,
        *HALVES,
        *WRONG_LENGTHS,
        (
            "negative",
            negative_in_channel_1,
            ValueError,
            r"{name} is negative in channel 1 \(-0\.5\), expected values >= 0",
        ),
    ],
    "updated": [
        *WRONG_TYPES,
        *HALVES[:2],
        *WRONG_LENGTHS[:3],
        ("list", lambda a: a.tolist(), TypeError, "{name} is a list, expected a NumPy array, because it is updated"),
        ("read-only", read_only, ValueError, "{name} is read-only, expected a writable array, because it is updated"),
        ("byte-swapped", byte_swapped, TypeError, r"{name} is byte-swapped \(>f4\), expected native byte order"),
        ("unaligned", unaligned, ValueError, "{name} is not aligned in memory, expected an aligned array"),
        (
            "zero strides",
            lambda a: as_strided(a[:1], (3,), (0,)),
            ValueError,
            r"{name} has strides \(.*, expected an array with an element of its own",
        ),
    ],
    "out": [
        ("list", lambda a: a.tolist(), TypeError, "{name} is a list, expected a NumPy array"),
        (
            "masked",
            np.ma.masked_array,
            TypeError,
            r"{name} is a masked array, .*; pass {name}\.data",
        ),
        *OTHER_TYPES,
        ("byte-swapped", byte_swapped, TypeError, "{name} has dtype >f4, expected float32, the dtype of x"),
        (
            "cut",
            lambda a: a[1:],
            ValueError,
            r"{name} has shape \(3, 3, 5, 6\), expected \(4, 3, 5, 6\), the shape",
        ),
        ("flat", lambda a: a.reshape(-1), ValueError, r"{name} has shape \(360,\), expected \(4, 3, 5, 6\)"),
        (
            "read-only",
            read_only,
            ValueError,
            "{name} is read-only, expected a writable array, because results",
        ),
        (
            "zero strides",
            lambda a: as_strided(a, SHAPE, (0, *a.strides[1:])),
            ValueError,
            r"{name} has strides \(.*, expected an array with an element of its own",
        ),
        (
            "one element in two places",
            lambda a: as_strided(a, SHAPE, (4, *a.strides[1:])),
            ValueError,
            r"{name} has strides \(.*, expected an array with an element of its own",
        ),
    ],
}
CASES = [
    pytest.param(operation, argument, *bad[1:], id=f"{operation}-{argument}-{bad[0]}")
    for operation in OPERATIONS
    for argument, kind in arguments_of(operation)[2].items()
    for bad in BAD[kind]
]


@pytest.mark.parametrize(("operation", "argument", "spoil", "error", "message"), CASES)
def test_a_bad_array_is_refused_by_name_and_nothing_is_written(operation, argument, spoil, error, message):
    function, arguments, _ = arguments_of(operation)
    arguments[argument] = spoil(arguments[argument])
    types = "float32 or float64" if argument not in ("x", "dy", "residual") else ".*float32.*float64"
    message = "^" + message.format(name=argument, types=types)
    with unchanged(*arguments.values()), pytest.raises(error, match=message):
        function(**arguments)


@pytest.mark.parametrize("other", DATA_DTYPES)
@data_dtypes
def test_data_have_one_type(dtype, other):
    """There is no promotion, not even of half data."""
    if dtype == other:
        return
    for operation in OPERATIONS:
        function, arguments, arrays = arguments_of(operation, dtype)
        for name in ("dy", "residual", "out"):
            if name in arrays:
                message = f"^{name} has dtype {np.dtype(other)}, expected {np.dtype(dtype)}, the dtype of x"
                with unchanged(*arguments.values()), pytest.raises(TypeError, match=message):
                    function(**{**arguments, name: arguments[name].astype(other)})


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_valid_call_of_these_tests_is_valid(operation):
    function, arguments, _ = arguments_of(operation)
    assert function(**arguments) is not None


# What the error says, its type, and what is refused.
BAD_VALUES = {
    "eps": ("expected a finite number > 0", ValueError, (0, -1e-5, np.nan, np.inf, 10**400, None, "1", True)),
    "momentum": ("expected a number in|only a layer", ValueError, (np.nan, -0.1, 1.1, np.inf, "0.1", True, None)),
    "activation": ("expected one of None, 'relu'", ValueError, ("gelu", "ReLU", "relu7", "", 0, [], b"relu", {})),
    "channel_axis": ("expected 1 .* or -1", ValueError, (0, 2, 4, -2, -4, None, "C", 1.5)),
    "count": ("expected a finite number > 0", ValueError, (0, -1, np.nan, None, "120")),
    "output_mask": ("expected three .*bools", ValueError, ((True, True), (True,) * 5, (), None, True)),
    "negative_slope": ("expected a finite number", ValueError, (np.nan, np.inf, -np.inf, 10**400, None, "0.1", True)),
    "saved": ("expected the second result of batch_norm_forward", TypeError, (None, ())),
}
ACCEPTS = {
    "batch_norm": ("eps", "momentum", "activation", "negative_slope", "channel_axis"),
    "batch_norm_forward": ("eps", "momentum", "activation", "negative_slope", "channel_axis"),
    "batch_norm_backward": ("output_mask", "saved"),
    "batch_norm_stats": ("channel_axis",),
    "batch_norm_elemt": ("eps", "activation", "negative_slope", "channel_axis"),
    "batch_norm_backward_reduce": ("eps", "activation", "negative_slope", "channel_axis"),
    "batch_norm_backward_elemt": ("eps", "activation", "negative_slope", "channel_axis", "count"),
}


@pytest.mark.parametrize(
    ("operation", "argument", "value"),
    [
        pytest.param(operation, name, value, id=f"{operation}-{name}-{str(value)[:9]}")
        for operation, names in ACCEPTS.items()
        for name in names
        for value in BAD_VALUES[name][2]
    ],
)
def test_a_bad_value_is_refused_by_name_and_nothing_is_written(operation, argument, value):
    function, arguments, _ = arguments_of(operation)
    message, error, _ = BAD_VALUES[argument]
    with unchanged(*arguments.values()), pytest.raises(error, match=f"^{argument} is .*({message})"):
        function(**{**arguments, argument: value})


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1)])
def test_one_value_per_channel_cannot_train_and_changes_nothing(shape):
    x, out = np.ones(shape, np.float32), np.full(shape, 7, np.float32)
    mean, var = np.zeros(3), np.ones(3)
    message = r"x has shape .*, one value per channel; expected more than one"
    with unchanged(x, mean, var, out), pytest.raises(ValueError, match=message):
        pybn.batch_norm(x, mean, var, training=True, out=out)
    assert_close(pybn.batch_norm(x, mean, var), x / np.sqrt(1 + 1e-5), np.float32)


@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False])
def test_one_running_statistic_without_the_other_is_refused(training, missing):
    _, arguments, _ = arguments_of("batch_norm")
    message = f"{missing} is None.*, expected " + ("both or neither" if training else r"an array of shape \(3,\)")
    with unchanged(*arguments.values()), pytest.raises(ValueError, match=message):
        pybn.batch_norm(**{**arguments, "training": training, missing: None})


def test_evaluation_needs_running_statistics():
    with pytest.raises(ValueError, match=r"running_mean is None, expected an array of shape \(3,\) in evaluation"):
        pybn.batch_norm(np.ones(SHAPE), None, None)


def test_running_statistics_may_not_share_memory():
    both = np.ones(4)
    with unchanged(both), pytest.raises(ValueError, match="running_mean and running_var share memory, expected two"):
        pybn.batch_norm(np.ones(SHAPE), both[:3], both[1:], training=True)
    interleaved = np.ones(6)
    pybn.batch_norm(np.ones(SHAPE), interleaved[::2], interleaved[1::2], training=True)


def test_interleaved_and_reversed_running_statistics_are_updated_in_place(rng):
    x = images(rng, SHAPE)
    _, _, mean, var = parameters(rng, 3)
    memory = np.full(12, 7, np.float32)
    strided_mean, strided_var = memory[::4], memory[1::4][::-1]
    strided_mean[...], strided_var[...] = mean, var
    pybn.batch_norm(x, mean, var, training=True)
    pybn.batch_norm(x, strided_mean, strided_var, training=True)
    assert_same_bits(strided_mean.copy(), mean)
    assert_same_bits(strided_var.copy(), var)
    assert np.all(memory.reshape(3, 4)[:, 2:] == 7)


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if "out" in arguments_of(name)[1]])
def test_out_may_not_overlap_an_input_in_part(operation):
    function, arguments, arrays = arguments_of(operation)
    memory = np.zeros((5, *SHAPE[1:]), np.float32)
    for name in ("x", "dy", "residual"):
        if name in arrays:
            value, out = memory[:4], memory[1:]
            value[...] = 1
            with (
                unchanged(memory),
                pytest.raises(ValueError, match=f"^out overlaps {name} in part, expected a separate array"),
            ):
                function(**{**arguments, name: value, "out": out})
    for name, kind in arrays.items():
        if kind in ("channel", "variance", "updated") and not name.startswith("sum_"):
            with unchanged(memory), pytest.raises(ValueError, match=f"^out overlaps {name} in part"):
                function(**{**arguments, name: memory[0, 0, 0, :3], "out": memory[:4]})


@pytest.mark.parametrize("training", [True, False])
def test_check_finite_refuses_nan_and_inf_before_anything_is_written(rng, training):
    _, arguments, _ = arguments_of("batch_norm")
    arguments.update(training=training, check_finite=True)
    pybn.batch_norm(**arguments)
    for bad in (np.nan, np.inf, -np.inf):
        arguments["x"] = images(rng, SHAPE)
        arguments["x"][2, 1, 3, 4] = bad
        message = r"^x is not finite in 1 of 3 channels \(1\), expected no NaN or Inf"
        with unchanged(*arguments.values()), pytest.raises(ValueError, match=message):
            pybn.batch_norm(**arguments)


def test_check_finite_accepts_every_finite_value():
    """Also those of which the variance overflows."""
    for dtype in (np.float32, np.float64):
        x = np.array([[np.finfo(dtype).max, 1.0], [np.finfo(dtype).min, 2.0]], dtype)
        y = pybn.batch_norm(x, np.zeros(2), np.ones(2), check_finite=True)
        assert np.isfinite(y).all()


FOLLOWED = {
    "reversed batch": lambda a: a[::-1],
    "every other channel": lambda a: a[:, ::2],
    "every other column": lambda a: a[..., ::2],
    "everything reversed": lambda a: a[::-1, ::-1, ::-1, ::-1],
    "cut": lambda a: a[1:, 1:, 1:-1, 2:],
    "channels last in memory": lambda a: np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "Fortran order": np.asfortranarray,
    "transposed planes": lambda a: a.transpose(0, 1, 3, 2),
    "permuted": lambda a: a.transpose(3, 2, 0, 1),
    "byte-swapped": byte_swapped,
    "unaligned": unaligned,
    "read-only": read_only,
    "broadcast batch": lambda a: np.broadcast_to(a[:1], (7, *a.shape[1:])),
    "broadcast planes": lambda a: np.broadcast_to(a[:, :, :1, :1], a.shape),
    "broadcast channels": lambda a: np.broadcast_to(a[:, :1], (a.shape[0], 5, *a.shape[2:])),
    "one value": lambda a: np.broadcast_to(a[0, 0, 0, 0], (4, 3, 5, 6)),
    "subclass": lambda a: a.view(type("Subclass", (np.ndarray,), {})),
    "memmap": None,
}


def results(x, dy, channel_axis=1):
    """Outputs and gradients of one training step on x."""
    channels = x.shape[channel_axis]
    rng = np.random.default_rng(5)
    weight, bias, mean, var = parameters(rng, channels)
    options = {"activation": "relu", "channel_axis": channel_axis, "residual": dy}
    y, saved = pybn.batch_norm_forward(x, weight, bias, mean, var, **options)
    evaluated = pybn.batch_norm(x, mean, var, weight, bias, **options)
    sums = pybn.batch_norm_backward_reduce(dy, x, mean, var, weight, bias, **options)
    return [y, mean, var, *pybn.batch_norm_backward(dy, saved), evaluated, *sums]


@pytest.mark.parametrize("channel_axis", [1, -1])
@data_dtypes
@pytest.mark.parametrize("name", FOLLOWED)
def test_views_of_every_kind_give_the_result_of_their_contiguous_copy(rng, tmp_path, name, dtype, channel_axis):
    base = images(rng, (6, 5, 8, 10), dtype)
    if name == "memmap":
        view = np.memmap(tmp_path / "x", dtype, "w+", shape=base.shape)
        view[...] = base
    else:
        view = FOLLOWED[name](base)
    contiguous = np.ascontiguousarray(view, dtype)
    dy = rng.standard_normal(view.shape).astype(dtype)
    with unchanged(view, dy):
        got = results(view, dy, channel_axis)
    for ours, expected in zip(got, results(contiguous, dy, channel_axis), strict=True):
        assert type(ours) is np.ndarray
        assert ours.dtype.isnative
        rtol, atol = 2e-6 + 2 * ROUNDING[dtype], 1e-12 if dtype == np.float64 else 1e-5
        np.testing.assert_allclose(ours.astype(np.float64), expected.astype(np.float64), rtol=rtol, atol=atol)


@pytest.mark.parametrize("spoil", [byte_swapped, unaligned, read_only, lambda a: a[::-1][::-1]])
def test_per_channel_arrays_may_be_views_of_every_kind(rng, spoil):
    x = images(rng, SHAPE)
    weight, bias, mean, var = parameters(rng, 3)
    expected = pybn.batch_norm(x, mean, var, weight, bias)
    assert_same_bits(pybn.batch_norm(x, *map(spoil, (mean, var, weight, bias))), expected)
    reversed_memory = [np.ascontiguousarray(p[::-1])[::-1] for p in (mean, var, weight, bias)]
    assert_same_bits(pybn.batch_norm(x, *reversed_memory), expected)
    assert_same_bits(pybn.batch_norm(x, *(np.repeat(p, 2)[::2] for p in (mean, var, weight, bias))), expected)


def as_every_other(a):
    """The same values, with others between them in memory."""
    memory = np.full([2 * n for n in a.shape], 9).astype(a.dtype)
    view = memory[tuple(slice(None, None, 2) for _ in a.shape)]
    view[...] = a
    return view


class Subclass(np.ndarray):
    """An ndarray that has nothing of its own."""


class ArrayLike:
    """What `numpy.asarray` takes."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


# How an array that is only read may be given, so that the bits of the result are the same.
READABLE = {
    "strided": as_every_other,
    "reversed in memory": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    "byte-swapped": lambda a: a if a.dtype == BFLOAT16 else byte_swapped(a),
    "unaligned": unaligned,
    "read-only": read_only,
    "subclass": lambda a: a.view(Subclass),
    "matrix": lambda a: a.view(np.matrix) if a.ndim == 2 else a.view(np.recarray),
    "array-like": ArrayLike,
    "torch tensor": lambda a: a if a.dtype == BFLOAT16 else torch.from_numpy(a.copy()),
}
WRITABLE = ("strided", "reversed in memory", "subclass", "matrix")


@pytest.mark.parametrize("shape", [(5, 3), (40, 3, 5, 6)], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
@data_dtypes
def test_results_do_not_depend_on_how_an_argument_is_given(operation, dtype, shape):
    """One argument at a time unusual, the others as they usually are."""

    def results(argument=None, way=None):
        function, arguments, arrays = arguments_of(operation, dtype, shape)
        if argument is not None:
            arguments[argument] = READABLE[way](arguments[argument])
        result = function(**arguments)
        if "out" in arguments:
            first = result[0] if isinstance(result, tuple) else result
            assert first is arguments["out"]
        result = result if isinstance(result, tuple) else (result,)
        updated = [np.array(arguments[name]) for name, kind in arrays.items() if kind == "updated"]
        return [np.array(r) for r in result if isinstance(r, np.ndarray)] + updated

    expected = results()
    arrays = arguments_of(operation, dtype, shape)[2]
    for argument, kind in arrays.items():
        for way in WRITABLE if kind in ("out", "updated") else READABLE:
            for ours, same in zip(results(argument, way), expected, strict=True):
                assert_same_bits(ours, same, (argument, way))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_native_byte_order_may_be_named(operation):
    """A dtype of order "<" on a little-endian machine is not that of order "=", and yet equal to it."""
    function, arguments, arrays = arguments_of(operation)
    expected = function(**arguments)
    function, arguments, _ = arguments_of(operation)
    for argument in arrays:
        array = arguments[argument]
        named = array.view(array.dtype.newbyteorder("<" if sys.byteorder == "little" else ">"))
        assert named.dtype.byteorder in "<>"
        assert named.dtype == array.dtype
        arguments[argument] = named
    got = function(**arguments)
    for ours, same in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, expected)), strict=True):
        if isinstance(same, np.ndarray):
            assert_same_bits(ours, same)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_parameters_of_either_type_give_the_same_bits(operation):
    """One at a time of float64, the others of float32."""
    function, arguments, arrays = arguments_of(operation)
    expected = function(**arguments)
    for argument, kind in arrays.items():
        if kind in ("channel", "variance"):
            function, arguments, _ = arguments_of(operation)
            got = function(**{**arguments, argument: arguments[argument].astype(np.float64)})
            for ours, same in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, expected)), strict=True):
                if isinstance(same, np.ndarray):
                    assert_same_bits(ours, same, argument)


def test_nothing_is_remembered_from_call_to_call(rng):
    """Parameters and statistics that change in place are read anew, also by a layer in evaluation."""
    x = images(rng, SHAPE)
    layer = pybn.BatchNorm2d(3).eval()
    given = parameters(rng, 3)
    weight, bias, mean, var = (p.copy() for p in given)
    for step in range(4):
        for array in (weight, bias, mean, var)[step:]:
            array += np.float32(0.5)
        layer.weight[...], layer.bias[...], layer.running_mean[...], layer.running_var[...] = weight, bias, mean, var
        expected = reference.normalize(x, mean, var, weight, bias)
        assert_close(pybn.batch_norm(x, mean, var, weight, bias), expected, np.float32)
        assert_close(layer(x), expected, np.float32)
        x += 1


@data_dtypes
@pytest.mark.parametrize("shape", [(2, 1), (1, 1, 2), (2, 3), (1, 2, 1, 2), (3, 1, 1, 1, 1)])
def test_the_smallest_arrays_are_right(rng, dtype, shape):
    for channel_axis in (1, -1):
        x, residual = (images(rng, shape, dtype) for _ in range(2))
        channels = x.shape[channel_axis]
        _, _, mean, var = parameters(rng, channels)
        expected = reference.normalize(x, mean, var, activation="relu", residual=residual, channel_axis=channel_axis)
        y = pybn.batch_norm(x, mean, var, activation="relu", residual=residual, channel_axis=channel_axis)
        assert_close(y, expected, dtype)
        if x.size > channels:
            y = pybn.batch_norm(x, None, None, training=True, channel_axis=channel_axis)
            assert_close(y, reference.normalize(x, *reference.stats(x, channel_axis), channel_axis=channel_axis), dtype)


def test_lists_are_float64_arrays():
    x = [[1.0, 2.0], [3.0, 5.0]]
    y = pybn.batch_norm(x, [0.0, 0.0], [1.0, 1.0], [1.0, 2.0], [0.0, 1.0])
    assert_same_bits(
        y, pybn.batch_norm(np.array(x), np.zeros(2), np.ones(2), np.array([1.0, 2.0]), np.array([0.0, 1.0]))
    )
    assert y.dtype == np.float64
    assert_same_bits(pybn.batch_norm_stats(x)[0], np.array([2.0, 3.5]))


def test_data_may_share_memory_with_parameters_that_are_only_read(rng):
    x = images(rng, (3, 3))
    kept = x[0].copy(), np.abs(x[1])
    assert_same_bits(pybn.batch_norm(x, x[0], kept[1]), pybn.batch_norm(x, *kept))


@pytest.mark.parametrize("out_view", [unaligned, np.asfortranarray, lambda a: a[::-1, ::-1]])
def test_out_that_the_kernels_cannot_follow_is_filled_all_the_same(rng, out_view):
    x = images(rng, SHAPE)
    out = out_view(np.zeros(SHAPE, np.float32))
    assert pybn.batch_norm(x, None, None, training=True, out=out) is out
    assert_same_bits(np.ascontiguousarray(out), pybn.batch_norm(x, None, None, training=True))


def test_in_place_on_a_view_that_must_be_copied_keeps_the_input_for_the_backward_pass(rng):
    original = images(rng, SHAPE)
    x = np.zeros((4, 3, 5, 7), np.float32)[..., 1:]
    x[...] = original
    y, saved = pybn.batch_norm_forward(x, out=x)
    assert y is x
    assert_close(x, reference.normalize(original, *reference.stats(original)), np.float32)
    dy = rng.standard_normal(SHAPE).astype(np.float32)
    expected = pybn.batch_norm_backward(dy, pybn.batch_norm_forward(original)[1])
    assert_close(pybn.batch_norm_backward(dy, saved).dx, expected.dx, np.float32)


def test_a_broadcast_batch_is_followed_and_not_copied(rng):
    x = np.broadcast_to(images(rng, (1, 2, 64, 64)), (64, 2, 64, 64))
    mean, var = reference.stats(x)
    out = np.empty(x.shape, x.dtype)
    for operation in (
        lambda: pybn.batch_norm_stats(x),
        lambda: pybn.batch_norm_backward_reduce(x, x, mean, var),
        lambda: pybn.batch_norm(x, mean, var, out=out),
        lambda: pybn.batch_norm(x, None, None, training=True, out=out),
    ):
        tracemalloc.start()
        operation()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < x.size * x.itemsize / 4


def test_more_than_2_to_the_31_values_are_counted_in_64_bits():
    """Without the memory: one image, again and again."""
    image = images(np.random.default_rng(2), (1, 2, 64, 64))
    repeats = 2**18 + 1
    x = np.broadcast_to(image, (repeats, 2, 64, 64))
    assert x.size > 2**31
    assert _core.layout(1, x), "it would be copied, and need 9 GB"
    mean, var, count = pybn.batch_norm_stats(x)
    expected_mean, expected_var = reference.stats(image)
    assert count == repeats * 4096
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-10)
    np.testing.assert_allclose(var, expected_var, rtol=1e-10)
    sum_dy, sum_dy_xmu = pybn.batch_norm_backward_reduce(x, x, expected_mean, expected_var)
    np.testing.assert_allclose(sum_dy, repeats * 4096 * expected_mean, rtol=1e-10)
    np.testing.assert_allclose(sum_dy_xmu, repeats * 4096 * expected_var, rtol=1e-10)


def test_more_than_2_to_the_31_rows_are_counted_in_64_bits():
    row = np.arange(1.0, 17.0, dtype=np.float32)
    x = np.broadcast_to(row, (2**27 + 5, 16))
    assert x.size > 2**31
    mean, var, count = pybn.batch_norm_stats(x)
    assert_same_bits(mean, row.astype(np.float64))
    assert_same_bits(var, np.zeros(16))
    assert count == 2**27 + 5
    sum_dy, sum_dy_xmu = pybn.batch_norm_backward_reduce(x, x, np.zeros(16), np.ones(16))
    assert_same_bits(sum_dy, row.astype(np.float64) * count)
    assert_same_bits(sum_dy_xmu, row.astype(np.float64) ** 2 * count)


def test_strides_of_more_than_2_to_the_31_values_are_followed(rng, tmp_path):
    """In a sparse file: two images 2^31 values apart, of two channels 2^30 apart."""
    memory = np.memmap(tmp_path / "sparse", np.float32, "w+", shape=(2**31 + 2**30 + 4096,))
    view = as_strided(memory, (2, 2, 4096), (2**33, 2**32, 4))
    view[...] = images(rng, view.shape)
    contiguous = np.ascontiguousarray(view)
    dy = rng.standard_normal(view.shape).astype(np.float32)
    for ours, expected in zip(results(view, dy), results(contiguous, dy), strict=True):
        assert_same_bits(ours, expected)
    expected = pybn.batch_norm(contiguous, None, None, training=True)
    pybn.batch_norm(view, None, None, training=True, out=view)
    assert_same_bits(np.ascontiguousarray(view), expected)


@st.composite
def arrays_and_views(draw):
    """An array of 2 to 5 axes of any strides and byte order, its elements all different."""
    dtype = draw(st.sampled_from(DATA_DTYPES))
    rank = draw(st.integers(2, 5))
    shape = draw(hnp.array_shapes(min_dims=rank, max_dims=rank, min_side=1, max_side=9))
    base = np.random.default_rng(draw(st.integers(0, 99))).standard_normal(shape) * 2 + 1
    view = base.astype(np.dtype(dtype).newbyteorder(draw(st.sampled_from("=<>"))))
    view = view.transpose(draw(st.permutations(range(rank))))
    steps = draw(st.lists(st.sampled_from([1, 1, 2, 3, -1, -1, -2]), min_size=rank, max_size=rank))
    view = view[tuple(slice(None, None, step) for step in steps)]
    if draw(st.booleans()):
        axis = draw(st.integers(0, rank - 1))
        view = np.broadcast_to(np.take(view, [0], axis), [*view.shape[:axis], 4, *view.shape[axis + 1 :]])
    return view


@given(arrays_and_views(), st.sampled_from([1, -1]), st.booleans())
def test_any_strides_and_byte_order_give_the_result_of_the_contiguous_copy(x, channel_axis, in_place):
    native = x.dtype if x.dtype == BFLOAT16 else x.dtype.newbyteorder("=")
    contiguous = np.ascontiguousarray(x, native)
    channels = x.shape[channel_axis]
    _, _, mean, var = parameters(np.random.default_rng(0), channels)
    tolerance = 1e-12 if native == np.float64 else 1e-5

    y = pybn.batch_norm(x, mean, var, channel_axis=channel_axis)
    assert_same_bits(np.ascontiguousarray(y), pybn.batch_norm(contiguous, mean, var, channel_axis=channel_axis))
    if x.size == channels:
        return
    dy = contiguous[::-1]
    ours, theirs = (pybn.batch_norm_forward(a, channel_axis=channel_axis) for a in (x, contiguous))
    rtol = tolerance + 2 * ROUNDING[native.type]
    np.testing.assert_allclose(ours[0].astype(np.float64), theirs[0].astype(np.float64), rtol=rtol, atol=tolerance)
    ours, theirs = (pybn.batch_norm_backward(dy, result[1]).dx for result in (ours, theirs))
    # invstd may be as large as 1 / sqrt(eps) = 316
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=1000 * tolerance)
    if in_place and x.flags.writeable and x.dtype == native:
        target = x.copy(order="K")
        assert pybn.batch_norm(target, mean, var, channel_axis=channel_axis, out=target) is target
        assert_same_bits(np.ascontiguousarray(target), np.ascontiguousarray(y))


def test_the_same_memory_is_the_same_whatever_the_strides_of_axes_of_one():
    base = np.arange(12, dtype=np.float32).reshape(4, 3)
    x, out = base[:, :, None], base.reshape(4, 3, 1)
    assert x.strides != out.strides
    expected, _ = pybn.batch_norm_forward(base.copy()[:, :, None])
    pybn.batch_norm_forward(x, out=out)
    assert_same_bits(base, expected[:, :, 0])


@pytest.mark.parametrize("eps", [np.float16(1e-3), np.float32(1e-5), np.float64(1e-5), 1])
def test_eps_may_be_any_real_number(eps):
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    y, _ = pybn.batch_norm_forward(x, eps=eps)
    assert_same_bits(y, pybn.batch_norm_forward(x, eps=float(eps))[0])


def test_training_is_a_bool():
    with pytest.raises(TypeError, match=r"training is .*, expected True or False"):
        pybn.batch_norm(np.ones((4, 3)), np.zeros(3), np.ones(3), training=np.array([True, False]))
