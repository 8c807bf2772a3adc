"""What really flows between the modules of a network: its calls as graphs, from symbolic traces and from a run.

A symbolic trace (`torch.fx`) holds for every input. Where a forward cannot be traced, that module becomes one opaque
call in the graph around it, and the modules inside are traced by themselves. A run on example inputs adds one more
graph, which is complete and holds for inputs that take the same path.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import operator
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# What may be asked of a tensor without looking at its values.
METADATA = frozenset({
    "shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "dtype", "device", "layout", "is_cuda",
    "is_quantized", "is_sparse", "is_mps", "requires_grad", "is_floating_point", "is_complex", "is_contiguous",
    "stride", "element_size", "get_device", "names",
})  # fmt: skip

# A subclass may define these and still compute what its base class does.
HARMLESS = frozenset({
    "__init__", "__module__", "__doc__", "__annotations__", "__dict__", "__weakref__", "__repr__", "__qualname__",
    "__parameters__", "__constants__", "__static_attributes__", "__firstlineno__", "__annotate__",
    "__annotate_func__", "__annotations_cache__", "__orig_bases__", "extra_repr", "reset_parameters",
})  # fmt: skip

# Ways to call a forward with optional arguments: more are not tried.
MOST_VARIANTS = 16

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Trace:
    """Every call that was seen.

    Attributes
    ----------
    graphs : list of fx.Graph
        Of call_module nodes, ``node.meta["module"]`` is the module; what a run showed has ``node.meta["shape"]``.
    calls : dict of Module to list of Node
        The calls of each module, over all graphs.
    recorded : fx.Graph or None
        That of the run on example inputs.
    blind : dict of Module to str
        Modules that may be used in ways that were not seen, each with the reason.
    by_run : set of Module
        Those that would be, had not the run shown how they are used.
    read : set of int
        ``id`` of the parameters and buffers that are used by other code than their module's.
    """

    graphs: list[fx.Graph] = field(default_factory=list)
    calls: defaultdict[nn.Module, list[fx.Node]] = field(default_factory=lambda: defaultdict(list))
    recorded: fx.Graph | None = None
    blind: dict[nn.Module, str] = field(default_factory=dict)
    by_run: set[nn.Module] = field(default_factory=set)
    read: set[int] = field(default_factory=set)

    def add(self, graph: fx.Graph) -> None:
        """Take in a graph whose nodes have their modules and tensors in `meta`."""
        self.graphs.append(graph)
        for node in graph.nodes:
            if node.op == "call_module":
                self.calls[node.meta["module"]].append(node)
            elif node.op == "get_attr" and isinstance(node.meta["value"], torch.Tensor):
                self.read.add(id(node.meta["value"]))


def trace(model: nn.Module, example_inputs: tuple[Any, ...] | None) -> Trace:
    """Trace a network, whose modules and tensors are those of the result; it is left untouched."""
    result = Trace()
    _Symbolic(model, result).run()
    if example_inputs is not None:
        _record(model, example_inputs, result)
        result.by_run = set(result.blind)
        result.blind.clear()
    for name, module in model.named_modules():
        if torch_class(module) is not None:
            for child in _below(module):
                result.blind[child] = f"it is used inside {name or 'the model'}, a {type(module).__name__}"
    return result


def torch_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the class of `torch.nn` or `pybn.torch` whose computation a module does, if there is one; no container."""
    if "forward" in vars(module) or isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return None
    classes = type(module).__mro__
    for position, known in enumerate(classes):
        if known.__module__.startswith(("torch.nn.modules.", "torch.ao.nn.", "pybn.torch.")):
            overridden = set().union(*(vars(user) for user in classes[:position])) - HARMLESS
            parametrized = nn.utils.parametrize.is_parametrized(module)
            return known if parametrized or not any(hasattr(known, name) for name in overridden) else None
    return None


def has_hooks(module: nn.Module) -> bool:
    """Say whether somebody watches or changes what enters or leaves a module."""
    return any(getattr(module, name, None) for name in HOOKS)


def keep(value: Any) -> None:
    """Stand for a module that keeps a value in an attribute, in a graph: who reads it there is not seen."""


