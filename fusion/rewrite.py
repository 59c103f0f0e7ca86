"""Rewriting: one operator in the place of each attention. Every node that is not part of it stays as Dynamo made it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx

import flashfuse.kernels.ops  # noqa: F401
from flashfuse.erase import Unused
from flashfuse.history import Histories, tied
from flashfuse.insert import Inserter, as_module, copy_graph
from flashfuse.kernels.derivative import differentiable
from flashfuse.kernels.dropout import SEEDS
from flashfuse.kernels.expr import Product
from flashfuse.kernels.ranges import RangesProgram, ranges_program
from flashfuse.patterns.draw import DrawLoad
from flashfuse.patterns.graph import raw_value, shape, tensor, to_sympy, value, wants_gradient
from flashfuse.patterns.indexing import same
from flashfuse.patterns.output_order import memory_order
from flashfuse.patterns.site import AttentionSite, Operand
from flashfuse.patterns.table import Table
from flashfuse.patterns.transforms import is_wrapped
from flashfuse.patterns.views import Arrange, Narrow, Select, Split, Step
from flashfuse.routed import routed
from flashfuse.routes import Route
from flashfuse.tables import Tables
from flashfuse.versions import without_versions

aten = torch.ops.aten

# A size that nothing is known of while compiling is taken to be like this.
UNKNOWN_SIZE = 1024


def rewrite(
    module: fx.GraphModule, sites: Sequence[AttentionSite], routes: Mapping[AttentionSite, Route] | None = None
) -> fx.GraphModule:
    """A copy of `module` in which each site is one call of `flashfuse::attention`, or of its route's operator.

    `module` itself is not changed.
    """
    graph, copied = copy_graph(module)
    unused = Unused(graph, [copied[site.node] for site in sites])
    shared = Shared(SharedRanges(module.graph), Seeds(), Tables(copied), Histories(), routes or {})
    position = {node: i for i, node in enumerate(module.graph.nodes)}
    for site in sorted(sites, key=lambda site: position[site.node]):
        _replace(graph, site, copied, shared)
    without_versions(graph)
    unused.erase_others()
    return as_module(module, graph)


def _replace(graph: fx.Graph, site: AttentionSite, copied: dict[fx.Node, fx.Node], shared: Shared) -> None:
    node = copied[site.node]
    seen = tensor(node)
    assert seen is not None
    build = _Builder(node, copied, shared.tables)
    out = _output(build, site, shared, seen)
    for term in site.plus:
        out = build.call(aten.add.Tensor, out, _output(build, term, shared, seen))
    if site.plus and site.spec.out_dtype != seen.dtype:
        out = build.call(torch.Tensor.to, out, seen.dtype)
    if site.overwritten and not site.plus:
        # The backward reads the operator's own output.
        out = build.call(torch.clone, out)
    if not site.free_layout:
        out = build.laid_out_as(out, seen)
    out = tied(out, seen, build, shared.histories)
    node.replace_all_uses_with(out)
    # A later site may read this one's output.
    copied[site.node] = out
    for dead in (node, *(copied[n] for n in reversed(site.chain))):
        if not dead.users:
            graph.erase_node(dead)


def _output(build: _Builder, site: AttentionSite, shared: Shared, seen: torch.Tensor) -> fx.Node:
    """The operator's output in the shape of the tensor it stands for."""
    terms = ((site.q, site.k), *site.more)
    q, k = (build.joined(operands, site) for operands in zip(*terms, strict=True))
    learned = differentiable(site.spec.programs)
    q, k = (build.read(x, history=any(isinstance(leaf, Product) for leaf in learned)) for x in (q, k))
    v = build.whole(site.v, site)
    route = shared.routes.get(site)
    if route is None:
        out = _fused(build, site, shared, q, k, v)
    else:
        out = routed(build, route, tuple(map(int, site.batch)), q, k, v)
    if site.out_axes != tuple(range(len(site.out_axes))):
        out = build.call(aten.permute.default, out, list(site.out_axes))
    made = tensor(out)
    assert made is not None
    if shape(made) != shape(seen):
        out = build.call(torch.reshape, out, [build.size(s) for s in shape(seen)])
    return out


