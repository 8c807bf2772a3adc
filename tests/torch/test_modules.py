"""The layers: everything that works with torch's own works with ours, and with the same results."""

import copy
import gc
import io
import pickle

import pytest
import torch
from conftest import run_python
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.testing._internal.common_modules import module_db
from torch.utils.checkpoint import checkpoint

import pybn.torch

LAYERS = {
    pybn.torch.BatchNorm1d: (nn.BatchNorm1d, (6, 5, 7)),
    pybn.torch.BatchNorm2d: (nn.BatchNorm2d, (4, 5, 3, 4)),
    pybn.torch.BatchNorm3d: (nn.BatchNorm3d, (3, 5, 2, 3, 4)),
}
layers = pytest.mark.parametrize(
    ("ours", "theirs", "shape"), [(o, t, s) for o, (t, s) in LAYERS.items()], ids=lambda v: getattr(v, "__name__", "")
)


def randomized(module):
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return module


def pair(ours, theirs, *args, **options):
    """A layer of each, with the same state."""
    torch.manual_seed(0)
    stock = randomized(theirs(*args, **options))
    layer = ours(*args, **options)
    layer.load_state_dict(stock.state_dict())
    return layer, stock


def assert_same_state(layer, stock):
    assert list(layer.state_dict()) == list(stock.state_dict())
    for name, value in stock.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value, msg=lambda m, n=name: f"{n}: {m}")


@layers
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"momentum": 0.3, "eps": 1e-2},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_training_then_evaluation_equals_torchs(ours, theirs, shape, options):
    layer, stock = pair(ours, theirs, 5, **options)
    assert isinstance(layer, theirs)
    for step in range(4):
        if step == 3:
            layer.eval()
            stock.eval()
        x = torch.randn(shape, dtype=options.get("dtype")).requires_grad_()
        y, expected = layer(x), stock(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        dy = torch.randn_like(x)
        wanted = torch.autograd.grad(expected, [x, *stock.parameters()], dy)
        got = torch.autograd.grad(y, [x, *layer.parameters()], dy)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        assert_same_state(layer, stock)


def test_torchs_own_module_inputs_give_torchs_own_results():
    count = 0
    for theirs in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        (info,) = [m for m in module_db if m.module_cls is theirs]
        ours = getattr(pybn.torch, theirs.__name__)
        for training in (True, False):
            for given in info.module_inputs_func(
                info, device="cpu", dtype=torch.float32, requires_grad=True, training=training
            ):
                args, kwargs = given.constructor_input.args, given.constructor_input.kwargs
                layer, stock = pair(ours, theirs, *args, **kwargs)
                layer.train(training)
                stock.train(training)
                inputs = given.forward_input.args
                torch.testing.assert_close(layer(*inputs), stock(*inputs), rtol=1e-5, atol=1e-5)
                assert_same_state(layer, stock)
                count += 1
    assert count > 20


def test_activation_and_residual_follow_in_the_same_call():
    layer, stock = pair(pybn.torch.BatchNorm2d, nn.BatchNorm2d, 5)
    x, residual = torch.randn(2, 4, 5, 3, 3).unbind()
    layer.activation = "leaky_relu"
    layer.negative_slope = 0.3
    torch.testing.assert_close(layer(x, residual), F.leaky_relu(stock(x) + residual, 0.3), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="activation is 'tanh', expected one of None, 'relu'"):
        pybn.torch.BatchNorm2d(5, activation="tanh")


def test_wrong_ranks_are_refused_as_torch_does():
    for ours, (_, shape) in LAYERS.items():
        with pytest.raises(ValueError, match=r"expected .*input"):
            ours(5)(torch.randn(2, 5, *[3] * (len(shape) + 1)))


def test_one_value_per_channel_is_refused_before_anything_changes():
    layer = pybn.torch.BatchNorm1d(5)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1, 5))
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_mean, torch.zeros(5))


def test_an_empty_batch_counts_as_a_batch_as_in_torch():
    layer, stock = pair(pybn.torch.BatchNorm2d, nn.BatchNorm2d, 5)
    x = torch.randn(0, 5, 3, 3)
    assert layer(x).shape == stock(x).shape
    assert_same_state(layer, stock)
    assert layer.num_batches_tracked == 1


def test_copies_pickles_and_files_are_equal_layers():
    layer = randomized(pybn.torch.BatchNorm2d(5, activation="leaky_relu", negative_slope=0.3))
    layer(torch.randn(4, 5, 3, 3))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        x = torch.randn(4, 5, 3, 3)
        assert torch.equal(copy.deepcopy(layer)(x), other(x))
        assert (other.activation, other.negative_slope) == ("leaky_relu", 0.3)
        assert other.weight is not layer.weight


