"""Threads, processes, signals, memory and the environment."""

import concurrent.futures
import contextlib
import ctypes
import itertools
import queue
import random

import numpy as np
import pytest
import reference
import threadpoolctl
from conftest import DATA_DTYPES, assert_same_bits, images, parameters, run_python, unchanged

import pybn
from pybn import _core
from pybn._config import cpu_quota

FOUR_THREADS = {"OMP_NUM_THREADS": "4", "PYBN_NUM_THREADS": "4"}


# ---- fork -----------------------------------------------------------------------------------------------------------

FORK = """
import os, signal, warnings
import numpy as np, pybn
warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads, from Python 3.12 on

x = np.random.default_rng(0).standard_normal((16, 32, 32, 33)).astype(np.float32)

def results():
    y, saved = pybn.batch_norm_forward(x)
    mean, var, _ = pybn.batch_norm_stats(x)
    return b"".join(array.tobytes() for array in (y, mean, var, pybn.batch_norm_backward(y, saved).dx))
"""


def test_a_forked_child_computes_the_same_and_does_not_hang(tmp_path):
    code = """
assert pybn.get_num_threads() == 4
expected = results()  # starts the threads that the child will not have
child = os.fork()
if child == 0:
    signal.alarm(20)  # ends the child if it hangs
    os._exit(0 if pybn.get_num_threads() == 1 and results() == expected else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
assert pybn.get_num_threads() == 4 and results() == expected
"""
    assert run_python(FORK + code, tmp_path, FOUR_THREADS) == "0"


def test_a_child_of_a_process_that_has_not_computed_yet_works_too(tmp_path):
    code = """
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(0 if len(results()) > 0 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_python(FORK + code, tmp_path, FOUR_THREADS) == "0"


def test_a_pool_of_forked_workers_works(tmp_path):
    code = """
import hashlib, multiprocessing
def digest(_):
    return hashlib.sha256(results()).hexdigest()
expected = digest(0)
with multiprocessing.get_context("fork").Pool(3, signal.alarm, (20,)) as pool:
    print(set(pool.map(digest, range(6))) == {expected})
"""
    assert run_python(FORK + code, tmp_path, FOUR_THREADS) == "True"


# ---- Python threads -------------------------------------------------------------------------------------------------


def test_concurrent_evaluation_gives_equal_results(rng):
    layer = pybn.BatchNorm2d(32, activation="relu").eval()
    layer.weight[...], layer.bias[...], layer.running_mean[...], layer.running_var[...] = parameters(rng, 32)
    inputs = [images(rng, (n, 32, 33, 31)) for n in (1, 4, 9, 16)]
    expected = [layer(x) for x in inputs]
    with threadpoolctl.threadpool_limits(2, user_api="openmp"), concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: layer(inputs[i % 4]), range(80)))
    for i, result in enumerate(results):
        assert_same_bits(result, expected[i % 4], i)


def test_concurrent_training_of_separate_layers_gives_equal_results(rng):
    x = images(rng, (16, 32, 20, 21))

    def train(_):
        layer = pybn.BatchNorm2d(32, activation="relu")
        y = layer(x)
        return y, layer.backward(x), layer.weight_grad, layer.running_var

    expected = train(0)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for result in pool.map(train, range(40)):
            for ours, value in zip(result, expected, strict=True):
                assert_same_bits(ours, value)


def test_concurrent_training_of_one_layer_is_serialized(rng):
    """With momentum=None the statistics are an average, whatever the order: a lost or torn update would show."""
    layer = pybn.BatchNorm2d(8, momentum=None, dtype=np.float64)
    batches = [images(rng, (4, 8, 16, 17), np.float64) for _ in range(60)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(layer, batches))
    assert layer.num_batches_tracked == 60
    moments = [pybn.batch_norm_stats(x) for x in batches]
    count = 4 * 16 * 17
    np.testing.assert_allclose(layer.running_mean, np.mean([m for m, _, _ in moments], 0), rtol=1e-12)
    variances = np.mean([v for _, v, _ in moments], 0) * count / (count - 1)
    np.testing.assert_allclose(layer.running_var, variances, rtol=1e-12)
    for x, y in zip(batches, results, strict=True):
        assert_same_bits(y, pybn.batch_norm(x, None, None, np.ones(8), np.zeros(8), training=True))


# ---- interrupts and memory ------------------------------------------------------------------------------------------

INTERRUPT = """
import signal, time
import numpy as np, pybn

