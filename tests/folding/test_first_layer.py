"""A batch norm as the first layer, which learns the input's scale: where fold takes it into the first convolution."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import pybn


def model(rng, pad, size, *, mean=True):
    """Images of 0 to 255, normalized by a batch norm, then a convolution."""
    constants = {
        "scale": np.ones(3),
        "bias": np.zeros(3),
        "mean": rng.uniform(90, 150, 3) * mean,
        "var": rng.uniform(3000, 5000, 3),
        "w": rng.standard_normal((4, 3, 3, 3)),
    }
    nodes = [
        onnx.helper.make_node("BatchNormalization", ["x", "scale", "bias", "mean", "var"], ["n"], name="of_input"),
        onnx.helper.make_node("Conv", ["n", "w"], ["y"], name="conv", pads=[pad] * 4),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 3, size, size])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 4, "a", "b"])],
        [onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in constants.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def run(proto, x):
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize(
    ("pad", "size", "mean", "aggressive", "operators"),
    [
        (0, "H", True, False, ["Conv"]),  # no border
        (1, "H", False, False, ["Conv"]),  # zero stays zero: the border is right
        (1, 16, True, True, ["Conv", "Add"]),  # the border's share is a constant map, of a known size
        (1, 16, True, False, ["BatchNormalization", "Conv"]),  # which is no less work
        (1, "H", True, True, ["Add", "Conv"]),  # the scale alone
        (1, "H", True, False, ["BatchNormalization", "Conv"]),
    ],
)
def test_it_goes_into_the_convolution_where_that_is_exact(rng, pad, size, mean, aggressive, operators):
    original = model(rng, pad, size, mean=mean)
    folded = pybn.fold_onnx(original, aggressive=aggressive)
    assert [node.op_type for node in folded.model.graph.node] == operators
    x = rng.integers(0, 256, (3, 3, 16, 16)).astype(np.float32)
    before = run(original, x)
    np.testing.assert_allclose(run(folded.model, x), before, rtol=1e-4, atol=2e-5 * np.abs(before).max())


@pytest.mark.parametrize(
    ("size", "reason", "because"),
    [
        (16, "no-gain", "one could fold it forward into Conv, with Add: as many operators as now"),
        (
            "H",
            "padding",
            "Conv pads spatial axis 0 with zeros, which a shift does not keep, and its length is not known",
        ),
    ],
)
def test_where_it_stays_the_report_says_why(rng, size, reason, because):
    (left,) = pybn.fold_onnx(model(rng, 1, size)).report.left
    assert left.name == "of_input"
    assert left.reason.value == reason
    assert because in left.sentence


def test_statistics_of_raw_pixels_by_reestimation_then_fold(rng):
    """The whole way: a first batch norm that knows nothing, the data, the fold."""
    raw = model(rng, 0, 16)
    x = rng.integers(0, 256, (40, 3, 16, 16)).astype(np.float32)
    known = pybn.reestimate(raw, [{"x": x[:30]}, {"x": x[30:]}])
    np.testing.assert_allclose(known.statistics["of_input"].mean, x.mean((0, 2, 3), np.float64), rtol=1e-12)
    folded = pybn.fold_onnx(known.model)
    assert [node.op_type for node in folded.model.graph.node] == ["Conv"]
    expected = run(known.model, x)
    np.testing.assert_allclose(run(folded.model, x), expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())
