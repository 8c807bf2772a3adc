"""Reading without trusting, writing without losing."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import run_python
from fold_models import batch_norms, conv_model, model, net_model, runtime

from pybn.folding import disk, external, files, protos
from pybn.folding.files import ModelError, load, read_model, write_model
from pybn.folding.onnx import fold_onnx

EXAMPLE = Path(__file__).parents[2] / "examples" / "mnist_cnn.onnx"


def save_external(folder, **changes):
    """Save a model with its weight in w.bin; return its path after changing the entry."""
    proto = conv_model()
    weight = proto.graph.initializer[0]
    (folder / "w.bin").write_bytes(b"\0" * 16 + weight.raw_data)
    entries = {"location": "w.bin", "offset": "16", "length": str(len(weight.raw_data)), **changes}
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, entry in entries.items():
        if entry is not None:
            weight.external_data.add(key=key, value=entry)
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def test_external_data_becomes_part_of_the_result(tmp_path):
    result = fold_onnx(save_external(tmp_path))
    assert batch_norms(result.model) == 0
    assert result.model == fold_onnx(conv_model()).model
    assert read_model(save_external(tmp_path, length=None))[0] == conv_model()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"location": "/etc/passwd"}, "outside the model's folder"),
        ({"location": "../w.bin"}, "outside the model's folder"),
        ({"location": "a/../../w.bin"}, "outside the model's folder"),
        ({"location": "C:\\w.bin"}, "outside the model's folder"),
        ({"location": "..\\w.bin"}, "outside the model's folder"),
        ({"location": "link.bin"}, "a link out of the model's folder"),
        ({"location": "loop.bin"}, "loop.bin"),
        ({"location": "none.bin"}, "no file 'none.bin'"),
        ({"location": "."}, "no file"),
        ({"location": ""}, "no valid location"),
        ({"location": "a\0b"}, "no valid location"),
        ({"location": None}, "no valid location"),
        ({"offset": "17"}, "which has only 448"),
        ({"offset": "-4"}, "bytes -4"),
        ({"offset": "many"}, "invalid offset"),
        ({"length": "4"}, r"has length 4, but shape \(4, 3, 3, 3\) needs 432"),
        ({"length": str(2**62)}, "needs 432"),
    ],
)
def test_external_data_is_checked_before_it_is_read(tmp_path, changes, message):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "w.bin").write_bytes(b"secret" * 100)
    (folder / "link.bin").symlink_to(tmp_path / "w.bin")
    (folder / "loop.bin").symlink_to(folder / "loop.bin")
    path = save_external(folder, **changes)
    with pytest.raises(ModelError, match=message) as caught:
        read_model(path)
    assert "\n" not in str(caught.value)


def test_external_data_of_absurd_size_are_refused_unread(tmp_path):
    path = save_external(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    weight = proto.graph.initializer[0]
    weight.dims[:] = [2**62, 2**62, 3, 3]
    del weight.external_data[:]
    weight.external_data.add(key="location", value="w.bin")
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="which has only 448"):
        read_model(path)


@pytest.mark.skipif(not hasattr(os, "SEEK_DATA"), reason="needs files with holes")
def test_a_model_above_2_gb_is_folded_without_reading_it(tmp_path):
    """Most of its data are a hole in a sparse file; in memory or on disk they would be 2.6 GB."""
    rows, seven = 2**29 + 2**27, 2**28
    proto = conv_model()
    table = proto.graph.initializer.add(name="table", data_type=onnx.TensorProto.FLOAT, dims=[rows, 1])
    table.data_location = onnx.TensorProto.EXTERNAL
    for key, entry in (("location", "m.bin"), ("offset", "4096"), ("length", str(4 * rows))):
        table.external_data.add(key=key, value=entry)
    proto.graph.input.append(onnx.helper.make_tensor_value_info("i", onnx.TensorProto.INT64, [1]))
    proto.graph.node.append(onnx.helper.make_node("Gather", ["table", "i"], ["row"]))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("row", onnx.TensorProto.FLOAT, [1, 1]))
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with (tmp_path / "m.bin").open("wb") as file:
        file.truncate(4096 + 4 * rows)
        file.seek(4096 + 4 * seven)
        file.write(np.float32(7).tobytes())

    code = f"""