signal.signal(signal.SIGALRM, signal.default_int_handler)  # an alarm is a Ctrl-C

def seconds_until_interrupted(call, after):
    signal.setitimer(signal.ITIMER_REAL, after)
    start = time.monotonic()
    try:
        call()
    except KeyboardInterrupt:
        return time.monotonic() - start - after
    raise AssertionError("the call was over before the interrupt")
"""


@pytest.mark.parametrize("threads", ["1", "4"])
def test_a_long_reduction_can_be_interrupted(tmp_path, threads):
    code = """
endless = np.broadcast_to(np.float32(3), (2**38, 1))  # minutes
zeros, ones = np.zeros(1), np.ones(1)
mean, var = zeros.copy(), ones.copy()
calls = (
    lambda: pybn.batch_norm_stats(endless),
    lambda: pybn.batch_norm_backward_reduce(endless, endless, zeros, ones),
    lambda: pybn.batch_norm(endless, mean, var, training=True, check_finite=True),
)
for call in calls:
    assert seconds_until_interrupted(call, 0.1) < 5
    assert (mean == 0).all() and (var == 1).all()
print(pybn.batch_norm_stats(endless[:5])[0].item())  # all is well afterwards
"""
    environment = {"OMP_NUM_THREADS": threads, "PYBN_NUM_THREADS": threads}
    assert run_python(INTERRUPT + code, tmp_path, environment) == "3.0"


def test_an_interrupted_training_step_changes_no_statistics(tmp_path):
    """The alarm comes while the batch statistics are computed."""
    code = """
layer = pybn.BatchNorm1d(1)
x = np.broadcast_to(np.float32(3), (2**27, 1))
out = np.empty(x.shape, np.float32)
assert seconds_until_interrupted(lambda: layer(x, out=out), 0.02) < 5
assert (layer.running_mean, layer.running_var, layer.num_batches_tracked) == (0, 1, 0)
layer(x[:100])  # the lock is free again
print(layer.num_batches_tracked)
"""
    assert run_python(INTERRUPT + code, tmp_path, {"PYBN_NUM_THREADS": "1", "PYBN_ISA": "baseline"}) == "1"


def test_an_interrupt_in_a_short_training_step_changes_no_statistics(tmp_path):
    """In a step that is over before it looks for signals, the KeyboardInterrupt comes on its return."""
    code = """
x = np.random.default_rng(0).standard_normal((32, 16, 64, 64)).astype(np.float32)
out = np.empty_like(x)

def seconds():
    start = time.monotonic()
    pybn.BatchNorm2d(16)(x, out=out)
    return time.monotonic() - start

duration = min(seconds() for _ in range(5))
interrupts = 0
for tenths in (1, 2, 3, 4, 5, 6):
    layer = pybn.BatchNorm2d(16)
    try:
        signal.setitimer(signal.ITIMER_REAL, duration * tenths / 10)
        layer(x, out=out)
    except KeyboardInterrupt:
        interrupts += 1
        assert (layer.running_mean == 0).all() and (layer.running_var == 1).all() and layer.num_batches_tracked == 0
    signal.setitimer(signal.ITIMER_REAL, 0)
