"""The command line: exit codes, one-line errors, JSON alone on standard output, safe writes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import run_python
from typer.testing import CliRunner

import pybn
from pybn import cli
from pybn.commands import app
from pybn.folding import backward, runtime
from pybn.folding.files import read_model

RUNNER = CliRunner()
FULL = Path("/dev/full")


@pytest.fixture(autouse=True)
def quick_timing(monkeypatch):
    monkeypatch.setattr(runtime, "TIMING_RUNS", (1, 2))


@pytest.fixture
def model(tmp_path):
    """A convolution with a batch norm, and a batch norm that nothing can absorb."""
    rng = np.random.default_rng(0)
    constants = {"w": rng.normal(size=(4, 3, 3, 3))}
    for prefix in "ab":
        constants[prefix + "_scale"] = rng.uniform(0.5, 2, 4)
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
    assert "norm_b  shift-stays" in result.stdout
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
    right = backward.BACKWARD["Conv"]

    def broken(*arguments):
        step = right(*arguments)
        rewrite = step.rewrites[0]
        constants = {i: array * np.float32(1.01) for i, array in rewrite.constants.items()}
        return dataclasses.replace(step, rewrites=(dataclasses.replace(rewrite, constants=constants),))

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
    other = tmp_path / "sub" / "model.onnx"
    report_as_model = tmp_path / "model.json"
    report_as_model.write_bytes(model.read_bytes())
    for arguments, message in [
        ((model, link, other), "3 paths: several models need --output-dir or --in-place"),
        ((model, "-o", tmp_path), "OUT is the same file as IN"),
        ((model, other, "-o", tmp_path / "out"), "two models would be written to the same file"),
        ((model, "-o", tmp_path, "--in-place"), "exclude each other"),
        (("-", "--in-place"), "standard input has no name"),
        ((model, "-", "--json"), "write JSON to a file"),
        ((model, "--report", tmp_path / "r.txt"), "expected a name that ends in .html or .json"),
        ((model, "--png", tmp_path / "r.jpg"), "expected a name that ends in .png"),
        ((model, "--report", tmp_path / "no" / "r.html"), "there is no folder"),
        ((model, link, "--in-place", "--report", tmp_path / "r.html"), "take one model"),
        ((report_as_model, "--report", report_as_model), "the report would be written over the model"),
        ((model, tmp_path / "o.json", "--report", tmp_path / "o.json"), "the report would be written over the model"),
        ((model, "--skip", "nobody"), "nobody"),
        ((model, "--only", "norm_a", "--only", "nobody"), "nobody"),
    ]:
        one_line_error(run("fold", *arguments), message, code=2)
    one_line_error(run("unfold", model, link), "OUT is the same file as IN", code=2)
    for arguments in (["fold"], ["fold", model, "--check", 0], ["fold", model, "--nonsense"], ["unfold"], ["inspect"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "link.onnx", "model.json"}


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
    monkeypatch.setattr(pybn, "folding", pybn.folding)  # so that it is what it was afterwards
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


# One model


def test_dry_run_writes_no_model(model):
    result = run("fold", model, "--dry-run", "--check", 1)
    assert result.exit_code == 0
    assert "checked on 1 run" in result.stdout
    assert "dry run: no model was written" in result.stdout
    assert [path.name for path in model.parent.iterdir()] == ["model.onnx"]
    assert json.loads(run("fold", model, "--dry-run", "--json").stdout)["output"] is None


def test_in_place_replaces_the_model_and_a_second_time_leaves_it_alone(model):
    expected = model.with_name("out.onnx")
    assert run("fold", model, expected).exit_code == 0
    assert run("fold", model, "--in-place").exit_code == 0
    assert model.read_bytes() == expected.read_bytes()
    before = model.stat()
    assert run("fold", model, "--in-place").exit_code == 0
    assert model.stat() == before


def test_in_place_replaces_a_link_and_not_what_it_leads_to(model):
    link, before = model.with_name("link.onnx"), model.read_bytes()
    link.symlink_to(model)
    assert run("fold", link, "--in-place").exit_code == 0
    assert not link.is_symlink()
    assert model.read_bytes() == before


@pytest.mark.parametrize(("most", "code"), [(0, 1), (1, 0)])
def test_more_left_than_allowed_is_a_failure_and_not_written(model, most, code):
    result = run("fold", model, "--max-left", most)
    assert result.exit_code == code
    assert model.with_name("model.folded.onnx").exists() == (code == 0)
    if code:
        assert "1 of 2 batch norms folded" in result.stdout
        assert "1 batch norms are left, more than --max-left 0; nothing was written" in result.stderr


def test_skip_and_only_pick_what_is_folded(model):
    for options in (["--skip", "norm_a"], ["--only", "norm_b"]):
        assert json.loads(run("fold", model, *options, "--json").stdout)["counts"]["folded"] == 0
    report = json.loads(run("fold", model, "--only", "norm_a", "--json").stdout)
    assert [row["status"] for row in report["rows"]] == ["folded", "left"]


def test_aggressive_folds_more(model):
    assert json.loads(run("fold", model, "--aggressive", "--json", "--check", 2).stdout)["counts"]["left"] == 0


def test_quiet_prints_nothing_but_errors_and_json(model):
    result = run("fold", model, "--quiet", "--check", 1)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert json.loads(run("fold", model, "--quiet", "--json").stdout)["counts"]["folded"] == 1
    one_line_error(run("fold", model, "--quiet", "--max-left", 0), "more than --max-left 0")


def test_all_rows_are_listed_if_asked(model):
    proto = onnx.load(model)
    proto.graph.node.append(onnx.helper.make_node("Mul", ["y", "k"], ["z"], name="affine"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(2), "k"))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["N", 4]))
    onnx.save(proto, model)
    assert "affine" not in run("fold", model).stdout.replace("1 other affine", "")
    assert "\naffine " in run("fold", model, "--all").stdout


def test_reports_are_files_of_their_own(model):
    page, data, png = (model.with_name(name) for name in ("r.html", "r.json", "r.png"))
    result = run("fold", model, "--report", page, "--report", data, "--png", png, "--max-left", 0)
    assert result.exit_code == 1  # even then: the report says why
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert "norm_b" in page.read_text()
    report = json.loads(data.read_text())
    assert report["counts"]["left"] == 1
    assert [weights["node"] for weights in report["weights"]] == ["conv[1]"]
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_report_that_cannot_be_written_is_one_line(model, monkeypatch):
    page = model.with_name("r.html")
    page.mkdir()
    result = run("fold", model, "--report", page, "--quiet")
    assert result.exit_code == 1
    assert "r.html: Is a directory" in result.stderr
    assert result.stderr.count("\n") == 1


# Several models


def test_several_models_into_a_folder(model, tmp_path):
    second, out = tmp_path / "second.onnx", tmp_path / "deep" / "out"
    second.write_bytes(model.read_bytes())
    result = run("fold", model, second, "-o", out, "--json")
    assert result.exit_code == 0
    assert [report["counts"]["folded"] for report in json.loads(result.stdout)] == [1, 1]
    assert sorted(path.name for path in out.iterdir()) == ["model.onnx", "second.onnx"]
    assert (out / "model.onnx").read_bytes() == (out / "second.onnx").read_bytes()
    assert second.read_bytes() == model.read_bytes()


def test_one_bad_model_does_not_stop_the_others(model, tmp_path):
    bad, out = tmp_path / "bad.onnx", tmp_path / "out"
    bad.write_bytes(b"garbage")
    result = run("fold", bad, model, "-o", out, "--json")
    assert result.exit_code == 1
    first, second = json.loads(result.stdout)
    assert first["error"].endswith("not an ONNX model (damaged, or another format)")
    assert second["counts"]["folded"] == 1
    assert result.stderr.count("\n") == 1
    assert [path.name for path in out.iterdir()] == ["model.onnx"]


def test_a_name_that_one_model_lacks_does_not_stop_the_others(model, tmp_path):
    other, out = tmp_path / "other.onnx", tmp_path / "out"
    renamed = onnx.load(model)
    for node in renamed.graph.node:
        node.name = node.name.replace("norm_a", "norm_z")
    onnx.save(renamed, other)
    result = run("fold", other, model, "-o", out, "--skip", "norm_a", "--json")
    assert result.exit_code == 2
    first, second = json.loads(result.stdout)
    assert first["error"].startswith(f"{other}: skip names 'norm_a'")
    assert second["counts"]["left"] >= 1
    assert result.stderr.count("\n") == 1
    assert [path.name for path in out.iterdir()] == ["model.onnx"]


def test_a_picture_of_no_weights_is_one_line(tmp_path):
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "g",
        *([onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1])] for name in "xy"),
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "plain.onnx")
    one_line_error(run("fold", tmp_path / "plain.onnx", "--png", tmp_path / "p.png"), "no weights to draw")


# Standard input and output


def test_a_model_goes_through_standard_input_and_output(model):
    expected = model.with_name("expected.onnx")
    run("fold", model, expected)
    result = subprocess.run(
        [sys.executable, "-m", "pybn", "fold", "-", "--report", "r.json"],
        input=model.read_bytes(),
        capture_output=True,
        check=False,
        cwd=model.parent,
    )
    assert result.returncode == 0
    assert result.stdout == expected.read_bytes()
    assert b"1 of 2 batch norms folded" in result.stderr
    assert json.loads(model.with_name("r.json").read_text())["input"]["bytes"] == model.stat().st_size
    assert run("fold", model, "-").stdout_bytes == expected.read_bytes()
    out = model.with_name("out.onnx")
    result = RUNNER.invoke(app, ["fold", "-", str(out), "--json"], input=model.read_bytes())
    assert json.loads(result.stdout)["counts"]["folded"] == 1
    assert result.stderr == ""
    assert out.read_bytes() == expected.read_bytes()


def test_standard_input_that_is_no_model_or_is_not_whole_is_one_line(model, tmp_path):
    for content, message in ((b"", "the file is empty"), (b"garbage", "not an ONNX model")):
        result = RUNNER.invoke(app, ["fold", "-"], input=content)
        one_line_error(result, f"standard input: {message}")
    outside = tmp_path / "outside.onnx"
    onnx.save(onnx.load(model), outside, save_as_external_data=True, location="w.bin", size_threshold=0)
    result = RUNNER.invoke(app, ["fold", "-"], input=outside.read_bytes())
    one_line_error(result, "is in an external file: give the path of the model")


@pytest.mark.skipif(os.name != "posix", reason="needs limits on the size of files")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_model_that_standard_output_takes_in_part_is_a_failure(tmp_path, model, unbuffered):
    """Unbuffered, the first write says that it wrote a part, and only the second one fails."""
    import resource

    whole = run_pybn(model).stdout
    onnx.load_from_string(whole)
    target = tmp_path / "part.onnx"
    limit = len(whole) // 2
    with target.open("wb") as part:
        result = run_pybn(
            model,
            stdout=part,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
    assert result.returncode == 1
    assert b"File too large" in result.stderr
    assert target.stat().st_size <= limit


def run_pybn(model, **options):
    """`pybn fold MODEL -` in a process of its own."""
    command = [sys.executable, "-c", "from pybn.cli import main; main()", "fold", str(model), "-", "--quiet"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(command, check=False, cwd=model.parent, **options)  # not in a source tree


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_a_full_standard_output_is_one_line(model):
    with FULL.open("wb") as full:
        result = subprocess.run(
            [sys.executable, "-m", "pybn", "fold", str(model), "-", "--quiet"],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
            cwd=model.parent,
        )
    assert result.returncode == 1
    assert result.stderr == b"pybn: standard output: No space left on device; it has no whole model\n"


# External data


@pytest.fixture
def outside(tmp_path):
    """A model whose weights are in a data file."""
    rng = np.random.default_rng(5)
    constants = {"w": rng.normal(size=(16, 3, 8, 8))}
    constants |= {name: rng.uniform(0.5, 2, 16) for name in ("scale", "bias", "mean", "var")}
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
            onnx.helper.make_node("BatchNormalization", ["c", "scale", "bias", "mean", "var"], ["y"], name="norm"),
        ],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 9, 9])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 16, 2, 2])],
        [onnx.numpy_helper.from_array(a.astype("float32"), n) for n, a in constants.items()],
    )
    folder = tmp_path / "outside"
    folder.mkdir()
    path = folder / "m.onnx"
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(proto, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_model_with_a_data_file_is_written_with_one(outside):
    assert run("fold", outside, "--check", 1).exit_code == 0
    assert names(outside.parent) == ["m.folded.onnx", "m.folded.onnx.data", "m.onnx", "w.bin"]
    folded = outside.with_name("m.folded.onnx")
    assert len(onnx.load(folded).graph.initializer[0].raw_data) == 16 * 3 * 64 * 4
    assert run("fold", outside, "-").stdout_bytes == read_model(folded)[0].SerializeToString(deterministic=True)
    # Once more: what is there already is used.
    before = folded.read_bytes()
    assert run("fold", outside).exit_code == 0
    assert folded.read_bytes() == before
    assert names(outside.parent) == ["m.folded.onnx", "m.folded.onnx.data", "m.onnx", "w.bin"]


def test_in_place_says_which_data_file_is_of_no_more_use(outside):
    result = run("fold", outside, "--in-place")
    assert result.exit_code == 0
    assert f"w.bin: holds nothing of {outside} any more" in result.stderr
    assert names(outside.parent) == ["m.onnx", "m.onnx.data", "w.bin"]
    (outside.parent / "w.bin").unlink()
    assert run("fold", outside, "--in-place", "--check", 1).exit_code == 0
    assert names(outside.parent) == ["m.onnx", "m.onnx.data"]


def test_in_place_through_a_link_does_not_call_data_useless_that_its_model_needs(outside):
    link = outside.with_name("link.onnx")
    link.symlink_to(outside)
    result = run("fold", link, "--in-place")
    assert result.exit_code == 0
    assert "any more" not in result.stderr
    read_model(outside)


def test_a_reversible_model_with_a_data_file_comes_back_with_it(outside, tmp_path):
    model, data = outside.read_bytes(), outside.with_name("w.bin").read_bytes()
    assert run("fold", outside, "--in-place", "--reversible", "-q").exit_code == 0
    back = tmp_path / "back" / "m.onnx"
    back.parent.mkdir()
    result = run("unfold", outside, back)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("wrote") == 2
    assert (back.read_bytes(), back.with_name("w.bin").read_bytes()) == (model, data)
    # Beside the folded model its data file is there still: it is not written again.
    assert run("unfold", outside).stdout.count("wrote") == 1
    assert outside.with_name("m.unfolded.onnx").read_bytes() == model
    # But another file of its name is not overwritten.
    back.unlink()
    back.with_name("w.bin").write_bytes(b"precious")
    one_line_error(run("unfold", outside, back), "w.bin: is in the way of a data file of the original")
    assert not back.exists()
    assert back.with_name("w.bin").read_bytes() == b"precious"
    one_line_error(run("unfold", outside, "-"), "the original has its weights in w.bin: give OUT")
    # Nor is one written through a link that leads elsewhere.
    back.with_name("w.bin").unlink()
    back.with_name("w.bin").symlink_to(tmp_path / "elsewhere")
    one_line_error(run("unfold", outside, back), "is in the way")
    assert not (tmp_path / "elsewhere").exists()


# Inspect and unfold


def test_inspect_says_what_is_there_and_what_would_happen(model):
    result = run("inspect", model)
    assert result.exit_code == 0
    blocks = result.stdout.split("BatchNormalization ")
    assert "from        Conv conv[1]\n" in blocks[1]
    assert "to          Relu r\n" in blocks[1]
    assert "default     folds back into conv[1]\n" in blocks[1]
    assert "aggressive" not in blocks[1]
    assert "default     stays: " in blocks[2]
    assert "aggressive  folds " in blocks[2]
    assert result.stdout.endswith("2 batch norms, 0 other affine nodes: 1 would be folded, 2 with --aggressive\n")
    assert [path.name for path in model.parent.iterdir()] == ["model.onnx"]


def test_inspect_as_json(model):
    found = json.loads(run("inspect", model, "--json").stdout)
    assert found["schema"] == 1
    assert found["counts"]["batch_norms"] == 2
    assert [row["name"] for row in found["rows"]] == ["norm_a", "norm_b"]
    assert [row["fold"]["status"] for row in found["rows"]] == ["folded", "left"]
    assert found["rows"][1]["before"] == ["Relu r"]
    assert found["rows"][1]["after"] == ["ReduceMean y"]
    assert found["rows"][0]["aggressive"] is None
    one_line_error(run("inspect", model.with_name("none.onnx")), "No such file")


@pytest.mark.parametrize("aggressive", [[], ["--aggressive"]])
def test_a_reversible_model_is_restored_byte_for_byte(model, aggressive):
    folded, back = model.with_name("f.onnx"), model.with_name("b.onnx")
    assert run("fold", model, folded, "--reversible", *aggressive, "--check", 1).exit_code == 0
    result = run("unfold", folded, back)
    assert result.exit_code == 0
    assert result.stdout == f"wrote {back}\n"
    assert back.read_bytes() == model.read_bytes()
    assert run("unfold", folded).exit_code == 0
    assert model.with_name("f.unfolded.onnx").read_bytes() == model.read_bytes()
    assert RUNNER.invoke(app, ["unfold", "-"], input=folded.read_bytes()).stdout_bytes == model.read_bytes()
    assert run("unfold", folded, "-", "--quiet").stdout_bytes == model.read_bytes()


def test_folding_a_reversible_model_again_changes_nothing(model):
    once, twice, thrice = (model.with_name(f"{count}.onnx") for count in range(3))
    assert run("fold", model, once, "--reversible").exit_code == 0
    assert run("fold", once, twice, "--reversible").exit_code == 0
    assert run("fold", once, thrice).exit_code == 0
    assert once.read_bytes() == twice.read_bytes() == thrice.read_bytes()


def test_a_model_folded_in_two_steps_is_unfolded_in_two(model):
    first, second, back = (model.with_name(f"{count}.onnx") for count in range(3))
    assert run("fold", model, first, "--only", "norm_a", "--reversible").exit_code == 0
    assert run("fold", first, second, "--aggressive", "--reversible").exit_code == 0
    assert run("unfold", second, back).exit_code == 0
    assert back.read_bytes() == first.read_bytes()
    # Without --reversible, the second step ends the way back, and says so.
    result = run("fold", first, second, "--aggressive")
    assert "does not carry its original" in result.stderr
    one_line_error(run("unfold", second, back), "not folded with --reversible")


def test_a_model_without_batch_norms_is_reversible_too(model):
    proto = onnx.load(model)
    del proto.graph.node[3]
    del proto.graph.node[1]
    proto.graph.node[1].input[0] = "c"
    proto.graph.node[2].input[0] = "r"
    onnx.save(proto, model)
    folded, again, back = (model.with_name(f"{count}.onnx") for count in range(3))
    assert run("fold", model, folded, "--reversible").exit_code == 0
    assert run("fold", folded, again, "--reversible").exit_code == 0
    assert folded.read_bytes() == again.read_bytes()
    assert run("unfold", folded, back).exit_code == 0
    assert back.read_bytes() == model.read_bytes()


def test_what_cannot_be_unfolded_is_one_line(model):
    one_line_error(run("unfold", model), f"{model}: does not carry its original")
    folded = model.with_name("f.onnx")
    run("fold", model, folded, "--reversible")
    proto = onnx.load(folded)
    proto.graph.node[0].name = "renamed"
    onnx.save(proto, folded)
    one_line_error(run("unfold", folded), "was changed after it was folded")
    assert not model.with_name("f.unfolded.onnx").exists()


# The command itself


@pytest.mark.parametrize("command", ["fold", "inspect", "unfold", "bench"])
def test_every_command_has_examples_in_its_help(command):
    text = run(command, "--help").stdout
    assert "Examples" in text
    assert text.count(f"pybn {command}") >= 2
    assert "Exit codes" in text


def test_help_imports_nothing_that_is_slow(tmp_path):
    code = """
import sys
from pybn import cli
sys.argv = ["pybn", "--help"]
try:
    cli.main()
except SystemExit:
    pass
slow = {"onnx", "onnx_ir", "onnxruntime", "torch", "matplotlib", "jinja2", "google.protobuf", "rich.progress"}
assert not slow & set(sys.modules), slow & set(sys.modules)
"""
    assert "inspect" in run_python(code, tmp_path)


@pytest.mark.parametrize(
    ("words", "expected"), [("pybn un", "unfold"), ("pybn fold --in", "--in-place"), ("pybn unfold -", "--quiet")]
)
def test_shells_complete_commands_and_options(tmp_path, words, expected):
    code = "import sys; sys.argv = ['pybn']; from pybn.cli import main; main()"
    environment = {"_PYBN_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    assert expected in run_python(code, tmp_path, env=environment).split()