def test_state_dicts_travel_both_ways_with_weights_only():
    for source, target in ((pybn.torch.BatchNorm2d, nn.BatchNorm2d), (nn.BatchNorm2d, pybn.torch.BatchNorm2d)):
        layer = randomized(source(5))
        layer(torch.randn(4, 5, 3, 3))
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        other = target(5)
        assert other.load_state_dict(torch.load(file, weights_only=True))
        assert_same_state(other, layer)


def test_to_another_type_equals_torchs():
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        layer, stock = pair(pybn.torch.BatchNorm2d, nn.BatchNorm2d, 5)
        layer.to(dtype)
        stock.to(dtype)
        x = torch.randn(4, 5, 3, 3, dtype=dtype)
        torch.testing.assert_close(layer(x), stock(x), rtol=2e-2, atol=2e-2)
        for name, value in stock.state_dict().items():
            assert layer.state_dict()[name].dtype == value.dtype
            torch.testing.assert_close(layer.state_dict()[name], value, rtol=1e-2, atol=1e-2)


def test_half_data_with_float32_parameters_equals_torchs():
    for dtype in (torch.bfloat16, torch.float16):
        layer, stock = pair(pybn.torch.BatchNorm2d, nn.BatchNorm2d, 5)
        x = torch.randn(4, 5, 3, 3, dtype=dtype)
        torch.testing.assert_close(layer(x), stock(x), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(layer.running_mean, stock.running_mean, rtol=1e-2, atol=1e-3)
        assert layer.running_mean.dtype == torch.float32


def test_functional_call_uses_and_updates_the_given_state():
    layer = pybn.torch.BatchNorm2d(5)
    state = {name: value.clone() for name, value in randomized(pybn.torch.BatchNorm2d(5)).state_dict().items()}
    x = torch.randn(4, 5, 3, 3)
    expected_state = {name: value.clone() for name, value in state.items()}
    expected = torch.func.functional_call(nn.BatchNorm2d(5), expected_state, (x,))
    torch.testing.assert_close(torch.func.functional_call(layer, state, (x,)), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, expected_state)
    assert layer.num_batches_tracked == 0


# torch's own derivatives for forward mode are written in TorchScript, of which it warns.
ignore_torchscript = pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")


@ignore_torchscript
def test_functorchs_transformations_equal_torchs():
    layer, stock = pair(pybn.torch.BatchNorm2d, nn.BatchNorm2d, 5)
    layer.eval()
    stock.eval()
    x = torch.randn(3, 4, 5, 3, 3)
    parameters = dict(stock.named_parameters())

    def loss(module, parameters, x):
        return torch.func.functional_call(module, (parameters, dict(module.named_buffers())), (x,)).square().sum()

    for transform in (
        lambda f: torch.func.grad(f)(parameters, x[0]),
        lambda f: torch.func.vmap(lambda x: f(parameters, x))(x),
        lambda f: torch.func.vmap(lambda x: torch.func.grad(f)(parameters, x))(x),
        lambda f: torch.func.jvp(lambda x: f(parameters, x), (x[0],), (x[1],)),
    ):
        got, wanted = (
            transform(lambda parameters, x, module=module: loss(module, parameters, x)) for module in (layer, stock)
        )
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_batched_gradients_equal_torchs():
    layer, stock = pair(pybn.torch.BatchNorm2d, nn.BatchNorm2d, 5)
    layer.activation = "relu"
    x = torch.randn(4, 5, 3, 3).requires_grad_()
    dy = torch.randn(3, 4, 5, 3, 3)
    (got,) = torch.autograd.grad(layer(x), x, dy, is_grads_batched=True)
    (wanted,) = torch.autograd.grad(F.relu(stock(x)), x, dy, is_grads_batched=True)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@ignore_torchscript
def test_forward_mode_derivatives_equal_torchs():
    layer, stock = pair(pybn.torch.BatchNorm2d, nn.BatchNorm2d, 5)
    x, tangent = torch.randn(2, 4, 5, 3, 3).unbind()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        got, wanted = (torch.autograd.forward_ad.unpack_dual(m(dual)).tangent for m in (layer, stock))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant):
    layer = randomized(pybn.torch.BatchNorm2d(5, activation="relu"))
    other = copy.deepcopy(layer)
    x, residual = torch.randn(2, 4, 5, 3, 3).requires_grad_().unbind()
    inputs = (x.detach().requires_grad_(), residual.detach().requires_grad_())
    got = checkpoint(layer, *inputs, use_reentrant=reentrant)
    got.square().sum().backward()
    wanted = torch.autograd.grad(other(*inputs).square().sum(), [*inputs, *other.parameters()])
    torch.testing.assert_close([t.grad for t in (*inputs, *layer.parameters())], list(wanted))


