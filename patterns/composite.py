"""Functions that Dynamo keeps whole though an attention is inside, and the torch calls that they make.

Most are written in Python; an operator that adds something to a product with values is a product and a sum.

`F.multi_head_attention_forward` is one node of the graph: projections, attention and output projection. What it does
is read by running its body once on the node's fake tensors, under the modes in which Dynamo ran it: the branches it
takes are those that Dynamo has guarded already.
"""

from __future__ import annotations

import operator
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from flashfuse.patterns.calls import mutated_inputs, name_of
from flashfuse.patterns.graph import Graph, storage, tensor, value
from flashfuse.patterns.seeds import upstream
from flashfuse.patterns.trace import CannotTrace, as_traced, autocasts, check_same

_WHOLE = frozenset({"scaled_dot_product_attention"})
_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum"})
_NORMALISERS = frozenset({"softmax"})

# Questions about a tensor that its fake answers as the tensor would; the answers are in the arguments of later calls.
_READS = frozenset(
    {
        "__get__",
        "__len__",
        "dim",
        "element_size",
        "get_device",
        "is_complex",
        "is_contiguous",
        "is_floating_point",
        "is_same_size",
        "is_signed",
        "ndimension",
        "nelement",
        "numel",
        "size",
        "storage_offset",
        "stride",
    }
)
_VIEW_PROPERTIES = frozenset({"H", "T", "mH", "mT", "imag", "real"})


@dataclass(frozen=True, eq=False)
class TorchCall:
    """One call of a torch function, as a graph would hold it: `op` is "call_function" or "call_method".

    draws: whether it advances the random generator.
    """

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    draws: bool


@dataclass(frozen=True, eq=False)
class Record:
    """What one composite node does: its input nodes by their tensor's identity, its calls in order, its result."""

    inputs: dict[int, fx.Node]
    calls: tuple[TorchCall, ...]
    result: Any


def composites(graph: Graph) -> tuple[fx.Node, ...]:
    """The live nodes that call a Python function of torch with an attention inside, or add to a product with values."""
    live = [n for n in graph.nodes if n in graph.live]
    found = {n for n in live if n.op == "call_function" and _is_composite(n.target)}
    sums = [n for n in live if name_of(n) in _SUMS and not n.kwargs.get("out")]
    if sums:
        up = upstream(graph)
        found.update(n for n in sums if up.seeds(n))
    return tuple(n for n in live if n in found)


def _is_composite(target: Any) -> bool:
    """Whether a function's code names an attention, and modes and subclasses see the function as one call."""
    if not isinstance(target, types.FunctionType) or target.__module__ != "torch.nn.functional":
        return False
    names = frozenset(target.__code__.co_names)
    whole = bool(names & _WHOLE) or bool(names & _PRODUCTS and names & _NORMALISERS)
    return whole and any(name.startswith("has_torch_function") for name in names)


def record(graph: Graph, node: fx.Node) -> Record:
    """Run the body of a composite node once on fake tensors and record its torch calls.

    Raises CannotTrace where the calls would not stand for the node: it writes its inputs, looks at data, returns
    something that is no tensor, or gives another result than Dynamo saw.
    """
    written = mutated_inputs(node)
    if written and (name_of(node) not in _IN_PLACE or autocasts(graph, node)):
        raise CannotTrace("writes its input")
    memory = [storage(n) for n in pytree.tree_leaves((node.args, dict(node.kwargs))) if isinstance(n, fx.Node)]
    if any(memory.count(storage(n)) > 1 for n in written):
        raise CannotTrace("writes what it reads")
    # What is written is a copy, since running the body must leave no trace in what Dynamo saw.
    given = {n: value(n).clone() if n in written else value(n) for n in node.all_input_nodes}
    inputs = {id(t): n for n, t in given.items() if isinstance(t, torch.Tensor)}
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), given.__getitem__)
    draws = _Draws()
    recorder = _Recorder(draws)
    needs_grad = any(isinstance(t, torch.Tensor) and t.requires_grad for t in pytree.tree_leaves(value(node)))
    try:
        with as_traced(graph, node), torch.set_grad_enabled(needs_grad), warnings.catch_warnings(), draws, recorder:
            warnings.simplefilter("ignore")
            result = (_SUMS.get(name_of(node)) or _body(node.target))(*args, **kwargs)
    except Exception as error:
        raise CannotTrace(f"{type(error).__name__}: {error}") from error
    check_same(result, value(node), node)
    _check_results_used_alone(node, result)
    made = [t for call in recorder.calls for t in pytree.tree_leaves(call.output) if isinstance(t, torch.Tensor)]
    if free_unbacked_symbols(made) - free_unbacked_symbols([tensor(n) for n in inputs.values()]):
        raise CannotTrace("a length depends on data")
    return Record(inputs, tuple(recorder.calls), result)


