"""``y = activation(batch_norm(x) + residual)``: gradients of the residual, the bit mask, and whose memory is whose."""

import itertools
import tracemalloc
import weakref

import numpy as np
import pytest
import reference
import threadpoolctl
from conftest import (
    DATA_DTYPES,
    NETWORK_SHAPES,
    TAIL_SIZES,
    assert_close,
    assert_same_bits,
    check_step,
    data_dtypes,
    images,
    parameters,
    unchanged,
)
from hypothesis import given
from hypothesis import strategies as st

import pybn
from pybn import _core

MASKED = ("relu", "relu6", "leaky_relu")  # whose derivative takes two values: one bit of each is stored
SMOOTH = ("silu", "hardswish")  # whose backward pass reads the residual again

every_activation = pytest.mark.parametrize("activation", reference.ACTIVATIONS)
masked = pytest.mark.parametrize("activation", MASKED)
smooth = pytest.mark.parametrize("activation", SMOOTH)


def step_data(rng, shape=(5, 7, 6, 9), dtype=np.float32, channel_axis=1):
    """Input, residual and gradient."""
    return [images(rng, shape, dtype, channel_axis) for _ in range(3)]


# ---- values ---------------------------------------------------------------------------------------------------------


@every_activation
@pytest.mark.parametrize("channel_axis", [1, -1])
@data_dtypes
def test_every_vector_tail_is_right(instruction_set, rng, dtype, channel_axis, activation):
    for number, size in enumerate(TAIL_SIZES):
        training = number % 2 == 0
        x, residual, _ = step_data(rng, (5, 3, size) if channel_axis == 1 else (5, size, 3), dtype, channel_axis)
        check_step(rng, x, channel_axis, training=training, activation=activation, residual=residual, what=size)


@pytest.mark.parametrize("shape", NETWORK_SHAPES.values(), ids=NETWORK_SHAPES)
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_network_shapes_are_right(instruction_set, rng, channel_axis, shape):
    x, residual, _ = step_data(rng, shape, np.float32, channel_axis)
    for training, activation in ((True, "relu"), (False, "silu")):
        check_step(rng, x, channel_axis, training=training, activation=activation, residual=residual, what=activation)


@masked
@pytest.mark.parametrize("channel_axis", [1, -1])
@data_dtypes
def test_the_mask_has_the_right_bit_for_every_value(instruction_set, rng, dtype, channel_axis, activation):
    """Half of the values pass, at random: a bit in the place of another would show."""
    sizes = (1, 3, 7, 8, 9, 17, 33, 64, 65)
    for channels, inner in itertools.product(sizes, sizes):
        shape = (3, channels, inner) if channel_axis == 1 else (3, inner, channels)
        x = np.zeros(shape, dtype)
        residual = rng.choice([-1.0, 1.0, 7.0] if activation == "relu6" else [-1.0, 1.0], shape).astype(dtype)
        weight, bias, mean, var = np.ones(channels), np.zeros(channels), np.zeros(channels), np.full(channels, 0.75)
        y, saved = pybn.batch_norm_forward(
            x, weight, bias, mean, var, training=False, eps=0.25, activation=activation,
            negative_slope=0.5, residual=residual, channel_axis=channel_axis,
        )  # fmt: skip
        wide = residual.astype(np.float64)
        np.testing.assert_array_equal(y.astype(np.float64), reference.activate(wide, activation, 0.5))
        dy = rng.integers(1, 9, shape).astype(dtype)
        dz = dy.astype(np.float64) * reference.derivative(wide, activation, 0.5)
        got = pybn.batch_norm_backward(dy, saved)
        np.testing.assert_array_equal(got.dresidual.astype(np.float64), dz, err_msg=str(shape))
        np.testing.assert_array_equal(got.dx.astype(np.float64), dz, err_msg=str(shape))
        axes = (0, 2) if channel_axis == 1 else (0, 1)
        np.testing.assert_array_equal(got.dbias, dz.sum(axes), err_msg=str(shape))


