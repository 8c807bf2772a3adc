"""The array algebra of a map that comes before a linear operator, against the definition and torch."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator

from pybn.folding.affine import Affine
from pybn.folding.weights_forward import (
    Window,
    absorb_conv,
    absorb_conv_transpose,
    absorb_matrix,
    conv_reach,
    conv_transpose_reach,
    data_share,
    same_padding,
)

SEEDS = st.integers(0, 10**6)
some = settings(max_examples=settings().max_examples // 2)


def random_affine(rng, channels):
    """Scales of both signs, some of them zero."""
    scale = rng.normal(size=channels)
    scale[rng.random(channels) < 0.2] = 0
    return Affine(scale, rng.normal(size=channels))


def apply(affine, x):
    along = (-1, *([1] * (x.ndim - 2)))
    return affine.scale.reshape(along) * x + affine.shift.reshape(along)


def random_windows(rng, dims, largest_padding):
    return [
        Window(
            kernel=int(rng.integers(1, 4)),
            stride=int(rng.integers(1, 4)),
            dilation=int(rng.integers(1, 3)),
            begin=int(rng.integers(0, largest_padding + 1)),
            end=int(rng.integers(0, largest_padding + 1)),
        )
        for _ in range(dims)
    ]


def torch_conv(x, weight, windows, groups):
    """Padding may be asymmetric, so it is done before."""
    padding = [p for window in reversed(windows) for p in (window.begin, window.end)]
    padded = torch.nn.functional.pad(torch.from_numpy(x), padding)
    convolve = getattr(torch.nn.functional, f"conv{len(windows)}d")
    return convolve(
        padded,
        torch.from_numpy(weight),
        stride=[w.stride for w in windows],
        dilation=[w.dilation for w in windows],
        groups=groups,
    ).numpy()


@some
@given(SEEDS, st.integers(1, 3), st.sampled_from([1, 1, 2, 3]), st.booleans(), st.sampled_from([0, 1, 3]))
def test_conv_of_a_mapped_input_is_the_folded_conv(seed, dims, groups, depthwise, largest_padding):
    rng = np.random.default_rng(seed)
    per_group = 1 if depthwise else int(rng.integers(1, 4))
    windows = random_windows(rng, dims, largest_padding)
    weight = rng.normal(size=(groups * int(rng.integers(1, 4)), per_group, *(w.kernel for w in windows)))
    x = rng.normal(size=(2, groups * per_group, *(int(n) for n in rng.integers(5, 8, dims))))
    affine = random_affine(rng, groups * per_group)

    reaches = [conv_reach(window, size) for window, size in zip(windows, x.shape[2:], strict=True)]
    scaled, added = absorb_conv(weight, affine, groups, reaches)

    expected = torch_conv(apply(affine, x), weight, windows, groups)
    np.testing.assert_allclose(torch_conv(x, scaled, windows, groups) + added, expected, rtol=0, atol=1e-12)
    if largest_padding == 0:
        assert added.shape == (weight.shape[0], *([1] * dims)), "without padding it is a bias"


def test_an_axis_without_padding_needs_no_size_and_no_map():
    rng = np.random.default_rng(1)
    windows = [Window(3, begin=1, end=1), Window(3)]
    weight, affine = rng.normal(size=(2, 3, 3, 3)), random_affine(rng, 3)
    scaled, added = absorb_conv(weight, affine, 1, [conv_reach(windows[0], 6), conv_reach(windows[1], None)])
    assert added.shape == (2, 6, 1)
    for width in (3, 8):
        x = rng.normal(size=(1, 3, 6, width))
        expected = torch_conv(apply(affine, x), weight, windows, 1)
        np.testing.assert_allclose(torch_conv(x, scaled, windows, 1) + added, expected, rtol=0, atol=1e-12)


def test_a_padded_axis_needs_its_size():
    with pytest.raises(ValueError, match="size is None"):
        conv_reach(Window(3, begin=1), None)


def test_padding_out_of_reach_of_the_kernel_makes_no_map():
    # Stride 2 over 4 values and one zero at the end: the second and last window begins at 2.
    assert conv_reach(Window(2, stride=2, end=1), 4).shape == (2, 1)


@some
@given(
    SEEDS,
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([0, 1, 2]),
    st.booleans(),
)
def test_conv_transpose_of_a_mapped_input_is_the_folded_one(seed, dims, per_group, groups, padding, output_padding):
    rng = np.random.default_rng(seed)
    windows = [
        Window(int(rng.integers(2, 5)), int(rng.integers(1, 4)), int(rng.integers(1, 3)), padding, padding)
        for _ in range(dims)
    ]
    # torch wants it below the stride or the dilation; ONNX below the stride.
    extra = [int(output_padding and window.stride > 1) for window in windows]
    weight = rng.normal(size=(groups * int(rng.integers(1, 4)), per_group, *(w.kernel for w in windows)))
    x = rng.normal(size=(2, weight.shape[0], *(int(n) for n in rng.integers(4, 7, dims))))
    affine = random_affine(rng, weight.shape[0])

    def convolve(data, kernel):
        return getattr(torch.nn.functional, f"conv_transpose{dims}d")(
            torch.from_numpy(data),
            torch.from_numpy(kernel),
            stride=[w.stride for w in windows],
            padding=padding,
            output_padding=extra,
            groups=groups,
            dilation=[w.dilation for w in windows],
        ).numpy()

    reaches = [
        conv_transpose_reach(window, size, more) for window, size, more in zip(windows, x.shape[2:], extra, strict=True)
    ]
    scaled, added = absorb_conv_transpose(weight, affine, groups, reaches)
    np.testing.assert_allclose(convolve(x, scaled) + added, convolve(apply(affine, x), weight), rtol=0, atol=1e-12)


@some
@given(
    size=st.integers(3, 12),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 4),
    dilation=st.integers(1, 2),
    upper=st.booleans(),
)
def test_same_padding_is_that_of_the_reference(size, kernel, stride, dilation, upper):
    begin, end = same_padding(size, Window(kernel, stride, dilation), upper=upper)
    x, w = np.arange(1.0, size + 1)[None, None], 2.0 ** np.arange(kernel)[None, None]

    def run(**attributes):
        node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[stride], dilations=[dilation], **attributes)
        infos = [helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, None) for name in "xwy"]
        graph = helper.make_graph([node], "graph", infos[:2], infos[2:])
        return ReferenceEvaluator(helper.make_model(graph)).run(None, {"x": x, "w": w})[0]

    np.testing.assert_array_equal(run(pads=[begin, end]), run(auto_pad="SAME_UPPER" if upper else "SAME_LOWER"))


@pytest.mark.parametrize("axis", [0, 1])
def test_matrix_product_of_a_mapped_input_is_the_folded_one(axis):
    rng = np.random.default_rng(axis)
    matrix, affine, x = rng.normal(size=(5, 4)), random_affine(rng, 5), rng.normal(size=(3, 5))
    scaled, added = absorb_matrix(matrix if axis == 0 else matrix.T, affine, axis)
    actual = x @ (scaled if axis == 0 else scaled.T) + added
    np.testing.assert_allclose(actual, (affine.scale * x + affine.shift) @ matrix, rtol=0, atol=1e-13)


@some
@given(SEEDS)
def test_share_of_data_is_the_average_of_padded_ones(seed):
    rng = np.random.default_rng(seed)
    padding = int(rng.integers(0, 2))
    window = Window(int(rng.integers(2, 5)), int(rng.integers(1, 4)), begin=padding, end=padding)
    size = int(rng.integers(4, 9))
    ones = torch.ones((1, 1, size), dtype=torch.float64)
    expected = torch.nn.functional.avg_pool1d(ones, window.kernel, window.stride, padding, count_include_pad=True)
    np.testing.assert_allclose(np.broadcast_to(data_share(window, size), expected.shape), expected, rtol=1e-15)


def test_infinite_results_are_left_to_round_to():
    weight = np.full((1, 2, 1), 1e300)
    scaled, added = absorb_conv(weight, Affine(np.full(2, 1e300), np.full(2, 1e300)), 1, [np.ones((1, 1))])
    assert np.isinf(scaled).all()
    assert np.isinf(added).all()