import numpy as np, onnxruntime
from pathlib import Path
from pybn.folding.files import load, write_model
from pybn.folding.onnx import fold_onnx
loaded = load("m.onnx")
result = fold_onnx(loaded.proto, folder=loaded.folder)
assert len(result.report.folds) == 1
assert fold_onnx("m.onnx").model == result.model
write_model(result.model, "out.onnx", folder=loaded.folder)
status = Path("/proc/self/status")
if status.exists():  # not getrusage, which counts what the process had before it became this program
    assert int(status.read_text().split("VmHWM:")[1].split()[0]) < 500_000, "it was read"
session = onnxruntime.InferenceSession("out.onnx")
x = np.zeros((1, 3, 8, 8), "float32")
for index, expected in (({seven}, 7), ({rows - 1}, 0)):
    assert session.run(["row"], {{"x": x, "i": np.array([index])}})[0].item() == expected
"""
    try:
        run_python(code, tmp_path)
        data = (tmp_path / "out.onnx.data").stat()
        assert data.st_size > 2**31
        assert data.st_blocks * 512 < 2**24
    finally:
        for file in tmp_path.iterdir():
            file.unlink()  # pytest keeps folders, and may copy them


def test_beyond_one_message_data_stay_outside_and_are_copied_to_the_result(tmp_path, monkeypatch):
    path = save_external(tmp_path)
    expected = fold_onnx(path).model
    monkeypatch.setattr(files, "MAX_BYTES", 600)
    loaded = load(path)
    assert protos.is_external(loaded.proto.graph.initializer[0])
    result = fold_onnx(path)
    assert batch_norms(result.model) == 0
    out = tmp_path / "sub" / "out.onnx"
    out.parent.mkdir()
    with pytest.raises(ModelError, match="without tensors of 1024 bytes"):
        write_model(result.model, out, folder=tmp_path)
    monkeypatch.setattr(files, "EXTERNAL_FROM", 100)
    write_model(result.model, out, folder=tmp_path)
    monkeypatch.undo()
    assert read_model(out)[0] == expected


def test_hard_links_that_onnx_ir_does_not_read_are_one_line(tmp_path, monkeypatch):
    path = save_external(tmp_path)
    os.link(tmp_path / "w.bin", tmp_path / "again.bin")
    assert batch_norms(fold_onnx(path).model) == 0
    monkeypatch.setattr(files, "MAX_BYTES", 600)
    with pytest.raises(ModelError, match="several hard links"):
        fold_onnx(path)


def test_a_model_proto_with_external_data_says_what_to_do(tmp_path):
    proto = onnx.load(save_external(tmp_path), load_external_data=False)
    with pytest.raises(ModelError, match="give the path of the model"):
        fold_onnx(proto)


def test_external_tensor_inside_a_constant_node_is_found(tmp_path):
    proto = conv_model()
    node = onnx.helper.make_node("Constant", [], ["k"], value=proto.graph.initializer[0])
    node.attribute[0].t.ClearField("raw_data")
    node.attribute[0].t.data_location = onnx.TensorProto.EXTERNAL
    node.attribute[0].t.external_data.add(key="location", value="/etc/passwd")
    proto.graph.node.insert(0, node)
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="outside the model's folder"):
        read_model(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"not a model at all", "not an ONNX"), (b"\x08\x08", "invalid model")],
)
def test_files_that_are_not_models(tmp_path, content, message):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_model(path)


def test_missing_files_and_directories(tmp_path):
    with pytest.raises(ModelError, match="No such file"):
        read_model(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="is a directory"):
        read_model(tmp_path)
    with pytest.raises(ModelError, match=r"none\.onnx"):
        fold_onnx(str(tmp_path / "none.onnx"))


def test_typed_data_is_read_and_counted(tmp_path):
    proto = conv_model()
    for tensor in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        tensor.ClearField("raw_data")
        tensor.float_data.extend(array.reshape(-1).tolist())
    folded = fold_onnx(proto).model
    x = np.ones((1, 3, 8, 8), "float32")
    expected = runtime(fold_onnx(conv_model()).model, x=x)[0]
    np.testing.assert_allclose(runtime(folded, x=x)[0], expected, rtol=1e-5)
    proto.graph.initializer[0].float_data.pop()
    with pytest.raises(ModelError, match="does not fill its shape"):
        fold_onnx(proto)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_files_never_raise_anything_else(tmp_path, seed):
    rng = np.random.default_rng(seed)
    content = bytearray(net_model().SerializeToString())
    path = tmp_path / "m.onnx"
    for _ in range(8):
        damaged = bytearray(content)
        if rng.random() < 0.3:
            damaged = damaged[: rng.integers(len(damaged))]
        for _ in range(rng.integers(1, 6)):
            # Most of a model is weights: aim at the structure around them.
            position = int(rng.integers(len(damaged))) if damaged else 0
            if damaged:
                damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        try:
            folded = fold_onnx(path).model
        except ModelError as error:
            message = str(error)
            folded = None
        if folded is None:
            assert "\n" not in message
        else:
            onnx.checker.check_model(folded)


# Writing


def test_write_is_readable_and_hashed(tmp_path):
    path = tmp_path / "out.onnx"
    info = write_model(conv_model(), path)
    proto, again = read_model(path)
    assert proto == conv_model()
    assert info == again
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


@pytest.mark.parametrize("failing", ["replace", "fsync", "write"])
def test_any_failure_leaves_the_old_bytes_and_no_litter(tmp_path, monkeypatch, failing):
    path = tmp_path / "out.onnx"
    path.write_bytes(b"old")

    def fail(*_arguments, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "write":
        # A full disk: the file accepts a part and then no more.
        real = os.fdopen

        def fdopen(descriptor, mode):
            file = real(descriptor, mode, buffering=0)
            file.write(b"half of it")
            file.close()
            fail()

        monkeypatch.setattr(os, "fdopen", fdopen)
    else:
        monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        write_model(conv_model(), path)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


def test_interrupt_leaves_no_litter(tmp_path, monkeypatch):
    def interrupt(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_model(conv_model(), tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


def test_mode_follows_the_umask_and_an_existing_file(tmp_path):
    path = tmp_path / "out.onnx"
    umask = os.umask(0o027)
    try:
        write_model(conv_model(), path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        write_model(conv_model(), path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(umask)


def test_a_link_is_replaced_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    link = tmp_path / "out.onnx"
    link.symlink_to(precious)
    write_model(conv_model(), link)
    assert precious.read_bytes() == b"precious"
    assert not link.is_symlink()


def test_what_is_not_a_regular_file_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe.onnx"
    os.mkfifo(pipe)
    with pytest.raises(ModelError, match="exists and is not a regular file"):
        write_model(conv_model(), pipe)
    assert pipe.is_fifo()


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path, monkeypatch):
    real = os.open

    def no_folders(path, flags, *rest):
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "denied")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", no_folders)
    info = write_model(conv_model(), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size == info.bytes


# Malformed and hostile models


def written(tmp_path, proto):
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def cyclic():
    nodes = [onnx.helper.make_node("Relu", ["b"], ["a"]), onnx.helper.make_node("Relu", ["a"], ["b"])]
    return model(nodes, {}, [1], [1], outputs=[onnx.helper.make_tensor_value_info("b", 1, [1])])


def recursive_functions():
    imports = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("d", 1)]
    calls = [onnx.helper.make_node(name, ["a"], ["b"], domain="d") for name in "GF"]
    functions = [
        onnx.helper.make_function("d", name, ["a"], ["b"], [call], imports)
        for name, call in zip("FG", calls, strict=True)
    ]
    nodes = [onnx.helper.make_node("F", ["x"], ["y"], domain="d")]
    return model(nodes, {}, [1], [1], functions=functions, opset_imports=imports)


def changed(change):
    proto = conv_model()
    change(proto)
    return proto


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (cyclic(), "topologically sorted"),
        (recursive_functions(), "recursive"),
        (changed(lambda p: p.graph.node.append(p.graph.node[0])), "SSA|single assignment|used as output"),
        (changed(lambda p: p.graph.initializer.append(p.graph.initializer[0])), "two initializers are named 'w'"),
        (changed(lambda p: p.graph.initializer[0].dims.append(-1)), "negative dimension"),
        (changed(lambda p: p.graph.initializer[0].dims.extend([2**62] * 8)), "does not fill its shape"),
        (changed(lambda p: setattr(p.graph.initializer[0], "data_type", 99)), "unknown type 99"),
        (changed(lambda p: p.graph.initializer[0].float_data.append(1)), "does not fill its shape"),
        (changed(lambda p: setattr(p.opset_import[0], "version", 2**40)), "opset 1099511627776 is unknown"),
        (changed(lambda p: setattr(p.opset_import[0], "version", -1)), "opset -1 is unknown"),
        (changed(lambda p: setattr(p, "ir_version", 99)), "IR version|ir_version"),
        (changed(lambda p: p.ClearField("graph")), "invalid model"),
        (changed(lambda p: setattr(p.graph.node[0], "op_type", "N" * 10_000_000)), r"\.\.\.$"),
        (changed(lambda p: p.graph.sparse_initializer.add()), "sparse initializers"),
    ],
)  # fmt: skip
def test_malformed_models_are_one_short_line(tmp_path, proto, message):
    with pytest.raises(ModelError, match=message) as caught:
        fold_onnx(written(tmp_path, proto))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("depth", [20, 40, 2000])
def test_files_that_are_nested_too_deeply_are_one_line(tmp_path, depth):
    content = onnx.NodeProto(op_type="If").SerializeToString()
    for number in (6, 5, 1) * depth if depth < 100 else (6,) * depth:  # node, attribute, graph: an If in an If
        length, size = len(content), b""
        while length > 127:
            size += bytes([length & 127 | 128])
            length >>= 7
        content = bytes([number << 3 | 2]) + size + bytes([length]) + content
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x3a" + content[1:])
    with pytest.raises(ModelError, match=r"not an ONNX model|invalid model"):
        read_model(path)


def test_names_of_any_length_are_no_obstacle(tmp_path):
    proto = conv_model()
    proto.graph.node[0].name = "n" * 1_000_000
    proto.doc_string = "d" * 1_000_000
    assert batch_norms(fold_onnx(written(tmp_path, proto)).model) == 0


def test_a_model_that_is_nested_deeper_than_python_recurses_is_one_line():
    proto = model([], {}, [1], [1])
    node = proto.graph.node.add(op_type="If")
    for _ in range(2000):
        node = node.attribute.add(name="then_branch").g.node.add(op_type="If")
    with pytest.raises(ModelError, match="nested too deeply"):
        fold_onnx(proto)


def test_pipes_and_devices_are_refused_at_once(tmp_path):
    pipe = tmp_path / "pipe.onnx"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(ModelError, match="is not a regular file"):
            read_model(path)
    with pytest.raises(ModelError, match="null"):
        read_model("a\0b")
    path = save_external(tmp_path)
    (tmp_path / "w.bin").unlink()
    os.mkfifo(tmp_path / "w.bin")
    with pytest.raises(ModelError, match=r"no file 'w\.bin'"):
        read_model(path)


def test_data_that_become_shorter_while_they_are_read_are_one_line(tmp_path):
    file = tmp_path / "w.bin"
    file.write_bytes(b"1234")
    with pytest.raises(ModelError, match="became shorter"), (tmp_path / "out").open("wb") as stream:
        external.copy(external.Place(file, 2, 4), stream)
    with pytest.raises(ModelError, match="No such file"), (tmp_path / "out").open("wb") as stream:
        external.copy(external.Place(tmp_path / "none", 2, 4), stream)


def test_flipped_bits_of_a_real_model_end_in_an_error_or_a_valid_model(tmp_path):
    # In a child: a crash of onnx or onnxruntime would end it.
    code = f"""
