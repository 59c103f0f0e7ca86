"""Generated score programs: the scale taken out, what is loaded and where, files and names."""

import math
from pathlib import Path

import pytest
import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Mod

from flashfuse.kernels.scale import fills_of, peel_scale
from flashfuse.kernels.spec import KV_IDX, Q_IDX, AttentionSpec, parse, size_symbol, to_text

pytest.importorskip("triton")

from flashfuse.kernels.codegen import generate, load_program
from flashfuse.kernels.index_source import index_source

MIN = torch.finfo(torch.float32).min


def make_spec(
    score: str, *captured: torch.dtype, num_sizes: int = 0, dtype: torch.dtype = torch.float32
) -> AttentionSpec:
    return AttentionSpec(2, parse(score, captured), captured, num_sizes, dtype, dtype, dtype, "nan", (0, 1, 2, 3))


@pytest.mark.parametrize(
    ("score", "scale", "inner"),
    [
        ("qk", 1.0, "qk"),
        ("qk * 0.125", 0.125, "qk"),
        ("qk / 8.0", 0.125, "qk"),
        ("(qk * 0.5) * 0.25", 0.125, "qk"),
        ("where(kv_idx <= q_idx, qk * 0.125, -inf)", 0.125, "where(kv_idx <= q_idx, qk, -inf)"),
        ("where(kv_idx <= q_idx, qk * 0.5, -100.0)", 0.5, "where(kv_idx <= q_idx, qk, -200.0)"),
        (f"qk * 0.125 + where(t0[kv_idx], 0.0, {MIN!r})", 0.125, f"qk + where(t0[kv_idx], 0.0, {MIN!r})"),
        (f"qk * 0.1 + where(t0[kv_idx], 0.0, {MIN!r})", 0.1, f"qk + where(t0[kv_idx], 0.0, {MIN!r})"),
        ("qk * 0.125 + where(t0[kv_idx], 0.0, -1e4)", 0.125, "qk + where(t0[kv_idx], 0.0, -8e4)"),
        ("qk * 0.1 + where(t0[kv_idx], 0.0, -1e4)", 1.0, "qk * 0.1 + where(t0[kv_idx], 0.0, -1e4)"),
        ("tanh(qk * 0.02) * 50.0", 50.0, "tanh(qk * 0.02)"),
        ("qk * 0.125 + t1[kv_idx]", 1.0, "qk * 0.125 + t1[kv_idx]"),
        ("qk * -2.0", 1.0, "qk * -2.0"),
    ],
)
def test_scale_is_taken_out(score: str, scale: float, inner: str) -> None:
    captured = (torch.bool, torch.float32)
    found, rest = peel_scale(parse(score, captured))
    assert found == scale
    assert to_text(rest) == to_text(parse(inner, captured))


@pytest.mark.parametrize(
    ("score", "fills"),
    [
        ("where(t0[kv_idx], qk * 0.5, -1e10)", {-2e10: -1e10}),
        ("where(t0[kv_idx], qk, -1e10) * 0.5", {-1e10: -5e9}),
        (f"where(t0[kv_idx], qk, {MIN!r}) * 0.5", {MIN: MIN / 2}),
        ("qk * 0.5 + where(t0[kv_idx], 0.0, -1e10) - where(t0[q_idx], 0.0, 4e10)", {-2e10: -1e10, -8e10: -4e10,
         -1e11: -5e10}),
        ("where(t0[kv_idx], qk, to_bfloat16(qk + -1e9)) * 0.5", {-998244352.0: -499122176.0}),
        (f"qk * 0.5 + where(t0[kv_idx], 0.0, {MIN!r}) + where(t0[q_idx], 0.0, {MIN!r})", {MIN: MIN}),
    ],
)  # fmt: skip
def test_fills_and_the_scores_they_stand_for(score: str, fills: dict[float, float]) -> None:
    scale, _ = peel_scale(parse(score, (torch.bool,)))
    assert scale == 0.5
    assert dict(fills_of(parse(score, (torch.bool,)), scale)) == {rounded(x): rounded(y) for x, y in fills.items()}


def rounded(x: float) -> float:
    return torch.tensor(x).item()


