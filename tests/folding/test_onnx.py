"""The fold of a whole model: what it keeps, where it looks, what it must not do."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from fold_models import (
    PARAMETERS,
    batch_norm,
    batch_norms,
    bn_node,
    conv_model,
    model,
    net_model,
    reference,
    runtime,
    tensor,
    value,
)
from onnx import helper

import pybn
from pybn.folding import Reason
from pybn.folding.files import ModelError
from pybn.folding.graph import scopes
from pybn.folding.onnx import FoldResult, fold_onnx
from pybn.folding.reasons import OF_MODULES, UNLOCK

RNG = np.random.default_rng(11)
X = RNG.normal(size=(2, 3, 8, 8)).astype("float32")


def weights(*shape, dtype="float32"):
    return np.random.default_rng(1).normal(size=shape).astype(dtype)


def parameters(channels=4, prefix="", dtype="float32", **changes):
    values = {**batch_norm(np.random.default_rng(2), channels, dtype), **changes}
    return {prefix + name: array for name, array in values.items()}


def conv(y="c", w="w", x="x", **attributes):
    return helper.make_node("Conv", [x, w], [y], name=f"conv_{y}", **attributes)


def initializers(proto):
    return {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}


# What is kept


@pytest.mark.parametrize("make", [conv_model, net_model])
def test_idempotent_deterministic_and_valid(make):
    proto = make()
    once = fold_onnx(proto).model
    content = once.SerializeToString(deterministic=True)
    assert fold_onnx(proto).model.SerializeToString(deterministic=True) == content
    assert fold_onnx(once).model.SerializeToString(deterministic=True) == content
    reloaded = onnx.ModelProto.FromString(content)
    assert fold_onnx(reloaded).model.SerializeToString(deterministic=True) == content
    onnx.checker.check_model(once, full_check=True)
    np.testing.assert_allclose(runtime(once, x=X)[0], runtime(proto, x=X)[0], rtol=1e-4, atol=1e-4)


def test_argument_is_untouched():
    proto = net_model()
    before = proto.SerializeToString(deterministic=True)
    fold_onnx(proto)
    assert proto.SerializeToString(deterministic=True) == before
    graph = ir.from_proto(proto)
    text = ir.to_proto(graph).SerializeToString(deterministic=True)
    result = fold_onnx(graph)
    assert ir.to_proto(graph).SerializeToString(deterministic=True) == text
    assert len(result.report.folds) == 2


def test_kind_of_the_argument_is_the_kind_of_the_result(tmp_path):
    proto = net_model()
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    assert isinstance(fold_onnx(proto).model, onnx.ModelProto)
    assert isinstance(fold_onnx(ir.from_proto(proto)).model, ir.Model)
    from_path = fold_onnx(path)
    assert isinstance(from_path.model, onnx.ModelProto)
    assert from_path.model == fold_onnx(str(path)).model
    assert from_path.report.input.path == str(path)
    assert from_path.report.input.bytes == path.stat().st_size
    assert len(from_path.report.input.sha256) == 64
    assert isinstance(from_path, FoldResult)
    assert pybn.fold_onnx is fold_onnx
    with pytest.raises(TypeError, match="model_or_path is int, expected a path"):
        fold_onnx(3)


def test_names_types_opset_and_metadata_stay():
    proto = conv_model(opset=15)
    helper.set_model_props(proto, {"key": "worth"})
    proto.producer_name, proto.doc_string = "someone", "a model"
    proto.graph.output[0].doc_string = "the result"
    folded = fold_onnx(proto).model
    assert folded.graph.input == proto.graph.input
    assert folded.graph.output == proto.graph.output
    assert folded.opset_import == proto.opset_import
    assert folded.ir_version == proto.ir_version
    assert folded.metadata_props == proto.metadata_props
    assert (folded.producer_name, folded.doc_string) == ("someone", "a model")
    # The operator's own weight keeps its name; no type information is invented.
    assert "w" in initializers(folded)
    assert not folded.graph.value_info
    assert folded.graph.node[0].name == "conv"


def test_nothing_to_fold_is_the_same_model():
    proto = model([helper.make_node("Relu", ["x"], ["y"])], {}, [2], [2])
    result = fold_onnx(proto)
    assert result.model == proto
    assert result.model is not proto
    assert result.report.batch_norms == ()


def test_unused_initializers_go_but_only_those_that_the_fold_made_unused():
    proto = conv_model()
    proto.graph.initializer.append(tensor("idle", np.zeros(3, dtype="float32")))
    left = set(initializers(fold_onnx(proto).model))
    assert left == {"w", "idle", "conv.bias.folded"}


def test_new_names_do_not_collide():
    proto = conv_model()
    proto.graph.initializer.append(tensor("conv.bias.folded", np.zeros(3, dtype="float32")))
    folded = fold_onnx(proto).model
    assert set(initializers(folded)) == {"w", "conv.bias.folded", "conv.bias.folded2"}


def test_batch_norm_output_in_the_middle_keeps_its_name():
    folded = fold_onnx(net_model()).model
    assert folded.graph.node[0].output == ["n"]
    assert folded.graph.output[0].name == "y"


def test_graph_output_that_is_also_consumed():
    proto = model(
        [conv(), bn_node("c", "y"), helper.make_node("Relu", ["y"], ["z"])],
        {"w": weights(4, 3, 3, 3), **parameters()},
        ["N", 3, 8, 8],
        outputs=[value("y", ["N", 4, 6, 6]), value("z", ["N", 4, 6, 6])],
    )
    folded = fold_onnx(proto).model
    assert batch_norms(folded) == 0
    for ours, theirs in zip(runtime(folded, x=X), runtime(proto, x=X), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


# Sharing


def test_weight_shared_by_two_convs_is_scaled_once_each():
    proto = model(
        [
            conv("c"),
            bn_node("c", "n"),
            conv("d"),
            bn_node("d", "m", "2"),
            helper.make_node("Add", ["n", "m"], ["y"]),
        ],
        {
            "w": weights(4, 3, 3, 3, dtype="float64"),
            **parameters(dtype="float64"),
            **parameters(prefix="2", dtype="float64", mean=np.full(4, 9.0), gamma=np.full(4, 3.0)),
        },
        ["N", 3, 8, 8],
        ["N", 4, 6, 6],
        dtype="float64",
    )
    folded = fold_onnx(proto).model
    assert batch_norms(folded) == 0
    x = X.astype("float64")
    np.testing.assert_allclose(reference(folded, x=x)[0], reference(proto, x=x)[0], rtol=1e-11, atol=1e-11)


def test_weight_shared_with_an_operator_without_batch_norm_stays():
    proto = model(
        [conv("c"), bn_node("c", "n"), conv("d"), helper.make_node("Add", ["n", "d"], ["y"])],
        {"w": weights(4, 3, 3, 3), **parameters()},
        ["N", 3, 8, 8],
        ["N", 4, 6, 6],
    )
    folded = fold_onnx(proto).model
    np.testing.assert_array_equal(initializers(folded)["w"], weights(4, 3, 3, 3))
    assert "w.folded" in initializers(folded)
    np.testing.assert_allclose(runtime(folded, x=X)[0], runtime(proto, x=X)[0], rtol=1e-4, atol=1e-4)


def test_weight_that_is_a_graph_output_is_cloned():
    proto = model(
        [conv(), bn_node("c", "y")],
        {"w": weights(4, 3, 3, 3), **parameters()},
        ["N", 3, 8, 8],
        outputs=[value("y", ["N", 4, 6, 6]), value("w", [4, 3, 3, 3])],
    )
    folded = fold_onnx(proto).model
    assert batch_norms(folded) == 0
    np.testing.assert_array_equal(runtime(folded, x=X)[1], weights(4, 3, 3, 3))


def test_shared_parameters_and_a_parameter_used_as_bias():
    # One vector is the bias of both convolutions, the mean and the beta of both batch norms.
    shared = weights(4)
    constants = {"w": weights(4, 3, 3, 3), "s": shared, "g": weights(4), "v": np.abs(weights(4))}
    nodes = [
        helper.make_node("Conv", ["x", "w", "s"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "g", "s", "s", "v"], ["n"]),
        helper.make_node("Conv", ["x", "w", "s"], ["d"]),
        helper.make_node("BatchNormalization", ["d", "g", "s", "s", "v"], ["m"]),
        helper.make_node("Sub", ["n", "m"], ["y"]),
        helper.make_node("Add", ["n", "m"], ["z"]),
    ]
    proto = model(
        nodes,
        constants,
        ["N", 3, 8, 8],
        outputs=[value("y", ["N", 4, 6, 6]), value("z", ["N", 4, 6, 6])],
    )
    folded = fold_onnx(proto).model
    assert batch_norms(folded) == 0
    assert set(initializers(folded)).isdisjoint({"s", "g", "v"})
    for ours, theirs in zip(runtime(folded, x=X), runtime(proto, x=X), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


# Where constants come from


def constant_node(name, array):
    return helper.make_node("Constant", [], [name], value=tensor(name, array))


def test_constant_nodes_and_identity_chains():
    nodes = [constant_node(name, array) for name, array in parameters().items()]
    nodes += [
        constant_node("w0", weights(4, 3, 3, 3)),
        helper.make_node("Identity", ["w0"], ["w"]),
        helper.make_node("Identity", ["gamma"], ["gamma2"]),
        conv(),
        helper.make_node("BatchNormalization", ["c", "gamma2", "beta", "mean", "var"], ["y"]),
    ]
    proto = model(nodes, {}, ["N", 3, 8, 8], ["N", 4, 6, 6])
    folded = fold_onnx(proto).model
    assert [n.op_type for n in folded.graph.node] == ["Constant", "Constant", "Conv"]
    assert not folded.graph.initializer
    np.testing.assert_allclose(runtime(folded, x=X)[0], runtime(proto, x=X)[0], rtol=1e-4, atol=1e-4)


def test_value_floats_and_value_float_constants():
    values = [1.5, -2.0, 0.0, 3.0]
    nodes = [helper.make_node("Constant", [], [name], value_floats=values) for name in PARAMETERS[:3]]
    nodes += [
        helper.make_node("Constant", [], ["var"], value_floats=[0.5, 1.0, 2.0, 4.0]),
        helper.make_node("Constant", [], ["k"], value_float=0.25),
        conv(),
        helper.make_node("Add", ["c", "k"], ["s"]),
        bn_node("s", "y"),
    ]
    proto = model(nodes, {"w": weights(4, 3, 3, 3)}, ["N", 3, 8, 8], ["N", 4, 6, 6])
    folded = fold_onnx(proto).model
    assert batch_norms(folded) == 0
    np.testing.assert_allclose(runtime(folded, x=X)[0], runtime(proto, x=X)[0], rtol=1e-4, atol=1e-4)


def test_before_ir_version_4_listed_initializers_are_constants():
    proto = conv_model(opset=8, ir_version=3)
    constants = initializers(proto)
    proto.graph.input.extend(value(name, array.shape) for name, array in constants.items())
    onnx.checker.check_model(proto)
    result = fold_onnx(proto)
    assert len(result.report.folds) == 1
    # What is no longer an initializer would be a required input if it stayed listed.
    assert {i.name for i in result.model.graph.input} == {"x", "w", "conv.bias.folded"}
    np.testing.assert_allclose(runtime(result.model, x=X)[0], runtime(proto, x=X)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("opset", "ir_version"), [(7, 3), (8, 4), (9, 4), (13, 7), (14, 7), (15, 8), (23, 11)])
def test_opsets(opset, ir_version):
    proto = conv_model(opset=opset, ir_version=max(ir_version, 4))
    folded = fold_onnx(proto).model
    assert batch_norms(folded) == 0
    np.testing.assert_allclose(runtime(folded, x=X)[0], runtime(conv_model(), x=X)[0], rtol=1e-4, atol=1e-4)


def test_epsilon_is_read():
    proto = model(
        [conv(), bn_node("c", "y", epsilon=0.5)],
        {"w": weights(4, 3, 3, 3, dtype="float64"), **parameters(dtype="float64")},
        [2, 3, 8, 8],
        [2, 4, 6, 6],
        dtype="float64",
    )
    x = X.astype("float64")
    folded = fold_onnx(proto).model
    np.testing.assert_allclose(reference(folded, x=x)[0], reference(proto, x=x)[0], rtol=1e-11, atol=1e-12)


def test_float32_parameters_on_a_float16_conv_stay_well_typed():
    proto = model(
        [conv(), bn_node("c", "y")],
        {"w": weights(4, 3, 3, 3, dtype="float16"), **parameters(dtype="float32")},
        [2, 3, 8, 8],
        [2, 4, 6, 6],
        dtype="float16",
        opset=15,
    )
    folded = fold_onnx(proto).model
    assert {array.dtype.name for array in initializers(folded).values()} == {"float16"}
    onnx.checker.check_model(folded, full_check=True)
    narrow = runtime(folded, x=X.astype("float16"))[0].astype("float64")
    wide = model(
        [conv(), bn_node("c", "y")],
        {"w": weights(4, 3, 3, 3, dtype="float16").astype("float32"), **parameters()},
        [2, 3, 8, 8],
        [2, 4, 6, 6],
    )
    expected = runtime(wide, x=X.astype("float16").astype("float32"))[0]
    np.testing.assert_allclose(narrow, expected, rtol=2e-2, atol=2e-2)


# Subgraphs and local functions


def if_model(inside_then, *, outer=(), constants=None, outer_outputs=None):
    then = helper.make_graph(inside_then, "then", [], [value("t", [None] * 4)])
    other = helper.make_graph([helper.make_node("Relu", ["x"], ["e"])], "else", [], [value("e", [None] * 4)])
    nodes = [
        *outer,
        helper.make_node("If", ["cond"], ["y"], name="if", then_branch=then, else_branch=other),
    ]
    condition = helper.make_tensor_value_info("cond", onnx.TensorProto.BOOL, [])
    return model(
        nodes,
        constants or {},
        ["N", 3, 8, 8],
        [None] * 4,
        inputs=[condition],
        outputs=outer_outputs,
    )


def test_fold_inside_a_subgraph_with_outer_weights():
    constants = {"w": weights(3, 3, 1, 1), **parameters(3)}
    proto = if_model([conv(), bn_node("c", "t")], constants=constants)
    result = fold_onnx(proto)
    (fold,) = result.report.folds
    assert fold.graph == "main/if.then_branch"
    assert batch_norms(result.model) == 0
    for flag in (True, False):
        feeds = {"x": X, "cond": np.array(flag)}
        np.testing.assert_allclose(runtime(result.model, **feeds)[0], runtime(proto, **feeds)[0], rtol=1e-4, atol=1e-4)


def test_producer_captured_by_a_subgraph_is_left():
    proto = if_model(
        [helper.make_node("Abs", ["c"], ["t"])],
        outer=[conv(), bn_node("c", "z")],
        constants={"w": weights(3, 3, 1, 1), **parameters(3)},
        outer_outputs=[value("y", [None] * 4), value("z", [None] * 4)],
    )
    (left,) = fold_onnx(proto).report.left
    assert left.reason is Reason.SUBGRAPH_CAPTURE


def test_batch_norm_in_a_subgraph_does_not_reach_out():
    proto = if_model(
        [bn_node("c", "t")],
        outer=[conv()],
        constants={"w": weights(3, 3, 1, 1), **parameters(3)},
    )
    (left,) = fold_onnx(proto).report.left
    assert left.reason is Reason.SUBGRAPH_CAPTURE
    assert left.graph == "main/if.then_branch"


def test_batch_norm_output_captured_by_a_subgraph_keeps_its_name():
    proto = if_model(
        [helper.make_node("Abs", ["n"], ["t"])],
        outer=[conv(), bn_node("c", "n")],
        constants={"w": weights(3, 3, 1, 1), **parameters(3)},
    )
    folded = fold_onnx(proto).model
    assert batch_norms(folded) == 0
    feeds = {"x": X, "cond": np.array(True)}
    np.testing.assert_allclose(runtime(folded, **feeds)[0], runtime(proto, **feeds)[0], rtol=1e-4, atol=1e-4)


def test_branches_may_repeat_names_with_other_shapes():
    # The rank of "m"'s operand is known in one branch only: it proves nothing about the other.
    def branch(name, axes, rank):
        nodes = [
            helper.make_node("Reshape", ["x", axes], ["a"]),
            helper.make_node("MatMul", ["a", "w"], ["m"]),
            bn_node("m", "t"),
        ]
        return helper.make_graph(nodes, name, [], [value("t", [None] * rank)])

    nodes = [
        helper.make_node(
            "If",
            ["cond"],
            ["z"],
            name="if",
            then_branch=branch("then", "flat", 2),
            else_branch=branch("else", "cube", 3),
        )
    ]
    constants = {
        "w": weights(6, 6),
        "flat": np.array([-1, 6]),
        "cube": np.array([-1, 6, 6]),
        **parameters(6),
    }
    condition = helper.make_tensor_value_info("cond", onnx.TensorProto.BOOL, [])
    nodes.append(helper.make_node("ReduceMean", ["z"], ["y"], keepdims=0))
    proto = model(nodes, constants, ["N", 36], [], inputs=[condition])
    result = fold_onnx(proto)
    reached = {row.graph: getattr(row, "reason", "folded") for row in result.report.batch_norms}
    assert reached["main/if.then_branch"] == "folded"
    assert reached["main/if.else_branch"] is Reason.CHANNEL_AXIS
    x = X.reshape(-1)[:72].reshape(2, 36)
    for flag in (True, False):
        feeds = {"x": x, "cond": np.array(flag)}
        np.testing.assert_allclose(runtime(result.model, **feeds)[0], runtime(proto, **feeds)[0], rtol=1e-4, atol=1e-4)


def function_model(nodes, attributes=(), **call):
    function = helper.make_function(
        "local", "Block", ["x"], ["y"], nodes, [helper.make_opsetid("", 17)], list(attributes)
    )
    return model(
        [helper.make_node("Block", ["x"], ["y"], domain="local", name="call", **call)],
        {},
        ["N", 3, 8, 8],
        [None] * 4,
        functions=[function],
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("local", 1)],
    )


def test_fold_inside_a_local_function():
    nodes = [constant_node(name, array) for name, array in parameters(3).items()]
    nodes += [constant_node("w", weights(3, 3, 1, 1)), conv(), bn_node("c", "y")]
    proto = function_model(nodes)
    result = fold_onnx(proto)
    assert [fold.graph for fold in result.report.folds] == ["function local::Block"]
    assert batch_norms(result.model) == 0
    np.testing.assert_allclose(runtime(result.model, x=X)[0], runtime(proto, x=X)[0], rtol=1e-4, atol=1e-4)


def test_attribute_that_is_a_function_parameter_is_a_reason():
    nodes = [constant_node(name, array) for name, array in parameters(3).items()]
    norm = bn_node("c", "y")
    norm.attribute.append(onnx.AttributeProto(name="epsilon", ref_attr_name="eps", type=onnx.AttributeProto.FLOAT))
    nodes += [constant_node("w", weights(3, 3, 1, 1)), conv(), norm]
    (left,) = fold_onnx(function_model(nodes, ["eps"], eps=0.1)).report.left
    assert left.reason is Reason.ATTRIBUTE_NOT_CONSTANT


def test_local_function_named_like_a_standard_operator_is_not_it():
    function = helper.make_function(
        "",
        "Conv",
        ["x", "w"],
        ["y"],
        [helper.make_node("Relu", ["x"], ["y"])],
        [helper.make_opsetid("", 17)],
    )
    graph = ir.from_proto(
        model(
            [conv(), bn_node("c", "y")],
            {"w": weights(4, 4, 1, 1), **parameters()},
            [2, 4, 8, 8],
            [2, 4, 8, 8],
            functions=[function],
        )
    )
    (left,) = fold_onnx(graph).report.left
    assert left.reason is Reason.FOREIGN_DOMAIN


# Refusals: graphs that must not be folded, each with its reason

W = weights(4, 3, 3, 3)
PLAIN = {"w": W, **parameters()}
SHAPES = ["N", 3, 8, 8], ["N", 4, 6, 6]


def plain(constants=None, nodes=None, x=SHAPES[0], y=SHAPES[1], **options):
    return model(nodes or [conv(), bn_node("c", "y")], {**PLAIN, **(constants or {})}, x, y, **options)


def without(name, **options):
    constants = {key: array for key, array in PLAIN.items() if key != name}
    shape = PLAIN[name].shape
    return model([conv(), bn_node("c", "y")], constants, *SHAPES, inputs=[value(name, shape)], **options)


def overridable(name):
    return plain(inputs=[value(name, PLAIN[name].shape)])


def with_node(*nodes, constants=None, **options):
    return plain(constants, list(nodes), **options)


def linear(shape, features, channels, constants=None):
    values = {"w": weights(shape[-1], features), **parameters(channels), **(constants or {})}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), bn_node("m", "y")]
    return model(nodes, values, shape, [None] * len(shape))


def of_unknown_rank(*nodes, constants):
    """The nodes start from "r", whose rank depends on an input."""
    reshape = helper.make_node("Reshape", ["x", "shape"], ["r"])
    shape = helper.make_tensor_value_info("shape", onnx.TensorProto.INT64, [None])
    return model([reshape, *nodes], constants, ["N", 4], ["N", 4], inputs=[shape])


def extra_outputs(opset, *, used=False):
    node = bn_node("c", "y")
    node.output.extend(["m1", "v1", "m2", "v2"] if opset < 14 else ["m1", "v1"])
    outputs = [value("y", SHAPES[1])] + ([value("m1", [4])] if used else [])
    return with_node(conv(), node, opset=opset, outputs=outputs)


def add_after_conv(constant, x=(2, 3, 8, 8), w=W):
    nodes = [conv(), helper.make_node("Add", ["c", "k"], ["s"]), bn_node("s", "y")]
    return with_node(*nodes, constants={"k": constant, "w": w}, x=x, y=[None] * 4)


def types_that_disagree():
    proto = plain(outputs=[value("y", SHAPES[1], "float64")])
    proto.graph.value_info.append(value("c", SHAPES[1]))
    return proto


REFUSALS = {
    "training mode": (
        lambda: with_node(conv(), bn_node("c", "y", training_mode=1), opset=15),
        Reason.TRAINING_MODE,
    ),
    "more than one output before opset 14": (lambda: extra_outputs(9), Reason.TRAINING_MODE),
    "a used statistics output": (lambda: extra_outputs(14, used=True), Reason.EXTRA_OUTPUTS),
    "spatial=0": (
        lambda: with_node(conv(), bn_node("c", "y", spatial=0), opset=8),
        Reason.SPATIAL_ZERO,
    ),
    "opset 6, in training mode": (
        lambda: with_node(conv(), bn_node("c", "y"), opset=6),
        Reason.TRAINING_MODE,
    ),
    "an Add of opset 6, which broadcasts in another way": (
        lambda: with_node(
            conv(),
            helper.make_node("Add", ["c", "k"], ["s"], axis=1, broadcast=1),
            bn_node("s", "y", is_test=1),
            constants={"k": weights(4)},
            opset=6,
        ),
        Reason.OLD_OPSET,
    ),
    "a parameter is an input": (lambda: without("mean"), Reason.PARAMETER_NOT_CONSTANT),
    "a parameter is computed": (
        lambda: with_node(
            helper.make_node("Abs", ["mean"], ["m2"]),
            conv(),
            helper.make_node("BatchNormalization", ["c", "gamma", "beta", "m2", "var"], ["y"]),
        ),
        Reason.PARAMETER_NOT_CONSTANT,
    ),
    "an overridable parameter": (lambda: overridable("gamma"), Reason.PARAMETER_OVERRIDABLE),
    "parameters of different lengths": (
        lambda: plain({"mean": weights(3)}),
        Reason.PARAMETER_SHAPE,
    ),
    "a parameter of rank 2": (
        lambda: plain({"beta": weights(4, 1)}),
        Reason.PARAMETER_SHAPE,
    ),
    "channels that are not the conv's": (
        lambda: plain(parameters(5)),
        Reason.PARAMETER_SHAPE,
    ),
    "integer parameters": (
        lambda: plain({"gamma": np.ones(4, dtype="int64")}),
        Reason.UNSUPPORTED_DTYPE,
    ),
    "negative variance": (
        lambda: plain({"var": np.float32([1, 1, -1, 1])}),
        Reason.INVALID_VARIANCE,
    ),
    "NaN in the mean": (
        lambda: plain({"mean": np.float32([1, np.nan, 1, 1])}),
        Reason.NOT_FINITE,
    ),
    "infinite weight": (lambda: plain({"w": W * np.float32(np.inf)}), Reason.NOT_FINITE),
    "input is a graph input": (
        lambda: model([bn_node("x", "y")], parameters(3), ["N", 3, 8, 8], ["N", 3, 8, 8]),
        Reason.NO_LINEAR_PRODUCER,
    ),
    "follows Relu": (
        lambda: with_node(conv(), helper.make_node("Relu", ["c"], ["r"]), bn_node("r", "y")),
        Reason.SHIFT_STAYS,
    ),
    "follows Sigmoid": (
        lambda: with_node(conv(), helper.make_node("Sigmoid", ["c"], ["r"]), bn_node("r", "y")),
        Reason.NO_LINEAR_PRODUCER,
    ),
    "a negative scale after MaxPool": (
        lambda: with_node(
            conv(),
            helper.make_node("MaxPool", ["c"], ["r"], kernel_shape=[2, 2]),
            bn_node("r", "y"),
            constants={"gamma": np.float32([1, -1, 2, 3])},
            y=[None] * 4,
        ),
        Reason.NEGATIVE_SCALE,
    ),
    "a shift after zero padding": (
        lambda: with_node(
            conv(),
            helper.make_node("Pad", ["c", "pads"], ["r"]),
            bn_node("r", "y"),
            constants={"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
            y=[None] * 4,
        ),
        Reason.PADDING,
    ),
    "branches of one convolution that meet": (
        lambda: with_node(
            conv(),
            helper.make_node("Split", ["c"], ["p", "q"], axis=1),
            helper.make_node("Concat", ["q", "p"], ["r"], axis=1),
            bn_node("r", "y"),
        ),
        Reason.MEETS_ITSELF,
    ),
    "three hundred operators away": (
        lambda: with_node(
            helper.make_node("Conv", ["x", "w"], ["i0"]),
            *(helper.make_node("Identity", [f"i{n}"], [f"i{n + 1}"]) for n in range(300)),
            bn_node("i300", "y"),
        ),
        Reason.TOO_FAR,
    ),
    "a Cast to a wider type": (
        lambda: model(
            [conv(), helper.make_node("Cast", ["c"], ["r"], to=1), bn_node("r", "y")],
            {"w": W.astype("float16"), **parameters()},
            *SHAPES,
            dtype="float16",
            outputs=[value("y", SHAPES[1])],
        ),
        Reason.NARROWER_TYPE,
    ),
    "producer of another domain": (
        lambda: with_node(
            helper.make_node("Conv", ["x", "w"], ["c"], domain="com.example"),
            bn_node("c", "y"),
            opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)],
        ),
        Reason.FOREIGN_DOMAIN,
    ),
    "producer is a graph output": (
        lambda: plain(outputs=[value("y", SHAPES[1]), value("c", SHAPES[1])]),
        Reason.GRAPH_OUTPUT,
    ),
    "another consumer": (
        lambda: with_node(conv(), bn_node("c", "n"), helper.make_node("Add", ["n", "c"], ["y"])),
        Reason.OTHER_CONSUMER,
    ),
    "two batch norms on one conv": (
        lambda: with_node(
            conv(),
            bn_node("c", "n"),
            bn_node("c", "m"),
            helper.make_node("Add", ["n", "m"], ["y"]),
        ),
        Reason.OTHER_CONSUMER,
    ),
    "Dropout in training": (
        lambda: with_node(
            conv(),
            helper.make_node("Dropout", ["c", "", "t"], ["d"]),
            bn_node("d", "y"),
            constants={"t": np.array(True)},
        ),
        Reason.DROPOUT_TRAINING,
    ),
    "the mask of Dropout": (
        lambda: with_node(
            conv(),
            helper.make_node("Dropout", ["c"], ["d", "mask"]),
            helper.make_node("Cast", ["mask"], ["k"], to=1),
            bn_node("k", "y"),
        ),
        Reason.NO_LINEAR_PRODUCER,
    ),
    "linear over (N, C, F), F equal to C": (
        lambda: linear(("N", 5, 3), 5, 5),
        Reason.CHANNEL_AXIS,
    ),
    "linear of unknown rank": (
        lambda: of_unknown_rank(
            helper.make_node("MatMul", ["r", "w"], ["m"]),
            bn_node("m", "y"),
            constants={"w": weights(4, 4), **parameters(4)},
        ),
        Reason.CHANNEL_AXIS_UNPROVEN,
    ),
    "matmul with a stack of matrices": (
        lambda: linear((4, 3), 4, 4, {"w": weights(4, 3, 4)}),
        Reason.CHANNEL_AXIS,
    ),
    "matmul then transpose then batch norm": (
        lambda: model(
            [
                helper.make_node("MatMul", ["x", "w"], ["m"]),
                helper.make_node("Transpose", ["m"], ["t"], perm=[0, 2, 1]),
                bn_node("t", "y"),
            ],
            {"w": weights(3, 4), **parameters(4)},
            ["N", 4, 3],
            [None] * 3,
        ),
        Reason.NO_GAIN,
    ),
    "matmul then reshape then batch norm": (
        lambda: model(
            [
                helper.make_node("MatMul", ["x", "w"], ["m"]),
                helper.make_node("Reshape", ["m", "shape"], ["t"]),
                bn_node("t", "y"),
            ],
            {"w": weights(3, 4), "shape": np.array([0, 4, -1]), **parameters(4)},
            ["N", 4, 3],
            [None] * 3,
        ),
        Reason.CHANNEL_AXIS,
    ),
    "a constant [C] where W equals C": (
        lambda: add_after_conv(weights(4), x=(2, 3, 8, 6)),
        Reason.AMBIGUOUS_BROADCAST,
    ),
    "a constant of higher rank": (
        lambda: add_after_conv(weights(1, 1, 1, 1, 1)),
        Reason.AMBIGUOUS_BROADCAST,
    ),
    "a constant that broadcasts the only channel": (
        lambda: add_after_conv(weights(4, 1, 1), w=weights(1, 3, 3, 3)),
        Reason.CHANNEL_AXIS_UNPROVEN,
    ),
    "an Add of unknown shape": (
        lambda: of_unknown_rank(
            helper.make_node("Add", ["r", "k"], ["s"]),
            bn_node("s", "y"),
            constants={"k": weights(4, 1, 1), **parameters(4)},
        ),
        Reason.CHANNEL_AXIS_UNPROVEN,
    ),
    "an Add of which one branch cannot scale": (
        lambda: with_node(
            conv(),
            helper.make_node("Sigmoid", ["c"], ["d"]),
            conv("e"),
            helper.make_node("Add", ["e", "d"], ["s"]),
            bn_node("s", "y"),
        ),
        Reason.NO_LINEAR_PRODUCER,
    ),
    "weight is an input": (lambda: without("w"), Reason.WEIGHT_NOT_CONSTANT),
    "bias is computed": (
        lambda: with_node(
            helper.make_node("Abs", ["mean"], ["m2"]),
            helper.make_node("Conv", ["x", "w", "m2"], ["c"]),
            bn_node("c", "y"),
        ),
        Reason.WEIGHT_NOT_CONSTANT,
    ),
    "an overridable weight": (lambda: overridable("w"), Reason.WEIGHT_OVERRIDABLE),
    "integer weight": (
        lambda: linear((2, 3), 4, 4, {"w": np.ones((3, 4), dtype="int64")}),
        Reason.UNSUPPORTED_DTYPE,
    ),
    "bias of another type": (
        lambda: with_node(
            helper.make_node("Conv", ["x", "w", "k"], ["c"]),
            bn_node("c", "y"),
            constants={"k": weights(4, dtype="float64")},
        ),
        Reason.TYPE_MISMATCH,
    ),
    "declared types that disagree": (
        types_that_disagree,
        Reason.TYPE_MISMATCH,
    ),
    "float16 weights that overflow": (
        lambda: plain(
            {"w": W.astype("float16") * np.float16(1e4), **parameters(gamma=np.full(4, 100.0))}
            | {k: v.astype("float16") for k, v in parameters().items() if k != "gamma"}
            | {"gamma": np.full(4, 100.0, dtype="float16")},
            dtype="float16",
        ),
        Reason.OUTSIDE_DTYPE,
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case):
    make, reason = REFUSALS[case]
    proto = make()
    result = fold_onnx(proto)
    left = [row for row in result.report.left if row.reason is reason]
    assert left, result.report.batch_norms
    assert not result.report.folds
    assert result.model == proto
    assert UNLOCK[reason] in left[0].sentence
    assert left[0].detail


def test_every_reason_has_a_way_to_unlock_it_and_a_graph_that_shows_it():
    assert set(UNLOCK) == set(Reason)
    # NO_LINEAR_CONSUMER only ever explains why the way forward is closed, too.
    elsewhere = {
        Reason.SUBGRAPH_CAPTURE,
        Reason.ATTRIBUTE_NOT_CONSTANT,
        Reason.SKIPPED,
        Reason.NO_LINEAR_CONSUMER,
        Reason.QUANTIZATION,
        Reason.TOO_LARGE,
    }
    assert {reason for _, reason in REFUSALS.values()} | elsewhere == set(Reason) - OF_MODULES


def test_batch_norm_of_another_domain_is_not_one():
    node = bn_node("c", "y")
    node.domain = "com.example"
    proto = with_node(
        conv(),
        node,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)],
    )
    assert fold_onnx(proto).report.batch_norms == ()


def test_unused_statistics_outputs_at_opset_14_do_not_matter():
    assert len(fold_onnx(extra_outputs(14)).report.folds) == 1


def test_refused_path_changes_nothing():
    # One branch could take its part of the map, but not the other.
    nodes = [
        conv(),
        helper.make_node("Sigmoid", ["c"], ["d"]),
        conv("e"),
        helper.make_node("Add", ["e", "d"], ["s"]),
        bn_node("s", "y"),
    ]
    proto = with_node(*nodes)
    result = fold_onnx(proto)
    assert result.report.left[0].reason is Reason.NO_LINEAR_PRODUCER
    assert result.model == proto


def test_inferred_shapes_do_not_stay():
    folded = fold_onnx(net_model()).model
    assert not folded.graph.value_info


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: m.graph.ClearField("node"), "invalid model"),
        (lambda m: m.ClearField("opset_import"), "invalid model"),
        (lambda m: m.graph.initializer.append(m.graph.initializer[0]), "two initializers"),
        (lambda m: m.graph.sparse_initializer.add(), "sparse"),
        (lambda m: m.training_info.add(), "training"),
        (lambda m: m.graph.initializer[0].dims.append(9), "invalid model"),
        (lambda m: m.graph.node[0].input.__setitem__(0, "nowhere"), "invalid model"),
        (lambda m: m.graph.node.append(m.graph.node[1]), "invalid model"),
        (lambda m: setattr(m.opset_import[0], "version", 999), "opset 999 is unknown"),
        (lambda m: setattr(m.graph.node[0], "op_type", "Konv"), "invalid model"),
    ],
)
def test_invalid_models_are_one_line_errors(damage, message):
    proto = conv_model()
    damage(proto)
    with pytest.raises(ModelError, match=message) as caught:
        fold_onnx(proto)
    assert "\n" not in str(caught.value)


def test_cyclic_model_is_invalid():
    nodes = [
        helper.make_node("Add", ["x", "b"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    with pytest.raises(ModelError, match="invalid model"):
        fold_onnx(model(nodes, {}, [2], [2]))


def test_a_declared_shape_that_inference_contradicts_proves_nothing():
    """The value is declared a matrix but has rank 3, where MatMul's features are not the channels."""
    nodes = [
        helper.make_node("Identity", ["x"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["m"]),
        bn_node("m", "y"),
    ]
    graph = model(nodes, {"w": weights(4, 4), **parameters()}, [2, 4, 4], [2, 4, 4])
    graph.graph.value_info.append(value("r", [2, 4]))
    (left,) = fold_onnx(graph).report.left
    assert left.reason is Reason.CHANNEL_AXIS_UNPROVEN


def test_every_scope_has_a_label_of_its_own():
    def branch(name):
        inside = [conv("c", x="x"), bn_node("c", name)]
        return helper.make_graph(inside, name, [], [value(name, [None] * 4)])

    nodes = [
        helper.make_node("If", ["cond"], [y], name="same", then_branch=branch(f"{y}t"), else_branch=branch(f"{y}e"))
        for y in ("a", "b")
    ]
    nodes.append(helper.make_node("Add", ["a", "b"], ["y"]))
    condition = helper.make_tensor_value_info("cond", onnx.TensorProto.BOOL, [])
    graph = model(nodes, PLAIN, *SHAPES, inputs=[condition])
    labels = [scope.label for scope in scopes(ir.from_proto(graph))]
    assert len(labels) == len(set(labels)) == 5
    assert len(fold_onnx(graph).report.folds) == 4
