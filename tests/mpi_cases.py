"""What `test_mpi.py` runs on several ranks at once: ordinary functions with assertions, one after the other.

Every rank draws the data of all of them from one seed, so each can compute what one process gives on the union.
"""

import contextlib
import copy
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

import pybn
from pybn.mpi import SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
SIZES = (3, 0, 2)  # images of each rank
KINDS = {
    2: (SyncBatchNorm1d, pybn.BatchNorm1d),
    3: (SyncBatchNorm1d, pybn.BatchNorm1d),
    4: (SyncBatchNorm2d, pybn.BatchNorm2d),
    5: (SyncBatchNorm3d, pybn.BatchNorm3d),
}


def batches(*tail, dtype=np.float64, sizes=SIZES, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((n, *tail)) * 2 + 1).astype(dtype) for n in sizes]


def piece(whole, sizes=SIZES):
    return np.split(whole, np.cumsum(sizes)[:-1])[RANK]


def layer_of(channels, ndim=3, **options):
    layer = KINDS[ndim][0](channels, timeout=20, **{"dtype": np.float64, **options})
    if layer.affine:
        rng = np.random.default_rng(7)
        layer.weight[...], layer.bias[...] = rng.uniform(0.5, 2, (2, channels))
    return layer


def union_of(layer, ndim, **options):
    twin = KINDS[ndim][1](layer.num_features, **{"dtype": np.float64, **options})
    twin.load_state_dict(layer.state_dict())
    return twin


def assert_close(actual, expected, tolerance=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@contextlib.contextmanager
def raises(kind, *words):
    with pytest.raises(kind) as caught:
        yield
    for word in words:
        assert word in str(caught.value)


@contextlib.contextmanager
def unchanged(layer):
    before = layer.state_dict()
    yield
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[name], name)


def check_step(*tail, residual=False, sizes=SIZES, steps=1, **options):
    ndim = len(tail) + 1
    layer = layer_of(options.get("channels", tail[0]), ndim, **options)
    reference = union_of(layer, ndim, **options)
    for step in range(steps):
        parts, adds, dys = (batches(*tail, sizes=sizes, seed=3 * step + k) for k in range(3))
        mine = {"residual": adds[RANK]} if residual else {}
        y = layer(parts[RANK], **mine)
        got = layer.backward(dys[RANK])
        expected = reference(np.concatenate(parts), **({"residual": np.concatenate(adds)} if residual else {}))
        gradient = reference.backward(np.concatenate(dys))
        assert_close(y, piece(expected, sizes))
        for ours, theirs in zip(got if residual else [got], gradient if residual else [gradient], strict=True):
            assert_close(ours, piece(theirs, sizes))
    if layer.affine:
        assert_close(WORLD.allreduce(layer.weight_grad), reference.weight_grad)
        assert_close(WORLD.allreduce(layer.bias_grad), reference.bias_grad)
    for name, value in layer.state_dict().items():
        assert_close(value, reference.state_dict()[name])
        assert len(set(WORLD.allgather(value.tobytes()))) == 1, f"the ranks differ in the bits of {name}"


# ---- the same as one process on the union


def every_activation_with_and_without_a_residual():
    for activation in (None, "relu", "relu6", "leaky_relu", "silu", "hardswish"):
        for residual in (False, True):
            check_step(3, 4, activation=activation, residual=residual)


def inputs_of_every_rank():
    for tail in ((5,), (5, 3), (5, 2, 3), (5, 2, 3, 2)):
        check_step(*tail)


def several_steps_and_every_kind_of_state():
    for options in (
        {"momentum": None},
        {"track_running_stats": False},
        {"affine": False},
        {"momentum": 0.7, "eps": 0.1},
    ):
        check_step(3, 4, steps=3, **options)


def more_channels_than_a_block_holds():
    check_step(1300, 1)


def uneven_batches():
    for sizes in ((0, 4, 0), (1, 1, 0), (0, 0, 0), (5, 1, 9)):
        check_step(3, 2, sizes=sizes)


def channels_last():
    layer = layer_of(3, 4, channel_axis=-1)
    parts = batches(4, 4, 3)
    expected = union_of(layer, 4, channel_axis=-1)(np.concatenate(parts))
    assert_close(layer(parts[RANK]), piece(expected))


def float32_is_rounded_once():
    parts, dys = batches(3, 50, dtype=np.float32), batches(3, 50, dtype=np.float32, seed=1)
    layer = layer_of(3, dtype=np.float32)
    reference = KINDS[3][1](3)
    reference.load_state_dict(layer.state_dict())
    y, dx = layer(parts[RANK]), layer.backward(dys[RANK])
    expected = reference(np.concatenate(parts))
    assert_close(y, piece(expected), 1e-6)
    assert_close(dx, piece(reference.backward(np.concatenate(dys))), 1e-6)
    assert y.dtype == dx.dtype == np.float32


def results_in_given_arrays():
    layer = layer_of(3)
    x, dy = batches(3, 4)[RANK], batches(3, 4, seed=1)[RANK]
    expected, dx = layer(x), layer.backward(dy)
    out = np.empty_like(x)
    assert layer(x, out=out) is out
    np.testing.assert_array_equal(out, expected)
    assert layer.backward(dy, out=dy) is dy
    np.testing.assert_array_equal(dy, dx)
    layer(x, out=x)
    np.testing.assert_array_equal(x, expected)
    if x.size:
        with raises(ValueError, "overwritten"):
            layer.backward(dy)
    else:
        with raises((ValueError, RuntimeError)):
            layer.backward(dy)


