"""How a map passes the operators of a traced network, and which layers absorb it.

As in `pybn.folding.steps`: **backward**, a value is to become ``affine(value)``, which its producer makes or asks of
its own inputs; **forward**, a value that was ``affine(x)`` is to become ``x``, and its users make up for that. A rule
answers with the `Step` that it takes, or raises `FoldError`, which is a refusal. To teach pybn another operator, write
its rule and add it to `BACKWARD` or `FORWARD`, under the name of its module's class and of its function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import fx, nn

from pybn.folding.affine import Affine
from pybn.folding.reasons import FoldError, Reason
from pybn.torch.fold_trace import METADATA, torch_class


@dataclass(frozen=True)
class Carried:
    """A map on its way.

    Attributes
    ----------
    affine : Affine
        The map; its `axis` counts from the front of the data.
    rank : int or None
        How many axes the data has. None: those of the norm, which takes two or three.
    flat : bool
        All axes but the first are, or will be, flattened into the channels, in their order. Backward, a producer of as
        many channels then has nothing else in the other axes; forward, every channel stands for a row of features.
    """

    affine: Affine
    rank: int | None
    flat: bool = False

    def of_rank(self, rank: int) -> Carried:
        """Return the map on data of that many axes.

        Raises
        ------
        FoldError
            If it is known to have another number.
        """
        if self.rank not in (None, rank):
            raise FoldError(Reason.CHANNEL_AXIS, f"the data has {self.rank} axes, not {rank}")
        return replace(self, rank=rank)


@dataclass(frozen=True)
class Step:
    """What a rule does with a map: a layer absorbs it, or inputs (backward) or outputs (forward) carry it on.

    Attributes
    ----------
    absorbed : Carried or None
        What the module of this node absorbs.
    inputs : tuple of (fx.Node, Carried)
        Backward: what is asked of which input.
    output : Carried or None
        Forward: what is left to the users of this node.
    """

    absorbed: Carried | None = None
    inputs: tuple[tuple[fx.Node, Carried], ...] = ()
    output: Carried | None = None


Rule: TypeAlias = Callable[[fx.Node, Carried], Step]
# Checks that a map passes an operator, and returns it as it is on the other side.
Passage: TypeAlias = Callable[[fx.Node, Carried], Carried]

CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
TRANSPOSED = ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
NORMS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "InPlaceABN")


def operator_name(node: fx.Node) -> str:
    """Return the name of a torch module's class, or of a function or method."""
    if node.op == "call_module":
        known = torch_class(node.meta["module"])
        if known is None or not known.__module__.startswith(("torch.nn.modules.", "pybn.torch.")):
            return ""  # such as quantized layers, which have names of others
        return known.__name__
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", ""))
    return str(node.target) if node.op == "call_method" else ""


def describe(node: fx.Node) -> str:
    """Say what a node is, for a refusal."""
    if node.op == "call_module":
        module = node.meta["module"]
        opaque = "" if torch_class(module) is not None else ", whose inside is another graph"
        return f"{type(module).__name__}{opaque}"
    return {"placeholder": "an input", "get_attr": "a parameter", "output": "the output"}.get(
        node.op, f"{operator_name(node)}()"
    )


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument of a call, given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def data_input(node: fx.Node) -> fx.Node:
    """Return the first argument of a call: the data."""
    value = argument(node, 0, "input")
    if not isinstance(value, fx.Node):
        raise FoldError(Reason.NO_LINEAR_PRODUCER, f"it follows {describe(node)}, whose input is not one tensor")
    return value


def data_users(node: fx.Node) -> list[fx.Node]:
    """Return the calls that use the values of a node, and not only its shape or type."""
    return [user for user in node.users if not _asks_metadata(user)]


