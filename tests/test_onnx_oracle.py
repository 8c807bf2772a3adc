"""ONNX's own node tests and its reference evaluator; its conventions are converted here, at the edge.

In ONNX ``momentum`` weighs the old value, and the running variance is moved towards the population variance.
"""

import importlib
import warnings

import numpy as np
import onnx
import pytest
from conftest import images, parameters
from onnx.reference import ReferenceEvaluator

import pybn


def node_tests():
    """The cases of onnx.backend.test for BatchNormalization: models, inputs and the outputs that are right."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        node = importlib.import_module("onnx.backend.test.case.node")
        importlib.import_module("onnx.backend.test.case.node.batch_normalization")
    cases = {case.name: case for case in node._NodeTestCases if case.name.startswith("test_batchnorm_")}
    assert len(cases) == 4
    return cases


def pybn_outputs(node, x, scale, bias, mean, var):
    """The outputs of an ONNX BatchNormalization node."""
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    eps = attributes.get("epsilon", 1e-5)
    if not attributes.get("training_mode", 0):
        return [pybn.batch_norm(x, mean, var, scale, bias, eps=eps)]
    momentum = 1 - attributes.get("momentum", 0.9)
    unbiased = var.astype(np.float64)
    new_mean = mean.astype(np.float64)
    y = pybn.batch_norm(x, new_mean, unbiased, scale, bias, training=True, momentum=momentum, eps=eps)
    _, batch_var, count = pybn.batch_norm_stats(x)
    population = unbiased - momentum * batch_var * (count / (count - 1) - 1)
    return [y, new_mean, population]


CASES = node_tests()


@pytest.mark.parametrize("name", CASES)
def test_node_tests_of_the_onnx_package_pass(instruction_set, name):
    case = CASES[name]
    (node,) = case.model.graph.node
    for inputs, expected in case.data_sets:
        got = pybn_outputs(node, *inputs)
        assert len(got) == len(expected)
        for ours, theirs in zip(got, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def batch_norm_model(training, momentum, epsilon, dtype):
    outputs = ["y", "new_mean", "new_var"] if training else ["y"]
    node = onnx.helper.make_node(
        "BatchNormalization",
        ["x", "scale", "bias", "mean", "var"],
        outputs,
        epsilon=epsilon,
        momentum=momentum,
        training_mode=int(training),
    )
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = onnx.helper.make_graph(
        [node],
        "batch_norm",
        [onnx.helper.make_tensor_value_info(name, element, None) for name in node.input],
        [onnx.helper.make_tensor_value_info(name, element, None) for name in outputs],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 15)])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(8, 5), (4, 3, 9), (2, 7, 5, 6), (2, 3, 4, 5, 6)])
def test_onnx_reference_evaluator_agrees(rng, shape, dtype, training):
    model = batch_norm_model(training, momentum=0.75, epsilon=0.01, dtype=dtype)
    x = images(rng, shape, dtype)
    weight, bias, mean, var = parameters(rng, shape[1], dtype)
    feeds = dict(zip(("x", "scale", "bias", "mean", "var"), (x, weight, bias, mean, var), strict=True))
    expected = ReferenceEvaluator(model).run(None, feeds)
    got = pybn_outputs(model.graph.node[0], x, weight, bias, mean, var)
    # onnx.reference computes in the type of the data, with x * scale + shift; its errors are what this allows for.
    tolerance = 1e-5 if dtype == np.float32 else 1e-6  # eps and momentum are float32 attributes
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)
