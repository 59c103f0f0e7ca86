"""Mask structure: words, fills, what data decides, and rows that keep a key."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
from torch.utils._sympy.functions import FloorDiv

from flashfuse.kernels.bounds import Q_START, Q_STOP
from flashfuse.kernels.expr import Expr
from flashfuse.kernels.mask import analyze, may_cancel
from flashfuse.kernels.normal import conjunction, conjuncts
from flashfuse.kernels.predicate import normal
from flashfuse.kernels.solve import solved
from flashfuse.kernels.spec import KV_IDX, KV_LEN, Q_IDX, Q_LEN, parse, to_text

MIN = torch.finfo(torch.float32).min
CAPTURED = (torch.bool, torch.float32, torch.int64)


@pytest.mark.parametrize(
    ("score", "words", "fill", "full"),
    [
        ("qk * 0.5", "none", None, "qk * 0.5"),
        ("where(kv_idx <= q_idx, qk, -inf)", "causal", -math.inf, "qk"),
        ("where(kv_idx > q_idx, -inf, qk)", "causal", -math.inf, "qk"),
        ("where(~(kv_idx > q_idx), qk, -inf)", "causal", -math.inf, "qk"),
        (f"qk + where(kv_idx <= q_idx, 0.0, {MIN!r})", "causal", MIN, "qk"),
        (f"qk - where(kv_idx <= q_idx, 0.0, {-MIN!r})", "causal", MIN, "qk"),
        (f"(qk + t1[kv_idx]) + (1.0 - to_float(kv_idx <= q_idx)) * {MIN!r}", "causal", MIN, "qk + t1[kv_idx]"),
        ("where(kv_idx <= q_idx + (kv_len - q_len), qk, -10000.0)", "causal (bottom-right)", -1e4, "qk"),
        ("where((kv_idx <= q_idx) & (kv_idx > q_idx + -1024), qk, -inf)", "causal, window 1024", -math.inf, "qk"),
        ("where((kv_idx > q_idx) | (q_idx + -1 * size0 >= kv_idx), -inf, qk)", "causal, window size0", -math.inf, "qk"),
        ("where((kv_idx <= q_idx + 3) & (kv_idx >= q_idx + -3), qk, -inf)", "window -3..3", -math.inf, "qk"),
        ("where(abs(q_idx - kv_idx) <= 8, qk, -inf)", "window -8..8", -math.inf, "qk"),
        (
            "where((kv_idx <= q_idx) & t0[kv_idx], qk, -inf)",
            "causal, padding (t0)",
            -math.inf,
            "where(t0[kv_idx], qk, -inf)",
        ),
        (
            "where((kv_idx < size0) | t0[kv_idx], qk, -inf)",
            "prefix size0 or padding (t0)",
            None,
            "qk",
        ),
        ("where(kv_idx > q_idx, qk + -10000.0, qk)", "none", None, "where(kv_idx > q_idx, qk + -10000.0, qk)"),
        ("where(kv_idx <= q_idx, qk, -100.0)", "none", None, "where(kv_idx <= q_idx, qk, -100.0)"),
        (
            "where((kv_idx <= q_idx) & (kv_idx // 8 == q_idx // 8), qk, -inf)",
            "chunks of 8, causal",
            -math.inf,
            "qk",
        ),
        ("where(kv_idx // 8 <= q_idx // 8, qk, -inf)", "causal in blocks of 8", -math.inf, "qk"),
        ("where((kv_idx <= q_idx) | (kv_idx < size0), qk, -inf)", "causal or prefix size0", -math.inf, "qk"),
        (
            "where((kv_idx <= q_idx) & ((q_idx - kv_idx) % 2 == 0), qk, -inf)",
            "causal, dilated by 2",
            -math.inf,
            "where((q_idx - kv_idx) % 2 == 0, qk, -inf)",
        ),
        (
            "where((kv_idx <= q_idx) & (t2[n0, q_idx] == t2[n0, kv_idx]), qk, -inf)",
            "causal, documents (t2)",
            -math.inf,
            "where(t2[n0, q_idx] == t2[n0, kv_idx], qk, -inf)",
        ),
        ("where(kv_idx < t2[n0], qk, -inf)", "lengths (t2)", None, "where(kv_idx < t2[n0], qk, -inf)"),
        (
            "where(kv_idx <= t2[n0, q_idx], qk, -inf)",
            "positions (t2)",
            None,
            "where(kv_idx <= t2[n0, q_idx], qk, -inf)",
        ),
        ("where(t0[n0, 0, q_idx, kv_idx], qk, -inf)", "mask (t0)", None, "where(t0[n0, 0, q_idx, kv_idx], qk, -inf)"),
        (
            "where((kv_idx - kv_idx // 4) % 3 == 1, qk, -inf)",
            "(((kv_idx + (-1 * (kv_idx // 4))) % 3) == 1)",
            None,
            "where((kv_idx - kv_idx // 4) % 3 == 1, qk, -inf)",
        ),
    ],
)
def test_structure(score: str, words: str, fill: float | None, full: str) -> None:
    structure = analyze(parse(score, CAPTURED))
    assert structure.describe() == words
    assert structure.fill == fill
    assert to_text(structure.full) == to_text(parse(full, CAPTURED))


@pytest.mark.parametrize(
    ("score", "needed", "idle", "unmasked"),
    [
        ("where((kv_idx <= q_idx) & t0[n0, kv_idx], qk, -inf)", None, None, "qk"),
        ("where(t2[n0, q_idx] != t2[n0, kv_idx], -inf, qk)", "t2[n0, q_idx] == t2[n0, kv_idx]", None, "qk"),
        (f"qk + where(t0[n0, kv_idx], 0.0, {MIN!r})", "t0[n0, kv_idx]", None, "qk"),
        # Along keys alone an added tensor stays.
        ("qk + t1[n0, kv_idx]", "t1[n0, kv_idx] > LIMIT", "True", "qk + t1[n0, kv_idx]"),
        ("qk + t1[n0, 0, q_idx, kv_idx]", "t1[n0, 0, q_idx, kv_idx] > LIMIT", "t1[n0, 0, q_idx, kv_idx] == 0.0", "qk"),
        ("where(kv_idx <= q_idx, qk + t1[kv_idx], -inf)", "(kv_idx <= q_idx) & (t1[kv_idx] > LIMIT)", "kv_idx <= q_idx",
         "qk + t1[kv_idx]"),
        # A bias of each head is no mask, and neither is a tensor that only sometimes reaches the score.
        ("qk + t1[n0, n1, q_idx, kv_idx]", "True", "True", "qk + t1[n0, n1, q_idx, kv_idx]"),
        ("where(kv_idx < 4, qk + t1[kv_idx], qk)", "True", "True", "where(kv_idx < 4, qk + t1[kv_idx], qk)"),
    ],
)  # fmt: skip
def test_what_data_decides(score: str, needed: str | None, idle: str | None, unmasked: str) -> None:
    def read(text: str) -> Expr:
        return parse(text.replace("LIMIT", "-1e+30"), CAPTURED) if text != "True" else conjunction([])

    structure = analyze(parse(score, CAPTURED))
    wanted = read(needed) if needed is not None else structure.needed
    assert to_text(structure.needed) == to_text(wanted)
    assert to_text(structure.idle) == to_text(wanted if idle is None else read(idle))
    assert to_text(structure.unmasked) == to_text(parse(unmasked, CAPTURED))


SEEN = "(where(kv_idx <= q_idx, qk, -inf) + t1[kv_idx])"


@pytest.mark.parametrize("normaliser", ["softmax", "none"])
@pytest.mark.parametrize("score", [f"{SEEN} + {SEEN} * tanh({SEEN})", f"{SEEN} - {SEEN} * 2.0"])
def test_a_fill_that_becomes_nan_masks_nothing(score: str, normaliser: str) -> None:
    """Keys that no row of a tile sees were skipped, and its rows were numbers where eager code gives NaN."""
    assert analyze(parse(score, CAPTURED), normaliser).describe() == "none"


def test_weights_are_masked_where_they_are_zero() -> None:
    """Without a softmax a masked score is 0, however the source brings that about."""
    for score in ("sigmoid(where(kv_idx <= q_idx, qk, -inf))", "where(kv_idx <= q_idx, sigmoid(qk), 0.0)",
                  f"sigmoid(qk + where(kv_idx <= q_idx, 0.0, {MIN!r}))"):  # fmt: skip
        structure = analyze(parse(score), "none")
        assert (structure.describe(), structure.fill_threshold()) == ("causal", None)
        assert to_text(structure.full) == "sigmoid(qk)"
        assert analyze(parse(score)).describe() == "none"
    added = analyze(parse("sigmoid(qk + t1[n0, kv_idx])", CAPTURED), "none")
    assert to_text(added.needed) == "(t1[n0, kv_idx] > -1e+30)"


def test_fill_threshold_lies_above_the_fill_and_below_scores() -> None:
    window = "(kv_idx <= q_idx) & (kv_idx > q_idx - 8)"
    threshold = lambda fill: analyze(parse(f"where({window}, qk, {fill})")).fill_threshold()  # noqa: E731
    assert threshold("-inf") is None
    assert threshold("-10000.0") == -10000.0 + 128
    assert threshold(repr(MIN)) == MIN / 2


@pytest.mark.parametrize(
    ("predicate", "always", "fewer_queries"),
    [
        ("kv_idx <= q_idx", True, True),
        ("(kv_idx <= q_idx) | (kv_idx < size0)", True, True),
        ("kv_idx >= q_idx", False, True),
        ("(kv_idx <= q_idx) & (kv_idx > q_idx - 8)", False, True),
        ("(kv_idx <= q_idx + kv_len - q_len) & (kv_idx > q_idx + kv_len - q_len - 8)", False, True),
        ("(kv_idx <= q_idx) & (kv_idx // 8 == q_idx // 8)", False, True),
        ("kv_idx <= q_idx - 1", False, False),
        ("kv_idx < size0", False, False),
        ("(kv_idx <= q_idx) & t0[kv_idx]", False, False),
    ],
)
def test_rows_that_provably_keep_a_key(predicate: str, always: bool, fewer_queries: bool) -> None:
    """Such rows never visit the keys behind a hugely negative fill; a tensor that is added may be a fill of its own."""
    structure = analyze(parse(f"where({predicate}, qk, {MIN!r})", CAPTURED))
    assert (structure.keeps_key(), structure.keeps_key(fewer_queries=True)) == (always, fewer_queries)
    if structure.bounded:
        assert (structure.fill_threshold() is None) == always
    assert not analyze(parse(f"where({predicate}, qk + t1[kv_idx], {MIN!r})", CAPTURED)).keeps_key(fewer_queries=True)


def test_predicates_are_solved_for_keys() -> None:
    line = solved("le", FloorDiv(KV_IDX - 3, sympy.Integer(4)), FloorDiv(Q_IDX, sympy.Integer(2)))
    assert line is not None
    assert (line.upper, line.at) == (True, 4 * FloorDiv(Q_IDX, 2) + 6)
    assert solved("le", KV_IDX - FloorDiv(KV_IDX, sympy.Integer(4)), Q_IDX) is None


def test_normal_form_opens_what_comparisons_hold() -> None:
    predicate = parse("~((abs(q_idx - kv_idx) > 4) | (min(q_idx, kv_idx) < 2))")
    assert [to_text(t) for t in conjuncts(normal(predicate))] == [
        "((q_idx + (-1 * kv_idx)) <= 4)", "((kv_idx + (-1 * q_idx)) <= 4)", "(q_idx >= 2)", "(kv_idx >= 2)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "predicate",
    [
        "((q_idx - kv_idx) % 3 == 0) & (kv_idx <= q_idx) & (q_idx - kv_idx < 64)",
        "~((kv_idx > q_idx) | ((q_idx - kv_idx) % 3 != 0) | (q_idx - kv_idx >= 64))",
    ],
)
def test_what_no_rule_reads_leaves_the_bounds_of_the_rest(predicate: str) -> None:
    """Of a dilated window the window bounds the keys, and between its edges only the remainder is looked at."""
    mask = analyze(parse(f"where({predicate}, qk, -inf)", (), torch.float32))
    tile = {Q_START: 512, Q_STOP: 640, Q_LEN: 1024, KV_LEN: 1024}
    assert mask.bounds.kv_range(tile) == (512 - 63, 576, 576, 640)
    tile |= {Q_STOP: 528}
    assert mask.bounds.kv_range(tile) == (512 - 63, 527 - 63, 513, 528)
    assert "%" in to_text(mask.full)
    assert "<" not in to_text(mask.full)


@pytest.mark.parametrize(
    ("predicate", "fewer_queries", "ends"),
    [
        ("kv_idx <= q_idx", True, True),
        ("kv_idx <= q_idx", False, False),
        ("kv_idx <= q_idx + (kv_len - q_len)", False, True),
        ("(kv_idx <= q_idx) & (kv_idx > q_idx - 9)", True, True),
        ("kv_idx <= q_idx + 1", True, False),
        ("kv_idx <= q_len - 1 - q_idx", True, False),
        ("kv_idx <= q_len - 1 - q_idx", False, False),
        ("kv_idx <= kv_len - q_idx", False, False),
        ("kv_idx + q_idx < q_len + kv_len - 1", False, False),
        ("kv_idx < size0", True, False),
        ("kv_idx < kv_len - 3", False, True),
    ],
)
def test_which_masks_end_the_keys(predicate: str, fewer_queries: bool, ends: bool) -> None:
    """The last query was taken to reach furthest, which it does not where the mask falls with it."""
    mask = analyze(parse(f"where({predicate}, qk, -inf)"))
    assert mask.ends_keys(fewer_queries) == ends
    assert not analyze(parse(f"where({predicate}, qk, -1e9)")).ends_keys(fewer_queries)


CANCELLED = [
    "where(t0[kv_idx], qk, -1e30) - where(t0[kv_idx], 0.0, -1e30)",
    "(qk + where(t0[kv_idx], 0.0, -1e30)) - where(t0[kv_idx], 0.0, -1e30)",
    "(qk + where(t0[kv_idx], 0.0, -1e30)) + 1e30",
    "(qk + where(t0[kv_idx], 0.0, -1e30)) + -2.0 * where(kv_idx <= q_idx, 0.0, -1e30)",
    "where(t0[kv_idx], qk, -1e30) + t1[kv_idx] * where(kv_idx <= q_idx, 0.0, -1e30)",
    "(qk + where(t0[kv_idx], 0.0, -1e20)) - where(t0[kv_idx], 0.0, -1e20)",
]


@pytest.mark.parametrize("score", CANCELLED)
def test_a_fill_that_another_constant_takes_away(score: str) -> None:
    """Whatever was behind the first constant of a sum was not looked at: what is no mask was skipped as one."""
    program = parse(score, CAPTURED)
    assert analyze(program).data_fill is None
    assert may_cancel(program)


@pytest.mark.parametrize(
    "score",
    [
        "where(t0[kv_idx], qk, -1e30) + where(kv_idx <= q_idx, 0.0, -1e30)",
        "(qk + where(t0[kv_idx], 0.0, -1e31)) * 0.5 - 100.0",
        "tanh(where(t0[kv_idx], qk, -1e30)) * 20.0 + where(kv_idx <= q_idx, 0.0, -1e30)",
        "(qk + where(t0[kv_idx], 0.0, -1e30)) / 8.0 + -1.0 * where(kv_idx <= q_idx, 0.0, 1e30)",
    ],
)
def test_constants_that_agree(score: str) -> None:
    program = parse(score, CAPTURED)
    fill = analyze(program).data_fill
    assert fill is not None
    assert fill <= -1e29
    assert not may_cancel(program)
