"""`pybn.torch.fold`: the folded network computes what the original did, and what cannot be folded exactly is left.

The oracle is torch itself, in float64.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch_zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from pybn.folding import Reason
from pybn.torch import BatchNorm2d, accelerate, fold, unfold
from pybn.torch.fold_modules import FoldedBatchNorm, FoldedEpilogue
from pybn.torch.fold_report import UNLOCK_MODULE

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own script_method
    from torch.fx.experimental.optimization import fuse

NORM = nn.modules.batchnorm._BatchNorm


def trained(model: nn.Module, *, seed: int = 0, positive: bool = False) -> nn.Module:
    """A model in evaluation mode whose norms differ from the identity, by scales of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, NORM):
                if module.running_mean is not None:
                    uniform(module.running_mean, -1, 1)
                    uniform(module.running_var, 0.5, 2)
                if module.weight is not None:
                    uniform(module.weight, 0.5, 2)
                    if not positive:
                        module.weight[::2] *= -1
                    uniform(module.bias, -1, 1)
    return model.eval()


def inputs(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: bytes(tensor.detach().reshape(-1).view(torch.uint8)) for name, tensor in model.state_dict().items()}


def folded(model: nn.Module, *xs: torch.Tensor, **options: object) -> tuple[nn.Module, object]:
    """Fold a float64 model, and check that nothing but rounding has changed, and the argument not at all."""
    before, modules = bits(model), list(model.named_modules())
    with torch.no_grad():
        expected = model(*xs)
        result = fold(model, **options)
        assert bits(model) == before
        assert [(name, id(module)) for name, module in model.named_modules()] == [(n, id(m)) for n, m in modules]
        torch.testing.assert_close(result.model(*xs), expected, rtol=1e-11, atol=1e-11)
        restored = unfold(result.model) if result.report.folds else model
        assert bits(restored) == before
        assert [(n, type(m)) for n, m in restored.named_modules()] == [(n, type(m)) for n, m in modules]
        assert torch.equal(restored(*xs), expected)
    again = fold(result.model)
    assert not again.report.folds
    assert bits(again.model) == bits(result.model)
    assert len(result.report.rows) == len({m for _, m in modules if isinstance(m, NORM)})
    return result


def reasons(report: object) -> dict[str, Reason]:
    return {row.name: row.reason for row in report.left}


class Net(nn.Module):
    """Modules by name, and a function as the forward."""

    def __init__(self, forward: Callable[..., object], **modules: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


def conv(i: int = 3, o: int = 4, kernel: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(i, o, kernel, **options)


def net(forward: Callable[..., object], **modules: nn.Module) -> nn.Module:
    return trained(Net(forward, **modules)).double()


IMAGE = (2, 3, 8, 8)


# Geometry


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, object]:
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    transposed = draw(st.booleans())
    stride = draw(st.integers(1, 2))
    return {
        "dims": dims,
        "transposed": transposed,
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": draw(st.tuples(*[st.integers(1, 3)] * dims)),
        "stride": stride,
        "dilation": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 2)),
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": "zeros" if transposed else draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    }


def layer_of(geometry: dict[str, object]) -> nn.Module:
    geometry = dict(geometry)
    dims, transposed = geometry.pop("dims"), geometry.pop("transposed")
    return getattr(nn, f"Conv{'Transpose' * transposed}{dims}d")(**geometry)


def norm_of(dims: int, channels: int, **options: object) -> nn.Module:
    return getattr(nn, f"BatchNorm{dims}d")(channels, **options)


@given(geometries(), st.booleans(), st.integers(0, 2**16))
def test_every_convolution_absorbs_the_norm_after_it(geometry, affine, seed):
    torch.manual_seed(seed)
    dims = geometry["dims"]
    model = nn.Sequential(layer_of(geometry), norm_of(dims, geometry["out_channels"], affine=affine))
    model = trained(model, seed=seed).double()
    x = inputs(2, geometry["in_channels"], *[6] * dims, seed=seed)
    with torch.no_grad():
        result = fold(model)
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-11, atol=1e-11)
    assert not result.report.left


@given(geometries(), st.booleans(), st.integers(0, 2**16))
def test_a_convolution_absorbs_the_norm_before_it_unless_zeros_come_in_between(geometry, shifts, seed):
    torch.manual_seed(seed)
    dims = geometry["dims"]
    norm = norm_of(dims, geometry["in_channels"])
    model = trained(nn.Sequential(norm, layer_of(geometry)), seed=seed).double()
    if not shifts:
        with torch.no_grad():
            norm.running_mean.zero_()
            norm.bias.zero_()
    x = inputs(2, geometry["in_channels"], *[6] * dims, seed=seed)
    with torch.no_grad():
        result = fold(model)
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-11, atol=1e-11)
    plain = all(size == 1 for size in geometry["kernel_size"]) and geometry["stride"] == 1 and geometry["dilation"] == 1
    if geometry["transposed"]:
        exact = plain and geometry["padding"] == 0
    else:
        exact = geometry["padding"] == 0 or geometry["padding_mode"] != "zeros"
    if not shifts or exact:
        assert result.report.folds
    elif not (geometry["transposed"] and plain):
        assert reasons(result.report) == {"0": Reason.PADDING}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_weights_are_computed_in_float64_and_rounded_once(dtype, transposed):
    torch.manual_seed(0)
    layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(4, 6, 3, groups=2, dtype=dtype)
    half = dtype in (torch.float16, torch.bfloat16)
    norm = nn.BatchNorm2d(6, dtype=torch.float32 if half else dtype)
    result = fold(trained(nn.Sequential(layer, norm)))
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    along = scale.reshape(2, 1, 3).expand(2, 2, 3).reshape(4, 3, 1, 1) if transposed else scale.reshape(6, 1, 1, 1)
    exact = layer.weight.double() * along, (layer.bias.double() - norm.running_mean) * scale + norm.bias.double()
    for parameter, expected in zip((result.model[0].weight, result.model[0].bias), exact, strict=True):
        assert parameter.dtype is dtype
        error = (parameter.double() - expected).abs()
        assert (error <= expected.abs() * torch.finfo(dtype).eps / 2 * (1 + 1e-6) + 1e-14).all()


