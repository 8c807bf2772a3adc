"""Reading without trusting, writing without losing."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import numpy as np
import onnx
import pytest
from fold_models import batch_norms, conv_model, net_model, runtime

from pybn.folding.files import ModelError, read_model, write_model
from pybn.folding.onnx import fold_onnx


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


def test_external_data_of_absurd_size_is_refused_unread(tmp_path):
    path = save_external(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    weight = proto.graph.initializer[0]
    weight.dims[:] = [2**30, 1, 3, 3]
    size = 2**30 * 9 * 4
    del weight.external_data[:]
    for key, entry in {"location": "huge.bin", "length": str(size)}.items():
        weight.external_data.add(key=key, value=entry)
    path.write_bytes(proto.SerializeToString())
    with (tmp_path / "huge.bin").open("wb") as file:
        file.truncate(size)  # sparse: takes no space
    with pytest.raises(ModelError, match="more than 2147483647 is not supported yet"):
        read_model(path)


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
