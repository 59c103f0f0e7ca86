"""The product of queries and keys, and scales of it."""

from __future__ import annotations

from collections.abc import Callable

from .draft import Draft, Var
from .operands import repeated
from .program import Axes

_LETTERS = "bhsdtekgwcxyzu"


def einsum(draft: Draft, stem: str, left: Var, right: Var, out: Axes) -> Var:
    """A product by einsum: an axis of several letters is one of its letters."""
    names: dict[str, str] = {}
    for axis in (*left.axes, *right.axes, *out):
        names.setdefault(axis, next(x for x in axis[-1] + _LETTERS if x not in names.values()))
    spelled = ["".join(names[axis] for axis in x) for x in (left.axes, right.axes, out)]
    return draft.let(stem, f'torch.einsum("{spelled[0]},{spelled[1]}->{spelled[2]}", {left.name}, {right.name})', out)


def outer_of(frame: Axes) -> Axes:
    """The axes beside queries and keys."""
    return tuple(axis for axis in frame if axis not in ("s", "t"))


def is_folded(draft: Draft, frame: Axes) -> bool:
    """Whether the frame's first axis is the batch and the heads in one."""
    return len(draft.shape.outer) > 1 and frame[0] == "".join(draft.shape.outer)


def broadcast(draft: Draft, x: Var, frame: Axes) -> str:
    """The tensor as an expression that broadcasts to the axes of a frame."""
    if is_folded(draft, frame) and set(x.axes) & set(draft.shape.outer):
        return _folded(draft, x, frame)
    x = _ordered(draft, x, frame)
    items = [":" if axis in x.axes else "None" for axis in frame]
    if draft.chance(2):
        while items[0] == "None":
            items.pop(0)
    if "None" not in items:
        return x.name
    if items.count("None") == 1 and draft.chance(2):
        return f"{x.name}.unsqueeze({items.index('None')})"
    return f"{x.name}[{', '.join(items)}]"


def _ordered(draft: Draft, x: Var, frame: Axes) -> Var:
    x = draft.split(x, frame)
    return draft.permuted(x, tuple(axis for axis in frame if axis in x.axes))


def _folded(draft: Draft, x: Var, frame: Axes) -> str:
    """The same where batch and heads are one axis."""
    apart = (*draft.shape.outer, *frame[1:])
    x = _ordered(draft, x, apart)
    items = [":" if axis in x.axes else "None" for axis in apart]
    sizes = [draft.size(axis) for axis in draft.shape.outer]
    whole = [draft.size(axis) if axis in x.axes else "1" for axis in frame[1:]]
    full = f"{x.name}[{', '.join(items)}].expand({', '.join((*sizes, *whole))})" if "None" in items else x.name
    if draft.chance(2):
        return f"{full}.reshape({', '.join((draft.size(frame[0]), *whole))})"
    return f"{full}.flatten(0, {len(sizes) - 1})"


# --------------------------------------------------------------------------------------------------------------------


def product(draft: Draft, q: Var, k: Var, frame: Axes) -> Var:
    """Scores with the axes of a frame."""
    rows = dict(PRODUCTS)
    if len(frame) != 3 or frame[1:] != ("s", "t"):
        del rows["bmm"]
    if is_folded(draft, frame):
        del rows["einsum"]
    return draft.row(rows)(draft, q, k, frame)


def with_heads(draft: Draft, x: Var, frame: Axes, own: Axes) -> Var:
    """Keys or values with the axes `own` of their own, and heads that broadcast to those of a frame."""
    x = draft.split(x, (*draft.shape.kv_outer, *own))
    return x if "k" not in draft.shape.kv_outer or "g" in frame else repeated(draft, x)


def laid_out(draft: Draft, x: Var, frame: Axes, own: Axes) -> Var:
    """Keys or values in the order that matmul needs, with an axis of size 1 for groups."""
    outer = outer_of(frame)
    x = draft.arranged(with_heads(draft, x, frame, own), (*(axis for axis in outer if axis != "g"), *own))
    if "g" not in outer:
        return x
    at = outer.index("g")
    return draft.let(x.name, f"{x.name}.unsqueeze({at})", (*x.axes[:at], "1", *x.axes[at:]))


