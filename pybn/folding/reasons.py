"""Why a batch norm is left alone: one code per reason, and what would unlock each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Reason(str, Enum):
    """Code of a refusal. The values are part of the JSON report and never change."""

    # The batch norm itself
    TRAINING_MODE = "training-mode"
    EXTRA_OUTPUTS = "extra-outputs"
    OLD_OPSET = "old-opset"
    SPATIAL_ZERO = "spatial-zero"
    ATTRIBUTE_NOT_CONSTANT = "attribute-not-constant"
    # Its parameters
    PARAMETER_NOT_CONSTANT = "parameter-not-constant"
    PARAMETER_OVERRIDABLE = "parameter-overridable"
    PARAMETER_SHAPE = "parameter-shape"
    INVALID_VARIANCE = "invalid-variance"
    NOT_FINITE = "not-finite"
    # The way to an operator that could absorb it
    NO_LINEAR_PRODUCER = "no-linear-producer"
    FOREIGN_DOMAIN = "foreign-domain"
    GRAPH_OUTPUT = "graph-output"
    OTHER_CONSUMER = "other-consumer"
    NO_LINEAR_CONSUMER = "no-linear-consumer"
    MEETS_ITSELF = "meets-itself"
    TOO_FAR = "too-far"
    TOO_LARGE = "too-large"
    NEGATIVE_SCALE = "negative-scale"
    SHIFT_STAYS = "shift-stays"
    PADDING = "padding"
    SUBGRAPH_CAPTURE = "subgraph-capture"
    DROPOUT_TRAINING = "dropout-training"
    CHANNEL_AXIS = "channel-axis"
    CHANNEL_AXIS_UNPROVEN = "channel-axis-unproven"
    AMBIGUOUS_BROADCAST = "ambiguous-broadcast"
    # The operator's weights
    WEIGHT_NOT_CONSTANT = "weight-not-constant"
    WEIGHT_OVERRIDABLE = "weight-overridable"
    UNSUPPORTED_DTYPE = "unsupported-dtype"
    TYPE_MISMATCH = "type-mismatch"
    OUTSIDE_DTYPE = "outside-dtype"
    QUANTIZATION = "quantization"
    NARROWER_TYPE = "narrower-type"
    # Modules of a framework
    BATCH_STATISTICS = "batch-statistics"
    NO_VALUES = "no-values"
    HOOKS = "hooks"
    PARAMETRIZED = "parametrized"
    OVERRIDDEN = "overridden"
    NOT_CALLED = "not-called"
    UNTRACED = "untraced"
    SHARED_MODULE = "shared-module"
    WEIGHT_READ = "weight-read"
    # What the caller asked for
    SKIPPED = "skipped"
    NO_GAIN = "no-gain"


# Those that only `pybn.torch.fold` gives.
OF_MODULES = frozenset(
    {
        Reason.BATCH_STATISTICS,
        Reason.NO_VALUES,
        Reason.HOOKS,
        Reason.PARAMETRIZED,
        Reason.OVERRIDDEN,
        Reason.NOT_CALLED,
        Reason.UNTRACED,
        Reason.SHARED_MODULE,
        Reason.WEIGHT_READ,
    }
)

UNLOCK: dict[Reason, str] = {
    Reason.TRAINING_MODE: "export the model in evaluation mode",
    Reason.EXTRA_OUTPUTS: "export the model in evaluation mode, where Y is the only output",
    Reason.OLD_OPSET: "convert the model to opset 7 or newer",
    Reason.SPATIAL_ZERO: "export with spatial=1, or convert the model to opset 9 or newer",
    Reason.ATTRIBUTE_NOT_CONSTANT: "inline the local function, so that the attribute has a value",
    Reason.PARAMETER_NOT_CONSTANT: "export the parameters as initializers or constants",
    Reason.PARAMETER_OVERRIDABLE: "remove the parameters from the graph inputs",
    Reason.PARAMETER_SHAPE: "give every parameter one value per output channel",
    Reason.INVALID_VARIANCE: "repair the running variance, or raise epsilon",
    Reason.NOT_FINITE: "repair the parameters or weights that are NaN, infinite or too large",
    Reason.NO_LINEAR_PRODUCER: "only an operator with a folding rule can absorb a batch norm",
    Reason.FOREIGN_DOMAIN: "only operators of the standard ONNX domain have folding rules",
    Reason.GRAPH_OUTPUT: "remove that value from the graph outputs",
    Reason.OTHER_CONSUMER: "give the other consumer its own copy of the operator",
    Reason.NO_LINEAR_CONSUMER: "only an operator with a folding rule can absorb a map before it",
    Reason.MEETS_ITSELF: "the branches that meet would have to scale alike; only a change of the network would help",
    Reason.TOO_FAR: "put the operators that are to be joined closer together",
    Reason.TOO_LARGE: "declare the sizes that the data really has, or feed smaller pieces",
    Reason.NEGATIVE_SCALE: "only positive scales pass this operator; see what --aggressive would do",
    Reason.SHIFT_STAYS: "only a scale passes this operator, and the shift would remain; see --aggressive",
    Reason.PADDING: "pad with the value that zero had before, or not at all; see what --aggressive would do",
    Reason.SUBGRAPH_CAPTURE: "keep the operator, the batch norm and all uses in one graph",
    Reason.DROPOUT_TRAINING: "export the model in evaluation mode",
    Reason.CHANNEL_AXIS: "the channels of the batch norm must be the operator's output features",
    Reason.CHANNEL_AXIS_UNPROVEN: "add shape information (onnx.shape_inference)",
    Reason.AMBIGUOUS_BROADCAST: "give the constant one value per channel, and 1 in all other axes",
    Reason.WEIGHT_NOT_CONSTANT: "export the weights as initializers or constants",
    Reason.WEIGHT_OVERRIDABLE: "remove the weights from the graph inputs",
    Reason.UNSUPPORTED_DTYPE: "store the values as float16, bfloat16, float32 or float64",
    Reason.TYPE_MISMATCH: "correct the declared types",
    Reason.OUTSIDE_DTYPE: "store the weights in a type with a larger range",
    Reason.QUANTIZATION: "quantize the folded model instead",
    Reason.NARROWER_TYPE: "compute in the wider type from the start",
    Reason.BATCH_STATISTICS: "train the norm with track_running_stats=True",
    Reason.NO_VALUES: "run the model once, so that lazy layers are built, on a device that holds values",
    Reason.HOOKS: "remove the hooks, and add them after folding if they are still needed",
    Reason.PARAMETRIZED: "make it permanent: torch.nn.utils.parametrize.remove_parametrizations, "
    "remove_weight_norm, remove_spectral_norm or prune.remove",
    Reason.OVERRIDDEN: "use the class of torch.nn, or fold before its behaviour is changed",
    Reason.NOT_CALLED: "the forward of the model does not call it",
    Reason.UNTRACED: "pass example_inputs, so that a run shows what flows",
    Reason.SHARED_MODULE: "give each use a module of its own (copy.deepcopy)",
    Reason.WEIGHT_READ: "give the other use a parameter of its own",
    Reason.SKIPPED: "leave it out of --skip, or name it in --only",
    Reason.NO_GAIN: "use --aggressive, which also makes rewrites that save no work",
}


@dataclass(frozen=True)
class Refusal:
    """A batch norm stays: the code, and a sentence on what was found."""

    reason: Reason
    detail: str


class FoldError(ValueError):
    """The fold cannot be exact, or its result cannot be represented.

    Attributes
    ----------
    reason : Reason
        The code of the refusal.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
