"""PyTorch as the oracle: its function and autograd, its own sample inputs, its layers and their state."""

import copy
import inspect
import itertools
import warnings

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional
from conftest import BFLOAT16, assert_same_bits, data_dtypes, images, parameters

import pybn

TOLERANCE = {  # torch's own
    np.float32: {"rtol": 1.3e-6, "atol": 1e-5},
    np.float64: {"rtol": 1e-7, "atol": 1e-7},
    np.float16: {"rtol": 1e-3, "atol": 1e-5},
    BFLOAT16: {"rtol": 1.6e-2, "atol": 1e-5},
}
LAYERS = {
    "1d, two axes": (pybn.BatchNorm1d, torch.nn.BatchNorm1d, (16, 5)),
    "1d, three axes": (pybn.BatchNorm1d, torch.nn.BatchNorm1d, (6, 5, 7)),
    "2d": (pybn.BatchNorm2d, torch.nn.BatchNorm2d, (4, 5, 6, 7)),
    "3d": (pybn.BatchNorm3d, torch.nn.BatchNorm3d, (3, 5, 4, 3, 5)),
}


def tensor(array, requires_grad=False):
    """A copy; its strides are those of the array."""
    if array is None:
        return None
    array = array.copy(order="K")
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).requires_grad_(requires_grad)
    return torch.from_numpy(array).requires_grad_(requires_grad)


def numpy_of(tensor):
    """The array in the memory of a tensor."""
    tensor = tensor.detach()
    return tensor.view(torch.int16).numpy().view(BFLOAT16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def assert_like_torch(ours, theirs, what=""):
    theirs = numpy_of(theirs)
    assert ours.dtype == theirs.dtype, what
    assert ours.shape == theirs.shape, what
    np.testing.assert_allclose(
        ours.astype(np.float64), theirs.astype(np.float64), **TOLERANCE[ours.dtype.type], err_msg=str(what)
    )


ACTIVATIONS = {
    None: lambda z, slope: z,
    "relu": lambda z, slope: torch.relu(z),
    "relu6": lambda z, slope: torch.nn.functional.relu6(z),
    "leaky_relu": torch.nn.functional.leaky_relu,
    "silu": lambda z, slope: torch.nn.functional.silu(z),
    "hardswish": lambda z, slope: torch.nn.functional.hardswish(z),
}

# Kinks, their neighbours, zeros of both signs, and what exp cannot represent.
SPECIAL_VALUES = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 1, -1, 20, -20, 88, -88, 89, -89, 104, -104, 709, -709, 750]
    + [-750, 1e30, -1e30, 3e38, -3e38]
    + [
        f(k)
        for k in (3.0, -3.0, 6.0, -6.0)
        for f in (float, lambda k: np.nextafter(k, 9), lambda k: np.nextafter(k, -9))
    ]
)


