"""The layers: construction, modes, counters, gradients, state; a failed call changes nothing."""

import copy
import pickle

import numpy as np
import pytest
import reference
from conftest import BFLOAT16, assert_close, assert_same_bits, data_dtypes, half_dtypes, images, parameters

import pybn

SHAPES = {pybn.BatchNorm1d: (6, 5, 7), pybn.BatchNorm2d: (4, 5, 6, 7), pybn.BatchNorm3d: (3, 5, 4, 3, 5)}
layer_types = pytest.mark.parametrize("layer_type", SHAPES)
STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def everything(layer):
    """A copy of all that a failed call must leave as it was."""
    return {name: copy.deepcopy(getattr(layer, name)) for name in (*STATE, "weight_grad", "bias_grad", "training")}


def assert_unchanged(layer, before):
    for name, value in everything(layer).items():
        if isinstance(value, np.ndarray):
            assert_same_bits(value, before[name], name)
        else:
            assert value is before[name], name


@layer_types
@pytest.mark.parametrize("dtype", [np.float32, np.float64, "float64"])
def test_a_new_layer_is_the_identity_up_to_its_input_s_statistics(layer_type, dtype):
    layer = layer_type(5, dtype=dtype)
    assert_same_bits(layer.weight, np.ones(5, dtype))
    assert_same_bits(layer.bias, np.zeros(5, dtype))
    assert_same_bits(layer.running_mean, np.zeros(5, dtype))
    assert_same_bits(layer.running_var, np.ones(5, dtype))
    assert_same_bits(layer.num_batches_tracked, np.array(0, np.int64))
    assert (layer.eps, layer.momentum, layer.training) == (1e-5, 0.1, True)
    assert layer.weight_grad is None
    assert layer.bias_grad is None


def test_a_layer_has_only_what_it_was_asked_to_have():
    layer = pybn.BatchNorm2d(3, affine=False, track_running_stats=False)
    assert all(getattr(layer, name) is None for name in STATE)
    assert layer.state_dict() == {}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_features": 0}, ValueError, "num_features is 0, expected at least 1"),
        ({"num_features": -3}, ValueError, "num_features is -3, expected at least 1"),
        ({"num_features": 3.0}, TypeError, r"num_features is 3\.0, expected an integer"),
        ({"num_features": True}, TypeError, "num_features is True, expected an integer"),
        ({"num_features": None}, TypeError, "num_features is None, expected an integer"),
        ({"eps": 0}, ValueError, "eps is 0, expected a finite number > 0"),
        ({"eps": np.nan}, ValueError, "eps is nan, expected a finite number > 0"),
        ({"momentum": 1.5}, ValueError, r"momentum is 1\.5, expected a number in \[0, 1\]"),
        ({"momentum": np.nan}, ValueError, "momentum is nan, expected a number"),
        ({"momentum": "0.1"}, ValueError, "momentum is '0.1', expected a number"),
        (
            {"activation": "gelu"},
            ValueError,
            "activation is 'gelu', expected one of None, 'relu', 'relu6', 'leaky_relu'",
        ),
        ({"negative_slope": np.nan}, ValueError, "negative_slope is nan, expected a finite number"),
        ({"negative_slope": -np.inf}, ValueError, "negative_slope is -inf, expected a finite number"),
        ({"negative_slope": "0.1"}, ValueError, r"negative_slope is '0\.1', expected a finite number"),
        ({"negative_slope": None}, ValueError, "negative_slope is None, expected a finite number"),
        ({"channel_axis": 2}, ValueError, "channel_axis is 2, expected 1 .* or -1"),
        ({"dtype": np.float16}, TypeError, "dtype is float16, expected float32 or float64"),
        ({"dtype": BFLOAT16}, TypeError, "dtype is bfloat16, expected float32 or float64"),
        ({"dtype": int}, TypeError, "dtype is int64, expected float32 or float64"),
        ({"dtype": ">f4"}, TypeError, "dtype is >f4, expected float32 or float64"),
    ],
    ids=str,
)
@layer_types
def test_bad_constructor_arguments_are_refused_by_name(layer_type, arguments, error, message):
    with pytest.raises(error, match="^" + message):
        layer_type(**{"num_features": 3, **arguments})


