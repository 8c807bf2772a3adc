"""pybn.mpi: what several ranks do (in `mpi_cases.py`), and what one does alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import run_python

CASES = Path(__file__).with_name("mpi_cases.py")
RANKS = 3


def run_ranks(arguments, tmp_path, timeout=120):
    """The output of `arguments` on RANKS ranks, which must succeed."""
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert mpiexec, "the package mpich brings mpiexec"
    result = subprocess.run(
        [mpiexec, "-n", str(RANKS), sys.executable, "-W", "error", "-m", "mpi4py", *map(str, arguments)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_three_ranks_give_what_one_process_gives_on_the_union(tmp_path):
    run_ranks([CASES, tmp_path], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"rank{rank}" for rank in range(RANKS)]


# In a process of its own, so that MPI does not start in the one that runs the tests.
ALONE = """
import numpy as np
import pybn
from pybn.mpi import SyncBatchNorm2d

layer, plain = SyncBatchNorm2d(3, activation="relu"), pybn.BatchNorm2d(3, activation="relu")
x = np.random.default_rng(0).standard_normal((2, 3, 4, 4), dtype=np.float32)
assert np.array_equal(layer(x), plain(x)) and np.array_equal(layer.backward(x), plain.backward(x))
assert isinstance(layer, pybn.BatchNorm2d) and repr(layer) == "Sync" + repr(plain)
for wrong in (3, "world"):
    try:
        SyncBatchNorm2d(3, comm=wrong)
    except TypeError as error:
        assert "expected an mpi4py.MPI.Intracomm" in str(error)
    else:
        raise AssertionError(wrong)
try:
    SyncBatchNorm2d(3, timeout=0)
except ValueError as error:
    print(error)
"""


def test_one_rank_is_the_plain_layer(tmp_path):
    assert run_python(ALONE, tmp_path) == "timeout is 0, expected a finite number > 0"


def test_without_mpi4py_the_error_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['mpi4py'] = None\ntry: import pybn.mpi\nexcept ImportError as error: print(error)"
    assert 'run: pip install "pybn[mpi]"' in run_python(code, tmp_path)
