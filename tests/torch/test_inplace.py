"""`InPlaceABN`: the numbers of a norm and an activation, less memory, and never a wrong gradient."""

import copy

import pytest
import torch
import torch_zoo
from torch import nn
from torch.nn import functional as F

from pybn.torch import InPlaceABN, accelerate

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def layers(activation="leaky_relu", slope=0.1, channels=5, dtype=torch.float64, **kwargs):
    """An in-place norm, and a stock one with the activation behind it, of the same parameters."""
    generator = torch.Generator().manual_seed(0)
    mine = InPlaceABN(channels, activation=activation, negative_slope=slope, dtype=dtype, **kwargs)
    stock = nn.BatchNorm2d(channels, dtype=dtype, **kwargs)
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter.uniform_(0.5, 1.5, generator=generator)
            parameter[::2] *= -1  # weights may be negative
    stock.load_state_dict(mine.state_dict())
    return mine, nn.Sequential(stock, nn.LeakyReLU(slope) if activation else nn.Identity())


def values(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*(shape or (4, 5, 6, 7)), dtype=dtype, generator=torch.Generator().manual_seed(seed))


def step(layer, x):
    """Output, gradients and buffers of one step on 2 x, which is nobody else's."""
    x = x.clone().requires_grad_()
    for parameter in layer.parameters():
        parameter.grad = None
    source = x * 2
    pointer = source.data_ptr()
    y = layer(source)
    (y * values(*y.shape, dtype=y.dtype, seed=2)).sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    return y.data_ptr() == pointer, [y.detach(), *gradients, *(b.clone() for b in layer.buffers())]


def assert_same_steps(mine, stock, x):
    """An in-place norm that overwrites x, and the stock one, both one step further."""
    overwrote, actual = step(mine, x)
    _, expected = step(stock, x)
    assert overwrote
    tolerance = 1e-10 if x.dtype is torch.float64 else 2e-5
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_computes_what_a_norm_and_an_activation_compute(layout, activation, training, dtype):
    mine, stock = layers(activation, dtype=dtype)
    mine.train(training)
    stock.train(training)
    x = values(dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    for _ in range(2):
        assert_same_steps(mine, stock, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("shape", "layout"), [((3, 5, 9, 13), "contiguous"), ((3, 70, 5, 3), "channels_last")])
def test_every_instruction_set(instruction_set, dtype, shape, layout):
    mine, stock = layers(slope=0.25, channels=shape[1], dtype=dtype)
    assert_same_steps(mine, stock, values(*shape, dtype=dtype).contiguous(memory_format=LAYOUTS[layout]))


def test_nan_stays_in_its_channel():
    mine, stock = layers()
    x = values()
    x[0, 2, 0, 0] = torch.nan
    _, actual = step(mine, x)
    _, expected = step(stock, x)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(activation, training):
    mine, _ = layers(activation, channels=3)
    mine.train(training)
    weight, bias = mine.weight.detach().requires_grad_(), mine.bias.detach().requires_grad_()

    def function(x, weight, bias):
        state = {
            "weight": weight,
            "bias": bias,
            "running_mean": torch.zeros(3).double(),
            "running_var": torch.ones(3).double(),
        }
        return torch.func.functional_call(mine, state, (x * 1,))

    x = values(3, 3, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(function, (x, weight, bias))


@pytest.mark.parametrize("shape", [(8, 5), (4, 5, 9), (2, 5, 3, 4, 2)])
def test_takes_any_number_of_dimensions(shape):
    mine, stock = layers()
    overwrote, actual = step(mine, values(*shape))
    stock[0].__class__ = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 5: nn.BatchNorm3d}[len(shape)]
    _, expected = step(stock, values(*shape))
    assert overwrote
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_without_parameters_or_statistics():
    for options in ({"affine": False}, {"track_running_stats": False}, {"momentum": None}):
        mine, stock = layers(**options)
        overwrote, actual = step(mine, values())
        _, expected = step(stock, values())
        assert overwrote
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("weight", [0.0, 1e-40, 1e-12, -1e-4, 2.0**-9, -1e-2])
def test_gradients_are_right_for_any_weight(weight):
    mine, stock = layers(dtype=torch.float32)
    with torch.no_grad():
        mine.weight[2], mine.bias[2] = weight, 1.0
    stock.load_state_dict({f"0.{name}": value for name, value in mine.state_dict().items()})
    overwrote, actual = step(mine, values(dtype=torch.float32))
    _, expected = step(stock, values(dtype=torch.float32))
    assert overwrote == (abs(weight) >= 2.0**-10)  # of the bias
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_a_small_weight_is_divided_by_if_the_bias_is_small_too():
    mine, stock = layers(dtype=torch.float32)
    with torch.no_grad():
        mine.weight[2], mine.bias[2] = 1e-8, 1e-9
    stock.load_state_dict({f"0.{name}": value for name, value in mine.state_dict().items()})
    overwrote, actual = step(mine, values(dtype=torch.float32))
    _, expected = step(stock, values(dtype=torch.float32))
    assert overwrote
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_must_not_be_overwritten_is_not():
    mine, _ = layers(dtype=torch.float32)
    leaf = values(dtype=torch.float32).requires_grad_()
    base = values(dtype=torch.float32).requires_grad_() * 2
    half = values(dtype=torch.bfloat16)
    for x in (leaf, base[:3], half):
        before = x.detach().clone()
        y = mine(x)
        assert torch.equal(x, before)
        assert y.dtype == x.dtype
    mine, _ = layers()
    with torch.inference_mode():
        x = values()
        assert mine.eval()(x).data_ptr() == x.data_ptr()


def test_an_input_that_somebody_keeps_for_backward_is_an_error():
    mine, _ = layers()
    y = mine(values().requires_grad_().sigmoid())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_result_that_is_changed_later_is_an_error():
    mine, _ = layers()
    y = mine(values().requires_grad_() * 2)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_one_value_per_channel_is_an_error_before_anything_changes():
    mine, _ = layers()
    x = values(1, 5, 1, 1)
    before = x.clone()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        mine(x)
    assert torch.equal(x, before)
    assert mine.num_batches_tracked == 0


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="activation is 'relu', expected 'leaky_relu' or None"):
        InPlaceABN(3, activation="relu")
    with pytest.raises(ValueError, match="negative_slope is 0, expected a number > 0"):
        InPlaceABN(3, negative_slope=0)
    with pytest.raises(ValueError, match="1 dimensions, expected at least 2"):
        InPlaceABN(3)(torch.zeros(3))
    assert "activation='leaky_relu', negative_slope=0.01" in repr(InPlaceABN(3))