def test_layout_and_gradients_of_parameters_are_kept():
    model = trained(nn.Sequential(conv(), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last))
    model[0].weight.requires_grad_(False)
    result = fold(model).model
    assert result[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not result[0].weight.requires_grad
    assert result[0].bias.requires_grad


# Networks that fold: their forward, and what absorbs what


def absorbed(report: object) -> dict[str, tuple[str, ...]]:
    return {row.name: row.into for row in report.folds}


def shared_block() -> tuple[nn.Module, dict[str, tuple[str, ...]]]:
    block = nn.Sequential(conv(3, 3, 1), nn.BatchNorm2d(3))
    return net(lambda m, x: m.block(F.relu(m.block(x))), block=block), {"block.1": ("block.0",)}


FOLDS: dict[str, Callable[[], tuple[nn.Module, dict[str, tuple[str, ...]]]]] = {
    "nested, with functions": lambda: (
        net(
            lambda m, x: F.relu(m.norm(m.inner.conv(x))),
            inner=Net(lambda m, x: x, conv=conv()),
            norm=nn.BatchNorm2d(4),
        ),
        {"norm": ("inner.conv",)},
    ),
    "a block that is called twice": shared_block,
    "one norm after two convolutions": lambda: (
        net(lambda m, x: m.n(m.a(x)) * m.n(m.b(x)), a=conv(), b=conv(), n=nn.BatchNorm2d(4)),
        {"n": ("a", "b")},
    ),
    "tied weights": lambda: (tied(), {"n": ("a",)}),
    "norm after norm": lambda: (
        net(lambda m, x: m.q(m.p(torch.tanh(x))), p=nn.BatchNorm2d(3), q=nn.BatchNorm2d(3, affine=False)),
        {"q": ("p",)},
    ),
    "norm after norm after a convolution": lambda: (
        net(lambda m, x: m.q(m.p(m.c(x))), c=conv(), p=nn.BatchNorm2d(4), q=nn.BatchNorm2d(4)),
        {"p": ("c",), "q": ("c",)},
    ),
    "pools, dropout, upsampling": lambda: (
        trained(
            nn.Sequential(
                conv(), nn.AvgPool2d(2, padding=1, count_include_pad=False), nn.Dropout2d(),
                nn.Upsample(scale_factor=2), nn.AdaptiveAvgPool2d(3), nn.BatchNorm2d(4),
            )
        ).double(),
        {"5": ("0",)},
    ),
    "maxima, by positive scales": lambda: (
        trained(nn.Sequential(conv(), nn.MaxPool2d(2), nn.BatchNorm2d(4)), positive=True).double(),
        {"2": ("0",)},
    ),
    "functions that pass a map on": lambda: (
        net(
            lambda m, x: m.n(
                F.interpolate(F.adaptive_avg_pool2d(F.avg_pool2d(F.dropout(m.c(x), 0.5, False), 2), 2), size=5)
            ),
            c=conv(), n=nn.BatchNorm2d(4),
        ),
        {"n": ("c",)},
    ),
    "a sum": lambda: (
        net(lambda m, x: m.n(m.a(x) + m.b(x)), a=conv(), b=conv(), n=nn.BatchNorm2d(4)),
        {"n": ("a", "b")},
    ),
    "a sum in place": lambda: (net(sum_in_place, a=conv(), b=conv(), n=nn.BatchNorm2d(4)), {"n": ("a", "b")}),
    "only the shape is used elsewhere": lambda: (
        net(lambda m, x: reshaped(m.c(x), m.n), c=conv(), n=nn.BatchNorm2d(4)),
        {"n": ("c",)},
    ),
    "pooled, flattened, one-dimensional": lambda: (
        trained(
            nn.Sequential(conv(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2))
        ).double(),
        {"3": ("0",)},
    ),
    "before a flattened Linear": lambda: (
        trained(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(), nn.Linear(192, 5))).double(),
        {"1": ("4",)},
    ),
    "flattened by view": lambda: (
        net(
            lambda m, x: m.n(m.f(x.view(x.size(0), -1))) + m.g(m.o(x.reshape(x.shape[0], -1))),
            f=nn.Linear(192, 5), n=nn.BatchNorm1d(5), o=nn.BatchNorm1d(192), g=nn.Linear(192, 5),
        ),
        {"n": ("f",), "o": ("g",)},
    ),
    "a Linear over the channels, transposed": lambda: (
        net(
            lambda m, x: m.n(m.f(x.flatten(2).transpose(1, 2)).transpose(1, 2)), f=nn.Linear(3, 5), n=nn.BatchNorm1d(5)
        ),
        {"n": ("f",)},
    ),
    "and permuted, forward": lambda: (
        net(lambda m, x: m.f(m.n(x.flatten(2)).permute(0, 2, 1)), f=nn.Linear(3, 5), n=nn.BatchNorm1d(3)),
        {"n": ("f",)},
    ),
    "hooks around, not on it": lambda: (
        with_hook(net(lambda m, x: m.block(x), block=block()), "block"), {"block.1": ("block.0",)},
    ),
    "a harmless subclass": lambda: (
        net(lambda m, x: m.n(m.c(x)), c=Named(3, 4, 3), n=nn.BatchNorm2d(4)), {"n": ("c",)},
    ),
    "synchronised, evaluating": lambda: (
        net(lambda m, x: m.n(m.c(x)), c=conv(), n=nn.SyncBatchNorm(4)), {"n": ("c",)},
    ),
    "reflected before the convolution": lambda: (
        trained(nn.Sequential(nn.BatchNorm2d(3), conv(padding=1, padding_mode="reflect"))).double(), {"0": ("1",)},
    ),
    "zero weights": lambda: (dead_channels(), {"1": ("0",)}),
    "an untraceable forward around a traceable block": lambda: (
        net(
            lambda m, x: m.block(x) if x.sum() > 0 else m.block(-x),
            block=Net(lambda m, x: m.n(m.c(x)), c=conv(), n=nn.BatchNorm2d(4)),
        ),
        {"block.n": ("block.c",)},
    ),
    "optional arguments that do not matter": lambda: (Optional_(matters=False), {"n": ("c",)}),
}  # fmt: skip


