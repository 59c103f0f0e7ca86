"""From weights and values to the output."""

from __future__ import annotations

from collections.abc import Callable

from .draft import Draft, Var
from .program import Axes
from .scores import broadcast, einsum, in_parts, is_folded, laid_out, matmul, outer_of, turned, with_heads


def weigh(draft: Draft, p: Var, v: Var) -> Var:
    """The output, with the axes of the scores and the values' dim in the place of the keys."""
    p = draft.let(p.name, draft.one((f"{p.name}.to({v.name}.dtype)", f"{p.name}.type_as({v.name})")), p.axes)
    rows = dict(PRODUCTS)
    if len(p.axes) != 3 or p.axes[1:] != ("s", "t"):
        del rows["value-bmm"], rows["value-baddbmm"]
    # What is divided later is the product alone.
    elif "late" in draft.labels:
        del rows["value-baddbmm"]
    if is_folded(draft, p.axes):
        del rows["value-einsum"]
    return draft.row(rows)(draft, p, v)


def _einsum(draft: Draft, p: Var, v: Var) -> Var:
    v = with_heads(draft, v, p.axes, ("t", "e"))
    out = draft.one(((*outer_of(p.axes), "s", "e"), (*(axis for axis in p.axes if axis != "t"), "e")))
    return einsum(draft, "out", p, v, out)


def _matmul(draft: Draft, p: Var, v: Var) -> Var:
    outer = outer_of(p.axes)
    v = laid_out(draft, v, p.axes, ("t", "e"))
    if draft.chance(6):
        p = draft.permuted(p, (*outer, "t", "s"))
        return draft.let("out", matmul(draft, turned(draft, v.name), p.name), (*outer, "e", "s"))
    p = draft.permuted(p, (*outer, "s", "t"))
    if "late" not in draft.labels and in_parts(draft):
        first, second = f"{p.name}[..., :1] @ {v.name}[..., :1, :]", f"{p.name}[..., 1:] @ (-{v.name}[..., 1:, :])"
        return draft.let("out", draft.one((f"{first} + {second}", f"({second}).add_({first})")), (*outer, "s", "e"))
    return draft.let("out", matmul(draft, p.name, v.name), (*outer, "s", "e"))


def _bmm(draft: Draft, p: Var, v: Var) -> Var:
    v = draft.arranged(with_heads(draft, v, p.axes, ("t", "e")), (p.axes[0], "t", "e"))
    spelling = draft.one(("torch.bmm({p}, {v})", "{p}.bmm({v})"))
    return draft.let("out", spelling.format(p=p.name, v=v.name), (p.axes[0], "s", "e"))


def _baddbmm(draft: Draft, p: Var, v: Var) -> Var:
    """Beside something that is added in the same operator."""
    v = draft.arranged(with_heads(draft, v, p.axes, ("t", "e")), (p.axes[0], "t", "e"))
    numbers = draft.one(("", ", beta=0.5", ", alpha=2", ", beta=0, alpha=0.5"))
    return draft.let("out", f"torch.baddbmm({v.name}[:, :1], {p.name}, {v.name}{numbers})", (p.axes[0], "s", "e"))


def _summed(draft: Draft, p: Var, v: Var) -> Var:
    """A multiplication and a sum. Of one query and one column it is an average like any other."""
    outer = outer_of(p.axes)
    p, v = draft.permuted(p, (*outer, "s", "t")), laid_out(draft, v, p.axes, ("t", "e"))
    draft.certain &= draft.number("s") > 1 or draft.number("e") > 1
    spelling = draft.one(("({p} * {v}).sum(-2)", "torch.sum({v} * {p}, dim=-2)"))
    both = spelling.format(p=f"{p.name}.unsqueeze(-1)", v=f"{v.name}.unsqueeze(-3)")
    return draft.let("out", both, (*outer, "s", "e"))


def weigh_late(draft: Draft, s: Var, v: Var) -> Var:
    """Exponentials times values, divided by their sums only then."""
    draft.labels.append("late")
    d = s.dim("t")
    e = draft.let("e", f"({s.name} - {s.name}.amax({d}, keepdim=True)).exp()", s.axes)
    out = weigh(draft, e, v)
    total = draft.let("total", f"{e.name}.sum({d}).to({v.name}.dtype)", tuple(axis for axis in s.axes if axis != "t"))
    return draft.let("out", f"{out.name} / {broadcast(draft, total, out.axes)}", out.axes)


PRODUCTS: dict[str, Callable[[Draft, Var, Var], Var]] = {
    "value-matmul": _matmul,
    "value-baddbmm": _baddbmm,
    "value-einsum": _einsum,
    "value-bmm": _bmm,
    "value-summed": _summed,
}


def finish(draft: Draft, out: Var) -> Var:
    """The output in a layout that models give it."""
    outer, batch = draft.shape.outer, draft.shape.batch
    head = draft.shape.head
    wanted: tuple[Axes | None, ...] = (
        None, (*outer, "s", "e"), (*batch, "s", head + "e"), (*batch, "s", *((head,) if head else ()), "e"),
        ("s", *batch, head + "e"), (*outer, "e", "s"),
    )  # fmt: skip
    chosen = draft.one(wanted)
    return out if chosen is None else draft.arranged(out, chosen)