def turned(draft: Draft, name: str) -> str:
    return draft.one((f"{name}.transpose(-1, -2)", f"{name}.mT", f"{name}.transpose(-2, -1)"))


def matmul(draft: Draft, left: str, right: str) -> str:
    return draft.one((f"{left} @ {right}", f"torch.matmul({left}, {right})", f"{left}.matmul({right})"))


def _einsum(draft: Draft, q: Var, k: Var, frame: Axes) -> Var:
    own = (*outer_of(frame), "s", "d")
    q = draft.split(q, own)
    # Queries that another attention gave may have groups apart that are one axis here, over which no product sums.
    q = q if set(q.axes) == set(own) else draft.arranged(q, own)
    return einsum(draft, "s", q, with_heads(draft, k, frame, ("t", "d")), frame)


def in_parts(draft: Draft) -> bool:
    """Whether keys or values are used in two parts, which for one query are left alone.

    Two parts of one key each have no axis that is a sum.
    """
    if draft.number("t") < 3 or draft.symbolic or not draft.chance(12):
        return False
    draft.labels.append("in-parts")
    if draft.number("s") == 1:
        draft.refused.add("extra-columns")
    return True


def _matmul(draft: Draft, q: Var, k: Var, frame: Axes) -> Var:
    outer = outer_of(frame)
    q = draft.arranged(q, (*outer, "s", "d"))
    k = laid_out(draft, k, frame, ("t", "d"))
    if in_parts(draft):
        parts = (f"{q.name} @ {k.name}[..., :1, :].mT", f"{q.name} @ ({k.name}[..., 1:, :] * 0.5).mT")
        return draft.permuted(draft.let("s", f"torch.cat([{', '.join(parts)}], -1)", (*outer, "s", "t")), frame)
    if frame.index("t") < frame.index("s"):
        return draft.permuted(draft.let("s", matmul(draft, k.name, turned(draft, q.name)), (*outer, "t", "s")), frame)
    return draft.permuted(draft.let("s", matmul(draft, q.name, turned(draft, k.name)), (*outer, "s", "t")), frame)


def _bmm(draft: Draft, q: Var, k: Var, frame: Axes) -> Var:
    q = draft.arranged(q, (frame[0], "s", "d"))
    k = draft.arranged(with_heads(draft, k, frame, ("t", "d")), (frame[0], "t", "d"))
    keys = f"{k.name}.transpose(1, 2)"
    if draft.chance(4):
        added = draft.given("bias", draft.one((frame, ("s", "t"), (frame[0], "1", "t"))), "normal")
        factors = draft.one(("", ", alpha=0.5", ", beta=0.5, alpha=0.3", ", beta=2"))
        cast = f"{added.name}.to({q.name}.dtype)"
        return draft.let("s", f"torch.baddbmm({cast}, {q.name}, {keys}{factors})", frame)
    spelling = draft.one((
        f"torch.bmm({q.name}, {keys})", f"{q.name}.bmm({keys})",
        f"torch.baddbmm({q.name}.new_empty({', '.join(map(draft.size, frame))}), {q.name}, {keys}, beta=0, alpha=0.5)",
    ))  # fmt: skip
    return draft.let("s", spelling, frame)


def second_product(draft: Draft, s: Var) -> Var:
    """One more product of other queries and keys, added: with heads of their own, or keys for all heads."""
    outer = draft.shape.outer
    keys = draft.one((outer, draft.shape.batch))
    q, k = draft.given("q", (*outer, "s", "r"), "normal"), draft.given("k", (*keys, "t", "r"), "normal")
    apart = (*outer, "s", "t")
    more = einsum(draft, "more", q, k, apart)
    text = broadcast(draft, more, s.axes)
    return draft.let("s", draft.one(("{s} + {m}", "{m} + {s}")).format(s=s.name, m=f"({text})"), s.axes)


