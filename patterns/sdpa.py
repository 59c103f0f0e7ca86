"""`F.scaled_dot_product_attention` as one more spelling: what it stands for, with its own rule for empty rows."""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from flashfuse.kernels.expr import Const, Dot, Expr, Softmax
from flashfuse.kernels.normal import cast, index, pointwise
from flashfuse.patterns.dropout import dropped
from flashfuse.patterns.graph import shape, tensor, to_sympy, value
from flashfuse.patterns.indexing import Indices, divide, quotient
from flashfuse.patterns.lift import NODE_ROWS, CannotLift, NodeView

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DEFAULTS: dict[str, Any] = {
    "attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False,
}  # fmt: skip


def lift_sdpa(view: NodeView, position: Indices) -> Expr:
    """softmax(q k^T * scale + mask) v; a row with nothing unmasked gives zeros."""
    given = _DEFAULTS | dict(zip(_NAMES, view.node.args, strict=False)) | view.node.kwargs
    q, k, v = (_operand(view, given[name]) for name in ("query", "key", "value"))
    *batch, i, d = position
    kv_len, head_dim = shape(k)[-2], shape(q)[-1]
    j, r = view.symbol(kv_len), view.symbol(head_dim)
    heads = _kv_heads(view, tuple(batch), q, k, v, bool(given["enable_gqa"]))

    def at(name: str, lead: Indices, *rest: sympy.Expr) -> Expr:
        return view.input(given[name], (*lead, *rest))

    product = Dot(q.dtype, at("query", tuple(batch), i, r), at("key", heads, j, r), r, head_dim)
    scale = given["scale"]
    if scale is None:
        factor = _default_scale(head_dim)
    else:
        factor = view.number(value(scale), scale) if isinstance(scale, fx.Node) else view.number(scale)
    score = pointwise("mul", product, factor, dtype=q.dtype)
    if given["is_causal"]:
        score = _masked(pointwise("le", index(j), index(i)), score)
    if given["attn_mask"] is not None:
        _check_mask(view, given["attn_mask"], q, k, bool(given["enable_gqa"]))
        mask = view.input(given["attn_mask"], (*batch, i, j))
        # Torch adds in float32 at least.
        wide = torch.promote_types(q.dtype, torch.float32)
        score = _masked(mask, score) if mask.dtype == torch.bool else pointwise("add", score, mask, dtype=wide)
    probs = dropped(view, Softmax(q.dtype, score, j, j, kv_len, empty_row="zero"), given["dropout_p"], (*batch, i, j))
    return Dot(q.dtype, probs, at("value", heads, j, d), j, kv_len)


def _operand(view: NodeView, node: Any) -> torch.Tensor:
    t = tensor(node) if isinstance(node, fx.Node) else None
    if t is None or t.dim() < 2:
        raise CannotLift(view.node, "has an operand that is not a tensor of at least two dimensions")
    return t


def _check_mask(view: NodeView, mask: Any, q: torch.Tensor, k: torch.Tensor, grouped: bool) -> None:
    """A mask may not enlarge the scores; fake tensors let it, and torch raises at run time."""
    t = tensor(mask) if isinstance(mask, fx.Node) else None
    if t is None or t.dim() > max(q.dim(), k.dim()):
        raise CannotLift(view.node, "has a mask of more dimensions than its scores")
    keys = (*k.shape[:-3], 1) if grouped else k.shape[:-2]
    scores = (*torch.broadcast_shapes(q.shape[:-2], keys), q.shape[-2], k.shape[-2])
    for size, wanted in zip(reversed(shape(t)), reversed(scores), strict=False):
        if size != 1 and to_sympy(wanted) == 1:
            raise CannotLift(view.node, "has a mask that is larger than its scores")


def _default_scale(head_dim: sympy.Expr) -> Expr:
    if not head_dim.is_Integer:
        return pointwise("rsqrt", cast(index(head_dim), torch.float64))
    return Const(torch.float64, 1 / math.sqrt(int(head_dim)))


def _masked(mask: Expr, score: Expr) -> Expr:
    return pointwise("where", mask, score, Const(score.dtype, -math.inf), dtype=score.dtype)


def _kv_heads(
    view: NodeView, batch: Indices, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grouped: bool
) -> Indices:
    """Batch position in k and v; under enable_gqa query head h reads key/value head h // (heads / kv_heads)."""
    if not grouped or not batch:
        return batch
    groups = quotient(to_sympy(q.shape[-3]), to_sympy(k.shape[-3]))
    if groups is None or k.shape[-3] != v.shape[-3]:
        raise CannotLift(view.node, "has key/value heads that do not divide the query heads")
    return (*batch[:-1], divide(batch[-1], groups, view.ranges)[0])


NODE_ROWS[F.scaled_dot_product_attention] = lift_sdpa
NODE_ROWS[torch.ops.aten.scaled_dot_product_attention.default] = lift_sdpa
