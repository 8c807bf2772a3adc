"""`accelerate`: the same numbers, the same parameters, an ordinary module; and every forward pass right or left."""

import copy
import inspect
import io
import operator
import pickle
from functools import partial

import onnx
import pytest
import torch
import torch_zoo
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import pybn.torch
from pybn.torch import accelerate, fold, restore
from pybn.torch.accelerate import Report
from pybn.torch.fold_report import FoldReport
from pybn.torch.forwards import FusedForward


def images(*shape, seed=0):
    return torch.randn(*(shape or (2, 3, 32, 32)), generator=torch.Generator().manual_seed(seed))


def lively(model, seed=0):
    """The model with parameters and statistics away from 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.uniform_(-0.5, 0.5, generator=generator)
    return model


def results(model, *inputs, training=True):
    """Outputs, gradients by name and buffers by name, of one pass."""
    model.train(training)
    model.zero_grad()
    inputs = [x.clone().requires_grad_() for x in inputs]
    torch.manual_seed(5)  # of dropout
    outputs = model(*inputs)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    generator = torch.Generator().manual_seed(6)
    sum((y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in outputs).backward()
    return {
        **{f"output {i}": y.detach() for i, y in enumerate(outputs)},
        **{f"gradient of input {i}": x.grad for i, x in enumerate(inputs)},
        **{f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        **{name: b.clone() for name, b in model.named_buffers()},
    }


def assert_same_results(model, other, *inputs, rtol=1e-9, **kwargs):
    expected, actual = results(model, *inputs, **kwargs), results(other, *inputs, **kwargs)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, value.abs().max().item() if value.numel() else 0.0)  # some gradients are 0 but for rounding
        torch.testing.assert_close(actual[name], value, rtol=0, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}")


def accelerated(model, **kwargs):
    """A copy with parameters of its own, accelerated, and its report; both in float64, where differences are errors."""
    return accelerate(copy.deepcopy(model), inplace=True, **kwargs)


def check(model, *inputs, fused, left=(), **kwargs):
    """Accelerating computes the same, in both modes, and fuses and leaves what it should.

    `fused` is what is fused with every norm, by name; `left` has, by name, words of the reason.
    """
    model = lively(model.double())
    inputs = [x.double() for x in inputs] or [images().double()]
    other, report = accelerated(model, **kwargs)
    assert {layer.name: layer.fused for layer in report.replaced} == {
        name: (what,) if isinstance(what, str) else tuple(what) for name, what in fused.items()
    }
    assert sorted(part.name for part in report.left) == sorted(dict(left))
    for part in report.left:
        assert dict(left)[part.name] in part.reason
    for training in (True, False, True):
        assert_same_results(model, other, *inputs, training=training)
    return other, report


class Block(nn.Module):
    """conv - norm - whatever `after(self, norm's output, x)` does."""

    def __init__(self, after, **modules):
        super().__init__()
        self.conv, self.bn = torch_zoo.conv(3, 3), nn.BatchNorm2d(3)
        self.after = after
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.after(self, self.bn(self.conv(x)), x)


# ---- whole networks

COUNTS = {
    "ResNet-18": "20 batch norms accelerated: 9 relu, 8 sum + relu, 3 alone",
    "ResNet-50": "53 batch norms accelerated: 33 relu, 16 sum + relu, 4 alone",
    "MobileNetV2": "52 batch norms accelerated: 35 relu6, 17 alone",
    "MobileNetV3": "25 batch norms accelerated: 12 hardswish, 5 relu, 8 alone",
    "EfficientNet": "49 batch norms accelerated: 33 silu, 16 alone",
    "DenseNet": "16 batch norms accelerated: 15 relu, 1 alone",
    "GoogLeNet": "16 batch norms accelerated: 16 relu",
    "U-Net": "10 batch norms accelerated: 10 leaky_relu",
}


def test_the_report_tells_what_was_done_to_the_process():
    for make in (Report, partial(FoldReport, ())):
        assert "keeps the memory" in str(make(reuses_memory=True))
        assert "keeps the memory" not in str(make())
    assert not accelerate(nn.ReLU()).report.reuses_memory
    assert not fold(nn.ReLU()).report.reuses_memory


@pytest.mark.parametrize("name", torch_zoo.SMALL)
def test_networks_compute_the_same(name):
    torch.manual_seed(0)
    model = lively(torch_zoo.SMALL[name]().double())
    other, report = accelerated(model)
    assert str(report) == COUNTS[name]
    x = images(2, 3, 64, 64).double()
    for training in (True, False):
        assert_same_results(model, other, x, training=training, rtol=1e-7)


def test_the_order_of_modules_alone_proves_nothing():
    check(Block(lambda self, y, x: y, relu=nn.ReLU()), fused={"bn": ()})


# ---- activations


@pytest.mark.parametrize(
    ("after", "fused"),
    [
        (lambda self, y, x: F.relu(y), "relu"),
        (lambda self, y, x: F.relu(y, True), "relu"),
        (lambda self, y, x: F.relu(y, inplace=True), "relu"),
        (lambda self, y, x: torch.relu(y), "relu"),
        (lambda self, y, x: torch.relu_(y), "relu"),
        (lambda self, y, x: y.relu(), "relu"),
        (lambda self, y, x: y.relu_(), "relu"),
        (lambda self, y, x: F.relu6(y), "relu6"),
        (lambda self, y, x: F.leaky_relu(y), "leaky_relu"),
        (lambda self, y, x: F.leaky_relu(y, 0.3), "leaky_relu"),
        (lambda self, y, x: F.leaky_relu(y, negative_slope=0.3, inplace=True), "leaky_relu"),
        (lambda self, y, x: F.silu(y), "silu"),
        (lambda self, y, x: F.hardswish(y), "hardswish"),
    ],
)  # fmt: skip
def test_functional_activations_are_fused(after, fused):
    check(Block(after), fused={"bn": fused})


@pytest.mark.parametrize(
    ("act", "fused"),
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.ReLU6(inplace=True), "relu6"),
        (nn.LeakyReLU(0.2), "leaky_relu"),
        (nn.SiLU(inplace=True), "silu"),
        (nn.Hardswish(), "hardswish"),
        (nn.GELU(), ()),
        (type("MyReLU", (nn.ReLU,), {"forward": lambda self, x: x.abs()})(), ()),
    ],
)
def test_activation_modules_are_fused_by_exact_class(act, fused):
    check(Block(lambda self, y, x: self.act(y), act=act), fused={"bn": fused})


def test_what_follows_an_operation_in_place_sees_its_result():
    def after(self, y, x):
        y.relu_()
        return y + y.mean()

    check(Block(after), fused={"bn": "relu"})


def test_an_activation_stays_where_the_norm_is_used_elsewhere_too():
    reason = "its output is used 2 times"
    check(Block(lambda self, y, x: F.relu(y) + y), fused={"bn": ()}, left={"bn": reason})

    def before_in_place(self, y, x):
        mean = y.mean()
        return y.relu_() + mean

    check(Block(before_in_place), fused={"bn": ()}, left={"bn": reason})


# ---- sums


@pytest.mark.parametrize(
    ("after", "fused"),
    [
        (lambda self, y, x: F.relu(y + x), "sum + relu"),
        (lambda self, y, x: F.relu(x + y), "sum + relu"),
        (lambda self, y, x: y.add(x).relu_(), "sum + relu"),
        (lambda self, y, x: y.add_(x), "sum"),
        (lambda self, y, x: torch.add(y, x), "sum"),
        (lambda self, y, x: torch.add(x, y, alpha=1), "sum"),
        (lambda self, y, x: F.silu(operator.iadd(y, x)), "sum + silu"),
        (lambda self, y, x: F.hardswish(y + x), "sum + hardswish"),
        (lambda self, y, x: F.leaky_relu(y + x, 0.2), "sum + leaky_relu"),
        (lambda self, y, x: F.relu6(y + x.mean((2, 3), keepdim=True)), "sum + relu6"),  # broadcast
        (lambda self, y, x: (y + x) * 2, "sum"),
    ],
)  # fmt: skip
def test_sums_are_fused(after, fused):
    check(Block(after), fused={"bn": fused})


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (lambda self, y, x: F.relu(torch.add(y, x, alpha=2)), "alpha=2"),
        (lambda self, y, x: F.relu(torch.add(x, y, alpha=-1)), "alpha=-1"),
        (lambda self, y, x: F.relu(y.add(x, alpha=0.5)), "alpha=0.5"),
        (lambda self, y, x: F.relu(y + 1), "a constant is added, 1"),
        (lambda self, y, x: F.relu(y + y), "added to itself"),
        (lambda self, y, x: F.relu(operator.iadd(x * 1, y)), "overwrites"),
    ],
)
def test_other_sums_are_left_with_the_reason(after, reason):
    check(Block(after), fused={"bn": ()}, left={"bn": reason})


def test_a_residual_of_another_type_is_promoted_as_ever():
    model = lively(Block(lambda self, y, x: F.relu(y + x.double())))
    other, _ = accelerated(model)
    assert other(images()).dtype == torch.float64
    torch.testing.assert_close(other(images()), model(images()))


def test_a_sum_is_not_fused_where_the_norms_input_may_change_before():
    def after(self, y, x):
        x = x * 1
        z = self.bn2(x)
        x.mul_(2)
        return F.relu(z + x) + y

    model = lively(Block(after, bn2=nn.BatchNorm2d(3)).double()).eval()
    other, report = accelerated(model)
    assert {part.name: part.reason for part in report.left} == {"bn2": "its input is used elsewhere before the sum"}
    with torch.no_grad():
        torch.testing.assert_close(other(images().double()), model(images().double()), rtol=0, atol=1e-9)


def test_a_norm_called_twice_is_fused_where_it_is_called():
    check(Block(lambda self, y, x: F.relu(y) * self.bn(x * 2)), fused={"bn": "relu"})
    check(Block(lambda self, y, x: F.relu(y) + F.silu(self.bn(x * 2))), fused={"bn": ("relu", "silu")})
    # The first call must stay the first, as the running statistics remember the order; the second one takes the sum.
    check(Block(lambda self, y, x: F.relu(y + self.bn(x * 2))), fused={"bn": "sum + relu"})


# ---- forward passes


def test_an_activation_module_that_others_call_too_still_works_for_them():
    relu = nn.ReLU()
    check(
        nn.Sequential(nn.BatchNorm2d(3), relu, nn.Conv2d(3, 3, 1), relu, nn.BatchNorm2d(3), relu),
        fused={"0": "relu", "4": "relu"},
    )


def test_nested_and_shared_modules():
    shared = nn.Sequential(torch_zoo.conv(3, 3), nn.BatchNorm2d(3), nn.ReLU())
    model = nn.Sequential(shared, nn.Sequential(nn.Sequential(shared), nn.BatchNorm2d(3)), shared)
    check(model, fused={"0.1": "relu", "1.1": ()})


def test_control_flow_that_depends_on_data_is_left_with_what_is_inside_accelerated():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(torch_zoo.conv(3, 3), nn.BatchNorm2d(3), nn.ReLU())
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            if x.sum() > 0:
                x = self.body(x)
            return F.relu(self.bn(x))

    other, _ = check(
        Gate(), fused={"bn": (), "body.1": "relu"}, left={"(model)": "symbolically traced variables cannot be used"}
    )
    assert not isinstance(other.forward, FusedForward)


class Modes(nn.Module):
    """Different passes in different modes, and dropout in all its forms."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.aux = torch_zoo.conv(3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)))
        y = F.dropout(self.dropout(y), 0.3, self.training)
        return (y, F.silu(self.aux(y))) if self.training else y