class Named(nn.Conv2d):
    """A subclass that computes what its base does."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.label = "c"

    def extra_repr(self) -> str:
        return self.label


class Optional_(nn.Module):
    def __init__(self, *, matters: bool) -> None:
        super().__init__()
        self.c, self.n, self.matters = conv(), nn.BatchNorm2d(4), matters
        trained(self).double()

    def forward(self, x, skip=None):
        y = self.c(x)
        if skip is None and self.matters:
            y = y.tanh()
        y = self.n(y)
        if skip is not None and not self.matters:
            y = y + skip
        return y


def block() -> nn.Module:
    return nn.Sequential(conv(), nn.BatchNorm2d(4))


def tied() -> nn.Module:
    a, b = conv(), conv()
    b.weight, b.bias = a.weight, a.bias
    return net(lambda m, x: m.n(m.a(x)) + m.b(x), a=a, b=b, n=nn.BatchNorm2d(4))


def sum_in_place(m, x):
    y = m.a(x)
    y += m.b(x)
    return m.n(y)


def reshaped(y, norm):
    return norm(y).reshape(y.shape[0], y.size(1), -1)


def dead_channels() -> nn.Module:
    model = trained(block()).double()
    with torch.no_grad():
        model[1].weight[1:3] = 0
    return model


def with_hook(model: nn.Module, name: str, kind: str = "forward") -> nn.Module:
    module = model.get_submodule(name)
    {
        "forward": lambda: module.register_forward_hook(do_nothing),
        "pre": lambda: module.register_forward_pre_hook(do_nothing),
        "backward": lambda: module.register_full_backward_hook(do_nothing),
    }[kind]()
    return model


def do_nothing(*_args: object) -> None:
    pass


@pytest.mark.parametrize("case", FOLDS)
def test_it_folds(case):
    model, expected = FOLDS[case]()
    result = folded(model, inputs(*IMAGE))
    assert absorbed(result.report) == expected
    assert {row.proof for row in result.report.folds} == {"trace"}
    left = [name for name, module in result.model.named_modules() if isinstance(module, NORM)]
    assert left == [row.name for row in result.report.left]


# Networks that must not fold, each with the reason that must be given


def reading_weights() -> nn.Module:
    return net(lambda m, x: m.n(m.c(x)) * m.c.weight.sum(), c=conv(), n=nn.BatchNorm2d(4))


class Padded(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1), value=1.0))


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def unregistered(model: nn.Module) -> nn.Module:
    model.c.forward = model.c.forward
    return model


def changed_in_place(m, x):
    x = torch.tanh(x)
    y = m.n(x)
    return m.c(y) + x.add_(1)[:, :1, :6, :6]


def summed_in_place(m, x):
    x = torch.tanh(x)
    y = m.n(x)
    x += 1
    return m.c(y)


def type_decides(m, x):
    return m.n(m.c(x) if isinstance(x, torch.Tensor) else m.c(x[0]))


def prunable() -> nn.Module:
    model = trained(block()).double()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def attribute(model: nn.Module, name: str, value: object) -> nn.Module:
    module, _, name = name.rpartition(".")
    setattr(model.get_submodule(module), name, value)
    return model


def blocks() -> nn.Module:
    return trained(block()).double()


REFUSALS: dict[str, tuple[Callable[[], nn.Module], dict[str, Reason]]] = {
    "training": (lambda: blocks().train(), {"1": Reason.TRAINING_MODE}),
    "the norm alone in training": (lambda: attribute(blocks(), "1.training", True), {"1": Reason.TRAINING_MODE}),
    "no running statistics": (
        lambda: trained(nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False))).double(),
        {"1": Reason.BATCH_STATISTICS},
    ),
    "called twice": (
        lambda: net(lambda m, x: m.n(m.c(x)) + m.c(x + 1), c=conv(), n=nn.BatchNorm2d(4)), {"n": Reason.SHARED_MODULE},
    ),
    "one convolution, two norms": (
        lambda: net(lambda m, x: m.n(m.c(x)) + m.o(m.c(x + 1)), c=conv(), n=nn.BatchNorm2d(4), o=nn.BatchNorm2d(4)),
        {"n": Reason.SHARED_MODULE, "o": Reason.SHARED_MODULE},
    ),
    "one value, two norms": (
        lambda: net(lambda m, x: two(m.c(x), m), c=conv(), n=nn.BatchNorm2d(4), o=nn.BatchNorm2d(4)),
        {"n": Reason.OTHER_CONSUMER, "o": Reason.OTHER_CONSUMER},
    ),
    "used elsewhere": (
        lambda: net(lambda m, x: used(m.c(x), m), c=conv(), n=nn.BatchNorm2d(4)), {"n": Reason.OTHER_CONSUMER},
    ),
    "returned as well": (
        lambda: net(lambda m, x: torch.cat(both(m.c(x), m)), c=conv(), n=nn.BatchNorm2d(4)),
        {"n": Reason.OTHER_CONSUMER},
    ),
    "a hook on the convolution": (lambda: with_hook(blocks(), "0"), {"1": Reason.HOOKS}),
    "a hook before the convolution": (lambda: with_hook(blocks(), "0", "pre"), {"1": Reason.HOOKS}),
    "a hook behind the convolution, backward": (lambda: with_hook(blocks(), "0", "backward"), {"1": Reason.HOOKS}),
    "a hook on the norm": (lambda: with_hook(blocks(), "1"), {"1": Reason.HOOKS}),
    "a hook on the way": (
        lambda: with_hook(trained(nn.Sequential(conv(), nn.AvgPool2d(2), nn.BatchNorm2d(4))).double(), "1"),
        {"2": Reason.HOOKS},
    ),
    "a hook on a container that ends before the norm": (
        lambda: with_hook(trained(nn.Sequential(nn.Sequential(conv()), nn.BatchNorm2d(4))).double(), "0"),
        {"1": Reason.NO_LINEAR_PRODUCER},
    ),
    "weight_norm": (
        lambda: trained(nn.Sequential(parametrizations.weight_norm(conv()), nn.BatchNorm2d(4))).double(),
        {"1": Reason.PARAMETRIZED},
    ),
    "spectral_norm": (
        lambda: trained(nn.Sequential(parametrizations.spectral_norm(conv()), nn.BatchNorm2d(4))).double(),
        {"1": Reason.PARAMETRIZED},
    ),
    "pruning": (prunable, {"1": Reason.PARAMETRIZED}),
    "other code reads the weight": (reading_weights, {"n": Reason.WEIGHT_READ}),
    "other code calls with the weight": (
        lambda: net(lambda m, x: m.n(m.c(x)) + F.conv2d(-x, m.c.weight), c=conv(), n=nn.BatchNorm2d(4)),
        {"n": Reason.WEIGHT_READ},
    ),
    "a convolution that pads by itself": (
        lambda: trained(nn.Sequential(Padded(3, 4, 3), nn.BatchNorm2d(4))).double(), {"1": Reason.NO_LINEAR_PRODUCER},
    ),
    "a norm that does more": (
        lambda: trained(nn.Sequential(conv(), Doubled(4))).double(), {"1": Reason.OVERRIDDEN},
    ),
    "a forward that was replaced": (
        lambda: unregistered(net(lambda m, x: m.n(m.c(x)), c=conv(), n=nn.BatchNorm2d(4))),
        {"n": Reason.NO_LINEAR_PRODUCER},
    ),
    "zeros between": (
        lambda: trained(nn.Sequential(nn.BatchNorm2d(3), conv(padding=1))).double(), {"0": Reason.PADDING},
    ),
    "an activation between": (
        lambda: trained(nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(4))).double(), {"2": Reason.SHIFT_STAYS},
    ),
    "maxima of negative scales": (
        lambda: trained(nn.Sequential(conv(), nn.MaxPool2d(2), nn.BatchNorm2d(4))).double(),
        {"2": Reason.NEGATIVE_SCALE},
    ),
    "padding that counts": (
        lambda: trained(nn.Sequential(conv(), nn.AvgPool2d(2, padding=1), nn.BatchNorm2d(4))).double(),
        {"2": Reason.PADDING},
    ),
    "dropout in training": (
        lambda: attribute(
            trained(nn.Sequential(conv(), nn.Dropout(0.0), nn.BatchNorm2d(4))).double(), "1.training", True
        ),
        {"2": Reason.DROPOUT_TRAINING},
    ),
    "negative variance": (
        lambda: attribute(blocks(), "1.running_var", torch.tensor([1, -1.0, 1, 1]).double()),
        {"1": Reason.INVALID_VARIANCE},
    ),
    "statistics that are not numbers": (
        lambda: attribute(blocks(), "1.running_mean", torch.tensor([1, float("nan"), 1, 1]).double()),
        {"1": Reason.NOT_FINITE},
    ),
    "changed in place": (
        lambda: net(changed_in_place, n=nn.BatchNorm2d(3), c=conv(3, 1)), {"n": Reason.OTHER_CONSUMER},
    ),
    "changed in place by a sum": (
        lambda: net(summed_in_place, n=nn.BatchNorm2d(3), c=conv(3, 1)), {"n": Reason.OTHER_CONSUMER},
    ),
    "an untraceable forward": (
        lambda: net(lambda m, x: m.n(m.c(x)) if x.sum() > 0 else m.c(x), c=conv(), n=nn.BatchNorm2d(4)),
        {"n": Reason.UNTRACED},
    ),
    "a Sequential that an untraceable forward may take apart": (
        lambda: net(lambda m, x: m.block(x) if x.sum() > 0 else m.block[0](x), block=block()),
        {"block.1": Reason.UNTRACED},
    ),
    "types decide": (lambda: net(type_decides, c=conv(), n=nn.BatchNorm2d(4)), {"n": Reason.UNTRACED}),
    "optional arguments decide": (lambda: Optional_(matters=True), {"n": Reason.NO_LINEAR_PRODUCER}),
    "inside of a module of torch": (
        lambda: net(inner_layer, t=nn.TransformerEncoderLayer(3, 1, 4, batch_first=True), n=nn.BatchNorm1d(4)),
        {"n": Reason.UNTRACED},
    ),
    "not called": (lambda: net(lambda m, x: m.c(x), c=conv(), n=nn.BatchNorm2d(4)), {"n": Reason.NOT_CALLED}),
    "unknown views": (
        lambda: net(
            lambda m, x: m.n(m.c(x).view(-1, 4)), c=conv(), n=nn.BatchNorm1d(4)
        ),
        {"n": Reason.CHANNEL_AXIS_UNPROVEN},
    ),
    "a Linear over pixels": (
        lambda: trained(nn.Sequential(nn.Linear(8, 3), nn.BatchNorm2d(3))).double(), {"1": Reason.CHANNEL_AXIS},
    ),
    "a Linear over positions": (
        lambda: net(lambda m, x: m.n(m.f(x.flatten(2).permute(0, 2, 1))), f=nn.Linear(3, 64), n=nn.BatchNorm1d(64)),
        {"n": Reason.CHANNEL_AXIS},
    ),
    "types that differ": (
        lambda: attribute(nn.Sequential(conv().double(), trained(nn.BatchNorm2d(4))).eval(), "0.bias", None),
        {"1": Reason.TYPE_MISMATCH},
    ),
}  # fmt: skip


def two(y, m):
    return m.n(y) + m.o(y)


def used(y, m):
    return m.n(y) + y


def both(y, m):
    return y, m.n(y)


def inner_layer(m, x):
    x = m.t(x.flatten(2).transpose(1, 2))
    return m.n(m.t.linear1(x).transpose(1, 2))


@pytest.mark.parametrize("case", REFUSALS)
def test_it_is_left_with_a_reason(case):
    build, expected = REFUSALS[case]
    model = build()
    before = bits(model)
    result = fold(model)
    assert reasons(result.report) == expected
    assert not result.report.folds
    assert bits(result.model) == bits(model) == before
    for row in result.report.left:
        assert UNLOCK_MODULE[row.reason] in row.sentence
        assert row.reason.value in str(result.report)
    with pytest.raises(ValueError, match="no record of a fold"):
        unfold(result.model)


# Data of two or three axes


@pytest.mark.parametrize("features", [5, 7])
def test_a_linear_folds_for_matrices_only_and_refuses_other_data_afterwards(features):
    model = trained(nn.Sequential(nn.Linear(3, features), nn.BatchNorm1d(features))).double()
    result = folded(model, inputs(4, 3))
    assert result.report.folds[0].rank == 2
    assert "rank 2 only" in str(result.report)
    assert isinstance(result.model[1], FoldedBatchNorm)
    # As many positions as features: torch's norm takes this, along another axis.
    with pytest.raises(ValueError, match="input has 3 axes, expected 2"):
        result.model(inputs(4, features, 3))


def test_a_convolution_over_one_axis_folds_for_batches_only():
    model = trained(nn.Sequential(nn.Conv1d(3, 5, 1), nn.BatchNorm1d(5))).double()
    result = folded(model, inputs(4, 3, 6))
    with pytest.raises(ValueError, match="input has 2 axes, expected 3"):
        result.model(inputs(3, 5))


def test_no_check_is_left_where_the_network_tells_the_rank():
    model = trained(nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5),
                                  nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 2))).double()  # fmt: skip
    result = folded(model, inputs(2, 3, 4))
    assert [type(result.model[at]) for at in (2, 5)] == [nn.Identity] * 2


def test_calls_with_data_of_different_ranks_are_refused():
    model = net(lambda m, x: m.n(m.f(x.flatten(1))).sum() + m.n(m.c(x.flatten(2))),
                f=nn.Linear(192, 4), c=nn.Conv1d(3, 4, 1), n=nn.BatchNorm1d(4))  # fmt: skip
    assert reasons(fold(model).report) == {"n": Reason.CHANNEL_AXIS_UNPROVEN}


# Runs on example inputs


class Branching(nn.Module):
    """What it computes depends on its input's size, and on its type."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([conv(3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()])
        self.block = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4))
        self.extra = nn.BatchNorm2d(3)
        self.seen: list[torch.Tensor] = []

    def forward(self, x, *, twice=False):
        if x.shape[-1] > 100:
            x = self.extra(x)
        assert isinstance(x, torch.Tensor)
        for layer in self.layers:
            x = layer(x)
        self.seen.append(x)
        x = x[:, [0, 1, 2]]
        return next(block(x) for block in (self.block,))