def _summed(draft: Draft, q: Var, k: Var, frame: Axes) -> Var:
    """A multiplication and a sum."""
    outer = outer_of(frame)
    q, k = draft.arranged(q, (*outer, "s", "d")), laid_out(draft, k, frame, ("t", "d"))
    rows, columns = f"{q.name}.unsqueeze(-2)", f"{k.name}.unsqueeze(-3)"
    spelling = draft.one((
        f"({rows} * {columns}).sum(-1)", f"torch.sum({columns} * {rows}, dim=-1)",
        f"torch.linalg.vecdot({rows}, {columns})", f"({rows} * {columns} * 0.5).sum(-1)",
    ))  # fmt: skip
    return draft.permuted(draft.let("s", spelling, (*outer, "s", "t")), frame)


PRODUCTS: dict[str, Callable[[Draft, Var, Var, Axes], Var]] = {
    "matmul": _matmul,
    "einsum": _einsum,
    "bmm": _bmm,
    "summed": _summed,
}

# --------------------------------------------------------------------------------------------------------------------
# Scales

# Of queries or keys, and of scores; each may stand in either place.
NUMBERS = ("0.5", "{d} ** -0.5", "1.0 / math.sqrt({d})", "math.sqrt(1.0 / {d})", "0.3")


def scale_operand(draft: Draft, x: Var) -> Var:
    number = draft.one(NUMBERS).format(d=draft.size("d"))
    spelling = draft.one(("{x} * ({n})", "({n}) * {x}", "{x} / (1 / ({n}))", "{x}.mul({n})"))
    return draft.let(x.name, spelling.format(x=x.name, n=number), x.axes)


def scale_scores(draft: Draft, s: Var) -> Var:
    return draft.row(SCALES)(draft, s)


def _number(draft: Draft, s: Var) -> Var:
    number = draft.one(NUMBERS).format(d=draft.size("d"))
    return draft.let("s", f"{s.name} * ({number})", s.axes)


def _quotient(draft: Draft, s: Var) -> Var:
    spelling = draft.one(("{s} / math.sqrt({d})", "{s} / {d} ** 0.5", "{s}.div(2.0)", "torch.div({s}, 3)"))
    return draft.let("s", spelling.format(s=s.name, d=draft.size("d")), s.axes)


def _in_place(draft: Draft, s: Var) -> Var:
    draft.say(draft.one(("{s} *= 0.5", "{s}.mul_(0.25)", "{s} /= 2", "{s}.div_(4.0)")).format(s=s.name))
    return s


def _tensor_number(draft: Draft, s: Var) -> Var:
    spelling = draft.one((
        "{s} * torch.tensor(0.4)", "{s} / torch.tensor(2.0).sqrt()", "{s} * torch.full((), 0.5, dtype={s}.dtype)",
    ))  # fmt: skip
    return draft.let("s", spelling.format(s=s.name), s.axes)


def _learned(draft: Draft, s: Var) -> Var:
    t = draft.again("temperature", _temperature)
    text = broadcast(draft, t, s.axes) if t.axes else t.name
    spelling = draft.one(("{s} * {t}", "{s} / {t}", "{t} * {s}"))
    return draft.let("s", spelling.format(s=s.name, t=text), s.axes)


def _temperature(draft: Draft) -> Var:
    own = draft.one(((), (draft.shape.head,))) if draft.shape.head else ()
    t = draft.given("tau", own, "positive")
    spelling = draft.one(("{t}", "{t}.exp()", "{t}.clamp(max=1.2)", "{t}.clamp(max=1.1).exp()", "{t}.sigmoid()"))
    return draft.let("tau", spelling.format(t=t.name), own)


SCALES: dict[str, Callable[[Draft, Var], Var]] = {
    "times": _number,
    "over": _quotient,
    "scaled-in-place": _in_place,
    "times-tensor": _tensor_number,
    "temperature": _learned,
}
