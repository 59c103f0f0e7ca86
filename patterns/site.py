"""What matching a graph gives: attention sites, and refusals that say why a softmax was left alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy
import torch
from torch import fx

from flashfuse.kernels.spec import AttentionSpec
from flashfuse.patterns.draw import DrawLoad
from flashfuse.patterns.table import Table
from flashfuse.patterns.views import Arrange, Step


@dataclass(frozen=True)
class Location:
    """Where in the user's model something is: module path (`layers.0.attn`), and the innermost source line."""

    module: str = ""
    file: str = ""
    line: int = 0
    code: str = ""

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.file else "unknown source"
        return f"{where} ({self.module})" if self.module else where


@dataclass(frozen=True)
class Operand:
    """A tensor of the graph as an operand: `steps` are the views that give it the shape [batch axes.., length, dim].

    `dtype` is the type the operand has to arrive in; a node of another type is cast first. Then it is multiplied by
    `factor`. `behind` are operands that follow it along the length.
    """

    node: fx.Node
    steps: tuple[Step, ...]
    dtype: torch.dtype
    factor: float = 1.0
    behind: tuple[Operand, ...] = ()

    def moves_along(self, axis: int) -> bool:
        """Whether the operand differs along batch axis number `axis`; if not, all of that axis shares it."""
        last = self.steps[-1]
        here = isinstance(last, Arrange) and last.dims[axis] is not None
        return here or any(part.moves_along(axis) for part in self.behind)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return (self.node, *(n for part in self.behind for n in part.nodes))


@dataclass(frozen=True)
class AttentionSite:
    """One attention found in a graph: `node` produces its output, which `spec` describes.

    `batch` are the sizes of the spec's batch axes, `sizes` what its `size0`, .. stand for, both over the graph's size
    symbols. The operator's result [batch axes.., q_len, value_dim], permuted by `out_axes`, is `node`'s output
    reshaped.
    `more` are the queries and keys of further products that are added to the first: the operator's q and k are the
    concatenations of all of them along the head dim, which `head_dim` counts.
    `plus` are further attentions whose outputs are added to this one's, with the same `node`.
    `draw` is what its dropout multiplies by; attentions with equal ones drop the same positions.
    `overwritten` says that the memory of the output is written later, which a backward would have read again.
    `captured` are the tensors behind the score program's loads, of the graph or to be made in it; `chain` the nodes
    whose work the kernel takes over.
    """

    node: fx.Node
    location: Location
    spec: AttentionSpec
    q: Operand
    k: Operand
    v: Operand
    captured: tuple[fx.Node | Table, ...]
    batch: tuple[sympy.Expr, ...]
    sizes: tuple[sympy.Expr, ...]
    q_len: sympy.Expr
    kv_len: sympy.Expr
    head_dim: sympy.Expr
    value_dim: sympy.Expr
    out_axes: tuple[int, ...]
    free_layout: bool
    chain: tuple[fx.Node, ...] = field(default=(), compare=False)
    more: tuple[tuple[Operand, Operand], ...] = ()
    plus: tuple[AttentionSite, ...] = ()
    draw: DrawLoad | None = None
    overwritten: bool = False

    @property
    def nodes_read(self) -> tuple[fx.Node, ...]:
        """Every node of the graph that the operator takes a tensor from."""
        terms = ((self.q, self.k), *self.more)
        captured = (n for c in self.captured for n in (c.reads if isinstance(c, Table) else (c,)))
        return (*captured, *(n for term in terms for operand in term for n in operand.nodes), *self.v.nodes)


@dataclass(frozen=True)
class Refusal:
    """A softmax between contractions that was left as it is: a stable `code`, one plain sentence, and where."""

    node: fx.Node
    code: str
    reason: str
    location: Location

    def __str__(self) -> str:
        return f"{self.code}: {self.reason} [{self.location}]"


def outermost(sites: list[AttentionSite]) -> tuple[list[AttentionSite], set[fx.Node]]:
    """The sites that no other one's kernel takes over, and the nodes that theirs do.

    A product of curved queries with keys is a score, and no attention of its own.
    """
    kept: list[AttentionSite] = []
    inside: set[fx.Node] = set()
    for site in reversed(sites):
        if site.node not in inside:
            kept.insert(0, site)
            inside.update(site.chain)
    return kept, inside