def test_hooks_see_what_they_see_with_torchs_layer():
    layer, stock = pair(pybn.torch.BatchNorm2d, nn.BatchNorm2d, 5)
    seen = {}
    for module in (layer, stock):
        record = seen[module] = []
        module.register_forward_pre_hook(lambda m, args, r=record: r.append(args[0].sum()))
        module.register_forward_hook(lambda m, args, y, r=record: r.append(y.square().sum()))
        module.register_full_backward_hook(lambda m, dx, dy, r=record: r.extend([dx[0].abs().sum(), dy[0].sum()]))
        module.weight.register_hook(lambda g, r=record: r.append(g.sum()))
        x = torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
        (module(x) ** 3).sum().backward()
    assert len(seen[layer]) == len(seen[stock]) == 5
    torch.testing.assert_close(sorted(seen[layer]), sorted(seen[stock]), rtol=1e-4, atol=1e-4)


def test_parametrized_weights_are_used():
    layer, stock = pair(pybn.torch.BatchNorm2d, nn.BatchNorm2d, 5)

    class Exponential(nn.Module):
        def forward(self, weight):
            return weight.exp()

    for module in (layer, stock):
        parametrize.register_parametrization(module, "weight", Exponential())
    x = torch.randn(4, 5, 3, 3)
    torch.testing.assert_close(layer(x), stock(x), rtol=1e-5, atol=1e-5)
    layer(x).square().sum().backward()
    stock(x).square().sum().backward()
    torch.testing.assert_close(
        layer.parametrizations.weight.original.grad, stock.parametrizations.weight.original.grad, rtol=1e-4, atol=1e-4
    )


def test_frozen_parameters_get_no_gradients():
    layer = randomized(pybn.torch.BatchNorm2d(5, activation="relu")).eval()
    layer.weight.requires_grad_(False)
    x = torch.randn(4, 5, 3, 3).requires_grad_()
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None
    layer.requires_grad_(False)
    assert not layer(x.detach()).requires_grad


def test_no_grad_and_inference_mode_record_nothing():
    layer, stock = pair(pybn.torch.BatchNorm2d, nn.BatchNorm2d, 5)
    x = torch.randn(4, 5, 3, 3)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y, expected = layer(x), stock(x)
        assert not y.requires_grad
        assert y.is_inference() == expected.is_inference()
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert_same_state(layer, stock)


def test_meta_tensors_and_fake_tensors_give_shapes():
    x = torch.randn(4, 5, 3, 3, device="meta")
    for layer in (pybn.torch.BatchNorm2d(5, device="meta", activation="relu"), nn.BatchNorm2d(5, device="meta")):
        assert layer(x).shape == x.shape
        assert layer(x).device.type == "meta"
    with torch._subclasses.FakeTensorMode():
        fake = torch.randn(4, 5, 3, 3).to(memory_format=torch.channels_last)
        y = pybn.torch.BatchNorm2d(5, activation="relu")(fake)
    assert type(y) is type(fake)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_subclasses_and_unusual_kinds_of_tensors_are_left_to_torch():
    class Logged(torch.Tensor):
        pass

    layer, stock = pair(pybn.torch.BatchNorm2d, nn.BatchNorm2d, 5)
    x = torch.randn(4, 5, 3, 3).as_subclass(Logged)
    assert type(layer(x)) is type(stock(x)) is Logged
    torch.testing.assert_close(layer(x), stock(x), rtol=1e-5, atol=1e-5)
    negative = torch.randn(4, 5, 3, 3, dtype=torch.complex64).conj().imag  # a view that negates when it is read
    assert negative.is_neg()
    torch.testing.assert_close(layer(negative), stock(negative), rtol=1e-5, atol=1e-5)
    residual = torch.randn(4, 5, 3, 3)
    torch.testing.assert_close(layer(residual, negative), stock(residual) + negative, rtol=1e-5, atol=1e-5)


