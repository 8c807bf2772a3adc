"""`pybn.torch.batch_norm` against torch's own operations in float64, values and derivatives."""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.testing._internal.common_methods_invocations import op_db

from pybn.torch import batch_norm

ACTIVATIONS = {
    None: lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.2),
    "silu": F.silu,
    "hardswish": F.hardswish,
}
SHAPES = {"NC": (12, 5), "NCL": (4, 3, 11), "NCHW": (3, 5, 4, 6), "NCDHW": (2, 3, 2, 3, 4), "7x7": (6, 40, 7, 7)}
# What torch itself holds its operators to; half types are compared with float64 results, so a rounding of the result.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}  # fmt: skip

activations = pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def composite(x, mean, var, weight, bias, training, activation=None, residual=None, momentum=0.1, eps=1e-5):
    y = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    return ACTIVATIONS[activation](y if residual is None else y + residual)


def arguments(shape, dtype=torch.float32, seed=0, affine=True, residual=True, parameter_dtype=None):
    """x, mean, var, weight, bias, residual; float32 parameters for half types unless another is asked for."""
    torch.manual_seed(seed)
    if parameter_dtype is None:
        parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    along = (1, -1) + (1,) * (len(shape) - 2)
    channels = shape[1]
    spread, centre = torch.rand(channels) + 0.5, 3 * torch.randn(channels)
    x = (torch.randn(shape) * spread.view(along) + centre.view(along)).to(dtype)
    mean, var, weight, bias = (
        torch.randn(channels), torch.rand(channels) + 0.5, torch.rand(channels) + 0.5, torch.randn(channels),
    )  # fmt: skip
    mean, var, weight, bias = (t.to(parameter_dtype) for t in (mean + centre, var, weight, bias))
    return (
        x, mean, var, weight if affine else None, bias if affine else None,
        torch.randn(shape).to(dtype) if residual else None,
    )  # fmt: skip


def doubled(tensors):
    return [None if t is None else t.detach().double() for t in tensors]


def require_grad(*tensors):
    for t in tensors:
        if t is not None:
            t.requires_grad_()


def away_from_kinks(dy, z, activation):
    """The gradient with zeros where rounding decides which derivative is right."""
    kinks = {"relu": (0,), "relu6": (0, 6), "leaky_relu": (0,), "hardswish": (-3, 3)}.get(activation, ())
    margin = 1e-3
    near = torch.zeros_like(z, dtype=torch.bool)
    for kink in kinks:
        near |= (z - kink).abs() < margin
    return dy.masked_fill(near, 0)


def check(args, activation, training, momentum=0.1, eps=1e-5):
    """Forward, backward and running statistics of pybn against torch in float64."""
    x, mean, var, weight, bias, residual = args
    rtol, atol = TOLERANCES[x.dtype]
    ours = [x, weight, bias, residual]
    theirs = doubled(ours)
    expected_statistics = doubled([mean, var])
    require_grad(*ours, *theirs)
    options = {"activation": activation, "negative_slope": 0.2, "residual": residual}

    y = batch_norm(x, mean, var, weight, bias, training, momentum, eps, **options)
    x64, weight64, bias64, residual64 = theirs
    with torch.no_grad():
        z = composite(
            x64, *[None if s is None else s.clone() for s in expected_statistics], weight64, bias64, training, None,
            residual64,
        )  # fmt: skip
    expected = composite(
        x64, *expected_statistics, weight64, bias64, training, activation, residual64, momentum, eps
    )  # fmt: skip

    assert y.dtype == x.dtype
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=atol)
    for got, wanted in zip((mean, var), expected_statistics, strict=True):
        if got is not None:
            torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    dy = away_from_kinks(torch.randn_like(expected), z, activation).to(x.dtype)
    y.backward(dy)
    expected.backward(dy.double())
    for got, wanted, name in zip(ours, theirs, ("x", "weight", "bias", "residual"), strict=True):
        if got is not None:
            assert got.grad.dtype == got.dtype
            scale = wanted.grad.abs().max().clamp(min=1)
            torch.testing.assert_close(
                got.grad.double() / scale, wanted.grad / scale, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )
    return y


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@dtypes
@pytest.mark.parametrize("training", [True, False])
def test_equals_torch_in_float64(shape, dtype, training):
    check(arguments(shape, dtype, residual=False), None, training)


@activations
@dtypes
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_activation_and_residual_equal_torch_in_float64(activation, dtype, training, residual):
    for shape in (SHAPES["NCHW"], SHAPES["7x7"]):
        check(arguments(shape, dtype, residual=residual), activation, training)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_last_equals_torch_in_float64(activation, dtype):
    for shape, memory_format in (((3, 5, 4, 6), torch.channels_last), ((2, 3, 2, 3, 4), torch.channels_last_3d)):
        for training, residual in itertools.product((True, False), (True, False)):
            x, *parameters, summand = arguments(shape, dtype, residual=residual)
            x = x.contiguous(memory_format=memory_format)
            summand = None if summand is None else summand.contiguous(memory_format=memory_format)
            y = check((x, *parameters, summand), activation, training)
            assert y.is_contiguous(memory_format=memory_format)
            assert x.grad.is_contiguous(memory_format=memory_format)


