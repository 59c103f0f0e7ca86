"""Mask structure: words, fills, and every bound against enumeration of random predicates."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import sympy
import torch
from torch.utils._sympy.functions import FloorDiv

from flashfuse.kernels.bounds import Q_START, Q_STOP
from flashfuse.kernels.evaluate import Tile, evaluate
from flashfuse.kernels.expr import Const, Expr
from flashfuse.kernels.intervals import Grid, interval
from flashfuse.kernels.mask import MaskStructure, analyze
from flashfuse.kernels.normal import conjunction, conjuncts
from flashfuse.kernels.predicate import normal
from flashfuse.kernels.ranges import mask_ranges
from flashfuse.kernels.solve import solved
from flashfuse.kernels.spec import KV_IDX, KV_LEN, Q_IDX, Q_LEN, batch_symbol, parse, size_symbol, to_text

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


# --------------------------------------------------------------------------------------------------------------------
# Random predicates against enumeration

Data = Sequence[torch.Tensor]
POSITIONAL = [
    "{kv} * kv_idx + {c} {op} {q} * q_idx + {extra}",
    "kv_idx // {n} {op} q_idx // {n}",
    "(kv_idx + {c}) // {n} {op} (q_idx * {q} + {extra}) // {m}",
    "abs(q_idx - kv_idx) {op} {n}",
    "max(q_idx, kv_idx) {op} min(kv_idx + {c}, {extra})",
    "kv_idx {op} {extra}",
    "q_idx {op} {extra}",
    "(q_idx - kv_idx + {extra}) % {n} {op} {c}",
]
DATA = [
    "t0[n0, kv_idx]",
    "t0[n0, q_idx]",
    "t1[n0, q_idx, kv_idx]",
    "t2[n0, q_idx] {op} t2[n0, kv_idx]",
    "kv_idx {op} t2[n0, q_idx] + {c}",
    "kv_idx {op} t3[n0] * {q}",
    "t4[kv_idx] {op} {f}",
    "abs(t4[q_idx]) {op} max(t4[kv_idx], {f})",
    "t1[n0, q_idx, kv_idx] == t0[n0, q_idx]",
    "to_bool(where(t0[n0, kv_idx], t3[n0], {c}))",
    "t4[kv_idx] * t4[q_idx] {op} {f}",
    "to_float(kv_idx - q_idx) {op} t4[q_idx]",
]
TYPES = (torch.bool, torch.bool, torch.int64, torch.int32, torch.float32)


def random_predicate(rng: random.Random, terms: Sequence[str], depth: int) -> str:
    if depth == 0:
        return "(" + rng.choice(terms).format(
            op=rng.choice(["<", "<=", ">", ">=", "==", "!="]), kv=rng.choice([-2, -1, 1, 1, 3]),
            q=rng.choice([-2, -1, 0, 1, 2]), c=rng.randint(-9, 9), n=rng.randint(1, 6), m=rng.randint(1, 6),
            f=rng.choice([-0.5, 0.0, 0.5]), extra=rng.choice(["0", "size0", "(kv_len - q_len)", "(0 - size0)", "5"]),
        ) + ")"  # fmt: skip
    joined = rng.choice(["({} & {})", "({} | {})", "(~{})", "where({}, {}, {})"])
    return joined.format(*(random_predicate(rng, terms, depth - 1) for _ in range(joined.count("{}"))))


def truth(
    predicate: Expr, sizes: dict[sympy.Symbol, int], batch: int, captured: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The predicate at every position [batch, q_len, kv_len]."""
    shape = (batch, sizes[Q_LEN], sizes[KV_LEN])
    axes = tuple(zip((batch_symbol(0), Q_IDX, KV_IDX), map(range, shape), strict=True))
    return evaluate(predicate, Tile(axes, sizes, (), captured, torch.float32, torch.device("cpu"))).expand(shape)


def assert_bounds_hold(bounds: Sequence[int], some: torch.Tensor, every: torch.Tensor, kv_len: int) -> None:
    """No key outside [start, end) is in `some` [kv_len], every key of [full_start, full_end) in `every`."""
    start, full_start, full_end, end = bounds
    assert 0 <= start <= full_start <= full_end <= end <= kv_len
    assert not some[:start].any()
    assert not some[end:].any()
    assert every[full_start:full_end].all()


