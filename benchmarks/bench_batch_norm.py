"""The operations of `cases` under pytest-benchmark: `pytest benchmarks --benchmark-only`.

For ratios use `python benchmarks/ratios.py`, which interleaves the contenders.
"""

from __future__ import annotations

import pytest
from cases import RESNET50, TRAFFIC, Shape, contenders, environment
from pytest_benchmark.fixture import BenchmarkFixture

CASES = [
    ("copy", "memcpy"),
    *((operation, who) for operation in ("forward", "inference", "backward") for who in ("out", "fresh", "torch")),
]


@pytest.fixture(scope="module", params=RESNET50, ids=lambda s: f"{s[0]}x{s[1]}x{s[1]}")
def shape(request: pytest.FixtureRequest) -> Shape:
    """One tensor of the list."""
    return Shape(*request.param)


@pytest.fixture(scope="module")
def functions(shape: Shape) -> dict:
    """All contenders on one shape, made once."""
    return contenders(shape)


@pytest.mark.parametrize(("operation", "who"), CASES)
def test_batch_norm(benchmark: BenchmarkFixture, shape: Shape, functions: dict, operation: str, who: str) -> None:
    """Time one contender; `extra_info` holds what is needed to compare runs."""
    benchmark.group = f"{operation} {shape}"
    benchmark.pedantic(functions[operation, who], rounds=20, warmup_rounds=2)
    traffic = TRAFFIC[operation] * shape.bytes
    benchmark.extra_info.update(environment(), bytes=traffic)
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["GB/s"] = traffic / benchmark.stats.stats.median / 1e9
