"""What `test_distributed.py` runs on several ranks at once: ordinary functions with assertions, one after the other.

Every rank draws the data of all of them from one seed, so each can compute what one process gives on the union.
"""

import contextlib
import copy
import inspect
import os
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pybn.torch import SyncBatchNorm, accelerate, convert_sync_batchnorm

RANK, SIZE = int(sys.argv[1]), int(sys.argv[2])
SIZES = (3, 0, 2)  # images of each rank
DOUBLE = torch.float64
ACTIVATIONS = {
    None: lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.2),
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def batches(*tail, dtype=DOUBLE, sizes=SIZES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    along = [1, tail[0]] + [1] * (len(tail) - 1)
    spread = torch.rand(along, generator=generator, dtype=DOUBLE) + 0.5
    mean = torch.randn(along, generator=generator, dtype=DOUBLE)
    return [(torch.randn(n, *tail, generator=generator, dtype=DOUBLE) * spread + mean).to(dtype) for n in sizes]


def layer_of(channels, *, dtype=DOUBLE, **options):
    layer = SyncBatchNorm(channels, dtype=dtype, timeout=20, **options)
    generator = torch.Generator().manual_seed(7)
    if layer.affine:
        with torch.no_grad():
            layer.weight.copy_(torch.rand(channels, generator=generator) + 0.5)
            layer.bias.copy_(torch.randn(channels, generator=generator))
    return layer


def union_of(layer):
    """Torch's own layer, with the parameters of `layer`."""
    kind = torch.nn.BatchNorm1d
    twin = kind(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats, dtype=DOUBLE)
    twin._check_input_dim = lambda x: None
    twin.load_state_dict(layer.state_dict())
    return twin


def mine(parts):
    return parts[RANK].clone().requires_grad_()


def piece(whole, sizes=SIZES):
    return whole.split(sizes)[RANK]


def gathered(tensor):
    tensors = [torch.empty_like(tensor) for _ in range(SIZE)]
    dist.all_gather(tensors, tensor.detach().contiguous())
    return tensors


def assert_close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual.to(DOUBLE), expected.to(DOUBLE), rtol=tolerance, atol=tolerance)


@contextlib.contextmanager
def raises(kind, *words):
    with pytest.raises(kind) as caught:
        yield
    for word in words:
        assert word in str(caught.value)


# ---- the same as one process on the union


def check_step(layer, *tail, residual=False, activation=None, sizes=SIZES):
    parts, adds, dys = (batches(*tail, seed=seed, sizes=sizes) for seed in (1, 2, 3))
    reference = union_of(layer)
    x, add = mine(parts), mine(adds) if residual else None
    y = layer(x, add) if residual else layer(x)
    y.backward(dys[RANK])

    whole, whole_add = torch.cat(parts).requires_grad_(), torch.cat(adds).requires_grad_()
    z = reference(whole) + (whole_add if residual else 0)
    expected = ACTIVATIONS[activation](z)
    expected.backward(torch.cat(dys))
    assert_close(y, piece(expected, sizes))
    assert_close(x.grad, piece(whole.grad, sizes))
    if residual:
        assert_close(add.grad, piece(whole_add.grad, sizes))
    if layer.affine:
        for ours, theirs in ((layer.weight, reference.weight), (layer.bias, reference.bias)):
            assert_close(sum(gathered(ours.grad)), theirs.grad)
    if layer.track_running_stats:
        assert layer.num_batches_tracked == reference.num_batches_tracked
        for name in ("running_mean", "running_var"):
            assert_close(getattr(layer, name), getattr(reference, name))
            first, *others = gathered(getattr(layer, name))
            assert all(torch.equal(first, other) for other in others), "the ranks differ in their bits"


def every_activation_with_and_without_a_residual():
    for activation in ACTIVATIONS:
        for residual in (False, True):
            layer = layer_of(3, activation=activation, negative_slope=0.2)
            check_step(layer, 3, 4, 2, activation=activation, residual=residual)


def inputs_of_every_rank():
    for tail in ((5,), (5, 3), (5, 2, 3), (5, 2, 3, 2)):
        check_step(layer_of(5), *tail)


def several_steps_and_every_kind_of_state():
    for options in (
        {"momentum": None},
        {"track_running_stats": False},
        {"affine": False},
        {"momentum": 0.7, "eps": 0.1},
    ):
        layer = layer_of(3, **options)
        for _ in range(3):
            layer.zero_grad()
            check_step(layer, 3, 4)


def more_channels_than_a_block_holds():
    check_step(layer_of(1300), 1300, 1)


def one_rank_with_all_the_data():
    check_step(layer_of(3), 3, 5, sizes=(0, 4, 0))


def one_value_per_rank():
    check_step(layer_of(3), 3, sizes=(1, 1, 0))