def _asks_metadata(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in METADATA
    return node.op == "call_function" and node.target is getattr and node.args[1] in METADATA


def known_rank(node: fx.Node) -> int | None:
    """Return how many axes the data of a node has, where its producer leaves no doubt."""
    name = operator_name(node)
    if name in ("BatchNorm2d", "BatchNorm3d"):
        return int(name[-2]) + 2
    if name in ("view", "reshape"):
        return len(_dimensions(node, 1)) or None
    if name == "permute":
        return len(_dimensions(node, 1)) or None
    if _flattens(node, name):
        return 2
    if name in SAME_SHAPE or name == "Linear":
        value = argument(node, 0, "input")
        return known_rank(value) if isinstance(value, fx.Node) else None
    return None


# Layers that absorb


def _absorb_conv(node: fx.Node, carried: Carried) -> Step:
    carried = carried.of_rank(len(node.meta["module"].kernel_size) + 2)
    _require_axis(carried, 1)
    return Step(absorbed=carried)


def _absorb_linear(node: fx.Node, carried: Carried) -> Step:
    """Linear: its features are the last axis, that of the channels only for ``(N, C)`` or after a transpose."""
    carried = carried.of_rank(2) if carried.rank is None else carried
    assert carried.rank is not None
    _require_axis(carried, carried.rank - 1)
    return Step(absorbed=carried)


def _absorb_norm(node: fx.Node, carried: Carried) -> Step:
    """Another batch norm before: its weight and bias."""
    module = node.meta["module"]
    if getattr(module, "activation", None) is not None or len(node.all_input_nodes) != 1:
        raise FoldError(Reason.NO_LINEAR_PRODUCER, f"it follows {describe(node)} with an activation or a residual")
    _require_axis(carried, 1)
    return Step(absorbed=carried)


def _require_axis(carried: Carried, axis: int) -> None:
    if carried.affine.axis != axis:
        raise FoldError(
            Reason.CHANNEL_AXIS,
            f"the channels of the norm are axis {carried.affine.axis}, the features of the layer axis {axis}",
        )


# Operators that a map passes


def _unchanged(node: fx.Node, carried: Carried) -> Carried:
    return carried


def _dropout(node: fx.Node, carried: Carried) -> Carried:
    """Dropout is the identity in evaluation mode."""
    if node.op == "call_module":
        training = node.meta["module"].training
    elif operator_name(node) == "dropout" and node.target is not nn.functional.dropout:
        training = argument(node, 2, "train", True)
    else:
        training = argument(node, 2, "training", True)
    if training is not False:
        raise FoldError(Reason.DROPOUT_TRAINING, "Dropout is, or may be, in training mode")
    return carried


def _relu(node: fx.Node, carried: Carried) -> Carried:
    """ReLU and its leaky kin: ``a f(x) = f(a x)`` for ``a >= 0``."""
    if not carried.affine.keeps_zero:
        raise FoldError(Reason.SHIFT_STAYS, f"a shift does not pass {describe(node)}")
    return _positive(node, carried)


def _positive(node: fx.Node, carried: Carried) -> Carried:
    negative = int((carried.affine.scale < 0).sum())
    if negative:
        raise FoldError(
            Reason.NEGATIVE_SCALE,
            f"{describe(node)} passes positive scales only, and {negative} of {carried.affine.scale.size} are negative",
        )
    return carried


def _max_pool(node: fx.Node, carried: Carried) -> Carried:
    """Maxima over space: ``a max(x) + b = max(a x + b)`` for ``a >= 0``."""
    if _setting(node, 6, "return_indices", default=False) is not False:
        raise FoldError(Reason.OTHER_CONSUMER, f"the indices of {describe(node)} are used")
    return _positive(node, _over_space(node, carried))


def _adaptive_max_pool(node: fx.Node, carried: Carried) -> Carried:
    if _setting(node, 2, "return_indices", default=False) is not False:
        raise FoldError(Reason.OTHER_CONSUMER, f"the indices of {describe(node)} are used")
    return _positive(node, _over_space(node, carried))


def _average_pool(node: fx.Node, carried: Carried) -> Carried:
    """Averages over space: every map passes, but a shift does not reach zeros that are counted."""
    padding = _setting(node, 3, "padding", default=0)
    padded = bool(padding) and (isinstance(padding, int) or any(padding))
    counted = padded and _setting(node, 5, "count_include_pad", default=True) is not False
    divisor = None if "1d" in operator_name(node).lower() else _setting(node, 6, "divisor_override", default=None)
    if not carried.affine.keeps_zero and (counted or divisor is not None):
        raise FoldError(
            Reason.PADDING, f"{describe(node)} is not a mean near the borders, which a shift would not survive"
        )
    return _over_space(node, carried)


def _over_space(node: fx.Node, carried: Carried) -> Carried:
    """Refuse data whose channels are among the axes that a pooling is over."""
    digits = [int(letter) for letter in operator_name(node) if letter.isdigit()]
    if digits:
        carried = carried.of_rank(digits[0] + 2)
    elif carried.rank is None:
        carried = carried.of_rank(3)
    _require_axis(carried, 1)
    return carried


def _setting(node: fx.Node, position: int, name: str, *, default: Any) -> Any:
    """Return an attribute of a module, or an argument of the function of the same name."""
    if node.op == "call_module":
        return getattr(node.meta["module"], name, default)
    return argument(node, position, name, default)


def _transposed(node: fx.Node, carried: Carried, *, backward: bool) -> Carried:
    """Transpose and permute: the axis of the channels moves."""
    if carried.flat:
        raise FoldError(Reason.CHANNEL_AXIS_UNPROVEN, f"{describe(node)} moves axes that are not known")
    if operator_name(node) == "permute":
        order = list(_dimensions(node, 1))
        if not order or not all(isinstance(axis, int) for axis in order):
            raise FoldError(Reason.CHANNEL_AXIS_UNPROVEN, "the axes of permute() are not constant")
        carried = carried.of_rank(len(order))
        order = [axis % len(order) for axis in order]
    else:
        # A batch norm has no more than three axes if it may have two; transposing these would move the batch.
        carried = carried.of_rank(3) if carried.rank is None else carried
        assert carried.rank is not None
        first, second = argument(node, 1, "dim0"), argument(node, 2, "dim1")
        if not isinstance(first, int) or not isinstance(second, int):
            raise FoldError(Reason.CHANNEL_AXIS_UNPROVEN, "the axes of transpose() are not constant")
        order = list(range(carried.rank))
        first, second = first % carried.rank, second % carried.rank
        order[first], order[second] = second, first
    axis = carried.affine.axis
    assert axis is not None
    return replace(carried, affine=carried.affine.along(order[axis] if backward else order.index(axis)))


def _flattens(node: fx.Node, name: str) -> bool:
    """Say whether a call keeps the first axis and flattens all others."""
    if name == "Flatten":
        module = node.meta["module"]
        return (module.start_dim, module.end_dim) == (1, -1)
    if name == "flatten":
        return (argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1)) == (1, -1)
    if name in ("view", "reshape"):
        dimensions, value = _dimensions(node, 1), node.args[0]
        if "shape" in node.meta and isinstance(value, fx.Node):  # of the run, which is all that it is to hold for
            before, after = value.meta["shape"], node.meta["shape"]
            return len(after) == 2 and bool(after[0] == before[0])
        return len(dimensions) == 2 and _is_batch_size(dimensions[0], value)
    return False