import numpy as np, onnx
from pybn.folding.files import ModelError, parse
from pybn.folding.onnx import fold_onnx
content = open({str(EXAMPLE)!r}, "rb").read()
structure = np.ones(len(content), bool)
for tensor in onnx.ModelProto.FromString(content).graph.initializer:
    start = content.find(tensor.raw_data)
    structure[start : start + len(tensor.raw_data)] = False
positions = np.flatnonzero(structure)
rng = np.random.default_rng(0)
failed = 0
for draw in range(300):
    damaged = bytearray(content)
    # Most bytes are weights: all but a few draws aim at the structure around them.
    places = rng.integers(len(content), size=3) if draw % 10 == 0 else rng.choice(positions, 1 + draw % 2)
    for place in places:
        damaged[place] ^= 1 << int(rng.integers(8))
    try:
        onnx.checker.check_model(fold_onnx(parse(bytes(damaged), "m").proto).model)
    except ModelError as error:
        failed += 1
        assert "\\n" not in str(error)
assert 100 < failed < 300, failed
"""
    run_python(code, tmp_path, timeout=120)


# Two files: the model and its data


def save_with_data(folder, name="m.onnx", proto=None):
    path = folder / name
    write_model(large_model() if proto is None else proto, path, with_data_file=True)
    return path


def large_model(seed=7):
    """With one weight that is worth a place in a data file, and one that is not."""
    rng = np.random.default_rng(seed)
    weights = {"w": rng.normal(size=(16, 3, 8, 8)).astype("float32"), "b": rng.normal(size=16).astype("float32")}
    return model([onnx.helper.make_node("Conv", ["x", "w", "b"], ["y"])], weights, [1, 3, 9, 9], [1, 16, 2, 2])


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_a_model_and_its_data_file_are_what_onnx_reads(tmp_path):
    path = save_with_data(tmp_path)
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]
    stored = onnx.load(path, load_external_data=False)
    assert [protos.is_external(tensor) for tensor in stored.graph.initializer] == [True, False]
    loaded = onnx.load(path)
    for got, expected in zip(loaded.graph.initializer, large_model().graph.initializer, strict=True):
        assert onnx.numpy_helper.to_array(got).tobytes() == expected.raw_data
    assert read_model(path)[0] == large_model()


def test_tensors_begin_at_pages_and_in_attributes_stay_unless_they_were_outside(tmp_path):
    proto = large_model()
    proto.graph.initializer.add().CopyFrom(proto.graph.initializer[0])
    proto.graph.initializer[2].name = "again"
    constant = onnx.helper.make_node("Constant", [], ["k"], value=proto.graph.initializer[0])
    proto.graph.node.insert(0, constant)
    path = save_with_data(tmp_path, proto=proto)
    stored = onnx.load(path, load_external_data=False)
    outside = [tensor for tensor in protos.tensors(stored) if protos.is_external(tensor)]
    assert [tensor.name for tensor in outside] == ["w", "again"]
    assert [external.locate(tensor, tmp_path).offset % 4096 for tensor in outside] == [0, 0]
    # And once more, from a model whose constant is outside, too.
    inside = stored.graph.node[0].attribute[0].t
    inside.ClearField("raw_data")
    inside.data_location = onnx.TensorProto.EXTERNAL
    inside.external_data.add(key="location", value="m.onnx.data")
    inside.external_data.add(key="length", value=str(len(proto.graph.initializer[0].raw_data)))
    out = tmp_path / "out.onnx"
    write_model(stored, out, folder=tmp_path)
    (tmp_path / "m.onnx.data").unlink()
    assert read_model(out)[0] == proto


def test_what_has_no_large_tensor_needs_no_data_file(tmp_path):
    write_model(conv_model(), tmp_path / "m.onnx", with_data_file=True)
    assert names(tmp_path) == ["m.onnx"]


def test_the_data_of_a_model_that_is_replaced_are_removed_with_it(tmp_path):
    path = save_with_data(tmp_path)
    save_with_data(tmp_path, proto=large_model(8))
    assert names(tmp_path) == ["m.onnx", "m.onnx.1.data"]
    assert read_model(path)[0] == large_model(8)
    save_with_data(tmp_path)
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]
    assert read_model(path)[0] == large_model()


def test_the_data_of_a_model_that_is_replaced_stay_as_private_as_they_were(tmp_path):
    save_with_data(tmp_path)
    (tmp_path / "m.onnx.data").chmod(0o600)
    save_with_data(tmp_path, proto=large_model(8))
    assert (tmp_path / "m.onnx.1.data").stat().st_mode & 0o777 == 0o600


def test_the_same_model_written_again_is_the_same_bytes(tmp_path):
    path = save_with_data(tmp_path)
    before = path.read_bytes()
    save_with_data(tmp_path)
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]
    assert path.read_bytes() == before


def test_data_that_another_model_uses_or_may_be_somebody_elses_are_kept(tmp_path, monkeypatch):
    path = save_with_data(tmp_path)
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(path.read_bytes())
    save_with_data(tmp_path, proto=large_model(8))
    assert names(tmp_path) == ["copy.onnx", "m.onnx", "m.onnx.1.data", "m.onnx.data"]
    assert read_model(copy)[0] == large_model()

    monkeypatch.setattr(files, "SEARCHED", 10)  # as if the other model were too large to be searched
    copy.write_bytes(b"something else")
    save_with_data(tmp_path, proto=large_model(9))
    assert (tmp_path / "m.onnx.1.data").exists()

    foreign = save_external(tmp_path)
    write_model(large_model(), foreign, with_data_file=True)
    assert (tmp_path / "w.bin").exists()


def test_a_data_file_is_never_written_through_a_link(tmp_path):
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    (tmp_path / "m.onnx.data").symlink_to(precious)
    save_with_data(tmp_path)
    assert precious.read_bytes() == b"precious"
    assert (tmp_path / "m.onnx.data").is_symlink()
    assert read_model(tmp_path / "m.onnx")[0] == large_model()


@pytest.mark.parametrize("call", range(1, 5))
@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failure_between_two_files_leaves_the_old_model_and_no_litter(tmp_path, monkeypatch, failing, call):
    path = save_with_data(tmp_path)
    before = names(tmp_path)
    real, calls = getattr(os, failing), iter(range(1, 100))

    def fail(*arguments):
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, failing, fail)
    try:
        save_with_data(tmp_path, proto=large_model(8))
        written_all = True
    except OSError:
        written_all = False
    monkeypatch.undo()
    assert read_model(path)[0] == large_model(8 if written_all else 7)
    if not written_all:
        assert names(tmp_path) == before
    # Folders that cannot be flushed are no failure: calls 2 and 4 of fsync.
    assert written_all == ((failing, call) in {("fsync", 2), ("fsync", 4), ("replace", 3), ("replace", 4)})


def test_a_full_disk_leaves_the_old_model_and_no_litter(tmp_path):
    """A limit of the size of files is what a full disk is to whoever writes."""
    path = save_with_data(tmp_path)
    before = names(tmp_path)
    code = """
