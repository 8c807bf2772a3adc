"""The contenders of `pybn bench` under pytest-benchmark: `pytest benchmarks --benchmark-only`.

For ratios use `pybn bench`, which interleaves the contenders. `-k` selects, say `-k "512x7x7 and backward and nhwc"`.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import pybn
from pybn.bench import ours
from pybn.bench.cases import OPERATIONS, Case, Operation, l2_bytes, shape_list
from pybn.bench.peers import UnsupportedError, find
from pybn.bench.problem import Contender, Problem
from pybn.bench.session import environment

PEERS = ("torch", "onednn", "onnxruntime")
PLAIN = [operation for operation in OPERATIONS.values() if not operation.relu]
# Every fusion in float32; layouts and half types without.
VARIANTS = {
    ("float32", "nchw"): list(OPERATIONS.values()),
    ("float32", "nhwc"): PLAIN,
    ("float16", "nchw"): PLAIN,
    ("bfloat16", "nchw"): PLAIN,
}
CONTENDERS = (ours.COPY, ours.OUT, ours.FRESH, *PEERS)
CASES = [
    pytest.param(*variant, operation, who, id=f"{operation.name}-{'-'.join(variant)}-{who}")
    for variant, operations in VARIANTS.items()
    for operation in operations
    for who in CONTENDERS
]


@pytest.fixture(scope="module", params=shape_list("resnet50"), ids=str)
def problems(request: pytest.FixtureRequest) -> dict[tuple[str, str], Problem]:
    """The data of one shape, made when first used: (dtype, layout) -> problem."""

    class Problems(dict[tuple[str, str], Problem]):
        def __missing__(self, variant: tuple[str, str]) -> Problem:
            self.clear()  # all variants together would not fit everywhere
            self[variant] = Problem(request.param, *variant)
            return self[variant]

    return Problems()


@pytest.mark.parametrize(("dtype", "layout", "operation", "who"), CASES)
def test_batch_norm(
    benchmark: BenchmarkFixture,
    problems: dict[tuple[str, str], Problem],
    dtype: str,
    layout: str,
    operation: Operation,
    who: str,
) -> None:
    """Time one contender; `extra_info` holds what is needed to compare runs."""
    problem = problems[dtype, layout]
    case = Case(operation, problem.shape, dtype, layout)
    contender = _contender(operation, problem, who)
    benchmark.group = str(case)
    benchmark.pedantic(contender.run, rounds=20, warmup_rounds=2)
    bound = 2 * case.bytes * (1 if who == ours.COPY else case.bound(l2_bytes()))
    benchmark.extra_info.update(environment(), threads=pybn.get_num_threads(), **{"least bytes": bound})
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["GB/s"] = bound / benchmark.stats.stats.median / 1e9


def _contender(operation: Operation, problem: Problem, who: str) -> Contender:
    threads = pybn.get_num_threads()
    if who in ours.NAMES:
        return ours.contenders(operation, problem, threads, problem.empty())[who]
    peers, absent = find([who], threads)
    if not peers:
        pytest.skip(absent[who])
    try:
        return peers[0].contender(operation, problem)
    except UnsupportedError as error:
        pytest.skip(str(error))
