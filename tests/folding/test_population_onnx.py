"""Re-estimation of, and insertion into, ONNX models; .npz files read by parts; the commands."""

import zipfile
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import reference
from onnx.reference import ReferenceEvaluator
from typer.testing import CliRunner

import pybn
from pybn.archives import Archives
from pybn.commands import app
from pybn.folding.files import ModelError
from pybn.population import populate
from pybn.stages import OnnxModel

MODEL = Path(__file__).parents[2] / "examples" / "mnist_cnn.onnx"
DATA = Path(__file__).parents[2] / "examples" / "mnist_test.npz"
RUNNER = CliRunner()


def run(model, feeds, outputs=None):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(outputs, feeds)


def small_model(rng, opset=15, dtype=np.float32, *, shared=False, ir_version=8, branches=False):
    """Conv, BN, Relu, Conv, BN beside a skip, BN of the sum, mean; parameters as initializers, one in a Constant."""
    constants = {"w1": rng.standard_normal((4, 3, 3, 3)) / 3, "w2": rng.standard_normal((4, 4, 1, 1))}
    for prefix in "abc":
        constants[f"{prefix}_scale"] = rng.uniform(0.5, 2, 4)
        constants[f"{prefix}_bias"] = rng.standard_normal(4)
        constants[f"{prefix}_mean"], constants[f"{prefix}_var"] = np.zeros(4), np.ones(4)
    if shared:
        del constants["b_mean"], constants["b_var"]
    make = onnx.helper.make_node

    def batch_norm(x, y, prefix, statistics):
        names = [f"{prefix}_scale", f"{prefix}_bias", f"{statistics}_mean", f"{statistics}_var"]
        return make("BatchNormalization", [x, *names], [y], name=f"norm_{prefix}", epsilon=1e-3)

    nodes = [
        make("Conv", ["x", "w1"], ["h1"], name="conv1", pads=[1, 1, 1, 1]),
        batch_norm("h1", "h2", "a", "a"),
        make("Relu", ["h2"], ["h3"]),
        make("Conv", ["h3", "w2"], ["h4"], name="conv2"),
        batch_norm("h4", "h5", "b", "a" if shared else "b"),
        make("Add", ["h5", "h1"], ["h6"]),
        batch_norm("h6", "h7", "c", "c"),
        make("GlobalAveragePool", ["h7"], ["y"]),
    ]
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", element, ["N", 3, 8, 8])],
        [onnx.helper.make_tensor_value_info("y", element, ["N", 4, 1, 1])],
        [onnx.numpy_helper.from_array(a.astype(dtype), n) for n, a in constants.items()],
    )
    if ir_version < 4:
        graph.input.extend(
            onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in list(graph.initializer)
        )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=ir_version)
    onnx.checker.check_model(model)
    return model


def constant(model, node_name, position):
    node = next(node for node in model.graph.node if node.name == node_name)
    tensor = next(t for t in model.graph.initializer if t.name == node.input[position])
    return onnx.numpy_helper.to_array(tensor)


def expected_statistics(model, batches):
    """By running the model up to each batch norm with onnxruntime, each normalized by NumPy with its batch."""
    arrived = {"a": [], "b": [], "c": []}
    conv1, conv2 = model.graph.node[0], model.graph.node[3]

    def conv(node, x):
        feeds = {"x": x.astype(np.float32), "w": constant(model, node.name, 1)}
        one = onnx.NodeProto.FromString(node.SerializeToString())
        one.input[:], one.output[:] = ["x", "w"], ["y"]
        info = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph([one], "c", [info(n, 1, None) for n in feeds], [onnx.ValueInfoProto(name="y")])
        return run(onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=8), feeds)[0]

    def normalize(prefix, x):
        arrived[prefix].append(x)
        weight, bias = constant(model, f"norm_{prefix}", 1), constant(model, f"norm_{prefix}", 2)
        return reference.normalize(x, *reference.stats(x), weight, bias, eps=1e-3)

    for batch in batches:
        h1 = conv(conv1, batch["x"])
        h3 = np.maximum(normalize("a", h1), 0)
        normalize("c", normalize("b", conv(conv2, h3)) + h1)
    return {prefix: reference.stats(np.concatenate(values)) for prefix, values in arrived.items()}


def batches_of(rng, sizes=(5, 2, 9)):
    return [{"x": rng.standard_normal((n, 3, 8, 8), dtype=np.float32) * (n + 1)} for n in sizes]