def test_a_run_shows_what_a_trace_does_not():
    model = trained(Branching()).double()
    assert not fold(model).report.folds
    x = inputs(*IMAGE)
    result = folded(model, x, example_inputs=(x,))
    assert absorbed(result.report) == {"layers.1": ("layers.0",), "block.1": ("block.0",)}
    assert {row.proof for row in result.report.folds} == {"run"}
    assert reasons(result.report) == {"extra": Reason.NOT_CALLED}
    assert "by the example inputs" in str(result.report)


@pytest.mark.parametrize("case", FOLDS)
def test_a_run_agrees_with_the_trace(case):
    model, expected = FOLDS[case]()
    x = inputs(*IMAGE)
    assert absorbed(folded(model, x, example_inputs=x).report) == expected


RUN_DIFFERS = {
    "an untraceable forward": {},
    "a Sequential that an untraceable forward may take apart": {},
    "types decide": {},
    "optional arguments decide": {"n": Reason.NO_LINEAR_PRODUCER},
    "returned as well": {"n": Reason.OTHER_CONSUMER},
    "inside of a module of torch": {"n": Reason.UNTRACED},
}


@pytest.mark.parametrize("case", sorted(set(REFUSALS) - {"types that differ"}))
def test_a_run_does_not_fold_what_must_not_be(case):
    build, expected = REFUSALS[case]
    model, x = build(), inputs(*IMAGE)
    if case.startswith("a Linear over pixels"):
        x = inputs(2, 3, 4, 8)
    with torch.no_grad():
        y = model(x)
        result = fold(model, x)
        assert reasons(result.report) == RUN_DIFFERS.get(case, expected)
        torch.testing.assert_close(result.model(x), y, rtol=1e-11, atol=1e-11, equal_nan=True)


