"""The array algebra, against torch and against the definition."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from pybn.folding import Affine, FoldError, Reason, fold_conv, fold_linear
from pybn.folding.affine import round_to


def statistics(rng, channels, dtype=np.float64):
    return (
        rng.normal(size=channels).astype(dtype),
        rng.uniform(0.1, 3, channels).astype(dtype),
        rng.normal(size=channels).astype(dtype),
        rng.normal(size=channels).astype(dtype),
    )


def as_torch(*arrays):
    return [None if a is None else torch.from_numpy(a.copy()) for a in arrays]


@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_fold_conv_runs_as_torch_does(seed, dims, groups, transposed, has_bias, has_w, has_b):
    rng = np.random.default_rng(seed)
    inputs, outputs = groups * int(rng.integers(1, 4)), groups * int(rng.integers(1, 4))
    kernel = tuple(rng.integers(1, 4, dims))
    shape = (inputs, outputs // groups) if transposed else (outputs, inputs // groups)
    weight = rng.normal(size=shape + kernel)
    bias = rng.normal(size=outputs) if has_bias else None
    mean, var, gamma, beta = statistics(rng, outputs)
    gamma, beta = gamma if has_w else None, beta if has_b else None

    x = torch.from_numpy(rng.normal(size=(2, inputs, *([5] * dims))))
    name = f"conv_transpose{dims}d" if transposed else f"conv{dims}d"
    convolve = getattr(torch.nn.functional, name)
    expected = torch.nn.functional.batch_norm(
        convolve(x, *as_torch(weight, bias), groups=groups),
        *as_torch(mean, var, gamma, beta),
        eps=1e-3,
    )
    folded = fold_conv(weight, bias, mean, var, gamma, beta, 1e-3, transposed=transposed, groups=groups)
    actual = convolve(x, *as_torch(*folded), groups=groups)
    np.testing.assert_allclose(actual.numpy(), expected.numpy(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("transposed", [False, True])
def test_fold_conv_equals_torch_fusion(transposed):
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(6, 6, 3, 3)), rng.normal(size=6)
    mean, var, gamma, beta = statistics(rng, 6)
    w, b, m, v, g, h = as_torch(weight, bias, mean, var, gamma, beta)
    expected = fuse_conv_bn_weights(w, b, m, v, 1e-5, g, h, transpose=transposed)
    actual = fold_conv(weight, bias, mean, var, gamma, beta, transposed=transposed)
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-12, atol=1e-14)


def test_fold_linear_equals_torch_fusion():
    rng = np.random.default_rng(1)
    weight, bias = rng.normal(size=(5, 7)), rng.normal(size=5)
    mean, var, gamma, beta = statistics(rng, 5)
    w, b, m, v, g, h = as_torch(weight, bias, mean, var, gamma, beta)
    expected = fuse_linear_bn_weights(w, b, m, v, 1e-5, g, h)
    actual = fold_linear(weight, bias, mean, var, gamma, beta)
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_result_has_the_type_of_weight_and_is_rounded_once(dtype):
    rng = np.random.default_rng(2)
    weight, bias = rng.normal(size=(4, 3)).astype(dtype), rng.normal(size=4).astype(dtype)
    mean, var, gamma, beta = statistics(rng, 4, np.float32)
    folded_weight, folded_bias = fold_linear(weight, bias, mean, var, gamma, beta)
    assert folded_weight.dtype == folded_bias.dtype == np.dtype(dtype)
    scale = gamma.astype(float) / np.sqrt(var.astype(float) + 1e-5)
    exact = weight.astype(float) * scale[:, None]
    unit = float(ml_dtypes.finfo(dtype).eps) / 2
    assert np.all(np.abs(folded_weight.astype(float) - exact) <= np.abs(exact) * unit * (1 + 1e-9))


def test_inputs_are_untouched_and_results_new():
    rng = np.random.default_rng(3)
    arrays = [rng.normal(size=(2, 2, 1)), np.zeros(2), np.zeros(2), np.ones(2), np.ones(2)]
    copies = [array.copy() for array in arrays]
    for array in arrays:
        array.flags.writeable = False
    weight, bias = fold_conv(*arrays, np.zeros(2))
    assert weight.flags.writeable
    assert bias.flags.writeable
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(array, copy)
        assert not np.shares_memory(array, weight)


def call(**changes):
    arguments = {
        "weight": np.ones((4, 2, 3)),
        "bias": np.zeros(4),
        "running_mean": np.zeros(4),
        "running_var": np.ones(4),
        "bn_weight": np.ones(4),
        "bn_bias": np.zeros(4),
        **changes,
    }
    return fold_conv(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"running_mean": np.zeros(3)}, ValueError, r"running_mean has shape \(3,\), expected \(4"),
        ({"running_var": np.ones((4, 1))}, ValueError, r"running_var has shape \(4, 1\), expected"),
        ({"bn_weight": np.ones(1)}, ValueError, r"bn_weight has shape \(1,\), expected \(4,\)"),
        ({"bn_bias": np.ones(5)}, ValueError, r"bn_bias has shape \(5,\), expected \(4,\)"),
        ({"bias": np.float64(0)}, ValueError, r"bias has shape \(\), expected \(4,\)"),
        ({"weight": np.ones(4)}, ValueError, "weight has 1 axes, expected at least 2"),
        ({"weight": np.ones((4, 2), dtype=int)}, TypeError, "weight has dtype int64, expected"),
        ({"weight": np.ma.ones((4, 2))}, TypeError, "weight is a masked array"),
        ({"running_var": np.ones(4, dtype=complex)}, TypeError, "running_var has dtype complex128"),
        ({"eps": 0.0}, ValueError, "eps is 0.0, expected a finite number > 0"),
        ({"eps": float("nan")}, ValueError, "eps is nan"),
        ({"eps": "1e-5"}, ValueError, "eps is '1e-5', expected a finite number > 0"),
        ({"groups": 3}, ValueError, "groups is 3, expected a positive divisor of the 4 output"),
        ({"groups": 3, "transposed": True}, ValueError, "divisor of the 4 input channels"),
        ({"groups": 0}, ValueError, "groups is 0"),
        ({"groups": 1.0}, TypeError, "groups is float, expected an int"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


def test_fold_linear_wants_a_matrix():
    with pytest.raises(ValueError, match="weight has 3 axes, expected 2"):
        fold_linear(np.ones((2, 2, 2)), None, np.zeros(2), np.ones(2), None, None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"running_var": np.array([1.0, 1.0, -1.0, 1.0])}, Reason.INVALID_VARIANCE),
        ({"running_var": np.full(4, -1e-5)}, Reason.INVALID_VARIANCE),
        ({"running_var": np.full(4, np.nan)}, Reason.NOT_FINITE),
        ({"running_var": np.full(4, np.inf)}, Reason.NOT_FINITE),
        ({"bn_weight": np.full(4, np.inf)}, Reason.NOT_FINITE),
        ({"running_mean": np.full(4, np.nan)}, Reason.NOT_FINITE),
        ({"bias": np.full(4, np.inf)}, Reason.NOT_FINITE),
        ({"weight": np.full((4, 2), np.nan)}, Reason.NOT_FINITE),
        (
            {"weight": np.full((4, 2), 6e4, dtype=np.float16), "bn_weight": np.full(4, 2.0)},
            Reason.OUTSIDE_DTYPE,
        ),
        (
            {"weight": np.ones((4, 2), dtype=np.float16), "bn_bias": np.full(4, 1e6)},
            Reason.OUTSIDE_DTYPE,
        ),
        ({"weight": np.full((4, 2), 1e300), "bn_weight": np.full(4, 1e300)}, Reason.NOT_FINITE),
    ],
)
def test_what_cannot_be_exact_is_refused(changes, reason):
    with pytest.raises(FoldError) as caught:
        call(**changes)
    assert caught.value.reason is reason
    assert isinstance(caught.value, ValueError)


def test_signalling_nan_is_a_refusal_without_a_warning():
    signalling = np.full(4, 0x7FA00000, dtype=np.uint32).view(np.float32)
    with pytest.raises(FoldError, match="contains NaN"):
        call(bn_bias=signalling)
    with pytest.raises(FoldError, match="contains NaN"):
        call(weight=np.stack([signalling, signalling], axis=1), groups=2)


def test_variance_message_names_channel_and_value():
    with pytest.raises(FoldError, match=r"running_var \+ eps is -0\.9.* in channel 2"):
        call(running_var=np.array([1.0, 1.0, -1.0, 1.0]))


def test_affine_of_absent_parameters():
    affine = Affine.from_batch_norm(np.array([2.0]), np.array([3.0]), None, None, 1.0)
    assert affine.scale.tolist() == [0.5]
    assert affine.shift.tolist() == [-1.0]
    assert affine.only_scale().shift.tolist() == [0.0]


@given(st.integers(0, 2**62), st.booleans())
def test_bfloat16_is_rounded_once(bits, near_tie):
    mantissa = bits & (2**52 - 1)
    if near_tie:  # a bfloat16 tie, moved by less than float32 can see
        mantissa = (mantissa >> 45 << 45) | (1 << 44) | (mantissa & 1)
    number = float(np.uint64((1023 << 52) | mantissa).view(np.float64))
    ulp = 2.0**-7
    lower = np.floor(number / ulp) * ulp
    remainder = number - lower
    up = remainder > ulp / 2 or (remainder == ulp / 2 and (lower / ulp) % 2)
    expected = lower + ulp if up else lower
    rounded = round_to(np.array([number, -number]), np.dtype(ml_dtypes.bfloat16), "it")
    assert rounded.astype(float).tolist() == [expected, -expected]
