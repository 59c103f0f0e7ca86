"""Facts about one Dynamo graph that all else asks for: values, order, liveness, autocast regions, mutations, source.

The values are Dynamo's own fake tensors (`meta["example_value"]`); nothing is executed here.
"""

from __future__ import annotations

import functools
import inspect
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv

from flashfuse.patterns.indexing import quotient
from flashfuse.patterns.site import Location

_ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
_EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast

# operator.iadd and its kind; the functional form is the name without its first letter
_INPLACE_OPERATORS: dict[Callable[..., Any], Callable[..., Any]] = {
    getattr(operator, "i" + name): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift")
    if hasattr(operator, "i" + name)
} | {operator.iand: operator.and_, operator.ior: operator.or_, operator.ixor: operator.xor}

# Functions that write some of their arguments when another one says so.
_STATEFUL: dict[str, tuple[tuple[str, ...], str]] = {
    "embedding": (("weight",), "max_norm"),
    "embedding_bag": (("weight",), "max_norm"),
    "batch_norm": (("running_mean", "running_var"), "training"),
    "instance_norm": (("running_mean", "running_var"), "use_input_stats"),
}


def value(node: fx.Node) -> Any:
    """What Dynamo knows of the node's value: a fake tensor, a SymInt, a tuple of them; None when it knows nothing."""
    return node.meta.get("example_value", node.meta.get("val"))


def tensor(node: fx.Node) -> torch.Tensor | None:
    v = value(node)
    return v if isinstance(v, torch.Tensor) else None


def wants_gradient(node: fx.Node) -> bool:
    """Whether the node's value is a tensor that requires a gradient."""
    t = tensor(node)
    return t is not None and t.requires_grad


def to_sympy(size: Any) -> sympy.Expr:
    """A size, possibly symbolic, as a sympy expression over the graph's size symbols."""
    if not isinstance(size, (torch.SymInt, torch.SymFloat)):
        return sympy.sympify(size)
    expr: sympy.Expr = size.node.expr
    return expr.replace(FloorDiv, _divided) if expr.has(FloorDiv) else expr


