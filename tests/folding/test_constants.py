"""Constants that nodes make of constants: what they are read as, and what is not read."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from fold_models import model, value
from onnx import helper
from onnx.reference import ReferenceEvaluator

from pybn.folding.graph import Facts
from pybn.folding.onnx import fold_onnx

W = np.arange(6, dtype=np.float32).reshape(2, 3)


def _read(node, constants, opset=17):
    """What `Facts` makes of the output "c" of a node of constants, and what onnx's reference does."""
    add = helper.make_node("Add", ["x", "c"], ["y"])
    proto = model([node, add], constants, [None], outputs=[value("y", None), value("c", None)], opset=opset)
    parsed = ir.from_proto(proto)
    output = next(output for item in parsed.graph for output in item.outputs if output.name == "c")
    return Facts(parsed).constant(output), proto


@pytest.mark.parametrize(
    ("op_type", "second", "attributes", "opset"),
    [
        ("Unsqueeze", [0, -1], {}, 17),
        ("Unsqueeze", None, {"axes": [1, 2]}, 9),
        ("Squeeze", [0], {}, 17),
        ("Squeeze", None, {"axes": [0]}, 9),
        ("Reshape", [1, -1, 1], {}, 17),
        ("Reshape", [0, 3, 2], {}, 17),
    ],
)
def test_reshaped_constants_are_constants(op_type, second, attributes, opset):
    inputs = ["w"] if second is None else ["w", "second"]
    constants = {"w": W[None]} | ({} if second is None else {"second": np.array(second, np.int64)})
    found, proto = _read(helper.make_node(op_type, inputs, ["c"], **attributes), constants, opset)
    expected = ReferenceEvaluator(proto).run(["c"], {"x": np.zeros(1, np.float32)})[0]
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype


@pytest.mark.parametrize("filling", [None, np.array([0.5], np.float32)])
def test_constant_of_shape_is_a_constant(filling):
    attributes = {} if filling is None else {"value": onnx.numpy_helper.from_array(filling)}
    node = helper.make_node("ConstantOfShape", ["shape"], ["c"], **attributes)
    found, _ = _read(node, {"shape": np.array([2, 3], np.int64)})
    np.testing.assert_array_equal(found, np.full((2, 3), 0 if filling is None else 0.5, np.float32))


@pytest.mark.parametrize(
    ("op_type", "first", "second"),
    [
        ("Squeeze", W, [0]),  # of size 2
        ("Unsqueeze", W, [7]),
        ("Reshape", W, [4, -1]),
        ("Reshape", W, [2, 3, 0]),  # copies an axis that there is not
        ("ConstantOfShape", np.array([-1], np.int64), None),
        ("ConstantOfShape", np.array([2**40], np.int64), None),
    ],
)
def test_what_does_not_fit_is_no_constant(op_type, first, second):
    inputs = ["w"] if second is None else ["w", "second"]
    constants = {"w": first} | ({} if second is None else {"second": np.array(second, np.int64)})
    assert _read(helper.make_node(op_type, inputs, ["c"]), constants)[0] is None


def test_what_made_constants_goes_with_them():
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["flat"]),
        helper.make_node("Reshape", ["flat", "kernel"], ["w"]),
        helper.make_node("Unsqueeze", ["b", "zero"], ["b2"]),
        helper.make_node("Squeeze", ["b2", "zero"], ["b1"]),
        helper.make_node("Conv", ["x", "w", "b1"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["y"]),
    ]
    two = np.array([1.0, 2.0], np.float32)
    constants = {"shape": [6], "kernel": [2, 3, 1, 1], "zero": [0]}
    constants = {name: np.array(numbers, np.int64) for name, numbers in constants.items()}
    constants |= dict.fromkeys(("b", "gamma", "beta", "mean", "var"), two)
    folded = fold_onnx(model(nodes, constants, [1, 3, 4, 4], [1, 2, 4, 4])).model
    assert [node.op_type for node in folded.graph.node] == ["Conv"]
    assert {tensor.name for tensor in folded.graph.initializer} == set(folded.graph.node[0].input[1:])