def test_accelerate_overwrites_where_nobody_else_looks():
    model = torch_zoo.DenseNet((2, 2), 1 / 8, 10, activation=nn.LeakyReLU).double()
    other, report = accelerate(copy.deepcopy(model), inplace=True, inplace_activations=True)
    in_place = {layer.name for layer in report.replaced if layer.fused and layer.fused[0].endswith("in place")}
    assert in_place == {"features.1"} | {f"features.{b}.{i}.norm{n}" for b in (4, 9) for i in (0, 1) for n in (1, 2)}
    x = values(2, 3, 32, 32)
    for mode in (True, False):
        model.train(mode)
        other.train(mode)
        expected, actual = model(x), other(x)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual.sum(), list(other.parameters())),
            torch.autograd.grad(expected.sum(), list(model.parameters())),
        )


def test_accelerate_does_not_overwrite_what_a_hook_sees_or_another_layer_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = torch_zoo.conv(3, 3), nn.BatchNorm2d(3)

        def forward(self, x):
            x = self.conv(x)
            return F.leaky_relu(self.bn(x)) + x

    _, report = accelerate(Twice(), inplace_activations=True)
    assert report.replaced[0].fused == ("leaky_relu",)
    model = nn.Sequential(torch_zoo.conv(3, 3), nn.BatchNorm2d(3), nn.LeakyReLU())
    other, report = accelerate(model, inplace_activations=True)
    assert report.replaced[0].fused == ("leaky_relu in place",)
    seen = []
    other(values(2, 3, 8, 8).float())
    other[0].register_forward_hook(lambda m, args, y: seen.append((y, y.detach().clone())))
    other(values(2, 3, 8, 8).float())
    assert torch.equal(*seen[0])


def test_a_training_step_keeps_less():
    def kept(model, x):
        """Bytes of the distinct tensors that a graph keeps for its backward pass, besides parameters."""
        storages = {}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model(x)
        total = sum(size for pointer, (size, _) in storages.items() if pointer not in own)
        y.sum().backward()
        return total

    torch.manual_seed(0)
    model = torch_zoo.DenseNet((4, 4), 1 / 4, 10, activation=nn.LeakyReLU)
    x = values(2, 3, 64, 64, dtype=torch.float32)
    lean, _ = accelerate(model, inplace_activations=True)
    assert kept(lean, x) < 0.7 * kept(model, x)