print(interrupts > 0)
"""
    assert run_python(INTERRUPT + code, tmp_path, {"PYBN_NUM_THREADS": "1", "PYBN_ISA": "baseline"}) == "True"


def test_a_failed_allocation_is_a_memory_error_and_changes_no_statistics():
    layer = pybn.BatchNorm1d(16)
    x = np.broadcast_to(np.arange(16, dtype=np.float32), (2**46, 16))  # the output would need 4 PiB
    arrays = [layer.running_mean, layer.running_var, layer.num_batches_tracked]
    with unchanged(*arrays), pytest.raises(MemoryError):
        layer(x)
    with unchanged(*arrays), pytest.raises(MemoryError):
        pybn.batch_norm(x, layer.running_mean, layer.running_var, training=True)
    layer(x[:10])
    assert layer.num_batches_tracked == 1


# ---- recycled results -----------------------------------------------------------------------------------------------


@pytest.fixture
def empty_cache():
    _, limit, _, _ = _core.cache_statistics()
    pybn.empty_cache()
    yield
    _core.set_cache_limit(limit)


def test_memory_of_a_large_result_is_recycled_when_its_last_view_is_gone(rng, empty_cache):
    x = images(rng, (8, 16, 64, 65))
    expected = pybn.batch_norm(x, None, None, training=True)
    y = pybn.batch_norm(x, None, None, training=True)
    address, view = y.ctypes.data, y[3:4]
    del y
    other = pybn.batch_norm(x + 1, None, None, training=True)
    assert not np.shares_memory(view, other)
    assert_same_bits(view.copy(), expected[3:4])
    del view
    third = pybn.batch_norm(x, None, None, training=True)
    assert third.ctypes.data == address
    assert_same_bits(third, expected)


def test_what_recycled_memory_held_does_not_show(rng, empty_cache):
    x = images(rng, (8, 16, 64, 65))
    expected, saved = pybn.batch_norm_forward(x)
    expected_dx = pybn.batch_norm_backward(x, saved).dx.copy()
    for _ in range(3):
        spoiled = pybn.batch_norm(x, None, None, training=True)
        spoiled[...] = np.nan
        del spoiled
        assert_same_bits(pybn.batch_norm(x, None, None, training=True), expected)
        assert_same_bits(pybn.batch_norm_backward(x, saved).dx, expected_dx)


def test_the_cache_keeps_to_its_limit_and_can_be_emptied(rng, empty_cache):
    x = images(rng, (8, 16, 64, 65))  # 2.1 MB: two granules of 2 MiB
    results = [pybn.batch_norm(x, None, None, training=True) for _ in range(4)]
    expected = results[0].copy()
    assert _core.cache_statistics()[0] == 0
    _core.set_cache_limit(2**23)
    del results[1:]
    assert 0 < _core.cache_statistics()[0] <= 2**23
    pybn.empty_cache()
    assert _core.cache_statistics()[0] == 0
    assert_same_bits(results[0], expected)
    _core.set_cache_limit(0)
    results.clear()
    assert _core.cache_statistics()[0] == 0


def test_threads_that_make_and_drop_results_at_once_never_share_memory(rng, empty_cache):
    """Each thread holds some results of several sizes, drops them in an order of its own, and hands some to others."""
    _core.set_cache_limit(2**24)
    inputs = [images(rng, (n, 16, 64, 65)) for n in (4, 8, 9, 12)]  # 1 to 3.2 MB
    handed_over = queue.SimpleQueue()

    def work(seed):
        draw = random.Random(seed)
        held = []
        for _ in range(30):
            i = draw.randrange(4)
            y = pybn.batch_norm(inputs[i], np.full(16, float(seed)), np.full(16, 0.75), eps=0.25)
            held.append((i, seed, y))
            if draw.random() < 0.2:
                handed_over.put(held.pop())
            if draw.random() < 0.2 and not handed_over.empty():
                with contextlib.suppress(queue.Empty):
                    held.append(handed_over.get_nowait())
            while len(held) > 3:
                i, shift, y = held.pop(draw.randrange(len(held)))
                np.testing.assert_array_equal(y, inputs[i] - np.float32(shift))
            if draw.random() < 0.05:
                pybn.empty_cache()
        for i, shift, y in held:
            np.testing.assert_array_equal(y, inputs[i] - np.float32(shift))
        return True

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(1, 9)))
    while not handed_over.empty():
        i, shift, y = handed_over.get()
        np.testing.assert_array_equal(y, inputs[i] - np.float32(shift))
    assert _core.cache_statistics()[0] <= 2**24


RESIDENT = """
import os
import numpy as np, pybn

def resident():
    "Bytes of memory that the process has."
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

x = np.ones((64, 16, 128, 128), np.float32)
x[::2] = 2
size = x.nbytes  # 67 MB
pybn.batch_norm(x[:1], None, None, training=True)  # threads and what else comes with the first call
before = resident()
"""


@pytest.mark.skipif("not sys.platform.startswith('linux')", reason="reads /proc")
def test_memory_of_results_is_given_back(tmp_path):
    code = """
