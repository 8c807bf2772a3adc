"""The rules for rounding: what an operator computes is within its bound of the exact result, and no larger than it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from fold_models import model
from onnx import helper
from onnx.reference import ReferenceEvaluator

from pybn.folding.fold_proof import PRECISION, Evaluator, gamma
from pybn.folding.graph import Facts
from pybn.folding.majorant import RULES, Arithmetic, Majorants, NoBound
from pybn.folding.segments import Expression

C = 4
SPATIAL = (C, 6, 6)


def constants(rng):
    """Operands by name; those of the wrong shape for an operator are not used by it."""
    spread = 10.0 ** rng.integers(-3, 4)
    return {
        "w": rng.normal(size=(C, C, 3, 3)) * spread,
        "t": rng.normal(size=(C, C // 2, 3, 3)) * spread,
        "m": rng.normal(size=(6, 7)) * spread,
        "g": rng.normal(size=(9, C * 36)) * spread,
        "c9": rng.normal(size=9),
        "k": rng.normal(size=(C, 1, 1)) * spread,
        "v": rng.normal(size=C),
        "gamma": rng.normal(size=C),
        "mean": rng.normal(size=C) * spread,
        "var": rng.uniform(0.1, 3, C),
        "low": np.array(-0.3),
        "high": np.array(0.5),
        "filling": np.array(-2.5),
        "scale": np.array(0.37),
    }


INTEGERS = {
    "i_shape": np.array([0, 2, -1]),
    "i_expand": np.array([2, 1, C, 6, 6]),
    "i_axes": np.array([1]),
    "i_spatial": np.array([2, 3]),
    "i_starts": np.array([1]),
    "i_ends": np.array([3]),
    "i_pads": np.array([0, 0, 1, 1, 0, 0, 2, 0]),
    "i_sizes": np.array([2, C, 12, 24]),
    "i_repeats": np.array([1, 2, 1, 1]),
    "i_halves": np.array([1, 3]),
    "q_weight": np.array([[-128, 127], [3, 0]], dtype=np.int8),
    "q_zero": np.array(5, dtype=np.int8),
    "b_false": np.array(False),
    "f_ratio": np.array(0.5, dtype=np.float32),
    "f_scales": np.array([1, 1, 2, 2], dtype=np.float32),
    # Powers of two, where the weights of interpolation are exact in both runtimes.
    "f_enlarge": np.array([1, 1, 2, 4], dtype=np.float32),
}

CASES = {
    "Abs": [(["x"], {})],
    "Add": [(["x", "k"], {}), (["x", "x"], {})],
    "AveragePool": [(["x"], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1})],
    "BatchNormalization": [(["x", "gamma", "v", "mean", "var"], {})],
    "Cast": [(["x"], {"to": "same"})],
    "Clip": [(["x", "low", "high"], {}), (["x", "", "low"], {}), (["x", "high"], {}), (["x"], {})],
    "Concat": [(["x", "x"], {"axis": 1})],
    "Conv": [(["x", "w", "v"], {"pads": [1, 1, 1, 1]}), (["x", "w"], {"strides": [2, 1]})],
    "ConvTranspose": [(["x", "t", "v"], {"group": 2}), (["x", "w"], {})],
    "DepthToSpace": [(["x"], {"blocksize": 2})],
    "DequantizeLinear": [(["q_weight", "scale", "q_zero"], {})],
    "Div": [(["x", "k"], {})],
    "Dropout": [(["x"], {}), (["x", "f_ratio", "b_false"], {})],
    "Expand": [(["x", "i_expand"], {})],
    "Flatten": [(["x"], {"axis": 2})],
    "Gather": [(["x", "i_halves"], {"axis": 1})],
    "Gemm": [(["f", "g", "c9"], {"transB": 1, "alpha": -0.5, "beta": -2.0}), (["f", "g"], {"transB": 1})],
    "GlobalAveragePool": [(["x"], {})],
    "GlobalMaxPool": [(["x"], {})],
    "Identity": [(["x"], {})],
    "LeakyRelu": [(["x"], {"alpha": 0.3}), (["x"], {"alpha": -2.0})],
    "MatMul": [(["x", "m"], {})],
    "Max": [(["x", "k", "scale"], {})],
    "MaxPool": [(["x"], {"kernel_shape": [2, 3], "pads": [0, 1, 1, 1]})],
    "Min": [(["x", "k"], {}), (["x"], {})],
    "Mul": [(["x", "k"], {}), (["x", "x"], {})],
    "Neg": [(["x"], {})],
    "PRelu": [(["x", "k"], {})],
    "Pad": [(["x", "i_pads", "filling"], {}), (["x", "i_pads"], {"mode": "reflect"})],
    "ReduceMax": [(["x"], {"axes": [2, 3]})],
    "ReduceMean": [(["x"], {"axes": [2, 3], "keepdims": 0})],
    "ReduceMin": [(["x"], {"axes": [2, 3]})],
    "ReduceSum": [(["x", "i_spatial"], {})],
    "Relu": [(["x"], {})],
    "Reshape": [(["x", "i_shape"], {})],
    "Resize": [
        (["x", "", "f_scales"], {"mode": "nearest"}),
        (["x", "", "f_enlarge"], {"mode": "linear"}),
        (["x", "", "", "i_sizes"], {"mode": "cubic", "cubic_coeff_a": -0.5}),
    ],
    "Slice": [(["x", "i_starts", "i_ends", "i_axes"], {})],
    "SpaceToDepth": [(["x"], {"blocksize": 2})],
    "Split": [(["x", "i_halves"], {"axis": 1, "outputs": 2})],
    "Squeeze": [(["u", "i_axes"], {})],
    "Sub": [(["k", "x"], {})],
    "Sum": [(["x", "k", "x"], {})],
    "Tile": [(["x", "i_repeats"], {})],
    "Transpose": [(["x"], {"perm": [0, 3, 1, 2]})],
    "Unsqueeze": [(["x", "i_axes"], {})],
    "Upsample": [(["x", "f_scales"], {"opset": 9})],
}


def one_node(op_type, inputs, attributes, dtype):
    """A model of one node, from "x", "u" or "f" and with everything else constant."""
    rng = np.random.default_rng(sum(map(ord, op_type)))
    attributes = dict(attributes)
    opset, outputs = attributes.pop("opset", 17), attributes.pop("outputs", 1)
    x = (rng.normal(size=(2, *SPATIAL)) * 10.0 ** rng.integers(-2, 3)).astype("float32")
    entries = {"x": x, "u": x[:, None], "f": x.reshape(2, -1)}
    arrays = {name: array.astype("float32") for name, array in constants(rng).items()}
    widened = {name: array.astype(dtype) for name, array in {**entries, **arrays}.items()}
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    if op_type == "Cast":
        attributes["to"] = element
    node = helper.make_node(op_type, inputs, [f"y{i}" for i in range(outputs)], **attributes)
    feeds = {name: widened[name] for name in inputs if name in entries}
    proto = model(
        [node],
        {name: array for name, array in {**widened, **INTEGERS}.items() if name in inputs and name not in entries},
        None,
        opset=opset,
    )
    del proto.graph.input[:], proto.graph.output[:]
    proto.graph.input.extend(helper.make_tensor_value_info(name, element, None) for name in feeds)
    proto.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in node.output)
    return proto, feeds


def expression_of(proto):
    graph = ir.from_proto(proto)
    facts = Facts(graph)
    nodes = tuple(graph.graph)
    values = dict.fromkeys(value for node in nodes for value in node.inputs if value is not None)
    leaves = [value for value in values if value.producer() is None]
    return Expression(
        nodes[-1].outputs[-1],
        nodes,
        tuple(value for value in leaves if not value.is_initializer()),
        tuple(value for value in leaves if value.is_initializer()),
        graph.opset_imports[""],
        facts,
    )


def majorant_of(proto, feeds, constant_roundings=0):
    arithmetic = Arithmetic(np.dtype("float32"), PRECISION["float32"][1], 0, constant_roundings)
    return Majorants(expression_of(proto), arithmetic)(feeds)


def test_every_rule_has_a_case():
    assert CASES.keys() == RULES.keys()


@pytest.mark.parametrize(("op_type", "case"), [(op, case) for op in CASES for case in CASES[op]])
def test_what_is_computed_is_within_its_bound_of_the_exact_result(op_type, case):
    proto, feeds = one_node(op_type, *case, "float32")
    known = majorant_of(proto, feeds)
    computed = Evaluator(expression_of(proto)).run(feeds)
    if op_type == "DequantizeLinear":
        tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
        exact = (tensors["q_weight"].astype(float) - tensors["q_zero"]) * tensors["scale"].astype(float)
    elif op_type == "ConvTranspose":  # onnx.reference cannot do groups
        tensors = {tensor.name: onnx.numpy_helper.to_array(tensor).astype(float) for tensor in proto.graph.initializer}
        weight, *bias = (torch.from_numpy(tensors[name]) for name in case[0][1:])
        x = torch.from_numpy(feeds["x"].astype(float))
        exact = torch.nn.functional.conv_transpose2d(x, weight, *bias, groups=case[1].get("group", 1)).numpy()
    else:
        double, wide = one_node(op_type, *case, "float64")
        exact = ReferenceEvaluator(double).run(None, wide)[-1]
    room = gamma(known.products + known.others, PRECISION["float32"][0])
    assert known.size.shape == computed.shape == exact.shape
    assert known.size.dtype == np.float32
    size = known.size.astype(np.float64) * (1 + room)
    assert np.all(np.abs(exact) <= size * (1 + 1e-12))
    assert np.all(np.abs(computed - exact) <= room * size + 1e-12 * size)
    assert room < 2e-5


@pytest.mark.parametrize(("op_type", "case"), [(op, case) for op in CASES for case in CASES[op]])
def test_a_constant_that_a_fold_rounded_counts(op_type, case):
    proto, feeds = one_node(op_type, *case, "float32")
    exact, rounded = (majorant_of(proto, feeds, roundings) for roundings in (0, 1))
    floats = [name for name in case[0] if name in constants(np.random.default_rng(0))]
    assert (rounded.others > exact.others) == bool(floats)


def test_clip_without_a_bound_on_one_side_stays_of_the_size_of_its_data():
    nodes = [helper.make_node("Clip", ["x", "low", "high"], ["y0"])]
    huge = {"low": np.array(0, "float32"), "high": np.array(3.4e38, "float32")}
    proto = model(nodes, huge, None, outputs=[helper.make_empty_tensor_value_info("y0")])
    x = np.array([-2.0, 3.0], dtype="float32")
    np.testing.assert_allclose(majorant_of(proto, {"x": x}, 1).size, [2, 3])


def test_clip_of_old_opsets_has_its_bounds_as_attributes():
    nodes = [helper.make_node("Clip", ["x"], ["y0"], min=0.5, max=6.0)]
    proto = model(nodes, {}, None, opset=9, outputs=[helper.make_empty_tensor_value_info("y0")])
    np.testing.assert_allclose(majorant_of(proto, {"x": np.array([0.1, -3.0, 9.0], "float32")}).size, [0.5, 3, 9])


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([("Softmax", ["x"], {})], "the operator ai.onnx::Softmax"),
        ([("BatchNormalization", ["x", "v", "v", "v", "var"], {"training_mode": 1})], "training mode"),
        ([("Dropout", ["x", "f_ratio", "b_true"], {})], "training mode"),
        ([("Div", ["v", "x"], {})], "Div whose input 1 is not a constant"),
        ([("Cast", ["x"], {"to": onnx.TensorProto.INT64})], "floats to integers"),
        ([("Resize", ["x", "", "f_scales"], {"mode": "cubic", "exclude_outside": 1})], "exclude_outside"),
        ([("MaxPool", ["x"], {"kernel_shape": [1, 1], "outputs": 2})], "output 1 of MaxPool"),
    ],
)
def test_what_has_no_bound_says_so(nodes, message):
    made = []
    for op_type, inputs, attributes in nodes:
        outputs = [f"y{i}" for i in range(attributes.pop("outputs", 1))]
        made.append(helper.make_node(op_type, inputs, outputs, **attributes))
    floats = {"v": np.ones(2, "float32"), "var": np.ones(2, "float32"), "b_true": np.array(True), **INTEGERS}
    used = {name: array for name, array in floats.items() if any(name in node.input for node in made)}
    proto = model(made, used, None, outputs=[helper.make_empty_tensor_value_info("y0")])
    with pytest.raises(NoBound, match=message):
        majorant_of(proto, {"x": np.ones((1, 2, 3, 3), "float32")})
