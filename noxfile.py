"""Tasks a maintainer does more than once: `nox -l` lists them, `nox -s NAME` runs one."""

from __future__ import annotations

import nox

nox.options.sessions = ["lint", "tests"]
nox.options.default_venv_backend = "venv"


@nox.session(python=["3.10", "3.11", "3.12", "3.13", "3.14"])
def tests(session: nox.Session) -> None:
    """The test suite on every supported Python."""
    session.install(".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def oldest(session: nox.Session) -> None:
    """The core with the oldest NumPy that is supported."""
    session.install(".", "numpy==1.25.*", "pytest", "pytest-benchmark", "hypothesis", "ml-dtypes", "torch==2.13.0")
    session.run("pytest", "tests/test_forward.py", "tests/test_backward.py", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style of Python and C++, and types."""
    session.install(".[onnx,cli,dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run(
        "bash", "-c", "clang-format --dry-run -Werror csrc/*.h csrc/*.cpp pybn/bench/peers/*.cpp", external=True
    )
    session.run("mypy")


@nox.session
def fuzz(session: nox.Session) -> None:
    """The property tests with a hundred times as many examples, from new random seeds."""
    session.install(".[test]")
    session.run("pytest", "--hypothesis-profile=fuzz", *(session.posargs or ["tests"]))


@nox.session(venv_backend="none")
def sanitize(session: nox.Session) -> None:
    """The whole core under the address and undefined-behaviour sanitizers, with both compilers."""
    for compiler in session.posargs or ["g++", "clang++"]:
        session.run("bash", "tools/sanitize", compiler, "tests", "--ignore=tests/folding", external=True)


@nox.session
def package(session: nox.Session) -> None:
    """Source distribution and wheel."""
    session.install("build")
    session.run("python", "-m", "build")


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Every table and the picture of `pybn bench`, with all peers: a quarter of an hour; or what follows `--`."""
    session.install(".[test,peers]")
    session.run("pybn", "bench", *(session.posargs or ["--json", "bench.json", "--plot", "bench.png"]))


@nox.session
def folders(session: nox.Session) -> None:
    """The tables of docs/folders.md: an hour; or what follows `--`."""
    session.install(".[folders]")
    if session.posargs:
        session.run("python", "benchmarks/folders.py", *session.posargs)
    else:
        session.run("python", "benchmarks/folders.py", "--markdown")
        session.run("python", "benchmarks/folders.py", "--speed", "--markdown")


@nox.session
def regressions(session: nox.Session) -> None:
    """Whether pybn has become slower than benchmarks/baseline.json says, on the machine that wrote it."""
    session.install(".[bench]")
    session.run("pybn", "bench", "--compare", "benchmarks/baseline.json", *session.posargs)


@nox.session
def example(session: nox.Session) -> None:
    """Train and export the example model anew."""
    session.install(".[test]")
    session.run("python", "-m", "examples.train_mnist_cnn", *session.posargs)


@nox.session
def experiments(session: nox.Session) -> None:
    """What batch norm does: every figure of docs/what-batch-norm-does.md and docs/figures/results.json, anew."""
    session.install(".[test]")
    session.run("python", "-m", "examples.all", *session.posargs)