def _body(function: Any) -> Callable[..., Any]:
    """`function` without its question whether someone overrides it, which would answer with the function itself."""
    world = function.__globals__
    silent = {name: lambda *_: False for name in world if name.startswith("has_torch_function")}
    body = types.FunctionType(
        function.__code__, {**world, **silent}, function.__name__, function.__defaults__, function.__closure__
    )
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def _added(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: Any = 1, alpha: Any = 1) -> torch.Tensor:
    """`addmm` and its kin: beta x + alpha a @ b, where x is not read for a beta of 0."""
    return _beside(torch.matmul(a, b), x, beta, alpha)


def _added_over_batch(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: Any = 1, alpha: Any = 1
) -> torch.Tensor:
    """`addbmm`: the products of all of the batch are added up too."""
    return _beside(torch.bmm(a, b).sum(0), x, beta, alpha)


def _beside(out: torch.Tensor, x: torch.Tensor, beta: Any, alpha: Any) -> torch.Tensor:
    if alpha != 1:
        out = out * alpha
    if beta == 0:
        return out
    # Under autocast all three are cast.
    x = x if x.dtype == out.dtype else x.to(out.dtype)
    return out + (x if beta == 1 else x * beta)


def _in_place(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda x, *args, **kwargs: x.copy_(function(x, *args, **kwargs))


_FUNCTIONAL = {"addmm": _added, "baddbmm": _added, "addmv": _added, "addbmm": _added_over_batch}
# They write their first argument, and autocast does not convert it.
_IN_PLACE = {f"{name}_": _in_place(function) for name, function in _FUNCTIONAL.items()}
_SUMS: dict[str, Callable[..., torch.Tensor]] = {**_FUNCTIONAL, **_IN_PLACE}


def _check_results_used_alone(node: fx.Node, result: Any) -> None:
    """Every use of a node with several results must be one tensor of them."""
    if isinstance(result, torch.Tensor):
        return
    for user in node.users:
        alone = user.target is operator.getitem and isinstance(user.args[1], int)
        if not alone or not isinstance(result[user.args[1]], torch.Tensor):
            raise CannotTrace(f"`{user.name}` uses a result that is no tensor")


class _Draws(TorchDispatchMode):
    """Counts the ATen calls that draw random numbers."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.count += torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


class _Recorder(TorchFunctionMode):
    def __init__(self, draws: _Draws) -> None:
        super().__init__()
        self.draws = draws
        self.calls: list[TorchCall] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        before = self.draws.count
        output = func(*args, **(kwargs or {}))
        leaves = pytree.tree_leaves(output)
        if leaves and all(isinstance(leaf, torch.Tensor) for leaf in leaves):
            op, target, given = _spelling(func, args)
            self.calls.append(TorchCall(op, target, given, kwargs or {}, output, self.draws.count > before))
        elif func.__name__ not in _READS:
            raise CannotTrace(f"`{func.__name__}` gives something that is no tensor")
        return output


def _spelling(func: Any, args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """How Dynamo would have written the call into its graph."""
    name = func.__name__
    if name == "__get__":
        prop = func.__self__.__name__
        if prop not in _VIEW_PROPERTIES:
            raise CannotTrace(f"reads `{prop}`")
        return "call_function", getattr, (args[0], prop)
    if name == "__getitem__":
        return "call_function", operator.getitem, args
    if getattr(torch.Tensor, name, None) is func:
        return "call_method", name, args
    return "call_function", func, args