def _is_batch_size(value: Any, of: Any) -> bool:
    """Say whether a value is the length of the first axis of a tensor: ``x.size(0)``, ``x.shape[0]``."""
    if not isinstance(value, fx.Node):
        return False
    name = operator_name(value)
    if name == "size":
        return bool(value.args == (of, 0))
    if name == "getitem" and value.args[1] == 0 and isinstance(value.args[0], fx.Node):
        shape = value.args[0]
        return shape.args in ((of, "shape"), (of,)) and operator_name(shape) in ("getattr", "size")
    return False


def _dimensions(node: fx.Node, position: int) -> tuple[Any, ...]:
    """Return what ``view(a, b)``, ``view((a, b))`` or ``permute(a, b)`` is given."""
    given = node.args[position:]
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        return tuple(given[0])
    return tuple(given)


# Activations and the like, which leave the shape as it is. Only the first three let more than a scale pass.
PASSES: dict[str, Passage] = {
    "Identity": _unchanged, "contiguous": _unchanged, "FoldedBatchNorm": _unchanged,
    **dict.fromkeys(("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "dropout"), _dropout),
    **dict.fromkeys(("ReLU", "LeakyReLU", "PReLU", "relu", "relu_", "leaky_relu"), _relu),
    **dict.fromkeys(("MaxPool1d", "MaxPool2d", "MaxPool3d"), _max_pool),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), _max_pool),
    **dict.fromkeys(("boolean_dispatch", "_max_pool1d", "_max_pool2d", "_max_pool3d"), _max_pool),
    **dict.fromkeys(("AdaptiveMaxPool1d", "AdaptiveMaxPool2d", "AdaptiveMaxPool3d"), _adaptive_max_pool),
    **dict.fromkeys(("AvgPool1d", "AvgPool2d", "AvgPool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"), _average_pool),
    **dict.fromkeys(("AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d"), _over_space),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"), _over_space),
    **dict.fromkeys(("Upsample", "UpsamplingNearest2d", "UpsamplingBilinear2d", "interpolate"), _over_space),
}  # fmt: skip

SAME_SHAPE = frozenset({
    "Identity", "FoldedBatchNorm", "contiguous", "Dropout", "AlphaDropout", "dropout", "ReLU", "LeakyReLU",
    "PReLU", "ReLU6", "SiLU", "GELU", "Hardswish", "Sigmoid", "Tanh", "ELU", "relu", "relu_", "leaky_relu",
    "silu", "gelu", "sigmoid", "tanh", "BatchNorm1d",
})  # fmt: skip


def _backward(passage: Passage) -> Rule:
    def rule(node: fx.Node, carried: Carried) -> Step:
        return Step(inputs=((data_input(node), passage(node, carried)),))

    return rule