def test_num_features_may_be_a_numpy_integer():
    assert pybn.BatchNorm1d(np.int32(3)).num_features == 3


def test_repr_says_how_to_make_the_layer_again():
    assert repr(pybn.BatchNorm2d(3)) == (
        "BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)"
    )
    text = repr(pybn.BatchNorm1d(7, 0.5, None, False, False, activation="relu", channel_axis=-1))
    assert text == (
        "BatchNorm1d(7, eps=0.5, momentum=None, affine=False, track_running_stats=False, "
        "activation='relu', channel_axis=-1)"
    )
    assert repr(eval(text, vars(pybn))) == text


@pytest.mark.parametrize("negative_slope", [0.01, 0.25, -1, 0, np.float32(0.5)])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_repr_keeps_the_activation_and_its_slope(activation, negative_slope):
    layer = pybn.BatchNorm2d(3, activation=activation, negative_slope=negative_slope)
    twin = eval(repr(layer), vars(pybn))
    assert twin.activation == layer.activation == activation
    assert layer.negative_slope == negative_slope
    if activation == "leaky_relu":
        assert twin.negative_slope == negative_slope
        assert repr(twin) == repr(layer)


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@data_dtypes
def test_a_layer_computes_what_the_functions_do(rng, dtype, activation, channel_axis, training, with_residual):
    x, residual, dy = (images(rng, (4, 5, 6, 7), dtype, channel_axis) for _ in range(3))
    residual = residual if with_residual else None
    weight, bias, mean, var = parameters(rng, 5)
    options = {"activation": activation, "negative_slope": 0.2, "channel_axis": channel_axis}
    layer = pybn.BatchNorm2d(5, **options).train(training)
    layer.weight[...], layer.bias[...], layer.running_mean[...], layer.running_var[...] = weight, bias, mean, var
    y, saved = pybn.batch_norm_forward(x, weight, bias, mean, var, training=training, residual=residual, **options)
    expected = pybn.batch_norm_backward(dy, saved)
    assert_same_bits(layer(x, residual=residual), y)
    got = layer.backward(dy)
    if with_residual:
        dx, dresidual = got
        assert_same_bits(dresidual, expected.dresidual)
    else:
        dx = got
    assert_same_bits(dx, expected.dx)
    assert_same_bits(layer.weight_grad, expected.dweight)
    assert_same_bits(layer.bias_grad, expected.dbias)
    assert_same_bits(layer.running_mean, mean)
    assert_same_bits(layer.running_var, var)


@layer_types
@half_dtypes
def test_half_data_train_a_layer_of_float32(rng, layer_type, dtype):
    layer = layer_type(5, activation="silu")
    x = images(rng, SHAPES[layer_type], dtype)
    batch_mean, batch_var = reference.stats(x)
    assert_close(layer(x), reference.normalize(x, batch_mean, batch_var, activation="silu"), dtype)
    assert layer.backward(x).dtype == dtype
    assert {getattr(layer, name).dtype for name in (*STATE[:4], "weight_grad", "bias_grad")} == {np.dtype(np.float32)}
    assert_close(layer.running_mean, 0.1 * batch_mean, np.float32)
    assert layer.eval()(x).dtype == dtype


