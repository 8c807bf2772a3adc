"""Layers to and from torch, and state dicts in files."""

import json
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from conftest import assert_close, assert_same_bits, images

import pybn
import pybn.torch

DIMENSIONS = {
    1: (pybn.BatchNorm1d, torch.nn.BatchNorm1d, (5, 4, 3)),
    2: (pybn.BatchNorm2d, torch.nn.BatchNorm2d, (5, 4, 3, 2)),
    3: (pybn.BatchNorm3d, torch.nn.BatchNorm3d, (5, 4, 3, 2, 2)),
}
SUFFIXES = (".npz", ".safetensors")


def trained(rng, ours, shape, **options):
    """A layer with parameters and running statistics of its own."""
    layer = ours(4, **options)
    for value in (layer.weight, layer.bias):
        if value is not None:
            value[...] = rng.uniform(0.5, 2, 4)
    layer(images(rng, shape))
    return layer


# ---- torch


@pytest.mark.parametrize("dimensions", DIMENSIONS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None, "eps": 1e-3}, {"affine": False}, {"track_running_stats": False, "momentum": 0.3}],
    ids=str,
)
def test_a_layer_goes_to_torch_and_back(rng, dimensions, training, options):
    ours, theirs, shape = DIMENSIONS[dimensions]
    layer = trained(rng, ours, shape, **options).train(training)
    module = layer.to_torch()
    assert type(module) is theirs
    back = ours.from_torch(module)
    assert repr(back) == repr(layer)
    assert back.training == module.training == training
    assert back.state_dict().keys() == layer.state_dict().keys()
    for name, value in layer.state_dict().items():
        assert_same_bits(back.state_dict()[name], value, name)

    x = images(rng, shape)
    assert_close(module(torch.from_numpy(x)).detach().numpy(), layer(x), np.float32)
    assert_close(back(x), layer(x) if not training else module(torch.from_numpy(x)).detach().numpy(), np.float32)


def test_nothing_is_shared(rng):
    layer = trained(rng, *DIMENSIONS[2][::2])
    before = layer.state_dict()
    module = layer.to_torch()
    pybn.BatchNorm2d.from_torch(module)(images(rng, (5, 4, 3, 2)))
    with torch.no_grad():
        for value in module.state_dict().values():
            value.zero_()
    for name, value in layer.state_dict().items():
        assert_same_bits(value, before[name], name)


def test_float64_and_half_modules(rng):
    module = torch.nn.BatchNorm2d(4, dtype=torch.float64)
    assert pybn.BatchNorm2d.from_torch(module).weight.dtype == np.float64
    assert pybn.BatchNorm2d(4, dtype=np.float64).to_torch().running_var.dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float16):
        module = torch.nn.BatchNorm2d(4).to(dtype)
        torch.nn.init.uniform_(module.weight)
        layer = pybn.BatchNorm2d.from_torch(module)
        assert layer.weight.dtype == np.float32
        np.testing.assert_array_equal(layer.weight, module.weight.detach().float().numpy())


def test_a_weight_without_a_bias_stays_without(rng):
    module = torch.nn.BatchNorm2d(4)
    module.register_parameter("bias", None)
    layer = pybn.BatchNorm2d.from_torch(module)
    assert layer.bias is None
    assert layer.weight is not None
    assert layer.to_torch().state_dict().keys() == module.state_dict().keys()


def test_an_activation_goes_along(rng):
    layer = trained(rng, *DIMENSIONS[2][::2], activation="leaky_relu", negative_slope=0.2).eval()
    module = layer.to_torch()
    assert type(module) is pybn.torch.BatchNorm2d
    assert repr(pybn.BatchNorm2d.from_torch(module)) == repr(layer)
    x = images(rng, (5, 4, 3, 2))
    assert_close(module(torch.from_numpy(x)).detach().numpy(), layer(x), np.float32)
    assert layer(x).min() < 0


