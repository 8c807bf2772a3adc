"""A folded model that carries its original becomes it again, bit for bit; and one that was changed does not."""

from __future__ import annotations

import base64
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from fold_models import batch_norm, bn_node, conv_model, model, net_model, tensor
from onnx import helper

from pybn.folding import fold_onnx, reversible
from pybn.folding.protos import ModelError

MNIST = Path(__file__).parents[2] / "examples" / "mnist_cnn.onnx"


def folded_and_original(proto):
    original = proto.SerializeToString()
    folded = fold_onnx(proto).model
    reversible.store(folded, original)
    return folded, original


def weights_model(before, after, name="w"):
    """Two models that differ in one weight: what a fold, whichever it is, makes of it."""

    def of(array):
        nodes = [helper.make_node("Conv", ["x", name], ["y"], group=3)]
        return model(nodes, {name: array}, None, None)

    return of(before), of(after)


def overhead(before, after, **options):
    original, folded = weights_model(before, after, **options)
    plain = folded.ByteSize()
    content = original.SerializeToString()
    reversible.store(folded, content)
    assert reversible.restore(folded) == {"": content}
    return (folded.ByteSize() - plain) / before.nbytes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_folded_model_becomes_its_original_again(dtype):
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    rng = np.random.default_rng(7)
    constants = {"w": rng.normal(size=(4, 3, 3, 3)).astype(kind), **batch_norm(rng, 4, kind)}
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), bn_node("c", "y")]
    proto = model(nodes, constants, ["N", 3, 8, 8], ["N", 4, 6, 6], dtype=dtype)
    folded, original = folded_and_original(proto)
    assert folded.graph.initializer[0].raw_data != proto.graph.initializer[0].raw_data
    assert reversible.restore(folded) == {"": original}


def test_several_folds_and_what_is_not_a_weight_come_back():
    proto = net_model()
    proto.doc_string = "what somebody wrote"
    proto.metadata_props.add(key="author", value="somebody")
    folded, original = folded_and_original(proto)
    assert reversible.restore(folded)[""] == original


def test_bytes_come_back_that_no_serializer_would_write():
    proto = conv_model()
    # Fields in another order, and one that ONNX does not know: a valid message all the same.
    parts = [onnx.ModelProto(), onnx.ModelProto()]
    parts[0].graph.CopyFrom(proto.graph)
    parts[1].CopyFrom(proto)
    parts[1].ClearField("graph")
    original = b"".join(part.SerializeToString() for part in parts) + bytes([0xB8, 0x3E, 1])
    read = onnx.ModelProto.FromString(original)
    assert read.SerializeToString() != original
    folded = fold_onnx(read).model
    reversible.store(folded, original)
    assert reversible.restore(folded)[""] == original


def test_what_is_carried_is_a_small_part_of_a_real_model():
    original = MNIST.read_bytes()
    folded = fold_onnx(MNIST).model
    plain = folded.ByteSize()
    reversible.store(folded, original)
    assert reversible.restore(folded)[""] == original
    assert folded.ByteSize() - plain < 0.08 * plain


SCALED = np.random.default_rng(0).normal(size=(48, 32, 3, 3)).astype("float32")


@pytest.mark.parametrize(
    "scale",
    [
        np.random.default_rng(1).normal(size=(48, 1, 1, 1)),
        np.random.default_rng(2).normal(size=(1, 32, 1, 1)),
        np.random.default_rng(3).normal(size=(48, 1, 1, 1)) * np.random.default_rng(4).normal(size=(1, 32, 1, 1)),
        # In three groups: the outputs of a transposed convolution.
        np.repeat(np.random.default_rng(5).normal(size=(3, 1, 32, 1, 1)), 16, axis=1).reshape(48, 32, 1, 1),
    ],
    ids=["outputs", "inputs", "both", "groups"],
)
def test_a_weight_scaled_along_any_axis_costs_little(scale):
    assert overhead(SCALED, (SCALED * scale).astype("float32")) < 0.1


def test_a_weight_that_was_not_changed_costs_nothing_but_its_name():
    assert overhead(SCALED, SCALED) < 0.02


def test_a_weight_that_became_something_else_is_stored_as_it_is():
    other = np.random.default_rng(9).normal(size=SCALED.shape).astype("float32")
    assert 0.8 < overhead(SCALED, other) < 1.4


@pytest.mark.parametrize("name", ["w", "", "another"])
def test_a_weight_is_found_under_any_name(name):
    original, _ = weights_model(SCALED, SCALED)
    _, folded = weights_model(SCALED, 2 * SCALED, name=name or "w.folded")
    plain = folded.ByteSize()
    reversible.store(folded, original.SerializeToString())
    assert folded.ByteSize() - plain < 0.1 * SCALED.nbytes
    assert reversible.restore(folded)[""] == original.SerializeToString()


@pytest.mark.parametrize("kind", ["float16", ml_dtypes.bfloat16, "float32", "float64"])
def test_values_that_cannot_be_predicted_come_back(kind):
    before = np.random.default_rng(6).normal(size=(6, 5, 7)).astype(kind)
    after = (before * np.random.default_rng(8).normal(size=(6, 1, 1))).astype(kind)
    before[0, 0, :4] = [np.nan, np.inf, -np.inf, -0.0]
    before[1, 1, :3] = [0.0, np.finfo(np.float16).tiny / 4 if kind == "float16" else 1e-39, 1.0]
    after[2] = 0
    before[3] = 0
    after[4, 0, 0] = np.nan
    assert overhead(before, after) < 3


