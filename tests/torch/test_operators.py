"""torch.compile, torch.export, and operators' own promises."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pybn.torch
from pybn.torch import operators

# torch's compiler and exporter use what torch deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
]

ACTIVATIONS = {None: lambda z: z, "relu": F.relu, "silu": F.silu}


class Stock(nn.Module):
    """torch's own layer with what follows it."""

    def __init__(self, norm, activation):
        super().__init__()
        self.norm, self.activation = norm, activation

    def forward(self, x, residual=None):
        y = self.norm(x)
        return ACTIVATIONS[self.activation](y if residual is None else y + residual)


def pair(activation, **options):
    torch.manual_seed(0)
    stock = nn.BatchNorm2d(5, **options)
    with torch.no_grad():
        for p in stock.parameters():
            p.uniform_(0.5, 1.5)
    layer = pybn.torch.BatchNorm2d(5, activation=activation, **options)
    layer.load_state_dict(stock.state_dict())
    return layer, Stock(stock, activation)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def names(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("with_residual", [True, False])
def test_compiled_training_is_one_graph_and_equals_eager(activation, with_residual):
    layer, stock = pair(activation)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.compile(pair(activation)[0], fullgraph=True, backend=backend)(torch.randn(4, 5, 3, 3))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(4, 5, 3, 3).contiguous(memory_format=memory_format).requires_grad_()
        residual = torch.randn(4, 5, 3, 3).contiguous(memory_format=memory_format).requires_grad_()
        inputs = (x, residual) if with_residual else (x,)
        y, expected = compiled(*inputs), stock(*inputs)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert y.stride() == expected.stride()
        dy = torch.randn_like(y)
        got = torch.autograd.grad(y, [*inputs, *layer.parameters()], dy)
        wanted = torch.autograd.grad(expected, [*inputs, *stock.parameters()], dy)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.state_dict(), stock.norm.state_dict())
    assert sum("pybn.batch_norm" in name for name in names(graphs[0].graph)) == 1


def test_compiled_by_inductor_equals_eager_in_training_and_evaluation():
    layer, stock = pair("relu")
    compiled = torch.compile(layer, fullgraph=True)
    for training in (True, False):
        layer.train(training)
        stock.train(training)
        x = torch.randn(4, 5, 3, 3).requires_grad_()
        y, expected = compiled(x), stock(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        (got,), (wanted,) = (torch.autograd.grad(t.square().sum(), x) for t in (y, expected))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.state_dict(), stock.norm.state_dict())


def test_batch_size_may_vary_without_another_compilation():
    layer, stock = pair("relu")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (4, 6, 9):
            x = torch.randn(batch, 5, batch, 3)
            torch.testing.assert_close(compiled(x), stock(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_exported_program_holds_the_operator_and_equals_eager(strict, training):
    layer, stock = pair("relu")
    layer.train(training)
    stock.train(training)
    x = torch.randn(4, 5, 3, 3)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(
        layer, (x, x), dynamic_shapes={"input": {0: batch}, "residual": {0: batch}}, strict=strict
    )
    assert sum("pybn.batch_norm" in name for name in names(program.graph)) == 1
    other = torch.randn(7, 5, 3, 3)
    module = program.module()
    torch.testing.assert_close(module(other, other), stock(other, other), rtol=1e-5, atol=1e-5)
    if training:
        assert module.state_dict()["num_batches_tracked"] == 1
    torch.testing.assert_close(module.state_dict()["running_var"], stock.norm.running_var)
    mutated = set(program.run_decompositions().graph_signature.buffers_to_mutate.values())
    assert mutated == ({"running_mean", "running_var", "num_batches_tracked"} if training else set())


def test_operators_keep_their_promises():
    for training in (True, False):
        for dtype in (torch.float32, torch.bfloat16):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                x, residual = torch.randn(2, 4, 5, 3, 3).to(dtype).unbind()
                x = x.contiguous(memory_format=memory_format).requires_grad_()
                residual = residual.contiguous(memory_format=memory_format).requires_grad_()
                weight, bias = torch.rand(2, 5).requires_grad_().unbind()
                weight, bias = weight.detach().requires_grad_(), bias.detach().requires_grad_()
                statistics = (torch.rand(5), torch.rand(5))
                torch.library.opcheck(
                    operators.batch_norm, (x, weight, bias, *statistics, residual, training, 0.1, 1e-5, "silu", 0.01)
                )
    saved = operators.batch_norm(x, weight, bias, *statistics, residual, training, 0.1, 1e-5, "relu", 0.01)[1]
    for wanted in ([True] * 4, [False, True, False, False]):
        torch.library.opcheck(
            operators.batch_norm_backward,
            (torch.randn_like(x), x.detach(), weight.detach(), bias.detach(), residual.detach(), saved, training, 1e-5,
             "relu", 0.01, wanted),
        )  # fmt: skip


def test_operators_have_second_derivatives():
    for activation, with_residual in itertools.product(("relu", "silu"), (True, False)):
        x = torch.randn(3, 2, 2, 2, dtype=torch.float64).requires_grad_()
        residual = torch.randn(3, 2, 2, 2, dtype=torch.float64).requires_grad_() if with_residual else None
        weight, bias = (torch.rand(2, dtype=torch.float64).requires_grad_() for _ in range(2))

        def function(x, weight, bias, residual, activation=activation):
            return operators.batch_norm(x, weight, bias, None, None, residual, True, 0.1, 1e-5, activation, 0.01)[0]

        assert torch.autograd.gradcheck(function, (x, weight, bias, residual))
        assert torch.autograd.gradgradcheck(function, (x, weight, bias, residual))
        y = function(x, weight, bias, residual)
        once, twice = (
            torch.autograd.grad(y.square().sum(), (x, weight, bias), create_graph=again, retain_graph=True)
            for again in (False, True)
        )
        torch.testing.assert_close(twice, once)


def test_modes_that_watch_operations_see_the_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    layer, stock = pair("relu")
    x = torch.randn(4, 5, 3, 3).requires_grad_()
    with Watch():
        y = layer(x)
        y.sum().backward()
    torch.testing.assert_close(y, stock(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.state_dict(), stock.norm.state_dict())
    assert "pybn.batch_norm.default" in seen
    assert "pybn.batch_norm_backward.default" in seen


def test_an_empty_batch_through_the_operators():
    layer, stock = pair("relu")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(0, 5, 3, 3).requires_grad_()
    y = compiled(x)
    y.sum().backward()
    stock(x)
    assert y.shape == x.grad.shape == x.shape
    torch.testing.assert_close(layer.state_dict(), stock.norm.state_dict())
