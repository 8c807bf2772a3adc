"""Re-estimation on a Dask cluster: the bits of one machine, also if a worker dies on the way."""

import os
import pickle
import signal
import sys
import time

import cloudpickle
import numpy as np
import pytest
from conftest import assert_same_bits

import pybn

distributed = pytest.importorskip("distributed")
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find the tests


class Network:
    def __init__(self):
        rng = np.random.default_rng(7)
        self.weights = rng.standard_normal((6, 5)), rng.standard_normal((5, 4))
        self.layers = [pybn.BatchNorm1d(5, activation="relu"), pybn.BatchNorm1d(4)]

    def __call__(self, x):
        first, second = self.layers
        return second(first(x.astype(np.float32) @ self.weights[0].astype(np.float32)) @ self.weights[1].astype("f"))


def partition(number, marker=None):
    """Batches of unequal sizes; with a marker, the first worker that begins this partition is killed in it."""

    def batches():
        rng = np.random.default_rng(number)
        for size in (8, 3, 5 + number):
            yield rng.standard_normal((size, 6)) * (number + 1) + number
            if marker is not None and not marker.exists():
                marker.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)

    return batches


@pytest.mark.filterwarnings("ignore")  # of the cluster's own, about ports and workers that died
def test_a_cluster_gives_the_bits_of_one_machine_though_a_worker_is_killed(tmp_path):
    marker = tmp_path / "killed"
    here, there = Network(), Network()
    alone = pybn.reestimate(here.layers, partitions=[partition(n) for n in range(8)], forward=here)
    seen = []
    with (
        distributed.LocalCluster(
            n_workers=3, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        pids = set(client.run(os.getpid).values())
        assert len(pids) == 3
        found = pybn.reestimate(
            there.layers,
            partitions=[partition(n, marker if n == 4 else None) for n in range(8)],
            client=client,
            forward=there,
            progress=lambda done, total: seen.append((done, total)),
        )
    assert int(marker.read_text()) in pids, "a worker was killed"
    assert seen == [(n, 8) for n in range(1, 9)]
    assert found.batches == alone.batches == 8
    for name, moments in alone.statistics.items():
        assert found.statistics[name].count == moments.count == 8 * 16 + sum(range(8))
        assert_same_bits(found.statistics[name].mean, moments.mean)
        assert_same_bits(found.statistics[name].m2, moments.m2)
    for ours, theirs in zip(there.layers, here.layers, strict=True):
        assert pickle.dumps(ours.state_dict()) == pickle.dumps(theirs.state_dict())