def test_options_go_to_the_layer(rng):
    layer = pybn.BatchNorm2d.from_torch(torch.nn.BatchNorm2d(4), channel_axis=-1, activation="relu")
    assert layer(images(rng, (2, 4, 3, 3), channel_axis=-1)).min() == 0
    with pytest.raises(ValueError, match="channel_axis=-1, expected 1"):
        layer.to_torch()


def test_other_modules_are_refused():
    with pytest.raises(TypeError, match=r"module is a BatchNorm1d, expected a torch.nn.BatchNorm2d"):
        pybn.BatchNorm2d.from_torch(torch.nn.BatchNorm1d(4))
    with pytest.raises(TypeError, match="module is a Linear"):
        pybn.BatchNorm2d.from_torch(torch.nn.Linear(4, 4))
    with pytest.raises(TypeError, match="has seen no data"):
        pybn.BatchNorm2d.from_torch(torch.nn.LazyBatchNorm2d())
    module = torch.nn.BatchNorm2d(4)
    module.track_running_stats = False
    with pytest.raises(ValueError, match="track_running_stats=False but running_mean given"):
        pybn.BatchNorm2d.from_torch(module)


def test_a_sync_batch_norm_becomes_what_is_asked_for():
    assert type(pybn.BatchNorm3d.from_torch(torch.nn.SyncBatchNorm(4))) is pybn.BatchNorm3d


# ---- files


def example(rng):
    return {
        "layer.weight": rng.standard_normal(5).astype(np.float32),
        "double": rng.standard_normal((2, 3)),
        "half": rng.standard_normal((3, 2)).astype(np.float16),
        "brain": rng.standard_normal((3, 2)).astype(ml_dtypes.bfloat16),
        "num_batches_tracked": np.array(7),
        "flags": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
        "file": np.zeros(1, np.int8),
        "a/../b": np.arange(6).reshape(2, 3)[:, ::2],
    }


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_keep_every_bit(rng, tmp_path, suffix):
    state = example(rng)
    path = tmp_path / f"state{suffix}"
    pybn.save_state_dict(state, path)
    read = pybn.load_state_dict(str(path))
    assert read.keys() == state.keys()
    for name, value in state.items():
        assert_same_bits(read[name], value, name)
        read[name][...] = 0  # writable


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_torch_tensors_are_saved_as_they_are(tmp_path, suffix):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.randn(3).bfloat16().requires_grad_(), "n": torch.tensor(3)}
    path = tmp_path / f"state{suffix}"
    pybn.save_state_dict(tensors, path)
    read = pybn.load_state_dict(path)
    assert_same_bits(read["a"], tensors["a"].numpy())
    assert read["b"].dtype == ml_dtypes.bfloat16
    assert_same_bits(read["b"].view(np.int16), tensors["b"].detach().view(torch.int16).numpy())
    assert read["n"] == 3


def test_other_libraries_read_what_is_written(rng, tmp_path):
    state = example(rng)
    pybn.save_state_dict(state, tmp_path / "state.safetensors")
    read = safetensors.torch.load_file(tmp_path / "state.safetensors")
    assert read["brain"].dtype == torch.bfloat16
    np.testing.assert_array_equal(read["brain"].float().numpy(), state["brain"].astype(np.float32))
    pybn.save_state_dict(state, tmp_path / "state.npz")
    with np.load(tmp_path / "state.npz", allow_pickle=False) as read:
        assert_same_bits(read["double"], state["double"])


