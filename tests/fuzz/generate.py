"""The strategy that puts programs together, from their axes to how they end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from . import decoys, fused
from .biases import bias, curve
from .draft import Draft, Var
from .masks import mask
from .operands import choose_shape, frames, operands
from .program import Program, Sizes
from .scores import product, scale_operand, scale_scores, second_product
from .values import finish, weigh, weigh_late
from .weights import end, normalise

DTYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
LENGTHS = (5, 7, 1, 2, 3, 4, 6, 8, 9, 11, 13, 16, 17, 24, 31, 32, 33, 40)
DIMS = (4, 8, 1, 2, 3, 5, 7, 12, 16, 24)


@st.composite
def programs(draw: Any, most_length: int = 40, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Program:
    """Any program with at most so many queries and keys, in one of these types."""
    draft = Draft(draw, {}, symbolic=False, dtypes=dtypes)
    dynamic = draft.chance(64)
    draft.sizes = _sizes(draft, most_length)
    calls: list[Sizes] = [draft.sizes]
    if dynamic:
        calls.append(_changed(draft, draft.sizes, most_length))
    draft.symbolic = dynamic or draft.chance(4)
    draft.shape = choose_shape(draft)
    dtype = draft.one(dtypes)
    kind = draft.one((_attention,) * 8 + (fused.functional,) + (decoys.decoy,) * 3 + (_two,))
    trains = draft.chance(12)
    if trains:
        draft.labels.append("trained")
    sites, result = kind(draft)
    draft.say(f"return {result}")
    return Program(
        inputs=tuple(draft.inputs),
        lines=draft.body,
        sizes=tuple(calls),
        dtype=dtype,
        sites=sites if draft.certain and not any(size[axis] == 1 for size in calls for axis in "td") else None,
        refused=frozenset(draft.refused),
        trains=trains,
        left_open=draft.left_open,
        curved=draft.curved,
        labels=tuple(draft.labels),
    )


def _sizes(draft: Draft, most: int) -> Sizes:
    lengths = tuple(n for n in LENGTHS if n <= most)
    s = draft.one(lengths)
    d = draft.one(DIMS)
    k, g = draft.one((2, 1, 3)), draft.one((2, 3, 1))
    return {
        "b": draft.one((2, 1, 3)), "w": 2, "h": draft.one((3, 1, 2, 4)), "k": k, "g": g, "s": s,
        "t": s if draft.chance(2) else draft.one(lengths), "c": 6, "m": 96, "r": draft.one((4, 1, 3)),
        "d": d, "e": d if draft.chance(2) else draft.one(DIMS),
    }  # fmt: skip


def _changed(draft: Draft, sizes: Sizes, most: int) -> Sizes:
    """Other lengths and another batch size, none of them special to Dynamo."""
    lengths = tuple(n for n in LENGTHS if 2 <= n <= most)
    s = draft.one(lengths)
    t = s if sizes["s"] == sizes["t"] else draft.one(lengths)
    return {**sizes, "b": draft.one((2, 3, 4)), "s": s, "t": t}


def _attention(draft: Draft) -> tuple[int | None, str]:
    """One attention that has to be found."""
    return 1, _of(draft, *operands(draft)).name


def _of(draft: Draft, q: Var, k: Var, v: Var) -> Var:
    """The output for these operands."""
    frame = draft.row(frames(draft.shape))
    if draft.chance(3):
        q = scale_operand(draft, q)
    if draft.chance(6):
        k = scale_operand(draft, k)
    s = product(draft, q, k, frame)
    if draft.chance(12):
        s = second_product(draft, s)
    for step in changes(draft):
        s = step(draft, s)
    if draft.chance(20):
        return finish(draft, weigh_late(draft, s, v))
    p = normalise(draft, s)
    if draft.chance(4):
        p = end(draft, p)
    if draft.chance(8):
        p = draft.arranged(p, draft.row(frames(draft.shape)))
    out = finish(draft, weigh(draft, p, v))
    return draft.let("out", draft.one(AFTERWARDS).format(o=out.name), out.axes) if draft.chance(8) else out


# The layer norm's eps is large: a small one multiplies the rounding of nearly constant rows by hundreds, and so of few
# numbers, whose luck would decide.
AFTERWARDS = (
    "{o} * 2",
    "{o} + {o}.mean()",
    "{o}.relu()",
    "{o}.float()",
    "F.layer_norm({o}, {o}.shape[-1:], eps=1.0)",
    "{o}.clone()",
)


def _two(draft: Draft) -> tuple[int | None, str]:
    """Two attentions: of the same queries, keys and values, of others, or one of the other's output."""
    kind = draft.row({"of-the-same": 0, "of-others": 1, "in-a-row": 2})
    q, k, v = operands(draft)
    if kind == 2 and draft.sizes["d"] == draft.sizes["e"]:
        first = _of(draft, q, k, v)
        q = draft.let("q", f"{first.name}.to({k.name}.dtype)", tuple(axis.replace("e", "d") for axis in first.axes))
        return 2, _of(draft, q, k, v).name
    first = draft.let("first", _of(draft, q, k, v).name, ())
    return 2, f"{first.name}, {_of(draft, *(operands(draft) if kind == 1 else (q, k, v))).name}"


def reframed(draft: Draft, s: Var) -> Var:
    """The scores with other axes from here on, as where batch and heads are one only for a product."""
    return draft.arranged(s, draft.row(frames(draft.shape)))


def changes(draft: Draft) -> list[Callable[..., Any]]:
    """What is done to scores, in order."""
    steps: list[Callable[..., Any]] = [scale_scores] if draft.chance(2) else []
    for _ in range(draft.one((0, 1, 1, 2, 3))):
        steps.append(draft.one((mask, mask, bias, bias, curve, scale_scores, reframed)))
    return steps