@pytest.mark.parametrize(
    "score",
    [
        f"where(t0[kv_idx], qk, {MIN!r}) * 3.7",
        f"where(t0[kv_idx], qk * 0.5, -3e38) + where(t0[q_idx], 0.0, {MIN!r})",
        f"qk * 0.3 + where(t0[kv_idx], 0.0, {MIN / 2!r}) + where(t0[q_idx], 0.0, {MIN / 2!r})",
        f"where(t0[q_idx], where(t0[kv_idx], qk, {MIN!r}) * 0.25, {MIN!r})",
        "(qk + t1[kv_idx]) * 3.7",
    ],
)
def test_a_scale_stays_where_fills_would_not_be_told_apart(score: str) -> None:
    """Without it fills were equal, or finite, that the source has different, or infinite."""
    assert peel_scale(parse(score, (torch.bool, torch.float32)))[0] == 1.0


def test_plain_program_returns_the_product() -> None:
    _, source = generate(make_spec("where(kv_idx <= q_idx, qk * 0.125, -inf)"), fewer_queries=True)
    full = source[source.index("def score_full") : source.index("def kv_bounds")]
    assert "return qk" in full
    assert 'return tl.where((kv_idx <= q_idx), qk, float("-inf"))' in source


def test_full_tiles_load_without_masks() -> None:
    """Behind the last key only masked tiles reach; the last query is repeated, so rows need no mask."""
    _, source = generate(make_spec("qk + t0[n0, q_idx, kv_idx]", torch.float16))
    masked, full = source.split("def score_full")
    assert "mask=(kv_idx < kv_len)" in masked
    assert "mask=" not in full
    assert "n0.to(tl.int64) * strides[0][0] + q_idx.to(tl.int64) * strides[0][1] + kv_idx" in full


def test_reads_that_are_not_copied_ahead_come_before_the_product() -> None:
    """Behind it they decided how rows are laid out: 2500 instructions a tile instead of 710."""
    skewed, dense = "t0[n0, kv_idx - q_idx + 9]", "t0[n0, q_idx, kv_idx]"
    for read in (skewed, dense, "t0[n0, q_idx, kv_idx // 8]", "t0[kv_idx, q_idx]", "t0[n0, kv_idx]"):
        _, source = generate(make_spec(f"qk + {read}", torch.float32))
        masked, full = source.split("def score_full")
        assert (full.index("load(") < full.index("product(q, k")) == (read != dense), read
        # Under a mask nothing is copied ahead of time.
        assert masked.index("tl.load(") < masked.index("product(q, k"), read


def test_threads_next_to_each_other_read_from_one_row() -> None:
    """A look-up in rows of keys was made by threads along the keys: 32 rows of memory for each of its instructions."""
    bucket = "min(max(q_idx - kv_idx + 16, 0), 31)"
    for read, along in (("t0[n0, kv_idx, {}]", "q_idx"), ("t0[n0, q_idx, {}]", "kv_idx"), ("t0[n0, {}]", None)):
        _, source = generate(make_spec(f"qk + {read.format(bucket)}", torch.float32))
        assert ("load_along" in source) == (along is not None)
        assert along is None or f"None, {along})" in source


def test_a_load_that_where_discards_is_masked() -> None:
    _, source = generate(make_spec("qk + where(kv_idx < size0, t0[kv_idx], 0.0)", torch.float32, num_sizes=1))
    assert "mask=(kv_idx < sizes[0])" in source.split("def score_full")[1]


def test_shared_values_are_named_once() -> None:
    _, source = generate(make_spec("max(qk + t0[kv_idx], -(qk + t0[kv_idx]))", torch.float32))
    full = source.split("def score_full")[1]
    assert full.count("tl.load") == 1


def test_positions_become_floats_a_row_and_a_column_at_a_time() -> None:
    _, source = generate(make_spec("qk + to_float(kv_idx - q_idx + 3) * 0.5"))
    assert "(kv_idx.to(tl.float32) + (3 + (-1 * q_idx)).to(tl.float32))" in source
    _, source = generate(make_spec("qk + to_float(kv_idx * q_idx)"))
    assert "(tl.cast(kv_idx, tl.int64) * tl.cast(q_idx, tl.int64)).to(tl.float32)" in source


def test_functions_of_floats_take_floats() -> None:
    """The logarithm of an integer distance used to reach Triton as one of integers, which it has not."""
    _, source = generate(make_spec("qk - log(abs(kv_idx - q_idx) + 1) / 8"))
    assert "tl.log((" in source
    assert "+ 1)).to(tl.float32)) / 8)" in source
    _, source = generate(make_spec("qk - pow(kv_idx - q_idx, 2)"))
    assert "power((kv_idx.to(tl.float32) + (-1 * q_idx).to(tl.float32)), 2)" in source


