"""Attention as one call of torch: `F.scaled_dot_product_attention`."""

from __future__ import annotations

from .draft import Draft, Var
from .masks import KEPT
from .operands import operands, repeated
from .scores import broadcast
from .values import finish


def functional(draft: Draft) -> tuple[int, str]:
    """The call, with a mask, a bias, the causal one or none."""
    q, k, v = operands(draft, mixed=False)
    q = draft.arranged(q, (*draft.shape.outer, "s", "d"))
    settings = []
    grouped = draft.shape.head == "kg"
    shared = grouped and draft.chance(2) and draft.shape.batch != ("b", "w")
    made = []
    for x, own in ((k, ("t", "d")), (v, ("t", "e"))):
        x = draft.split(x, (*draft.shape.kv_outer, *own))
        x = x if shared or not grouped else repeated(draft, x)
        outer = draft.shape.kv_outer if shared else draft.shape.outer
        made.append(draft.arranged(x, (*outer, *own)))
    if shared:
        settings.append("enable_gqa=True")
    kind = draft.row({"no-mask": _none, "causal": _causal, "bool-mask": _condition, "float-mask": _added})
    settings += kind(draft)
    if draft.chance(3):
        settings.append(f"scale={draft.one(('0.3', '1.0'))}")
    if draft.chance(4):
        settings.append("dropout_p=0.0")
    call = ", ".join((q.name, made[0].name, made[1].name, *settings))
    draft.say(f"out = F.scaled_dot_product_attention({call})")
    return 1, finish(draft, Var("out", (*draft.shape.outer, "s", "e"))).name


def _none(_: Draft) -> list[str]:
    return []


def _causal(_: Draft) -> list[str]:
    return ["is_causal=True"]


def _frame(draft: Draft) -> tuple[str, ...]:
    return (*draft.shape.outer, "s", "t")


def _whole(draft: Draft, m: Var) -> str:
    """torch wants masks of at least two axes."""
    if len(draft.shape.outer) + 2 > 2 and "s" in m.axes:
        return broadcast(draft, m, _frame(draft))
    full = ", ".join(":" if axis in m.axes else "None" for axis in _frame(draft))
    return f"{m.name}[{full}]"


def _condition(draft: Draft) -> list[str]:
    m = draft.row(KEPT)(draft)
    return [f"attn_mask={_whole(draft, m)}"]


def _added(draft: Draft) -> list[str]:
    axes = draft.one((("s", "t"), _frame(draft), (*draft.shape.outer[-1:], "s", "t")))
    m = draft.given("bias", axes, draft.one(("normal", "infinite", "minimal")))
    return [f"attn_mask={_whole(draft, m)}"]