def _divided(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """a // b without the division where it leaves no remainder: a reshape of equal sizes gives s * s // s."""
    exact = quotient(a, b)
    return FloorDiv(a, b) if exact is None else exact


def shape(t: torch.Tensor) -> tuple[sympy.Expr, ...]:
    return tuple(to_sympy(s) for s in t.shape)


def storage(node: fx.Node) -> int | None:
    """An identity of the memory behind the node's tensor; views of one tensor share it."""
    t = tensor(node)
    if t is None or t.layout != torch.strided or t.is_nested:
        return None
    try:
        return t.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def name_of(node: fx.Node) -> str:
    """The bare name of what the node calls: "softmax", "masked_fill_", "scaled_dot_product_attention"."""
    if node.op == "call_method":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.overloadpacket.__name__
    return str(getattr(node.target, "__name__", node.target))


_LAYERS = frozenset({"linear", "conv1d", "conv2d", "conv3d", "embedding"})


def is_weighted(node: fx.Node) -> bool:
    """Whether the node applies a layer's weights; `F.linear` of two activations is a product like any other."""
    if name_of(node) not in _LAYERS:
        return False
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    return name_of(node) != "linear" or not isinstance(weight, fx.Node) or isinstance(value(weight), torch.nn.Parameter)


def functional_target(node: fx.Node) -> Any:
    """The out-of-place twin of an in-place operator or method; None where it has none or the node is not in place."""
    if node.op == "call_function" and node.target in _INPLACE_OPERATORS:
        return _INPLACE_OPERATORS[node.target]
    name = name_of(node)
    if node.op != "call_method" or not name.endswith("_") or name.endswith("__"):
        return None
    return name[:-1] if hasattr(torch.Tensor, name[:-1]) else getattr(torch, name[:-1], None)


def mutated_inputs(node: fx.Node) -> tuple[fx.Node, ...]:
    """The input nodes whose memory this node may write."""
    if node.op in ("placeholder", "output", "get_attr"):
        return ()
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return tuple(node.all_input_nodes) if _may_mutate(node) else ()
    if isinstance(target, torch._ops.OpOverload):
        return _schema_mutated(node, target)
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = (getattr(target, name) for name in target.overloads())
        return tuple(dict.fromkeys(n for overload in overloads for n in _schema_mutated(node, overload)))
    if is_foreign(target):
        return tuple(node.all_input_nodes)
    written = (*_nodes_in(node.kwargs.get("out")), *_state_written(node))
    if _writes_first(node):
        return (*_nodes_in(node.args[:1]), *written)
    return written


def _writes_first(node: fx.Node) -> bool:
    """Whether a function or method of torch writes its first argument: by its trailing underscore, or inplace=True."""
    name = name_of(node)
    if node.target in _INPLACE_OPERATORS or name in ("setitem", "__setitem__"):
        return True
    if name.startswith("__i") and name.endswith("__") and hasattr(operator, name.strip("_")):
        return True
    if name.endswith("_") and not name.endswith("__") and name not in ("and_", "or_", "not_", "is_"):
        return True
    place = _inplace_argument(node.target) if node.op == "call_function" else None
    flag = node.kwargs.get("inplace", node.args[place] if place is not None and place < len(node.args) else False)
    return flag is not False


def _state_written(node: fx.Node) -> tuple[fx.Node, ...]:
    """Running statistics and renormalised weights; all inputs where the arguments cannot be told apart."""
    names, when = _STATEFUL.get(name_of(node), ((), ""))
    if not names or node.op != "call_function":
        return ()
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return tuple(node.all_input_nodes)
    return _nodes_in([given.get(name) for name in names]) if given.get(when) not in (None, False) else ()


@functools.cache
def _inplace_argument(function: Any) -> int | None:
    """The place of the argument `inplace` of a Python function, None where it takes none."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def is_foreign(target: Any) -> bool:
    """Whether the function is the user's own (`torch.compiler.allow_in_graph`), of which nothing is known."""
    module = getattr(target, "__module__", None)
    known = ("torch", "_operator", "operator", "math", "builtins", "einops")
    return isinstance(module, str) and callable(target) and module.split(".")[0] not in known


def _nodes_in(argument: Any) -> tuple[fx.Node, ...]:
    return tuple(n for n in pytree.tree_leaves(argument) if isinstance(n, fx.Node))


def _schema_mutated(node: fx.Node, target: torch._ops.OpOverload) -> tuple[fx.Node, ...]:
    if not target._schema.is_mutable:
        return ()
    found: list[fx.Node] = []
    for i, argument in enumerate(target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.kwargs.get(argument.name, node.args[i] if i < len(node.args) else None)
            found += _nodes_in(given)
    return tuple(found)


def _may_mutate(node: fx.Node) -> bool:
    """A higher-order operator writes its inputs when its sub-graphs do; one without sub-graphs may do anything."""
    bodies = [m for m in subgraphs(node) if isinstance(m, fx.GraphModule)]
    return not bodies or any(mutated_inputs(n) for body in bodies for n in body.graph.nodes)


def subgraphs(node: fx.Node) -> Iterator[Any]:
    """The graph modules that a higher-order operator's arguments name."""
    owner = node.graph.owning_module
    for a in node.all_input_nodes:
        if a.op == "get_attr" and owner is not None:
            found: Any = owner
            for part in str(a.target).split("."):
                found = getattr(found, part, None)
            yield found


def _place(t: torch.Tensor) -> tuple[Any, ...]:
    """Where and how the tensor lies in its memory: two tensors of one storage and one place are the same tensor."""
    return (t.dtype, shape(t), t.stride(), t.storage_offset(), t.is_conj(), t.is_neg())


class Graph:
    """A Dynamo graph with what the matcher asks of it, computed once and in linear time."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.nodes = tuple(module.graph.nodes)
        self.position = {n: i for i, n in enumerate(self.nodes)}
        self.fake_mode = self._find_fake_mode()
        self.autocast = self._autocast_regions()
        self.writes = self._writes()
        self.live = self._live()

    def _find_fake_mode(self) -> FakeTensorMode | None:
        for node in self.nodes:
            v = value(node)
            for t in v if isinstance(v, (tuple, list)) else (v,):
                if isinstance(t, FakeTensor):
                    return t.fake_mode
        return None

    def _autocast_regions(self) -> dict[fx.Node, tuple[tuple[Any, ...], ...]]:
        """For every node inside autocast regions of the graph, the arguments of those regions, outermost first."""
        regions: dict[fx.Node, tuple[tuple[Any, ...], ...]] = {}
        stack: list[tuple[Any, ...]] = []
        for node in self.nodes:
            if node.target is _ENTER_AUTOCAST:
                stack.append(node.args)
            elif node.target is _EXIT_AUTOCAST:
                stack.pop()
            elif stack:
                regions[node] = tuple(stack)
        return regions

    def _writes(self) -> dict[int, list[fx.Node]]:
        """For every storage that the graph writes, the writing nodes in order."""
        writes: dict[int, list[fx.Node]] = {}
        for node in self.nodes:
            for target in mutated_inputs(node):
                where = storage(target)
                if where is not None:
                    writes.setdefault(where, []).append(node)
        return writes

    def _live(self) -> set[fx.Node]:
        """Nodes that reach an output or write memory."""
        live: set[fx.Node] = set()
        for node in reversed(self.nodes):
            if node.op == "output" or node in live or mutated_inputs(node):
                live.add(node)
                live.update(node.all_input_nodes)
        return live

    def writer_between(self, node: fx.Node, after: fx.Node, before: fx.Node) -> fx.Node | None:
        """The last node strictly between two nodes that writes the memory behind `node`."""
        where = storage(node)
        low, high = self.position[after], self.position[before]
        found = [w for w in self.writes.get(where, ()) if low < self.position[w] < high] if where is not None else []
        return found[-1] if found else None

    def current(self, node: fx.Node, reader: fx.Node) -> fx.Node | None:
        """The node whose value `reader` sees where it reads `node`: the last in-place edit of that very tensor.

        None where its memory was written through another view: then no node's definition says what it holds.
        """
        writer = self.writer_between(node, node, reader)
        if writer is None:
            return node
        seen, written = tensor(node), tensor(writer)
        if seen is None or written is None or storage(writer) != storage(node):
            return None
        return writer if _place(seen) == _place(written) else None


_FRAME = re.compile(r'File "([^"]+)", line (\d+), in .*\n\s*(.*)')


def location(node: fx.Node) -> Location:
    """Where in the user's model a node comes from: the innermost frame of its source, and the module path."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    stack = node.meta.get("nn_module_stack") or {}
    path = [entry[0] for entry in stack.values()]
    module = re.sub(r"^L\['(self|fn|mod)'\]\.?", "", path[-1]) if path else ""
    if not frames:
        return Location(module=module)
    file, line, code = frames[-1]
    return Location(module=module, file=file, line=int(line), code=code.strip())