def test_out_may_be_the_residual_in_a_layer(rng):
    x, residual, dy = (images(rng, SHAPES[pybn.BatchNorm2d]) for _ in range(3))
    layer, twin = (pybn.BatchNorm2d(5, activation="relu") for _ in range(2))
    expected, gradients = twin(x, residual=residual.copy()), twin.backward(dy)
    assert layer(x, residual=residual, out=residual) is residual
    assert_same_bits(residual, expected)
    for ours, same in zip(layer.backward(dy), gradients, strict=True):
        assert_same_bits(ours, same)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda r: r[1:], ValueError, r"residual has shape \(3, 5, 6, 7\), expected \(4, 5, 6, 7\), the shape of x"),
        (lambda r: r[:, :1], ValueError, "residual has shape .*, the shape of x"),
        (lambda r: r.astype(np.float64), TypeError, "residual has dtype float64, expected float32, the dtype of x"),
        (lambda r: r.astype(np.float16), TypeError, "residual has dtype float16, expected float32, the dtype of x"),
        (lambda r: r > 0, TypeError, "residual has dtype bool, expected float32"),
        (lambda r: np.ma.masked_array(r), TypeError, "residual is a masked array"),
    ],
    ids=["cut", "broadcast", "wide", "half", "bool", "masked"],
)
def test_a_bad_residual_is_refused_and_changes_nothing(rng, spoil, error, message):
    layer = pybn.BatchNorm2d(5)
    x = images(rng, SHAPES[pybn.BatchNorm2d])
    layer(x)
    before = everything(layer)
    with pytest.raises(error, match="^" + message):
        layer(x, residual=spoil(x))
    assert_unchanged(layer, before)


def test_a_layer_without_a_residual_forgets_the_last_one(rng):
    """Calls with and without a residual may alternate; backward belongs to the last."""
    x, residual, dy = (images(rng, SHAPES[pybn.BatchNorm2d]) for _ in range(3))
    layer = pybn.BatchNorm2d(5, activation="hardswish")
    layer(x, residual=residual)
    layer(x)
    plain = layer.backward(dy)
    assert isinstance(plain, np.ndarray)
    layer(x, residual=residual)
    dx, dresidual = layer.backward(dy)
    assert dx.shape == dresidual.shape == x.shape


