"""Norms of concatenations that are not made: the bits of those of concatenations that are."""

import copy

import pytest
import torch
import torch_zoo
from torch import nn
from torch.nn import functional as F

from pybn.torch import accelerate, restore
from pybn.torch.functional import normalize

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# N, the pieces' channels, and what follows: odd numbers, planes in several segments, many groups, small work.
SHAPES = {
    "odd": (4, (3, 5, 9), (7, 7)),
    "dense": (9, (64, 32, 32), (10, 10)),
    "equal": (3, (40, 40), (14, 14)),
    "ones": (2, (1, 1), (180, 190)),
    "sequences": (4, (6, 2), (33,)),
    "volumes": (2, (4, 6), (3, 4, 5)),
}


def tensors(shape, dtype=torch.float32, seed=0):
    """Pieces, and mean, var, counter, weight and bias of their concatenation."""
    generator = torch.Generator().manual_seed(seed)
    n, channels, plane = shape
    pieces = tuple((torch.randn(n, c, *plane, generator=generator) * 2 + 1).to(dtype) for c in channels)
    total, wide = sum(channels), torch.float64 if dtype == torch.float64 else torch.float32
    mean, weight, bias = (torch.randn(total, generator=generator).to(wide) for _ in range(3))
    return pieces, (mean, torch.rand(total, generator=generator).to(wide) + 0.5, torch.tensor(0)), (weight, bias)


def results(function, pieces, statistics, parameters, training=True, activation="relu"):
    """Output, gradients of the pieces and parameters, and statistics of one call; and the output's graph."""
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (*pieces, *parameters)]
    mean, var, counter = (t.clone() for t in statistics)
    inputs = tuple(leaves[: len(pieces)])
    y = function(inputs, mean, var, counter, *leaves[len(pieces) :], training, 0.1, 1e-5, activation, 0.1, None)
    y.backward(torch.linspace(-1, 1, y.numel()).to(y.dtype).view(y.shape))
    return [y.detach(), *(leaf.grad for leaf in leaves), mean, var, counter], y.grad_fn


def of_the_concatenation(pieces, *args):
    return normalize(torch.cat(pieces, 1), *args)


def check(pieces, statistics, parameters, is_read=True, **kwargs):
    expected, _ = results(of_the_concatenation, pieces, statistics, parameters, **kwargs)
    actual, graph = results(normalize, pieces, statistics, parameters, **kwargs)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    made = any(type(function).__name__ == "CatBackward0" for function, _ in graph.next_functions if function)
    assert made is not is_read


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_gives_the_bits_of_the_concatenation(shape, dtype, training):
    check(*tensors(shape, dtype), training=training)


@pytest.mark.parametrize("activation", [None, "relu6", "leaky_relu", "silu", "hardswish"])
def test_with_every_activation(activation, instruction_set):
    check(*tensors(SHAPES["odd"]), activation=activation)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_with_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(*tensors((16, (64, 32, 96), (20, 20))))
    finally:
        torch.set_num_threads(before)


UNUSUAL = {
    "channels_last": lambda a, b: (a.contiguous(memory_format=torch.channels_last),) * 2,
    "transposed planes": lambda a, b: (a, b.transpose(2, 3)),
    "no channels": lambda a, b: (a, b[:, :0]),
    "matrices": lambda a, b: (a[:, :, 0, 0], b[:, :, 0, 0]),
    "planes of one value": lambda a, b: (a[:, :, :1, :1].contiguous(), b[:, :, :1, :1].contiguous()),
    "two types": lambda a, b: (a, b.double()),
}


@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL)
def test_what_the_core_does_not_read_in_pieces_is_concatenated(make):
    pieces = make(*tensors((4, (3, 9), (7, 7)))[0])
    _, statistics, parameters = tensors((4, [piece.size(1) for piece in pieces], (1,)))
    check(pieces, statistics, parameters, is_read=False)


def test_a_piece_alone_or_twice_or_without_gradient():
    (a, b, _), statistics, parameters = tensors((4, (4, 4, 1), (5, 6)))
    one_channel_less = [t if t.dim() == 0 else t[:8] for t in statistics], [t[:8] for t in parameters]
    check((torch.cat((a, b), 1),), *one_channel_less)
    check((a[:, :1].contiguous(),), [t if t.dim() == 0 else t[:1] for t in statistics], [t[:1] for t in parameters])
    a.requires_grad_()
    y = normalize((a, b, a), None, None, None, torch.ones(12), torch.zeros(12), True, 0.1, 1e-5, "relu", 0.01, None)
    y.square().sum().backward()
    x = a.detach().clone().requires_grad_()
    expected = normalize(
        torch.cat((x, b, x), 1), None, None, None, torch.ones(12), torch.zeros(12), True, 0.1, 1e-5, "relu", 0.01, None
    )
    expected.square().sum().backward()
    torch.testing.assert_close(a.grad, x.grad, rtol=0, atol=0)
    assert b.grad is None


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_gradcheck_and_gradgradcheck(activation):
    pieces, (mean, var, _), parameters = tensors((3, (2, 1), (2, 3)), torch.float64)

    def function(a, b, weight, bias):
        return normalize((a, b), mean, var, None, weight, bias, True, 0.1, 1e-5, activation, 0.1, None)

    inputs = [t.clone().requires_grad_() for t in (*pieces, *parameters)]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