# ---- the reference itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negative_slope", [0.01, 0.0, -0.5, 1.0, 3.0])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_the_activations_of_the_reference_and_their_derivatives_are_those_of_torch(rng, activation, negative_slope):
    z = np.concatenate([SPECIAL_VALUES, rng.uniform(-10, 10, 999)])
    tz = tensor(z, requires_grad=True)
    ty = ACTIVATIONS[activation](tz, negative_slope)
    (gradient,) = torch.autograd.grad(ty.sum(), tz)
    np.testing.assert_allclose(reference.activate(z, activation, negative_slope), ty.detach(), rtol=1e-14)
    np.testing.assert_allclose(reference.derivative(z, activation, negative_slope), gradient, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_the_reference_of_a_whole_step_is_torch(rng, activation, channel_axis, training):
    x, residual = (images(rng, (4, 5, 6, 7), np.float64, channel_axis) for _ in range(2))
    dy = rng.standard_normal(x.shape)
    weight, bias, mean, var = parameters(rng, 5, np.float64)
    tx, tr, tw, tb = (tensor(a, requires_grad=True) for a in (x, residual, weight, bias))
    tz = torch.nn.functional.batch_norm(tx.movedim(channel_axis, 1), tensor(mean), tensor(var), tw, tb, training)
    ty = ACTIVATIONS[activation](tz.movedim(1, channel_axis) + tr, 0.2)
    ty.backward(tensor(dy))

    used = reference.stats(x, channel_axis) if training else (mean, var)
    options = {"channel_axis": channel_axis, "residual": residual, "negative_slope": 0.2}
    y = reference.normalize(x, *used, weight, bias, activation=activation, **options)
    np.testing.assert_allclose(y, ty.detach(), rtol=1e-12, atol=1e-13)
    active = reference.derivative(reference.normalize(x, *used, weight, bias, **options), activation, 0.2)
    got = reference.backward(dy, x, *used, weight, training=training, channel_axis=channel_axis, active=active)
    np.testing.assert_allclose(got.dx, tx.grad, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(got.dweight, tw.grad, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got.dbias, tb.grad, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(dy * active, tr.grad, rtol=1e-12, atol=1e-13)


# ---- functions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("shape", [(16, 5), (6, 5, 7), (4, 5, 6, 7), (3, 5, 4, 3, 5), (8, 40, 7, 7)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_forward_running_statistics_and_gradients_are_those_of_torch(rng, dtype, shape, channel_axis, training):
    channels = shape[1]
    x = images(rng, shape, dtype, channel_axis)
    dy = rng.standard_normal(x.shape).astype(dtype)
    for with_weight, with_bias, activation in itertools.product([True, False], [True, False], [None, "relu"]):
        what = (with_weight, with_bias, activation)
        weight, bias, mean, var = parameters(rng, channels, dtype)
        weight, bias = weight if with_weight else None, bias if with_bias else None
        tx, tw, tb = (tensor(a, requires_grad=True) for a in (x, weight, bias))
        tmean, tvar = tensor(mean), tensor(var)
        ty = torch.nn.functional.batch_norm(tx.movedim(channel_axis, 1), tmean, tvar, tw, tb, training)
        ty = (ty if activation is None else torch.relu(ty)).movedim(1, channel_axis)
        ty.backward(tensor(dy))

        y, saved = pybn.batch_norm_forward(
            x, weight, bias, mean, var, training=training, activation=activation, channel_axis=channel_axis
        )
        gradients = pybn.batch_norm_backward(dy, saved)
        assert_like_torch(y, ty, what)
        assert_like_torch(mean, tmean, what)
        assert_like_torch(var, tvar, what)
        assert_like_torch(gradients.dx, tx.grad, what)
        for ours, theirs in zip(gradients[1:3], (tw, tb), strict=True):
            assert (ours is None) == (theirs is None), what
            if theirs is not None:  # torch adds up in float32: its error grows with the count
                count = ours.dtype.type(x.size // channels)
                assert_like_torch(ours / count, theirs.grad / count, what)


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@data_dtypes
def test_fusions_are_the_composition_of_torch(rng, dtype, activation, memory_format, training, with_residual):
    """On the memory of torch's own tensors, channels last too. Half data: composed in float32 and rounded at the end,
    since torch rounds after every step.
    """
    shape = (4, 24, 6, 7)
    x, residual, dy = (tensor(images(rng, shape, dtype)).to(memory_format=memory_format) for _ in range(3))
    weight, bias, mean, var = parameters(rng, 24, dtype)
    wide = x.dtype if dtype in (np.float32, np.float64) else torch.float32
    tx, tr = (t.to(wide).requires_grad_() for t in (x, residual))
    tw, tb = tensor(weight, requires_grad=True), tensor(bias, requires_grad=True)
    tmean, tvar = tensor(mean), tensor(var)
    tz = torch.nn.functional.batch_norm(tx, tmean, tvar, tw, tb, training)
    ty = ACTIVATIONS[activation](tz + tr if with_residual else tz, 0.2)
    ty.backward(dy.to(wide))

    y, saved = pybn.batch_norm_forward(
        numpy_of(x), weight, bias, mean, var, training=training, activation=activation, negative_slope=0.2,
        residual=numpy_of(residual) if with_residual else None,
    )  # fmt: skip
    got = pybn.batch_norm_backward(numpy_of(dy), saved)
    assert_like_torch(y, ty.to(x.dtype))
    assert_like_torch(mean, tmean)
    assert_like_torch(var, tvar)
    assert_like_torch(got.dx, tx.grad.to(x.dtype))
    for ours, theirs in zip(got[1:3], (tw, tb), strict=True):
        assert_like_torch(ours / ours.dtype.type(168), theirs.grad / 168)
    if with_residual:
        assert_like_torch(got.dresidual, tr.grad.to(x.dtype))


@pytest.fixture(scope="module")
def torch_samples():
    """torch.testing's inputs for nn.functional.batch_norm, as (input, args, kwargs)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    (op,) = (op for op in op_db if op.name == "nn.functional.batch_norm" and not op.variant_test_name)

    def samples(dtype):
        return [(s.input, s.args, s.kwargs) for s in op.sample_inputs("cpu", dtype, requires_grad=True)]

    return samples


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sample_inputs_of_torch_testing_give_the_same_results(torch_samples, dtype):
    compared, refused = 0, []
    for x, (mean, var, weight, bias), options in torch_samples(dtype):
        arrays = [None if t is None else t.detach().numpy().copy() for t in (x, mean, var, weight, bias)]
        try:
            y, saved = pybn.batch_norm_forward(arrays[0], *arrays[3:], *arrays[1:3], **{"training": False, **options})
        except ValueError as error:
            refused.append(str(error))
            continue
        ty = torch.nn.functional.batch_norm(x, mean, var, weight, bias, **options)
        assert_like_torch(y, ty)
        for ours, theirs in zip(arrays[1:3], (mean, var), strict=True):
            assert ours is None or np.allclose(ours, theirs.detach().numpy(), **TOLERANCE[ours.dtype.type])
        dy = torch.linspace(-1, 1, ty.numel(), dtype=dtype).reshape(ty.shape)
        wanted = [t for t in (x, weight, bias) if t is not None]
        gradients = [g for g in pybn.batch_norm_backward(dy.numpy(), saved) if g is not None]
        for ours, theirs in zip(gradients, torch.autograd.grad(ty, wanted, dy), strict=True):
            assert_like_torch(ours, theirs)
        compared += 1
    assert compared >= 6
    # What torch's samples contain and pybn refuses, on purpose: empty one-axis input, momentum below zero.
    assert all("momentum is -" in text or "x has shape (0,), expected at least 2 axes" in text for text in refused)
    assert len(refused) == 5


def torch_state(state):
    return {name: torch.from_numpy(np.array(value)) for name, value in state.items()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
@data_dtypes
def test_layers_are_those_of_torch_for_data_of_every_type(rng, dtype, kind, channels_last, training):
    """Of half data with float32 parameters, which torch calls mixed. Its tensors are read where they lie."""
    ours_type, theirs_type, shape = LAYERS[kind]
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape)) if channels_last else None
    memory_format = memory_format or torch.contiguous_format
    parameter_dtype = np.float64 if dtype == np.float64 else np.float32
    ours, theirs = ours_type(5, dtype=parameter_dtype), theirs_type(5, dtype=tensor(np.ones(1, parameter_dtype)).dtype)
    state = dict(zip(("weight", "bias", "running_mean", "running_var"), parameters(rng, 5, dtype), strict=True))
    ours.load_state_dict({**state, "num_batches_tracked": np.array(0)})
    theirs.load_state_dict(torch_state(ours.state_dict()))
    ours.train(training)
    theirs.train(training)

    tx, dy = (tensor(images(rng, shape, dtype)).to(memory_format=memory_format) for _ in range(2))
    x = numpy_of(tx)
    tx.requires_grad_()
    ty = theirs(tx)
    ty.backward(dy)
    y = ours(x)
    assert_like_torch(y, ty)
    dx = ours.backward(numpy_of(dy))
    for name, value in theirs.state_dict().items():
        if name != "num_batches_tracked":
            assert_like_torch(getattr(ours, name), value, name)
    count = x.size // 5
    assert_like_torch(ours.weight_grad / count, theirs.weight.grad / count)
    assert_like_torch(ours.bias_grad / count, theirs.bias.grad / count)
    assert_like_torch(dx, tx.grad)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_state_travels_to_torch_and_back(rng, kind, options):
    ours_type, theirs_type, shape = LAYERS[kind]
    ours, theirs = ours_type(5, **options), theirs_type(5, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert_same_bits(ours.state_dict()[name], value.numpy(), name)

    for _ in range(3):
        ours(images(rng, shape))
    if ours.affine:
        ours.weight[...], ours.bias[...] = parameters(rng, 5)[:2]
    theirs.load_state_dict(torch_state(ours.state_dict()))
    x = images(rng, shape)
    assert_like_torch(ours.eval()(x), theirs.eval()(torch.from_numpy(x)))

    theirs.train()
    theirs(torch.from_numpy(images(rng, shape)))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.uniform_(0.5, 2)
    ours.load_state_dict(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert_same_bits(ours.state_dict()[name], value.numpy(), name)
    assert_like_torch(ours(x), theirs.eval()(torch.from_numpy(x)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"momentum": 0.3, "eps": 0.01},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False, "momentum": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_course_of_training_and_evaluation_is_that_of_torch(rng, kind, options):
    ours_type, theirs_type, shape = LAYERS[kind]
    ours, theirs = ours_type(5, **options), theirs_type(5, **options)
    for step in range(8):
        x = images(rng, shape)
        dy = rng.standard_normal(shape).astype(np.float32)
        mode = step not in (3, 6)
        ours.train(mode)
        theirs.train(mode)
        tx = tensor(x, requires_grad=True)
        ty = theirs(tx)
        assert_like_torch(ours(x), ty, step)
        ty.backward(tensor(dy))
        assert_like_torch(ours.backward(dy), tx.grad, step)
        for name, value in theirs.state_dict().items():
            got = ours.state_dict()[name]
            if name == "num_batches_tracked":
                assert_same_bits(got, value.numpy(), step)
            else:
                assert_like_torch(got, value, (step, name))
        if ours.affine:
            assert_like_torch(ours.weight_grad, theirs.weight.grad, step)
            assert_like_torch(ours.bias_grad, theirs.bias.grad, step)


def test_an_empty_batch_does_to_a_layer_what_it_does_in_torch():
    ours, theirs = pybn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    assert_like_torch(ours(np.zeros((0, 3, 2, 2), np.float32)), theirs(torch.zeros(0, 3, 2, 2)))
    for name, value in theirs.state_dict().items():
        assert_same_bits(ours.state_dict()[name], value.numpy(), name)


def test_parameters_in_another_memory_order_arrive_in_order():
    """A torch state may hold views; values count, not strides."""
    state = torch.nn.BatchNorm1d(3).state_dict()
    state["weight"] = torch.arange(6.0)[::2]
    layer = pybn.BatchNorm1d(3)
    layer.load_state_dict(copy.copy(state))
    assert_same_bits(layer.weight, np.array([0, 2, 4], np.float32))


def test_signatures_begin_as_those_of_torch():
    def parameters_of(function, first):
        return [(p.name, p.default) for p in list(inspect.signature(function).parameters.values())[first:]]

    theirs = parameters_of(torch.nn.functional.batch_norm, 1)
    assert parameters_of(pybn.batch_norm, 1)[: len(theirs)] == theirs
    for ours_type, theirs_type, _ in LAYERS.values():
        assert parameters_of(ours_type, 0)[:5] == parameters_of(theirs_type, 0)[:5]
