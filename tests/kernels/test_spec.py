"""The text form of a spec, and what a spec refuses."""

import pytest
import torch
from torch.utils._sympy.functions import FloorDiv, Mod

from flashfuse.kernels.expr import Const, Pointwise
from flashfuse.kernels.normal import const, pointwise
from flashfuse.kernels.spec import KV_IDX, Q_IDX, AttentionSpec, batch_symbol, index_text, parse, size_symbol, to_text

PROGRAMS = (
    "qk",
    "(qk * 0.125)",
    "where((kv_idx <= q_idx), (qk * 0.125), -inf)",
    "where((kv_idx <= (q_idx + kv_len + (-1 * q_len))), qk, -3.4028234663852886e+38)",
    "((qk * 0.125) + t0[n0, ((2 * n1) + n2), q_idx, kv_idx])",
    "where((t1[n0, kv_idx] & (~t2[(n1 // size0), (q_idx % 3)])), qk, -inf)",
    "((tanh((qk * 0.02)) * 50.0) + (to_float(((-1 * q_idx) + kv_idx)) * t0[n0, 0, 0, 0]))",
    "where(((kv_idx <= q_idx) | (kv_idx < size0)), min(qk, 3.0), inf)",
)
CAPTURED = (torch.float32, torch.bool, torch.bool)


@pytest.mark.parametrize("text", PROGRAMS)
def test_text_of_a_program_reads_back_equal(text: str) -> None:
    program = parse(text, CAPTURED)
    assert parse(to_text(program), CAPTURED) == program


def test_negation_binds_to_its_own_argument() -> None:
    """Regression: `not(a) & b` was written, which Python reads as not (a & b)."""
    first, second = parse("t1[kv_idx]", CAPTURED), parse("t2[q_idx]", CAPTURED)
    negated = pointwise("and", pointwise("not", first), second)
    assert parse(to_text(negated), CAPTURED) == negated


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (FloorDiv(batch_symbol(1), size_symbol(0)), "(n1 // size0)"),
        (Mod(Q_IDX, 4), "(q_idx % 4)"),
        (Q_IDX - 1, "(q_idx + -1)"),
        (KV_IDX**2, "(kv_idx * kv_idx)"),
    ],
)
def test_index_text(index: object, text: str) -> None:
    assert sorted(index_text(index)) == sorted(text)
    assert parse(text).value == index


def make_spec(**changes: object) -> AttentionSpec:
    fields = {
        "batch_axes": 2,
        "score": parse("where(kv_idx <= q_idx, qk * 0.125, -inf)"),
        "captured": (),
        "num_sizes": 1,
        "product_dtype": torch.bfloat16,
        "probs_dtype": torch.float32,
        "out_dtype": torch.float16,
        "empty_row": "zero",
        "out_order": (0, 2, 1, 3),
    }
    return AttentionSpec(**{**fields, **changes})


def test_text_of_a_spec_reads_back_equal() -> None:
    assert AttentionSpec.from_text(make_spec().to_text()) == make_spec()
    double = make_spec(product_dtype=torch.float64, score=parse("qk * 0.5", (), torch.float64))
    assert AttentionSpec.from_text(double.to_text()) == double
    assert double.compute_dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_axes": 5}, "0 to 4 batch axes"),
        ({"empty_row": "one"}, "empty_row"),
        ({"out_order": (0, 1, 3, 2)}, "out_order"),
        ({"out_order": (0, 1, 1, 3)}, "out_order"),
    ],
)
def test_a_spec_refuses_what_no_kernel_means(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_spec(**changes)


@pytest.mark.parametrize("text", ["unknown", "qk.real", "f(qk)", "t0[qk]", "n", "size"])
def test_unreadable_programs_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"score program|index expression|unknown"):
        parse(text, CAPTURED)


def test_constants_keep_the_meaning_of_their_type() -> None:
    assert const(-1e30, torch.float16) == Const(torch.float16, float("-inf"))
    assert const(torch.finfo(torch.bfloat16).min, torch.bfloat16) == Const(
        torch.bfloat16, torch.finfo(torch.bfloat16).min
    )
    assert isinstance(parse("1.0 / qk"), Pointwise)
