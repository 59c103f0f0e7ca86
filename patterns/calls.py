"""What one node of a Dynamo graph calls, and which memory it writes."""

from __future__ import annotations

import functools
import inspect
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._numpy
from torch import fx
from torch.utils import _pytree as pytree

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


# What of NumPy writes its first argument, beside the methods and operators that do so of a tensor too.
_NUMPY_WRITES = frozenset(
    ("setitem", "imatmul", "copyto", "fill", "fill_diagonal", "put", "put_along_axis", "resize", "shuffle", "sort")
) | {function.__name__ for function in _INPLACE_OPERATORS}


def name_of(node: fx.Node) -> str:
    """The bare name of what the node calls: "softmax", "masked_fill_", "scaled_dot_product_attention"; or ""."""
    target = node.target
    if isinstance(target, str):
        return target if node.op == "call_method" else ""
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__
    return _bare_name(target)


def label_of(node: fx.Node) -> str:
    """What a sentence calls the node by: what it calls, or where the graph has it from."""
    return name_of(node) or str(node.target)


def after_write(tensor: torch.Tensor, writer: Any) -> torch.Tensor:
    """The tensor once `writer` has written its memory through another view, or has assigned to it.

    A node of this stands in a graph that is analysed, for every such write that the tensor is read after: so every
    read is of a node whose definition says what memory holds then. What is compiled has none.
    """
    return tensor


# What gives a part of its first argument other values, and nothing back.
ASSIGNMENTS = ("setitem", "__setitem__")

# In-place methods whose twins have other names.
_TWINS: dict[str, Any] = {"zero_": torch.zeros_like}


def functional_target(node: fx.Node) -> Any:
    """The out-of-place twin of an in-place operator or method; None where it has none or the node is not in place."""
    if node.op == "call_function" and node.target in _INPLACE_OPERATORS:
        return _INPLACE_OPERATORS[node.target]
    name = name_of(node)
    if node.op != "call_method" or not name.endswith("_") or name.endswith("__"):
        return None
    if name in _TWINS:
        return _TWINS[name]
    return name[:-1] if hasattr(torch.Tensor, name[:-1]) else getattr(torch, name[:-1], None)


def mutated_inputs(node: fx.Node) -> tuple[fx.Node, ...]:
    """The input nodes whose memory this node may write."""
    target, told = node.target, node.kwargs
    if node.op in ("placeholder", "output", "get_attr"):
        return ()
    if _only_reads(node.op, target) and "out" not in told and "inplace" not in told:
        return ()
    if isinstance(target, torch._ops.HigherOrderOperator):
        return tuple(node.all_input_nodes) if _may_mutate(node) else ()
    if isinstance(target, torch._ops.OpOverload):
        return _schema_mutated(node, target)
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = (getattr(target, name) for name in target.overloads())
        return tuple(dict.fromkeys(n for overload in overloads for n in _schema_mutated(node, overload)))
    if is_foreign(target):
        return tuple(node.all_input_nodes)
    written = (*_nodes_in(_given(node, "out", _numpy_out(target))), *_state_written(node))
    if _writes_first(node):
        return (*_nodes_in(node.args[:1]), *written)
    return written


@functools.lru_cache(maxsize=4096)
def _only_reads(op: str, target: Any) -> bool:
    """Whether a function or method of torch's or Python's own writes nothing, whatever its positional arguments are."""
    if isinstance(target, (torch._ops.OperatorBase, torch._ops.OpOverloadPacket)) or is_foreign(target):
        return False
    if _numpy_out(target) is not None:
        return False
    name = target if isinstance(target, str) else _bare_name(target)
    takes_flag = op == "call_function" and _inplace_argument(target) is not None
    return not takes_flag and name not in _STATEFUL and not _is_inplace(name, target)


def _is_inplace(name: str, target: Any) -> bool:
    """Whether a function or method of torch writes its first argument by its name."""
    if is_numpy(target):
        name = name.removeprefix("wrapped_")
        if name in _NUMPY_WRITES:
            return True
    if target in _INPLACE_OPERATORS or name in ASSIGNMENTS:
        return True
    if name.startswith("__i") and name.endswith("__") and hasattr(operator, name.strip("_")):
        return True
    return name.endswith("_") and not name.endswith("__") and name not in ("and_", "or_", "not_", "is_")


def _writes_first(node: fx.Node) -> bool:
    """Whether a function or method of torch writes its first argument: by its name, or inplace=True."""
    if _is_inplace(name_of(node), node.target):
        return True
    place = _inplace_argument(node.target) if node.op == "call_function" else None
    return _given(node, "inplace", place, False) is not False


def _given(node: fx.Node, name: str, place: int | None, default: Any = None) -> Any:
    """What the node gives for an argument, by its name or at its place."""
    return node.kwargs.get(name, node.args[place] if place is not None and place < len(node.args) else default)


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
    if isinstance(function, types.BuiltinFunctionType) and "inplace" not in (
        getattr(function, "__text_signature__", None) or ""
    ):
        return None
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def is_numpy(target: Any) -> bool:
    """Whether this is a function, method or operator of NumPy, which Dynamo has tensors take."""
    return getattr(target, "__module__", None) == "torch._dynamo.utils" and _bare_name(target).startswith("wrapped_")


def _numpy_out(target: Any) -> int | None:
    """The place of the argument `out` of a function or method of NumPy, None where it takes none."""
    if not is_numpy(target):
        return None
    function = getattr(target, "f", None) or getattr(torch._numpy, _bare_name(target).removeprefix("wrapped_"), None)
    names = list(inspect.signature(function).parameters) if function is not None else []
    return names.index("out") if "out" in names else None


def _bare_name(target: Any) -> str:
    return str(getattr(target, "__name__", target))


def is_foreign(target: Any) -> bool:
    """Whether the function is the user's own (`torch.compiler.allow_in_graph`), of which nothing is known."""
    module = getattr(target, "__module__", None)
    known = ("torch", "_operator", "operator", "math", "builtins", "einops", "flashfuse")
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
