"""A module's forward pass with its batch norms fused, for the calls that it is right for.

A forward pass is Python: what it does may depend on arguments, on attributes, on the mode. `FusedForward` stands
before a module's own forward. For every new kind of call it traces that forward (torch.fx; calls of other modules are
single nodes), fuses, and compiles the result; a call of a known kind runs it; and where a trace would not be the whole
truth, the module's own forward runs, which is always right. The module keeps its class, its parameters and its parts.
"""

from __future__ import annotations

import copy
import operator
import pickle
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.utils import _pytree as pytree

from pybn.torch.epilogues import Fusion, fuse, has_hooks

# Whoever is called in ever new ways would spend more on tracing than fusing gains.
_MOST_VARIANTS = 32


class Untraceable(Exception):
    """A forward pass that a trace cannot stand for; the message says why."""


# ---- tracing


class _TypedProxy(Proxy):
    """A Proxy that answers what type it is with the truth, or not at all.

    torch.fx's own says that it is no Tensor, so `if isinstance(x, Tensor)` would take the wrong branch.
    """

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        asker = sys._getframe(1).f_globals.get("__name__", "")
        if asker == __name__ or asker.split(".")[0] == "torch":
            return _TypedProxy
        if self.node.op == "placeholder":
            return Tensor
        raise Untraceable("its forward pass asks for the type of a value that it has computed")