@masked
def test_the_mask_is_right_on_several_threads_and_segments(instruction_set, rng, activation):
    """Neighbouring channels, whose bits may share a byte, may be written by different threads."""
    with threadpoolctl.threadpool_limits(4, user_api="openmp"):
        pybn.set_num_threads(4)
        for shape, channel_axis in (
            ((3, 33, 50, 51), 1),
            ((40, 64, 7, 7), 1),
            ((3, 3, 150, 151), 1),
            ((3, 90, 91, 67), -1),
        ):
            x, residual = rng.standard_normal((2, *shape)).astype(np.float32)
            _, saved = pybn.batch_norm_forward(
                x, activation=activation, negative_slope=0.5, residual=residual, channel_axis=channel_axis
            )
            z = pybn.batch_norm(x, None, None, training=True, residual=residual, channel_axis=channel_axis)
            dy = np.ones_like(x)
            got = pybn.batch_norm_backward(dy, saved)
            assert_same_bits(got.dresidual, reference.derivative(z, activation, 0.5).astype(np.float32))


@pytest.mark.parametrize("channel_axis", [1, -1])
@every_activation
def test_gradients_are_those_of_finite_differences(rng, activation, channel_axis):
    x, residual, dy = step_data(rng, (4, 3, 2, 3), np.float64, channel_axis)
    weight, bias, _, _ = parameters(rng, 3, np.float64)
    options = {"channel_axis": channel_axis}
    z, _ = pybn.batch_norm_forward(x, weight, bias, residual=residual, **options)
    assert not np.any(reference.near_a_kink(z, activation, 1e-3)), "a value at the kink has no derivative"

    def loss(x, residual):
        y, _ = pybn.batch_norm_forward(x, weight, bias, activation=activation, residual=residual, **options)
        return np.sum(y * dy)

    _, saved = pybn.batch_norm_forward(x, weight, bias, activation=activation, residual=residual, **options)
    got = pybn.batch_norm_backward(dy, saved)
    step = 1e-5
    for index in np.ndindex(x.shape):
        nudge = np.zeros_like(x)
        nudge[index] = step
        assert abs((loss(x + nudge, residual) - loss(x - nudge, residual)) / (2 * step) - got.dx[index]) < 1e-8
        slope = (loss(x, residual + nudge) - loss(x, residual - nudge)) / (2 * step)
        assert abs(slope - got.dresidual[index]) < 1e-8


@every_activation
@pytest.mark.parametrize("training", [True, False])
@data_dtypes
def test_a_residual_of_zeros_changes_nothing(rng, dtype, training, activation):
    x, _, dy = step_data(rng, dtype=dtype)
    weight, bias, mean, var = parameters(rng, 7)
    results = []
    for residual in (None, np.zeros_like(x)):
        y, saved = pybn.batch_norm_forward(
            x, weight, bias, mean.copy(), var.copy(), training=training, activation=activation, residual=residual
        )
        results.append([y, *pybn.batch_norm_backward(dy, saved)[:3]])
    for without, with_zeros in zip(*results, strict=True):
        np.testing.assert_array_equal(without.astype(np.float64), with_zeros.astype(np.float64))  # -0 + 0 is 0


@pytest.mark.parametrize("channel_axis", [1, -1])
@every_activation
@data_dtypes
def test_changing_the_instruction_set_between_the_passes_changes_no_mask(rng, dtype, activation, channel_axis):
    """The bits are laid out the same by all of them."""
    before = _core.instruction_set()
    try:
        for shape in ((3, 5, 7, 9), (2, 33, 13, 5), (700, 17, 1, 1), (4, 3, 16, 16)):
            x, residual, dy = step_data(rng, shape, dtype, channel_axis)
            options = {"activation": activation, "residual": residual, "channel_axis": channel_axis}
            for first, second in itertools.permutations(_core.available_instruction_sets(), 2):
                _core.select_instruction_set(first)
                _, saved = pybn.batch_norm_forward(x, **options)
                expected = pybn.batch_norm_backward(dy, saved)
                _core.select_instruction_set(second)
                got = pybn.batch_norm_backward(dy, saved)
                for ours, same in zip((got.dx, got.dresidual), (expected.dx, expected.dresidual), strict=True):
                    assert_close(
                        ours.astype(np.float64) / 4, same.astype(np.float64) / 4, dtype, (first, second), roundings=2
                    )
    finally:
        _core.select_instruction_set(before)