results = [pybn.batch_norm(x, None, None, training=True) for _ in range(3)]
assert resident() - before > 2.9 * size
kept = results[1][5:6]
del results
assert pybn._core.cache_statistics()[0] >= 2 * size
pybn.empty_cache()
assert resident() - before < 1.1 * size, "of three results, the one of which there is a view is left"
assert abs(float(kept.mean()) + 1) < 1e-3 or abs(float(kept.mean()) - 1) < 1e-3
del kept
pybn.empty_cache()
print(resident() - before < 0.1 * size)
"""
    assert run_python(RESIDENT + code, tmp_path) == "True"


@pytest.mark.skipif("not sys.platform.startswith('linux')", reason="reads /proc")
def test_memory_that_nobody_wants_is_offered_to_the_system(tmp_path):
    code = """
import time

def offered():
    with open("/proc/self/smaps") as file:
        return sum(int(line.split()[1]) * 1024 for line in file if line.startswith("LazyFree:"))

expected = pybn.batch_norm(x, None, None, training=True).copy()
pybn.batch_norm(x[:32], None, None, training=True)
assert offered() == 0, "what was just dropped is soon wanted again"
time.sleep(5.1)
pybn.batch_norm(x[:32], None, None, training=True)
assert size <= offered() < 1.1 * size, "the large one has waited for 5 seconds, the small one has not"
y = pybn.batch_norm(x, None, None, training=True)
assert pybn._core.cache_statistics()[2] == 2, "it is recycled all the same"
print(np.array_equal(y, expected))
"""
    assert run_python(RESIDENT + code, tmp_path) == "True"


@pytest.mark.skipif("not sys.platform.startswith('linux')", reason="reads /proc")
def test_without_a_cache_memory_is_given_back_at_once(tmp_path):
    code = """
for _ in range(3):
    y, saved = pybn.batch_norm_forward(x, residual=x, activation="relu")
    gradients = pybn.batch_norm_backward(y, saved)
    del y, saved, gradients
    assert resident() - before < 0.1 * size
print(pybn._core.cache_statistics()[0])
"""
    assert run_python(RESIDENT + code, tmp_path, {"PYBN_CACHE_BYTES": "0"}) == "0"


def test_results_may_outlive_everything(tmp_path):
    """Arrays that the interpreter frees after pybn's modules are gone, in cycles and in the globals of others."""
    code = """
import sys
import numpy as np, pybn
x = np.ones((8, 16, 64, 65), np.float32)
sys.kept = pybn.batch_norm(x, None, None, training=True)
class Node: pass
node = Node()
node.self, node.y = node, pybn.batch_norm(x, None, None, training=True)
np.kept = [pybn.batch_norm(x, None, None, training=True)[::2] for _ in range(3)]
expected = sys.kept.sum()
for name in [name for name in sys.modules if name.startswith("pybn")]:
    del sys.modules[name]
del pybn, node
np.kept.pop()
print(sys.kept.sum() == expected, sys.kept.sum())
"""
    assert run_python(code, tmp_path) == "True 0.0"


def test_a_forked_child_may_drop_the_results_of_its_parent(tmp_path):
    code = """
y = pybn.batch_norm(x, None, None, training=True)
spare = pybn.batch_norm(x, None, None, training=True)
expected = y.copy()
del spare  # to the cache, of which the child gets a copy
child = os.fork()
if child == 0:
    signal.alarm(20)
    del y
    z = [pybn.batch_norm(x + 1, None, None, training=True) for _ in range(3)]
    z[0][...] = z[1][...] = z[2][...] = np.nan
    pybn.empty_cache()
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
z = pybn.batch_norm(x, None, None, training=True)
assert y.tobytes() == z.tobytes() == expected.tobytes()
"""
    assert run_python(FORK + code, tmp_path, FOUR_THREADS) == "0"


# ---- environment ----------------------------------------------------------------------------------------------------


def imported(tmp_path, environment, expression):
    """What an expression is after `import pybn`, or the ValueError of the import."""
    code = (
        f"try:\n    import pybn\n    print({expression})\nexcept ValueError as error:\n    print('ValueError:', error)"
    )
    return run_python(code, tmp_path, environment)


@pytest.mark.parametrize("name", _core.available_instruction_sets())
def test_pybn_isa_selects_the_instruction_set(tmp_path, name):
    assert imported(tmp_path, {"PYBN_ISA": name}, "pybn._core.instruction_set()") == name


