"""Batch norms that stay, made to compute the activation behind them in the same pass.

`pybn.torch.accelerate` gives forwards another body, at some cost per call. In evaluation mode, and where the activation
is a module that nothing else calls, it is enough to exchange modules: the norm for one with an activation, the
activation for an identity. Norms of concatenations are left to `accelerate`, which saves making the concatenation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import fx, nn

from pybn.folding.reasons import FoldError
from pybn.torch.epilogues import CONCATENATIONS, MODULES
from pybn.torch.fold_layers import require_plain
from pybn.torch.fold_rules import data_users
from pybn.torch.fold_trace import Trace, has_hooks
from pybn.torch.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d

LAYERS = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d}


def fuse_activations(
    norms: Collection[nn.Module], trace: Trace, exchange: Callable[[nn.Module, nn.Module], None]
) -> None:
    """Fuse the norms that are left with the activations behind them, where exchanging modules is enough.

    Parameters
    ----------
    norms : collection of Module
        The norms that stay.
    trace : Trace
        What flows in the network.
    exchange : callable
        Turns its first argument into its second.
    """
    fusable = {norm: calls for norm in norms if (calls := _activations_behind(norm, trace)) is not None}
    while True:
        fused = {call for calls in fusable.values() for call in calls}
        lonely = {
            norm for norm, calls in fusable.items() if any(not set(trace.calls[_module(c)]) <= fused for c in calls)
        }
        if not lonely:
            break
        fusable = {norm: calls for norm, calls in fusable.items() if norm not in lonely}
    activations: dict[nn.Module, nn.Module] = {}
    for norm, calls in fusable.items():
        kind, slope = _kind(_module(calls[0]))
        exchange(norm, LAYERS[type(norm)].from_torch(norm, kind, slope))  # type: ignore[index, arg-type]
        activations |= {_module(call): nn.Identity() for call in calls}
    for activation, identity in activations.items():
        exchange(activation, identity.train(activation.training))


def _activations_behind(norm: nn.Module, trace: Trace) -> list[fx.Node] | None:
    """Return the calls of activations, all of one kind, that alone use the outputs of a norm, or None."""
    unsure = {*trace.blind, *trace.by_run}
    if type(norm) not in LAYERS or norm.training or norm in unsure or not trace.calls[norm]:
        return None
    try:
        require_plain(norm)
    except FoldError:
        return None
    if any(tensor.device.type != "cpu" for tensor in (*norm.parameters(), *norm.buffers())):
        return None
    behind = []
    for call in trace.calls[norm]:
        if any(node.target in CONCATENATIONS and len(node.users) == 1 for node in call.all_input_nodes):
            return None
        users = data_users(call)
        if len(users) != 1 or users[0].op != "call_module" or users[0].args != (call,) or users[0].kwargs:
            return None
        module = _module(users[0])
        if type(module) not in MODULES or module in unsure or has_hooks(module) or "forward" in vars(module):
            return None
        behind.append(users[0])
    return behind if len({_kind(_module(call)) for call in behind}) == 1 else None


def _kind(activation: nn.Module) -> tuple[str, float]:
    slope = getattr(activation, "negative_slope", 0.01)
    assert isinstance(slope, float)
    return MODULES[type(activation)], slope


def _module(call: fx.Node) -> nn.Module:
    module: nn.Module = call.meta["module"]
    return module