# ---- the gradient of the residual -----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_without_an_activation_dresidual_is_dy_itself(rng, training):
    x, residual, dy = step_data(rng)
    _, _, mean, var = parameters(rng, 7)
    _, saved = pybn.batch_norm_forward(x, None, None, mean, var, training=training, residual=residual)
    assert pybn.batch_norm_backward(dy, saved).dresidual is dy
    out = np.empty_like(dy)
    got = pybn.batch_norm_backward(dy, saved, out=out)
    assert got.dresidual is dy
    expected = dy.copy()
    got = pybn.batch_norm_backward(dy, saved, out=dy)
    assert got.dx is dy
    assert_same_bits(dy, out)
    assert not np.shares_memory(got.dresidual, dy)
    assert_same_bits(got.dresidual, expected)


@every_activation
def test_dy_may_receive_dx_and_dresidual_is_right_all_the_same(instruction_set, rng, activation):
    for shape in ((5, 7, 6, 9), (2, 3, 200, 201), (300, 17)):
        x, residual, dy = step_data(rng, shape)
        _, saved = pybn.batch_norm_forward(x, activation=activation, residual=residual)
        expected = pybn.batch_norm_backward(dy.copy(), saved)
        got = pybn.batch_norm_backward(dy, saved, out=dy)
        assert got.dx is dy
        for ours, same in zip((got.dx, got.dresidual), (expected.dx, expected.dresidual), strict=True):
            assert_same_bits(ours, same, shape)


@every_activation
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_output_mask_of_three_or_four(rng, with_residual, training, activation):
    x, residual, dy = step_data(rng)
    weight, bias, mean, var = parameters(rng, 7)
    _, saved = pybn.batch_norm_forward(
        x, weight, bias, mean, var, training=training, activation=activation,
        residual=residual if with_residual else None,
    )  # fmt: skip
    everything = pybn.batch_norm_backward(dy, saved)
    assert everything._fields == ("dx", "dweight", "dbias", "dresidual")
    assert (everything.dresidual is None) == (not with_residual)
    masks = [*itertools.product([True, False], repeat=3), *itertools.product([True, False], repeat=4)]
    for mask in masks:
        with unchanged(x, residual, dy):
            got = pybn.batch_norm_backward(dy, saved, output_mask=mask)
        wants_dresidual = with_residual and (len(mask) == 3 or mask[3])
        for name, wanted, value, full in zip(got._fields, (*mask[:3], wants_dresidual), got, everything, strict=True):
            if wanted:
                assert_same_bits(value, full, (name, mask))
            else:
                assert value is None, (name, mask)


def test_dresidual_is_in_the_memory_layout_that_the_kernels_use(rng):
    """An NHWC view of an NCHW array: dresidual has the values of its place, whatever its strides."""
    x, residual, dy = (np.moveaxis(a, 1, -1) for a in step_data(rng))
    _, saved = pybn.batch_norm_forward(
        x, activation="leaky_relu", negative_slope=0.5, residual=residual, channel_axis=-1
    )
    z = pybn.batch_norm(x, None, None, training=True, residual=residual, channel_axis=-1)
    dresidual = pybn.batch_norm_backward(dy, saved).dresidual
    np.testing.assert_array_equal(dresidual, dy * np.where(z > 0, np.float32(1), np.float32(0.5)))


# ---- whose memory is whose ------------------------------------------------------------------------------------------