def test_the_best_instruction_set_is_the_default(tmp_path):
    best = _core.available_instruction_sets()[0]
    assert imported(tmp_path, {"PYBN_ISA": ""}, "pybn._core.instruction_set()") == best
    assert _core.available_instruction_sets()[-1] == "baseline"


def test_an_unknown_instruction_set_is_refused_at_import(tmp_path):
    message = imported(tmp_path, {"PYBN_ISA": "mmx"}, "0")
    assert message.startswith("ValueError: PYBN_ISA is 'mmx', expected one of")
    assert ", ".join(_core.available_instruction_sets()) in message


def test_an_unknown_instruction_set_is_not_selected():
    before = _core.instruction_set()
    assert not _core.select_instruction_set("mmx")
    assert _core.instruction_set() == before


def test_pybn_num_threads_is_a_limit(tmp_path):
    environment = {"OMP_NUM_THREADS": "4", "PYBN_NUM_THREADS": "3"}
    assert imported(tmp_path, environment, "pybn.get_num_threads()") == "3"
    environment = {"OMP_NUM_THREADS": "2", "PYBN_NUM_THREADS": "3"}
    assert imported(tmp_path, environment, "pybn.get_num_threads()") == "2"


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "2 threads"])
def test_a_bad_number_of_threads_is_refused_at_import(tmp_path, value):
    expected = f"ValueError: PYBN_NUM_THREADS is {value!r}, expected an integer >= 1"
    assert imported(tmp_path, {"PYBN_NUM_THREADS": value}, "0") == expected


def test_pybn_cache_bytes_is_the_limit_of_the_cache(tmp_path):
    assert imported(tmp_path, {"PYBN_CACHE_BYTES": "0"}, "pybn._core.cache_statistics()[1]") == "0"
    assert imported(tmp_path, {"PYBN_CACHE_BYTES": "12345"}, "pybn._core.cache_statistics()[1]") == "12345"
    assert imported(tmp_path, {"PYBN_CACHE_BYTES": ""}, "pybn._core.cache_statistics()[1]") == str(2**30)


@pytest.mark.parametrize("value", ["-1", "1 GB", "1e9"])
def test_a_bad_cache_size_is_refused_at_import(tmp_path, value):
    expected = f"ValueError: PYBN_CACHE_BYTES is {value!r}, expected a number of bytes >= 0"
    assert imported(tmp_path, {"PYBN_CACHE_BYTES": value}, "0") == expected


def test_import_needs_numpy_alone(tmp_path):
    code = """
import sys, pybn
heavy = {"torch", "onnx", "onnx_ir", "onnxruntime", "typer", "click", "rich", "ml_dtypes", "scipy", "jax", "tensorflow"}
print(sorted(heavy & sys.modules.keys()))
"""
    assert run_python(code, tmp_path) == "[]"


# ---- number of threads ----------------------------------------------------------------------------------------------


def test_the_number_of_threads_is_the_least_of_all_limits():
    for openmp, ours in ((1, 4), (4, 1), (4, 3), (3, 4), (2, 2)):
        with threadpoolctl.threadpool_limits(openmp, user_api="openmp"):
            pybn.set_num_threads(ours)
            assert pybn.get_num_threads() == min(openmp, ours)


def test_our_limit_is_nobody_else_s():
    def of_openmp():
        return [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "openmp"]

    before = of_openmp()
    assert before
    pybn.set_num_threads(1)
    pybn.batch_norm(np.ones((64, 16, 32, 32)), None, None, training=True)
    assert of_openmp() == before


def test_a_huge_number_of_threads_is_no_limit():
    pybn.set_num_threads(1)
    pybn.set_num_threads(2**70)
    with threadpoolctl.threadpool_limits(4, user_api="openmp"):
        assert pybn.get_num_threads() == 4