def test_values_that_change_in_place_between_are_seen_by_a_run():
    def forward(m, x):
        y = m.c(x)
        y[:, 0] = 0
        return m.n(y)

    model = net(forward, c=conv(), n=nn.BatchNorm2d(4))
    assert reasons(fold(model).report) == {"n": Reason.UNTRACED}
    assert reasons(fold(model, inputs(*IMAGE)).report) == {"n": Reason.OTHER_CONSUMER}


def test_a_run_leaves_the_network_and_its_buffers_alone():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.n = conv(), nn.BatchNorm2d(4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.last = self.n(self.c(x))
            return self.last

    model = trained(Counting()).double()
    x = inputs(*IMAGE)
    for example in (None, x):
        result = fold(model, example)
        assert len(result.report.folds) == 1
        assert model.calls == result.model.calls == 0
        assert not hasattr(model, "last")
        assert not hasattr(result.model, "last")


# What comes out is an ordinary module


def small() -> nn.Module:
    return trained(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4), nn.MaxPool2d(2),
                                 nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5),
                                 nn.BatchNorm1d(5)))  # fmt: skip


def images() -> torch.Tensor:
    return inputs(*IMAGE).float()


def test_copies_pickles_and_state_dicts():
    model, x = small(), images()
    result = fold(model).model
    expected = result(x)
    for other in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert torch.equal(other(x), expected)
        assert torch.equal(unfold(other)(x), model(x))
    buffer = io.BytesIO()
    torch.save(result.state_dict(), buffer)
    buffer.seek(0)
    fresh = fold(trained(small(), seed=7)).model
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(x), expected)
    assert set(result.state_dict()) == {f"{at}.{name}" for at in (0, 3, 8) for name in ("weight", "bias")} | {
        f"5.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }


def test_compile_and_export():
    model, x = small(), images()
    result = fold(model).model
    expected = model(x)
    compiled = torch.compile(result, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    program = torch.export.export(result, (x,))
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)
    norms = [node for node in program.graph.nodes if "batch_norm" in str(node.target)]
    assert len(norms) == 1


def test_gradients_flow_and_training_mode_stays_out_of_the_way():
    result = fold(small()).model
    result(images()).sum().backward()
    assert result[0].bias.grad is not None


def test_what_is_kept_can_be_left_out():
    model = small()
    kept, bare = fold(model).model, fold(model, reversible=False).model
    assert len(pickle.dumps(bare)) < len(pickle.dumps(kept))
    assert bits(bare) == bits(kept)
    with pytest.raises(ValueError, match="no record of a fold"):
        unfold(bare)
    # Not even what an earlier fold kept.
    with pytest.raises(ValueError, match="no record of a fold"):
        unfold(fold(kept, reversible=False).model)


def test_unfolding_goes_back_over_several_folds():
    model, x = small(), images()
    partial = fold(model, skip=["1"])
    assert reasons(partial.report)["1"] is Reason.SKIPPED
    whole = fold(partial.model)
    assert set(absorbed(whole.report)) == {"1"}
    restored = unfold(whole.model)
    assert bits(restored) == bits(model)
    assert torch.equal(restored(x), model(x))


def test_a_network_that_is_one_norm():
    norm = trained(nn.BatchNorm2d(3))
    result = fold(norm)
    assert reasons(result.report) == {"": Reason.NO_LINEAR_PRODUCER}
    assert "(the model)" in str(result.report)
    identity = nn.BatchNorm2d(3, eps=1e-30).eval()
    result = fold(identity)
    assert isinstance(result.model, nn.Identity)
    assert type(unfold(result.model)) is nn.BatchNorm2d


def test_skipped_layers_stay_and_unknown_names_are_refused():
    model = small()
    assert reasons(fold(model, skip=["0"]).report)["1"] is Reason.SKIPPED
    with pytest.raises(ValueError, match="skip names 'conv', but the model has no such module"):
        fold(model, skip=["conv"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x",), r"model is str, expected a torch\.nn\.Module"),
        ((nn.Identity(), [1]), "example_inputs is list, expected a tuple of arguments or a tensor"),
    ],
)
def test_arguments_of_the_wrong_type(arguments, message):
    with pytest.raises(TypeError, match=message):
        fold(*arguments)
    with pytest.raises(TypeError, match="skip is a string"):
        fold(nn.Identity(), skip="conv")
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        unfold(3)


# Types and values


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_networks_fold_and_what_overflows_is_left(dtype):
    model = trained(block())
    model[0].to(dtype)
    result = fold(model)
    assert result.model[0].weight.dtype is dtype
    assert len(result.report.folds) == 1
    with torch.no_grad():
        model[1].weight.fill_(1e38)
        model[0].weight.fill_(100)
    result = fold(model)
    assert reasons(result.report) == {"1": Reason.OUTSIDE_DTYPE}
    assert bits(result.model) == bits(model)


def test_lazy_layers_fold_once_they_are_built():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)).eval()
    assert reasons(fold(model).report) == {"1": Reason.NO_VALUES}
    with torch.no_grad():
        model(images())
        trained(model).double()
    assert absorbed(folded(model, inputs(*IMAGE)).report) == {"1": ("0",)}