def test_gradients_are_right_for_any_strides_of_the_gradient():
    for make in (
        lambda dy: dy,
        lambda dy: dy[:1, :1, :1, :1].expand_as(dy),
        lambda dy: dy.transpose(2, 3).contiguous().transpose(2, 3),
        lambda dy: dy.contiguous(memory_format=torch.channels_last),
        lambda dy: torch.stack([dy, dy], 4)[..., 0],
    ):
        x, mean, var, weight, bias, residual = arguments((3, 5, 4, 4))
        require_grad(x, weight, bias, residual)
        dy = make(torch.randn(3, 5, 4, 4))
        inputs = (x, weight, bias, residual)
        y = batch_norm(x, mean.clone(), var.clone(), weight, bias, True, activation="relu", residual=residual)
        expected = composite(x, mean, var, weight, bias, True, "relu", residual)
        for got, wanted in zip(
            torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


STRIDED = {
    "a slice of the batch": lambda x: torch.cat([x, x])[::2],
    "a slice of the channels": lambda x: torch.cat([x, x], 1)[:, : x.size(1)],
    "every other column": lambda x: torch.stack([x, x], x.dim())[..., 0],
    "the last two axes swapped": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "batch and channels swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda x: x[:1].expand_as(x),
    "a slice of the channels, channels last": lambda x: (
        torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : x.size(1)] if x.dim() == 4 else x
    ),
    "an offset": lambda x: torch.cat([x.flatten(), x.flatten()])[3 : 3 + x.numel()].view(x.shape),
    "a parameter": lambda x: torch.nn.Parameter(x),
}


def strides_that_matter(x):
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED)
def test_strided_inputs_equal_contiguous_ones_and_results_have_torchs_strides(make):
    for shape in ((4, 6, 3, 5), (4, 6, 5), (4, 6), (4, 1, 3, 5), (4, 6, 1, 1)):
        x, mean, var, weight, bias, residual = arguments(shape)
        x, residual = make(x).detach().requires_grad_(), make(residual).detach()
        for training in (True, False):
            y = batch_norm(x, mean.clone(), var.clone(), weight, bias, training, activation="relu", residual=residual)
            expected = composite(x, mean.clone(), var.clone(), weight, bias, training)
            assert strides_that_matter(y) == strides_that_matter(expected), (shape, training)
            torch.testing.assert_close(y, F.relu(expected + residual), rtol=1e-5, atol=1e-5)
            dy = torch.randn_like(y)
            (got,) = torch.autograd.grad(y, x, dy)
            (wanted,) = torch.autograd.grad(F.relu(expected + residual), x, dy)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@activations
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_gradcheck_and_gradgradcheck(activation, affine, training, residual):
    for shape in ((3, 2, 2, 2), (4, 3)):
        x, mean, var, weight, bias, summand = arguments(
            shape, torch.float64, affine=affine, residual=residual, seed=len(shape)
        )
        with torch.no_grad():  # no value beside a kink, where finite differences tell nothing
            z = composite(x, mean.clone(), var.clone(), weight, bias, training, None, summand)
            assert all((z - kink).abs().min() > 1e-4 for kink in (-3, 0, 3, 6))
        require_grad(x, weight, bias, summand)
        inputs = tuple(t for t in (x, weight, bias, summand) if t is not None)

        def function(*tensors, mean=mean, var=var):
            given = iter(tensors)
            x = next(given)
            w, b = (next(given), next(given)) if affine else (None, None)
            r = next(given) if residual else None
            return batch_norm(
                x, mean.clone(), var.clone(), w, b, training, activation=activation, negative_slope=0.2, residual=r
            )

        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
        y = function(*inputs)
        dy = torch.randn_like(y)
        torch.testing.assert_close(
            torch.autograd.grad(y, inputs, dy, create_graph=True), torch.autograd.grad(function(*inputs), inputs, dy)
        )


