"""What counts as left: the definition of `zoo.leftovers`, one small graph a sentence."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from zoo.leftovers import Leftovers, leftovers

ALONG_CHANNELS = np.ones((1, 4, 1, 1), np.float32)
NUMBER = np.float32(2)


def _model(*nodes, outputs=("y",), ir_version=8, overridable=(), **constants):
    """A model of (operator, inputs, output, attributes) on x (1, 4, 8, 8), m (5, 4) and s (2, 5, 4)."""
    everything = {
        "w": np.ones((4, 4, 3, 3)), "b": np.ones((4, 4)), "v": np.ones(4),
        "number": NUMBER, "channels": ALONG_CHANNELS, **constants,
    }  # fmt: skip
    shapes = {"x": (1, 4, 8, 8), "m": (5, 4), "s": (2, 5, 4), **{name: everything[name].shape for name in overridable}}
    graph = helper.make_graph(
        [helper.make_node(op, ins.split(), [out], **attributes) for op, ins, out, attributes in nodes],
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in everything.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=ir_version)


def _node(op_type, inputs, output, **attributes):
    return op_type, inputs, output, attributes


def _affines(*nodes, **extra):
    return leftovers(_model(*nodes, **extra)).affines


CONV = _node("Conv", "x w", "c")
BATCH_NORM = "BatchNormalization"


@pytest.mark.parametrize("op_type", ["Mul", "Add", "Sub", "Div"])
@pytest.mark.parametrize("constant", ["number", "channels"])
def test_a_constant_after_a_convolution_counts(op_type, constant):
    assert _affines(CONV, _node(op_type, f"c {constant}", "y")) == 1


def test_a_constant_minus_a_convolution_counts_but_not_divided_by_it():
    assert _affines(CONV, _node("Sub", "number c", "y")) == 1
    assert _affines(CONV, _node("Neg", "c", "y")) == 1
    assert _affines(CONV, _node("Div", "number c", "y")) == 0


def test_a_constant_along_the_width_does_not_count():
    assert _affines(CONV, _node("Mul", "c v", "y"), v=np.ones(6)) == 0
    assert _affines(CONV, _node("Mul", "c full", "y"), full=np.ones((1, 4, 6, 6))) == 0


def test_a_chain_counts_by_its_nodes():
    nodes = _node("Mul", "c number", "p"), _node(BATCH_NORM, "p v v v v", "q"), _node("Add", "q channels", "y")
    assert leftovers(_model(CONV, *nodes)) == Leftovers(1, 2)


def test_what_is_used_twice_or_a_graph_output_ends_a_chain():
    mul = _node("Mul", "c number", "y")
    assert _affines(CONV, mul, _node("Relu", "c", "r"), outputs=("y", "r")) == 0
    assert _affines(CONV, mul, outputs=("y", "c")) == 0


def test_an_activation_ends_a_chain():
    assert _affines(CONV, _node("Relu", "c", "r"), _node("Mul", "r number", "y")) == 0


def test_a_matmul_takes_a_scale_but_a_shift_only_if_it_is_a_matrix():
    assert _affines(_node("MatMul", "s b", "p"), _node("Mul", "p v", "y")) == 1
    assert _affines(_node("MatMul", "s b", "p"), _node("Add", "p v", "y")) == 0
    assert _affines(_node("MatMul", "m b", "p"), _node("Add", "p v", "y")) == 1


@pytest.mark.parametrize(
    ("op_type", "attributes", "count"),
    [
        ("Mul", {"pads": [1] * 4}, 1),
        ("Add", {"pads": [1] * 4}, 0),
        ("Add", {"auto_pad": "SAME_UPPER"}, 0),
        ("Add", {"auto_pad": "VALID"}, 1),
        ("Add", {}, 1),
    ],
)
def test_before_a_convolution_a_scale_counts_always_and_a_shift_without_padding(op_type, attributes, count):
    assert _affines(_node(op_type, "x channels", "p"), _node("Conv", "p w", "y", **attributes)) == count


def test_before_a_gemm_both_count_and_before_a_matmul_a_scale():
    assert _affines(_node("Add", "m v", "p"), _node("Gemm", "p b", "y")) == 1
    assert _affines(_node("Mul", "s v", "p"), _node("MatMul", "p b", "y")) == 1
    assert _affines(_node("Add", "s v", "p"), _node("MatMul", "p b", "y")) == 0


def test_neighbours_of_one_kind_merge():
    assert _affines(_node("Mul", "x number", "p"), _node("Mul", "p number", "y")) == 1
    assert _affines(_node("Mul", "x number", "p"), _node("Add", "p number", "y")) == 0
    batch_norm = _node(BATCH_NORM, "x v v v v", "p")
    assert leftovers(_model(batch_norm, _node("Mul", "p channels", "y"))) == Leftovers(1, 1)


def test_a_weight_that_the_caller_may_override_is_no_constant():
    mul = _node("Mul", "c number", "y")
    assert _affines(CONV, mul, overridable=("w",)) == 0
    assert _affines(CONV, mul, overridable=("w",), ir_version=3) == 1
    assert leftovers(_model(CONV, mul, overridable=("w",)), ir_version=3).affines == 1


def test_constants_may_be_computed_by_nodes():
    doubled = _node("Mul", "w number", "w2"), _node("Sqrt", "w2", "w3"), _node("Conv", "x w3", "c")
    assert _affines(*doubled, _node("Mul", "c number", "y")) == 1