@every_activation
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channel_axis", [1, -1])
@data_dtypes
def test_out_may_be_x_or_the_residual(instruction_set, rng, dtype, channel_axis, training, activation):
    x, residual, _ = step_data(rng, (3, 17, 5, 7), dtype, channel_axis)
    weight, bias, mean, var = parameters(rng, 17)

    def call(x, residual, out):
        return pybn.batch_norm(
            x, mean.copy(), var.copy(), weight, bias, training,
            activation=activation, residual=residual, channel_axis=channel_axis, out=out,
        )  # fmt: skip

    expected = call(x, residual, None)
    for name in ("x", "residual"):
        operands = {"x": x.copy(), "residual": residual.copy()}
        out, other = operands[name], operands["residual" if name == "x" else "x"]
        with unchanged(other):
            assert call(**operands, out=out) is out
        assert_same_bits(out, expected, name)

    doubled = call(x, x.copy(), None)
    assert_same_bits(call(x, x, None), doubled, "the residual is x")
    both = x.copy()
    assert call(both, both, both) is both
    assert_same_bits(both, doubled, "all three are one")


@pytest.mark.parametrize("channel_axis", [1, -1])
@every_activation
def test_the_residual_may_be_x_itself(rng, activation, channel_axis):
    """Then its gradient adds to that of x, which is for the caller to do."""
    x, _, dy = step_data(rng, channel_axis=channel_axis)
    _, same = pybn.batch_norm_forward(x, activation=activation, residual=x, channel_axis=channel_axis)
    _, copied = pybn.batch_norm_forward(x, activation=activation, residual=x.copy(), channel_axis=channel_axis)
    for ours, expected in zip(pybn.batch_norm_backward(dy, same), pybn.batch_norm_backward(dy, copied), strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            assert_same_bits(ours, expected)


@masked
@pytest.mark.parametrize("how", ["out=residual", "overwritten", "freed"])
@data_dtypes
def test_a_mask_needs_the_residual_no_longer(instruction_set, rng, dtype, how, activation):
    x, residual, dy = step_data(rng, dtype=dtype)
    options = {"activation": activation, "negative_slope": 0.5}
    _, saved = pybn.batch_norm_forward(x, residual=residual.copy(), **options)
    expected = pybn.batch_norm_backward(dy, saved)
    given = residual.copy()
    _, saved = pybn.batch_norm_forward(x, residual=given, out=given if how == "out=residual" else None, **options)
    if how == "freed":
        alive = weakref.ref(given)
        del given
        assert alive() is None, "the mask is there so that the residual need not be kept"
    elif how == "overwritten":
        given[...] = np.nan
    got = pybn.batch_norm_backward(dy, saved)
    for ours, same in zip((got.dx, got.dresidual), (expected.dx, expected.dresidual), strict=True):
        assert_same_bits(ours, same)


def test_without_an_activation_the_residual_is_not_kept(rng):
    x, residual, dy = step_data(rng)
    _, saved = pybn.batch_norm_forward(x)
    expected = pybn.batch_norm_backward(dy, saved).dx
    saved = pybn.batch_norm_forward(x, residual=residual, out=residual)[1]
    alive = weakref.ref(residual)
    del residual
    assert alive() is None
    assert_same_bits(pybn.batch_norm_backward(dy, saved).dx, expected)


@smooth
def test_a_smooth_activation_keeps_the_residual_alive(rng, activation):
    x, residual, dy = step_data(rng)
    _, saved = pybn.batch_norm_forward(x, activation=activation, residual=residual)
    expected = pybn.batch_norm_backward(dy, saved)
    _, saved = pybn.batch_norm_forward(x, activation=activation, residual=residual.copy())
    for ours, same in zip(pybn.batch_norm_backward(dy, saved), expected, strict=True):
        if same is not None:
            assert_same_bits(ours, same)


@smooth
@pytest.mark.parametrize("training", [True, False])
def test_a_smooth_activation_cannot_be_passed_back_after_out_was_the_residual(rng, training, activation):
    x, residual, dy = step_data(rng)
    _, _, mean, var = parameters(rng, 7)
    _, saved = pybn.batch_norm_forward(
        x, None, None, mean, var, training=training, activation=activation, residual=residual, out=residual
    )
    with unchanged(x, dy), pytest.raises(ValueError, match=r"^residual was overwritten by a pass with out=residual"):
        pybn.batch_norm_backward(dy, saved)


@pytest.mark.parametrize("activation", [None, *MASKED, *SMOOTH])
def test_no_activation_can_be_passed_back_after_out_was_x(rng, activation):
    x, residual, dy = step_data(rng)
    _, saved = pybn.batch_norm_forward(x, activation=activation, residual=residual, out=x)
    with unchanged(residual, dy), pytest.raises(ValueError, match=r"^x was overwritten by a pass with out=x"):
        pybn.batch_norm_backward(dy, saved)


@smooth
def test_a_residual_that_had_to_be_copied_is_kept_as_the_copy(rng, activation):
    """Byte-swapped: the caller's array may be overwritten, since ours is another."""
    x, residual, dy = step_data(rng)
    _, saved = pybn.batch_norm_forward(x, activation=activation, residual=residual)
    expected = pybn.batch_norm_backward(dy, saved)
    swapped = residual.astype(residual.dtype.newbyteorder())
    _, saved = pybn.batch_norm_forward(x, activation=activation, residual=swapped)
    got = pybn.batch_norm_backward(dy, saved)
    assert_same_bits(got.dx, expected.dx)
    assert_same_bits(got.dresidual, expected.dresidual)


@smooth
def test_a_backward_pass_into_the_residual_is_the_last_one(rng, activation):
    x, residual, dy = step_data(rng)
    _, saved = pybn.batch_norm_forward(x, activation=activation, residual=residual)
    expected = pybn.batch_norm_backward(dy, saved)
    got = pybn.batch_norm_backward(dy, saved, out=residual)
    assert got.dx is residual
    assert_same_bits(got.dx, expected.dx)
    assert_same_bits(got.dresidual, expected.dresidual)
    with pytest.raises(ValueError, match=r"^residual was overwritten"):
        pybn.batch_norm_backward(dy, saved)


@smooth
def test_a_backward_pass_may_not_write_to_a_part_of_the_residual(rng, activation):
    x, _, dy = step_data(rng)
    memory = images(rng, (6, *x.shape[1:]))
    _, saved = pybn.batch_norm_forward(x, activation=activation, residual=memory[:5])
    with unchanged(memory), pytest.raises(ValueError, match=r"^out overlaps residual in part"):
        pybn.batch_norm_backward(dy, saved, out=memory[1:])


def test_a_mask_takes_a_bit_for_every_value(rng):
    x, residual, _ = step_data(rng, (16, 8, 64, 65))
    out = np.empty_like(x)
    pybn.batch_norm_forward(x, residual=residual, activation="relu", out=out)
    for activation, channel_axis in itertools.product(MASKED, (1, -1)):
        operands = x, residual, out
        if channel_axis == -1:
            operands = [a.reshape(16, 64, 65, 8) for a in operands]
        tracemalloc.start()
        _, saved = pybn.batch_norm_forward(
            operands[0], activation=activation, residual=operands[1], out=operands[2], channel_axis=channel_axis
        )
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert saved.activation == activation
        assert held <= peak < x.size / 8 * 1.1 + 2**16


BROADCAST = {
    "batch": lambda r: np.broadcast_to(r[:1], r.shape),
    "channels": lambda r: np.broadcast_to(r[:, :1], r.shape),
    "planes": lambda r: np.broadcast_to(r[:, :, :1, :1], r.shape),
    "one value": lambda r: np.broadcast_to(r[0, 0, 0, 0], r.shape),
}


@pytest.mark.parametrize("view", BROADCAST.values(), ids=BROADCAST)
@pytest.mark.parametrize("channel_axis", [1, -1])
@every_activation
@data_dtypes
def test_the_residual_may_be_broadcast(rng, dtype, activation, channel_axis, view):
    x, residual, dy = step_data(rng, dtype=dtype)
    residual = view(residual)
    options = {"activation": activation, "channel_axis": channel_axis}
    with unchanged(x, residual, dy):
        y, saved = pybn.batch_norm_forward(x, residual=residual, **options)
        got = pybn.batch_norm_backward(dy, saved)
    expected_y, saved = pybn.batch_norm_forward(x, residual=residual.copy(), **options)
    expected = pybn.batch_norm_backward(dy, saved)
    for ours, same in zip((y, got.dx, got.dresidual), (expected_y, expected.dx, expected.dresidual), strict=True):
        assert_close(ours, same, dtype, roundings=2)
        assert ours.flags.writeable


# ---- split operations -----------------------------------------------------------------------------------------------


@every_activation
@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("shape", [(5, 7, 6, 9), (700, 17), (2, 3, 200, 201), (8, 40, 7, 7)], ids=str)
@data_dtypes
def test_the_steps_composed_equal_the_whole(rng, dtype, shape, channel_axis, activation):
    x, residual, dy = step_data(rng, shape, dtype, channel_axis)
    weight, bias, _, _ = parameters(rng, shape[1])
    options = {"activation": activation, "channel_axis": channel_axis, "residual": residual, "negative_slope": 0.3}
    y, saved = pybn.batch_norm_forward(x, weight, bias, **options)
    whole = pybn.batch_norm_backward(dy, saved)

    mean, var, count = pybn.batch_norm_stats(x, channel_axis=channel_axis)
    assert_same_bits(pybn.batch_norm_elemt(x, mean, var, weight, bias, **options), y)
    sums = pybn.batch_norm_backward_reduce(dy, x, mean, var, weight, bias, **options)
    assert_same_bits(sums[0].astype(np.float32), whole.dbias)
    dx = pybn.batch_norm_backward_elemt(dy, x, mean, var, *sums, count, weight, bias, **options)
    if activation in MASKED:  # from the mask the whole may add up in another order
        assert_close(dx, whole.dx, dtype, roundings=2)
    else:
        assert_same_bits(dx, whole.dx)


# ---- anything -------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(reference.ACTIVATIONS),
    st.sampled_from(DATA_DTYPES),
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 6), st.integers(1, 20), st.integers(1, 12), st.integers(1, 12)),
    st.sampled_from([1, -1]),
    st.permutations(range(4)),
    st.permutations(range(4)),
    st.lists(st.sampled_from([1, 1, 2, -1]), min_size=4, max_size=4),
    st.sampled_from(["new", "own", "x", "residual"]),
)
def test_operands_of_any_strides_give_the_results_of_contiguous_ones(
    activation, dtype, seed, shape, channel_axis, order, residual_order, steps, where
):
    """X, the residual and out in memory orders of their own."""
    rng = np.random.default_rng(seed)

    def strided(values, order):
        memory = np.zeros([2 * values.shape[axis] for axis in order], dtype)
        view = memory.transpose(np.argsort(order))
        view = view[
            tuple(slice(None, n, 1) if s != 2 else slice(None, None, 2) for s, n in zip(steps, shape, strict=True))
        ]
        view = view[tuple(slice(None, None, -1 if s == -1 else 1) for s in steps)]
        view[...] = values
        return view

    x, residual, dy = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
    mean, var = rng.standard_normal((2, shape[channel_axis])) ** 2
    options = {"channel_axis": channel_axis, "activation": activation, "training": False}
    y, saved = pybn.batch_norm_forward(x, None, None, mean, var, residual=residual, **options)
    expected = pybn.batch_norm_backward(dy, saved)

    x_view, residual_view = strided(x, order), strided(residual, residual_order)
    out = {"new": None, "own": strided(x * 0, residual_order), "x": x_view, "residual": residual_view}[where]
    ours, saved = pybn.batch_norm_forward(x_view, None, None, mean, var, residual=residual_view, out=out, **options)
    assert out is None or ours is out
    assert_same_bits(np.ascontiguousarray(ours), y)
    if where == "new" or where == "own":
        got = pybn.batch_norm_backward(dy, saved)
        assert_same_bits(np.ascontiguousarray(got.dx), expected.dx)
        assert_same_bits(np.ascontiguousarray(got.dresidual), expected.dresidual)
