"""Facts about one Dynamo graph that all else asks for: values, order, liveness, autocast regions, mutations, source.

The values are Dynamo's own fake tensors (`meta["example_value"]`); nothing is executed here.
"""

from __future__ import annotations

import os
import re
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv

from flashfuse.patterns.calls import mutated_inputs, name_of
from flashfuse.patterns.indexing import quotient
from flashfuse.patterns.site import Location
from flashfuse.patterns.transforms import as_operators_see, innermost, is_forward_mode, is_wrapped

_ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
_EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast
_ENTER_INFERENCE = torch.autograd.grad_mode._enter_inference_mode
_EXIT_INFERENCE = torch.autograd.grad_mode._exit_inference_mode


def value(node: fx.Node) -> Any:
    """What Dynamo knows of the node's value: a fake tensor, a SymInt, a tuple of them; None when it knows nothing.

    A tensor inside a `torch.func` transform is what an operator sees there.
    """
    v = raw_value(node)
    if isinstance(v, (tuple, list)) and any(map(is_wrapped, v)):
        return pytree.tree_map_only(is_wrapped, as_operators_see, v)
    return as_operators_see(v) if is_wrapped(v) else v


def raw_value(node: fx.Node) -> Any:
    """The value as Dynamo holds it."""
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
    if type(size) is int:
        return sympy.Integer(size)
    if not isinstance(size, (torch.SymInt, torch.SymFloat)):
        return sympy.sympify(size)
    expr: sympy.Expr = size.node.expr
    if not expr.has(FloorDiv):
        return expr
    return expr.xreplace(_guarded(size.node.shape_env)).replace(FloorDiv, _divided)


def _guarded(sizes: ShapeEnv) -> dict[sympy.Expr, sympy.Expr]:
    """Quotients that Dynamo has found to be numbers and checks at every call, as heads that a reshape has named."""
    equal = [g.expr for g in sizes.guards if isinstance(g.expr, sympy.Eq)]
    return {sizes.replace(e.lhs): e.rhs for e in equal if isinstance(e.lhs, FloorDiv) and e.rhs.is_Integer}


