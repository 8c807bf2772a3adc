"""Re-estimation on a Dask cluster: the bits of one machine, also if workers die on the way, for every kind of model."""

import os
import signal
import sys
import time

import cloudpickle
import dask
import distributed
import numpy as np
import onnx
import pytest
import torch
from conftest import assert_same_bits
from distributed.utils import get_mp_context
from threadpoolctl import threadpool_info

import pybn
from pybn._one_thread import one_thread

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find the tests
pytestmark = pytest.mark.filterwarnings("ignore")  # of the cluster's own, about ports and workers that died
PARTITIONS, FEATURES = 6, 512

# Workers are forked from a process that has imported this: a killed one is back in no time.
PRELOAD = ["distributed", "onnxruntime", "pybn.stages", "pybn.torch"]


@pytest.fixture(scope="module")
def client():
    """Three workers in processes of their own, of which each runs two partitions at once."""
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        get_mp_context().set_forkserver_preload(PRELOAD)
        with (
            distributed.LocalCluster(
                n_workers=3, threads_per_worker=2, processes=True, dashboard_address=None, silence_logs=50
            ) as cluster,
            distributed.Client(cluster) as client,
        ):
            yield client


class Network:
    """Two linear layers, each with a batch norm, and a recurrent one with a sequence batch norm.

    The first is so large that the bits of its product depend on how many threads compute it.
    """

    def __init__(self):
        rng = np.random.default_rng(7)
        self.weights = [rng.standard_normal(shape) for shape in ((FEATURES, 300), (300, 4), (4, 4))]
        self.layers = [pybn.BatchNorm1d(300, activation="relu"), pybn.BatchRenorm(4), pybn.SequenceBatchNorm(4, 3)]

    def __call__(self, x):
        first, second, recurrent = self.layers
        x = hidden = second(first(x @ self.weights[0]) @ self.weights[1])
        for step in range(3):
            there = np.arange(len(x)) % 3 >= step  # sequences of one, two and three steps
            hidden = np.tanh(x + recurrent(hidden @ self.weights[2], step=step, mask=there))


def numpy_model():
    network = Network()
    return {"model": network.layers, "forward": network}, np.float64


def torch_model():
    torch.manual_seed(7)
    layers = [torch.nn.Linear(FEATURES, 5), torch.nn.BatchNorm1d(5), torch.nn.ReLU(), torch.nn.Linear(5, 4)]
    return {"model": torch.nn.Sequential(*layers, torch.nn.BatchNorm1d(4))}, torch.tensor


def onnx_model():
    rng, make = np.random.default_rng(7), onnx.helper.make_node
    constants = {"w1": rng.standard_normal((FEATURES, 5)), "w2": rng.standard_normal((5, 4))}
    constants |= {"one5": np.ones(5), "zero5": np.zeros(5), "one4": np.ones(4), "zero4": np.zeros(4)}
    nodes = [
        make("MatMul", ["x", "w1"], ["a"]),
        make("BatchNormalization", ["a", "one5", "zero5", "zero5", "one5"], ["b"], name="first"),
        make("Relu", ["b"], ["c"]),
        make("MatMul", ["c", "w2"], ["d"]),
        make("BatchNormalization", ["d", "one4", "zero4", "zero4", "one4"], ["y"], name="second"),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, ["N", FEATURES])],
        [onnx.helper.make_tensor_value_info("y", 1, ["N", 4])],
        [onnx.numpy_helper.from_array(value.astype("f"), name) for name, value in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 15)], ir_version=8)
    return {"model": model}, lambda x: {"x": x}


def partition(number, feed, marker=None):
    """Batches of unequal sizes; with a marker, the first worker that begins this partition is killed in it."""

    def batches():
        rng = np.random.default_rng(number)
        for size in (64, 3, 9 + number):
            yield feed((rng.standard_normal((size, FEATURES)) * (number + 1) + number).astype("f"))
            if marker is not None and not marker.exists():
                marker.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)  # so that others begin meanwhile

    return batches


@pytest.mark.parametrize("make", [numpy_model, torch_model, onnx_model])
def test_a_cluster_gives_the_bits_of_one_machine_though_a_worker_is_killed(client, tmp_path, make):
    marker, seen = tmp_path / "killed", []
    arguments, feed = make()
    alone = pybn.reestimate(**arguments, partitions=[partition(n, feed) for n in range(PARTITIONS)])
    pids = set(client.run(os.getpid).values())
    arguments, feed = make()
    found = pybn.reestimate(
        **arguments,
        partitions=[partition(n, feed, marker if n == 2 else None) for n in range(PARTITIONS)],
        client=client,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert int(marker.read_text()) in pids, "a worker was killed"
    assert seen == [(n, PARTITIONS) for n in range(1, PARTITIONS + 1)]
    assert found.batches == alone.batches == PARTITIONS
    assert list(found.statistics) == list(alone.statistics)
    assert next(iter(found.statistics.values())).count == PARTITIONS * 76 + sum(range(PARTITIONS))
    for name, moments in alone.statistics.items():
        assert found.statistics[name].count == moments.count
        for what in ("mean", "remainder", "m2"):
            assert_same_bits(getattr(found.statistics[name], what), getattr(moments, what), name)
    if make is onnx_model:
        assert found.model.SerializeToString(deterministic=True) == alone.model.SerializeToString(deterministic=True)


def test_one_thread_inside_and_as_many_as_before_outside():
    def counts():
        return torch.get_num_threads(), [
            pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"
        ]

    before = counts()
    with one_thread():
        with one_thread():
            assert counts() == (1, [1] * len(before[1]))
        assert counts() == (1, [1] * len(before[1])), "another partition still runs"
    assert counts() == before