@layer_types
def test_training_normalizes_with_the_batch_and_moves_the_running_statistics(rng, layer_type):
    layer = layer_type(5)
    layer.weight[...], layer.bias[...], _, _ = parameters(rng, 5)
    mean, var = np.zeros(5), np.ones(5)
    for count in range(1, 4):
        x = images(rng, SHAPES[layer_type])
        batch_mean, batch_var = reference.stats(x)
        mean = reference.running(mean, batch_mean)
        var = reference.running(var, reference.unbiased(batch_var, x.size // 5))
        assert_close(layer(x), reference.normalize(x, batch_mean, batch_var, layer.weight, layer.bias), np.float32)
        assert_close(layer.running_mean, mean, np.float32)
        assert_close(layer.running_var, var, np.float32)
        assert layer.num_batches_tracked == count


@layer_types
def test_evaluation_normalizes_with_the_running_statistics_and_changes_nothing(rng, layer_type):
    layer = layer_type(5, activation="relu")
    layer(images(rng, SHAPES[layer_type]))
    before = everything(layer.eval())
    x = images(rng, SHAPES[layer_type])
    expected = reference.normalize(x, layer.running_mean, layer.running_var, activation="relu")
    assert_close(layer(x), expected, np.float32)
    assert_unchanged(layer, before)


def test_without_running_statistics_evaluation_uses_the_batch(rng):
    layer = pybn.BatchNorm2d(5, track_running_stats=False)
    x = images(rng, SHAPES[pybn.BatchNorm2d])
    trained = layer(x)
    assert_same_bits(layer.eval()(x), trained)


def test_momentum_none_keeps_the_average_of_all_batches(rng):
    layer = pybn.BatchNorm2d(5, momentum=None, dtype=np.float64)
    batches = [images(rng, SHAPES[pybn.BatchNorm2d]) for _ in range(5)]
    for x in batches:
        layer(x)
    moments = [reference.stats(x) for x in batches]
    assert_close(layer.running_mean, np.mean([mean for mean, _ in moments], 0), np.float64)
    assert_close(layer.running_var, np.mean([reference.unbiased(var, 168) for _, var in moments], 0), np.float64)
    assert layer.num_batches_tracked == 5


def test_train_and_eval_switch_and_return_the_layer():
    layer = pybn.BatchNorm1d(3)
    assert layer.eval() is layer
    assert not layer.training
    assert layer.train() is layer
    assert layer.training
    assert not layer.train(False).training


def test_channels_may_come_last(rng):
    first, last = pybn.BatchNorm2d(5), pybn.BatchNorm2d(5, channel_axis=-1)
    x = images(rng, SHAPES[pybn.BatchNorm2d])
    dy = rng.standard_normal(x.shape).astype(np.float32)
    assert_close(np.moveaxis(last(np.moveaxis(x, 1, -1)), -1, 1), first(x), np.float32)
    assert_close(np.moveaxis(last.backward(np.moveaxis(dy, 1, -1)), -1, 1), first.backward(dy), np.float32)
    for name in (*STATE, "weight_grad", "bias_grad"):
        np.testing.assert_allclose(getattr(last, name), getattr(first, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("data_dtype", [np.float32, np.float64])
def test_data_and_parameters_keep_their_own_types(rng, dtype, data_dtype):
    layer = pybn.BatchNorm2d(5, dtype=dtype)
    x = images(rng, SHAPES[pybn.BatchNorm2d], data_dtype)
    assert layer(x).dtype == data_dtype
    assert layer.backward(x).dtype == data_dtype
    assert {getattr(layer, name).dtype for name in (*STATE[:4], "weight_grad", "bias_grad")} == {np.dtype(dtype)}


def test_out_is_written_and_returned(rng):
    layer = pybn.BatchNorm2d(5)
    x = images(rng, SHAPES[pybn.BatchNorm2d])
    expected = layer(x)
    out = np.empty_like(x)
    assert layer(x, out=out) is out
    assert_same_bits(out, expected)
    expected = layer.backward(x)
    layer(x)
    assert layer.backward(x, out=out) is out
    assert_same_bits(out, expected)


@pytest.mark.parametrize("training", [True, False])
def test_backward_gives_the_gradients_of_the_last_call(rng, training):
    layer = pybn.BatchNorm2d(5, activation="relu").train(training)
    layer.weight[...], layer.bias[...], layer.running_mean[...], layer.running_var[...] = parameters(rng, 5)
    mean, var = layer.running_mean.copy(), layer.running_var.copy()
    x = images(rng, SHAPES[pybn.BatchNorm2d])
    dy = rng.standard_normal(x.shape).astype(np.float32)
    y = layer(x)
    used = reference.stats(x) if training else (mean, var)
    expected = reference.backward(dy, x, *used, layer.weight, training=training, active=y > 0)
    assert_close(layer.backward(dy) / 4, expected.dx / 4, np.float32)
    assert_close(layer.weight_grad / 168, expected.dweight / 168, np.float32)
    assert_close(layer.bias_grad / 168, expected.dbias / 168, np.float32)


def test_gradients_accumulate_until_zero_grad(rng):
    layer = pybn.BatchNorm2d(5)
    x = images(rng, SHAPES[pybn.BatchNorm2d])
    layer(x)
    layer.backward(x)
    weight_grad, bias_grad = layer.weight_grad, layer.bias_grad
    once = weight_grad.copy(), bias_grad.copy()
    layer(x)
    layer.backward(x)
    assert_same_bits(layer.weight_grad, 2 * once[0])
    assert_same_bits(layer.bias_grad, 2 * once[1])
    assert_same_bits(weight_grad, once[0], "an array that the caller may hold was changed")
    layer.zero_grad()
    assert layer.weight_grad is None
    assert layer.bias_grad is None
    layer(x)
    layer.backward(x)
    assert_same_bits(layer.weight_grad, once[0])


def test_a_layer_without_parameters_has_no_gradients_of_them(rng):
    layer = pybn.BatchNorm2d(5, affine=False)
    x = images(rng, SHAPES[pybn.BatchNorm2d])
    layer(x)
    assert layer.backward(x).shape == x.shape
    assert layer.weight_grad is None
    assert layer.bias_grad is None


def test_each_forward_call_serves_one_backward_pass(rng):
    layer = pybn.BatchNorm2d(5)
    x = images(rng, SHAPES[pybn.BatchNorm2d])
    with pytest.raises(RuntimeError, match="backward needs a forward call before it"):
        layer.backward(x)
    layer(x)
    layer.backward(x)
    before = everything(layer)
    with pytest.raises(RuntimeError, match="each forward call serves one backward pass"):
        layer.backward(x)
    assert_unchanged(layer, before)


def test_a_refused_gradient_can_be_given_again(rng):
    layer = pybn.BatchNorm2d(5)
    x = images(rng, SHAPES[pybn.BatchNorm2d])
    layer(x)
    before = everything(layer)
    with pytest.raises(ValueError, match="dy has shape"):
        layer.backward(x[1:])
    assert_unchanged(layer, before)
    assert layer.backward(x).shape == x.shape


@pytest.mark.parametrize(
    ("layer_type", "shape", "message"),
    [
        (pybn.BatchNorm1d, (5,), r"x has shape \(5,\), expected 2 or 3 axes for BatchNorm1d"),
        (pybn.BatchNorm1d, (4, 5, 6, 7), r"x has shape \(4, 5, 6, 7\), expected 2 or 3 axes for BatchNorm1d"),
        (pybn.BatchNorm2d, (4, 5, 6), r"x has shape \(4, 5, 6\), expected 4 axes for BatchNorm2d"),
        (pybn.BatchNorm2d, (4, 5, 6, 7, 8), r"x has shape .*, expected 4 axes for BatchNorm2d"),
        (pybn.BatchNorm3d, (4, 5, 6, 7), r"x has shape .*, expected 5 axes for BatchNorm3d"),
        (pybn.BatchNorm2d, (4, 6, 5, 7), r"x has shape .*, expected 5 channels \(num_features\) on axis 1"),
        (pybn.BatchNorm1d, (1, 5), "x has shape .*, one value per channel"),
    ],
)
def test_a_wrong_shape_is_refused_and_changes_nothing(rng, layer_type, shape, message):
    layer = layer_type(5)
    layer(images(rng, SHAPES[layer_type]))
    before = everything(layer)
    with pytest.raises(ValueError, match="^" + message):
        layer(np.ones(shape, np.float32))
    assert_unchanged(layer, before)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.ones((4, 5, 6, 7), np.int64), TypeError, "x has dtype int64"),
        (np.ma.ones((4, 5, 6, 7)), TypeError, r"x is a masked array"),
        ([[1.0], [1.0, 2.0]], TypeError, "x is a list, which cannot become a NumPy array"),
        (None, (TypeError, ValueError), "x "),
        ("text", (TypeError, ValueError), "x "),
    ],
    ids=["int", "masked", "ragged", "None", "text"],
)
def test_a_wrong_input_is_refused_and_changes_nothing(x, error, message):
    layer = pybn.BatchNorm2d(5)
    before = everything(layer)
    with pytest.raises(error, match="^" + message):
        layer(x)
    assert_unchanged(layer, before)


def test_a_bad_out_is_refused_and_changes_nothing(rng):
    layer = pybn.BatchNorm2d(5)
    x = images(rng, SHAPES[pybn.BatchNorm2d])
    layer(x)
    before = everything(layer)
    with pytest.raises(ValueError, match=r"^out has shape"):
        layer(x, out=x[1:])
    assert_unchanged(layer, before)


def test_check_finite_refuses_before_anything_changes(rng):
    layer = pybn.BatchNorm2d(5, check_finite=True)
    x = images(rng, SHAPES[pybn.BatchNorm2d])
    layer(x)
    before = everything(layer)
    x[0, 3, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"x is not finite in 1 of 5 channels \(3\)"):
        layer(x)
    assert_unchanged(layer, before)


def test_a_damaged_running_variance_is_refused_not_turned_into_nan(rng):
    layer = pybn.BatchNorm2d(5)
    layer.running_var[2] = -1
    before = everything(layer)
    for mode in (True, False):
        with pytest.raises(ValueError, match="running_var is negative in channel 2"):
            layer.train(mode)(images(rng, SHAPES[pybn.BatchNorm2d]))
    assert_unchanged(layer.train(), before)


def test_reset_restores_the_beginning(rng):
    layer = pybn.BatchNorm2d(5)
    new = everything(layer)
    layer(images(rng, SHAPES[pybn.BatchNorm2d]))
    layer.weight[...] = layer.bias[...] = 7
    weight, running_mean = layer.weight, layer.running_mean
    layer.reset_running_stats()
    assert_same_bits(layer.running_mean, new["running_mean"])
    assert_same_bits(layer.running_var, new["running_var"])
    assert_same_bits(layer.num_batches_tracked, new["num_batches_tracked"])
    assert np.all(layer.weight == 7)
    layer(images(rng, SHAPES[pybn.BatchNorm2d]))
    layer.reset_parameters()
    assert_unchanged(layer, new)
    assert layer.weight is weight, "an optimizer holds the array"
    assert layer.running_mean is running_mean
    pybn.BatchNorm2d(5, affine=False, track_running_stats=False).reset_parameters()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_computes_the_same(rng, duplicate):
    layer = pybn.BatchNorm2d(5, momentum=None, activation="leaky_relu", negative_slope=-0.75, dtype=np.float64)
    x = images(rng, SHAPES[pybn.BatchNorm2d])
    layer(x)
    layer.backward(x)
    layer(x)
    twin = duplicate(layer)
    assert repr(twin) == repr(layer)
    assert (twin.activation, twin.negative_slope) == ("leaky_relu", -0.75)
    assert_unchanged(twin, everything(layer))
    with pytest.raises(RuntimeError):
        twin.backward(x)
    assert_same_bits(twin.eval()(x), layer.eval()(x))
    twin.train()(x)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_deep_copy_is_independent(rng, duplicate):
    layer = pybn.BatchNorm2d(5)
    twin = duplicate(layer)
    before = everything(layer)
    twin(images(rng, SHAPES[pybn.BatchNorm2d]))
    twin.weight += 1
    assert_unchanged(layer, before)


def test_state_dict_is_a_copy(rng):
    layer = pybn.BatchNorm2d(5)
    before = everything(layer)
    for value in layer.state_dict().values():
        value[...] = 7
    assert_unchanged(layer, before)


def test_load_state_dict_copies_into_the_arrays_of_the_layer(rng):
    layer, other = pybn.BatchNorm2d(5), pybn.BatchNorm2d(5, dtype=np.float64)
    other(images(rng, SHAPES[pybn.BatchNorm2d]))
    state = other.state_dict()
    weight = layer.weight
    layer.load_state_dict(state)
    assert layer.weight is weight
    for name in STATE[:4]:
        assert_same_bits(getattr(layer, name), state[name].astype(np.float32), name)
    assert layer.num_batches_tracked == 1
    state["weight"][...] = 7
    assert np.all(layer.weight == 1)


def test_state_survives_npz(rng, tmp_path):
    layer, other = pybn.BatchNorm2d(5), pybn.BatchNorm2d(5)
    layer(images(rng, SHAPES[pybn.BatchNorm2d]))
    np.savez(tmp_path / "state.npz", **layer.state_dict())
    with np.load(tmp_path / "state.npz") as state:
        other.load_state_dict(state)
    assert_unchanged(other, everything(layer))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": None}, KeyError, r"state has the names .*expected.*weight"),
        ({"surplus": np.ones(5)}, KeyError, r"state has the names.*surplus.*expected"),
        ({"running_var": np.ones(6)}, ValueError, r"running_var has shape \(6,\), expected \(5,\)"),
        ({"running_var": np.ones((5, 1))}, ValueError, r"running_var has shape \(5, 1\), expected \(5,\)"),
        ({"running_var": -np.ones(5)}, ValueError, "running_var has the negative value -1.0, expected values >= 0"),
        ({"running_mean": np.ones(5, complex)}, TypeError, "running_mean has dtype complex128, expected float32"),
        ({"running_mean": ["a"] * 5}, TypeError, "running_mean has dtype <U1, expected float32"),
        ({"num_batches_tracked": np.array([1])}, ValueError, r"num_batches_tracked has shape \(1,\), expected \(\)"),
        ({"num_batches_tracked": 1.5}, TypeError, "num_batches_tracked has dtype float64, expected int64"),
    ],
    ids=str,
)
def test_a_bad_state_is_refused_whole(rng, changes, error, message):
    layer, other = pybn.BatchNorm2d(5), pybn.BatchNorm2d(5)
    other(images(rng, SHAPES[pybn.BatchNorm2d]))
    other.weight += 1
    before = everything(layer)
    state = {name: value for name, value in {**other.state_dict(), **changes}.items() if value is not None}
    with pytest.raises(error, match=message):
        layer.load_state_dict(state)
    assert_unchanged(layer, before)