@pytest.mark.parametrize(
    ("n", "error", "message"),
    [
        (0, ValueError, "n is 0, expected at least 1"),
        (-2, ValueError, "n is -2, expected at least 1"),
        (1.5, TypeError, r"n is 1\.5, expected an integer"),
        (True, TypeError, "n is True, expected an integer"),
        (None, TypeError, "n is None, expected an integer"),
        ("2", TypeError, "n is '2', expected an integer"),
    ],
)
def test_a_bad_number_of_threads_is_refused(n, error, message):
    pybn.set_num_threads(1)
    with pytest.raises(error, match="^" + message):
        pybn.set_num_threads(n)
    assert pybn.get_num_threads() == 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "1 100000\n"}, 1),
        ({"cpu.max": "nonsense"}, None),
        ({"cpu.max": "100000 0"}, None),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "350000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "350000\n"}, None),
    ],
    ids=str,
)
def test_the_quota_of_a_container_is_read(tmp_path, files, expected):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert cpu_quota(tmp_path) == expected


def test_show_config_prints_what_it_returns(capsys):
    config = pybn.show_config()
    printed = capsys.readouterr().out
    assert config["pybn"] == pybn.__version__
    assert config["instruction set"] == _core.instruction_set()
    for key, value in config.items():
        assert any(line.startswith(key) and line.endswith(str(value)) for line in printed.splitlines()), key


# ---- floating point -------------------------------------------------------------------------------------------------


def test_the_floating_point_environment_is_left_alone(instruction_set, rng):
    """Neither is flush-to-zero left on, nor the rounding mode changed, nor does NumPy see an exception of ours."""
    libm = ctypes.CDLL(None)
    rounding = libm.fegetround()
    x = images(rng, (8, 4, 64, 64))
    x[:, 0] = 1e-41
    x[:, 1, 0, 0] = np.inf
    x[:, 2, 0, 0] = np.nan
    x[:, 3] *= 1e30
    with np.errstate(over="ignore"):
        inputs = [x.astype(dtype) for dtype in DATA_DTYPES]
    with np.errstate(all="raise"):
        for given, activation in itertools.product(inputs, reference.ACTIVATIONS):
            y, saved = pybn.batch_norm_forward(given, activation=activation, residual=given)
            pybn.batch_norm_backward(given, saved)
            pybn.batch_norm(y, np.zeros(4), np.ones(4), activation=activation)
    assert libm.fegetround() == rounding
    assert np.float32(2e-41) * np.float32(0.5) == np.float32(1e-41) != 0


def test_gradients_too_large_for_their_type_are_infinite_without_a_warning():
    x = np.arange(32, dtype=np.float32).reshape(16, 2)
    _, saved = pybn.batch_norm_forward(x, np.ones(2, np.float32), np.zeros(2, np.float32))
    gradients = pybn.batch_norm_backward(np.full_like(x, 3e38), saved)
    assert np.all(gradients.dbias == np.inf)


def test_a_child_forked_while_another_thread_trains_can_train(tmp_path):
    code = """
import os, signal, threading, time, warnings
import numpy as np, pybn
warnings.simplefilter("ignore", DeprecationWarning)
layer = pybn.BatchNorm2d(8)
x = np.random.default_rng(0).standard_normal((8, 8, 32, 32)).astype(np.float32)
stop = threading.Event()
def train():
    while not stop.is_set():
        layer(x)
thread = threading.Thread(target=train)
thread.start()
time.sleep(0.1)
failed = 0
for _ in range(5):
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        layer(x)
        os._exit(0)
    failed += os.waitpid(child, 0)[1] != 0
stop.set()
thread.join()
print(failed)
"""
    assert run_python(code, tmp_path) == "0"


def test_a_signal_handler_may_call_the_layer_that_it_interrupts(tmp_path):
    code = """
import signal
import numpy as np, pybn
layer = pybn.BatchNorm2d(8)
x = np.ones((8, 8, 64, 64), np.float32)
calls = 0
def handler(*_):
    global calls
    calls += 1
    layer(x)
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
steps = 0
while calls < 20:
    layer(x)
    steps += 1
signal.setitimer(signal.ITIMER_REAL, 0)
print(int(layer.num_batches_tracked) == steps + calls)
"""
    assert run_python(code, tmp_path) == "True"


def test_a_daemon_thread_inside_pybn_does_not_abort_the_exit(tmp_path):
    code = """
import threading, time
import numpy as np, pybn
x = np.random.default_rng(0).standard_normal((8, 8, 8, 8))
def work():
    while True:
        pybn.batch_norm_forward(x)
threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
print("done")
"""
    for _ in range(3):
        assert run_python(code, tmp_path) == "done"