def _forward(passage: Passage) -> Rule:
    def rule(node: fx.Node, carried: Carried) -> Step:
        return Step(output=passage(node, carried))

    return rule


# Operators that differ by direction


def _flatten_backward(node: fx.Node, carried: Carried) -> Step:
    if not _flattens(node, operator_name(node)):
        raise FoldError(Reason.CHANNEL_AXIS_UNPROVEN, f"{describe(node)} may mix the channels with other axes")
    if not carried.flat:
        carried = carried.of_rank(2)
        _require_axis(carried, 1)
    # As many features as the producer has channels: then nothing else was flattened into them.
    return Step(inputs=((data_input(node), replace(carried, rank=None, flat=True)),))


def _flatten_forward(node: fx.Node, carried: Carried) -> Step:
    if not _flattens(node, operator_name(node)):
        raise FoldError(Reason.CHANNEL_AXIS_UNPROVEN, f"{describe(node)} may mix the channels with other axes")
    if not carried.flat:
        _require_axis(carried, 1)
    return Step(output=replace(carried, rank=2, flat=True))


def _transpose_backward(node: fx.Node, carried: Carried) -> Step:
    return Step(inputs=((data_input(node), _transposed(node, carried, backward=True)),))


def _transpose_forward(node: fx.Node, carried: Carried) -> Step:
    return Step(output=_transposed(node, carried, backward=False))


def _add_backward(node: fx.Node, carried: Carried) -> Step:
    """Add of two computed values: the scale goes to both, the shift to one."""
    first, second = argument(node, 0, "input"), argument(node, 1, "other")
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or argument(node, 2, "alpha", 1) != 1:
        raise FoldError(Reason.NO_LINEAR_PRODUCER, f"it follows {describe(node)} with a constant")
    if first is second:
        raise FoldError(Reason.MEETS_ITSELF, "it follows the sum of a value with itself")
    if carried.flat:
        raise FoldError(Reason.CHANNEL_AXIS_UNPROVEN, f"{describe(node)} broadcasts axes that are not known")
    return Step(inputs=((first, carried), (second, replace(carried, affine=carried.affine.only_scale()))))


BACKWARD: dict[str, Rule] = {
    **{name: _backward(passage) for name, passage in PASSES.items()},
    **dict.fromkeys(CONVOLUTIONS + TRANSPOSED, _absorb_conv),
    "Linear": _absorb_linear,
    **dict.fromkeys(NORMS, _absorb_norm),
    **dict.fromkeys(("Flatten", "flatten", "view", "reshape"), _flatten_backward),
    **dict.fromkeys(("transpose", "permute"), _transpose_backward),
    **dict.fromkeys(("add", "iadd", "add_", "__add__", "__iadd__"), _add_backward),
}

# A norm after another is folded backward, into it.
FORWARD: dict[str, Rule] = {
    **{name: _forward(passage) for name, passage in PASSES.items()},
    **dict.fromkeys(CONVOLUTIONS + TRANSPOSED, _absorb_conv),
    "Linear": _absorb_linear,
    **dict.fromkeys(("Flatten", "flatten", "view", "reshape"), _flatten_forward),
    **dict.fromkeys(("transpose", "permute"), _transpose_forward),
}

# What returns its input's memory, or may.
VIEWS = frozenset({
    "Identity", "FoldedBatchNorm", "contiguous", "view", "reshape", "flatten", "Flatten", "transpose", "permute",
    "squeeze", "unsqueeze", "getitem", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout",
    "dropout", "chunk", "split",
})  # fmt: skip

# What never changes its input in place, whatever its options.
PURE = frozenset({
    *CONVOLUTIONS, *TRANSPOSED, "Linear", *NORMS,
    "add", "sub", "mul", "truediv", "matmul", "cat", "linear", "conv1d", "conv2d", "conv3d", "sigmoid", "tanh",
    "softmax", "mean", "sum", "MaxPool1d", "MaxPool2d", "MaxPool3d", "AvgPool1d", "AvgPool2d", "AvgPool3d",
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d", "AdaptiveMaxPool2d", "Upsample",
})  # fmt: skip

# What does so only if asked to.
MAYBE_IN_PLACE = frozenset(["ReLU", "ReLU6", "SiLU", "Hardswish", "relu", "relu6", "silu", "hardswish"])


def is_view(node: fx.Node) -> bool:
    """Say whether the output of a node may be memory of its input."""
    return operator_name(node) in VIEWS


def leaves_input_alone(node: fx.Node) -> bool:
    """Say whether a call is known not to change its input in place, and not to return it."""
    name = operator_name(node)
    return name in PURE or (name in MAYBE_IN_PLACE and _setting(node, 1, "inplace", default=False) is False)