def test_a_traced_layer_computes_in_torchs_operations():
    layer, stock = pair(pybn.torch.BatchNorm2d, nn.BatchNorm2d, 5)
    layer.eval()
    stock.eval()
    x = torch.randn(4, 5, 3, 3)
    with pytest.warns(DeprecationWarning, match="jit"):
        traced = torch.jit.trace(layer, x)
    other = torch.randn(2, 5, 7, 7)
    torch.testing.assert_close(traced(other), stock(other), rtol=1e-5, atol=1e-5)


def test_torch_fx_traces_the_layer_as_a_leaf_as_it_does_torchs():
    layer, stock = pair(pybn.torch.BatchNorm2d, nn.BatchNorm2d, 5)
    layer.eval()
    stock.eval()
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Identity(), layer))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    x = torch.randn(4, 5, 3, 3)
    torch.testing.assert_close(traced(x), stock(x), rtol=1e-5, atol=1e-5)
    assert isinstance(traced.get_submodule("1"), pybn.torch.BatchNorm2d)


def test_from_torch_shares_parameters_buffers_and_settings():
    stock = randomized(nn.BatchNorm2d(5, eps=1e-3, momentum=None))
    stock.eval()
    calls = []
    stock.register_forward_hook(lambda *_: calls.append(1))
    layer = pybn.torch.BatchNorm2d.from_torch(stock, "leaky_relu", 0.2)
    x = torch.randn(4, 5, 3, 3)
    assert layer.weight is stock.weight
    assert layer.running_var is stock.running_var
    torch.testing.assert_close(layer(x), F.leaky_relu(stock(x), 0.2), rtol=1e-5, atol=1e-5)
    assert len(calls) == 2
    layer.train()
    assert not stock.training
    layer.register_parameter("extra", nn.Parameter(torch.ones(1)))
    assert not hasattr(stock, "extra")
    with pytest.raises(TypeError, match="module is a Linear, expected a batch norm layer"):
        pybn.torch.BatchNorm2d.from_torch(nn.Linear(2, 2))


def test_representation_says_what_torchs_does_and_the_activation():
    stock = repr(nn.BatchNorm2d(5, eps=1e-3))
    assert repr(pybn.torch.BatchNorm2d(5, eps=1e-3)) == stock
    assert repr(pybn.torch.BatchNorm2d(5, eps=1e-3, activation="leaky_relu")) == (
        stock[:-1] + ", activation='leaky_relu', negative_slope=0.01)"
    )


def test_a_layer_without_a_bias_is_possible_where_torch_has_one():
    layer, stock = pair(pybn.torch.BatchNorm2d, nn.BatchNorm2d, 5, bias=False)
    x = torch.randn(4, 5, 3, 3)
    torch.testing.assert_close(layer(x), stock(x), rtol=1e-5, atol=1e-5)
    assert layer.bias is None


def test_distributed_data_parallel_trains_it_as_torchs_layer():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        layer, stock = pair(pybn.torch.BatchNorm2d, nn.BatchNorm2d, 5)
        x = torch.randn(4, 5, 3, 3)
        for module in (layer, stock):
            parallel = nn.parallel.DistributedDataParallel(module)
            parallel(x).square().sum().backward()
        torch.testing.assert_close(layer.weight.grad, stock.weight.grad, rtol=1e-4, atol=1e-4)
        assert_same_state(layer, stock)
    finally:
        # Freed later, by Python, it would wait for its thread while that waits for Python: a rare deadlock.
        parallel = None
        gc.collect()
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("order", ["torch, pybn.torch", "pybn.torch, torch"])
def test_one_pool_of_threads_serves_both_libraries_and_torchs_limit_holds_in_every_thread(order, tmp_path):
    code = f"""
import os, threading, time
import {order}
layer, x = pybn.torch.BatchNorm2d(64), torch.randn(8, 64, 64, 64)

counts, alone = [], len(os.listdir("/proc/self/task"))

def count(call):
    before = len(os.listdir("/proc/self/task"))
    call()
    counts.append(len(os.listdir("/proc/self/task")) - before)

torch.set_num_threads(1)
count(lambda: layer(x))
thread = threading.Thread(target=count, args=[lambda: layer(x)])
thread.start()
thread.join()
while len(os.listdir("/proc/self/task")) > alone:  # until the system has ended it, too
    time.sleep(0.01)
torch.set_num_threads(3)
count(lambda: x.clone().mul_(2))
count(lambda: layer(x))
print(*counts)
"""
    # One thread: none is added. Three: torch adds two, and they serve pybn, too.
    assert run_python(code, tmp_path, {"OMP_NUM_THREADS": "3"}) == "0 0 2 0"
