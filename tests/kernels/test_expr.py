"""The normal form of expressions: identities hold, and simplifying never changes a value."""

import math

import pytest
import sympy
import torch

from flashfuse.kernels.expr import Const, Expr, Index, Load, Pointwise, Product, free_symbols, loads, walk
from flashfuse.kernels.normal import (
    FALSE,
    TRUE,
    cast,
    conjunction,
    conjuncts,
    const,
    index,
    pointwise,
    rewrite,
    substitute,
)
from flashfuse.kernels.operators import OPS
from flashfuse.kernels.spec import KV_IDX, Q_IDX

QK = Product(torch.float32, 0)

FLAG = Load(torch.bool, 0, (Q_IDX, KV_IDX))
CAUSAL = pointwise("le", index(KV_IDX), index(Q_IDX))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (pointwise("and", FLAG, TRUE), FLAG),
        (pointwise("and", FLAG, FALSE), FALSE),
        (pointwise("or", FLAG, FALSE), FLAG),
        (pointwise("or", FLAG, TRUE), TRUE),
        (pointwise("and", FLAG, FLAG), FLAG),
        (pointwise("not", pointwise("not", FLAG)), FLAG),
        (pointwise("where", TRUE, QK, const(0.0)), QK),
        (pointwise("where", FALSE, QK, const(2.0)), const(2.0)),
        (pointwise("where", FLAG, QK, QK), QK),
        (pointwise("add", QK, const(0.0)), QK),
        (pointwise("mul", const(1.0), QK), QK),
        (pointwise("sub", QK, const(0.0)), QK),
        (pointwise("pow", QK, const(1.0)), QK),
        (pointwise("pow", QK, index(0)), const(1.0)),
        (pointwise("add", QK, const(-math.inf)), const(-math.inf)),
        (pointwise("le", index(Q_IDX), index(Q_IDX)), TRUE),
        (pointwise("lt", index(Q_IDX), index(0)), FALSE),
        (pointwise("sub", index(Q_IDX + 3), index(Q_IDX)), index(3)),
        (pointwise("mul", const(3.0), const(0.5)), const(1.5)),
        (cast(cast(QK, torch.float16), torch.float32), QK),
        (cast(CAUSAL, torch.bool), CAUSAL),
    ],
)
def test_identities(found: Expr, expected: Expr) -> None:
    assert found == expected


def test_comparing_what_is_not_known_stays_a_comparison() -> None:
    assert Pointwise(torch.bool, "le", (index(KV_IDX), index(Q_IDX))) == CAUSAL


@pytest.mark.parametrize("op", sorted(OPS))
def test_folding_constants_agrees_with_torch(op: str) -> None:
    info = OPS[op]
    boolean = op in ("and", "or", "not")
    args = [TRUE if boolean else const(x) for x in (0.5, 0.25, 2.0)[: info.arity]]
    if op == "where":
        args[0] = TRUE
    folded = pointwise(op, *args)
    expected = info.torch(
        *(torch.tensor(a.value, dtype=torch.bool if a.dtype == torch.bool else torch.float64) for a in args)
    )
    value = int(folded.value) if isinstance(folded, Index) else folded.value
    assert value == pytest.approx(expected.item(), rel=1e-6)


def test_numbers_beyond_their_type_stay_unfolded() -> None:
    """An integer that int64 does not hold raised; a mask's least float rounded to an integer is one."""
    huge = index(-(10**38))
    assert pointwise("mul", huge, Const(torch.float32, 2.0)) == Pointwise(
        torch.float32, "mul", (huge, Const(torch.float32, 2.0))
    )


def test_wrong_number_of_arguments() -> None:
    with pytest.raises(ValueError, match="add takes 2 arguments, got 1"):
        pointwise("add", QK)


def test_conjuncts_undo_conjunction() -> None:
    terms = (FLAG, CAUSAL, Load(torch.bool, 1, (KV_IDX,)))
    assert conjuncts(conjunction(terms)) == terms
    assert conjunction([]) == TRUE
    assert conjuncts(TRUE) == ()


def test_substitution_reaches_every_index_and_simplifies() -> None:
    program = pointwise(
        "where", CAUSAL, pointwise("add", QK, Load(torch.float32, 0, (Q_IDX, KV_IDX))), const(-math.inf)
    )
    assert free_symbols(program) == {Q_IDX, KV_IDX}
    moved = substitute(program, {KV_IDX: Q_IDX})
    assert moved == pointwise("add", QK, Load(torch.float32, 0, (Q_IDX, Q_IDX)))
    assert substitute(program, {KV_IDX: Q_IDX + 1}) == const(-math.inf)


def test_walk_rewrite_and_loads() -> None:
    program = pointwise("mul", pointwise("add", QK, FLAG), pointwise("add", QK, FLAG))
    assert loads(program) == (FLAG,)
    assert sum(e == QK for e in walk(program)) == 2
    assert rewrite(program, lambda e: const(2.0) if e in (QK, FLAG) else None) == const(16.0)


def test_casting_numbers() -> None:
    assert cast(index(3), torch.float32) == const(3.0)
    assert cast(Const(torch.float32, -1e30), torch.float16) == Const(torch.float16, -math.inf)
    assert cast(index(Q_IDX), torch.float32) == Pointwise(torch.float32, "to_float", (index(Q_IDX),))
    assert cast(index(Q_IDX), torch.int32) == Index(torch.int32, sympy.sympify(Q_IDX))


def test_what_an_operator_comes_down_to_is_not_rewritten_twice() -> None:
    """As 2 became 1 on both sides of a choice, it came down to 1, which then became 0: another product."""
    parts = pointwise("where", FLAG, Product(torch.float32, 2), Product(torch.float32, 3))
    new = {0: 0, 1: 0, 2: 1, 3: 1}
    found = rewrite(parts, lambda e: Product(e.dtype, new[e.slot]) if isinstance(e, Product) else None)
    assert found == Product(torch.float32, 1)
