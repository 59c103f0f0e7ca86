"""Lifting: what the element of a graph tensor at a symbolic position is, one node at a time.

`Lifter.expand` turns `Load(node, position)` into an expression over loads of the node's inputs. Nothing is expanded
until somebody asks; the matcher decides how far to look.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Mod

from flashfuse.kernels.expr import Expr, Index, Load, loads
from flashfuse.kernels.normal import const, converted, index, rewrite, substitute
from flashfuse.patterns.calls import after_write
from flashfuse.patterns.draw import drawn
from flashfuse.patterns.graph import Graph, shape, storage, tensor, to_sympy, value, wants_gradient
from flashfuse.patterns.indexing import ZERO, Indices, resimplify
from flashfuse.patterns.limits import may_wrap
from flashfuse.patterns.region import Region
from flashfuse.patterns.trace import CannotTrace, Trace, trace


class CannotLift(Exception):
    """The node has no index form: an operator without a row, or memory written in between."""

    def __init__(self, node: fx.Node | None, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


# How often an analysis looks behind writes: a chain of some dozens is looked behind a few times.
_MOST_VERSIONS = 1000


class Lifter:
    """Lifts the nodes of one graph. Keeps the extent of every index symbol it made, and each node's expansion.

    history: whether what is lifted has to keep its gradient, so that no place where one ends is looked through.
    region: what has been looked at since the analysis at hand began. versions: how often it looked behind a write.
    """

    def __init__(self, graph: Graph, history: bool = False) -> None:
        self.graph, self.history = graph, history
        self.ranges: dict[sympy.Symbol, sympy.Expr] = {}
        self.region = Region(graph.position)
        self.versions = 0
        self._traces: dict[fx.Node, Trace | CannotTrace] = {}
        self._expansions: dict[fx.Node, tuple[tuple[Indices, Expr] | CannotLift, Region]] = {}

    def symbol(self, prefix: str, extent: sympy.Expr) -> sympy.Symbol:
        """A new index symbol that runs over 0 <= symbol < extent."""
        made = sympy.Symbol(f"{prefix}{len(self.ranges)}", integer=True, nonnegative=True)
        self.ranges[made] = extent
        return made

    def position(self, sizes: Sequence[sympy.Expr], prefix: str = "x") -> Indices:
        """A generic position in a tensor of these sizes; a dimension of size 1 has only the position 0."""
        return tuple(ZERO if size == 1 else self.symbol(prefix, size) for size in sizes)

    def load(self, node: fx.Node, position: Indices) -> Load:
        self.region.see(node)
        t = tensor(node)
        if t is None:
            raise CannotLift(node, "is not a tensor")
        return Load(t.dtype, node, position)

    def read(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        """The node whose value `reader` sees where it reads `node`; the earliest such place is remembered."""
        source = self.graph.current(node, reader)
        self.region.see(node)
        self.region.read(node if source is None else source, reader, overwritten=source is None)
        return node if source is None else source

    def writer_before(self, node: fx.Node, site: fx.Node) -> fx.Node | None:
        """What writes the memory of `node` after its value was read and before `site`, where the kernel reads it."""
        reader = self.region.first_read.get(node)
        if reader is not None and any(storage(n) == storage(node) for n in self.graph.mutated[reader]):
            return reader
        return self.graph.writer_between(node, reader or node, site)

    def is_overwritten(self, node: fx.Node, later: fx.Node) -> bool:
        """Whether the memory of `node` is written until `later` is computed, itself included."""
        where, position = storage(node), self.graph.position
        writers = self.graph.writes.get(where, ()) if where is not None else ()
        return any(position[node] < position[writer] <= position[later] for writer in writers)

    def expand(self, load: Load, draws: bool = False, followed: bool = True) -> Expr:
        """One step back: the element in terms of the inputs of the load's node. Raises CannotLift.

        With `history` never past a place where a gradient ends (`detach`, `torch.no_grad`): behind it, one would start.
        draws: whether it may be one that is drawn at random. followed: whether a gradient comes to the element at all.
        """
        expr = self.look_behind(load)
        node = load.tensor
        assert isinstance(node, fx.Node)
        if not draws and drawn(expr):
            raise CannotLift(node, "drops elements at random")
        if followed and self._ends_gradient(node, expr):
            blamed = node.args[1] if node.target is after_write else node
            raise CannotLift(blamed, "ends a gradient that its input requires")  # type: ignore[arg-type]
        return expr

    def _ends_gradient(self, node: fx.Node, expr: Expr) -> bool:
        has_history = wants_gradient(node) and node not in self.graph.no_grad
        if not self.history or not expr.dtype.is_floating_point or has_history:
            return False
        sources = (read.tensor for read in loads(expr) if read.dtype.is_floating_point)
        return any(wants_gradient(source) for source in sources if isinstance(source, fx.Node))

    def look_behind(self, load: Load) -> Expr:
        """`expand` for the value alone: what is found must not become part of a program. Raises CannotLift."""
        node = load.tensor
        if not isinstance(node, fx.Node):
            raise CannotLift(None, "is drawn at random")
        self.region.open(node)
        if node in self.region.overwritten:
            raise CannotLift(node, "is written through another view before it is read")
        if node.target is after_write:
            self._count_version(node)
        if node not in self._expansions:
            outer, self.region = self.region, Region(self.graph.position)
            try:
                self._expansions[node] = self._expand(node), self.region
            finally:
                self.region = outer
        known, region = self._expansions[node]
        self.region.add(region)
        if isinstance(known, CannotLift):
            raise known
        position, expr = known
        moved = {a: b for a, b in zip(position, load.indices, strict=True) if isinstance(a, sympy.Symbol)}
        return self.divided_again(substitute(expr, moved)) if moved else expr

    def _count_version(self, node: fx.Node) -> None:
        """What is made of itself by a write occurs twice in the result, and so on with every further write."""
        self.versions += 1
        if self.versions > _MOST_VERSIONS:
            raise CannotLift(node.args[1], "writes a tensor that is made of itself too often")  # type: ignore[arg-type]

    def divided_again(self, expr: Expr) -> Expr:
        """The expression with the divisions in its indices redone, after positions were put in place of symbols."""

        def rule(e: Expr) -> Expr | None:
            match e:
                case Load() if any(i.has(FloorDiv, Mod) for i in e.indices):
                    return replace(e, indices=tuple(resimplify(i, self.ranges) for i in e.indices))
                case Index() if e.value.has(FloorDiv, Mod):
                    return replace(e, value=resimplify(e.value, self.ranges))
            return None

        return rewrite(expr, rule)

    def resolved(self, expr: Expr) -> Expr:
        """Integer and boolean loads replaced by what they are made from, as far as that goes."""

        def rule(e: Expr) -> Expr | None:
            if not isinstance(e, Load) or e.dtype.is_floating_point:
                return None
            try:
                made = self.resolved(self.expand(e))
            except CannotLift:
                return None
            return None if may_wrap(made, e.dtype, self.ranges) else made

        return rewrite(expr, rule)

    def _expand(self, node: fx.Node) -> tuple[Indices, Expr] | CannotLift:
        t = tensor(node)
        if t is None or t.layout != torch.strided or t.is_nested:
            return CannotLift(node, "is not a dense tensor")
        position = self.position(shape(t))
        try:
            rule = NODE_ROWS.get(node.target) if node.op == "call_function" else None
            direct = DIRECT_ROWS.get(node.target)
            if rule is not None:
                expr = rule(NodeView(self, node), position)
            elif direct is not None and (read := direct(NodeView(self, node), position)) is not None:
                expr = read
            elif node.target is operator.getitem and not isinstance(value(node.args[0]), torch.Tensor):  # type: ignore[arg-type]
                expr = self._expand_part(node, position)
            else:
                made = self.traced(node)
                expr = NodeView(self, node, made).element(made.result, position)
            return position, converted(expr, expr.dtype, t.dtype) if self.graph.mutated[node] else expr
        except CannotTrace as error:
            return CannotLift(node, str(error))
        except CannotLift as error:
            return error

    def _expand_part(self, node: fx.Node, position: Indices) -> Expr:
        """An element of one of several outputs: `split(x)[1]`."""
        producer, number = node.args
        if not isinstance(producer, fx.Node) or not isinstance(number, int):
            raise CannotLift(node, "takes an output by a computed number")
        if self.graph.writer_between(node, producer, node) is not None:
            raise CannotLift(node, "is a view that is taken after its memory was written")
        made = self.traced(producer)
        return NodeView(self, producer, made).element(made.result[number], position)

    def traced(self, node: fx.Node) -> Trace:
        """The ATen calls that the node makes. Raises CannotTrace."""
        self.region.open(node)
        if node not in self._traces:
            try:
                self._traces[node] = trace(self.graph, node)
            except CannotTrace as error:
                self._traces[node] = error
        made = self._traces[node]
        if isinstance(made, CannotTrace):
            raise made
        return made


class NodeView:
    """One node while it is expanded: elements of its inputs and of the tensors made inside it."""

    def __init__(self, lifter: Lifter, node: fx.Node, made: Trace | None = None) -> None:
        self.lifter, self.node, self.trace = lifter, node, made

    @property
    def ranges(self) -> dict[sympy.Symbol, sympy.Expr]:
        return self.lifter.ranges

    def symbol(self, extent: sympy.Expr) -> sympy.Symbol:
        return self.lifter.symbol("r", extent)

    def resolved(self, expr: Expr) -> Expr:
        return self.lifter.resolved(expr)

    def input(self, node: fx.Node, position: Indices) -> Expr:
        """The element of an input node as this node reads it; right-aligned, a dimension of size 1 is broadcast."""
        source = self.lifter.read(node, self.node)
        t = tensor(source)
        if t is None:
            return self.number(value(source), source)
        return self.lifter.load(source, aligned(position, shape(t)))

    def number(self, x: Any, node: fx.Node | None = None) -> Expr:
        """A Python number, a symbolic integer or float."""
        if isinstance(x, torch.SymInt):
            return index(to_sympy(x))
        if isinstance(x, torch.SymFloat):
            source = node if node is not None else self.trace.scalars.get(to_sympy(x)) if self.trace else None
            if source is None:
                raise CannotLift(self.node, "computes with a symbolic float made elsewhere")
            return Load(torch.float64, source, ())
        if isinstance(x, (bool, int, float)):
            return const(x)
        raise CannotLift(self.node, f"has an argument of type {type(x).__name__}")

    def element(self, x: Any, position: Indices) -> Expr:
        """The element of a traced tensor (or number) at a position, broadcast as ATen does."""
        if not isinstance(x, torch.Tensor):
            return self.number(x)
        if x.is_complex():
            raise CannotLift(self.node, "computes with complex numbers")
        assert self.trace is not None
        position = aligned(position, shape(x))
        if id(x) in self.trace.inputs:
            return self.input(self.trace.inputs[id(x)], position)
        made = self.trace.producers.get(id(x))
        if made is None:
            raise CannotLift(self.node, "gives a tensor that no recorded operator made")
        call, number = made
        row = ATEN_ROWS.get(call.func)
        if row is None:
            raise CannotLift(self.node, f"uses {call.func}, which has no index form")
        result = row(self, call, position, number)
        if isinstance(call.output, torch.Tensor) and may_wrap(result, call.output.dtype, self.ranges):
            raise CannotLift(self.node, f"computes in {call.output.dtype}, which may wrap around")
        return result


def aligned(position: Indices, sizes: tuple[sympy.Expr, ...]) -> Indices:
    """A position in a broadcast result as a position in an operand of these sizes."""
    kept = position[len(position) - len(sizes) :]
    return tuple(ZERO if size == 1 else at for at, size in zip(kept, sizes, strict=True))


Row = Callable[..., Expr]
ATEN_ROWS: dict[Any, Row] = {}
NODE_ROWS: dict[Any, Row] = {}
# Of nodes that are run where their row gives None.
DirectRow = Callable[..., Expr | None]
DIRECT_ROWS: dict[Any, DirectRow] = {}