def test_what_other_libraries_write_is_read(rng, tmp_path):
    tensors = {"a": torch.randn(3), "b": torch.randn(2, 2).bfloat16()}
    safetensors.torch.save_file(tensors, tmp_path / "state.safetensors")
    read = pybn.load_state_dict(tmp_path / "state.safetensors")
    assert_same_bits(read["a"], tensors["a"].numpy())
    assert read["b"].dtype == ml_dtypes.bfloat16
    np.savez_compressed(tmp_path / "state.npz", a=np.arange(3), b=np.ones(2, ml_dtypes.bfloat16))
    read = pybn.load_state_dict(tmp_path / "state.npz")
    assert_same_bits(read["a"], np.arange(3))
    assert_same_bits(read["b"], np.ones(2, ml_dtypes.bfloat16))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_layer_round_trips(rng, tmp_path, suffix):
    layer = trained(rng, *DIMENSIONS[2][::2])
    pybn.save_state_dict(layer.state_dict(), tmp_path / f"layer{suffix}")
    other = pybn.BatchNorm2d(4)
    other.load_state_dict(pybn.load_state_dict(tmp_path / f"layer{suffix}"))
    x = images(rng, (5, 4, 3, 2))
    assert_same_bits(other.eval()(x), layer.eval()(x))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        ([1], TypeError, "state is a list"),
        ({3: np.ones(2)}, TypeError, "the key 3 is a int, expected a str"),
        ({"a": np.array([object()])}, TypeError, "key 'a' has dtype object"),
        ({"b": np.array(["text"])}, TypeError, "key 'b' has dtype <U4"),
        ({"c": [[1], [1, 2]]}, TypeError, "key 'c'"),
    ],
    ids=["list", "key", "objects", "text", "ragged"],
)
def test_what_cannot_be_written_changes_nothing(tmp_path, suffix, state, error, words):
    path = tmp_path / f"state{suffix}"
    pybn.save_state_dict({"a": np.ones(1)}, path)
    before = path.read_bytes()
    with pytest.raises(error, match=words):
        pybn.save_state_dict(state, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failing_disk_leaves_the_old_file(rng, tmp_path, suffix, monkeypatch):
    path = tmp_path / f"state{suffix}"
    pybn.save_state_dict({"a": np.ones(1)}, path)
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        pybn.save_state_dict(example(rng), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_no_pickle_is_loaded(tmp_path):
    path = tmp_path / "state.npz"
    np.savez(path, good=np.ones(1), bad=np.array([Bomb()], object))
    with pytest.raises(ValueError, match=r"state.npz: key 'bad' cannot be read: Object arrays"):
        pybn.load_state_dict(path)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"state.npz cannot be read as an npz file"):
        pybn.load_state_dict(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_files_are_named(rng, tmp_path, suffix):
    path = tmp_path / f"state{suffix}"
    pybn.save_state_dict(example(rng), path)
    whole = path.read_bytes()
    for length in (0, 4, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"state\{suffix} cannot be read as an? (npz|safetensors) file"):
            pybn.load_state_dict(path)
    with pytest.raises(FileNotFoundError):
        pybn.load_state_dict(tmp_path / f"absent{suffix}")


def test_a_damaged_entry_is_named(tmp_path):
    path = tmp_path / "state.npz"
    pybn.save_state_dict({"good": np.ones(1), "bad": np.arange(100)}, path)
    whole = bytearray(path.read_bytes())
    at = whole.find(np.arange(100).tobytes())
    whole[at + 8] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"state.npz: key 'bad' cannot be read: .*CRC"):
        pybn.load_state_dict(path)


def test_types_that_numpy_has_not_are_named(tmp_path):
    header = json.dumps({"eight": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
    path = tmp_path / "state.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    with pytest.raises(ValueError, match="key 'eight' has the type F8_E4M3"):
        pybn.load_state_dict(path)


def test_a_single_array_is_no_state_dict(tmp_path):
    np.save(tmp_path / "array.npy", np.ones(2))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(ValueError, match=r"array.npz cannot be read as an npz file: it is a single array"):
        pybn.load_state_dict(tmp_path / "array.npz")


def test_other_suffixes_are_refused(tmp_path):
    for path in ("state.pt", "state", "state.npy"):
        with pytest.raises(ValueError, match=r"expected '.npz' or '.safetensors'"):
            pybn.save_state_dict({}, tmp_path / path)
        with pytest.raises(ValueError, match=r"expected '.npz' or '.safetensors'"):
            pybn.load_state_dict(tmp_path / path)


def test_what_is_not_an_array_in_an_npz_file_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "state.npz", "w") as archive:
        archive.writestr("notes.txt", "no array")
    with pytest.raises(ValueError, match=r"state.npz: key 'notes.txt' is no array"):
        pybn.load_state_dict(tmp_path / "state.npz")