@pytest.mark.parametrize(
    "options", [{}, {"shared": True}, {"opset": 9, "ir_version": 3}], ids=["plain", "shared", "old"]
)
def test_every_batch_norm_gets_the_statistics_of_what_arrives_there(rng, options):
    model, batches = small_model(rng, **options), batches_of(rng)
    untouched = model.SerializeToString()
    found = pybn.reestimate(model, batches)
    assert model.SerializeToString() == untouched
    assert found.batches == 3
    assert found.left == {}
    for prefix, (mean, var) in expected_statistics(model, batches).items():
        np.testing.assert_allclose(found.statistics[f"norm_{prefix}"].mean, mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.statistics[f"norm_{prefix}"].var, var, rtol=1e-5)
        np.testing.assert_allclose(constant(found.model, f"norm_{prefix}", 3), mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(constant(found.model, f"norm_{prefix}", 4), var, rtol=1e-5)
    onnx.checker.check_model(found.model, full_check=True)
    assert np.isfinite(run(found.model, batches[0])[0]).all()


def test_the_first_batch_norm_s_statistics_are_exact_in_float64(rng):
    model = small_model(rng, dtype=np.float64)
    batches = [{"x": batch["x"].astype(np.float64)} for batch in batches_of(rng)]
    found = pybn.reestimate(model, batches)
    probed = onnx.ModelProto.FromString(model.SerializeToString())
    probed.graph.output.append(onnx.helper.make_tensor_value_info("h1", onnx.TensorProto.DOUBLE, None))
    evaluator = ReferenceEvaluator(probed)  # onnxruntime has no such convolution
    h1 = np.concatenate([evaluator.run(["h1"], batch)[0] for batch in batches])
    mean, var = reference.stats(h1)
    np.testing.assert_allclose(constant(found.model, "norm_a", 3), mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(constant(found.model, "norm_a", 4), var, rtol=1e-12)


def test_stale_statistics_are_repaired():
    with np.load(DATA) as archive:
        image, labels = archive["image"], archive["labels"]
    batches = [{"image": image[i : i + 100]} for i in range(0, 1000, 250)]
    stale = onnx.load(MODEL)
    rng = np.random.default_rng(0)
    for node in stale.graph.node:
        if node.op_type == "BatchNormalization":
            for tensor in stale.graph.initializer:
                if tensor.name in (node.input[3], node.input[4]):
                    values = onnx.numpy_helper.to_array(tensor)
                    spoiled = values * rng.uniform(0.2, 5, values.shape)
                    tensor.CopyFrom(onnx.numpy_helper.from_array(spoiled.astype(np.float32), tensor.name))

    def accuracy(model):
        return float((run(model, {"image": image})[0].argmax(1) == labels).mean())

    original = accuracy(onnx.load(MODEL))
    repaired = pybn.reestimate(stale, batches)
    again = pybn.reestimate(MODEL, batches)
    assert accuracy(stale) < 0.9 < original
    assert accuracy(repaired.model) >= original - 0.005
    for name, moments in again.statistics.items():  # what they were before plays no part
        np.testing.assert_array_equal(repaired.statistics[name].mean, moments.mean)


def test_a_batch_norm_that_cannot_be_reestimated_is_left_and_said(rng):
    model = small_model(rng)
    model.graph.input.append(onnx.helper.make_tensor_value_info("c_mean", 1, [4]))  # the caller may override it
    found = pybn.reestimate(model, batches_of(rng))
    assert list(found.statistics) == ["norm_a", "norm_b"]
    assert list(found.left) == ["norm_c"]
    assert "override" in found.left["norm_c"]


def test_what_is_wrong_with_a_model_is_said(rng, tmp_path):
    for call, error, message in [
        (lambda: pybn.reestimate(tmp_path / "none.onnx", []), ModelError, "none.onnx"),
        (lambda: pybn.reestimate(small_model(rng), [], forward=print), TypeError, "forward is given"),
        (lambda: pybn.reestimate(small_model(rng), []), ValueError, "no values arrived at norm_a"),
        (lambda: pybn.reestimate(pybn.fold_onnx(MODEL).model, []), ValueError, "no batch norm"),
        (lambda: pybn.insert(3, []), TypeError, "model is a int"),
        (lambda: pybn.insert(small_model(rng), [], after="conv1"), TypeError, "after is a string"),
        (lambda: pybn.insert(small_model(rng), [], after=["conv1"]), ValueError, "'conv1': it has a batch norm"),
        (lambda: pybn.insert(small_model(rng), [], after=["conv9"]), ValueError, "no linear operator of that name"),
        (lambda: pybn.insert(small_model(rng), [], eps=0), ValueError, "eps is 0"),
        (lambda: pybn.insert(small_model(rng), []), ValueError, "no operator after which"),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_work_on_an_onnx_model_goes_on_where_it_ended(rng, tmp_path):
    model, batches, state = small_model(rng), batches_of(rng), tmp_path / "state.npz"
    whole = pybn.reestimate(model, batches)

    def failing():
        yield from batches[:2]
        raise InterruptedError

    with pytest.raises(InterruptedError):
        pybn.reestimate(model, failing(), state=state, save_every=1)
    resumed = pybn.reestimate(model, batches, state=state, save_every=1)
    assert resumed.model.SerializeToString() == whole.model.SerializeToString()
    parted = pybn.reestimate(model, partitions=[lambda: batches[:1], lambda: batches[1:]])
    for name, moments in whole.statistics.items():
        np.testing.assert_allclose(parted.statistics[name].var, moments.var, rtol=1e-12)


def test_the_command_goes_on_from_a_state_of_the_same_data_and_batches_only(tmp_path):
    state, other, target = tmp_path / "state", tmp_path / "other.npz", tmp_path / "out.onnx"
    with np.load(DATA) as archive:
        np.savez(other, image=archive["image"][::-1])
    archives = Archives([DATA], ["image"], 250)

    def failing():
        yield from islice(archives, 2)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        populate(OnnxModel(MODEL), failing(), None, None, state, 1, None, archives.fingerprint())
    saved = state.read_bytes()
    for data, batch in ((DATA, "200"), (other, "250")):
        arguments = ["reestimate", MODEL, target, "--data", data, "--batch", batch, "--state", state]
        result = RUNNER.invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 1
        assert "is of another data than this work's" in result.stderr
        assert state.read_bytes() == saved
        assert not target.exists()
    arguments = ["reestimate", MODEL, target, "--data", DATA, "--batch", "250", "--state", state]
    assert RUNNER.invoke(app, [str(argument) for argument in arguments]).exit_code == 0
    assert target.read_bytes() == pybn.reestimate(MODEL, archives).model.SerializeToString(deterministic=True)
    assert not state.exists()


def test_inserted_batch_norms_change_no_output_and_fold_away_again():
    with np.load(DATA) as archive:
        image = archive["image"]
    folded = pybn.fold_onnx(MODEL).model
    batches = [{"image": image[i : i + 250]} for i in range(0, 1000, 250)]
    inserted = pybn.insert(folded, batches)
    before, after = (run(model, {"image": image})[0] for model in (folded, inserted.model))
    assert np.abs(after - before).max() < 1e-5 * np.abs(before).max()
    assert np.array_equal(before.argmax(1), after.argmax(1))
    assert sum(node.op_type == "BatchNormalization" for node in inserted.model.graph.node) == 8
    assert list(inserted.left) == ["/head/Gemm"]
    # They are what re-estimation would find: they normalize.
    probed = onnx.ModelProto.FromString(inserted.model.SerializeToString())
    first = next(node for node in probed.graph.node if node.op_type == "BatchNormalization")
    probed.graph.output.append(onnx.helper.make_tensor_value_info(first.input[0], 1, None))
    mean, var = reference.stats(run(probed, {"image": image}, [first.input[0]])[0])
    np.testing.assert_allclose(constant(inserted.model, first.name, 3), mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(constant(inserted.model, first.name, 4), var, rtol=1e-4)

    again = pybn.fold_onnx(inserted.model)
    assert again.report.counts["folded"] == 8
    assert [node.op_type for node in again.model.graph.node] == [node.op_type for node in folded.graph.node]
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in folded.graph.initializer}
    refolded = {t.name: onnx.numpy_helper.to_array(t) for t in again.model.graph.initializer}
    compared = 0
    for node, twin in zip(folded.graph.node, again.model.graph.node, strict=True):
        for name, other in zip(node.input, twin.input, strict=True):
            if name in weights and weights[name].dtype == np.float32:
                scale = np.abs(weights[name]).max()
                np.testing.assert_allclose(refolded[other], weights[name], rtol=1e-6, atol=2e-6 * scale)
                compared += 1
    assert compared >= 18, "weights and biases of nine operators"


def test_insertion_where_it_is_asked_for(rng):
    folded = pybn.fold_onnx(MODEL).model
    image = rng.integers(0, 256, (50, 1, 28, 28)).astype(np.uint8)
    inserted = pybn.insert(folded, [{"image": image}], after=["/head/Gemm", "/down/Conv"], eps=1e-3)
    assert list(inserted.statistics) == ["/down/Conv", "/head/Gemm"]
    before, after = (run(model, {"image": image})[0] for model in (folded, inserted.model))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archives_are_read_part_by_part(rng, tmp_path, save):
    arrays = {"x": rng.standard_normal((23, 3)), "y": rng.integers(0, 9, (23, 2, 2))}
    save(tmp_path / "a.npz", **arrays)
    save(tmp_path / "b.npz", **{name: array[:9] for name, array in arrays.items()})
    archives = Archives([tmp_path / "a.npz", tmp_path / "b.npz"], ["x", "y"], 5)
    batches = list(archives)
    assert len(batches) == len(archives) == 5
    assert [len(batch["x"]) for batch in batches] == [6, 6, 6, 5, 9]
    assert archives.rows == 32
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.concatenate([batch[name] for batch in batches[:4]]), array)
        np.testing.assert_array_equal(batches[4][name], array[:9])


def test_unreadable_archives_are_refused_in_one_line(rng, tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 2)), y=np.zeros((3, 2)), f=np.zeros((4, 3), order="F"), s=np.zeros(()))
    (tmp_path / "text.npz").write_text("not a zip file")
    with zipfile.ZipFile(tmp_path / "z.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY nonsense")
    np.savez(tmp_path / "damaged.npz", x=np.zeros((100_000, 2)))
    content = bytearray((tmp_path / "damaged.npz").read_bytes())
    content[1_000_000] ^= 255
    (tmp_path / "damaged.npz").write_bytes(content)
    for file, names, message in [
        ("none.npz", ["x"], "No such file"),
        ("text.npz", ["x"], "not a readable .npz file"),
        ("z.npz", ["x"], "array 'x' is not readable"),
        ("a.npz", ["w"], "no array 'w', expected one for each input: w"),
        ("a.npz", ["x", "y"], r"the arrays have \[3, 4\] rows"),
        ("a.npz", ["f"], "array 'f' is not one of numbers"),
        ("a.npz", ["s"], "array 's' is not one of numbers"),
        ("damaged.npz", ["x"], "array 'x' is damaged"),
    ]:
        with pytest.raises(ValueError, match=message):
            list(Archives([tmp_path / file], names, 2))
    with pytest.raises(ValueError, match="4 rows, expected a multiple of the model's batch size 3"):
        Archives([tmp_path / "a.npz"], ["x"], 3, exact=True)