def half_types_and_float32():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        for parameters in (torch.float32, dtype):
            layer = layer_of(4, dtype=parameters, activation="relu")
            parts, dys = batches(4, 3, 3, dtype=dtype), batches(4, 3, 3, dtype=dtype, seed=1)
            reference = union_of(layer)
            x = mine(parts)
            y = layer(x)
            y.backward(dys[RANK])
            whole = torch.cat(parts).double().requires_grad_()
            z = reference(whole)
            F.relu(z).backward(torch.cat(dys).double())
            assert y.dtype == x.grad.dtype == dtype
            assert layer.weight.grad.dtype == layer.running_var.dtype == parameters
            assert_close(y, piece(F.relu(z)), tolerance)
            assert_close(x.grad, piece(whole.grad), tolerance)
            assert_close(layer.running_var, reference.running_var, tolerance)


def constant_channels_are_exactly_the_bias():
    layer = layer_of(2, dtype=torch.float32)
    y = layer(torch.full((SIZES[RANK], 2, 7), 1.2e10))
    assert torch.equal(y, layer.bias[:, None].expand_as(y))


def a_large_mean_costs_nothing():
    parts = [part + 1e9 for part in batches(3, 50)]
    whole = torch.cat(parts) - 1e9  # exact
    layer = layer_of(3, affine=False)
    y = layer(parts[RANK])
    assert_close(y, piece(F.batch_norm(whole, None, None, training=True)), 4 * 1e9 * 2**-53)  # the rounded mean
    assert_close(layer.running_var, 0.9 + 0.1 * whole.transpose(0, 1).flatten(1).var(1))


def nan_stays_in_its_channel():
    x = batches(3, 4)[RANK]
    if RANK == 2:
        x[0, 1, 0] = torch.nan
    layer = layer_of(3)
    y = layer(x)
    assert torch.isnan(y[:, 1]).all()
    assert torch.isfinite(y[:, ::2]).all()
    assert torch.isnan(layer.running_mean).tolist() == [False, True, False]


