"""Queries, keys and values as programs are given them, and the axes that their scores have."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .draft import Draft, Shape, Var, axes
from .program import Axes

BATCHES = {"batch": "b", "no-batch": "", "windows": "b w"}
HEADS = {"heads": "h", "grouped": "kg", "one-head": ""}


def choose_shape(draft: Draft) -> Shape:
    """Which axes there are."""
    batch = axes(draft.row(BATCHES) if draft.chance(6) else "b")
    head = draft.row(HEADS)
    own = draft.sizes["s"] == draft.sizes["t"] and draft.sizes["d"] == draft.sizes["e"] and head != "kg"
    return Shape(batch, head, own and draft.chance(2))


# --------------------------------------------------------------------------------------------------------------------
# How operands are given

MEMORY = ("normal", "normal", "normal", "normal", "large", "strided", "tail", "turned", "shared")


def _apart(draft: Draft) -> tuple[Var, Var, Var]:
    """Three tensors, each in a layout of its own or all in one."""
    shape, same = draft.shape, not draft.chance(4)
    layout = draft.one(_LAYOUTS)
    made = []
    for name, outer, row, column in (
        ("q", shape.outer, "s", "d"), ("k", shape.kv_outer, "t", "d"), ("v", shape.kv_outer, "t", "e"),
    ):  # fmt: skip
        batch, head = (outer[:-1], outer[-1]) if shape.head else (outer, "")
        chosen = layout if same else draft.one(_LAYOUTS)
        made.append(draft.given(name, chosen(batch, head, row, column), draft.one(MEMORY)))
    q, k, v = made
    return q, k, v


def _headed(head: str) -> Axes:
    return (head,) if head else ()


_LAYOUTS: tuple[Callable[[Axes, str, str, str], Axes], ...] = (
    lambda b, h, row, column: (*b, *_headed(h), row, column),
    lambda b, h, row, column: (*b, row, *_headed(h), column),
    lambda b, h, row, column: (*b, row, h + column),
    lambda b, h, row, column: (row, *b, h + column),
    lambda b, h, row, column: (row, *b, *_headed(h), column),
    lambda b, h, row, column: (*b, *_headed(h), column, row),
    lambda b, h, row, column: (*_headed(h), *b, row, column),
    lambda b, h, row, column: ("".join((*b, h)), row, column) if b or h else (row, column),
)


def _packed(draft: Draft) -> tuple[Var, Var, Var]:
    """One tensor that holds all three."""
    shape, head = draft.shape, _headed(draft.shape.head)
    spelling = draft.row(_PACKED)
    given, axes_of_part, line = spelling(shape.batch, head, len(shape.batch), draft)
    x = draft.given("qkv", given, "normal")
    names = [draft.fresh(letter) for letter in "qkv"]
    draft.say(f"{', '.join(names)} = {line.format(x=x.name)}")
    key_axes = tuple("t" if axis == "s" else axis for axis in axes_of_part)
    value_axes = tuple(axis.replace("d", "e") for axis in key_axes)
    return Var(names[0], axes_of_part), Var(names[1], key_axes), Var(names[2], value_axes)


_PACKED: dict[str, Callable[[Axes, Axes, int, Draft], tuple[Axes, Axes, str]]] = {
    "unbind": lambda b, h, n, _: ((*b, "s", "3", *h, "d"), (*b, "s", *h, "d"), f"{{x}}.unbind({n + 1})"),
    "unbind-first": lambda b, h, n, _: (("3", *b, *h, "s", "d"), (*b, *h, "s", "d"), "{x}"),
    "indexed": lambda b, h, n, _: (
        (*b, "s", "3", *h, "d"), (*b, "s", *h, "d"),
        f"({{x}}.select({n + 1}, n) for n in range(3))",
    ),
    "chunk": lambda b, h, n, _: ((*b, "s", "".join(("3", *h, "d"))), (*b, "s", "".join((*h, "d"))), "{x}.chunk(3, -1)"),
    "split": lambda b, h, n, draft: (
        (*b, "s", "".join(("3", *h, "d"))), (*b, "s", "".join((*h, "d"))),
        f"{{x}}.split({draft.number(''.join((*h, 'd')))}, dim=-1)",
    ),
    "per-head": lambda b, h, n, _: ((*b, "s", *h, "3d"), (*b, "s", *h, "d"), "{x}.chunk(3, dim=-1)"),
}  # fmt: skip


def _projected(draft: Draft) -> tuple[Var, Var, Var]:
    """Layers of one activation."""
    shape = draft.shape
    x = draft.given("x", (*shape.batch, "s", "c"), "normal")
    made = []
    for name, row, column in (("q", "s", "d"), ("k", "t", "d"), ("v", "t", "e")):
        inner = shape.head + column
        w = draft.given(f"w{name}", (inner, "c"), "weights")
        made.append(draft.let(name, f"F.linear({x.name}, {w.name})", (*shape.batch, row, inner)))
    q, k, v = made
    return q, k, v


def operands(draft: Draft, mixed: bool = True) -> tuple[Var, Var, Var]:
    """q, k and v in some layout; keys and values with the heads they have.

    mixed: whether the values may be of another type than queries and keys.
    """
    if not draft.shape.own:
        q, k, v = _apart(draft)
    else:
        q, k, v = draft.one((_packed, _projected))(draft)
    if draft.sizes["d"] == draft.sizes["e"] and draft.chance(16):
        v = draft.let("v", k.name, tuple(axis.replace("d", "e") for axis in k.axes))
    if mixed and draft.chance(20):
        element = draft.one([x for x in (torch.float32, torch.bfloat16, torch.float16) if x in draft.dtypes])
        # float64 beside another type, and probabilities that are rounded to one narrower than the values'.
        draft.refused |= {"dtype", "rounded"}
        q, k = (draft.let(x.name, f"{x.name}.to({element})", x.axes) for x in (q, k))
    q, k, v = (draft.row(_TOUCHED)(draft, x) if draft.chance(10) else x for x in (q, k, v))
    return q, k, v


_TOUCHED: dict[str, Callable[[Draft, Var], Var]] = {
    "copied": lambda draft, x: draft.let(x.name, f"{x.name}.clone()", x.axes),
    "contiguous": lambda draft, x: draft.let(x.name, f"{x.name}.contiguous()", x.axes),
    "negated": lambda draft, x: draft.let(x.name, f"-{x.name}", x.axes),
    "normalised": lambda draft, x: draft.let(x.name, f"F.normalize({x.name}, dim=-1)", x.axes),
    "rolled": lambda draft, x: draft.let(x.name, f"{x.name}.roll(1, -1)", x.axes),
    "joined": lambda draft, x: draft.let(x.name, f"torch.cat([{x.name}[..., :1], {x.name}[..., 1:]], -1)", x.axes),
    "rotated": lambda draft, x: rotated(draft, x),
    "flipped": lambda draft, x: draft.let(x.name, f"{x.name}.flip({draft.one(range(len(x.axes)))})", x.axes),
    "detached": lambda draft, x: draft.let(x.name, f"{x.name}.detach()", x.axes),
    "sliced": lambda draft, x: draft.let(x.name, f"torch.cat([{x.name}, {x.name}])[: {x.name}.shape[0]]", x.axes),
    "activated": lambda draft, x: draft.let(x.name, f"{x.name}.tanh()", x.axes),
    "shifted": lambda draft, x: draft.let(x.name, f"{x.name} + 1", x.axes),
}


def rotated(draft: Draft, x: Var) -> Var:
    """Rotary positions, but for which elements are paired."""
    row = next((axis for axis in ("s", "t") if axis in x.axes[:-1]), None)
    if row is None or len(x.axes[-1]) > 1:
        return x
    tables = [draft.given(name, (row, x.axes[-1]), "normal").name for name in ("cos", "sin")]
    items = ", ".join(":" if axis in (row, x.axes[-1]) else "None" for axis in x.axes)
    cos, sin = (f"{name}[{items}].to({x.name}.dtype)" for name in tables)
    turned = f"torch.cat([-{x.name}[..., 1:], {x.name}[..., :1]], -1)"
    return draft.let(x.name, f"{x.name} * {cos} + {turned} * {sin}", x.axes)


def repeated(draft: Draft, x: Var) -> Var:
    """Key heads repeated for the query heads that share them: "b k t d" becomes "b kg t d"."""
    at = x.dim("k")
    new = tuple("kg" if axis == "k" else axis for axis in x.axes)
    between = [draft.size(axis) for axis in x.axes]
    expanded = ", ".join((*between[: at + 1], draft.size("g"), *between[at + 1 :]))
    at_end = ":, " * (at + 1)
    shape = ", ".join(map(draft.size, new))
    spelling = draft.one((
        f"{x.name}.repeat_interleave({draft.size('g')}, dim={at})",
        f"{x.name}[{at_end}None].expand({expanded}).reshape({shape})",
        f"{x.name}.unsqueeze({at + 1}).expand({expanded}).flatten({at}, {at + 1})",
        f"{x.name}.unsqueeze({at + 1}).repeat({', '.join('1' * (at + 1))}, {draft.size('g')}"
        f"{', 1' * (len(x.axes) - at - 1)}).view({shape})",
        f"torch.stack([{x.name}] * {draft.size('g')}, {at + 1}).flatten({at}, {at + 1})",
        f"{x.name}.index_select({at}, torch.arange({draft.number('kg')}) // {draft.size('g')})",
    ))  # fmt: skip
    return draft.let(x.name, spelling, new)


# --------------------------------------------------------------------------------------------------------------------
# The axes of scores


def frames(shape: Shape) -> dict[str, Axes]:
    """Which axes scores may have, and in which order."""
    outer = shape.outer
    split = (*shape.batch, "k", "g") if shape.head == "kg" else outer
    found = {"plain": (*outer, "s", "t")}
    if len(outer) > 1:
        found["folded"] = ("".join(outer), "s", "t")
        found["heads-inside"] = (*shape.batch, "s", *_headed(shape.head), "t")
        found["heads-first"] = (*_headed(shape.head), *shape.batch, "s", "t")
        found["keys-first"] = (*outer, "t", "s")
        found["heads-last"] = (*shape.batch, "s", "t", *_headed(shape.head))
    if shape.head == "kg":
        found |= {"groups": (*split, "s", "t"), "groups-last": (*shape.batch, "k", "s", "g", "t")}
    return found