def _divided(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """a // b without the division where it leaves no remainder: a reshape of equal sizes gives s * s // s."""
    exact = quotient(a, b)
    return FloorDiv(a, b) if exact is None else exact


def shape(t: torch.Tensor) -> tuple[sympy.Expr, ...]:
    return tuple(to_sympy(s) for s in t.shape)


def storage(node: fx.Node) -> int | None:
    """An identity of the memory behind the node's tensor; views of one tensor share it, also where it is wrapped."""
    t = raw_value(node)
    if not isinstance(t, torch.Tensor):
        return None
    t = innermost(t)
    if t.layout != torch.strided or t.is_nested:
        return None
    try:
        return t.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


_LAYERS = frozenset({"conv1d", "conv2d", "conv3d", "embedding"})
# Products that are layers when one argument, at this place and of this name, is a parameter.
_LINEAR = {"linear": (1, "weight"), "addmm": (2, "mat2"), "addmv": (1, "mat")}
_LINEAR |= {f"{name}_": _LINEAR[name] for name in ("addmm", "addmv")}
# The names of all that may apply weights.
WEIGHTED = _LAYERS | _LINEAR.keys()


# Take a part of their first argument, which others may choose.
_CHOICES = frozenset({"getitem", "__getitem__", "index_select"})


def is_weighted(node: fx.Node) -> bool:
    """Whether the node applies a layer's weights; `F.linear` of two activations is a product like any other."""
    name = name_of(node)
    if name not in _LINEAR:
        return name in _LAYERS
    place, keyword = _LINEAR[name]
    weight = node.args[place] if len(node.args) > place else node.kwargs.get(keyword)
    return not isinstance(weight, fx.Node) or isinstance(value(weight), torch.nn.Parameter)


def place_of(t: torch.Tensor) -> tuple[Any, ...]:
    """Where and how the tensor lies in its memory: two tensors of one storage and one place are the same tensor."""
    return (t.dtype, shape(t), t.stride(), t.storage_offset(), t.is_conj(), t.is_neg())


def same_place(one: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes are the same elements of one memory in the same order, inside of no transform."""
    a, b = tensor(one), tensor(other)
    if a is None or b is None or storage(one) is None or storage(one) != storage(other):
        return False
    return not is_wrapped(raw_value(one)) and not is_wrapped(raw_value(other)) and place_of(a) == place_of(b)


class Graph:
    """A Dynamo graph with what the matcher asks of it, computed once and in linear time."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.nodes = tuple(module.graph.nodes)
        self.inputs = {node: node.all_input_nodes for node in self.nodes}
        self.position = {n: i for i, n in enumerate(self.nodes)}
        self.fake_mode = self._find_fake_mode()
        self.autocast = self._autocast_regions()
        self.no_grad = self._no_grad_regions()
        self.mutated = {node: mutated_inputs(node) for node in self.nodes}
        self.writes = self._writes()
        self.live = self._live()
        self.weights = self._made_of_parameters()
        self.forward_mode = any(map(is_forward_mode, self.nodes))

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

    def _no_grad_regions(self) -> frozenset[fx.Node]:
        """The nodes whose results have no history, though Dynamo's values of views and in-place edits say otherwise."""
        nodes: list[fx.Node] = []
        enabled, outer = True, []
        for node in self.nodes:
            if node.target is torch._C._set_grad_enabled:
                enabled = node.args[0] is not False
            elif node.target is _ENTER_INFERENCE:
                outer.append(enabled)
                enabled = node.args[0] is False
            elif node.target is _EXIT_INFERENCE:
                enabled = outer.pop()
            elif not enabled:
                nodes.append(node)
        return frozenset(nodes)

    def _writes(self) -> dict[int, list[fx.Node]]:
        """For every storage that the graph writes, the writing nodes in order."""
        writes: dict[int, list[fx.Node]] = {}
        for node in self.nodes:
            for target in self.mutated[node]:
                where = storage(target)
                if where is not None:
                    writes.setdefault(where, []).append(node)
        return writes

    def _live(self) -> set[fx.Node]:
        """Nodes that reach an output or write memory."""
        live: set[fx.Node] = set()
        for node in reversed(self.nodes):
            if node.op == "output" or node in live or self.mutated[node]:
                live.add(node)
                live.update(self.inputs[node])
        return live

    def _made_of_parameters(self) -> frozenset[fx.Node]:
        """The nodes whose values are made from parameters alone, perhaps chosen by data as those of a routed expert."""
        made: set[fx.Node] = set()
        for node, inputs in self.inputs.items():
            chosen = name_of(node) in _CHOICES and node.args[:1] and node.args[0] in made
            if chosen or (made.issuperset(inputs) if inputs else isinstance(raw_value(node), torch.nn.Parameter)):
                made.add(node)
        return frozenset(made)

    def writer_between(self, node: fx.Node, after: fx.Node, before: fx.Node) -> fx.Node | None:
        """The last node strictly between two nodes that writes the memory behind `node`."""
        where = storage(node)
        low, high = self.position[after], self.position[before]
        found = [w for w in self.writes.get(where, ()) if low < self.position[w] < high] if where is not None else []
        return found[-1] if found else None

    def current(self, node: fx.Node, reader: fx.Node) -> fx.Node | None:
        """The node whose value `reader` sees where it reads `node`: the last in-place edit of that very tensor.

        None where its memory was written through another view, or inside or outside of a transform alone: then no
        node's definition says what it holds.
        """
        writer = self.writer_between(node, node, reader)
        if writer is None:
            return node
        return writer if same_place(node, writer) else None


_FRAME = re.compile(r'File "([^"]+)", line (\d+), in .*\n\s*(.*)')


# What torch.func does around the user's function is no place in it.
_TRANSFORMS = os.path.join("torch", "_functorch", "")
_TORCH = os.path.join(os.path.dirname(torch.__file__), "")


def location(node: fx.Node) -> Location:
    """Where in the user's model a node comes from: its innermost frame, outside of torch if any, and module path."""
    frames = [f for f in _FRAME.findall(node.meta.get("stack_trace") or "") if _TRANSFORMS not in f[0]]
    frames = [f for f in frames if not f[0].startswith(_TORCH)] or frames
    stack = node.meta.get("nn_module_stack") or {}
    path = [entry[0] for entry in stack.values()]
    module = re.sub(r"^L\['(self|fn|mod)'\]\.?", "", path[-1]) if path else ""
    if not frames:
        return Location(module=module)
    file, line, code = frames[-1]
    return Location(module=module, file=file, line=int(line), code=code.strip())
