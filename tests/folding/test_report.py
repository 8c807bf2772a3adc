"""The report in all its forms: JSON and its schema, the page, the picture, the text, and what they are made from."""

import base64
import copy
import hashlib
import io
import json
import math
import re
import shutil
import subprocess
import tracemalloc
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import matplotlib.image
import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from fold_models import batch_norm, bn_node, model, value
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from pybn import terminal
from pybn.folding import picture, ranges, report
from pybn.folding.html import render_html
from pybn.folding.inputs import random_inputs
from pybn.folding.neighbours import MOST, neighbours
from pybn.folding.onnx import fold_onnx
from pybn.folding.picture import LogAxis, render_png
from pybn.folding.ranges import weight_ranges
from pybn.folding.reasons import UNLOCK, Reason
from pybn.folding.report import (
    GRAPH_INPUT,
    GRAPH_OUTPUT,
    Check,
    FileInfo,
    Fold,
    FoldCheck,
    FoldReport,
    Left,
    Neighbour,
    OutputCheck,
    Predictions,
    ReportError,
    Spread,
    Timing,
    WeightRange,
)
from pybn.folding.sketch import BOX_HEIGHT, BOX_WIDTH, sketch
from pybn.folding.verify import verify

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads(Path(report.__file__).with_name("report.schema.json").read_text())
SCHEMA_CHECK = jsonschema.Draft202012Validator(SCHEMA)

# A name that would break out of an attribute, of text, of a script, of a line, and turn the direction of the text.
HOSTILE = (
    "\"'><script>document.title = 'broken'</script><img src=x onerror=\"document.title='broken'\">&amp;\n\u202e\x1b[31m"
)

BEFORE = Spread(1e-6, 0.02, 0.1, 0.4, 32, 0)
FORWARD = ("Relu", "Conv")
AFTER = Spread(1e-5, 0.005, 0.1, 3.0, 32, 2)


def folded(name, **changes):
    row = Fold(
        name=name,
        op_type="BatchNormalization",
        output=f"{name}.out",
        graph="main",
        direction="backward",
        into=("conv1",),
        route=("Conv",),
        outputs=(f"{name}.out",),
        cost=0,
        scale_range=(0.25, 3.5),
    )
    return replace(row, **changes)


def left(name, **changes):
    around = (
        Neighbour(name, "BatchNormalization", ("a",), ("b",)),
        Neighbour("relu", "Relu", ("x",), ("a",)),
        Neighbour("y", GRAPH_OUTPUT, ("b",), ()),
        Neighbour("x", GRAPH_INPUT, (), ("x",)),
        Neighbour("add", "Add", ("a", "b"), ("c",)),
    )
    row = Left(name, "BatchNormalization", "b", "main", Reason.NO_LINEAR_PRODUCER, "it follows Relu", "fold it", around)
    return replace(row, **changes)


def full():
    """A report with all there is to report."""
    return FoldReport(
        rows=(
            folded("bn1"),
            folded(
                "scale", op_type="Mul", direction="forward", into=("conv2", "conv3"), route=("Relu", "Conv"), cost=1
            ),
            left("bn2"),
            left("bn3", reason=Reason.GRAPH_OUTPUT, detail="a graph output", would=None, graph="main/if.then_branch"),
            left("shift", op_type="Add", reason=Reason.OTHER_CONSUMER, would="fold it"),
            folded(HOSTILE, into=(HOSTILE,), route=(HOSTILE,)),
        ),
        weights=(
            WeightRange("conv1", "Conv", "main", BEFORE, AFTER),
            WeightRange(HOSTILE, "Gemm", "main", BEFORE, BEFORE),
            WeightRange("dead", "Conv", "main", Spread(0.0, 0.0, 0.0, 0.0, 8, 8), Spread(0.0, 0.0, 0.0, 0.0, 8, 8)),
        ),
        input=FileInfo("models/net.onnx", 123_456_789, "ab" * 32),
        output=FileInfo("models/net.folded.onnx", 999, "cd" * 32),
        check=Check(
            inputs=3,
            folds=(
                FoldCheck("c", "main", ("bn1",), 1e-6, 1e-5, True),
                FoldCheck("d", "main", ("bn1",), 1e-9, 1e-5, True),
                FoldCheck("e", "main/if.then_branch", ("bn1",), 1e-5, 1e-5, True),
                FoldCheck("f", "main", (HOSTILE, "other"), 2e-3, 1e-5, False, "too far"),
                FoldCheck(HOSTILE, "main", (), 7e-3, 1e-5, False),
            ),
            outputs=(
                OutputCheck("y", 1e-6, 3e-2, 0, True, True),
                OutputCheck("classes", 0.0, None, 7, True, True),
                OutputCheck(HOSTILE, 9.0, 1e-2, 0, False, False),
            ),
            runtime_optimiser=(OutputCheck("y", 1.0, 3e-2, 0, True, False),),
            runtime_optimiser_folded=(OutputCheck("y", 1e-3, 3e-2, 0, True, True),),
            timing=Timing(0.004, 0.003, 0.002, 0.0025, 50),
            predictions=Predictions(100, 2, 0.91, 0.92),
        ),
    )