def test_values_that_are_nowhere_are_not_folded():
    model = nn.Sequential(conv(), nn.BatchNorm2d(4)).eval().to("meta")
    assert reasons(fold(model).report) == {"1": Reason.NO_VALUES}


def test_a_norm_that_is_also_read_stays():
    model = net(lambda m, x: m.n(m.c(x)) * m.n.running_var.sum(), c=conv(), n=nn.BatchNorm2d(4))
    assert reasons(fold(model).report) == {"n": Reason.WEIGHT_READ}


def test_hooks_on_all_modules_keep_everything():
    handle = nn.modules.module.register_module_forward_hook(do_nothing)
    try:
        assert reasons(fold(blocks()).report) == {"1": Reason.HOOKS}
    finally:
        handle.remove()


# Against torch's own


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, channels, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv(channels, channels, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.relu(y)


class Dense(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), conv(channels, 8, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(8), conv(8, 4, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.conv2(self.relu(self.norm2(self.conv1(self.relu(self.norm1(x))))))
        return torch.cat([x, y], 1)


def inverted(channels: int) -> nn.Module:
    return nn.Sequential(conv(channels, 16, 1), nn.BatchNorm2d(16), nn.ReLU6(), conv(16, 16, padding=1, groups=16),
                         nn.BatchNorm2d(16), nn.ReLU6(), conv(16, channels, 1), nn.BatchNorm2d(channels))  # fmt: skip


def network() -> nn.Module:
    return trained(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), Residual(8), inverted(8),
                                 Dense(8), Dense(12), nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                 nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)))  # fmt: skip


