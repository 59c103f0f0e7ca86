"""One graph node as the ATen calls it makes, recorded on fake tensors.

A node may be `torch.matmul`, `F.softmax`, `x.masked_fill`, `einsum` with any letters: what it means is what it calls.
Only nodes that the matcher looks through are ever run, each once.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx
from torch._decomp import decomposition_table
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from flashfuse.patterns.calls import after_write, functional_target, mutated_inputs
from flashfuse.patterns.graph import Graph, tensor, value
from flashfuse.patterns.transforms import is_border

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class AtenCall:
    """One ATen call: `func(*args, **kwargs)` gave `output`."""

    func: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(frozen=True, eq=False)
class Trace:
    """What one node does.

    inputs: the node behind each input tensor, by identity. scalars: the node behind each symbolic float.
    producers: the call and output number behind each tensor made inside. result: the node's output tensors.
    calls: the ATen calls in order.
    """

    inputs: dict[int, fx.Node]
    scalars: dict[sympy.Expr, fx.Node]
    producers: dict[int, tuple[AtenCall, int]]
    result: Any
    calls: tuple[AtenCall, ...] = field(repr=False)
    keep: tuple[Any, ...] = field(default=(), repr=False)


class CannotTrace(Exception):
    """The node cannot be run on fake tensors, or does not give what Dynamo saw."""


# Operators that change the shape of what a function of torch has made, as `matmul` does with vectors; and their twins.
_RESHAPING = {aten.squeeze_.dim: aten.squeeze.dim}


class _Recorder(TorchDispatchMode):
    def __init__(self, known: AbstractSet[int]) -> None:
        super().__init__()
        self.known = known
        self.producers: dict[int, tuple[AtenCall, int]] = {}
        self.calls: list[AtenCall] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in _RESHAPING and id(args[0]) in self.producers:
            # As it was before it has a name of its own.
            before = aten.alias.default(args[0])
            self.producers[id(before)] = self.producers[id(args[0])]
            call = AtenCall(_RESHAPING[func], (before, *args[1:]), kwargs or {}, func(*args, **(kwargs or {})))
        else:
            call = AtenCall(func, args, kwargs or {}, func(*args, **(kwargs or {})))
        output = call.output
        self.calls.append(call)
        for i, out in enumerate(output if isinstance(output, (tuple, list)) else (output,)):
            if isinstance(out, torch.Tensor) and id(out) not in self.known:
                self.producers[id(out)] = (call, i)
        return output


@contextlib.contextmanager
def as_traced(graph: Graph, node: fx.Node) -> Iterator[None]:
    """The modes under which Dynamo saw the node: fake tensors, its autocast regions; no gradients, no new guards."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_no_autocast_cache())
        for device, dtype, enabled, _ in graph.autocast.get(node, ()):
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
        if graph.fake_mode is not None:
            stack.enter_context(graph.fake_mode)
            if _has_symbolic_sizes(node):
                stack.enter_context(enable_python_dispatcher())
            if graph.fake_mode.shape_env is not None:
                stack.enter_context(graph.fake_mode.shape_env.suppress_guards())
        yield


@contextlib.contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Every cast of an autocast region around the compiled function is made, and so recorded, where it happens."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _has_symbolic_sizes(node: fx.Node) -> bool:
    """Whether an input has a size that is a symbol; some operators' fakes then exist in Python only."""
    tensors = [t for n in node.all_input_nodes if (t := tensor(n)) is not None]
    return any(isinstance(size, torch.SymInt) for t in tensors if t.layout == torch.strided for size in t.shape)


def trace(graph: Graph, node: fx.Node) -> Trace:
    """Run the node once on its inputs' fake tensors and record its ATen calls. Raises CannotTrace."""
    target, told = node.target, dict(node.kwargs)
    if is_border(node):
        raise CannotTrace("is where a torch.func transform begins or ends")
    written = mutated_inputs(node)
    if written and written == (told.get("out"),):
        del told["out"]
    elif written:
        target = functional_target(node)
        if target is None:
            raise CannotTrace("writes its input in a way that is not known")
    if node.op not in ("call_function", "call_method") or isinstance(target, torch._ops.HigherOrderOperator):
        raise CannotTrace(f"{node.op} {node.target}")
    if target is after_write:
        raise CannotTrace("is what a write has left")
    made = recorded(graph, node, target, node.args, told)
    check_same(made.result, value(node), node)
    return made


