"""Mask structure: words, fills, and every bound against enumeration."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import sympy
import torch

from flashfuse.kernels.expr import Expr, Index, Pointwise
from flashfuse.kernels.bounds import Q_START, Q_STOP
from flashfuse.kernels.mask import analyze
from flashfuse.kernels.spec import KV_IDX, KV_LEN, Q_IDX, Q_LEN, parse, size_symbol, to_text

MIN = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    ("score", "words", "fill", "full"),
    [
        ("qk * 0.5", "none", None, "qk * 0.5"),
        ("where(kv_idx <= q_idx, qk, -inf)", "causal", -math.inf, "qk"),
        ("where(kv_idx > q_idx, -inf, qk)", "causal", -math.inf, "qk"),
        ("where(~(kv_idx > q_idx), qk, -inf)", "causal", -math.inf, "qk"),
        (f"qk + where(kv_idx <= q_idx, 0.0, {MIN!r})", "causal", MIN, "qk"),
        (f"(qk + t1[kv_idx]) + (1.0 - to_float(kv_idx <= q_idx)) * {MIN!r}", "causal", MIN, "qk + t1[kv_idx]"),
        ("where(kv_idx <= q_idx + (kv_len - q_len), qk, -10000.0)", "causal (bottom-right)", -1e4, "qk"),
        ("where((kv_idx <= q_idx) & (kv_idx > q_idx + -1024), qk, -inf)", "causal, window 1024", -math.inf, "qk"),
        ("where((kv_idx > q_idx) | (q_idx + -1 * size0 >= kv_idx), -inf, qk)", "causal, window size0", -math.inf, "qk"),
        ("where((kv_idx <= q_idx + 3) & (kv_idx >= q_idx + -3), qk, -inf)", "window -3..3", -math.inf, "qk"),
        ("where((kv_idx <= q_idx) & t0[kv_idx], qk, -inf)", "causal", -math.inf, "where(t0[kv_idx], qk, -inf)"),
        (
            "where((kv_idx <= q_idx) | t0[kv_idx], qk, -inf)",
            "none",
            None,
            "where((kv_idx <= q_idx) | t0[kv_idx], qk, -inf)",
        ),
        ("qk + where(kv_idx <= q_idx, 0.0, -10000.0)", "none", None, "qk + where(kv_idx <= q_idx, 0.0, -10000.0)"),
        (
            "where((kv_idx <= q_idx) & (kv_idx // 8 == q_idx // 8), qk, -inf)",
            "kv_idx <= q_idx & ((kv_idx // 8) == (q_idx // 8))",
            -math.inf,
            "where(kv_idx // 8 == q_idx // 8, qk, -inf)",
        ),
    ],
)
def test_structure(score: str, words: str, fill: float | None, full: str) -> None:
    captured = (torch.bool, torch.float32)
    structure = analyze(parse(score, captured))
    assert structure.describe() == words
    assert structure.fill == fill
    assert to_text(structure.full) == to_text(parse(full, captured))


def test_fill_threshold_lies_above_the_fill_and_below_scores() -> None:
    threshold = lambda fill: analyze(parse(f"where(kv_idx <= q_idx, qk, {fill})")).fill_threshold()  # noqa: E731
    assert threshold("-inf") is None
    assert threshold("-10000.0") == -10000.0 + 128
    assert threshold(repr(MIN)) == MIN / 2


def _holds(predicate: Expr, q: int, kv: int, values: dict[sympy.Symbol, int]) -> bool:
    """Evaluate a predicate of affine comparisons at one position."""
    assert isinstance(predicate, Pointwise)
    if predicate.op == "and":
        return all(_holds(a, q, kv, values) for a in predicate.args)
    left, right = (int(a.value.subs({**values, Q_IDX: q, KV_IDX: kv})) for a in predicate.args if isinstance(a, Index))
    return {"lt": left < right, "le": left <= right, "gt": left > right, "ge": left >= right}[predicate.op]


def _random_comparison(rng: random.Random) -> str:
    op = rng.choice(["<", "<=", ">", ">="])
    kv, q = rng.choice([-1, 1]), rng.choice([-2, -1, 0, 1, 2])
    extra = rng.choice(["0", "size0", "(kv_len - q_len)", "(0 - size0)"])
    return f"({kv} * kv_idx + {rng.randint(-9, 9)} {op} {q} * q_idx + {extra})"


def _random_score(rng: random.Random, terms: int) -> Pointwise:
    """A masked score whose predicate has lines and is not decided by the signs of positions alone."""
    while True:
        score = parse(f"where({' & '.join(_random_comparison(rng) for _ in range(terms))}, qk, -inf)")
        if isinstance(score, Pointwise) and analyze(score).bounded:
            return score


@pytest.mark.parametrize("seed", range(24))
def test_bounds_are_exact_against_enumeration(seed: int) -> None:
    """Bounds of one line are tight; of several, every key they exclude is masked and every full key is not."""
    rng = random.Random(seed)
    terms = rng.choice([1, 1, 2, 3])
    score = _random_score(rng, terms)
    structure, predicate = analyze(score), score.args[0]
    for q_len, kv_len, block in itertools.product((1, 9), (1, 11), (1, 4)):
        values = {Q_LEN: q_len, KV_LEN: kv_len, size_symbol(0): rng.randint(1, 6)}
        for q_start in range(0, q_len, block):
            rows = range(q_start, min(q_start + block, q_len))
            bounds = structure.bounds.kv_range({**values, Q_START: rows.start, Q_STOP: rows.stop})
            assert 0 <= bounds.start <= bounds.full_start <= bounds.full_end <= bounds.end <= kv_len
            truth = [[_holds(predicate, q, kv, values) for q in rows] for kv in range(kv_len)]
            some, every = [any(t) for t in truth], [all(t) for t in truth]
            assert not any(some[: bounds.start] + some[bounds.end :])
            assert all(every[bounds.full_start : bounds.full_end])
            if terms == 1:
                visited = [kv for kv in range(kv_len) if some[kv]]
                assert not visited or (bounds.start, bounds.end) == (visited[0], visited[-1] + 1)
                assert sum(every) == bounds.full_end - bounds.full_start