def test_it_folds_at_least_what_torch_fuses_and_as_exactly():
    model, x = network(), images()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        result, fused = fold(model), fuse(model)
        errors = [float((net(x) - exact).abs().max()) for net in (result.model, fused, model)]
    left = [sum(isinstance(m, NORM) for m in net.modules()) for net in (result.model, fused)]
    assert left[0] < left[1]
    assert reasons(result.report) == {"5.norm1": Reason.OTHER_CONSUMER, "6.norm1": Reason.OTHER_CONSUMER}
    # The original rounds the weights' products once more per value; none of the three is always the best.
    assert errors[0] <= 3 * max(errors[1:])
    assert errors[0] <= 1e-5 * float(exact.abs().max())


# What tracing does not show by itself


class Keeping(nn.Module):
    """Keeps the convolution's output, for somebody to look at."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.c, self.n, self.where, self.seen = conv(), nn.BatchNorm2d(4), where, []

    def forward(self, x):
        y = self.c(x)
        if self.where == "list":
            self.seen.append(y)
        elif self.where == "attribute":
            self.last = y
        return self.n(y)


@pytest.mark.parametrize("where", ["list", "attribute", "nowhere"])
@pytest.mark.parametrize("run", [False, True])
def test_values_that_a_module_keeps_do_not_change(where, run):
    model = trained(Keeping(where)).double()
    report = fold(model, inputs(*IMAGE) if run else None).report
    assert reasons(report) == ({} if where == "nowhere" else {"n": Reason.OTHER_CONSUMER})


class Listed(nn.Module):
    """Calls its norm by another reference than its name."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.n = conv(), nn.BatchNorm2d(4)
        self.again, self.steps = self.n, [self.c, self.n]

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x + self.n.num_batches_tracked * 0