def test_the_commands_write_models_and_say_what_they_did(tmp_path):
    model = tmp_path / "m.onnx"
    model.write_bytes(MODEL.read_bytes())
    result = RUNNER.invoke(app, ["reestimate", str(model), "--data", str(DATA), "--batch", "200"])
    assert result.exit_code == 0, result.output
    assert "8 batch norms re-estimated from 1000 samples in 5 batches, 0 left" in result.output
    onnx.checker.check_model(onnx.load(tmp_path / "m.reestimated.onnx"))
    (tmp_path / "f.onnx").write_bytes(pybn.fold_onnx(model).model.SerializeToString())
    result = RUNNER.invoke(app, ["insert", str(tmp_path / "f.onnx"), str(tmp_path / "i.onnx"), "--data", str(DATA)])
    assert result.exit_code == 0, result.output
    assert "8 batch norms inserted, 1 operators left without" in result.output
    assert "left /head/Gemm" in result.output
    onnx.checker.check_model(onnx.load(tmp_path / "i.onnx"))
    result = RUNNER.invoke(app, ["reestimate", str(model), str(tmp_path / "q.onnx"), "--data", str(DATA), "-q"])
    assert (result.exit_code, result.output) == (0, "")
    expected = pybn.reestimate(model, Archives([DATA], ["image"], 100)).model
    assert (tmp_path / "q.onnx").read_bytes() == expected.SerializeToString(deterministic=True)