def _kept(scratch: nn.Module, kind: type) -> Iterator[Any]:
    """Find the values that a forward has left in attributes of its modules."""
    for module in scratch.modules():
        attributes = {name: value for name, value in vars(module).items() if name not in vars(nn.Module())}
        yield from (value for value in pytree.tree_leaves(attributes) if type(value) is kind)


def has_global_hooks() -> bool:
    """Say whether somebody watches all modules."""
    module = sys.modules["torch.nn.modules.module"]
    return any(getattr(module, "_global" + name, None) for name in HOOKS)


def copied(model: nn.Module, shared: Iterable[torch.Tensor] = ()) -> nn.Module:
    """Copy a network; `shared` tensors stay the same objects."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    for buffer in model.buffers():
        if is_lazy(buffer):  # of a lazy layer
            empty: Any = type(buffer)
            memo[id(buffer)] = empty(buffer.requires_grad, device=buffer.device, dtype=buffer.dtype)
    for module in model.modules():
        # What weight_norm and pruning have computed, which refuses to be copied as it is.
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def scratch_copy(model: nn.Module, *, buffers: bool = False) -> nn.Module:
    """Copy the modules, whose forwards may leave traces in them, but not the tensors; the buffers only if asked."""
    return copied(model, itertools.chain(model.parameters(), () if buffers else model.buffers()))


def _below(module: nn.Module) -> Iterator[nn.Module]:
    return (inner for inner in module.modules() if inner is not module)


# Symbolic traces


class _Symbolic:
    """Traces a network, and what its trace does not see into."""

    def __init__(self, model: nn.Module, result: Trace) -> None:
        self._model = model
        self._result = result
        self._names = {module: name for name, module in model.named_modules()}
        self._untraceable: set[type[nn.Module]] = set()
        self._roots: list[nn.Module] = [model]

    def run(self) -> None:
        seen: set[nn.Module] = set()
        while self._roots:
            root = self._roots.pop()
            if root in seen:
                continue
            seen.add(root)
            graphs = self._graphs(root)
            if graphs is None:
                self._give_up(root)
            for graph in graphs or ():
                self._result.add(graph)
                # What is opaque here is looked at by itself.
                opaque = (node.meta["module"] for node in graph.nodes if node.op == "call_module")
                self._roots += [module for module in opaque if torch_class(module) is None]

    def _give_up(self, root: nn.Module) -> None:
        """Note what an untraceable forward may do with its modules, and look for parts that are only called."""
        reason = f"the forward of {self._names[root] or 'the model'}, a {type(root).__name__}, cannot be traced"
        for child in root.children():
            # The layers of a Sequential can also be called one by one; a module with a forward of its own is called.
            forward = getattr(type(child), "forward", None)
            container = isinstance(child, (nn.ModuleList, nn.ModuleDict)) or forward is nn.Sequential.forward
            if torch_class(child) is not None or container:
                self._result.blind.setdefault(child, reason)
            if container:
                self._give_up_container(child, reason)
            elif torch_class(child) is None:
                self._roots.append(child)

    def _give_up_container(self, container: nn.Module, reason: str) -> None:
        for child in container.children():
            if torch_class(child) is not None:
                self._result.blind.setdefault(child, reason)
            elif child.children() and type(child).forward in (nn.Sequential.forward, nn.ModuleList.forward):
                self._give_up_container(child, reason)
            else:
                self._roots.append(child)

    def _graphs(self, root: nn.Module) -> list[fx.Graph] | None:
        """Trace a module in every way that its optional arguments allow; None if that is not possible."""
        if torch_class(root) is not None:  # the network is one layer
            graph = fx.Graph()
            call = graph.create_node("call_module", "model", (graph.placeholder("input"),))
            call.meta["module"] = root
            graph.output(call)
            return [graph]
        if "forward" in vars(root) or not inspect.isfunction(getattr(type(root), "forward", None)):
            return None
        graphs = []
        for concrete in _variants(type(root).forward):
            traced = self._graph(root, concrete)
            if traced is None:
                return None
            graphs.append(traced)
        return graphs or None

    def _graph(self, root: nn.Module, concrete: dict[str, Any]) -> fx.Graph | None:
        while True:
            tracer = _Tracer(self._untraceable)
            scratch = scratch_copy(root)
            try:
                with torch.no_grad():
                    graph = tracer.trace(scratch, concrete or None)
            except Exception:  # whatever the forward makes of values that are none
                if tracer.failed is None:
                    return None
                self._untraceable.add(tracer.failed)
                continue
            for proxy in _kept(scratch, _Proxy):
                graph.create_node("call_function", keep, (proxy.node,))
            for node in graph.nodes:
                if node.op == "call_module":
                    node.meta["module"] = root.get_submodule(node.target)
                elif node.op == "get_attr":
                    node.meta["value"] = _attribute(root, node.target)
            return graph


class _Tracer(fx.Tracer):
    """Stops at modules of torch, at those with hooks, whose inputs and outputs are seen, and at untraceable ones."""

    proxy_buffer_attributes = True

    def __init__(self, untraceable: set[type[nn.Module]]) -> None:
        super().__init__()
        self._untraceable = untraceable
        self._thread = threading.get_ident()
        self.failed: type[nn.Module] | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Say whether a call of this module is one node."""
        return torch_class(m) is not None or has_hooks(m) or type(m) in self._untraceable or "forward" in vars(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace a call, and remember the innermost module whose forward failed."""
        if threading.get_ident() != self._thread:  # a trace patches the modules of all threads
            return forward(*args, **kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None and not self.is_leaf_module(m, ""):
                self.failed = type(m)
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return a parameter or buffer as a traced value."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return what stands for a value during the trace."""
        return _Proxy(node, self)


class _Proxy(fx.Proxy):
    """A value that does not pass for what it is not: code that asks for its type is not traced."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        asking = sys._getframe(1).f_globals.get("__name__", "")
        if asking.startswith("torch."):
            return type(self)
        raise fx.proxy.TraceError("the type of a traced value decides what is computed")

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        if not hasattr(torch.Tensor, name):  # or hasattr(x, name) would be true
            raise fx.proxy.TraceError(f"the attribute {name} of a traced value decides what is computed")
        return super().__getattr__(name)


def _recorded_in_place(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


# torch.fx records ``x += y`` as ``x = x + y``, but whoever else holds x sees the sum.
for _name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    setattr(_Proxy, f"__i{_name}__", _recorded_in_place(getattr(operator, f"i{_name}")))


def _variants(forward: Callable[..., Any]) -> list[dict[str, Any]]:
    """List the ways to leave out optional arguments of a forward, since ``x is None`` decides what it does.

    Each is left out, or given: as a traced value, or as the other value of a flag.
    """
    choices: list[list[dict[str, Any]]] = []
    for name, parameter in inspect.signature(inspect.unwrap(forward)).parameters.items():
        if parameter.default is inspect.Parameter.empty:
            continue
        given: dict[str, Any] = {name: not parameter.default} if isinstance(parameter.default, bool) else {}
        choices.append([{name: parameter.default}, given])
    ways = list(itertools.islice(itertools.product(*choices), MOST_VARIANTS + 1))
    if len(ways) > MOST_VARIANTS:
        return []
    return [{name: value for part in way for name, value in part.items()} for way in ways]


def _attribute(root: nn.Module, target: str) -> Any:
    value: Any = root
    for name in target.split("."):
        value = getattr(value, name, None)  # what the trace itself has added is not there
    return value


# A run


def _record(model: nn.Module, example_inputs: tuple[Any, ...], result: Trace) -> None:
    scratch = scratch_copy(model, buffers=True)
    names = {module: name for name, module in scratch.named_modules()}
    own = {id(mine): theirs for mine, theirs in zip(scratch.buffers(), model.buffers(), strict=True)}
    own |= {id(parameter): parameter for parameter in model.parameters()}
    recorder = _Recorder({module: model.get_submodule(name) for module, name in names.items()}, own)
    recorder.watch(scratch)
    for value in pytree.tree_leaves(example_inputs):
        if isinstance(value, torch.Tensor):
            recorder.place(value)
    with torch.no_grad(), recorder, _Beneath(recorder):
        output = scratch(*example_inputs)
    for value in _kept(scratch, torch.Tensor):
        recorder.graph.create_node("call_function", keep, (recorder.place(value),))
    recorder.graph.output(recorder.arguments(output))
    result.recorded = recorder.graph
    result.add(recorder.graph)


class _Recorder(TorchFunctionMode):
    """Notes every call of a module or function while a network runs."""

    def __init__(self, modules: dict[nn.Module, nn.Module], own: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self._modules = modules
        self._own = own
        self._nodes: dict[int, fx.Node] = {}
        # Kept, so that no later tensor gets the id of an earlier one.
        self._alive: list[torch.Tensor] = []
        # Inside how many modules of torch the run is; what these do by themselves does not matter.
        self._depth = 0
        self._watched_modules: set[nn.Module] = set()

    def place(self, tensor: torch.Tensor) -> fx.Node:
        """Return the node of a tensor; one that comes from outside gets it now."""
        if id(tensor) not in self._nodes:
            if id(tensor) in self._own:
                node = self.graph.create_node("get_attr", "tensor")
                node.meta["value"] = self._own[id(tensor)]
            else:
                node = self.graph.create_node("placeholder", "tensor")
            self._note(tensor, node)
        return self._nodes[id(tensor)]

    def arguments(self, values: Any) -> Any:
        """Replace tensors by nodes, and what a graph cannot hold by None."""

        def argument(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return self.place(value)
            plain = (int, float, bool, str, torch.dtype, torch.device, torch.memory_format, type(None))
            return value if isinstance(value, plain) else None

        return pytree.tree_map(argument, values)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _name_of(func) in METADATA:
            return func(*args, **(kwargs or {}))
        return self.noted(func, args, kwargs or {})

    def noted(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call a function, and note that, unless it is called by something that is noted."""
        if self._depth:
            return func(*args, **kwargs)
        given = self.arguments(tuple(args)), self.arguments(dict(kwargs))
        self._depth += 1
        try:
            output = func(*args, **kwargs)
        finally:
            self._depth -= 1
        self._call("call_function", func, *given, output)
        return output

    def watch(self, root: nn.Module) -> None:
        """Note the calls of the modules of a scratch copy."""
        root.register_forward_pre_hook(self._enter, prepend=True)
        root.register_forward_hook(self._leave, prepend=True, with_kwargs=True)
        if torch_class(root) is None:
            for child in root.children():
                if child not in self._watched_modules:
                    self._watched_modules.add(child)
                    self.watch(child)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._depth or torch_class(module) is not None:
            self._depth += 1
        elif has_hooks(self._modules[module]):
            self._observed(args)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._depth:
            if has_hooks(self._modules[module]):
                self._observed(output)
            return
        self._depth -= 1
        if not self._depth:
            given = self.arguments(tuple(args)), self.arguments(dict(kwargs))
            node = self._call("call_module", "module", *given, output)
            node.meta["module"] = self._modules[module]

    def _observed(self, values: Any) -> None:
        """Note that a hook sees values."""
        self.graph.create_node("call_function", has_hooks, (self.arguments(values),))

    def _call(self, op: str, target: Any, args: Any, kwargs: Any, output: Any) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs)
        if isinstance(output, torch.Tensor):
            self._note(output, node)
        else:
            for index, value in enumerate(pytree.tree_leaves(output)):
                if isinstance(value, torch.Tensor):
                    self._note(value, self.graph.create_node("call_function", _item, (node, index)))
        return node

    def _note(self, tensor: torch.Tensor, node: fx.Node) -> None:
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)
        node.meta["shape"] = tuple(tensor.shape)


class _Beneath(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what functions of Python do not pass by: scripted and custom ones."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._recorder.noted(func, args, kwargs or {})


def _item(values: Any, index: int) -> Any:
    return values[index]


def _name_of(func: Any) -> str:
    """Return the name of a function, or of the attribute whose getter it is."""
    name = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else name
