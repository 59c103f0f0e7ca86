"""Layouts that shift, pad, overlap or interleave: each reads as an index map of the user's own tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import check_fused
from graphs import only_site, score_of

B, H, S, D = 2, 4, 6, 8
INF = float("inf")


def qkv() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(B, H, S, D) for _ in range(3))


def attend(s: Any, v: Any) -> Any:
    return torch.softmax(s, -1) @ v


# --------------------------------------------------------------------------------------------------------------------
# Relative shift: the product of queries with relative positions, moved so that row i starts at its own position


def padded(x: Any) -> Any:
    b, h, s, p = x.shape
    return F.pad(x, (1, 0)).view(b, h, p + 1, s)[:, :, 1:].view(b, h, s, p)[..., :s]


def with_a_column_of_zeros(x: Any) -> Any:
    b, h, s, p = x.shape
    zeros = torch.zeros((*x.shape[:3], 1), dtype=x.dtype)
    x = torch.cat([zeros, x], dim=-1).view(b, h, p + 1, s)
    return x[:, :, 1:].view(b, h, s, p)[:, :, :, : p // 2 + 1]


def strided(x: Any) -> Any:
    b, h, s, p = x.shape
    return x.contiguous().as_strided((b, h, s, s), (h * s * p, s * p, p - 1, 1), s - 1)


@pytest.mark.parametrize("shift", [padded, with_a_column_of_zeros, strided], ids=lambda f: f.__name__)
def test_relative_shift_is_a_diagonal(shift: Callable[..., Any]) -> None:
    def fn(q: Any, k: Any, v: Any, table: Any) -> Any:
        return attend((q @ k.mT + shift(q @ table.mT)) * 0.25, v)

    args = (*qkv(), torch.randn(H, 2 * S - 1, D))
    site = only_site(fn, *args)
    assert score_of(site.spec) == "((qk + t0[n0, n1, q_idx, (5 + kv_idx + (-1 * q_idx))]) * 0.25)"
    assert site.captured[0].name == "matmul_1"
    check_fused(fn, *args)


@pytest.mark.parametrize("shift", [padded, with_a_column_of_zeros], ids=lambda f: f.__name__)
def test_relative_shift_with_dynamic_sizes(shift: Callable[..., Any]) -> None:
    def fn(q: Any, k: Any, v: Any, table: Any) -> Any:
        return attend(q @ k.mT + shift(q @ table[:, : 2 * q.shape[2] - 1].mT), v)

    args = (*qkv(), torch.randn(H, 100, D))
    site = only_site(fn, *args, dynamic=True)
    assert score_of(site.spec) == "(qk + t0[n0, n1, q_idx, (-1 + kv_idx + kv_len + (-1 * q_idx))])"
    check_fused(fn, *args, dynamic=True)


def test_sizes_that_are_quotients_are_computed_by_the_graph() -> None:
    """A length behind a strided window is a division of the input's; the kernel gets it as one number.

    The queries are a product of activations themselves, whose sizes were taken for axes that only one side has.
    """

    def fn(x: Any, w: Any, table: Any) -> Any:
        q = (x.unfold(1, 6, 3)[..., :D] @ w).view(x.shape[0], -1, H, D).transpose(1, 2)
        return attend(q @ q.mT + padded(q @ table[:, : 2 * q.shape[2] - 1].mT), q)

    args = (torch.randn(B, 20), torch.randn(6, H * D), torch.randn(H, 100, D))
    site = only_site(fn, *args, dynamic=True)
    assert "//" not in score_of(site.spec)
    assert "(-1 * q_idx)" in score_of(site.spec)
    check_fused(fn, *args, dynamic=True)


def selected(x: Any) -> Any:
    b, h, s, p = x.shape
    x = x.reshape(b, h, p, s)[:, :, 1:].reshape(b, h, s, p - 1)
    return torch.index_select(x, 3, torch.arange(s))


def sliced(x: Any) -> Any:
    b, h, s, p = x.shape
    return x.reshape(b, h, p, s)[:, :, 1:, :].reshape(b, h, s, p - 1)[..., :s]


@pytest.mark.parametrize("shift", [selected, sliced], ids=lambda f: f.__name__)
def test_relative_shift_without_padding(shift: Callable[..., Any]) -> None:
    """One position more than the distances there are, so that dropping a row shifts."""

    def fn(q: Any, k: Any, v: Any, table: Any) -> Any:
        return attend(q @ k.mT + shift(q @ table.mT), v)

    args = (*qkv(), torch.randn(H, 2 * S, D))
    assert score_of(only_site(fn, *args).spec) == "(qk + t0[n0, n1, q_idx, (6 + kv_idx + (-1 * q_idx))])"
    check_fused(fn, *args)


def causal_shift(q: Any, k: Any, v: Any, table: Any) -> Any:
    bd = q @ table.mT
    x = torch.cat([bd.new_zeros(B, H, S, 1), bd], -1).view(B, H, S + 1, S)[:, :, 1:].view_as(bd)
    return attend((q @ k.mT + x).masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -INF), v)


def causal_shift_padded(q: Any, k: Any, v: Any, table: Any) -> Any:
    x = F.pad(q @ table.mT, (1, 0)).reshape(B, H, S + 1, S)[:, :, 1:].reshape(B, H, S, S)
    i = torch.arange(S)
    return attend(torch.where(i[None] > i[:, None], -INF, q @ k.mT + x), v)


@pytest.mark.parametrize("fn", [causal_shift, causal_shift_padded], ids=lambda f: f.__name__)
def test_the_wrapped_half_of_a_shift_is_gone_where_a_mask_drops_it(fn: Callable[..., Any]) -> None:
    args = (*qkv(), torch.randn(H, S, D))
    shifted = "(qk + t0[n0, n1, q_idx, (5 + kv_idx + (-1 * q_idx))])"
    assert shifted in score_of(only_site(fn, *args).spec)
    assert "//" not in score_of(only_site(fn, *args).spec)
    assert score_of(only_site(fn, *args).spec).count("t0[") == 1
    check_fused(fn, *args)


def test_the_wrapped_half_of_a_shift_is_a_choice_without_a_mask() -> None:
    def fn(q: Any, k: Any, v: Any, table: Any) -> Any:
        bd = q @ table.mT
        x = torch.cat([bd.new_zeros(B, H, S, 1), bd], -1).view(B, H, S + 1, S)[:, :, 1:].view_as(bd)
        return attend(q @ k.mT + x, v)

    args = (*qkv(), torch.randn(H, S, D))
    text = score_of(only_site(fn, *args).spec)
    assert text.startswith("(qk + where((kv_idx < (1 + q_idx)), t0[n0, n1, q_idx, (5 + kv_idx + (-1 * q_idx))], where(")
    assert "t0[n0, n1, (1 + q_idx), (-2 + kv_idx + (-1 * q_idx))]" in text
    check_fused(fn, *args)


# --------------------------------------------------------------------------------------------------------------------
# Every other layout, on a bias b[h, i, j] of the graph

LAYOUTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "pad": (lambda b: F.pad(b, (1, -1)), "where((0 < kv_idx), t0[n1, q_idx, (-1 + kv_idx)], 0.0)"),
    "pad_rows": (
        lambda b: F.pad(b, (0, 0, 2, -2), value=-3.0),
        "where((1 < q_idx), t0[n1, (-2 + q_idx), kv_idx], -3.0)",
    ),
    "pad_behind": (
        lambda b: F.pad(b[..., 2:], (0, 2)),
        "where((kv_idx < 4), t0[n1, q_idx, (2 + kv_idx)], 0.0)",
    ),
    "roll": (
        lambda b: b.roll(2, -1),
        "where((kv_idx < 2), t0[n1, q_idx, (4 + kv_idx)], t0[n1, q_idx, (-2 + kv_idx)])",
    ),
    "roll_back": (
        lambda b: torch.roll(b, shifts=(-1,), dims=(1,)),
        "where((q_idx < 5), t0[n1, (1 + q_idx), kv_idx], t0[n1, (-5 + q_idx), kv_idx])",
    ),
    "flip": (lambda b: b.flip(-1), "t0[n1, q_idx, (5 + (-1 * kv_idx))]"),
    "fliplr": (torch.fliplr, "t0[n1, (5 + (-1 * q_idx)), kv_idx]"),
    "unfold": (
        lambda b: torch.cat([b[:, 0], b[:, 1, :-1]], -1).unfold(-1, S, 1),
        "where(((kv_idx + q_idx) < 6), t0[n1, 0, (kv_idx + q_idx)], t0[n1, 1, (-6 + kv_idx + q_idx)])",
    ),
    "diagonal": (lambda b: b.diagonal(0, 0, 1)[None].expand(S, S, H).permute(2, 0, 1), "t0[n1, n1, kv_idx]"),
    "as_strided": (lambda b: b.as_strided((H, S, S), (S * S, 1, S)), "t0[n1, kv_idx, q_idx]"),
    "stack": (lambda b: torch.stack([b[:, :, 0], b[:, :, 1]], -1).repeat_interleave(3, -1), ""),
    "unbind": (lambda b: torch.stack(b.unbind(1), 1), ""),
    "chunk": (
        lambda b: torch.cat(b.chunk(2, -1)[::-1], -1),
        "where((kv_idx < 3), t0[n1, q_idx, (3 + kv_idx)], t0[n1, q_idx, (-3 + kv_idx)])",
    ),
    "tensor_split": (lambda b: torch.cat(b.tensor_split(2, 1)[::-1], 1), ""),
    "narrow": (lambda b: torch.cat([b.narrow(2, 2, 4), b.narrow(-1, 0, 2)], -1), ""),
    "movedim": (lambda b: b.movedim(1, 2), "t0[n1, kv_idx, q_idx]"),
    "swapaxes": (lambda b: b.swapaxes(1, 2), "t0[n1, kv_idx, q_idx]"),
    "tile": (lambda b: torch.tile(b[:2], (2, 1, 1)), "t0[n2, q_idx, kv_idx]"),
    "repeat_interleave": (lambda b: b[:2].repeat_interleave(2, 0), "t0[n1, q_idx, kv_idx]"),
    "unflatten": (lambda b: b.unflatten(2, (2, 3)).flatten(1).view(H, S, S), "t0[n1, q_idx, kv_idx]"),
    "pixel_windows": (
        lambda b: b.view(H, 2, 3, 2, 3).transpose(1, 2).reshape(H, S, S),
        "t0[n1, ((3 * (q_idx % 2)) + (q_idx // 2)), kv_idx]",
    ),
    "index_select": (
        lambda b: b.index_select(1, torch.arange(S - 1, -1, -1)),
        "t0[n1, (5 + (-1 * q_idx)), kv_idx]",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_index_maps(name: str) -> None:
    layout, text = LAYOUTS[name]

    def fn(q: Any, k: Any, v: Any, b: Any) -> Any:
        return attend(q @ k.mT + layout(b), v)

    args = (*qkv(), torch.randn(H, S, S))
    site = only_site(fn, *args)
    if text:
        assert score_of(site.spec) == f"(qk + {text})"
    assert {n.op for n in site.captured} == {"placeholder"}
    check_fused(fn, *args)


def test_a_permuted_copy_is_read_where_keys_lie_side_by_side() -> None:
    """The user's copy is as large as its source, and a kernel reads rows of it instead of single numbers."""

    def fn(q: Any, k: Any, v: Any, b: Any, copied: bool) -> Any:
        b = b.permute(2, 0, 1)
        return attend(q @ k.mT + (b.contiguous() if copied else b), v)

    args = (*qkv(), torch.randn(S, S, H))
    assert only_site(fn, *args, False).captured[0].op == "placeholder"
    assert only_site(fn, *args, True).captured[0].name == "contiguous"


def test_a_copy_of_an_expanded_bias_is_seen_through() -> None:
    def fn(q: Any, k: Any, v: Any, b: Any) -> Any:
        return attend(q @ k.mT + b.expand(B, H, S, S).clone(), v)

    assert only_site(fn, *qkv(), torch.randn(H, S, S)).captured[0].op == "placeholder"
