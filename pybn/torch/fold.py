"""`fold`: the batch norms of a network in evaluation mode absorbed by its layers. `unfold`: the network as it was.

`fold_trace` finds out what flows, `fold_rules` what passes a map on, `fold_walk` where it ends, `fold_layers` what that
does to weights; the algebra is that of `pybn.folding`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from pybn.folding.affine import Affine
from pybn.folding.reasons import FoldError, Reason
from pybn.torch import memory
from pybn.torch.accelerate import accelerate, restore
from pybn.torch.fold_layers import Direction, Weights, absorb, affine_of, read, require_plain, write
from pybn.torch.fold_leftovers import fuse_activations
from pybn.torch.fold_modules import FoldedBatchNorm, FoldedEpilogue, activation_module
from pybn.torch.fold_report import Folded, FoldReport, Left, Row
from pybn.torch.fold_rules import NORMS
from pybn.torch.fold_trace import Trace, copied, has_global_hooks, torch_class, trace
from pybn.torch.fold_walk import Plan, plan

# Where a folded network keeps what it was: plain values, so that nothing is needed to load it.
RECORD = "_pybn_before_fold"
# Of "modules", the norms by their names; of "parameters", the weight and bias of layers by the layers' names.
Record: TypeAlias = dict[str, dict[str, Any]]


class FoldResult(NamedTuple):
    """A folded network and the report on every batch norm of the original."""

    model: nn.Module
    report: FoldReport


def fold(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | torch.Tensor | None = None,
    *,
    skip: Collection[str] = (),
    accelerated: bool = True,
    reversible: bool = True,
    reuse_memory: bool = False,
) -> FoldResult:
    """Remove the batch norms of a network in evaluation mode, exactly.

    A batch norm that uses its running statistics is an affine map per channel. Convolutions (1-d to 3-d, transposed,
    grouped), Linear layers and other batch norms before it absorb it, also through pooling, dropout, upsampling,
    flattening and sums; if none does, convolutions that do not pad with zeros and Linear layers after it. The
    arithmetic is float64, with one rounding to the type of the weights (Jacob et al. 2018, section 3.2).

    What flows is found out by symbolic traces (`torch.fx`) of the network, or of those parts of it that can be traced;
    such a part is taken to be used by calling it. What cannot be folded exactly stays, with a reason in the report: it
    is never an error.

    Parameters
    ----------
    model : torch.nn.Module
        Left untouched. Call its ``eval()`` before.
    example_inputs : tuple or torch.Tensor, optional
        Arguments of the forward. The network is run on them once; this shows what flows where it cannot be traced,
        which then holds for all inputs that take the same path.
    skip : collection of str
        Names of batch norms that are not to be folded, or of layers that are not to absorb one.
    accelerated : bool
        Let pybn's layers compute the batch norms that stay, together with the sums and activations behind them and the
        concatenations before them, as `pybn.torch.accelerate` does with ``concatenations=True``. Leave it out for a
        result of torch's own layers.
    reversible : bool
        Keep the original parameters and batch norms, so that `unfold` can restore them. They are in the attribute
        ``_pybn_before_fold`` of the result, which copies and pickles carry and state dicts do not.
    reuse_memory : bool
        Whether the process keeps the memory that it frees, which networks of large tensors gain most from: see
        `pybn.torch.reuse_memory`. It concerns the whole process and `unfold` does not end it, so it is not the default.

    Returns
    -------
    FoldResult
        ``model``: a copy, of the same classes, whose batch norms are `torch.nn.Identity`. ``report``: a row for every
        batch norm, folded into what, or left and why.

    Raises
    ------
    RuntimeError
        If memory cannot be kept, because the C library is not glibc.
    TypeError
        If an argument is of the wrong type, or the model has been scripted.
    ValueError
        If `skip` has a name that no module has.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, expected a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is a ScriptModule, expected the module that it was made from: fold before scripting")
    if isinstance(skip, str):
        raise TypeError(f"skip is a string, expected a collection of them: ({skip!r},)")
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    if example_inputs is not None and not isinstance(example_inputs, tuple):
        raise TypeError(f"example_inputs is {type(example_inputs).__name__}, expected a tuple of arguments or a tensor")
    result = restore(copied(model))
    names = {name for name, _ in result.named_modules(remove_duplicate=False)}
    for name in skip:
        if name not in names:
            raise ValueError(f"skip names {name!r}, but the model has no such module")
    if reuse_memory:
        memory.reuse_memory()
    folder = _Folder(result, example_inputs, {result.get_submodule(name) for name in skip})
    report = folder.run()
    earlier = vars(result).pop(RECORD, None)
    if accelerated:
        report = folder.accelerate(report)
    if reversible and (report.folds or folder.before()["modules"] or earlier is not None):
        vars(result)[RECORD] = _joined(earlier, folder.before())
    return FoldResult(result, replace(report, reuses_memory=reuse_memory))