# JSON


def test_json_reads_back_as_the_same_report():
    assert FoldReport.from_json(full().to_json()) == full()
    assert FoldReport.from_json(FoldReport(()).to_json()) == FoldReport(())


def test_numbers_that_are_not_finite_are_null_and_read_back_as_nan():
    check = replace(full().check, folds=(FoldCheck("y", "main", (), math.inf, math.nan, False),), timing=None)
    text = replace(full(), check=check, rows=(folded("bn", scale_range=(0.0, math.inf)),)).to_json()
    SCHEMA_CHECK.validate(json.loads(text))
    again = FoldReport.from_json(text)
    assert math.isnan(again.check.folds[0].error)
    assert math.isnan(again.rows[0].scale_range[1])
    assert again.rows[0].scale_range[0] == 0.0
    assert again.check.outputs[1].bound is None


@pytest.mark.parametrize(
    "made",
    [
        full,
        lambda: FoldReport(()),
        lambda: fold_onnx(ROOT / "examples" / "mnist_cnn.onnx").report,
        lambda: checked(small_net()),
    ],
    ids=["all there is", "empty", "from a file", "checked"],
)
def test_reports_are_valid_by_the_schema(made):
    SCHEMA_CHECK.check_schema(SCHEMA)
    SCHEMA_CHECK.validate(json.loads(made().to_json()))


def test_the_schema_allows_nothing_less_and_nothing_more():
    values = full().to_dict()
    # One of each kind: it is known by its keys.
    objects = {frozenset(at(values, path)): path for path in paths_to_objects(values)}.values()
    assert len(objects) == len(SCHEMA["$defs"]) - 3  # which are not of objects
    for path in objects:
        for key in at(values, path):
            damaged = copy.deepcopy(values)
            del at(damaged, path)[key]
            assert not SCHEMA_CHECK.is_valid(damaged), (*path, key)
        damaged = copy.deepcopy(values)
        at(damaged, path)["more"] = 1
        assert not SCHEMA_CHECK.is_valid(damaged), path