import resource, signal, sys
sys.path.insert(0, %r)
from test_files import large_model
from pybn.folding.files import write_model
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (10, 700, 4096, 12000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for options in ({"with_data_file": True}, {}):
        try:
            write_model(large_model(8), "m.onnx", **options)
        except OSError as error:
            assert "large" in error.strerror, error
        else:
            sys.exit("it was written")
"""
    folders = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    run_python(code % str(Path(__file__).parent), tmp_path, env={"PYTHONPATH": python_path(folders)})
    assert names(tmp_path) == before
    assert read_model(path)[0] == large_model()


def python_path(folders):
    return os.pathsep.join(filter(None, [folders, os.environ.get("PYTHONPATH")]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_the_model_is_the_old_or_the_new_one(tmp_path):
    """At every call that changes the disk, and at random moments in between."""
    code = """
import os, random, signal, sys, time
sys.path.insert(0, %r)
from test_files import large_model
from pybn.folding.files import read_model, write_model
models = [large_model(seed) for seed in (7, 8)]
contents = [proto.SerializeToString(deterministic=True) for proto in models]

def current():
    return contents.index(read_model("m.onnx")[0].SerializeToString(deterministic=True))

def in_child(work):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child

CALLS = ("open", "fsync", "replace", "unlink", "fdopen")

def die_at(number):
    left = [number]
    def counted(real):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)
        return call
    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))

write_model(models[0], "m.onnx", with_data_file=True)
seen = set()
for with_data_file in (True, False):
    for number in range(1, 100):
        old = current()
        def work():
            die_at(number)
            write_model(models[1 - old], "m.onnx", with_data_file=with_data_file)
        _, status = os.waitpid(in_child(work), 0)
        seen.add((with_data_file, current() != old))
        if status == 0:
            break
    assert current() != old and number > 4, number
assert len(seen) == 4

random.seed(0)
kills = 0
for _ in range(40):
    def work():
        while True:
            for proto in models:
                write_model(proto, "m.onnx", with_data_file=True)
    child = in_child(work)
    time.sleep(random.uniform(0.001, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += current() in (0, 1)
assert kills == 40
"""
    folders = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    run_python(code % str(Path(__file__).parent), tmp_path, env={"PYTHONPATH": python_path(folders)})


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(OSError, match="No such file"):
        write_model(large_model(), folder / "none" / "m.onnx")
    with pytest.raises(OSError, match=r"."), disk.replacing(Path("/proc/self/m.onnx")):
        pass