# ---- communicators


def groups_of_some_ranks():
    comm = WORLD.Split(RANK == 1)
    layer = layer_of(3, comm=comm)
    layer = copy.deepcopy(layer)
    assert layer.comm is comm
    parts = batches(3, 4)
    y = layer(parts[RANK])
    if RANK != 1:
        both = KINDS[3][1](3, dtype=np.float64)
        both.load_state_dict(layer_of(3).state_dict())
        assert_close(y, np.split(both(np.concatenate([parts[0], parts[2]])), [SIZES[0]])[RANK // 2])


def messages_of_the_caller_are_left_alone():
    layer = layer_of(3)
    layer(batches(3, 4)[RANK])
    if RANK == 0:
        layer(batches(3, 4)[RANK])
        assert {WORLD.recv(source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG) for _ in range(SIZE - 1)} == {"from 1", "from 2"}
    else:
        WORLD.send(f"from {RANK}", 0, tag=1)
        layer(batches(3, 4)[RANK])


def evaluation_is_local():
    if RANK == 0:  # the others are not there
        layer = layer_of(3).eval()
        x = batches(3, 4)[0]
        assert_close(layer(x), union_of(layer, 3).eval()(x))
        layer.backward(x)
        untracked = layer_of(3, track_running_stats=False).eval()
        assert_close(untracked(x), union_of(untracked, 3, track_running_stats=False)(x))


# ---- what goes wrong on one rank is an error on all


def one_value_in_all():
    layer = layer_of(3, 3)
    with unchanged(layer), raises(ValueError, "one value per channel on all 3 ranks"):
        layer(np.ones((1 if RANK == 1 else 0, 3)))


def channels_and_dtypes_that_differ():
    layer = layer_of(4 if RANK == 1 else 3)
    with unchanged(layer), raises(ValueError, "number of channels", "3 (rank 0), 4 (rank 1), 3 (rank 2)"):
        layer(np.ones((2, layer.num_features)))
    layer = layer_of(3)
    with unchanged(layer), raises(ValueError, "dtype", "float64 (rank 0), float64 (rank 1), float32 (rank 2)"):
        layer(np.ones((2, 3), np.float32 if RANK == 2 else np.float64))


def bad_arguments_on_one_rank():
    layer = layer_of(3, check_finite=True)
    x = np.ones((2, 3))
    for bad, kind, words in (
        ({"x": np.ones((2, 4))}, ValueError, "3 channels"),
        ({"x": np.ones((2, 3), int)}, TypeError, "int64"),
        ({"x": np.full((2, 3), np.nan)}, ValueError, "not finite"),
        ({"x": x, "residual": np.ones((1, 3))}, ValueError, "residual has shape"),
    ):
        if RANK == 1:
            with unchanged(layer), raises(kind, words):
                layer(**bad)
        else:
            with unchanged(layer), raises(RuntimeError, "rank 1 raised an error"):
                layer(x)
    layer(x)
    if RANK == 1:
        with raises(ValueError, "dy has shape (3, 3), expected (2, 3)"):
            layer.backward(np.ones((3, 3)))
    else:
        with raises(RuntimeError, "backward: rank 1 raised an error"):
            layer.backward(x)


def one_forward_while_the_others_go_back():
    layer = layer_of(3)
    x = np.ones((2, 3))
    layer(x)
    with raises(ValueError, "direction", "backward (rank 0), forward (rank 1), backward (rank 2)"):
        layer(x) if RANK == 1 else layer.backward(x)


def a_rank_that_stays_away():
    comm = WORLD.Dup()
    layer = layer_of(3, comm=comm)
    x = np.ones((2, 3))
    layer(x)
    layer.timeout = 0.5
    if RANK != 1:
        start = time.monotonic()
        with (
            unchanged(layer),
            raises(TimeoutError, "SyncBatchNorm1d(3), call 2, forward", "rank 1 of 3", "empty batch"),
        ):
            layer(x)
        assert time.monotonic() - start > 0.4
    WORLD.Barrier()


def a_rank_that_stays_away_from_the_first_call():
    layer = layer_of(3, comm=WORLD.Dup())
    layer.timeout = 0.2
    if RANK != 1:
        with unchanged(layer), raises(TimeoutError, "all 3 ranks to make their first call"):
            layer(np.ones((2, 3)))
    WORLD.Barrier()


CASES = [
    every_activation_with_and_without_a_residual, inputs_of_every_rank, several_steps_and_every_kind_of_state,
    more_channels_than_a_block_holds, uneven_batches, channels_last, float32_is_rounded_once, results_in_given_arrays,
    groups_of_some_ranks, messages_of_the_caller_are_left_alone, evaluation_is_local, one_value_in_all,
    channels_and_dtypes_that_differ, bad_arguments_on_one_rank, one_forward_while_the_others_go_back,
    a_rank_that_stays_away, a_rank_that_stays_away_from_the_first_call,
]  # fmt: skip

if __name__ == "__main__":
    warnings.simplefilter("error")
    for case in CASES:
        print(RANK, case.__name__, flush=True)
        case()
    Path(sys.argv[1], f"rank{RANK}").write_text("all cases passed")