def structure_of(predicate: str, fill: str = "-inf") -> MaskStructure | None:
    """The structure of a masked score; None where the predicate turned out to be constant."""
    parsed = parse(predicate, TYPES)
    return None if isinstance(parsed, Const) else analyze(parse(f"where({predicate}, qk, {fill})", TYPES))


@pytest.mark.parametrize("seed", range(60))
def test_bounds_and_kept_keys_against_enumeration(seed: int) -> None:
    """Positions: every key that bounds exclude is masked, and what `full` leaves out is true on every full key."""
    rng = random.Random(seed)
    predicate = random_predicate(rng, POSITIONAL, rng.choice([0, 1, 1, 2, 3]))
    structure = structure_of(predicate)
    if structure is None:
        return
    for q_len, kv_len, block in ((1, 11, 4), (9, 1, 4), (9, 14, 4), (12, 12, 5)):
        sizes = {Q_LEN: q_len, KV_LEN: kv_len, size_symbol(0): rng.randint(0, 6)}
        allowed = truth(parse(predicate), sizes, 1, ())[0]
        # What the full score still masks is not for the bounds to know.
        left = analyze(structure.full).needed
        assumed = allowed | ~truth(left, sizes, 1, ())[0] if not isinstance(left, Const) else allowed
        for q_start in range(0, q_len, block):
            rows = slice(q_start, min(q_start + block, q_len))
            values = {**sizes, Q_START: rows.start, Q_STOP: rows.stop}
            bounds = structure.bounds.kv_range(values)
            assert_bounds_hold(bounds, allowed[rows].any(0), assumed[rows].all(0), kv_len)
        if structure.keeps_key(fewer_queries=q_len <= kv_len):
            assert allowed.any(-1).all()


@pytest.mark.parametrize("op", ["<", "<=", ">", ">=", "==", "!="])
@pytest.mark.parametrize("seed", range(3))
def test_bounds_of_one_comparison_are_tight(op: str, seed: int) -> None:
    """Of one comparison with kv_idx once, the bounds are the very keys that some query, and every query, attends to."""
    rng = random.Random(seed)
    for text in ("kv_idx + {c} {op} {q} * q_idx + {extra}", "kv_idx // {n} {op} q_idx // {n}", "kv_idx {op} {extra}"):
        q, c, n, extra = rng.choice([-1, 1, 2]), rng.randint(-9, 9), rng.randint(2, 5), rng.choice(["size0", "3"])
        predicate = text.format(op=op, q=q, c=c, n=n, extra=extra)
        structure = structure_of(predicate)
        if structure is None:
            continue
        sizes = {Q_LEN: 9, KV_LEN: 14, size_symbol(0): 4}
        allowed = truth(parse(predicate), sizes, 1, ())[0]
        for q_start in range(0, 9, 4):
            rows = slice(q_start, min(q_start + 4, 9))
            tile = {Q_START: rows.start, Q_STOP: rows.stop}
            start, full_start, full_end, end = structure.bounds.kv_range({**sizes, **tile})
            seen = [kv for kv in range(14) if allowed[rows, kv].any()]
            # What `!=` leaves out lies between keys that it does not.
            assert op == "!=" or not seen or (start, end) == (seen[0], seen[-1] + 1)
            full = allowed[rows].all(0)
            longest = max((len(run) for run in "".join("01"[int(x)] for x in full).split("0")), default=0)
            assert full_end - full_start == longest