def test_modes_and_dropout():
    check(Modes(), fused={"bn": "relu", "aux": "silu"})


def test_optional_arguments_lists_and_keywords_are_told_apart():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x, mask=None, *, twice=False, others=()):
            if isinstance(x, (list, tuple)):
                x = sum(x)
            y = F.relu(self.bn(x))
            if mask is not None:
                y = y * mask
            for other in others:
                y = y + other
            return y + y if twice else y

    model = lively(Optional().double())
    other, report = accelerated(model)
    assert report.replaced[0].fused == ("relu",)
    x, mask = images().double(), images(seed=1).double()
    for args, kwargs in [
        ((x,), {}), ((x, mask), {}), ((x,), {"mask": mask}), ((x,), {"twice": True}), ((x, None), {"twice": True}),
        (([x, mask],), {}), (((x, mask, x),), {}), ((x,), {"others": (mask, x)}), ((), {"x": x}),
    ]:  # fmt: skip
        for _ in range(2):
            torch.testing.assert_close(other(*args, **kwargs), model(*args, **kwargs), rtol=0, atol=1e-9)
    assert all(other.forward._variants.values())


def test_an_attribute_that_changes_is_noticed():
    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.relu, self.scale = nn.BatchNorm2d(3), nn.ReLU(), 1.0

        def forward(self, x):
            return self.relu(self.bn(x)) * self.scale

    model = lively(Switch().double())
    other, _ = accelerated(model)
    x = images().double()
    for change in (
        {}, {"scale": 3.0}, {"relu": nn.Tanh()}, {"relu": nn.LeakyReLU(0.5)}, {"bn": nn.BatchNorm2d(3).double()}
    ):  # fmt: skip
        for name, value in change.items():
            setattr(model, name, value)
            setattr(other, name, copy.deepcopy(value))
        assert_same_results(model, other, x)
    for m in (model, other):
        m.relu.negative_slope = 0.25
    assert_same_results(model, other, x)