def unfold(model: nn.Module) -> nn.Module:
    """Return a folded network as it was before: the same modules, the same bits in every parameter.

    What `fold` did not change is as it is in `model` now.

    Parameters
    ----------
    model : torch.nn.Module
        What `fold` returned, or a copy of it. Left untouched.

    Returns
    -------
    torch.nn.Module
        A copy.

    Raises
    ------
    ValueError
        If it has not been folded, or not reversibly.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, expected a torch.nn.Module")
    if RECORD not in vars(model):
        raise ValueError("model has no record of a fold, expected what pybn.torch.fold returns with reversible=True")
    result = restore(copied(model))
    record = vars(result).pop(RECORD)
    for path, original in record["modules"].items():
        _become(result.get_submodule(path), original)
    for path, parameters in record["parameters"].items():
        for name, parameter in parameters.items():
            result.get_submodule(path).register_parameter(name, parameter)
    return result


@dataclass
class _Outcome:
    """What has become of a norm so far."""

    plan: Plan | None = None
    error: FoldError | None = None


class _Folder:
    """Folds a network in place."""

    def __init__(self, model: nn.Module, example_inputs: tuple[Any, ...] | None, kept: Collection[nn.Module]) -> None:
        self.model = model
        self._kept = kept
        self._names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
        self._norms = [module for module in self._names if isinstance(module, _BatchNorm)]
        self._outcomes = {norm: _Outcome() for norm in self._norms}
        self._trace = trace(model, example_inputs) if self._norms else Trace()
        self._weights: dict[nn.Module, Weights] = {}
        self._before: Record = {"modules": {}, "parameters": {}}

    def run(self) -> FoldReport:
        """Fold all norms that can be folded, and report on all."""
        # Layers first: one that merged into a norm would keep that norm where it is.
        for merges in (False, True):
            while self._pass(merges=merges):
                pass
        rows = tuple(self._row(norm) for norm in self._norms)
        self._commit()
        return FoldReport(rows)

    def before(self) -> Record:
        """Return what the network was, where that has changed."""
        return self._before

    def accelerate(self, report: FoldReport) -> FoldReport:
        """Give the norms that stay to pybn, with what follows them, and add to the report what that did."""
        left = [norm for norm in self._norms if self._outcomes[norm].plan is None]
        if not left:
            return report
        fuse_activations([norm for norm in left if norm not in self._kept], self._trace, self._exchange)
        fused = {
            row.name: ", ".join(dict.fromkeys(row.fused))
            for row in accelerate(self.model, inplace=True, concatenations=True)[1].replaced
        }
        fused |= {
            self._names[norm]: getattr(norm, "activation", None) or fused.get(self._names[norm], "") for norm in left
        }
        return FoldReport(
            tuple(replace(row, fused=fused[row.name] or None) if isinstance(row, Left) else row for row in report.rows)
        )

    def _exchange(self, module: nn.Module, other: nn.Module) -> None:
        """Turn a module into another, and keep what it was."""
        self._before["modules"].setdefault(self._names[module], copy.copy(module))
        _become(module, other)

    def _pass(self, *, merges: bool) -> bool:
        folded = False
        for norm in self._norms:
            if self._outcomes[norm].plan is None:
                folded = self._fold(norm, merges=merges) or folded
        return folded

    def _fold(self, norm: _BatchNorm, *, merges: bool) -> bool:
        """Fold one norm, or note why not: the reason of the way back, if there is one."""
        outcome = self._outcomes[norm]
        outcome.error = None
        directions: tuple[Direction, ...] = ("backward", "forward")
        for direction in directions:
            try:
                affine = self._map(norm)
                gone = [other for other in self._norms if self._outcomes[other].plan is not None]
                found = plan(norm, affine, self._trace, direction, gone=gone, kept=self._kept, merges=merges)
                absorbed = {
                    module: absorb(module, direction, carried, self._weights.get(module) or read(module))
                    for module, carried in found.absorbed.items()
                }
            except FoldError as error:
                first: FoldError | None = outcome.error
                nowhere = (Reason.NO_LINEAR_CONSUMER, Reason.GRAPH_OUTPUT, Reason.NO_LINEAR_PRODUCER)
                if first is None or (first.reason is Reason.NO_LINEAR_PRODUCER and error.reason not in nowhere):
                    outcome.error = error
                continue
            self._weights |= absorbed
            outcome.plan = found
            return True
        return False

    def _map(self, norm: _BatchNorm) -> Affine:
        """Return the map that a norm is, if it may go."""
        name = self._names[norm]
        if norm in self._kept:
            raise FoldError(Reason.SKIPPED, f"{name} was not to be folded")
        if has_global_hooks():
            raise FoldError(Reason.HOOKS, "hooks on all modules would see other values")
        if any(is_lazy(tensor) for tensor in (*norm.parameters(), *norm.buffers())):
            raise FoldError(Reason.NO_VALUES, "it is not built yet")
        known = torch_class(norm)
        if known is None or known.__name__ not in NORMS:
            raise FoldError(Reason.OVERRIDDEN, f"{type(norm).__name__} is not, or not only, a batch norm of torch.nn")
        require_plain(norm)
        if norm in self._weights:  # another norm has merged into it
            raise FoldError(Reason.NO_LINEAR_PRODUCER, "it has absorbed another norm")
        affine = affine_of(norm)
        if norm in self._trace.blind:
            raise FoldError(Reason.UNTRACED, self._trace.blind[norm])
        if not self._trace.calls[norm]:
            raise FoldError(Reason.NOT_CALLED, "it is never called, or only by untraced code")
        if any(id(tensor) in self._trace.read for tensor in (*norm.parameters(), *norm.buffers())):
            raise FoldError(Reason.WEIGHT_READ, "other code uses its parameters or statistics")
        return affine

    def _commit(self) -> None:
        """Put everything in its place."""
        for module, weights in self._weights.items():
            self._before["parameters"][self._names[module]] = {"weight": module.weight, "bias": module.bias}
            write(module, weights)
        for norm, outcome in self._outcomes.items():
            if outcome.plan is not None:
                self._exchange(norm, self._replacement(norm, outcome.plan))

    def _replacement(self, norm: _BatchNorm, found: Plan) -> nn.Module:
        activation = getattr(norm, "activation", None)
        residual = any(len(call.all_input_nodes) > 1 for call in self._trace.calls[norm])
        replacement: nn.Module = nn.Identity() if found.rank is None else FoldedBatchNorm(found.rank)
        if activation is not None or residual:
            inner = activation_module(activation, getattr(norm, "negative_slope", 0.01))
            replacement = FoldedEpilogue(inner, replacement)
        return replacement.eval()

    def _row(self, norm: _BatchNorm) -> Row:
        outcome = self._outcomes[norm]
        name, kind = self._names[norm], type(norm).__name__
        if outcome.plan is None:
            assert outcome.error is not None
            return Left(name, kind, outcome.error.reason, str(outcome.error))
        run = any(module in self._trace.by_run for module in (norm, *outcome.plan.absorbed))
        proof: Literal["trace", "run"] = "run" if run else "trace"
        into = tuple(self._names[module] for module in outcome.plan.absorbed)
        direction = outcome.plan.direction if into else "nowhere"
        return Folded(name, kind, direction, into, tuple(outcome.plan.route), proof, outcome.plan.rank)


def _joined(earlier: Record | None, later: Record) -> Record:
    """Return what goes back over two folds: what the earlier one found comes first."""
    return later if earlier is None else {kind: {**later[kind], **earlier[kind]} for kind in later}


def _become(module: nn.Module, other: nn.Module) -> None:
    """Turn a module into another, wherever it is referred to: in lists, under several names."""
    module.__class__ = type(other)
    vars(module).clear()
    vars(module).update(vars(other))
