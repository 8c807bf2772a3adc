"""What is around a batch norm in a forward pass, and may be computed with it: a sum and an activation behind it, a
concatenation before it.

A graph of torch.fx is the record of one forward pass; `fuse` edits it. How it was traced is told in `forwards`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn import functional as F

# By exact class: a subclass may compute something else.
MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", F.relu_: "relu", torch.relu_: "relu",
    F.relu6: "relu6",
    F.leaky_relu: "leaky_relu", F.leaky_relu_: "leaky_relu",
    F.silu: "silu",
    F.hardswish: "hardswish",
}  # fmt: skip
_METHODS = {"relu": "relu", "relu_": "relu"}
_FUNCTIONS_IN_PLACE = (operator.iadd, F.relu_, torch.relu_, F.leaky_relu_)
_METHODS_IN_PLACE = ("relu_", "add_")

# Their results are new memory, which nobody keeps for a backward pass.
_FRESH_MODULES = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear
)  # fmt: skip
CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)

# Slopes that the inverse of the activation can divide by without losing what backward needs.
_INVERTIBLE_SLOPE = 1e-3


@dataclass(frozen=True)
class Fusion:
    """One call of a batch norm, and what is computed with it.

    Attributes
    ----------
    norm : str
        The norm's path below the module whose forward pass it is.
    adds : bool
        Whether something is added before the activation.
    activation : None or str
    negative_slope : float
    overwrites : bool
        Whether the result takes its input's memory.
    concatenates : bool
        Whether its input is a concatenation, which is not made.
    modules : tuple of str
        The paths of all modules that take part: a hook on any of them would see something else.
    """

    norm: str
    adds: bool = False
    activation: str | None = None
    negative_slope: float = 0.01
    overwrites: bool = False
    concatenates: bool = False
    modules: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = ["concatenation"] * self.concatenates + ["sum"] * self.adds
        parts += [str(self.activation)] * (self.activation is not None)
        return " + ".join(parts) + (" in place" if self.overwrites else "")


class Refused(Exception):
    """A sum or an activation stays where it is; the message says why."""


@dataclass
class _Chain:
    """A norm's node and those of what follows it."""

    norm: Node
    addition: Node | None = None
    residual: Node | None = None
    activation: Node | None = None
    concatenation: Node | None = None

    @property
    def nodes(self) -> list[Node]:
        return [node for node in (self.norm, self.addition, self.activation) if node is not None]


def fuse(
    graph: Graph,
    modules: Mapping[str, nn.Module],
    is_norm: Callable[[nn.Module], bool],
    *,
    overwrite: bool = False,
    concatenate: bool = False,
) -> tuple[list[Fusion], dict[str, str]]:
    """Put sums, activations and concatenations into the calls of the batch norms that they surround.

    Parameters
    ----------
    graph : torch.fx.Graph
        Edited in place. A norm is called as ``norm(x, residual, activation=..., negative_slope=...)`` then.
    modules : mapping from paths to modules
        Those that the graph calls.
    is_norm : function of a module
        Whether it is a norm that can be called so.
    overwrite : bool
        Whether norms may write their results over their inputs, where nobody else sees those; they are called with
        ``overwrite=True`` then.
    concatenate : bool
        Whether norms of a concatenation along axis 1, which nobody else sees, may be called with a tuple of what it
        concatenates instead.

    Returns
    -------
    fusions : list of Fusion
    refusals : dict from a norm's path to a reason
        Only for what could have been fused by its kind.
    """
    reader = _Reader(graph, modules)
    fusions: list[Fusion] = []
    refused: dict[Node, str] = {}
    for node in list(graph.nodes):
        if node.op != "call_module" or not is_norm(modules[str(node.target)]):
            continue
        try:
            chain = reader.chain(node)
        except Refused as refusal:
            refused[node] = str(refusal)
            chain = _Chain(node)
        overwrites = overwrite and reader.may_overwrite(chain)
        if concatenate and not overwrites:
            chain.concatenation = reader.concatenation(chain)
        if overwrites or chain.concatenation is not None or len(chain.nodes) > 1:
            fusions.append(reader.rewrite(chain, overwrites))
    # A sum of two norms that one of them could not take may have gone to the other.
    left = {node: reason for node, reason in refused.items() if any(map(reader.is_epilogue, node.users))}
    return fusions, {str(node.target): reason for node, reason in left.items()}