def test_a_sequential_that_grows_runs_all_of_it():
    model = nn.Sequential(torch_zoo.conv(3, 3), nn.BatchNorm2d(3), nn.ReLU()).double()
    other, _ = accelerated(model)
    x = images().double()
    assert torch.equal(other(x), other[:3](x))
    torch.testing.assert_close(other[:2](x), model[:2](x))
    for m in (model, other):
        m.append(nn.Tanh())
    torch.testing.assert_close(other(x), model(x))


class Counts(Block):
    """Its forward pass changes the module."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Keeps(Block):
    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept


class Appends(Block):
    def __init__(self, after):
        super().__init__(after)
        self.seen = []

    def forward(self, x):
        self.seen.append(self.conv(x))
        return super().forward(x)


class Draws(Block):
    def forward(self, x):
        return super().forward(x) if torch.rand(()) < 2 else x


class Makes(Block):
    def forward(self, x):
        return super().forward(x) + torch.arange(32)


class Asks(Block):
    def forward(self, x):
        y = super().forward(x)
        return y if isinstance(y, torch.Tensor) else x


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Counts, "changes the attribute 'calls'"),
        (Keeps, "changes the attribute 'kept'"),
        (Appends, "changes the attribute 'seen'"),
        (Draws, "draws random numbers"),
        (Makes, "makes a tensor"),
        (Asks, "asks for the type"),
    ],
)
def test_forward_passes_that_do_more_than_compute_are_left(kind, reason):
    model = kind(lambda self, y, x: F.relu(y))
    attributes = {name: copy.copy(value) for name, value in vars(model).items()}
    check(model, fused={"bn": ()}, left={"(model)": reason})
    other, _ = accelerate(kind(lambda self, y, x: F.relu(y)))
    assert set(vars(other)) == set(attributes)
    if kind is Counts:
        other(images())
        other(images())
        assert other.calls == 2
    if kind is Appends:
        assert other.seen == []


def test_a_sum_in_place_is_seen_by_all_who_hold_the_value():
    def after(self, y, x):
        z = y = self.conv(x)
        y += x
        return F.relu(self.bn(z))

    check(Block(after), fused={"bn": "relu"})


def test_a_value_kept_outside_the_module_is_noticed():
    kept = []

    def after(self, y, x):
        kept.append(y)
        return F.relu(y)

    _, report = accelerated(Block(after))
    assert report.left[0].reason == "its forward pass keeps a value for later"
    kept.clear()


def test_random_numbers_are_as_without():
    model = lively(Modes())
    states = torch.get_rng_state()
    other, _ = accelerate(model)
    other(images())
    assert torch.equal(torch.get_rng_state(), states) is False  # dropout has drawn
    torch.set_rng_state(states)
    expected = model(images())[0]
    torch.set_rng_state(states)
    torch.testing.assert_close(other(images())[0], expected)


# ---- what is left


def test_norms_that_are_left_and_why():
    class MyNorm(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    replaced = nn.BatchNorm2d(3)
    replaced.forward = lambda x: x
    parametrized = nn.BatchNorm2d(3)
    parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    model = nn.Sequential(
        MyNorm(3), nn.SyncBatchNorm(3), nn.LazyBatchNorm2d(), nn.BatchNorm2d(3, device="meta"), parametrized, replaced,
        nn.InstanceNorm2d(3), nn.BatchNorm2d(3),
    )  # fmt: skip
    _, report = accelerate(model, inplace=True)
    reasons = [part.reason for part in report.left]
    assert [part.name for part in report.left] == ["0", "1", "2", "3", "4", "5"]
    words = ["MyNorm", "synchronises", "call the model once", "meta", "ParametrizedBatchNorm2d", "has been replaced"]
    for reason, word in zip(reasons, words, strict=True):
        assert word in reason
    assert [layer.name for layer in report.replaced] == ["7"]


def test_a_lazily_built_model_is_accelerated_once_it_is_built():
    model = nn.Sequential(nn.LazyConv2d(3, 1), nn.LazyBatchNorm2d(), nn.ReLU())
    model(images())
    check(model, fused={"1": "relu"})


def test_hooks_see_what_they_have_always_seen():
    torch.manual_seed(0)
    model = lively(torch_zoo.SMALL["ResNet-18"]().double())

    def watch(model, name, seen):
        module = model.get_submodule(name)
        hooks = [module.register_forward_hook(lambda m, args, y: seen.append(y.detach().clone()))]
        if "relu" not in name and "bn" not in name and "downsample" not in name:  # torch refuses those before `+=`
            hooks.append(module.register_full_backward_hook(lambda m, dx, dy: seen.append(dy[0].detach().clone())))
        return hooks

    x = images().double()
    for name in ("bn1", "relu", "layer1.0.bn2", "layer1.0.relu", "layer1.0", "layer2.0.downsample.1", "layer3"):
        before, after = [], []
        early = watch(model, name, before)
        other, _ = accelerated(model)  # copies the hooks, too
        before.clear()
        for hook in early:
            hook.remove()
        module = other.get_submodule(name)
        module._forward_hooks.clear()
        module._backward_hooks.clear()
        for m in (model, other):
            results(m, x)
        watch(other, name, after)  # hooks that come later
        hooks = watch(model, name, before)
        assert_same_results(model, other, x)
        for hook in hooks:
            hook.remove()
        assert len(before) == len(after) > 0
        for expected, actual in zip(before, after, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


def test_a_hooked_norm_is_not_fused():
    model = Block(lambda self, y, x: self.act(y), act=nn.ReLU())
    for name in ("bn", "act"):
        hooked = copy.deepcopy(model)
        hooked.get_submodule(name).register_forward_hook(lambda m, args, y: y * 2)
        check(hooked, fused={"bn": ()}, left={"bn": f"{name} has hooks"})


def test_a_module_whose_forward_has_been_replaced_is_not_fused():
    act = nn.ReLU()
    act.forward = lambda x: x * 3
    check(Block(lambda self, y, x: self.act(y), act=act), fused={"bn": ()}, left={"bn": "act has hooks"})


def test_hooks_that_change_their_norm_keep_working():
    model = nn.Sequential(nn.BatchNorm2d(3))
    model[0].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    model[0].register_forward_hook(lambda m, args, y: y * 2)
    check(model, fused={"0": ()})


# ---- an ordinary module


def test_a_copy_has_the_very_parameters_and_leaves_the_model_as_it_was():
    model = torch_zoo.SMALL["ResNet-18"]()
    classes = [type(module) for module in model.modules()]
    other, _ = accelerate(model)
    assert [type(module) for module in model.modules()] == classes
    assert not any("forward" in vars(module) for module in model.modules())
    for mine, yours in (
        (model.named_parameters(), other.named_parameters()),
        (model.named_buffers(), other.named_buffers()),
    ):
        for (name, a), (other_name, b) in zip(mine, yours, strict=True):
            assert name == other_name
            assert a is b
    assert list(model.state_dict()) == list(other.state_dict())
    assert not set(model.modules()) & set(other.modules())


def test_in_place_changes_the_model_and_restore_undoes_it_exactly():
    model = nn.ModuleDict({"net": torch_zoo.SMALL["ResNet-18"](), "other": Modes()})["net"]
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    text = str(model)
    other, _ = accelerate(model, inplace=True)
    assert other is model
    assert isinstance(model.bn1, pybn.torch.BatchNorm2d)
    assert type(model) is torch_zoo.ResNet
    model(images())
    assert restore(model) is model
    for module, kind, attributes in before:
        assert type(module) is kind
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[name] is value for name, value in attributes.items())
    assert str(model) == text


def test_accelerating_twice_changes_nothing_more():
    model, first = accelerate(torch_zoo.SMALL["ResNet-18"]())
    _, second = accelerate(model, inplace=True)
    assert first.replaced
    assert second.replaced == ()
    assert isinstance(model.forward, FusedForward)
    assert type(restore(model).bn1) is nn.BatchNorm2d


def test_a_copy_a_pickle_and_a_saved_file_are_accelerated_models_of_their_own():
    model = lively(torch_zoo.SMALL["ResNet-18"]().double())
    other, _ = accelerated(model)
    x = images().double()
    expected = results(model, x)
    file = io.BytesIO()
    torch.save(other, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(other), pickle.loads(pickle.dumps(other)), torch.load(file, weights_only=False)
    ):  # fmt: skip
        assert isinstance(twin.forward, FusedForward)
        assert twin.forward.module is twin
        actual = results(twin, x)
        assert twin.forward._variants
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-6, atol=1e-9)
        assert not set(twin.parameters()) & set(other.parameters())
    torch.testing.assert_close(other.bn1.running_mean, lively(torch_zoo.SMALL["ResNet-18"]()).double().bn1.running_mean)
    stock = torch_zoo.SMALL["ResNet-18"]().double()
    stock.load_state_dict(other.state_dict())


def test_it_prints_as_ever():
    model = torch_zoo.SMALL["MobileNetV2"]()
    other, report = accelerate(model)
    assert str(other) == str(model)
    assert str(report).startswith("52 batch norms accelerated")


def test_an_optimiser_made_before_trains_the_accelerated_model():
    torch.manual_seed(0)
    model = lively(torch_zoo.SMALL["ResNet-18"]().double())
    twin = copy.deepcopy(model)
    target = torch.tensor([1, 2, 3, 4])
    losses = []
    for net, accelerates in ((model, False), (twin, True)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        trained = accelerate(net)[0] if accelerates else net
        for _ in range(4):
            loss = F.cross_entropy(trained(images(4, 3, 32, 32).double()), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-7)
    assert losses[3] < losses[0]


def test_a_frozen_norm_stays_frozen():
    model = lively(nn.Sequential(torch_zoo.conv(3, 3), nn.BatchNorm2d(3), nn.ReLU()).double())
    other, _ = accelerated(model)
    for m in (model, other):
        m.train()
        m[1].eval()
        m[1].requires_grad_(False)
        m[1].running_mean.fill_(0.3)
    x = images().double()
    torch.testing.assert_close(other(x), model(x))
    assert other[1].running_mean[0] == 0.3


def test_compiled_and_exported_models_compute_the_same():
    model = lively(nn.Sequential(torch_zoo.conv(3, 3), nn.BatchNorm2d(3), nn.ReLU()).double())
    other, _ = accelerated(model)
    x = images().double()
    assert isinstance(other.forward, FusedForward)
    assert inspect.signature(other.forward) == inspect.signature(model.forward)
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    exported = torch.export.export(other.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), model.eval()(x))


def test_the_average_over_all_batches_is_part_of_a_compiled_graph():
    model = lively(nn.Sequential(torch_zoo.conv(3, 3), nn.BatchNorm2d(3, momentum=None)).double())
    other, _ = accelerated(model)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        x = images(seed=seed).double()
        torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(other.state_dict(), model.state_dict())


def test_a_graph_module_is_accelerated_and_restored():
    model = torch.fx.symbolic_trace(Block(lambda self, y, x: F.relu(y + x)))
    other, _ = check(model, fused={"bn": "sum + relu"})
    assert type(restore(other).bn) is nn.BatchNorm2d
    assert_same_results(model, other, images().double())


class Net(nn.Module):
    """A norm with a sum and an activation behind it, and one that no convolution absorbs."""

    def __init__(self):
        super().__init__()
        self.bn, self.folded = nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), torch_zoo.conv(3, 3))

    def forward(self, x):
        return self.folded(F.relu(self.bn(x) + x))


@pytest.mark.filterwarnings("ignore")  # exporters use what torch deprecates
@pytest.mark.parametrize("dynamo", [True, False])
def test_accelerated_and_folded_models_are_exported_to_onnx_as_standard_operators(tmp_path, dynamo):
    model = lively(Net()).eval()
    with torch.no_grad():
        model.folded[0].bias.fill_(-0.3)  # which padding does not let pass
    other, _ = accelerate(model)
    other.folded = pybn.torch.fold(model.folded).model
    assert isinstance(other.folded[0], pybn.torch.BatchNorm2d)
    x = images(2, 3, 6, 6)
    torch.onnx.export(other, (x,), tmp_path / "model.onnx", dynamo=dynamo, verbose=False)
    exported = onnx.load(tmp_path / "model.onnx")
    kinds = sorted(node.op_type for node in exported.graph.node if node.op_type != "Identity")
    assert kinds == ["Add", "BatchNormalization", "BatchNormalization", "Conv", "Relu", "Relu"]
    (y,) = ReferenceEvaluator(exported).run(None, {exported.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-5, atol=1e-5)


def test_functional_call_uses_the_given_parameters():
    model = lively(Block(lambda self, y, x: F.relu(y)).double())
    other, _ = accelerated(model)
    state = {name: value * 1.5 for name, value in model.state_dict().items() if "num" not in name}
    x = images().double()
    expected = torch.func.functional_call(model, dict(state), (x,))
    torch.testing.assert_close(torch.func.functional_call(other, dict(state), (x,)), expected)


def test_threads_may_run_one_model_that_is_being_traced():
    from concurrent.futures import ThreadPoolExecutor

    model = lively(torch_zoo.SMALL["ResNet-18"]()).eval()
    x = images()
    expected = model(x)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            other, _ = accelerated(model)
            for actual in pool.map(lambda _, other=other: other(x), range(8)):
                torch.testing.assert_close(actual, expected)


def test_something_else_than_a_module_is_a_type_error():
    with pytest.raises(TypeError, match=r"model is a list, expected a torch\.nn\.Module"):
        accelerate([nn.BatchNorm2d(3)])