def test_double_backward_of_mixed_types_equals_torchs():
    for dtype, training in itertools.product((torch.float32, torch.bfloat16), (True, False)):
        x, mean, var, weight, bias, _ = arguments((3, 5, 4, 6), dtype, residual=False)
        given = [x, mean, var, weight, bias]
        second = []
        for function, tensors in ((batch_norm, given), (composite, doubled(given))):
            differentiated = [tensors[0], *tensors[3:]]
            require_grad(*differentiated)
            y = function(*tensors, training, activation="silu")
            (dx,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
            second.append(torch.autograd.grad(dx.square().sum(), differentiated))
        for got, wanted in zip(*second, strict=True):
            scale = wanted.abs().max()
            tolerance = 1e-4 if dtype == torch.float32 else 4e-2
            torch.testing.assert_close(got.double() / scale, wanted / scale, rtol=tolerance, atol=tolerance)


def test_torchs_own_samples_give_torchs_own_results():
    (info,) = [op for op in op_db if op.name == "nn.functional.batch_norm" and not op.variant_test_name]
    count = 0
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
            x, (mean, var, *parameters) = sample.input, sample.args
            copies = [None if s is None else s.clone() for s in (mean, var)]
            y = batch_norm(x, mean, var, *parameters, **sample.kwargs)
            expected = F.batch_norm(x, *copies, *parameters, **sample.kwargs)
            # torch rounds bfloat16 on the way, too
            tolerance = {"rtol": 1.6e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
            torch.testing.assert_close(y, expected, **tolerance)
            for got, wanted in zip((mean, var), copies, strict=True):
                if got is not None:
                    torch.testing.assert_close(got, wanted, **tolerance)
            (got,) = torch.autograd.grad(y, x, torch.ones_like(y))
            (wanted,) = torch.autograd.grad(expected, x, torch.ones_like(y))
            torch.testing.assert_close(got, wanted, **tolerance)
            count += 1
    assert count > 20


def test_a_half_models_parameters_and_statistics_stay_half():
    for dtype in (torch.bfloat16, torch.float16):
        args = arguments((3, 5, 4, 6), dtype, parameter_dtype=dtype)
        _, mean, var, weight, bias, _ = args
        x64, mean64, var64, weight64, bias64, _ = doubled(args)
        before = mean.clone()
        y = batch_norm(args[0], mean, var, weight.requires_grad_(), bias, True)
        expected = F.batch_norm(x64, mean64, var64, weight64.requires_grad_(), bias64, True)
        rtol, atol = TOLERANCES[dtype]
        assert mean.dtype == dtype
        assert not torch.equal(mean, before)
        torch.testing.assert_close(mean.double(), mean64, rtol=rtol, atol=atol)
        torch.testing.assert_close(var.double(), var64, rtol=rtol, atol=atol)
        torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=2 * atol)
        dy = torch.randn_like(y)
        y.backward(dy)
        expected.backward(dy.double())
        assert weight.grad.dtype == dtype
        torch.testing.assert_close(weight.grad.double(), weight64.grad, rtol=rtol, atol=20 * atol)


def test_autocast_computes_in_the_type_that_torchs_own_does():
    x, mean, var, weight, bias, _ = arguments((3, 5, 4, 6))
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = batch_norm(given, mean, var, weight, bias, False, activation="relu")
            expected = F.relu(F.batch_norm(given, mean, var, weight, bias, False))
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected)


def test_a_residual_of_another_type_is_promoted_as_torch_does():
    x, mean, var, weight, bias, residual = arguments((3, 5, 4, 6))
    y = batch_norm(x.bfloat16(), mean, var, weight, bias, activation="relu", residual=residual)
    expected = F.relu(F.batch_norm(x.bfloat16(), mean, var, weight, bias) + residual)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


def test_an_empty_batch_leaves_the_statistics_alone_and_has_gradients_of_zero():
    for shape in ((0, 5, 4, 6), (3, 5, 0, 6), (0, 5)):
        x = torch.randn(shape).requires_grad_()
        mean, var, weight = torch.randn(5), torch.rand(5), torch.rand(5).requires_grad_()
        before = mean.clone(), var.clone()
        y = batch_norm(x, mean, var, weight, None, True, activation="relu")
        y.sum().backward()
        assert y.shape == x.grad.shape == shape
        assert torch.equal(mean, before[0])
        assert torch.equal(var, before[1])
        assert torch.equal(weight.grad, torch.zeros(5))


def test_errors_come_before_anything_changes():
    x, mean, var, weight, bias, residual = arguments((4, 5, 3, 3))
    before = mean.clone(), var.clone()
    one = torch.randn(1, 5, 1, 1)
    cases = [
        (ValueError, "more than 1 value per channel", lambda: batch_norm(one, mean, var, weight, bias, True)),
        (ValueError, "activation is 'gelu', expected one of None, 'relu'",
         lambda: batch_norm(x, mean, var, weight, bias, True, activation="gelu")),
        (ValueError, "activation is", lambda: batch_norm(x, mean, var, activation=["relu"])),
        (ValueError, r"residual has shape \(4, 5, 3\), expected \(4, 5, 3, 3\)",
         lambda: batch_norm(x, mean, var, weight, bias, True, residual=residual[..., 0])),
        (RuntimeError, "running_mean", lambda: batch_norm(x, mean[:3], var, weight, bias, True)),
        (RuntimeError, "weight", lambda: batch_norm(x, mean, var, weight[:3], bias, True)),
        (ValueError, "eps must be positive", lambda: batch_norm(x, mean, var, weight, bias, True, eps=0.0)),
        (RuntimeError, "running_mean", lambda: batch_norm(x, None, None)),
        (TypeError, "input is a tuple", lambda: batch_norm((x[:, :2], x[:, 2:]), mean, var, weight, bias, True)),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])
