"""The command line: exit codes, one-line errors, JSON alone on standard output, safe writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

import pybn
from pybn import cli
from pybn.commands import app
from pybn.folding import backward, runtime

RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def quick_timing(monkeypatch):
    monkeypatch.setattr(runtime, "TIMING_RUNS", (1, 2))


@pytest.fixture
def model(tmp_path):
    """A convolution with a batch norm, and a batch norm that nothing can absorb."""
    rng = np.random.default_rng(0)
    constants = {"w": rng.normal(size=(4, 3, 3, 3))}
    for prefix in "ab":
        constants[prefix + "_scale"] = rng.normal(size=4)
        constants[prefix + "_bias"] = rng.normal(size=4)
        constants[prefix + "_mean"] = rng.normal(size=4)
        constants[prefix + "_var"] = rng.uniform(0.5, 2, 4)

    def batch_norm(x, y, prefix):
        names = [f"{prefix}_{kind}" for kind in ("scale", "bias", "mean", "var")]
        return onnx.helper.make_node("BatchNormalization", [x, *names], [y], name=f"norm_{prefix}")

    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Conv", ["x", "w"], ["c"], name="conv[1]"),
            batch_norm("c", "n", "a"),
            onnx.helper.make_node("Relu", ["n"], ["r"]),
            batch_norm("r", "m", "b"),
            onnx.helper.make_node("ReduceMean", ["m"], ["y"], axes=[2, 3], keepdims=0),
        ],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 3, 8, 8])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 4])],
        [onnx.numpy_helper.from_array(a.astype("float32"), n) for n, a in constants.items()],
    )
    path = tmp_path / "model.onnx"
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8),
        path,
    )
    return path


def run(*arguments):
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


def one_line_error(result, message, code=1):
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


def test_fold_writes_beside_the_input(model):
    result = run("fold", model)
    assert result.exit_code == 0, result.output
    assert "1 of 2 batch norms folded, 1 left" in result.stdout
    assert "conv[1]" in result.stdout
    assert "shift-stays" in result.stdout
    folded = model.with_name("model.folded.onnx")
    assert f"wrote {folded}" in result.stdout
    assert [node.op_type for node in onnx.load(folded).graph.node].count("BatchNormalization") == 1
    assert result.stderr == ""


def test_fold_to_a_given_file_and_again(model, tmp_path):
    once, twice = tmp_path / "once.onnx", tmp_path / "twice.onnx"
    assert run("fold", model, once).exit_code == 0
    assert run("fold", once, twice).exit_code == 0
    assert once.read_bytes() == twice.read_bytes()


def test_nothing_to_fold_is_said(tmp_path):
    info = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [info], [out])
    path = tmp_path / "m.onnx"
    onnx.save(onnx.helper.make_model(graph), path)
    result = run("fold", path)
    assert result.exit_code == 0
    assert "nothing to fold" in result.stdout
    assert (tmp_path / "m.folded.onnx").exists()


def test_json_is_alone_on_standard_output(model):
    result = run("fold", model, "--json", "--check", 2)
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["schema"] == 2
    assert report["counts"]["batch_norms"] == 2
    assert report["counts"]["folded"] == report["counts"]["left"] == 1
    assert report["check"]["passed"] is True
    assert report["check"]["inputs"] == 2
    assert report["input"]["path"] == str(model)
    assert report["output"]["bytes"] == model.with_name("model.folded.onnx").stat().st_size
    assert result.stderr == ""


def test_check_shows_error_bound_and_times(model):
    result = run("fold", model, "--check", 3)
    assert result.exit_code == 0
    assert "checked on 3 runs: largest error" in result.stdout
    assert "bound" in result.stdout
    assert "ms before" in result.stdout


def test_check_data_shows_accuracy(model, tmp_path):
    rng = np.random.default_rng(1)
    data = tmp_path / "d.npz"
    np.savez(data, x=rng.normal(size=(130, 3, 8, 8)).astype("float32"), labels=rng.integers(0, 4, 130))
    result = run("fold", model, "--check-data", data, "--check", 1, "--json")
    assert result.exit_code == 0, result.output
    check = json.loads(result.stdout)["check"]
    assert check["inputs"] == 3
    assert check["predictions"]["samples"] == 130
    assert check["predictions"]["changed"] == 0
    result = run("fold", model, "--check-data", data)
    assert "0 of 130 predictions changed, accuracy" in result.stdout


def break_conv_rule(monkeypatch):
    def broken(node, index, affine, facts):
        step = backward.conv(node, index, affine, facts)
        (rewrite,) = step.rewrites
        constants = {i: array * np.float32(1.01) for i, array in rewrite.constants.items()}
        return replace(step, rewrites=(replace(rewrite, constants=constants),))

    monkeypatch.setitem(backward.BACKWARD, "Conv", broken)


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_wrong_fold_is_named_and_not_written(model, monkeypatch, as_json):
    target = model.with_name("model.folded.onnx")
    target.write_bytes(b"old")
    break_conv_rule(monkeypatch)
    result = run("fold", model, "--check", 2, *as_json)
    assert result.exit_code == 1
    assert "the check failed: fold norm_a" in result.stderr
    assert result.stderr.count("\n") == 1
    assert target.read_bytes() == b"old"
    if as_json:
        report = json.loads(result.stdout)
        assert report["output"] is None
        assert report["check"]["passed"] is False


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "the file is empty"), (b"garbage", "not an ONNX model"), (b"\x08\x07", "invalid model")],
)
def test_malformed_files(tmp_path, content, message):
    path, target = tmp_path / "m.onnx", tmp_path / "out.onnx"
    path.write_bytes(content)
    target.write_bytes(b"old")
    one_line_error(run("fold", path, target), message)
    one_line_error(run("fold", path, target, "--json"), message)
    assert target.read_bytes() == b"old"


def test_truncations_and_bit_flips_never_end_in_a_traceback(model, tmp_path):
    content = model.read_bytes()
    rng = np.random.default_rng(2)
    path, target = tmp_path / "m.onnx", tmp_path / "out.onnx"
    for draw in range(60):
        damaged = bytearray(content)
        if draw % 2:
            damaged = damaged[: rng.integers(len(damaged))]
        else:
            damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        target.write_bytes(b"old")
        result = run("fold", path, target)
        assert result.exit_code in (0, 1)
        assert result.exception is None or isinstance(result.exception, SystemExit)
        if result.exit_code:
            one_line_error(result, "pybn:")
            assert target.read_bytes() == b"old"


def test_missing_directory_and_unreadable(tmp_path, model):
    one_line_error(run("fold", tmp_path / "none.onnx"), "No such file")
    one_line_error(run("fold", tmp_path), "is a directory")
    one_line_error(run("fold", model, tmp_path / "no" / "out.onnx"), "No such file")
    one_line_error(run("fold", model, tmp_path), "is not a regular file")


def test_names_cannot_control_the_terminal(tmp_path, model):
    proto = onnx.load(model)
    proto.graph.node[1].name = "\x1b[31mred\nline"
    onnx.save(proto, model)
    result = run("fold", model)
    assert "\x1b" not in result.stdout
    assert "?[31mred?line" in result.stdout


def test_wrong_usage(model, tmp_path):
    one_line_error(run("fold", model, model), "OUT is the same file as IN", code=2)
    link = tmp_path / "link.onnx"
    os.link(model, link)
    one_line_error(run("fold", model, link), "OUT is the same file as IN", code=2)
    for arguments in (["fold"], ["fold", model, "--check", 0], ["fold", model, "--nonsense"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.stderr


def test_failing_write_keeps_the_old_file(model, monkeypatch):
    target = model.with_name("model.folded.onnx")
    target.write_bytes(b"old")

    def fail(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    one_line_error(run("fold", model), "No space left on device; nothing was written")
    assert target.read_bytes() == b"old"
    names = sorted(path.name for path in model.parent.iterdir())
    assert names == ["model.folded.onnx", "model.onnx"]


def test_bad_check_data(model, tmp_path):
    data = tmp_path / "d.npz"
    np.savez(data, z=np.zeros(3))
    one_line_error(run("fold", model, "--check-data", data), "no array 'x', expected one for each")
    assert not model.with_name("model.folded.onnx").exists()


def test_help_version_and_info():
    assert "Examples" in run("fold", "--help").stdout
    assert run("--version").stdout == f"pybn {pybn.__version__}\n"
    result = run("info")
    assert result.exit_code == 0
    assert "\nonnxruntime " in result.stdout


def test_python_dash_m(model, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "pybn", "fold", str(model), "--json"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,  # not a folder with ./pybn, which has no compiled core
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert json.loads(result.stdout)["counts"]["folded"] == 1
    assert result.stderr == ""


@pytest.mark.parametrize("missing", ["typer", "onnx", "onnxruntime"])
def test_missing_extras_are_one_line(model, monkeypatch, capsys, missing):
    for name in list(sys.modules):
        if name.startswith("pybn.") and name != "pybn.cli":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(sys, "argv", ["pybn", "fold", str(model), "--check", "1"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert 'pip install "pybn[cli,onnx]"' in captured.err
    assert captured.err.count("\n") == 1


def test_import_pybn_needs_none_of_them(tmp_path):
    code = (
        "import sys, pybn, pybn.folding; "
        "bad = {'onnx', 'onnx_ir', 'onnxruntime', 'typer', 'rich', 'torch'} & set(sys.modules); "
        "sys.exit(str(bad) if bad else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")


def test_out_that_holds_the_weights_of_in_is_refused(model, tmp_path):
    source = tmp_path / "external.onnx"
    onnx.save(onnx.load(model), source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    weights = (tmp_path / "weights.bin").read_bytes()
    result = run("fold", str(source), str(tmp_path / "weights.bin"))
    assert result.exit_code == 2
    assert "OUT is a file in which IN keeps its weights" in result.stderr
    assert (tmp_path / "weights.bin").read_bytes() == weights


@pytest.mark.parametrize("source", ["", "/"])
def test_in_without_a_name_is_wrong_usage(source):
    result = run("fold", source)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