def channels_last_is_kept():
    sizes = (3, 1, 2)  # torch calls an empty tensor contiguous whatever its strides
    x = batches(3, 4, 4, sizes=sizes)[RANK].contiguous(memory_format=torch.channels_last).requires_grad_()
    y = layer_of(3)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def all_batches_empty():
    layer = layer_of(3)
    before = layer.running_mean.clone()
    x = torch.zeros(0, 3, 4, dtype=DOUBLE, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(layer.running_mean, before)
    assert layer.weight.grad.tolist() == layer.bias.grad.tolist() == [0, 0, 0]


def groups_of_some_ranks():
    group = dist.new_group([0, 2])
    layer = layer_of(3, process_group=group)
    parts = batches(3, 4)
    if RANK == 1:
        with raises(ValueError, "no member"):
            layer(parts[RANK])
        return
    layer = copy.deepcopy(layer)
    assert layer.process_group is group
    y = layer(parts[RANK])
    expected = F.batch_norm(torch.cat([parts[0], parts[2]]), None, None, layer.weight, layer.bias, training=True)
    assert_close(y, expected.split([SIZES[0], SIZES[2]])[RANK // 2])


# ---- networks


def network():
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 3, 2),
        torch.nn.BatchNorm2d(3),
    ).double()


def data_parallel_training_is_that_of_one_process():
    plain, synchronised = network(), convert_sync_batchnorm(network(), timeout=20)
    parallel = torch.nn.parallel.DistributedDataParallel(synchronised)
    sizes = (2, 2, 2)  # DistributedDataParallel averages over ranks, whatever they hold
    for step in range(3):
        parts = batches(2, 6, 6, sizes=sizes, seed=step)
        for model, x in ((plain, torch.cat(parts)), (parallel, parts[RANK])):
            model.zero_grad()
            (model(x) ** 2 * torch.arange(3.0)[:, None, None]).mean().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
    for (name, ours), theirs in zip(synchronised.state_dict().items(), plain.state_dict().values(), strict=True):
        assert_close(ours, theirs, 1e-10)
        first, *others = gathered(ours)
        assert all(torch.equal(first, other) for other in others), name


def accelerated_networks_are_trained_by_distributed_data_parallel():
    """Statistics are each rank's own, so every rank checks itself against a stock network in the same arrangement."""
    stock, fused = network(), accelerate(network(), inplace=True).model
    parallels = [torch.nn.parallel.DistributedDataParallel(model) for model in (stock, fused)]
    for step in range(3):
        x = batches(2, 6, 6, sizes=(2, 2, 2), seed=step)[RANK]
        for parallel in parallels:
            parallel.zero_grad()
            (parallel(x) ** 2 * torch.arange(3.0)[:, None, None]).mean().backward()
            with torch.no_grad():
                for parameter in parallel.parameters():
                    parameter -= 0.1 * parameter.grad
    for (name, ours), theirs in zip(fused.state_dict().items(), stock.state_dict().values(), strict=True):
        assert_close(ours, theirs, 1e-10)
        first, *others = gathered(ours)
        assert "running" in name or all(torch.equal(first, other) for other in others), name


# ---- what is not communicated


def evaluation_is_local():
    layer = layer_of(3).eval()
    untracked = layer_of(3, track_running_stats=False).eval()
    if RANK == 0:  # the others are not there
        x = batches(3, 4)[0]
        assert_close(
            layer(x), F.batch_norm(x, torch.zeros(3).double(), torch.ones(3).double(), layer.weight, layer.bias)
        )
        assert_close(untracked(x), F.batch_norm(x, None, None, untracked.weight, untracked.bias, training=True))


def no_gradient_of_the_data_no_exchange():
    layer = layer_of(3)
    y = layer(batches(3, 4)[RANK])
    if RANK == 0:
        y.sum().backward()
        assert_close(layer.bias.grad, torch.full((3,), 4.0 * SIZES[0]))


def without_gradients_only_forward_is_exchanged():
    layer = layer_of(3)
    with torch.no_grad():
        y = layer(mine(batches(3, 4)))
    assert not y.requires_grad
    assert layer.num_batches_tracked == 1
    with torch.inference_mode():
        layer(mine(batches(3, 4)))
    assert layer.num_batches_tracked == 2


# ---- what goes wrong on one rank is an error on all


def state(layer):
    return {name: value.clone() for name, value in layer.state_dict().items()}


@contextlib.contextmanager
def unchanged(layer):
    before = state(layer)
    yield
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def one_value_in_all():
    layer = layer_of(3)
    with unchanged(layer), raises(ValueError, "one value per channel on all 3 ranks"):
        layer(torch.ones(1 if RANK == 1 else 0, 3, dtype=DOUBLE))
    check_step(layer, 3, 4)


def channels_that_differ():
    layer = layer_of(4 if RANK == 1 else 3)
    x = torch.ones(2, layer.num_features, 2, dtype=DOUBLE)
    with unchanged(layer), raises(ValueError, "number of channels", "3 (rank 0), 4 (rank 1), 3 (rank 2)"):
        layer(x)


def dtypes_that_differ():
    layer = layer_of(3)
    x = torch.ones(2, 3, 2, dtype=torch.float32 if RANK == 2 else DOUBLE)
    with unchanged(layer), raises(ValueError, "dtype", "float64 (rank 0), float64 (rank 1), float32 (rank 2)"):
        layer(x)
    check_step(layer_of(3), 3, 4)


def bad_input_on_one_rank():
    for bad, kind in ((torch.ones(2, 4), ValueError), (torch.ones(3), ValueError), (torch.ones(2, 3).int(), TypeError)):
        layer = layer_of(3)
        if RANK == 1:
            with unchanged(layer), raises(kind, "input"):
                layer(bad)
        else:
            with unchanged(layer), raises(RuntimeError, "rank 1 raised an error"):
                layer(torch.ones(2, 3, dtype=DOUBLE))


def calls_left_out():
    first, second = layer_of(3), layer_of(3)
    x = batches(3, 4)[RANK]
    if RANK != 2:
        first(x)
        with raises(ValueError, "how often they have called the layer", "2 (rank 0), 2 (rank 1), 1 (rank 2)"):
            first(x)
    else:
        first(x)
        with raises(ValueError, "how often they have called the layer"):
            second(x)


def a_rank_without_backward_pass():
    layer = layer_of(3)
    x = mine(batches(3, 4))
    with torch.no_grad() if RANK == 1 else contextlib.nullcontext():
        y = layer(x)
    if RANK != 1:
        with raises(RuntimeError, "needs sums from every rank, but rank 1 of 3"):
            y.sum().backward()


def double_backward():
    x = mine(batches(3, 4))
    (dx,) = torch.autograd.grad((layer_of(3)(x) ** 2).sum(), x, create_graph=True)
    with raises(RuntimeError, "once_differentiable"):
        dx.sum().backward()


def a_rank_that_stays_away():
    group = dist.new_group()
    layer = layer_of(3, process_group=group)
    layer.timeout = 1.0
    x = batches(3, 4)[RANK]
    layer(x)
    if RANK != 1:
        start = time.monotonic()
        with unchanged(layer), raises(TimeoutError, "SyncBatchNorm(3), call 2, forward", "rank 1 of 3", "empty batch"):
            layer(x)
        assert time.monotonic() - start > 0.9
    dist.barrier()
    if RANK == 1:
        with raises(ConnectionError, "lost the connection"):  # those who waited have closed it
            layer(x)


def a_rank_that_dies():
    layer = layer_of(3)
    x = mine(batches(3, 4))
    y = layer(x)
    if RANK == 2:
        os._exit(0)
    with raises(ConnectionError, "call 1, backward", "lost the connection to rank 2 of 3"):
        y.sum().backward()


def main():
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=RANK, world_size=SIZE)
    here = sys.modules[__name__]
    helpers = {"check_step", "main"}
    for name, case in vars(here).copy().items():
        is_case = inspect.isfunction(case) and case.__module__ == __name__ and not inspect.signature(case).parameters
        if is_case and name not in helpers | {"network"}:
            print(name, flush=True)
            case()
    Path(sys.argv[4]).write_text("all cases passed")


if __name__ == "__main__":
    main()