def test_tensors_that_are_not_floats_come_back():
    for array in (np.arange(100), np.array([b"a" * 80, b"b"], dtype=object), np.ones(70, bool)):
        proto = model([helper.make_node("Identity", ["k"], ["y"])], {}, None, None)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, "k"))
        folded = onnx.ModelProto()
        folded.CopyFrom(proto)
        reversible.store(folded, proto.SerializeToString())
        assert reversible.restore(folded)[""] == proto.SerializeToString()


def test_data_files_come_back_with_what_is_between_the_tensors():
    original, folded = weights_model(SCALED, 3 * SCALED)
    weight = original.graph.initializer[0]
    data = b"head" + weight.raw_data + b"tail"
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="deep/w.bin")
    weight.external_data.add(key="offset", value="4")
    content = original.SerializeToString()
    plain = folded.ByteSize()
    reversible.store(folded, content, {"deep/w.bin": data})
    assert reversible.restore(folded) == {"": content, "deep/w.bin": data}
    assert folded.ByteSize() - plain < 0.1 * len(data)


def test_storing_is_deterministic_and_replaces_what_was_stored():
    first, original = folded_and_original(net_model())
    second, _ = folded_and_original(net_model())
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)
    reversible.store(first, original)
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)
    reversible.forget(first)
    assert not reversible.is_reversible(first)
    assert first == fold_onnx(net_model()).model


def test_a_model_is_unfolded_wherever_its_tensors_are_stored():
    folded, original = folded_and_original(net_model())
    again = onnx.ModelProto.FromString(folded.SerializeToString())
    for item in again.graph.initializer:  # as after a way through a data file
        item.raw_data = item.raw_data
    assert reversible.restore(again)[""] == original


@pytest.mark.parametrize(
    "change",
    [
        lambda proto: setattr(proto.graph.initializer[0], "raw_data", b"\0" * 648),
        lambda proto: setattr(proto.graph.node[0], "name", "renamed"),
        lambda proto: proto.metadata_props.add(key="author", value="somebody"),
        lambda proto: setattr(proto.graph, "name", "other"),
    ],
)
def test_a_model_that_was_changed_is_not_unfolded(change):
    folded, _ = folded_and_original(net_model())
    change(folded)
    with pytest.raises(ModelError, match="was changed after it was folded"):
        reversible.restore(folded)


def test_a_model_that_carries_nothing_says_so():
    with pytest.raises(ModelError, match="not folded with --reversible"):
        reversible.restore(conv_model())


def stored_text(folded):
    return next(entry for entry in folded.metadata_props if entry.key == reversible.KEY)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "in the format ''"),
        ("2 AAAA", "in the format '2'"),
        ("1 ", "is damaged"),
        ("1 AAAA", "is damaged"),
        ("1 not base64", "is damaged"),
        ("1 " + base64.b64encode(b"\xff" * 40).decode(), "is damaged"),
    ],
)
def test_damaged_texts_are_one_line(text, message):
    folded, _ = folded_and_original(conv_model())
    stored_text(folded).value = text
    with pytest.raises(ModelError, match=message):
        reversible.restore(folded)


def test_no_damage_to_the_text_restores_something_else():
    folded, original = folded_and_original(net_model())
    text = stored_text(folded).value
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        blob = bytearray(base64.b64decode(text[2:]))
        blob[rng.integers(len(blob))] ^= 1 << int(rng.integers(8))
        stored_text(folded).value = "1 " + base64.b64encode(bytes(blob)).decode()
        try:
            assert reversible.restore(folded)[""] == original
        except ModelError:
            refused += 1
    assert refused > 140


def repacked(folded, change):
    """Change what is inside the compressed text, as somebody who knows the format would."""
    blob = base64.b64decode(stored_text(folded).value[2:])
    first = int.from_bytes(blob[:4], "little")
    plain = zlib.compress(change(zlib.decompress(blob[4 : 4 + first])))
    text = base64.b64encode(len(plain).to_bytes(4, "little") + plain + blob[4 + first :]).decode()
    stored_text(folded).value = "1 " + text


def test_a_hostile_text_cannot_name_a_file_elsewhere_or_fill_the_memory(monkeypatch):
    original, folded = weights_model(SCALED, 3 * SCALED)
    original.graph.initializer[0].CopyFrom(tensor("w", SCALED))
    weight = original.graph.initializer[0]
    data = weight.raw_data
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="xx/w.bin")
    reversible.store(folded, original.SerializeToString(), {"xx/w.bin": data})
    repacked(folded, lambda plain: plain.replace(b'"xx/w.bin"', b'"../w.bin"'))
    with pytest.raises(ModelError, match="outside the model's folder"):
        reversible.restore(folded)

    folded, _ = folded_and_original(conv_model())
    repacked(folded, lambda plain: plain + b"\0" * 10_000_000)
    reversible.restore(folded)  # what is allowed for any model
    monkeypatch.setattr(reversible, "ALWAYS_ALLOWED", 1_000_000)
    with pytest.raises(ModelError, match="is damaged"):
        reversible.restore(folded)