def _fused(build: _Builder, site: AttentionSite, shared: Shared, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """The operator's output [batch axes.., q_len, value_dim]."""
    sizes = [build.size(s) for s in (*site.batch, *site.sizes)]
    slots = {leaf.tensor for leaf in differentiable(site.spec.programs) if not isinstance(leaf, Product)}
    captured = [build.captured(n, site, history=slot in slots) for slot, n in enumerate(site.captured)]
    arguments: list[Any] = [q, k, v, captured, sizes, site.spec.to_text()]
    arguments += [shared.ranges.node(site, build), shared.seeds.node(site, build)]
    while arguments[-1] is None:
        arguments.pop()
    pair = build.call(torch.ops.flashfuse.attention.default, *arguments)
    return build.call(operator.getitem, pair, 0)


class Shared(NamedTuple):
    """What the sites of one graph have in common, and which of them go to kernels of torch's own."""

    ranges: SharedRanges
    seeds: Seeds
    tables: Tables
    histories: Histories
    routes: Mapping[AttentionSite, Route]


class Seeds:
    """The seeds of a graph's dropouts: one draw of torch's generator each, where the attention stands.

    Whatever sets, saves or restores the generator's state therefore reproduces what is dropped.
    """

    def __init__(self) -> None:
        self.made: dict[DrawLoad, fx.Node] = {}

    def node(self, site: AttentionSite, build: _Builder) -> fx.Node | None:
        """The seed of a site, the same for all terms with the same draw; None where nothing is dropped."""
        if site.draw is None:
            return None
        if site.draw not in self.made:
            self.made[site.draw] = build.seed()
        return self.made[site.draw]


class SharedRanges:
    """The `flashfuse::mask_ranges` nodes of a graph, one for all sites with the same mask over the same data.

    Sites come in the order of the graph, so a node made for one stands before all later ones, and nothing is written
    between a captured tensor and the last of its sites.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.made: dict[tuple[Any, ...], fx.Node] = {}

    def node(self, site: AttentionSite, build: _Builder) -> fx.Node | None:
        """The key ranges of a site; None where its mask does not depend on data or they would not pay.

        None inside a transform of `torch.func` too: what is made in there means nothing to a site outside of it.
        """
        if is_wrapped(raw_value(site.node)):
            return None
        program = ranges_program(site.spec, [*map(self._typical, site.batch)], self._typical(site.kv_len))
        if program is None:
            return None
        read = tuple(site.captured[slot] for slot in program.captured)
        batch = tuple(site.batch[axis] for axis in sorted(program.batch))
        key = (program, read, batch, tuple(site.sizes[slot] for slot in program.sizes), site.q_len, site.kv_len)
        if key not in self.made:
            self.made[key] = self._insert(program, site, build)
        return self.made[key]

    def _typical(self, size: sympy.Expr) -> int:
        """The size in the call that is being compiled; of a size that only data decides, a guess."""
        known = size.xreplace(self._hints)
        return int(known) if known.is_Integer else UNKNOWN_SIZE

    @functools.cached_property
    def _hints(self) -> dict[sympy.Expr, sympy.Integer]:
        sizes = [s for n in self.graph.nodes for s in (value(n), *getattr(tensor(n), "shape", ()))]
        symbolic = [s.node for s in sizes if isinstance(s, torch.SymInt)]
        return {node.expr: sympy.Integer(node.hint) for node in symbolic if node.expr.is_Symbol and node.has_hint()}

    def _insert(self, program: RangesProgram, site: AttentionSite, build: _Builder) -> fx.Node:
        captured = [build.captured(site.captured[slot], site, history=False) for slot in program.captured]
        batch = [build.size(size) if axis in program.batch else 1 for axis, size in enumerate(site.batch)]
        sizes = [*batch, *(build.size(site.sizes[slot]) for slot in program.sizes)]
        lengths = build.size(site.q_len), build.size(site.kv_len)
        predicates = program.needed, program.idle
        return build.call(torch.ops.flashfuse.mask_ranges.default, captured, sizes, len(batch), *lengths, *predicates)


class _Builder(Inserter):
    """Inserts the operands of a site before it.

    Where a gradient of the site is wanted its operands and captured tensors are read with their histories, since
    lifting never looks behind a place where a gradient ends.
    """

    def __init__(self, site: fx.Node, copied: dict[fx.Node, fx.Node], tables: Tables) -> None:
        super().__init__(site)
        self.copied, self.tables = copied, tables

    def seed(self) -> fx.Node:
        t = tensor(self.before)
        assert t is not None
        settings: dict[str, Any] = {"dtype": torch.int64, "device": t.device}
        with torch.no_grad(), self.fake_mode:
            example = torch.randint(0, SEEDS, (), **settings)
        return self.add("call_function", torch.randint, (0, SEEDS, ()), settings, example)

    def read(self, node: fx.Node, history: bool = True) -> fx.Node:
        """The tensor, without its history where a gradient of it is not wanted."""
        if not wants_gradient(node) or (history and self.history):
            return node
        return self.call(aten.detach.default, node)

    def laid_out_as(self, node: fx.Node, seen: torch.Tensor) -> fx.Node:
        """The node's value with the strides of `seen`, on which views behind it may count."""
        t = tensor(node)
        assert t is not None
        strides = zip(shape(t), t.stride(), seen.stride(), strict=True)
        if all(size == 1 or same(to_sympy(a), to_sympy(b)) for size, a, b in strides):
            return node
        order = memory_order(seen)
        node = self.call(aten.permute.default, node, order)
        node = self.call(torch.Tensor.contiguous, node)
        return self.call(aten.permute.default, node, [order.index(d) for d in range(len(order))])

    def operand(self, operand: Operand, dtype: torch.dtype | None = None) -> fx.Node:
        """The operand, in its own type or in a wider one, in which its factor is taken in."""
        node = self._as(self.read(self.copied[operand.node]), operand.dtype)
        for step in operand.steps:
            node = self._step(node, step)
        node = node if dtype is None else self._as(node, dtype)
        return self.call(torch.mul, node, operand.factor) if operand.factor != 1.0 else node

    def joined(self, operands: Sequence[Operand], site: AttentionSite) -> fx.Node:
        """One operand, or several side by side along the head dim, each expanded over the axes that another has."""
        if len(operands) == 1:
            return self.whole(operands[0], site)
        parts = [self.whole(operand, site, site.spec.product_dtype) for operand in operands]
        return self._side_by_side(parts, operands, site, -1)

    def whole(self, operand: Operand, site: AttentionSite, dtype: torch.dtype | None = None) -> fx.Node:
        """An operand with those that follow it along the length."""
        if not operand.behind:
            return self.operand(operand, dtype)
        operands = (operand, *operand.behind)
        return self._side_by_side([self.operand(part, dtype) for part in operands], operands, site, -2)

    def _side_by_side(
        self, nodes: Sequence[fx.Node], operands: Sequence[Operand], site: AttentionSite, dim: int
    ) -> fx.Node:
        axes = [axis for axis in range(len(site.batch)) if any(o.moves_along(axis) for o in operands)]
        parts = []
        for node in nodes:
            t = tensor(node)
            assert t is not None
            sizes = [self.size(site.batch[d]) if d in axes else n for d, n in enumerate(shape(t)[: len(site.batch)])]
            parts.append(self.call(aten.expand.default, node, [*sizes, -1, -1]))
        return self.call(aten.cat.default, parts, dim)

    def _as(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        t = tensor(node)
        assert t is not None
        return node if t.dtype == dtype else self.call(torch.Tensor.to, node, dtype)

    def _step(self, node: fx.Node, step: Step) -> fx.Node:
        match step:
            case Split(dim=dim, outer=outer, inner=inner):
                return self.call(torch.unflatten, node, dim, [self.size(outer), self.size(inner)])
            case Narrow(dim=dim, start=start, length=length, step=by):
                stop = start + (length - 1) * by + 1
                return self.call(aten.slice.Tensor, node, dim, self.size(start), self.size(stop), self.size(by))
            case Select(dim=dim, at=at):
                return self.call(aten.select.int, node, dim, self.size(at))
            case Arrange(dims=dims):
                return self._arrange(node, dims)
        raise TypeError(f"unknown view step {step}")

    def _arrange(self, node: fx.Node, dims: tuple[int | None, ...]) -> fx.Node:
        order = [d for d in dims if d is not None]
        if order != sorted(order):
            node = self.call(aten.permute.default, node, order)
        for at, d in enumerate(dims):
            if d is None:
                node = self.call(aten.unsqueeze.default, node, at)
        return node

    def captured(self, captured: fx.Node | Table, site: AttentionSite, history: bool) -> fx.Node:
        """A captured tensor; a symbolic float becomes a 0-d tensor."""
        node = self.tables.node(captured) if isinstance(captured, Table) else self.copied[captured]
        if tensor(node) is not None:
            return self.read(node, history)
        device = tensor(self.copied[site.q.node]).device  # type: ignore[union-attr]
        settings: dict[str, Any] = {"dtype": torch.float64, "device": device}
        with torch.no_grad(), self.fake_mode:
            example = torch.full((), value(node), **settings)
        return self.add("call_function", torch.full, ((), node), settings, example)