def recorded(graph: Graph, node: fx.Node, target: Any, given: tuple[Any, ...], told: dict[str, Any]) -> Trace:
    """What a function or method does with arguments of the node, in its place. Raises CannotTrace."""
    inputs = {id(tensor(n)): n for n in node.all_input_nodes if tensor(n) is not None}
    scalars = {v.node.expr: n for n in node.all_input_nodes if isinstance(v := value(n), torch.SymFloat)}
    args, kwargs = fx.map_arg((given, told), value)
    call = _only_call(graph, node, args) if target is node.target and not told else None
    if call is not None:
        return Trace(inputs, scalars, {id(call.output): (call, 0)}, call.output, (call,), (args, kwargs))
    recorder = _Recorder(set(inputs))
    try:
        with as_traced(graph, node), recorder:
            result = (
                getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)
            )
    except Exception as error:
        raise CannotTrace(f"{type(error).__name__}: {error}") from error
    return Trace(inputs, scalars, recorder.producers, result, tuple(recorder.calls), (args, kwargs))


def decomposed(graph: Graph, node: fx.Node, call: AtenCall, into: Trace) -> Trace:
    """A trace with the calls that torch decomposes one of its calls into; its result is that of the call.

    Raises CannotTrace.
    """
    function = decomposition_table.get(call.func)
    if function is None:
        raise CannotTrace(f"uses {call.func}, which this torch does not decompose")
    recorder = _Recorder(into.inputs.keys() | into.producers.keys())
    try:
        # A call is what autocast has left of an operator already.
        with as_traced(graph, node), torch._C._DisableAutocast(), recorder:
            result = function(*call.args, **call.kwargs)
    except Exception as error:
        raise CannotTrace(f"{type(error).__name__}: {error}") from error
    producers = into.producers | recorder.producers
    return replace(into, producers=producers, result=result, calls=tuple(recorder.calls), keep=(into, result))


# What these operators of Python do with a tensor on the left.
_OPERATORS: dict[Any, torch._ops.OpOverload] = {
    operator.add: aten.add.Tensor, operator.sub: aten.sub.Tensor, operator.mul: aten.mul.Tensor,
    operator.truediv: aten.div.Tensor, operator.and_: aten.bitwise_and.Tensor, operator.or_: aten.bitwise_or.Tensor,
    operator.lt: aten.lt.Tensor, operator.le: aten.le.Tensor, operator.gt: aten.gt.Tensor, operator.ge: aten.ge.Tensor,
    operator.eq: aten.eq.Tensor, operator.ne: aten.ne.Tensor,
}  # fmt: skip


def _only_call(graph: Graph, node: fx.Node, args: Sequence[Any]) -> AtenCall | None:
    """The one call of a pointwise operator, which need not be run to be known; None for any other node."""
    function, output = _OPERATORS.get(node.target), value(node)
    if function is None or not isinstance(args[0], torch.Tensor) or not isinstance(output, torch.Tensor):
        return None
    number = not isinstance(args[1], torch.Tensor)
    if autocasts(graph, node) or output is args[0] or output is args[1] or (number and isinstance(args[1], complex)):
        return None
    return AtenCall(function, tuple(args), {}, output)


def autocasts(graph: Graph, node: fx.Node) -> bool:
    """Whether a node may convert its inputs."""
    return node in graph.autocast or torch._C._is_any_autocast_enabled()


def _same_sizes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the sizes are one expression, or Dynamo has a guard that they are equal."""
    return a.dim() == b.dim() and all(
        str(m) == str(n) or statically_known_true(m == n) for m, n in zip(a.shape, b.shape, strict=True)
    )


def check_same(got: Any, seen: Any, node: fx.Node) -> None:
    """The recorded output must be what Dynamo saw (shape and type), or the record means nothing."""
    pairs = zip(pytree.tree_leaves(got), pytree.tree_leaves(seen), strict=False)
    for a, b in pairs:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            in_place = bool(mutated_inputs(node))
            if not _same_sizes(a, b) or (a.dtype != b.dtype and not in_place):
                raise CannotTrace(f"gives {tuple(a.shape)} {a.dtype} where the graph holds {tuple(b.shape)} {b.dtype}")