def paths_to_objects(value, path=()):
    if isinstance(value, dict):
        yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths_to_objects(item, (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


def test_every_key_is_documented():
    document = (ROOT / "docs" / "report.md").read_text()
    for definition in SCHEMA["$defs"].values():
        for key in definition.get("properties", ()):
            assert f"`{key}`" in document, key


def test_rows_of_json_say_what_follows_from_them():
    values = full().to_dict()
    assert values["schema"] == 2
    assert [row["status"] for row in values["rows"]] == ["folded", "folded", "left", "left", "left", "folded"]
    assert values["rows"][2]["unlock"] == UNLOCK[Reason.NO_LINEAR_PRODUCER]
    assert values["rows"][2]["reason"] == "no-linear-producer"
    assert values["check"]["passed"] is False
    assert values["check"]["runtime_agrees"] is False
    assert values["check"]["runtime_at_fault"] == ["original"]
    assert values["counts"] == {
        "batch_norms": 4, "folded": 2, "left": 2, "affines": 2, "affines_folded": 1, "affines_left": 1,
    }  # fmt: skip


def test_a_fold_is_known_by_the_worst_of_its_values_in_its_graph():
    check = full().check
    found = check.by_fold
    assert found["main", "bn1"] is check.folds[0]
    assert found["main/if.then_branch", "bn1"] is check.folds[2]
    assert found["main", HOSTILE] is found["main", "other"] is check.folds[3]
    assert len(found) == 4
    assert full().rows[0].key == ("main", "bn1")


def test_batch_norms_and_other_affines_are_told_apart():
    rows = full().rows
    assert full().batch_norms == (rows[0], rows[2], rows[3], rows[5])
    assert full().affines == (rows[1], rows[4])
    assert full().folds == (rows[0], rows[1], rows[5])
    assert full().left == rows[2:5]
    assert full().batch_norms_left == rows[2:4]
    assert full().aggressive_would == {"fold it": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "schema None, expected 2"),
        ('{"schema": 1}', "schema 1, expected 2"),
        ('{"schema": 2}', "lacks the key 'rows'"),
        (("rows", 0, "status", "lost"), "malformed: 'lost' is neither 'folded' nor 'left'"),
        (("rows", 0, "direction", "up"), "malformed: 'up' is none of backward, forward, merged"),
        (("rows", 0, "into", "conv1"), "malformed: 'conv1' is not a list"),
        (("rows", 0, "cost", "much"), "malformed: 'much' is not of type int"),
        (("rows", 0, "name", None), "malformed: None is not of type str"),
        (("rows", 2, "reason", "mood"), "malformed"),
        (("weights", 0, "before", 3), "malformed"),
        (("check", "outputs", None), "malformed"),
        (("rows", 0, 5), "malformed"),
    ],
)
def test_what_is_not_a_report_is_a_clear_error(text, message):
    if isinstance(text, tuple):
        values = full().to_dict()
        *path, key, changed = text
        at(values, path)[key] = changed
        text = json.dumps(values)
    with pytest.raises(ReportError, match=message) as caught:
        FoldReport.from_json(text)
    assert "\n" not in str(caught.value)


# What a fold puts into it


