"""Every verdict on a mask, against enumeration of random predicates: bounds, kept keys, intervals, ranges."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import sympy
import torch

from flashfuse.kernels.bounds import Q_START, Q_STOP
from flashfuse.kernels.evaluate import Tile, evaluate
from flashfuse.kernels.expr import Const, Expr
from flashfuse.kernels.intervals import Grid, interval
from flashfuse.kernels.mask import MASK_BLOCK, MaskStructure, analyze
from flashfuse.kernels.ranges import mask_ranges, ranges_program
from flashfuse.kernels.spec import (
    KV_IDX,
    KV_LEN,
    Q_IDX,
    Q_LEN,
    AttentionSpec,
    batch_symbol,
    parse,
    size_symbol,
    to_text,
)

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
    assert (ranges.dtype, tuple(ranges.shape)) == (torch.int32, (batch, -(-q_len // MASK_BLOCK), 4))
    allowed = truth(parse(text, TYPES), {Q_LEN: q_len, KV_LEN: kv_len, size_symbol(0): size}, batch, data)
    for b, block in torch.cartesian_prod(*map(torch.arange, ranges.shape[:2])).tolist():
        rows = allowed[b, block * MASK_BLOCK : (block + 1) * MASK_BLOCK]
        assert_bounds_hold(ranges[b, block].tolist(), rows.any(0), rows.all(0), kv_len)


def test_ranges_skip_what_padding_and_documents_rule_out() -> None:
    """The ranges are not only right: padded keys and other documents are left out, tiles within a document are full."""
    keep = torch.arange(512) < torch.tensor([[200], [512]])
    padding = mask_ranges([keep], [2], 1, 256, 512, "t0[n0, kv_idx]", "t0[n0, kv_idx]")
    assert padding[:, 0].tolist() == padding[:, 1].tolist() == [[0, 0, 192, 256], [0, 0, 512, 512]]
    documents = "(t0[q_idx] == t0[kv_idx]) & (kv_idx <= q_idx)"
    ranges = mask_ranges([torch.arange(512) // 256], [], 0, 512, 512, documents, documents)
    within = [[0, 64, 64, 64], [0, 0, 64, 128], [0, 0, 128, 192], [0, 0, 192, 256]]
    assert ranges.tolist() == [*within, *([at + 256 for at in block] for block in within)]
    added = torch.zeros(1, 1, 256, 256).masked_fill(torch.ones(256, 256).triu(1).bool(), -math.inf)
    score = analyze(parse("qk + t0[n0, 0, q_idx, kv_idx]", (torch.float32,)))
    ranges = mask_ranges([added], [1, 1], 2, 256, 256, to_text(score.needed), to_text(score.idle))
    assert ranges[0, 0].tolist() == within


def test_ranges_leave_to_positions_what_those_decide() -> None:
    """A kernel knows for each of its tiles where all of a position's predicate holds, data only for whole blocks."""
    text, types = "where((t0[q_idx] == t0[kv_idx]) & (kv_idx <= q_idx), qk, -inf)", (torch.int64,)
    f32 = torch.float32
    spec = AttentionSpec(2, parse(text, types), types, 0, f32, f32, f32, "nan", (0, 1, 2, 3))
    program = ranges_program(spec, [2, 16], 512)
    assert program is not None
    assert program.needed == "((t0[q_idx] == t0[kv_idx]) & (kv_idx <= q_idx))"
    assert program.idle == "(t0[q_idx] == t0[kv_idx])"