# ---- in models


class Dense(nn.Module):
    """A convolution's output and its input, concatenated as `concatenate(y, x)` does, and normalized."""

    def __init__(self, concatenate, then=F.relu):
        super().__init__()
        self.conv, self.norm = torch_zoo.conv(3, 5), nn.BatchNorm2d(8)
        self.concatenate, self.then = concatenate, then

    def forward(self, x):
        return self.then(self.norm(self.concatenate(self.conv(x), x)))


def passes(model, training, x):
    model.train(training)
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    y = model(leaf * 1)
    y.square().sum().backward()
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]


def compare(model, x, **kwargs):
    """The report, after passes that are those of the model accelerated without, to the bit."""
    plain, _ = accelerate(copy.deepcopy(model), inplace=True, **kwargs)
    other, report = accelerate(copy.deepcopy(model), inplace=True, concatenations=True, **kwargs)
    for training in (True, False, True):
        for a, b in zip(passes(other, training, x), passes(plain, training, x), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    for a, b in zip(passes(restore(other), True, x), passes(restore(plain), True, x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    return report


X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(3))


def test_a_densenet():
    torch.manual_seed(0)
    model = torch_zoo.DenseNet((2, 3, 2), width=0.25)
    report = compare(model, torch.randn(2, 3, 64, 64))
    assert str(report) == "18 batch norms accelerated: 10 relu, 7 concatenation + relu, 1 alone"


@pytest.mark.parametrize(
    "concatenate",
    [
        lambda y, x: torch.cat([y, x], 1),
        lambda y, x: torch.cat((y, x), dim=1),
        lambda y, x: torch.concat(tensors=[y, x], dim=1),
        lambda y, x: torch.concatenate([y, x], 1),
    ],
)
def test_every_way_to_concatenate_channels(concatenate):
    assert compare(Dense(concatenate), X).replaced[0].fused == ("concatenation + relu",)
    assert compare(Dense(concatenate, then=lambda y: y), X).replaced[0].fused == ("concatenation",)


def shared(y, x):
    z = torch.cat([y, x], 1)
    y.mul_(2)
    return z


def overwritten(y, x):
    z = torch.cat([y, x], 1)
    F.relu_(y)
    return z


@pytest.mark.parametrize(
    "concatenate",
    [
        lambda y, x: torch.cat([torch.cat([y, x], 1) * 1] * 2, 2),
        lambda y, x: torch.cat([y, x], -3),
        lambda y, x: torch.cat([y, x], 1) * 1,
        shared,
        overwritten,
    ],
    ids=["another axis", "an axis from the end", "not before the norm", "a piece changes before", "and in place"],
)
def test_others_are_left_as_they_are(concatenate):
    assert compare(Dense(concatenate), X).replaced[0].fused == ("relu",)


class Two(nn.Module):
    """Two of them, and something done to a piece of the second."""

    def __init__(self, between):
        super().__init__()
        self.conv, self.first, self.second = torch_zoo.conv(3, 5), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.between = between

    def forward(self, x):
        y = F.relu(self.first(torch.cat([self.conv(x), x], 1)))[:, :5] * 1
        z = torch.cat([y, x], 1)
        self.between(y)
        return F.relu(self.second(z))


@pytest.mark.parametrize(
    ("between", "fused"),
    [(lambda y: None, "concatenation + relu"), (lambda y: y.mul_(2), "relu")],
    ids=["none", "mul_"],
)
def test_each_of_several_is_looked_at_in_its_own_place(between, fused):
    report = compare(Two(between), X)
    assert [layer.fused for layer in report.replaced] == [("concatenation + relu",), (fused,)]


class Shared(Dense):
    """Its concatenation is part of its result, too."""

    def forward(self, x):
        z = torch.cat([self.conv(x), x], 1)
        return F.relu(self.norm(z)) + z


class Summed(Dense):
    """Something is added to what is normalized."""

    def forward(self, x):
        return F.relu(self.norm(torch.cat([self.conv(x), x], 1)) + x.repeat(1, 3, 1, 1)[:, :8])


def test_one_that_others_see_or_that_is_added_to_or_overwritten_is_made():
    assert compare(Shared(None), X).replaced[0].fused == ("relu",)
    assert compare(Summed(None), X).replaced[0].fused == ("sum + relu",)
    leaky = Dense(lambda y, x: torch.cat([y, x], 1), then=lambda y: F.leaky_relu(y, 0.1))
    assert compare(leaky, X, inplace_activations=True).replaced[0].fused == ("leaky_relu in place",)


def test_a_hook_sees_the_concatenation():
    model, _ = accelerate(Dense(lambda y, x: torch.cat([y, x], 1)), concatenations=True)
    model(X)
    seen = []
    model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    model(X)
    assert seen == [(4, 8, 9, 9)]


def test_a_piece_that_changes_afterwards_is_an_error_not_a_wrong_gradient():
    model, _ = accelerate(Dense(lambda y, x: torch.cat([y, x], 1)), concatenations=True)
    x = X.clone()
    y = model(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_copies_compiled_and_exported_models_compute_the_same():
    model, _ = accelerate(Dense(lambda y, x: torch.cat([y, x], 1)), concatenations=True)
    model.eval()
    expected = model(X)
    torch.testing.assert_close(copy.deepcopy(model)(X), expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(X), expected)
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), expected)