def test_only_narrow_operands_take_the_bounded_tanh() -> None:
    assert "bounded_tanh" in generate(make_spec("tanh(qk)", dtype=torch.bfloat16))[1]
    assert "bounded_tanh" not in generate(make_spec("tanh(qk)", dtype=torch.float32))[1]


class TowardsZero(int):
    """An integer that divides as C, and so Triton, does."""

    def __floordiv__(self, other: int) -> "TowardsZero":
        return TowardsZero(math.trunc(int(self) / int(other)))

    def __mod__(self, other: int) -> "TowardsZero":
        return TowardsZero(math.fmod(int(self), int(other)))

    def __add__(self, other: int) -> "TowardsZero":
        return TowardsZero(int(self) + int(other))

    __radd__ = __add__

    def __sub__(self, other: int) -> "TowardsZero":
        return TowardsZero(int(self) - int(other))


@pytest.mark.parametrize("kv", [0, 5, 8, 9, 16])
def test_division_rounds_down(kv: int) -> None:
    values = {"kv_idx": TowardsZero(kv)}
    four = sympy.Integer(4)
    assert eval(index_source(FloorDiv(KV_IDX - 9, four)), values) == (kv - 9) // 4
    assert eval(index_source(Mod(KV_IDX - 9, four)), values) == (kv - 9) % 4
    assert index_source(FloorDiv(KV_IDX, size_symbol(0))) == "(kv_idx // sizes[0])"


def test_bits_of_positions() -> None:
    """64 where 32 may not do, and only there: scores with a distance take half as long in 32."""
    assert "int64" not in index_source(4095 + KV_IDX - Q_IDX)
    assert "int64" not in index_source(64 * FloorDiv(Q_IDX, 64) + Mod(KV_IDX, 64))
    assert index_source(Q_IDX * size_symbol(0)).count("int64") == 2
    assert index_source(1000 * Q_IDX).count("int64") == 1
    assert index_source(sympy.Integer(2**31)) == "tl.full((), 2147483648, tl.int64)"


def test_each_spec_has_its_own_file_and_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHFUSE_CACHE_DIR", str(tmp_path))
    programs = [load_program(make_spec(f"where(kv_idx <= q_idx + {n}, qk, -inf)")) for n in (11, 12)]
    assert len({p.path for p in programs}) == len({p.score_masked.fn.__name__ for p in programs}) == 2
    assert all(p.path.parent == tmp_path for p in programs)
    assert sorted(tmp_path.iterdir()) == sorted(p.path for p in programs)


def test_properties_the_kernel_is_compiled_for() -> None:
    causal = load_program(make_spec("where(kv_idx <= q_idx, qk * 0.5, -inf)"))
    assert (causal.scale, causal.fill_threshold, causal.large_scores, causal.longest_first) == (0.5, None, False, True)
    filled = load_program(make_spec(f"where(kv_idx < q_idx, qk * 0.5, {MIN!r})"))
    assert (filled.fill_threshold, filled.large_scores, filled.fills) == (MIN / 2, True, ((MIN, MIN),))
    moderate = load_program(make_spec("where(kv_idx <= q_idx, qk * 0.5, -10000.0)"))
    assert (moderate.fill_threshold, moderate.large_scores, moderate.fills) == (-20000.0 + 256.0, False, ())


def test_a_huge_fill_is_minus_infinity_where_every_row_keeps_a_key() -> None:
    """Such a row gives a masked key probability 0 either way; a window needs to know that keys reach the last query."""
    causal = load_program(make_spec(f"qk * 0.5 + where(kv_idx <= q_idx, 0.0, {MIN!r})"))
    assert (causal.fill_threshold, causal.large_scores) == (None, False)
    assert 'tl.where((kv_idx <= q_idx), qk, float("-inf"))' in causal.path.read_text()
    window = make_spec(f"where((kv_idx <= q_idx) & (kv_idx > q_idx - 8), qk * 0.5, {MIN!r})")
    assert load_program(window).fill_threshold == MIN / 2
    known = load_program(window, fewer_queries=True)
    assert (known.fill_threshold, known.large_scores) == (None, False)


def test_programs_for_ranges_leave_out_what_those_vouch_for() -> None:
    spec = make_spec("where((kv_idx <= q_idx) & t0[n0, kv_idx], qk * 0.5, -inf)", torch.bool)
    plain, ranged = (generate(spec, ranged)[1].split("def score_full")[1] for ranged in (False, True))
    assert "tl.load" in plain
    assert "tl.load" not in ranged