def _recorded_in_place(function: Callable[[Any, Any], Any]) -> Callable[[Proxy, Any], Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


# torch.fx records `x += y` as if it were `x = x + y`, but whoever else holds x sees the sum.
for _name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    setattr(_TypedProxy, f"__i{_name}__", _recorded_in_place(getattr(operator, f"i{_name}")))


class _Tracer(Tracer):
    """Records a module's own forward pass with given arguments, of which the tensors stand for any tensor."""

    proxy_buffer_attributes = True

    def __init__(self, leaves: list[Any], spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.leaves, self.spec = leaves, spec
        self.thread = threading.get_ident()
        self.proxies: list[weakref.ref[Proxy]] = []

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        forward = type(self.root).forward
        names = (f"x{i}" for i, leaf in enumerate(self.leaves) if _is_tensor(leaf))
        tensors = [self.create_proxy("placeholder", name, (), {}) for name in names]

        def call(root: nn.Module, *tensors: Any) -> Any:
            remaining = iter(tensors)
            leaves = [next(remaining) if _is_tensor(leaf) else leaf for leaf in self.leaves]
            args, kwargs = pytree.tree_unflatten(leaves, self.spec)
            return forward(root, *args, **kwargs)

        return call, [self.root, *tensors]

    def proxy(self, node: Node) -> Proxy:
        proxy = _TypedProxy(node, self)
        self.proxies.append(weakref.ref(proxy))
        return proxy

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    # Tracing patches all modules of the process; what other threads do with theirs is none of its business.

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


_one_at_a_time = threading.RLock()


def trace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Graph:
    """The graph of a module's own forward pass with such arguments, in the present modes.

    Tensors among the arguments stand for any tensor, everything else for itself. The module and the random number
    generators are left as they were.

    Raises
    ------
    Untraceable
        If another such pass could do something else, or does something that a graph has no place for.
    """
    tracer = _Tracer(*pytree.tree_flatten((args, kwargs)))
    with _one_at_a_time, _unchanged(module):
        try:
            graph = tracer.trace(module)
        except Untraceable:
            raise
        except Exception as error:  # whatever the module's code does with a proxy
            raise Untraceable(f"its forward pass cannot be traced: {_first_line(error)}") from None
    if any(proxy() is not None for proxy in tracer.proxies):
        raise Untraceable("its forward pass keeps a value for later")
    return graph


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Undo what a pass changes, and refuse one that changes anything: a compiled graph would not."""
    parts = [(part, _snapshot(part)) for part in module.modules()]
    generators = _generators()
    changed: list[str] = []
    try:
        yield
    finally:
        for part, snapshot in parts:
            names = _differences(part, snapshot)
            if names:
                changed += names
                _restore(part, snapshot)
        drew = not _same_generators(generators, _generators())
        torch.set_rng_state(generators[0])
        random.setstate(generators[1])
        np.random.set_state(generators[2])
    if changed:
        made = changed[0].startswith("_tensor_constant")
        raise Untraceable(
            "its forward pass makes a tensor" if made else f"its forward pass changes the attribute {changed[0]!r}"
        )
    if drew:
        raise Untraceable("its forward pass draws random numbers")


_Generators = tuple[Tensor, Any, dict[str, Any]]


def _generators() -> _Generators:
    return torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)


def _same_generators(a: _Generators, b: _Generators) -> bool:
    return torch.equal(a[0], b[0]) and a[1] == b[1] and pickle.dumps(a[2]) == pickle.dumps(b[2])


# What each attribute was, and what was in it if it holds other things.
_Snapshot = dict[str, tuple[Any, Any]]


def _snapshot(part: nn.Module) -> _Snapshot:
    return {name: (value, copy.copy(value) if _is_container(value) else None) for name, value in vars(part).items()}


def _differences(part: nn.Module, snapshot: _Snapshot) -> list[str]:
    now = vars(part)
    return list(now.keys() - snapshot.keys()) + [
        name
        for name, (value, contents) in snapshot.items()
        if now.get(name) is not value or (contents is not None and not _has_same_contents(value, contents))
    ]


def _restore(part: nn.Module, snapshot: _Snapshot) -> None:
    vars(part).clear()
    for name, (value, contents) in snapshot.items():
        vars(part)[name] = value
        if contents is not None:
            value.clear()
            value.extend(contents) if isinstance(value, list) else value.update(contents)


def _is_container(value: Any) -> bool:
    return isinstance(value, (list, dict, set))


def _has_same_contents(value: Any, contents: Any) -> bool:
    def identities(container: Any) -> list[Any]:
        return [*map(id, container), *(map(id, container.values()) if isinstance(container, dict) else ())]

    return len(value) == len(contents) and identities(value) == identities(contents)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_tensor(leaf: Any) -> bool:
    return type(leaf) is Tensor or type(leaf) is nn.Parameter


# ---- running


class _Variant:
    """A module's forward pass for one kind of call, compiled with its norms fused."""

    def __init__(self, module: nn.Module, graph: Graph, fusions: list[Fusion]) -> None:
        self.fusions = fusions
        self._run = _compiled(module, graph)
        # Where each module that takes part is held, so that its replacement is noticed.
        self._parts = []
        for path in dict.fromkeys(path for fusion in fusions for path in fusion.modules):
            parent, _, name = path.rpartition(".")
            part = module.get_submodule(path)
            self._parts.append((module.get_submodule(parent)._modules, name, part, type(part), _slope(part)))

    def is_right(self) -> bool:
        """Whether the modules that take part are those that were traced, and nobody watches them."""
        return all(
            siblings.get(name) is part and type(part) is kind and _slope(part) == slope and not has_hooks(part)
            for siblings, name, part, kind, slope in self._parts
        )

    def __call__(self, module: nn.Module, tensors: list[Tensor]) -> Any:
        return self._run(module, *tensors)


def _slope(part: nn.Module) -> Any:
    return vars(part).get("negative_slope")


def _compiled(module: nn.Module, graph: Graph) -> Callable[..., Any]:
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<fused forward of {type(module).__name__}>", "exec"), namespace)
    function: Callable[..., Any] = namespace["forward"]
    return function


class FusedForward:
    """Stands before the forward pass of a module, as its attribute `forward`.

    Parameters
    ----------
    module : torch.nn.Module
    is_norm : function of a module
        Whether it is a norm that can be fused.
    overwrite, concatenate : bool
        What norms may do to their inputs: see `epilogues.fuse`.
    """

    def __init__(
        self,
        module: nn.Module,
        is_norm: Callable[[nn.Module], bool],
        *,
        overwrite: bool = False,
        concatenate: bool = False,
    ) -> None:
        self.module = module
        self.is_norm = is_norm
        self.options = {"overwrite": overwrite, "concatenate": concatenate}
        self._variants: dict[Any, _Variant | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if not torch.compiler.is_compiling():
            tensors, kind = _kind_of_call(args, kwargs)
            if kind is not None:
                key = (kind, _state(module))
                if key not in self._variants and len(self._variants) < _MOST_VARIANTS:
                    self._variants[key] = self._variant(args, kwargs)
                variant = self._variants.get(key)
                if variant is not None and variant.is_right():
                    return variant(module, tensors)
        return type(module).forward(module, *args, **kwargs)

    def _variant(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Variant | None:
        try:
            graph = trace(self.module, args, kwargs)
        except Untraceable:
            return None
        fusions, _ = fuse(graph, dict(self.module.named_modules()), self.is_norm, **self.options)
        return _Variant(self.module, graph, fusions) if fusions else None

    # What others ask a forward method for: torch.export its code, inspect its signature.

    @property
    def __wrapped__(self) -> Any:
        return MethodType(type(self.module).forward, self.module)

    @property
    def __code__(self) -> CodeType:
        return type(self.module).forward.__code__

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: compiled code is made again when it is needed."""
        return {**vars(self), "_variants": {}}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.module).__name__})"


_CONSTANTS = (type(None), bool, int, float, str)


def _kind_of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], Any]:
    """The tensors among the arguments, and what else about them a trace depends on; None if it depends on too much."""
    if not kwargs and all(map(_is_tensor, args)):
        return list(args), len(args)
    if not kwargs and len(args) == 1 and type(args[0]) is list and all(map(_is_tensor, args[0])):
        return args[0], (list, len(args[0]))  # as of DenseNet's layers
    leaves, spec = pytree.tree_flatten((args, kwargs))
    kinds = []
    for leaf in leaves:
        if not _is_tensor(leaf) and not isinstance(leaf, _CONSTANTS):
            return [], None
        kinds.append(Tensor if _is_tensor(leaf) else (type(leaf), leaf))
    return [leaf for leaf in leaves if _is_tensor(leaf)], (spec, tuple(kinds))


_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"} | {"forward"}


def _state(module: nn.Module) -> Any:
    """What else a forward pass may depend on: modes, the module's own attributes, which modules it has."""
    attributes = tuple(
        (name, value if isinstance(value, _CONSTANTS) else id(value))
        for name, value in vars(module).items()
        if name not in _OF_EVERY_MODULE
    )
    return (
        torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), attributes, tuple(map(id, module._modules.values()))
    )  # fmt: skip