def test_the_commands_fail_in_one_line_and_write_nothing(tmp_path):
    model, wrong = tmp_path / "m.onnx", tmp_path / "wrong.npz"
    model.write_bytes(MODEL.read_bytes())
    np.savez(wrong, image=np.zeros((4, 1, 28, 28), np.float32))
    (tmp_path / "f.onnx").write_bytes(pybn.fold_onnx(model).model.SerializeToString())
    (tmp_path / "state").write_text("nonsense")
    before = sorted(tmp_path.iterdir())
    for arguments, code, message in [
        (["reestimate", model, "--data", wrong], 1, "'image' is float32, expected uint8; nothing was written"),
        (["reestimate", model, "--data", tmp_path / "none.npz"], 1, "none.npz: No such file"),
        (["reestimate", tmp_path / "f.onnx", "--data", DATA], 1, "no batch norm can be re-estimated"),
        (["reestimate", model, "--data", DATA, "--state", tmp_path / "state"], 1, "is not one that reestimate wrote"),
        (["reestimate", model, model, "--data", DATA], 2, "OUT is the same file as IN"),
        (["reestimate", "-", "--data", DATA], 2, "give paths"),
        (["reestimate", tmp_path / "none.onnx", "--data", DATA], 1, "none.onnx: No such file"),
        (["insert", tmp_path / "f.onnx", "--data", DATA, "--after", "nothing"], 2, "no linear operator of that name"),
        (["insert", tmp_path / "f.onnx", "--data", DATA, "--eps", "-1"], 2, "eps is -1"),
        (["insert", model, "--data", wrong, "--after", "/head/Gemm"], 1, "expected uint8; nothing was written"),
    ]:
        result = RUNNER.invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, (arguments, result.output)
        assert message in result.stderr, (arguments, result.stderr)
        assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