def random_data(rng: random.Random, batch: int, q_len: int, kv_len: int) -> list[torch.Tensor]:
    """Tensors in runs, so that some tiles are uniform; `TYPES` are their element types."""
    generator = torch.Generator().manual_seed(rng.randint(0, 1 << 30))
    length = max(q_len, kv_len)

    def runs(*shape: int, high: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator).sort(-1).values

    numbers = torch.randn(length, generator=generator).round(decimals=1)
    numbers[length // 2 :] = rng.choice([0.5, math.inf, math.nan])
    dense = runs(batch, q_len, kv_len, high=2).bool().roll(rng.randint(0, kv_len), -1)
    keep, documents = runs(batch, length, high=2).bool(), runs(batch, length, high=4) * (kv_len // 4)
    return [keep, dense, documents, runs(batch, high=9).int(), numbers]


@pytest.mark.parametrize("seed", range(60))
def test_intervals_against_enumeration(seed: int) -> None:
    """On every tile, true throughout and false throughout are said only of predicates that are."""
    rng = random.Random(seed)
    predicate = parse(random_predicate(rng, [*POSITIONAL, *DATA], rng.choice([0, 0, 1, 2])), TYPES)
    batch, q_len, kv_len, block_q, block_kv = 2, rng.randint(1, 14), rng.randint(1, 19), 4, 3
    sizes = {Q_LEN: q_len, KV_LEN: kv_len, size_symbol(0): rng.randint(1, 6)}
    data = random_data(rng, batch, q_len, kv_len)
    grid = Grid(((batch_symbol(0), batch),), sizes, data, block_q, block_kv, torch.device("cpu"))
    found = interval(predicate, grid)
    assert found is not None
    every, some = (x.expand(batch, *grid.tiles) for x in found)
    allowed = truth(predicate, sizes, batch, data)
    for b, tile_q, tile_kv in torch.cartesian_prod(*map(torch.arange, (batch, *grid.tiles))).tolist():
        tile = allowed[b, tile_q * block_q : (tile_q + 1) * block_q, tile_kv * block_kv : (tile_kv + 1) * block_kv]
        assert not every[b, tile_q, tile_kv] or tile.all()
        assert some[b, tile_q, tile_kv] or not tile.any()


@pytest.mark.parametrize("seed", range(20))
def test_ranges_against_enumeration(seed: int) -> None:
    rng = random.Random(seed)
    text = random_predicate(rng, [*POSITIONAL, *DATA], rng.choice([0, 1, 2]))
    batch, q_len, kv_len, size = 2, rng.randint(1, 300), rng.randint(1, 300), rng.randint(1, 200)
    data = random_data(rng, batch, q_len, kv_len)
    ranges = mask_ranges(data, [batch, size], 1, q_len, kv_len, text, text)
    assert (ranges.dtype, tuple(ranges.shape)) == (torch.int32, (batch, -(-q_len // 128), 4))
    allowed = truth(parse(text, TYPES), {Q_LEN: q_len, KV_LEN: kv_len, size_symbol(0): size}, batch, data)
    for b, block in torch.cartesian_prod(*map(torch.arange, ranges.shape[:2])).tolist():
        rows = allowed[b, block * 128 : (block + 1) * 128]
        assert_bounds_hold(ranges[b, block].tolist(), rows.any(0), rows.all(0), kv_len)


def test_ranges_skip_what_padding_and_documents_rule_out() -> None:
    """The ranges are not only right: padded keys and other documents are left out, tiles within a document are full."""
    keep = torch.arange(512) < torch.tensor([[200], [512]])
    padding = mask_ranges([keep], [2], 1, 256, 512, "t0[n0, kv_idx]", "t0[n0, kv_idx]")
    assert padding[:, 0].tolist() == padding[:, 1].tolist() == [[0, 0, 192, 256], [0, 0, 512, 512]]
    documents = "(t0[q_idx] == t0[kv_idx]) & (kv_idx <= q_idx)"
    ranges = mask_ranges([torch.arange(512) // 256], [], 0, 512, 512, documents, documents)
    assert ranges.tolist() == [
        [0, 128, 128, 128], [0, 0, 128, 256], [256, 384, 384, 384], [256, 256, 384, 512],
    ]  # fmt: skip
    added = torch.zeros(1, 1, 256, 256).masked_fill(torch.ones(256, 256).triu(1).bool(), -math.inf)
    score = analyze(parse("qk + t0[n0, 0, q_idx, kv_idx]", (torch.float32,)))
    ranges = mask_ranges([added], [1, 1], 2, 256, 256, to_text(score.needed), to_text(score.idle))
    assert ranges[0, 0].tolist() == [[0, 128, 128, 128], [0, 0, 128, 256]]


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
