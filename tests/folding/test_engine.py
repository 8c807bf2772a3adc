"""How the folds of a model are chosen, what they do to names, and what the caller may ask for."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from fold_models import batch_norm, batch_norms, bn_node, conv_model, model, net_model, reference, runtime, value
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import RemoveUnusedNodesPass

from pybn.folding import Reason
from pybn.folding.onnx import FoldResult, fold_onnx
from pybn.folding.passes import FoldBatchNorm

X = np.random.default_rng(0).normal(size=(2, 3, 8, 8))


def weights(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def node(op_type: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(op_type, names, output.split(), name=f"n_{output.split()[0]}", **attributes)


def parameters(channels: int = 4, prefix: str = "", **given: Any) -> dict[str, np.ndarray]:
    values = batch_norm(np.random.default_rng(channels), channels, "float64")
    values.update({name: np.asarray(array, dtype="float64") for name, array in given.items()})
    return {prefix + name: array for name, array in values.items()}


def network(*nodes: onnx.NodeProto, constants: dict[str, np.ndarray], outputs: int = 4, **options: Any):
    """A float64 model from "x" of shape (N, 3, 8, 8) to "y" of so many axes."""
    return model(list(nodes), constants, ["N", 3, 8, 8], [None] * outputs, dtype="float64", **options)


def fold(proto: onnx.ModelProto, **options: Any) -> FoldResult[onnx.ModelProto]:
    """Fold; every value whose name both models know has to be the same in both, and folding again to do nothing."""
    result = fold_onnx(proto, **options)
    onnx.checker.check_model(result.model, full_check=True)
    names = [name for name in values_of(result.model) if name in set(values_of(proto))]
    assert set(names) >= {output.name for output in proto.graph.output}
    expected, actual = every(proto, names), every(result.model, names)
    for name, before, after in zip(names, expected, actual, strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-11, atol=1e-11 * max(1.0, np.abs(before).max()), err_msg=name)
    for row in result.report.folds:
        assert set(row.outputs) <= set(names), row
    again = fold_onnx(result.model, **{key: item for key, item in options.items() if key == "aggressive"})
    if "skip" not in options and "only" not in options:
        assert again.model.SerializeToString(deterministic=True) == result.model.SerializeToString(deterministic=True)
        assert not again.report.folds
    return result


def values_of(proto: onnx.ModelProto) -> list[str]:
    return [name for item in proto.graph.node if item.op_type != "Constant" for name in item.output if name]


def every(proto: onnx.ModelProto, names: list[str]) -> list[np.ndarray]:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return list(ReferenceEvaluator(copy).run(None, {"x": X}))


def kinds(result: FoldResult[onnx.ModelProto]) -> list[str]:
    return [item.op_type for item in result.model.graph.node]


# Backward, forward, and both


@pytest.mark.parametrize(
    ("start", "end", "step", "kept"), [(3, -5, -1, 4), (3, 0, -2, 2), (-1, -4, -1, 3), (0, 4, 2, 2)]
)
def test_channels_that_a_slice_keeps_in_any_order(start, end, step, kept):
    bounds = {name: np.array([number]) for name, number in {"s": start, "e": end, "one": 1, "by": step}.items()}
    proto = network(
        node("Conv", "x w", "c"),
        node("Slice", "c s e one by", "l"),
        bn_node("l", "y"),
        constants={"w": weights(4, 3, 1, 1), **bounds, **parameters(kept)},
    )
    assert kinds(fold(proto)) == ["Conv", "Slice"]


def test_residual_addition_scales_both_branches_and_shifts_one():
    constants = {"w": weights(4, 3, 3, 3), "v": weights(4, 3, 3, 3, seed=2), **parameters()}
    nodes = node("Conv", "x w", "c"), node("Conv", "x v", "d"), node("Add", "c d", "s"), bn_node("s", "y")
    result = fold(network(*nodes, constants=constants))
    assert kinds(result) == ["Conv", "Conv", "Add"]
    (row,) = result.report.folds
    assert (row.direction, row.into, row.route) == ("backward", ("n_c", "n_d"), ("Add", "Conv", "Conv"))
    assert [len(item.input) for item in result.model.graph.node] == [3, 2, 2]


def test_the_shift_goes_to_the_branch_that_can_take_it():
    # The first branch passes a positive scale only.
    constants = {"w": weights(4, 3, 1, 1), "v": weights(4, 3, 1, 1, seed=2), **parameters(gamma=[1, 2, 3, 4])}
    nodes = (
        node("Conv", "x w", "c"),
        node("Relu", "c", "r"),
        node("Conv", "x v", "d"),
        node("Add", "r d", "s"),
        bn_node("s", "y"),
    )
    result = fold(network(*nodes, constants=constants))
    assert kinds(result) == ["Conv", "Relu", "Conv", "Add"]
    assert [len(item.input) for item in result.model.graph.node if item.op_type == "Conv"] == [2, 3]


def test_batch_norm_goes_forward_where_it_cannot_go_backward():
    constants = {"w": weights(4, 3, 3, 3), **parameters(3)}
    result = fold(network(node("Sigmoid", "x", "s"), bn_node("s", "b"), node("Conv", "b w", "y"), constants=constants))
    assert kinds(result) == ["Sigmoid", "Conv"]
    (row,) = result.report.folds
    assert (row.direction, row.into, row.route, row.outputs) == ("forward", ("n_y",), ("Conv",), ("y",))


def test_every_consumer_has_to_take_the_map():
    constants = {"w": weights(4, 3, 3, 3), **parameters(3)}
    nodes = node("Sigmoid", "x", "s"), bn_node("s", "b"), node("Conv", "b w", "c"), node("Sigmoid", "b", "t")
    nodes += (node("GlobalAveragePool", "c", "p"), node("GlobalMaxPool", "t", "q"), node("Concat", "p q", "y", axis=1))
    result = fold(network(*nodes, constants=constants))
    (left,) = result.report.left
    assert "forward, it is followed by Sigmoid" in left.detail
    assert left.would is None


def test_shift_backward_and_scale_forward():
    # Negative scales do not pass MaxPool, and the shift would need a map of the padding of the convolution after it.
    constants = {
        "w": weights(4, 3, 3, 3),
        "v": weights(2, 4, 3, 3),
        **parameters(gamma=[-1.0, 2.0, -3.0, 0.5]),
    }
    nodes = (
        node("Conv", "x w", "c"),
        node("MaxPool", "c", "p", kernel_shape=[2, 2]),
        bn_node("p", "b"),
        node("Conv", "b v", "y", pads=[1, 1, 1, 1]),
    )
    result = fold(network(*nodes, constants=constants))
    assert kinds(result) == ["Conv", "MaxPool", "Conv"]
    (row,) = result.report.folds
    assert row.into == ("n_c", "n_y")
    assert row.cost == 0


def test_a_scale_that_can_be_absorbed_leaves_only_the_shift():
    constants = {"w": weights(4, 3, 3, 3), "k": np.float64(0.5), "b": weights(4, 1, 1)}
    nodes = node("Conv", "x w", "c"), node("Relu", "c", "r"), node("Mul", "r k", "m"), node("Add", "m b", "y")
    result = fold(network(*nodes, constants=constants))
    assert kinds(result) == ["Conv", "Relu", "Add"]
    assert [row.op_type for row in result.report.folds] == ["Mul"]
    (left,) = result.report.affines[1:]
    assert left.reason is Reason.SHIFT_STAYS


def test_maps_that_nothing_absorbs_merge():
    constants = {**parameters(3), **parameters(3, "2", mean=[1, 2, 3]), "k": weights(3, 1, 1), "m": np.float64(-2.0)}
    nodes = (
        node("Mul", "m x", "a"),
        bn_node("a", "b"),
        node("Sub", "k b", "c"),
        bn_node("c", "d", "2"),
        node("Neg", "d", "y"),
    )
    result = fold(network(*nodes, constants=constants))
    assert kinds(result) == ["BatchNormalization"]
    assert {row.direction for row in result.report.folds} == {"merged"}
    assert len(result.report.rows) == 5


@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [
        (("Mul", "x p"), ("Div", "s q"), ["Mul"]),
        (("Add", "p x"), ("Sub", "s q"), ["Add"]),
        (("Sub", "p x"), ("Add", "s q"), ["Sub"]),
        (("Neg", "x"), ("Mul", "s q"), ["Mul"]),
        (("Add", "x p"), ("Mul", "s q"), ["Add", "Mul"]),
    ],
)
def test_chains_merge_into_one_operator_if_there_is_one(first, second, merged):
    constants = {"p": weights(3, 1, 1), "q": np.float64(1.5)}
    result = fold(network(node(*first, "s"), node(*second, "y"), constants=constants))
    assert kinds(result) == merged


def test_a_constant_divided_by_data_is_no_map():
    constants = {"w": weights(4, 3, 3, 3), "k": np.float64(2.0)}
    proto = network(node("Conv", "x w", "c"), node("Exp", "c", "e"), node("Div", "k e", "y"), constants=constants)
    assert fold_onnx(proto).report.rows == ()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1), (1, 4, 1, 1), (4, 1, 1)])
@pytest.mark.parametrize("names", ["c k", "k c"])
@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("bias", [True, False])
def test_chain_after_a_convolution(shape, names, op_type, bias):
    constants = {"w": weights(4, 3, 3, 3), "v": weights(4), "k": np.abs(weights(*shape)) + 0.5}
    nodes = node("Conv", "x w v" if bias else "x w", "c"), node(op_type, names, "y")
    result = fold(network(*nodes, constants=constants))
    divided = op_type == "Div" and names == "k c"
    assert kinds(result) == (["Conv", "Div"] if divided else ["Conv"])


def test_scalar_after_attention_goes_into_the_query():
    constants = {"q": weights(6, 4), "k": weights(6, 4, seed=2), "s": np.float64(0.5)}
    nodes = (
        node("Flatten", "x", "f", axis=3),
        node("Slice", "f zero six one", "z"),
        node("MatMul", "z q", "a"),
        node("MatMul", "z k", "b"),
        node("Transpose", "b", "t", perm=[1, 0]),
        node("MatMul", "a t", "l"),
        node("Mul", "l s", "m"),
        node("Softmax", "m", "y"),
    )
    constants |= {"zero": np.array([0]), "six": np.array([6]), "one": np.array([1])}
    result = fold(network(*nodes, constants=constants, outputs=2))
    assert "Mul" not in kinds(result)


def test_a_map_that_changes_nothing_goes():
    constants = {"one": np.float64(1.0), "zero": np.zeros((1, 3, 1, 1))}
    nodes = node("Sigmoid", "x", "s"), node("Mul", "s one", "m"), node("Exp", "m", "e"), node("Sub", "e zero", "y")
    result = fold(network(*nodes, constants=constants))
    assert kinds(result) == ["Sigmoid", "Exp"]
    named = fold(network(node("Mul", "x one", "y"), constants=constants))
    assert named.report.left[0].reason is Reason.GRAPH_OUTPUT


# Cost


def pre_activation_block() -> onnx.ModelProto:
    constants = {
        "w": weights(4, 3, 3, 3),
        "v": weights(3, 4, 3, 3),
        **parameters(3, gamma=[1, -2, 3]),
        **parameters(4, "2"),
        **parameters(3, "3", gamma=[1, 2, 3]),
    }
    pads = {"pads": [1, 1, 1, 1]}
    nodes = (
        bn_node("x", "a"),
        node("Relu", "a", "b"),
        node("Conv", "b w", "c", **pads),
        bn_node("c", "d", "2"),
        node("Relu", "d", "e"),
        node("Conv", "e v", "f", **pads),
        node("Add", "x f", "g"),
        bn_node("g", "h", "3"),
        node("Relu", "h", "i"),
        node("Conv", "i w", "y", **pads),
    )
    proto = network(*nodes, constants=constants)
    proto.graph.input[0].CopyFrom(value("x", X.shape, "float64"))
    return proto


def test_trades_are_made_only_if_asked_for():
    proto = pre_activation_block()
    careful = fold(proto)
    # The second one goes backward; of the third the shift goes backward into a branch, and the scale forward.
    assert [row.name for row in careful.report.folds] == ["bn_d", "bn_h"]
    (left,) = careful.report.left
    assert left.reason is Reason.NO_GAIN
    assert left.would is not None
    eager = fold(proto, aggressive=True)
    assert batch_norms(eager.model) == 0
    assert not eager.report.batch_norms_left
    # Max and Min for Relu, and a map of the borders.
    assert len(eager.model.graph.node) == len(careful.model.graph.node) + 1
    assert [row.outputs for row in eager.report.folds] == [("d",), ("d",), ("y",)]


def test_report_of_what_aggressive_would_do_names_no_nodes():
    (left,) = fold_onnx(pre_activation_block()).report.left
    assert left.would == "fold it forward into Conv, with Min, Add, Max for Relu: one operator more"


def test_the_rest_of_a_batch_norm_keeps_its_place_and_name():
    constants = {"w": weights(4, 3, 3, 3), **parameters(gamma=[1, 2, 3, 4])}
    nodes = node("Conv", "x w", "c"), node("Relu", "c", "r"), bn_node("r", "b"), node("Sigmoid", "b", "y")
    assert kinds(fold(network(*nodes, constants=constants))) == ["Conv", "Relu", "BatchNormalization", "Sigmoid"]
    eager = fold(network(*nodes, constants=constants), aggressive=True)
    assert kinds(eager) == ["Conv", "Relu", "Add", "Sigmoid"]
    assert eager.model.graph.node[2].name == "bn_b"
    (row,) = eager.report.folds
    assert (row.cost, row.outputs) == (1, ("b",))


# Constants


@pytest.mark.parametrize("shared", [True, False])
def test_weight_behind_a_transpose_or_a_cast(shared):
    constants = {"t": weights(3, 4), "h": weights(4, 4, 1, 1).astype("float32"), **parameters(), **parameters(4, "2")}
    nodes = [
        node("Transpose", "t", "m"),
        node("Unsqueeze", "m axes", "u"),
        node("Cast", "h", "w", to=onnx.TensorProto.DOUBLE),
        node("GlobalAveragePool", "x", "p"),
        node("Flatten", "p", "f"),
        node("Gemm", "f m", "g", transB=1),
        bn_node("g", "b"),
        node("Unsqueeze", "b axes", "k"),
        node("Conv", "k w", "c"),
        bn_node("c", "y" if not shared else "z", "2"),
    ]
    if shared:
        nodes += [node("Conv", "k w", "d"), node("Add", "z d", "y")]
    nodes = [item for item in nodes if item.output[0] != "u"]
    constants["axes"] = np.array([2, 3])
    result = fold(network(*nodes, constants=constants))
    assert batch_norms(result.model) == 0
    assert ("Cast" in kinds(result)) == shared
    assert "Transpose" not in kinds(result)


def test_weight_that_is_a_parameter_of_a_function_is_a_reason():
    inner = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Constant", [], ["k"], value_float=2.0),
        helper.make_node("Add", ["c", "k"], ["y"]),
    ]
    function = helper.make_function("local", "Block", ["x", "w"], ["y"], inner, [helper.make_opsetid("", 17)])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    call = helper.make_node("Block", ["x", "w"], ["y"], domain="local")
    proto = model(
        [call],
        {"w": np.ones((4, 3, 3, 3), "float32")},
        [2, 3, 8, 8],
        [None] * 4,
        functions=[function],
        opset_imports=imports,
    )
    (left,) = fold_onnx(proto).report.left
    assert left.reason is Reason.WEIGHT_NOT_CONSTANT


def test_opset_6_in_inference_mode():
    constants = {"w": weights(4, 3, 3, 3), **parameters()}
    nodes = node("Conv", "x w", "c"), bn_node("c", "y", is_test=1)
    proto = network(*nodes, constants=constants, opset=6, ir_version=4)
    folded = fold_onnx(proto).model
    onnx.checker.check_model(folded)
    assert [item.op_type for item in folded.graph.node] == ["Conv"]
    newer = network(*nodes[:1], bn_node("c", "y"), constants=constants)
    np.testing.assert_allclose(reference(folded, x=X)[0], reference(newer, x=X)[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("aggressive", [True, False])
def test_nothing_that_broadcasts_is_added_to_opset_6(aggressive):
    constants = {"w": weights(4, 3, 3, 3), **parameters(gamma=[1, 2, 3, 4])}
    nodes = node("Conv", "x w", "c"), node("Relu", "c", "r"), bn_node("r", "y", is_test=1)
    proto = network(*nodes, constants=constants, opset=6, ir_version=4)
    assert fold_onnx(proto, aggressive=aggressive).model == proto


# What the caller may ask for


def test_skipped_nodes_stay_as_they_are():
    proto = net_model()
    result = fold_onnx(proto, skip=["bn_y"])
    assert batch_norms(result.model) == 1
    assert result.report.left[0].reason is Reason.SKIPPED
    kept = fold_onnx(proto, skip=["conv"])
    assert "Conv conv is to stay as it is" in kept.report.left[0].detail
    before = [item for item in proto.graph.node if item.name == "conv"]
    assert [item for item in kept.model.graph.node if item.name == "conv"] == before


def test_only_the_named_are_folded():
    result = fold_onnx(net_model(), only=["bn_y"])
    assert [row.name for row in result.report.folds] == ["bn_y"]
    assert [row.reason for row in result.report.left] == [Reason.SKIPPED]


@pytest.mark.parametrize("option", ["skip", "only"])
def test_unknown_names_are_errors_that_say_which_name_is_like_them(option):
    with pytest.raises(ValueError, match=f"{option} names 'bn_z'.*did you mean 'bn_"):
        fold_onnx(net_model(), **{option: ["bn_z"]})
    with pytest.raises(TypeError, match=option):
        fold_onnx(net_model(), **{option: "bn_y"})


def test_only_takes_affine_nodes():
    with pytest.raises(ValueError, match="only names 'conv', but no batch norm or affine node"):
        fold_onnx(net_model(), only=["conv"])


def test_progress_counts_up_to_all():
    calls: list[tuple[int, int]] = []
    fold_onnx(net_model(), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]


def test_pass_composes_with_others():
    graph = ir.from_proto(net_model())
    fold_pass = FoldBatchNorm()
    result = ir.passes.Sequential(fold_pass, RemoveUnusedNodesPass())(graph)
    assert result.modified
    assert result.model is graph
    assert fold_pass.report is not None
    assert len(fold_pass.report.folds) == 2
    x = X.astype("float32")
    expected = runtime(net_model(), x=x)[0]
    np.testing.assert_allclose(runtime(ir.to_proto(graph), x=x)[0], expected, rtol=1e-4, atol=1e-4)
    assert not fold_pass(graph).modified


def test_an_ir_model_is_left_untouched():
    graph = ir.from_proto(conv_model())
    before = ir.to_proto(graph).SerializeToString(deterministic=True)
    assert fold_onnx(graph, aggressive=True).report.folds
    assert ir.to_proto(graph).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("op_type", ["Mul", "Add"])
def test_parameters_narrower_than_the_data_take_up_nothing(op_type):
    """Since opset 15 they may be: a product of a float64 and a float32 would lose half of its digits there."""
    narrow = {name: array.astype("float32") for name, array in parameters(3).items()}
    nodes = node("Sigmoid", "x", "s"), node(op_type, "s k", "m"), bn_node("m", "y")
    proto = network(*nodes, constants={"k": np.float64(1.1), **narrow})
    assert kinds(fold(proto)) == ["Sigmoid", op_type, "BatchNormalization"]