def test_every_reference_to_a_norm_is_folded():
    model = trained(Listed()).double()
    plain = net(lambda m, x: steps_of(m, x), c=conv(), n=nn.BatchNorm2d(4))
    plain.steps = [plain.c, plain.n]
    plain.again = plain.n
    result = folded(plain, inputs(*IMAGE))
    assert absorbed(result.report) == {"n": ("c",)}
    assert result.model.steps[1] is result.model.n is result.model.again
    # Its counter is looked at here.
    assert reasons(fold(model).report) == {"n": Reason.WEIGHT_READ}


def steps_of(m, x):
    for step in m.steps:
        x = step(x)
    return x


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_custom_functions_count_as_users():
    model = net(lambda m, x: cubed(m.c(x), m), c=conv(), n=nn.BatchNorm2d(4))
    for example in (None, inputs(*IMAGE)):
        assert reasons(fold(model, example).report) == {"n": Reason.OTHER_CONSUMER}


def cubed(y, m):
    return m.n(y) + Cube.apply(y)


def test_attributes_that_tensors_lack_do_not_decide():
    model = net(lambda m, x: m.n(m.c(x).tanh() if hasattr(x, "tensors") else m.c(x)), c=conv(), n=nn.BatchNorm2d(4))
    assert reasons(fold(model).report) == {"n": Reason.UNTRACED}
    assert absorbed(folded(model, inputs(*IMAGE), example_inputs=inputs(*IMAGE)).report) == {"n": ("c",)}


def test_layers_that_quantize_their_weights_do_not_fold():
    layer = torch.ao.nn.qat.Conv2d(3, 4, 3, qconfig=torch.ao.quantization.default_qat_qconfig)
    model = nn.Sequential(layer, trained(nn.BatchNorm2d(4))).eval()
    assert reasons(fold(model).report) == {"1": Reason.NO_LINEAR_PRODUCER}


# pybn's own layers


def test_fused_norms_fold_and_leave_their_activation_and_sum():
    layer = BatchNorm2d(4, activation="leaky_relu", negative_slope=0.2)
    model = net(lambda m, x: m.n(m.c(x), m.d(x)), c=conv(), d=conv(), n=layer)
    result = folded(model, inputs(*IMAGE))
    assert absorbed(result.report) == {"n": ("c",)}
    assert isinstance(result.model.n, FoldedEpilogue)
    model = net(lambda m, x: m.d(m.n(x)), d=conv(3, 4, 1), n=BatchNorm2d(3, activation="relu"))
    assert reasons(folded(model, inputs(*IMAGE)).report) == {"n": Reason.NO_LINEAR_PRODUCER}


def test_an_accelerated_network_folds_like_its_original():
    model, x = network(), images()
    plain, fast = fold(model), fold(accelerate(model).model)
    assert fast.report == plain.report
    assert bits(fast.model) == bits(plain.model)
    with torch.no_grad():
        assert torch.equal(fast.model(x), plain.model(x))


@pytest.mark.parametrize(
    ("forward", "exchanged"),
    [
        (lambda m, x: m.c(m.r(m.n(x))), True),
        (lambda m, x: m.c(m.r(m.n(x)) + m.r(x)), False),  # the activation is called elsewhere, too
        (lambda m, x: m.c(F.relu(m.n(x))), False),
    ],
)
def test_norms_that_stay_are_fused_with_the_activation_behind_them(forward, exchanged):
    model = net(forward, c=conv(), n=nn.BatchNorm2d(3), r=nn.ReLU())
    result = fold(model)
    x = inputs(*IMAGE)
    assert result.report.left[0].fused == "relu"
    assert "1 of them fused" in str(result.report)
    assert isinstance(result.model.r, nn.Identity) is exchanged
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-12, atol=1e-12)
        again = fold(result.model)
        assert [row.fused for row in again.report.left] == ["relu"]
        restored = unfold(result.model) if exchanged else again.model
        assert torch.equal(restored(x), model(x)) or not exchanged
    assert {type(m) for m in fold(model, accelerated=False).model.modules()} == {type(m) for m in model.modules()}


def test_norms_that_stay_read_concatenations_that_are_not_made():
    torch.manual_seed(0)
    model = torch_zoo.DenseBlock(torch_zoo.DenseLayer(channels, 8, nn.ReLU) for channels in (4, 12)).eval()
    for layer in model:
        nn.init.uniform_(layer.norm1.running_mean, -0.5, 0.5)
    x = torch.randn(2, 4, 9, 9)
    result = fold(model)
    assert {row.name: row.fused for row in result.report.left} == dict.fromkeys(
        ("0.norm1", "1.norm1"), "concatenation + relu"
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        y = result.model(x)
    assert sum(event.name == "aten::cat" for event in profile.events()) == 1  # of the block itself
    with torch.no_grad():
        torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)
        for other in (copy.deepcopy(result.model), pickle.loads(pickle.dumps(result.model))):
            assert torch.equal(other(x), y)
        restored = unfold(result.model)
        assert torch.equal(restored(x), model(x))
    assert {type(m) for m in restored.modules()} == {type(m) for m in model.modules()}
