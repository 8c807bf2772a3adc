"""`pybn bench`: what it measures, that it measures the same thing of everyone, what it prints. Never how fast."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import run_python
from typer.testing import CliRunner

import pybn
from pybn import _core
from pybn.bench import compare, ours, plot, report, results, session, tables, targets
from pybn.bench.cases import (
    EXTRA,
    ITEM_BYTES,
    LAYOUTS,
    NETWORKS,
    OPERATIONS,
    SHAPE_LISTS,
    Case,
    Shape,
    UsageError,
    l2_bytes,
    parse_shapes,
    quick,
    shape_list,
)
from pybn.bench.measure import FEWEST_TURNS, Timing, measure
from pybn.bench.peers import PEERS, TITLES, UnsupportedError, find
from pybn.bench.problem import Contender, Problem, WrongResultError, require_equal
from pybn.commands import app

ROOT = Path(__file__).resolve().parents[1]
RUNNER = CliRunner()
MIB = 2**20


def run(*arguments):
    return RUNNER.invoke(app, ["bench", *map(str, arguments)])


def one_line_error(result, message, code):
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.fixture
def shapes(tmp_path):
    path = tmp_path / "shapes.txt"
    path.write_text("4,3,5,5\n6,8\n")
    return path


def case(operation="forward", shape=(32, 64, 56, 56), dtype="float32", layout="nchw"):
    return Case(OPERATIONS[operation], Shape(*shape), dtype, layout)


# What is measured


def test_the_lists_are_those_of_the_networks():
    assert [(s.c, s.h) for s in shape_list("resnet50")] == [
        (64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7),
    ]  # fmt: skip
    for name in SHAPE_LISTS:
        assert len(set(shape_list(name))) == len(shape_list(name))
    assert {s.n for s in shape_list("mobilenet")} == {32}
    assert {s.n for s in shape_list("densenet", 4)} == {4}
    assert {Shape(64, 3, 224, 224), Shape(1, 256, 14, 14), Shape(256, 512, 1, 1)} <= set(shape_list("extra", 4))
    assert set(NETWORKS) | {"extra"} == set(SHAPE_LISTS)
    assert len(EXTRA) == len(shape_list("extra"))


def test_a_file_has_a_shape_per_line():
    text = "# ours\n\n32, 64,56,56\n256,512  # dense\n"
    assert parse_shapes(text, "f") == [Shape(32, 64, 56, 56), Shape(256, 512, 1, 1)]


@pytest.mark.parametrize("line", ["1,2,3", "a,b,c,d", "0,1,2,3", "1,-2,3,4", "32 64 56 56", "1,64,1,1", "1.5,2"])
def test_a_line_that_is_no_shape_is_refused_with_its_number(line):
    with pytest.raises(UsageError, match=r"--shapes f: line 2 is .*, expected"):
        parse_shapes(f"2,2\n{line}\n", "f")


def test_a_file_without_shapes_is_refused():
    with pytest.raises(UsageError, match="no shapes"):
        parse_shapes("# nothing\n", "f")


def test_dims_of_a_shape():
    assert Shape(2, 3, 5, 7).dims("nchw") == (2, 3, 5, 7)
    assert Shape(2, 3, 5, 7).dims("nhwc") == (2, 5, 7, 3)
    assert Shape(2, 3, 1, 1).dims("nhwc") == (2, 3)
    assert str(Shape(2, 3, 5, 7)) == "2x3x5x7"


def test_quick_takes_a_few_from_the_whole_list():
    some = quick(shape_list("resnet50"))
    assert len(some) == 4
    assert (some[0], some[-1]) == (shape_list("resnet50")[0], shape_list("resnet50")[-1])
    assert quick(some[:3]) == some[:3]


@pytest.mark.parametrize(
    ("operation", "shape", "dtype", "copies"),
    [
        ("inference", (32, 64, 112, 112), "float32", 1.0),
        ("inference-add-relu", (32, 64, 112, 112), "float32", 1.5),
        ("forward", (32, 64, 56, 56), "float32", 1.0),
        ("forward-relu", (32, 64, 112, 112), "float32", 1.5),
        ("forward-relu", (32, 64, 112, 112), "float16", 1.0),
        ("backward", (32, 64, 56, 56), "float32", 1.5),
        ("backward", (32, 64, 56, 56), "float64", 2.5),
        ("forward-add-relu", (32, 64, 56, 56), "float32", 1.5 + 1 / 64),
        ("backward-add-relu", (32, 64, 112, 112), "float32", 3 + 1 / 64),
        ("backward-add-relu", (32, 64, 56, 56), "float16", 2 + 1 / 32),
    ],
)
def test_traffic_bounds(operation, shape, dtype, copies):
    assert case(operation, shape, dtype).bound(MIB) == pytest.approx(copies)


def test_a_slab_of_channels_that_are_neighbours_is_a_cache_line_of_them():
    assert case(shape=(32, 64, 14, 14), layout="nchw").slab_bytes == 4 * 32 * 196
    assert case(shape=(32, 64, 14, 14), layout="nhwc").slab_bytes == 64 * 32 * 196
    assert case(shape=(32, 3, 14, 14), layout="nhwc").slab_bytes == 12 * 32 * 196
    assert case(shape=(256, 512, 1, 1), layout="nchw").slab_bytes == 64 * 256


def test_groups_of_shapes():
    assert case(shape=(32, 64, 56, 56)).group(MIB) == "fits L2"
    assert case(shape=(32, 64, 112, 112)).group(MIB) == "exceeds L2"
    assert case("inference", shape=(32, 64, 112, 112)).group(MIB) == "exceeds L2"
    assert case(shape=(32, 512, 7, 7)).group(MIB) == "7x7 planes"
    assert case(shape=(32, 512, 7, 7), layout="nhwc").group(MIB) == "fits L2"
    assert case(shape=(1, 256, 14, 14)).group(MIB) == "small"


def test_every_target_is_of_an_operation_and_a_peer_that_exist():
    assert all(layout in LAYOUTS and peer in PEERS for layout, peer in targets._SPEED)
    assert all(name in OPERATIONS for names in targets._SPEED.values() for name in names)
    assert targets.copies(OPERATIONS["backward-relu"], "float32", "nchw", "7x7 planes") == 2.0
    assert targets.copies(OPERATIONS["backward"], "float16", "nchw", "7x7 planes") is None
    assert targets.least_speed(case(shape=(1, 256, 14, 14)), "torch") == 2.0
    assert targets.least_speed(case(shape=(1, 256, 14, 14)), "numpy") == 1.0
    assert targets.least_speed(case(), "bare") == 0.0


# Everyone does the same thing

SMALL = [Shape(4, 20, 9, 7), Shape(64, 24, 1, 1)]


@pytest.mark.parametrize(("dtype", "layout"), list(itertools.product(ITEM_BYTES, LAYOUTS)))
def test_pybn_and_the_peers_agree_on_every_operation(dtype, layout):
    peers, absent = find(["numpy", "torch", "onnxruntime", "openvino", "onednn"], pybn.get_num_threads())
    assert not {"numpy", "torch", "onnxruntime"} & set(absent)  # the test extra installs them
    compared = 0
    for shape, operation in itertools.product(SMALL, OPERATIONS.values()):
        problem = Problem(shape, dtype, layout)
        contenders = ours.contenders(operation, problem, 2, problem.empty())
        assert set(contenders) == set(ours.NAMES)
        expected = contenders[ours.FRESH].read(contenders[ours.FRESH].run())
        for peer in peers:
            try:
                contenders[peer.name] = peer.contender(operation, problem)
            except UnsupportedError:
                assert peer.name not in ("numpy", "torch")
        for name, contender in contenders.items():
            if not name.startswith("copy"):
                contender.run()
                actual = contender.read(contender.run())
                require_equal(name, Case(operation, shape, dtype, layout), actual, expected)
                compared += 1
        assert contenders[ours.COPY].read(contenders[ours.COPY].run())[0].tobytes() == (
            ours.reads_first(operation, problem).tobytes()
        )
    assert compared >= 5 * len(SMALL) * len(OPERATIONS)


@pytest.fixture(scope="module")
def bare():
    found, absent = find(["bare"], pybn.get_num_threads())
    if not found:
        pytest.skip(absent["bare"])  # a compiler without OpenMP, as Apple's
    return found[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bare_loops_compute_the_same(bare, layout):
    operations = [operation for name, operation in OPERATIONS.items() if name != "backward-add-relu"]
    # A group of channels and a part of one, planes with a rest and without, rows that threads cannot halve.
    shapes = [Shape(4, 24, 9, 7), Shape(3, 8, 8, 4), Shape(2, 264, 5, 5), Shape(67, 24, 1, 1), Shape(1024, 16, 1, 1)]
    for shape, operation in itertools.product(shapes, operations):
        problem = Problem(shape, "float32", layout)
        expected = ours.contenders(operation, problem, 2, problem.empty())[ours.FRESH]
        contender = bare.contender(operation, problem)
        actual = contender.read(contender.run())
        require_equal("bare", Case(operation, shape, "float32", layout), actual, expected.read(expected.run()))
        for a, b in zip(actual, expected.read(expected.run()), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_bare_loops_have_the_easiest_only(bare):
    easy = Shape(4, 16, 9, 7)
    for operation, shape, dtype, layout, reason in (
        ("backward-add-relu", easy, "float32", "nchw", "makes no mask"),
        ("forward", easy, "float64", "nchw", "float32 only"),
        ("forward", Shape(4, 16, 7, 1), "float32", "nchw", "planes of 8 values"),
        ("forward", Shape(4, 20, 9, 7), "float32", "nhwc", "channels last by 8"),
    ):
        with pytest.raises(UnsupportedError, match=reason):
            bare.contender(OPERATIONS[operation], Problem(shape, dtype, layout))


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "set CXX to a GCC or Clang"), ("false", "false does not compile them")],
)
def test_bare_loops_need_a_compiler(compiler, reason, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    found, absent = find(["bare"], 1)
    assert not found
    assert reason in absent["bare"]


def test_a_result_that_is_not_the_same_is_refused(rng):
    right = rng.standard_normal((4, 5)).astype(np.float32)
    require_equal("x", case(), (right * np.float32(1 + 1e-6),), (right,))
    for wrong in (np.maximum(right, 0), right[:2], np.full_like(right, np.nan)):
        with pytest.raises(WrongResultError, match="x "):
            require_equal("x", case(), (wrong,), (right,))
    with pytest.raises(WrongResultError, match="2 results"):
        require_equal("x", case(), (right, right), (right,))


def test_one_thread_is_given_back():
    before = pybn.get_num_threads()
    problem = Problem(SMALL[0], "float32", "nchw")
    ours.contenders(OPERATIONS["forward"], problem, before, problem.empty())[ours.OUT].run()
    alone = ours.contenders(OPERATIONS["forward"], problem, 2, problem.empty())[ours.OUT_ALONE]
    alone.run()
    assert pybn.get_num_threads() == min(2, before) or before == 1


def test_an_absent_peer_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    found, absent = find(["numpy", "jax"], 1)
    assert [peer.name for peer in found] == ["numpy"]
    assert "pip install jax" in absent["jax"]


def test_onednn_is_found_by_its_variable(monkeypatch, tmp_path):
    path = tmp_path / "libdnnl.so"
    path.write_text("not a library")
    monkeypatch.setenv("PYBN_BENCH_DNNL", str(path))
    _, absent = find(["onednn"], 1)
    assert "cannot be loaded" in absent["onednn"]
    assert "PYBN_BENCH_DNNL" in absent["onednn"]


def test_every_peer_has_a_title_and_says_who_it_is():
    assert list(TITLES) == list(PEERS)
    found, absent = find(["numpy", "torch"], pybn.get_num_threads())
    assert not absent
    assert [(peer.name, bool(peer.version)) for peer in found] == [("numpy", True), ("torch", True)]


def test_builds_are_compared_in_turns(tmp_path, shapes):
    build = Path(pybn.__file__).parents[1]

    def compare(*builds):
        command = [sys.executable, ROOT / "benchmarks/compare_builds.py", *builds, "--turns", "1", "--shapes", shapes]
        arguments = [*map(str, command), "--ops", "forward", "--layout", "nhwc"]
        return subprocess.run(arguments, cwd=tmp_path, timeout=60, capture_output=True, text=True, check=False)

    done = compare(build, build)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(" float32")[0] for line in lines] == ["forward 4x3x5x5", "forward 6x8", lines[-1]]
    assert re.fullmatch(r"geometric mean +1\.00 +\d+\.\d\d", lines[-1])
    assert all(re.search(r" ms +1\.00 +\d+\.\d{3} ms +\d+\.\d\d$", line) for line in lines[:-1])
    missing = compare(build, tmp_path)
    assert missing.returncode == 1
    assert f"expected it in {tmp_path}" in missing.stderr


# How it is measured


def test_contenders_are_interleaved_each_after_a_copy():
    calls = []

    def contender(name, pool="openmp"):
        return Contender(lambda: calls.append(name), lambda _: (), pool)

    names = {"a": contender("a"), "b": contender("b"), "other": contender("other", "its own")}
    timings = measure(names, 5, lambda: calls.append("copy"))
    assert set(timings) == set(names)
    assert all(timing.seconds > 0 and timing.ratio > 0 for timing in timings.values())
    # After the estimates, which are two calls each, every turn comes after a copy, in each of five rounds.
    turns = [key for key, _ in itertools.groupby(calls[8:])]
    assert turns[::2] == ["copy"] * 15
    assert all(sorted(turns[i : i + 6 : 2]) == ["a", "b", "other"] for i in range(1, 30, 6))


def test_drift_of_the_machine_is_divided_out(monkeypatch):
    now, slowness = [0.0], itertools.cycle([1, 1, 5, 3, 0.5])

    def taking(seconds):
        def call():
            now[0] += seconds * slow[0]

        return call

    slow = [1.0]

    def copy():  # in every turn one that is not timed, then one that is: half of them change the pace
        copies.append(0)
        if len(copies) % 2:
            slow[0] = next(slowness)
        taking(2)()

    copies = []
    monkeypatch.setattr("pybn.bench.measure.time.perf_counter", lambda: now[0])
    contenders = {name: Contender(taking(seconds), lambda _: ()) for name, seconds in {"a": 3, "b": 8}.items()}
    timings = measure(contenders, 7, copy)
    assert (timings["a"].ratio, timings["b"].ratio) == (pytest.approx(1.5), pytest.approx(4))


def test_a_slow_contender_has_fewer_turns_but_some(monkeypatch):
    monkeypatch.setattr("pybn.bench.measure.SLOW", 0.0)
    calls = []
    clock = iter(range(10**6))
    seconds = {"copy": 2, "fast": 1, "slow": 10**4}
    now = [0.0]

    def contender(name):
        def call():
            calls.append(name)
            now[0] += seconds[name]

        return Contender(call, lambda _: ())

    monkeypatch.setattr("pybn.bench.measure.time.perf_counter", lambda: now[0] + next(clock) * 1e-9)
    timings = measure({name: contender(name) for name in ("fast", "slow")}, 12, contender("copy").run)
    assert calls.count("fast") == 2 + 12
    assert calls.count("slow") == 2 + FEWEST_TURNS
    assert timings["slow"].seconds == pytest.approx(10**4)
    assert timings["fast"] == Timing(pytest.approx(1), pytest.approx(0.5), pytest.approx(0, abs=1e-6))


# What is made of it


def fake_run(scale=1.0, shapes=((32, 64, 56, 56), (32, 64, 112, 112), (32, 512, 7, 7)), dtypes=("float32", "float16")):
    """A run with round figures: a copy takes 1 ms, everything else that many milliseconds."""
    copies = {
        "copy": 1, "pybn": 1.5 * scale, "pybn-fresh": 1.6 * scale, "copy-1-thread": 2, "pybn-1-thread": 3, "numpy": 30,
        "torch": 8.8,
    }  # fmt: skip
    measurements = [
        results.Measurement(
            Case(OPERATIONS[name], Shape(*shape), dtype, "nchw"),
            {who: value * ITEM_BYTES[dtype] / 4e3 for who, value in copies.items()},
            copies,
            dict.fromkeys(copies, 0.01),
            2.5,
            {"openvino": "it has no training pass"},
        )
        for dtype in dtypes
        for shape in shapes
        for name in ("forward", "backward-relu")
    ]
    peers = {
        "numpy": results.PeerInfo("1", True), "torch": results.PeerInfo("2", True),
        "openvino": results.PeerInfo("3", False),
    }  # fmt: skip
    absent = {"jax": "jax is not installed; run: pip install jax"}
    return results.Run(session.environment(), 2, MIB, 7, peers, absent, measurements)


def text_of(found):
    return "\n".join(map(report.markdown, found))


def test_tables_hold_the_ratios_and_mark_what_misses_its_target():
    run = fake_run()
    measurements = run.of("float32", "nchw")
    groups = tables.by_group(run, measurements)
    by_name = {(row[0], row[1]): row for row in groups.rows}
    header = groups.columns
    row = dict(zip(header, by_name["forward", "fits L2"], strict=True))
    assert (row["bound"], row["target"], row["pybn"], row["torch eager"]) == ("1.00", "1.15", "1.50 (!)", "8.80")
    assert dict(zip(header, by_name["backward-relu", "exceeds L2"], strict=True))["pybn"] == "1.50"
    speeds = tables.speeds(run, measurements)
    # The bounds are 1, 1.5 and 1 copies, torch's time 8.8.
    assert speeds.rows[0] == ["forward", "18.8x (18.8-18.8)", "5.50x (5.50-5.50; bound 7.69)"]
    assert tables.overview(run, measurements).rows[0][1] == "1.50 (5.50x)"
    costs = text_of([tables.costs(run)])
    assert "1.07 (1.07)" in costs
    assert "0.50" in costs  # of float16, relative to float32
    assert tables.missed([groups]) == 1
    assert "JAX jitted: absent, jax is not installed; run: pip install jax" in tables.peer_lines(run)
    assert any("OpenVINO does not do forward, backward-relu" in line for line in tables.peer_lines(run))


def test_a_busy_machine_is_said():
    run = fake_run()
    assert tables.noise_line(run) is None
    for m in run.measurements:
        m.spread["copy"] = 0.5
    assert "50% or more apart" in tables.noise_line(run)
    assert tables.additions_line(run).startswith("2.5 additions per ns on a core (2.5 to 2.5)")
    assert 0.1 < _core.additions_per_nanosecond() < 50  # of any processor, however busy


def test_a_peer_that_is_faster_is_marked():
    run = fake_run(scale=10, dtypes=["float32"])
    assert "8.80 (!)" in text_of([tables.by_shape(run, run.measurements[:1])])
    assert "(!)" in tables.speeds(run, run.measurements).rows[0][2]


def test_json_comes_back(tmp_path):
    run = fake_run()
    path = tmp_path / "run.json"
    path.write_text(run.to_json())
    assert results.load(path, "--from") == run
    record = json.loads(path.read_text())
    assert record["cases"][0]["copies"]["pybn"] == 1.5
    assert record["cases"][0]["speed"]["torch"] == 5.5
    assert record["cases"][0]["bound"] == 1.0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 0}', '{"format": 1, "cases": 3}'])
def test_what_is_not_a_run_is_refused(text, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"--from .*not a file that `pybn bench --json`"):
        results.load(path, "--from")


def test_a_picture_per_variant(tmp_path):
    written = plot.plot(fake_run(), tmp_path / "all.png")
    assert [path.name for path in written] == ["all-float32-nchw.png", "all-float16-nchw.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_the_picture_shows_every_bar_its_bound_and_what_it_was_made_with():
    run = fake_run(dtypes=["float32"])
    figure = plot.draw(run, run.measurements)
    panels = figure.axes
    assert len(panels) == 2 * 3  # operations by groups
    assert [round(line.get_xdata()[0], 2) for line in panels[0].lines] == [1.0] * 4
    ends = [patch.get_x() + patch.get_width() for patch in panels[0].patches]
    assert ends == pytest.approx([1.5, 1.6, 30, 8.8])
    caption = "".join(text.get_text() for text in figure.texts).replace("\n", " ")
    for part in ("2 threads", "torch eager 2", pybn.__version__, session.environment()["instruction set"]):
        assert part in caption


def test_a_regression_is_found_after_a_second_look():
    baseline = fake_run(dtypes=["float32"])
    slower = {m.case: m for m in fake_run(scale=1.5, dtypes=["float32"]).measurements}
    same = {m.case: m for m in baseline.measurements}
    looks = []

    def measure_slow(case, seed):
        looks.append(seed)
        return slower[case]

    comparisons = compare.compare(baseline, measure_slow)
    assert len(compare.regressions(comparisons, compare.TOLERANCE)) == len(comparisons) == 2 * len(same)
    assert looks == [0, 1] * len(same)
    assert "+50% (2) (!)" in text_of([compare.comparison_table(comparisons, compare.TOLERANCE)])

    comparisons = compare.compare(baseline, lambda case, seed: same[case] if seed else slower[case])
    assert not compare.regressions(comparisons, compare.TOLERANCE)
    comparisons = compare.compare(baseline, lambda case, seed: slower[case], tolerance=0.6)
    assert not compare.regressions(comparisons, 0.6)


def test_what_else_has_changed_is_said():
    baseline = fake_run()
    assert compare.differences(baseline, session.environment(), 2) == []
    elsewhere = {**session.environment(), "processor": "another"}
    assert len(compare.differences(baseline, elsewhere, 1)) == 2


# The command


def test_a_quick_run_from_end_to_end(shapes, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    record, picture = tmp_path / "run.json", tmp_path / "run.png"
    result = run(
        "--quick", "--shapes", shapes, "--peers", "numpy,torch,jax", "--dtype", "float32,bfloat16", "--layout", "nhwc",
        "--ops", "forward,backward-add-relu", "--rounds", 2, "--json", record, "--plot", picture,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    for part in ("4x3x5x5", "6x8", "torch eager", "bfloat16 NHWC", "JAX jitted: absent", "medians of 2 rounds"):
        assert part in result.stdout
    cases = json.loads(record.read_text())["cases"]
    assert len(cases) == 2 * 2 * 2
    assert all(set(c["seconds"]) >= {"copy", "pybn", "pybn-fresh", "numpy", "torch"} for c in cases)
    assert (tmp_path / "run-bfloat16-nhwc.png").exists()

    again = run("--from", record, "--table", "markdown")
    assert again.exit_code == 0, again.output
    assert "| shape | bound |" in again.stdout

    same = run("--compare", record, "--tolerance", 1e6)
    assert same.exit_code == 0, same.output
    assert "none of 16 figures is worse" in same.stdout
    impossible = {**json.loads(record.read_text())}
    for c in impossible["cases"]:
        c["ratios"]["copy"] *= 1e6
    record.write_text(json.dumps(impossible))
    worse = run("--compare", record)
    assert worse.exit_code == 1
    assert "16 of 16 figures are worse by more than 25%" in worse.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "convolution"], "--ops 'convolution' is not known, expected forward,"),
        (["--ops", ""], "--ops '' is not known"),
        (["--shapes", "nowhere.txt"], "--shapes nowhere.txt: no such file"),
        (["--dtype", "int8"], "--dtype 'int8' is not known, expected float32,"),
        (["--layout", "chwn"], "--layout 'chwn' is not known, expected nchw, nhwc"),
        (["--peers", "cudnn"], "--peers 'cudnn' is not known, expected numpy, torch,"),
        (["--threads", "0"], "--threads is 0, expected at least 1"),
        (["--threads", "100000"], "--threads is 100000, but at most"),
        (["--batch", "0"], "--batch is 0, expected at least 1"),
        (["--rounds", "0"], "--rounds is 0, expected at least 1"),
        (["--table", "html"], "--table is 'html', expected terminal or markdown"),
        (["--json", "nowhere/run.json"], "--json nowhere/run.json is in a folder that does not exist"),
        (["--plot", "run.gif"], "--plot run.gif: expected a name that ends in .png"),
        (["--from", "nowhere.json"], "--from nowhere.json: no such file"),
        (["--compare", "nowhere.json", "--quick"], "leave out --quick"),
        (["--tolerance", "0.1"], "--tolerance is for --compare"),
    ],
)
def test_wrong_usage_names_the_option_and_the_way_out(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_line_error(run(*arguments), message, 2)


def test_a_missing_matplotlib_is_said_before_anything_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    one_line_error(run("--plot", tmp_path / "run.png"), 'pip install "pybn[bench]"', 2)


def test_a_wrong_result_is_no_figure(shapes, monkeypatch):
    monkeypatch.setattr("pybn.bench.peers.numpy.EPS", 10.0)
    result = run("--quick", "--shapes", shapes, "--peers", "numpy", "--ops", "forward", "--table", "markdown")
    one_line_error(result, "pybn: numpy: another result than pybn's", 1)
    assert "not timed: numpy differs from pybn in result 0 of forward 4x3x5x5 float32 nchw" in result.stdout
    assert "| NumPy |" not in result.stdout


def test_two_results_of_pybn_that_differ_end_the_run(shapes, monkeypatch):
    def disagree(*arguments):
        raise WrongResultError("pybn differs from pybn")

    monkeypatch.setattr(session, "require_equal", disagree)
    one_line_error(run("--quick", "--shapes", shapes, "--peers", "none", "--ops", "forward"), "pybn differs", 1)


def test_an_interrupt_keeps_what_was_measured(shapes, tmp_path, monkeypatch):
    measured = session.Bench.measure

    def measure(self, case, seed=0):
        if case.shape == Shape(6, 8, 1, 1):
            raise KeyboardInterrupt
        return measured(self, case, seed)

    monkeypatch.setattr(session.Bench, "measure", measure)
    path = tmp_path / "run.json"
    result = run("--shapes", shapes, "--peers", "none", "--ops", "forward", "--rounds", 1, "--json", path)
    assert "interrupted after 1 of 2 cases" in result.stderr
    assert len(results.load(path, "--from").measurements) == 1


def test_a_run_that_was_interrupted_at_once_is_no_error(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(fake_run(shapes=()).to_json())
    result = run("--from", path)
    assert result.exit_code == 0
    assert "medians of 7 rounds" in result.stdout


def test_strict_fails_if_a_target_is_missed(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(fake_run(scale=100).to_json())
    assert run("--from", path).exit_code == 0
    result = run("--from", path, "--strict")
    assert result.exit_code == 1
    assert "miss their target" in result.stderr


def test_nothing_of_it_is_imported_by_pybn_or_by_its_other_commands(tmp_path):
    code = "import sys, pybn, pybn.commands; print([m for m in sys.modules if m.startswith('pybn.bench')])"
    assert run_python(code, tmp_path) == "[]"


def test_the_l2_is_plausible():
    assert 2**14 <= l2_bytes() <= 2**28
