"""Batch norms put into a trained network that leave what it computes as it was: the reverse of folding.

With ``weight = sqrt(var + eps)`` and ``bias = mean`` a batch norm is the identity, whatever mean and variance are. With
those of the data, it is also what training would have made of it: the same network in other coordinates, to be trained
on with batch norm (Ioffe and Szegedy, "Batch Normalization", 2015, section 3, on the identity).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pybn import _arrays
from pybn._arrays import Array
from pybn._merge import Moments
from pybn.population import Observe, Partition, Population, Progress, is_torch_module, populate


def insert(
    model: Any,
    data: Iterable[Any] | None = None,
    *,
    after: Collection[str] | None = None,
    eps: float = 1e-5,
    forward: Callable[[Any], Any] | None = None,
    partitions: Sequence[Partition] | None = None,
    client: Any = None,
    state: str | os.PathLike[str] | None = None,
    save_every: int = 100,
    progress: Progress | None = None,
) -> Population:
    """Put a batch norm after linear operators of a trained network, without changing its outputs.

    Parameters
    ----------
    model : a torch module, a path to an ONNX model, or an onnx.ModelProto
        A module is changed in place: each of its convolutions and linear layers becomes a ``Sequential(linear,
        batch norm)``, which changes names in its state dict. ONNX models are returned anew.
    data : iterable
        Batches, as for `pybn.reestimate`: the statistics of what leaves the operators are the batch norms' running
        statistics, in evaluation.
    after : collection of str, optional
        Names of the operators (or, without a name, of their outputs; of a torch module the submodules). By default all
        convolutions, transposed convolutions and linear layers, but for those with a batch norm already, and those
        whose output is an output of the whole ONNX model.
    eps : float
        Of the batch norms.
    forward, partitions, client, state, save_every, progress
        As for `pybn.reestimate`.

    Returns
    -------
    Population
        Its `left` says where no batch norm was put, and why.

    Raises
    ------
    TypeError, ValueError
        As `pybn.reestimate`; also a name in `after` after which no batch norm can be put. The model is as it was then.
    """
    if isinstance(after, str):
        raise TypeError(f"after is a string, expected a collection of them: ({after!r},)")
    subject: Any
    if is_torch_module(model):
        from pybn.torch.insertion import Linears

        subject = Linears(model, forward, after, eps)
    else:
        if forward is not None:
            raise TypeError("forward is given with an ONNX model, which says itself how it runs")
        subject = OnnxLinears(model, after, eps)
    if not subject.names:
        raise ValueError("model has no operator after which a batch norm can be put")
    return populate(subject, data, partitions, client, state, save_every, progress)


def require_all(after: Collection[str] | None, names: Collection[str], left: Mapping[str, str]) -> None:
    """Raise ValueError if a batch norm was asked for where none can be."""
    for name in after or ():
        if name not in names:
            raise ValueError(f"after has {name!r}: {left.get(name, 'there is no linear operator of that name')}")


LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class OnnxLinears:
    """The linear operators of an ONNX model's main graph, as a `pybn.population.Subject`.

    Nothing that a batch norm put here normalizes depends on it, so the model runs as it is, with more outputs.
    """

    def __init__(self, model: Any, after: Collection[str] | None, eps: float, folder: Path | None = None) -> None:
        import onnx

        from pybn.folding import files

        if isinstance(model, onnx.ModelProto):
            files.validate(model, folder)
            self.proto, self.folder = model, folder
        elif isinstance(model, (str, os.PathLike)):
            loaded = files.load(model)
            self.proto, self.folder = loaded.proto, loaded.outside
        else:
            raise TypeError(
                f"model is a {type(model).__name__}, expected a torch module, a path, or an onnx.ModelProto"
            )
        self.eps = float(np.float32(_arrays.positive("eps", eps)))  # as ONNX stores it
        self.outputs: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self._find(after)
        require_all(after, self.outputs, self.left)
        self.names = list(self.outputs)
        self.optional: Collection[str] = ()

    def _find(self, after: Collection[str] | None) -> None:
        from pybn.folding import files
        from pybn.folding.graph import Facts, display_name, standard_type

        model = files.to_ir(self.proto, self.folder)
        facts = Facts(model)
        for node in model.graph:
            if standard_type(node, model) not in LINEAR:
                continue
            name, output = display_name(node), node.outputs[0]
            users = [use.node for use in output.uses()]
            rank = facts.rank(output)
            wanted = after is None or name in after
            if not wanted:
                continue
            if facts.opset(node) < 9:
                self.left[name] = f"opset {facts.opset(node)} has another batch norm, expected 9 or later"
            elif not facts.is_float(output):
                self.left[name] = "the type of its output is not known to be a float"
            elif node.op_type == "MatMul" and (rank != 2 or facts.constant(node.inputs[1]) is None):
                self.left[name] = "its channels are not axis 1, or it has no constant weight"
            elif any(standard_type(user, model) == "BatchNormalization" for user in users):
                self.left[name] = "it has a batch norm already"
            elif after is None and output.is_graph_output():
                self.left[name] = "its output is an output of the model; name it to have a batch norm there"
            else:
                assert output.name is not None
                self.outputs[name] = output.name

    @contextlib.contextmanager
    def running(self, observe: Observe) -> Iterator[Callable[[Mapping[str, Array]], None]]:
        """See `pybn.population.Subject`."""
        import onnx

        from pybn.folding.runtime import Session

        model = onnx.ModelProto()
        model.CopyFrom(self.proto)
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.outputs.values())
        session = Session(model, "the model", folder=self.folder)

        def run(feeds: Mapping[str, Array]) -> None:
            for name, values in zip(self.outputs, session.run(feeds), strict=True):
                observe(name, values, 1)

        yield run

    def fingerprint(self) -> str:
        """See `pybn.population.Subject`."""
        return hashlib.sha256(self.proto.SerializeToString(deterministic=True)).hexdigest()

    def finish(self, statistics: Mapping[str, Moments]) -> Any:
        """A copy of the model with the batch norms."""
        import onnx

        from pybn.folding import files
        from pybn.folding.affine import round_to
        from pybn.folding.graph import Facts
        from pybn.stages import add_initializer, unused_name

        model = files.to_ir(self.proto, self.folder)
        facts = Facts(model)
        dtypes = {value.name: facts.dtype(value) for node in model.graph for value in node.outputs}
        result = onnx.ModelProto()
        result.CopyFrom(self.proto)
        by_output = {output: name for name, output in self.outputs.items()}
        nodes: list[Any] = []
        for node in result.graph.node:
            nodes.append(node)
            output = node.output[0] if node.output else ""
            if output not in by_output:
                continue
            name, dtype = by_output[output], dtypes[output]
            assert dtype is not None
            found = statistics[name]
            mean = round_to(found.mean, dtype, f"the mean after {name!r}")
            var = round_to(found.var, dtype, f"the variance after {name!r}")
            # Of the rounded variance, so that only one rounding keeps the map from being the identity.
            weight = round_to(np.sqrt(var.astype(np.float64) + self.eps), dtype, f"the deviation after {name!r}")
            node.output[0] = unused_name(result, f"{output}.linear")
            inputs = [node.output[0]]
            for what, array in (("weight", weight), ("bias", mean), ("running_mean", mean), ("running_var", var)):
                inputs.append(unused_name(result, f"{name}.batch_norm.{what}"))
                add_initializer(result, inputs[-1], array)
            label = unused_name(result, f"{name}.batch_norm")
            nodes.append(onnx.helper.make_node("BatchNormalization", inputs, [output], name=label, epsilon=self.eps))
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del result.graph.node[:]
        result.graph.node.extend(copies)
        files.validate(result, self.folder)
        return result
