"""Finding where two models differ: names of both, constants by value, and nothing else."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from fold_models import model, value
from onnx import helper

from pybn.folding.inlining import inline, origin
from pybn.folding.segments import DifferentInterface, segments

W = np.arange(6, dtype="float32").reshape(2, 3)


def found(before, after):
    return segments(inline(ir.from_proto(before)), inline(ir.from_proto(after)))


def names(before, after):
    return [segment.name for segment in found(before, after)]


def chain(inner="m", weight=W, weight_name="w", last="Relu", **attributes):
    nodes = [
        helper.make_node("MatMul", ["x", weight_name], [inner]),
        helper.make_node(last, [inner], ["y"], **attributes),
        helper.make_node("Neg", ["y"], ["z"]),
    ]
    return model(nodes, {weight_name: weight}, [None, 2], outputs=[value("z", [None, 3])])


def test_equal_models_have_no_segments():
    assert names(chain(), chain()) == []


def test_names_of_constants_and_of_values_of_one_model_do_not_matter():
    assert names(chain(), chain(inner="m.folded", weight_name="v")) == []


def test_a_changed_constant_changes_the_nearest_common_name():
    assert names(chain(), chain(weight=W + 1)) == ["m"]
    [segment] = found(chain(), chain(weight=W + 1, inner="m.folded"))
    assert segment.name == "y"
    assert segment.entries == ("x",)
    assert [node.op_type for node in segment.original.nodes] == ["MatMul", "Relu"]
    assert [constant.name for constant in segment.folded.constants] == ["w"]


def test_types_of_constants_and_attributes_count():
    assert names(chain(), chain(weight=W.astype("float16"))) == ["m"]
    assert names(chain(last="LeakyRelu", alpha=0.1), chain(last="LeakyRelu", alpha=0.2)) == ["y"]
    assert names(chain(), chain(last="Abs")) == ["y"]


def test_constant_nodes_and_what_is_computed_from_constants_are_compared_by_value():
    def behind(shift):
        nodes = [
            helper.make_node("Constant", [], ["k"], value=onnx.numpy_helper.from_array(W.T + shift)),
            helper.make_node("Transpose", ["k"], ["t"]),
            helper.make_node("MatMul", ["x", "t"], ["y"]),
        ]
        return model(nodes, {}, [None, 2], [None, 3])

    assert names(behind(0), behind(0)) == []
    # Not "t": what no input can change is part of the expression that uses it.
    [segment] = found(behind(0), behind(1))
    assert segment.name == "y"
    assert [node.op_type for node in segment.original.nodes] == ["Transpose", "MatMul"]


def test_an_initializer_that_the_caller_may_override_is_an_entry():
    before, after = chain(), chain(weight=W + 1)
    for proto in (before, after):
        proto.graph.input.append(value("w", [2, 3]))
    assert names(before, after) == []
    for proto in (before, after):
        proto.ir_version = 3  # where initializers had to be inputs
    assert names(before, after) == ["m"]


def test_a_value_shared_by_two_branches_is_in_both_segments_once():
    def branches(inner, weight):
        nodes = [
            helper.make_node("MatMul", ["x", "w"], [inner]),
            helper.make_node("Add", [inner, inner], ["y"]),
            helper.make_node("Relu", [inner], ["z"]),
        ]
        return model(nodes, {"w": weight}, [None, 2], outputs=[value("y", [None, 3]), value("z", [None, 3])])

    both = found(branches("m", W), branches("n", W * 2))
    assert [segment.name for segment in both] == ["y", "z"]
    assert [len(segment.original.nodes) for segment in both] == [2, 2]


def test_subgraphs_are_compared_value_by_value():
    def conditional(weight, inner="m", captured="r"):
        then = helper.make_graph(
            [helper.make_node("MatMul", [captured, "w"], [inner]), helper.make_node("Relu", [inner], ["t"])],
            "then",
            [],
            [value("t", None)],
        )
        other = helper.make_graph([helper.make_node("MatMul", ["x", "w2"], ["e"])], "else", [], [value("e", None)])
        nodes = [
            helper.make_node("Relu", ["x"], ["r"]),
            helper.make_node("Neg", ["x"], ["n"]),
            helper.make_node("If", ["c"], ["y"], name="if", then_branch=then, else_branch=other),
        ]
        condition = helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
        return model(nodes, {"w": weight, "w2": W}, [None, 2], [None, 3], inputs=[condition])

    assert names(conditional(W), conditional(W)) == []
    [segment] = found(conditional(W), conditional(W + 1))
    assert (segment.name, segment.scope.label) == ("m", "main/if.then_branch")
    [segment] = found(conditional(W), conditional(W + 1, inner="m.folded"))
    assert segment.name == "t"
    assert segment.entries == ("r",)
    # A capture of another value is a difference inside, and one of the If.
    assert names(conditional(W), conditional(W, captured="n")) == ["y", "m"]


def block(weight, inner):
    nodes = [
        helper.make_node("Constant", [], ["w"], value=onnx.numpy_helper.from_array(weight)),
        helper.make_node("MatMul", ["a", "w"], [inner]),
        helper.make_node("Relu", [inner], ["b"]),
    ]
    return helper.make_function("local", "Block", ["a"], ["b"], nodes, [helper.make_opsetid("", 17)])


def calls(weight, inner="m", opset=17):
    nodes = [helper.make_node("Block", [a], [b], domain="local") for a, b in (("x", "h"), ("h", "y"))]
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1)]
    return model(nodes, {}, [None, 3], [None, 3], functions=[block(weight, inner)], opset_imports=imports)


def test_functions_are_inlined_and_every_call_is_compared():
    square = np.eye(3, dtype="float32")
    assert names(calls(square), calls(square)) == []
    assert names(calls(square), calls(square * 2)) == ["m", "m_2"]
    both = found(calls(square), calls(square * 2, inner="m.folded"))
    assert [segment.name for segment in both] == ["h", "y"]
    where = [origin(segment.original.output, segment.scope.label) for segment in both]
    assert where == [("function local::Block", "b")] * 2


def test_a_function_of_another_opset_is_compared_by_itself():
    square = np.eye(3, dtype="float32")
    [segment] = found(calls(square, opset=16), calls(square * 2, opset=16))
    assert (segment.name, segment.scope.label) == ("m", "function local::Block")
    assert segment.entries == ("a",)


def test_models_with_other_outputs_or_subgraphs_are_refused():
    other = chain()
    other.graph.output[0].name = "y"
    with pytest.raises(DifferentInterface, match=r"outputs of main are \['y'\], expected \['z'\]"):
        found(chain(), other)