def test_strict_false_passes_over_missing_and_unknown_names():
    layer = pybn.BatchNorm2d(5)
    layer.load_state_dict({"weight": np.full(5, 3.0), "surplus": 1}, strict=False)
    assert np.all(layer.weight == 3)
    assert np.all(layer.bias == 0)


def test_the_counter_may_be_missing_from_old_checkpoints():
    layer = pybn.BatchNorm2d(5)
    state = layer.state_dict()
    del state["num_batches_tracked"]
    layer.load_state_dict(state)
    assert layer.num_batches_tracked == 0


@layer_types
def test_an_empty_batch_leaves_the_running_statistics(layer_type):
    layer = layer_type(5)
    y = layer(np.zeros((0, *SHAPES[layer_type][1:]), np.float32))
    assert y.shape == (0, *SHAPES[layer_type][1:])
    assert np.all(layer.running_mean == 0)
    assert np.all(layer.running_var == 1)
    assert layer.backward(y).shape == y.shape
    assert np.all(layer.weight_grad == 0)
    assert np.all(layer.bias_grad == 0)


def test_a_state_that_cannot_be_loaded_whole_is_not_loaded_in_part():
    layer = pybn.BatchNorm1d(2)
    before = layer.state_dict()
    for bad in (
        {"running_mean": np.array([1e300, 0])},
        {"num_batches_tracked": np.array(-1)},
        {"running_var": np.array([1.0, -1.0])},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            layer.load_state_dict({**before, "weight": np.array([7.0, 8.0]), **bad})
        assert_same_bits(layer.weight, before["weight"])


def test_parameters_of_the_layer_itself_can_be_swapped_by_loading():
    layer = pybn.BatchNorm1d(2)
    layer.load_state_dict({**layer.state_dict(), "weight": layer.bias, "bias": layer.weight})
    assert_same_bits(layer.weight, np.zeros(2, np.float32))
    assert_same_bits(layer.bias, np.ones(2, np.float32))


@pytest.mark.parametrize("dtype", [None, "foo", np.float16, BFLOAT16, np.int32])
def test_a_dtype_without_kernels_is_refused_by_name(dtype):
    with pytest.raises(TypeError, match=r"dtype is .*, expected float32 or float64"):
        pybn.BatchNorm2d(3, dtype=dtype)


def test_forward_is_the_call(rng):
    x = images(rng, (4, 3, 5, 5))
    assert_same_bits(pybn.BatchNorm2d(3).forward(x), pybn.BatchNorm2d(3)(x))