class _Reader:
    """A graph, and what its nodes do."""

    def __init__(self, graph: Graph, modules: Mapping[str, nn.Module]) -> None:
        self.graph = graph
        self.modules = modules
        self.position = {node: i for i, node in enumerate(graph.nodes)}

    # ---- single nodes

    def module(self, node: Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def activation(self, node: Node) -> str | None:
        """The name of the activation that a node is, if it is one."""
        module = self.module(node)
        if module is not None:
            return MODULES.get(type(module))
        if node.op == "call_function":
            return _FUNCTIONS.get(node.target)
        return _METHODS.get(str(node.target)) if node.op == "call_method" else None

    def negative_slope(self, node: Node) -> Any:
        module = self.module(node)
        if module is not None:
            return getattr(module, "negative_slope", 0.01)
        if self.activation(node) != "leaky_relu":
            return 0.01
        return node.kwargs.get("negative_slope", node.args[1] if len(node.args) > 1 else 0.01)

    def is_sum(self, node: Node) -> bool:
        if node.op == "call_function":
            return node.target in (operator.add, operator.iadd, torch.add)
        return node.op == "call_method" and node.target in ("add", "add_")

    def writes_to(self, node: Node) -> Any:
        """What a sum or an activation overwrites with its result."""
        target = node.args[0] if node.args else node.kwargs.get("input")
        module = self.module(node)
        if module is not None:
            return target if getattr(module, "inplace", False) else None
        if node.kwargs.get("inplace") or node.target in (*_FUNCTIONS_IN_PLACE, *_METHODS_IN_PLACE):
            return target
        if node.op == "call_function" and self.activation(node) is not None:  # F.relu(x, True)
            last = 2 if self.activation(node) == "leaky_relu" else 1
            return target if len(node.args) > last and node.args[last] is True else None
        return None

    def is_epilogue(self, node: Node) -> bool:
        return self.is_sum(node) or self.activation(node) is not None

    def is_fresh(self, node: Any) -> bool:
        """Whether a node's result is memory of its own, that nobody but its users sees."""
        if not isinstance(node, Node):
            return False
        if node.op == "call_module":
            module = self.module(node)
            return module is not None and type(module) in _FRESH_MODULES and not has_hooks(module)
        return node.op == "call_function" and node.target in CONCATENATIONS

    # ---- what follows a norm

    def chain(self, norm: Node) -> _Chain:
        """The norm with the sum and the activation that can be computed with it."""
        if len(norm.args) != 1 or norm.kwargs:
            raise Refused("it is called with other arguments than its input")
        self.require_no_hooks(norm)
        chain = _Chain(norm)
        follower = self.follower(norm)
        if follower is not None and self.is_sum(follower):
            chain.residual = self.residual(norm, follower)
            self.require_movable(norm, follower)
            chain.addition = follower
            follower = self.follower(follower)
        if follower is not None and self.activation(follower) is not None:
            self.require_no_hooks(follower)
            if not isinstance(self.negative_slope(follower), (int, float)):
                raise Refused("the slope of the activation is computed")
            chain.activation = follower
        return chain

    def follower(self, node: Node) -> Node | None:
        """The sum or activation that is the only one to see a node's value."""
        users = sorted(node.users, key=self.position.__getitem__)
        if not any(map(self.is_epilogue, users)):
            return None
        # What comes after an operation in place sees its result.
        if len(users) > 1 and self.writes_to(users[0]) is not node:
            raise Refused(f"its output is used {len(users)} times")
        return users[0]

    def residual(self, value: Node, addition: Node) -> Node:
        operands = list(addition.args[:2])
        for name in ("input", "other"):
            if name in addition.kwargs:
                operands.append(addition.kwargs[name])
        alpha = addition.kwargs.get("alpha", 1)
        if isinstance(alpha, Node) or alpha != 1:
            raise Refused(f"what is added is multiplied, by alpha={alpha}")
        if addition.kwargs.keys() - {"input", "other", "alpha"} or len(operands) != 2 or len(addition.args) > 2:
            raise Refused("the sum has other arguments than its summands")
        first, second = operands
        if first is second:
            raise Refused("it is added to itself")
        residual = second if first is value else first
        if not isinstance(residual, Node):
            raise Refused(f"a constant is added, {residual!r}")
        if self.writes_to(addition) is residual:
            raise Refused("the sum overwrites what the norm is added to, which others may see")
        return residual

    def require_movable(self, norm: Node, addition: Node) -> None:
        """The norm is to be computed where the sum is: nothing in between may change its input, or call it."""
        between = self.calls_between(norm, addition)
        source = norm.args[0]
        assert isinstance(source, Node)
        if between and not (self.is_fresh(source) and len(source.users) == 1):
            raise Refused("its input is used elsewhere before the sum")
        layer = self.module(norm)
        for node in between:
            module = self.module(node)
            if module is not None and any(part is layer for part in module.modules()):
                raise Refused("it is called again before the sum")

    def calls_between(self, first: Node, last: Node) -> list[Node]:
        inside = (n for n in self.graph.nodes if self.position[first] < self.position[n] < self.position[last])
        return [node for node in inside if node.op.startswith("call_")]

    def require_no_hooks(self, node: Node) -> None:
        module = self.module(node)
        if module is not None and has_hooks(module):
            raise Refused(f"{node.target} has hooks, or another forward than its class")

    def may_overwrite(self, chain: _Chain) -> bool:
        source = chain.norm.args[0]
        if (
            not isinstance(source, Node)
            or not self.is_fresh(source)
            or len(source.users) > 1
            or chain.addition is not None
        ):
            return False
        if chain.activation is None:
            return True
        name, slope = self.activation(chain.activation), self.negative_slope(chain.activation)
        return name == "leaky_relu" and slope >= _INVERTIBLE_SLOPE

    def concatenation(self, chain: _Chain) -> Node | None:
        """The concatenation right before a norm, if the norm can read its pieces instead."""
        norm = chain.norm
        source = norm.args[0] if len(norm.args) == 1 and not norm.kwargs else None
        if not isinstance(source, Node) or source.op != "call_function" or source.target not in CONCATENATIONS:
            return None
        pieces = self.pieces(source)
        has_hook = has_hooks(self.modules[str(norm.target)])
        if not pieces or len(source.users) > 1 or chain.addition is not None or has_hook:
            return None
        # A concatenation is a copy, which no change of a piece reaches, be it before the norm or before its gradient.
        is_changed = any(self.writes_to(node) is piece for node in self.graph.nodes for piece in pieces)
        return None if is_changed or self.calls_between(source, norm) else source

    def pieces(self, concatenation: Node) -> tuple[Node, ...]:
        """What is concatenated along axis 1; nothing if it is not known, or along another axis."""
        arguments = dict(zip(("tensors", "dim"), concatenation.args, strict=False)) | concatenation.kwargs
        pieces = arguments.pop("tensors", None)
        if arguments != {"dim": 1} or not isinstance(pieces, (list, tuple)):
            return ()
        return tuple(pieces) if all(isinstance(piece, Node) for piece in pieces) else ()

    def rewrite(self, chain: _Chain, overwrites: bool) -> Fusion:
        """Replace a chain's nodes by one call of the norm."""
        norm, addition, activation = chain.norm, chain.addition, chain.activation
        concatenation = chain.concatenation
        name = None if activation is None else self.activation(activation)
        slope = 0.01 if activation is None else float(self.negative_slope(activation))
        kwargs: dict[str, Any] = {"activation": name, "negative_slope": slope}
        if overwrites:
            kwargs["overwrite"] = True
        parts = [*chain.nodes, norm.args[0]] if overwrites else chain.nodes
        modules = tuple(str(node.target) for node in parts if isinstance(node, Node) and node.op == "call_module")
        at = addition or norm
        source = norm.args[0] if concatenation is None else self.pieces(concatenation)
        with self.graph.inserting_before(at):
            call = self.graph.call_module(str(norm.target), (source, chain.residual), kwargs)
        self.position[call] = self.position[at]
        for node in reversed(chain.nodes):
            node.replace_all_uses_with(call)
            self.graph.erase_node(node)
        if concatenation is not None:
            self.graph.erase_node(concatenation)
        return Fusion(
            norm=str(norm.target),
            adds=addition is not None,
            activation=name,
            negative_slope=slope,
            overwrites=overwrites,
            concatenates=concatenation is not None,
            modules=modules,
        )


def has_hooks(module: nn.Module) -> bool:
    """Whether something watches a module's calls, or has replaced its forward."""
    return "forward" in vars(module) or bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