def small_net():
    """A Conv that takes a batch norm, then a Relu, after which another batch norm has to stay."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        bn_node("c", "n"),
        helper.make_node("Relu", ["n"], ["r"], name="relu"),
        bn_node("r", "m", "second_"),
        helper.make_node("Sigmoid", ["m"], ["y"], name="sigmoid"),
    ]
    second = {f"second_{name}": array for name, array in batch_norm(rng, 4).items()}
    constants = {"w": rng.normal(size=(4, 3, 1, 1)).astype(np.float32), **batch_norm(rng, 4), **second}
    return model(nodes, constants, [2, 3, 5, 5], [2, 4, 5, 5])


def checked(proto):
    result = fold_onnx(proto)
    weights = weight_ranges(ir.from_proto(proto), ir.from_proto(result.model))
    check = verify(proto, result.model, result.report, random_inputs(proto, 1))
    return replace(result.report, weights=weights, check=check)


def test_a_fold_says_what_went_where():
    row = fold_onnx(small_net()).report.rows[0]
    gamma, var = (onnx.numpy_helper.to_array(small_net().graph.initializer[n]).astype(float) for n in (1, 4))
    scale = np.abs(gamma) / np.sqrt(var + 1e-5)
    assert (row.name, row.op_type, row.output, row.graph) == ("bn_n", "BatchNormalization", "n", "main")
    assert (row.direction, row.into, row.route, row.outputs) == ("backward", ("conv",), ("Conv",), ("n",))
    assert row.scale_range == pytest.approx((scale.min(), scale.max()), rel=1e-6)


def test_neighbours_are_the_nodes_within_two_steps():
    graph = ir.from_proto(small_net()).graph
    found = neighbours(graph.node("relu"))
    assert [node.name for node in found] == ["relu", "bn_n", "bn_m", "conv", "sigmoid"]
    assert found[0] == Neighbour("relu", "Relu", ("n",), ("r",))
    assert found[1] == Neighbour("bn_n", "BatchNormalization", ("c",), ("n",))  # without its constants
    ends = neighbours(graph.node("sigmoid"), 1) + neighbours(graph.node("conv"), 1)
    assert Neighbour("y", GRAPH_OUTPUT, ("y",), ()) in ends
    assert Neighbour("x", GRAPH_INPUT, (), ("x",)) in ends


def test_neighbours_of_a_hub_are_limited_and_the_nearest_kept():
    nodes = [helper.make_node("Relu", ["x"], ["h"], name="hub"), helper.make_node("Neg", ["h"], ["n"], name="node")]
    nodes += [helper.make_node("Relu", ["h"], [f"h{i}"], name=f"user{i}") for i in range(40)]
    nodes.append(helper.make_node("Add", ["n", "h1"], ["y"], name="after"))
    found = neighbours(ir.from_proto(model(nodes, {}, [2, 4], [2, 4])).graph.node("node"))
    assert len(found) == MOST
    assert [node.name for node in found[:3]] == ["node", "hub", "after"]


def test_neighbours_show_what_a_subgraph_captures_and_which_domain_an_operator_is_of():
    inside = helper.make_graph([helper.make_node("Neg", ["r"], ["z"], name="inner")], "g", [], [value("z", [2, 4])])
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="relu"),
        helper.make_node("Odd", ["r"], ["o"], name="odd", domain="com.acme"),
        helper.make_node("If", ["cond"], ["y"], name="if", then_branch=inside, else_branch=inside),
    ]
    condition = helper.make_tensor_value_info("cond", onnx.TensorProto.BOOL, [])
    proto = model(nodes, {}, [2, 4], [2, 4], inputs=[condition])
    found = neighbours(ir.from_proto(proto).graph.node("relu"), 1)
    assert ("inner", "Neg") in [(node.name, node.op_type) for node in found]
    assert ("odd", "com.acme::Odd") in [(node.name, node.op_type) for node in found]


# Ranges of weights


def linear(op_type, weight, *, first=False, **attributes):
    """A model of one linear operator; its weight may be its first input."""
    inputs = ["w", "x"] if first else ["x", "w"]
    node = helper.make_node(op_type, inputs, ["y"], name="op", **attributes)
    return ir.from_proto(model([node], {"w": weight}, None, None, dtype="float32"))


WEIGHT = np.random.default_rng(1).normal(size=(6, 4, 3, 2)).astype(np.float32)
OUT_OF_GROUPS = [WEIGHT[group * 3 : group * 3 + 3, channel] for group in range(2) for channel in range(4)]


@pytest.mark.parametrize(
    ("op_type", "weight", "options", "channels"),
    [
        ("Conv", WEIGHT, {}, list(WEIGHT)),
        ("Conv", WEIGHT.astype(np.float16), {}, list(WEIGHT.astype(np.float16))),
        ("Conv", WEIGHT.astype(ml_dtypes.bfloat16), {}, list(WEIGHT.astype(ml_dtypes.bfloat16))),
        ("ConvTranspose", WEIGHT, {}, list(WEIGHT.swapaxes(0, 1))),
        ("ConvTranspose", WEIGHT, {"group": 2}, OUT_OF_GROUPS),
        ("Gemm", WEIGHT[0, 0], {}, list(WEIGHT[0, 0].T)),
        ("Gemm", WEIGHT[0, 0], {"transB": 1}, list(WEIGHT[0, 0])),
        ("Gemm", WEIGHT[0, 0], {"first": True}, list(WEIGHT[0, 0])),
        ("Gemm", WEIGHT[0, 0], {"first": True, "transA": 1}, list(WEIGHT[0, 0].T)),
        ("MatMul", WEIGHT, {}, list(np.moveaxis(WEIGHT, -1, 0))),
        ("MatMul", WEIGHT[0], {"first": True}, list(np.moveaxis(WEIGHT[0], -2, 0))),
    ],
)
def test_scales_are_those_of_output_channels(op_type, weight, options, channels, monkeypatch):
    scales = sorted(float(np.abs(channel).max()) for channel in channels)
    expected = Spread(float(np.abs(weight).min()), scales[0], float(np.median(scales)), scales[-1], len(scales), 0)
    graph = linear(op_type, weight, **options)
    assert weight_ranges(graph, graph) == (WeightRange("op", op_type, "main", expected, expected),)
    monkeypatch.setattr(ranges, "BLOCK", 5)  # less than a channel
    assert weight_ranges(graph, graph)[0].after == expected


def test_channels_of_zeros_are_counted_and_have_no_scale():
    weight = WEIGHT.copy()
    weight[[1, 4]] = 0
    weight[0, 0] = 0
    (found,) = weight_ranges(linear("Conv", weight), linear("Conv", np.zeros_like(weight)))
    alive = np.abs(weight[[0, 2, 3, 5]]).reshape(4, -1)
    assert (found.before.channels, found.before.zero_channels) == (6, 2)
    assert found.before.smallest_scale == pytest.approx(alive.max(axis=1).min())
    assert found.before.least_weight == pytest.approx(alive[alive > 0].min())
    assert found.before.bits == pytest.approx(np.log2(alive.max(axis=1).max() / alive.max(axis=1).min()))
    assert found.after == Spread(0.0, 0.0, 0.0, 0.0, 6, 6)
    assert math.isnan(found.after.bits)


def test_nodes_without_names_are_matched_by_their_order():
    proto = small_net()
    proto.graph.node[0].name = ""
    (found,) = weight_ranges(ir.from_proto(proto), ir.from_proto(fold_onnx(proto).model))
    assert found.before.channels == 4
    assert found.before != found.after


def test_nodes_are_matched_by_name_if_their_numbers_differ():
    nodes = [
        helper.make_node("MatMul", ["x", "v"], ["m"], name="first"),
        helper.make_node("MatMul", ["m", "w"], ["y"], name="second"),
    ]
    weights = {"v": WEIGHT[0, 0], "w": WEIGHT[0, 1].T.copy()}
    both = ir.from_proto(model(nodes, weights, [5, 3], [5, 3]))
    one = ir.from_proto(model([helper.make_node("MatMul", ["x", "w"], ["y"], name="second")], weights, [5, 2], [5, 3]))
    assert [found.node for found in weight_ranges(both, one)] == ["second"]
    assert weight_ranges(both, one)[0].before.channels == 3


def test_weights_that_are_not_constant_floats_are_left_out():
    node = helper.make_node("MatMul", ["x", "v"], ["y"])
    graph = ir.from_proto(model([node], {}, [2, 3], [2, 4], inputs=[value("v", [3, 4])]))
    assert weight_ranges(graph, graph) == ()
    integers = linear("MatMul", np.ones((3, 4), np.int64))
    assert weight_ranges(integers, integers) == ()


def test_a_weight_that_is_not_finite_is_told_as_it_is():
    weight = WEIGHT.copy()
    weight[2, 0, 0, 0] = np.nan
    graph = linear("Conv", weight)
    (found,) = weight_ranges(graph, graph)
    assert math.isnan(found.before.largest_scale)
    assert "not finite" in render_html(FoldReport((), weights=(found, WeightRange("b", "Conv", "main", BEFORE, AFTER))))


def test_measuring_copies_a_block_at_a_time():
    graphs = linear("Conv", WEIGHT), linear("Conv", WEIGHT)
    for graph in graphs:  # 64 MiB each, which reading a ModelProto would copy
        graph.graph.initializers["w"].const_value = ir.tensor(np.ones((64, 1024, 16, 16), np.float32), name="w")
    tracemalloc.start()
    try:
        weight_ranges(*graphs)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * 4 * ranges.BLOCK


# The axis


@pytest.mark.parametrize(
    ("smallest", "largest"),
    [(0.1, 0.1), (0.2, 0.5), (0.03, 40.0), (1e-9, 1e9), (5e-324, 1.7e308), (0.99999, 1.00001), (3e-5, 9e-5)],
)
def test_the_axis_holds_all_scales_and_has_ticks(smallest, largest):
    spread = Spread(smallest, smallest, smallest, largest, 2, 0)
    axis = LogAxis.around([WeightRange("a", "Conv", "main", spread, spread)])
    assert 0 <= axis.position(smallest) <= axis.position(largest) <= 1
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 13
    assert ticks == sorted(set(ticks))
    assert all(-1e-9 <= axis.position(tick) <= 1 + 1e-9 for tick in ticks)


def test_there_is_no_axis_for_nothing():
    nothing = Spread(0.0, 0.0, 0.0, 0.0, 3, 3)
    infinite = Spread(1.0, 1.0, math.nan, math.inf, 3, 0)
    assert LogAxis.around([WeightRange("a", "Conv", "main", nothing, infinite)]) is None


# Sketches


@st.composite
def graphs(draw):
    """Nodes that take from any before them: acyclic."""
    count = draw(st.integers(1, 14))
    takes = [draw(st.sets(st.integers(0, number - 1), max_size=3)) if number else set() for number in range(count)]
    return [Neighbour(f"n{i}", "Op", tuple(f"v{j}" for j in sorted(takes[i])), (f"v{i}",)) for i in range(count)]


@given(graphs())
def test_boxes_of_a_sketch_are_apart_and_edges_go_right(nodes):
    drawn = sketch(nodes)
    boxes = {box.node.name: box for box in drawn.boxes}
    assert [box.node for box in drawn.boxes] == nodes
    for number, box in enumerate(drawn.boxes):
        assert 0 <= box.x <= drawn.width - BOX_WIDTH
        assert 0 <= box.y <= drawn.height - BOX_HEIGHT
        for other in drawn.boxes[:number]:
            assert abs(box.x - other.x) >= BOX_WIDTH or abs(box.y - other.y) >= BOX_HEIGHT - 1e-6
    assert len(drawn.edges) == sum(len(node.inputs) for node in nodes)
    for edge in drawn.edges:
        start, *_, end = re.findall(r"-?[\d.]+ -?[\d.]+$|(?<=M)[\d.]+ [\d.]+", edge.path)
        assert float(start.split()[0]) == boxes[f"n{edge.value[1:]}"].x + BOX_WIDTH
        assert float(end.split()[0]) > float(start.split()[0])


def test_a_value_past_other_nodes_goes_around_their_boxes():
    chain = [Neighbour(f"n{i}", "Op", (f"v{i - 1}",), (f"v{i}",)) for i in range(1, 4)]
    nodes = [Neighbour("n0", "Op", (), ("v0",)), *chain, Neighbour("add", "Add", ("v3", "v0"), ())]
    drawn = sketch(nodes)
    (skip,) = [edge for edge in drawn.edges if edge.value == "v0" and "H" in edge.path]
    height = {float(y) for y in re.findall(r" ([\d.]+)H", skip.path)}
    for box in drawn.boxes[1:4]:
        assert all(not box.y <= y <= box.y + BOX_HEIGHT for y in height)


def test_a_cycle_is_drawn_somehow():
    nodes = [Neighbour(f"n{i}", "Op", (f"v{(i + 1) % 3}", f"v{i}"), (f"v{i}",)) for i in range(3)]
    assert len(sketch(nodes).edges) == 3
    assert sketch([]).boxes == ()


# The page


class Page(HTMLParser):
    """What is in a page, and whether all that is opened is closed in order."""

    VOID = ("meta", "input", "br", "img", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.scripts, self.rows = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), (tag, names)
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr" and "data-status" in names:
            self.rows.append("")

    def handle_startendtag(self, tag, attributes):
        assert "svg" in self.open, tag  # only there is a slash an end
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open[-1:] == ["script"] else self.texts).append(data)
        if self.rows and "tr" in self.open:
            self.rows[-1] += data

    def attributes(self, name):
        return [attributes[name] for _, attributes in self.tags if name in attributes]

    def count(self, tag, kind=None):
        return sum(t == tag and (kind is None or kind in a.get("class", "").split()) for t, a in self.tags)


@pytest.mark.parametrize("made", [full, lambda: FoldReport(()), lambda: checked(small_net())])
def test_the_page_is_whole_and_fetches_nothing(made):
    text = render_html(made())
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert [tag for tag, _ in page.tags if tag in ("script", "img", "link", "iframe", "object", "embed", "base")] == [
        "script"
    ]
    assert not page.attributes("src")
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert all(target[0] == "#" and target[1:] in ids for target in page.attributes("href"))
    assert not re.search(r"url\((?!#)|@import", text)
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "style"]


def test_the_pages_policy_allows_its_own_script_and_style_only():
    text = render_html(full())
    (policy,) = [a["content"] for _, a in Page(text).tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_the_page_shows_every_row_and_what_is_known_of_it():
    page = Page(render_html(full()))
    assert len(page.rows) == 6
    for row, part in zip(page.rows, ("conv1", "conv2, conv3", "it follows Relu", "graph-output", "Add"), strict=False):
        assert part in row
    assert "1.0e-06 / 1.0e-05" in page.rows[0]
    assert "adds 1 operator" in page.rows[1]
    assert UNLOCK[Reason.NO_LINEAR_PRODUCER] in page.rows[2]
    text = " ".join(" ".join(page.texts).split())
    for part in (
        "net.onnx", "123.5 MB", "ab" * 32, "cd" * 32, "2 of 4 batch norms folded", "1 of 2 other affine nodes",
        "2 × fold it", "Failed on 3 runs", "7 values changed", "3.0e-02 (tolerance)".replace("3.0", "1.0"), "4 ms",
        "−25%", "2 of 100 predictions changed", "optimiser moves the outputs of the original model",
        "differs by 7.0e-03, bound 1.0e-05.",
    ):  # fmt: skip
        assert part in text, part


def test_the_page_draws_ranges_and_what_stays():
    page = Page(render_html(full()))
    assert page.count("svg", "sketch") == 2  # of batch norms only
    assert page.count("rect", "before") == page.count("rect", "after") == 2  # not of the dead one
    (first, *_) = [attributes for tag, attributes in page.tags if tag == "rect" and attributes.get("class") == "after"]
    axis = LogAxis.around(full().weights)
    start, width = (float(first[name].rstrip("%")) for name in ("x", "width"))
    assert start == pytest.approx(100 * axis.position(AFTER.smallest_scale), abs=0.01)
    assert start + width == pytest.approx(100 * axis.position(AFTER.largest_scale), abs=0.02)


def test_a_hostile_name_stays_text():
    page = Page(render_html(full()))
    assert len(page.scripts) == 1
    assert "broken" not in page.scripts[0]
    shown = HOSTILE.replace("\n", "\ufffd").replace("\u202e", "\ufffd").replace("\x1b", "\ufffd")
    assert shown in page.rows[5]
    assert not set("\u202e\x1b") & set(render_html(full()))


def test_the_same_report_makes_the_same_page():
    assert render_html(full()) == render_html(FoldReport.from_json(full().to_json()))


def test_the_page_of_a_densenet_is_small():
    """121 layers, all batch norms left, each with as many neighbours as there may be, and long names."""
    name = "/features/denseblock{0}/denselayer{0}/norm1/BatchNormalization"
    around = [Neighbour(name.format(i), "Conv", (name.format(i - 1),), (name.format(i),)) for i in range(MOST)]
    rows = tuple(left(name.format(i), neighbours=tuple(around), detail=name.format(i) * 2) for i in range(121))
    weights = tuple(WeightRange(name.format(i), "Conv", "main", BEFORE, AFTER) for i in range(121))
    assert len(render_html(FoldReport(rows, weights)).encode()) < 1_500_000


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def dom(tmp_path, text, fragment=""):
    """What Chromium makes of a page."""
    page = tmp_path / "page.html"
    page.write_text(text, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    return subprocess.run(
        [CHROMIUM, *options, "--virtual-time-budget=2000", "--dump-dom", page.as_uri() + fragment],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip


def row_order(dump):
    return [number for number, _ in re.findall(r'<tr id="row-(\d)"([^>]*)>', dump)]


def rows_shown(dump):
    return [number for number, rest in re.findall(r'<tr id="row-(\d)"([^>]*)>', dump) if 'hidden=""' not in rest]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_address_filters_and_sorts_in_a_browser(tmp_path):
    dump = dom(tmp_path, render_html(full()), "#status=left&kind=bn&q=FOLLOWS%20relu&sort=-name")
    assert rows_shown(dump) == ["3"]
    assert row_order(dump)[:2] == ["5", "2"]  # shift, scale: by name, descending
    assert "1 of 6 rows" in dump
    assert 'aria-sort="descending"' in dump
    assert "<title>net.onnx: fold report</title>" in dump  # no name has run


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_what_is_typed_and_clicked_in_a_browser_goes_into_the_address(tmp_path):
    hand = """
      const search = document.querySelector("input");
      search.value = "conv";
      search.dispatchEvent(new Event("input", { bubbles: true }));
      const header = document.querySelector(".rows [data-key=scale] button");
      header.click();
      header.click();
      document.title = location.hash;
    """
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", render_html(full()))
    dump = dom(tmp_path, text.replace("</body>", f"<script>{hand}</script></body>"))
    assert "<title>#q=conv&amp;sort=-scale</title>" in dump
    assert rows_shown(dump) == ["1", "2"]
    assert row_order(dump)[-3:] == ["3", "4", "5"]  # which have no scale, and so come last in either order


# The picture


def test_the_picture_has_a_row_for_every_operator_and_is_reproducible():
    content = render_png(full())
    assert content == render_png(full())
    shown = matplotlib.image.imread(io.BytesIO(content))
    more = replace(full(), weights=full().weights * 3)
    taller = matplotlib.image.imread(io.BytesIO(render_png(more)))
    rows = (taller.shape[0] - shown.shape[0]) / (picture.ROW_INCHES * picture.DPI)
    assert rows == pytest.approx(4, abs=0.1)  # the dead operator has none
    for color in (picture.BEFORE_COLOR, picture.AFTER_COLOR):
        wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        assert np.isclose(shown[..., :3], wanted, atol=0.01).all(axis=-1).sum() > 500


def test_there_is_no_picture_of_nothing():
    with pytest.raises(ValueError, match="the report has no weights to draw"):
        render_png(FoldReport(()))


def test_a_name_without_glyphs_or_with_dollars_is_drawn():
    names = ("\u6df1\u5c64/\U0001f9ea", "$\\frac{", "a" * 300)
    render_png(FoldReport((), tuple(WeightRange(name, "Conv", "main", BEFORE, AFTER) for name in names)))


# The text


def printed(capsys, made, **options):
    terminal.print_report(made, **options)
    return capsys.readouterr().out


def test_text_lists_batch_norms_and_counts_the_others(capsys):
    text = printed(capsys, full())
    assert "2 of 4 batch norms folded, 2 left" in text
    assert "1 of 2 other affine nodes (Mul, Add, Sub, Div, Neg) folded, 1 left" in text
    assert "--aggressive would, 2 times: fold it" in text
    assert "--all" in text
    assert "conv2, conv3" not in text
    everything = printed(capsys, full(), everything=True)
    assert "scale (Mul)" in everything
    assert "conv2, conv3" in everything
    assert "Relu > Conv" in everything
    assert "shift (Add)" in everything
    assert "--all" not in everything


def test_text_of_a_large_model_is_short_and_names_what_failed(capsys):
    rows = (*(folded(f"bn{i}") for i in range(60)), folded("last", route=("Add", "Conv")))
    stays = tuple(left(f"left{i}", reason=Reason.GRAPH_OUTPUT, detail=f"it is output {i}") for i in range(30))
    check = replace(
        full().check,
        folds=(FoldCheck("a", "main", ("bn7",), 1.0, 0.1, False), FoldCheck("b", "main", ("bn8",), 0.1, 1.0, True)),
    )
    large = FoldReport(rows + stays, check=check)
    text = printed(capsys, large)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "60 backward Conv bn0" in lines
    assert "1 backward Add < Conv last" in lines
    assert any(line.startswith("bn7 conv1 Conv 1.0e+00 1.0e-01") for line in lines)
    assert not any(line.startswith("bn8") for line in lines)
    assert any(line.startswith("30 graph-output left0") for line in lines)
    assert len(lines) < 20
    assert len(printed(capsys, large, everything=True).splitlines()) > 90


def test_text_says_the_same_of_several_once(capsys):
    alike = FoldReport((left("a"), left("b"), left("c", detail="it follows Sigmoid"), left("d")))
    lines = [" ".join(line.split()) for line in printed(capsys, alike).splitlines()]
    assert any(line.startswith("a and 2 more no-linear-producer it follows Relu") for line in lines)
    assert any(line.startswith("c no-linear-producer it follows Sigmoid") for line in lines)
    everything = printed(capsys, alike, everything=True)
    assert all(f"\n{name} " in everything for name in "abcd")


def test_text_shows_a_failed_fold_that_is_no_batch_norm(capsys):
    check = replace(full().check, folds=(FoldCheck("a", "main", ("scale",), 1.0, 0.1, False),))
    assert "scale (Mul)" in printed(capsys, replace(full(), check=check))


def test_text_names_a_difference_that_no_fold_explains(capsys):
    assert "differs by 7.0e-03, bound 1.0e-05" in " ".join(printed(capsys, full()).split())


def test_text_has_no_control_characters(capsys):
    text = printed(capsys, full(), everything=True)
    assert "<script>" in text
    assert not set("\u202e\x1b") & set(text)


def test_text_says_that_there_is_nothing_to_fold(capsys):
    assert "nothing to fold" in printed(capsys, FoldReport(()))


def test_every_direction_has_an_arrow():
    (direction,) = [field.type for field in fields(Fold) if field.name == "direction"]
    assert direction == "Direction"
    assert set(terminal.ARROWS) == set(report.Direction.__args__)
