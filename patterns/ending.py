"""How an attention ends: what its probabilities become between the softmax and the values, over the graph's tensors.

A probability that is set to zero where its score was masked already is what it was, except in rows without any key:
there eager code turns NaN into zero.
"""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

from flashfuse.kernels.expr import (
    Const,
    Dot,
    Expr,
    Load,
    Pointwise,
    Product,
    Reduce,
    Softmax,
    free_symbols,
    loads,
    walk,
)
from flashfuse.kernels.normal import TRUE, cast, conjunction, number, pointwise, rewrite, substitute
from flashfuse.patterns.calls import label_of
from flashfuse.patterns.draw import DrawLoad
from flashfuse.patterns.found import Score
from flashfuse.patterns.indexing import same
from flashfuse.patterns.lift import CannotLift, Lifter
from flashfuse.patterns.normaliser import place
from flashfuse.patterns.opened import opened_or_none
from flashfuse.patterns.opener import Opener
from flashfuse.patterns.refusal import Refused
from flashfuse.patterns.spoiled import infinite_unless, may_spoil_rows
from flashfuse.patterns.vanishing import finite_numbers, is_biased, may_vanish
from flashfuse.patterns.weights import Weights, combined


@dataclass(frozen=True)
class Ending:
    """The part of a spec that is not its score, as programs over the graph's tensors.

    dropout: the random number that each weight is multiplied by.
    """

    normaliser: str
    empty_row: str = "nan"
    sink: Expr | None = None
    factor: Expr | None = None
    dropout: DrawLoad | None = None

    @property
    def programs(self) -> dict[str, Expr]:
        """The programs there are, by the names of the spec's fields."""
        return {name: e for name, e in (("sink", self.sink), ("factor", self.factor)) if e is not None}


def ending(lifter: Lifter, weights: Weights, score: Score, j: sympy.Symbol, leads: AbstractSet[fx.Node]) -> Ending:
    """The ending of one softmax whose score was found. Raises Refused where it is not one the kernels have."""
    i_symbols = free_symbols(score.dot.lhs) - free_symbols(score.dot.rhs)
    if weights.subtracted == "logarithm" and _may_absorb(score.program, j):
        raise Refused(
            "log-sum-exp",
            "a row of large fills absorbs the logarithm of its sum, so its probabilities do not add up to 1",
        )
    clears = weights.cleared or (weights.empty_row == "zero" and not weights.sinks)
    if clears and may_spoil_rows(score.program, score.opener):
        raise _spoiled("cleared of NaN")
    own_maximum = weights.subtracted in ("maximum", "logarithm") or weights.sinks
    if weights.empty_row == "zero" and not own_maximum and (weights.masked or may_vanish(score.program, j)):
        raise Refused(
            "probability-mask",
            "a row may sum to 0 where its maximum is not subtracted, and the NaN that it gives is set to 0",
        )
    sink = combined(tuple(score.opener.read(_sink(lifter, s, score, leads)) for s in weights.sinks))
    factor: Expr | None = None
    for f in (score.opener.read(f if f.dtype.is_floating_point else cast(f, torch.float32)) for f in weights.factors):
        factor = f if factor is None else pointwise("mul", factor, f)
    conditions = [_without_clearing(lifter, k, weights, score, j) for k in weights.kept]
    cleared = any(rest != (k,) for rest, k in zip(conditions, weights.kept, strict=True))
    empty_row = "zero" if cleared else weights.empty_row
    kept = conjunction([score.opener.read(k) for rest in conditions for k in rest])
    if kept != TRUE:
        factor, empty_row = _zeroed(score, kept, factor, empty_row, j)
    if factor is not None:
        _check_small(factor, i_symbols, j)
    return Ending("softmax", empty_row, sink, factor, weights.dropout)


def _sink(lifter: Lifter, expr: Expr, score: Score, leads: AbstractSet[fx.Node]) -> Expr:
    """The argument of a softmax in a column without a value, seen through what it shares with the scores."""
    match expr:
        case Load(tensor=fx.Node() as made) if made in score.nodes:
            raise Refused("extra-columns", "the softmax runs over more keys than there are values", made)
        case Load(tensor=tensor) if tensor in leads:
            try:
                opened = lifter.expand(expr)
            except CannotLift as error:
                label = label_of(error.node) if error.node is not None else "an operator"
                raise Refused("unknown-operator", f"`{label}` before the softmax {error.reason}", error.node) from error
            stored = any(isinstance(e, (Dot, Reduce, Softmax)) for e in walk(opened))
            return expr if stored else _sink(lifter, opened, score, leads)
        case Pointwise(op=op, args=args):
            return pointwise(op, *(_sink(lifter, a, score, leads) for a in args), dtype=expr.dtype)
    return expr


def _check_small(factor: Expr, i_symbols: AbstractSet[sympy.Symbol], j: sympy.Symbol) -> None:
    """A factor as large as the score matrix must come from outside: one made in the graph would have to be stored."""
    for x in loads(factor):
        node, symbols = x.tensor, free_symbols(x)
        if not isinstance(node, fx.Node):
            continue
        if j in symbols and symbols & i_symbols and node.op not in ("placeholder", "get_attr"):
            raise Refused(
                "probability-factor",
                f"the probabilities are multiplied with `{node.name}`, which is as large as they are",
                node,
            )


# Beyond this float32 has no room for the logarithm of a sum of a few exponentials beside the number itself.
_ABSORBS = 2.0**20


def _may_absorb(program: Expr, j: sympy.Symbol) -> bool:
    """Whether every score of a row may be a number so large that adding a logarithm to it changes nothing."""
    return is_biased(program, j) or any(abs(fill) > _ABSORBS for fill in finite_numbers(program))


# --------------------------------------------------------------------------------------------------------------------
# Probabilities set to zero


def _spoiled(what: str) -> Refused:
    told = (
        f"probabilities are {what} where a score may be +inf or NaN, which makes all of its row NaN: "
        "whatever becomes of a mask on the way, the softmax has to meet it as -inf or a finite number"
    )
    return Refused("probability-mask", told)


def _zeroed(score: Score, kept: Expr, factor: Expr | None, empty_row: str, j: sympy.Symbol) -> tuple[Expr | None, str]:
    """Factor and empty-row rule of probabilities that are 0 unless `kept`."""
    # Over whole rows it is a choice, which leaves no NaN behind.
    if j not in free_symbols(kept) and factor is None:
        return kept, empty_row
    if may_spoil_rows(score.program, score.opener):
        raise _spoiled("set to zero")
    one_or_factor = Const(torch.float32, 1.0) if factor is None else factor
    multiplied = pointwise("where", kept, one_or_factor, Const(one_or_factor.dtype, 0.0))
    masked, open_ = infinite_unless(score.program, kept, score.opener)
    # NaN times 0 is not 0, so a product says the same only where no row without a key has such a place.
    if empty_row == "zero" or masked is False:
        return multiplied, empty_row
    if masked and open_ is False:
        return factor, "zero"
    raise Refused("probability-mask", "probabilities are set to zero where it is not known whether they are NaN")


def _without_clearing(lifter: Lifter, kept: Expr, weights: Weights, score: Score, j: sympy.Symbol) -> tuple[Expr, ...]:
    """What a condition says of probabilities besides that their rows have a key: itself, where it does not say that."""
    if _clears_empty_rows(lifter, kept, weights, score, j):
        return ()
    opened, negated = _opened_negation(lifter, kept)
    if not isinstance(opened, Pointwise) or opened.op != ("or" if negated else "and"):
        return (kept,)
    sides = [pointwise("not", side) if negated else side for side in opened.args]
    rests = [_without_clearing(lifter, side, weights, score, j) for side in sides]
    if all(rest == (side,) for rest, side in zip(rests, sides, strict=True)):
        return (kept,)
    return tuple(condition for rest in rests for condition in rest)


def _clears_empty_rows(lifter: Lifter, kept: Expr, weights: Weights, score: Score, j: sympy.Symbol) -> bool:
    """Whether `kept` says of each row that some score of it is not -inf: only rows without a key are set to zero."""
    test = _of_some_key(lifter, kept)
    if test is None or not same(test.extent, lifter.ranges[j]):
        return False
    program = lifter.resolved(score.program)
    compared = _not_infinite(lifter, test.arg)
    if compared is not None:
        addend = lifter.resolved(score.opener.read(substitute(compared, {test.axis: j})))
        alone = _is_added(program, addend) and _is_never_infinite(_without(program, addend), score.opener)
        return alone or place(lifter, weights.arg, compared, test.axis) == j
    keys = score.opener.read(substitute(test.arg, {test.axis: j}))
    return infinite_unless(program, keys, score.opener) == (True, False)


def _without(program: Expr, addend: Expr) -> Expr:
    return rewrite(program, lambda e: Const(e.dtype, 0.0) if e == addend else None)


def _is_never_infinite(program: Expr, opener: Opener) -> bool:
    return infinite_unless(program, TRUE, opener) == (False, False)


def _is_added(program: Expr, addend: Expr) -> bool:
    """Whether a score is -inf wherever the addend is."""
    match program:
        case Pointwise(op="add", args=args):
            return any(_is_added(a, addend) for a in args)
        case Pointwise(op="sub", args=(left, _)):
            return _is_added(left, addend)
        case Pointwise(op="mul", args=(Const(value=c), rest) | (rest, Const(value=c))) if c > 0:
            return _is_added(rest, addend)
    return program == addend and isinstance(addend, Load)


def _of_some_key(lifter: Lifter, kept: Expr) -> Reduce | None:
    """The condition of keys of which one has to hold; None where `kept` is no such choice."""
    opened, negated = _opened_negation(lifter, kept)
    if not isinstance(opened, Reduce) or opened.dtype != torch.bool or opened.kind != ("min" if negated else "max"):
        return None
    return replace(opened, kind="max", arg=pointwise("not", opened.arg)) if negated else opened


def _not_infinite(lifter: Lifter, condition: Expr) -> Expr | None:
    """The x of a condition that says x is not -inf."""
    opened, negated = _opened_negation(lifter, condition)
    if not isinstance(opened, Pointwise) or opened.op != ("eq" if negated else "ne"):
        return None
    for x, limit in (opened.args, opened.args[::-1]):
        if number(limit) == -math.inf:
            return x
    return None


def _opened_negation(lifter: Lifter, condition: Expr) -> tuple[Expr | None, bool]:
    """What a condition is, or what it is the opposite of."""
    opened, negated = opened_or_none(lifter, condition), False
    while isinstance(opened, Pointwise) and opened.op == "not":
        opened, negated = opened_or_none(lifter, opened.args[0]), not negated
    return opened, negated


def is_linear(program: Expr) -> bool:
    """Whether a program is linear in its products, up to what is added: then it is no attention but matrix products."""
    return all(_is_linear(e) for e in walk(program))


def _is_linear(expr: Expr) -> bool:
    if not isinstance(expr, Pointwise):
        return True
    varying = [slot for slot, a in enumerate(expr.args) if _varies(a)]
    match expr.op:
        case "add" | "sub" | "neg":
            return True
        case "mul":
            return len(varying) < 2
        case "div":
            return 1 not in varying
        case "where":
            return 0 not in varying
    return not varying or expr.op.startswith("to_float") or expr.op == "to_bfloat16"


def _varies(expr: Expr) -> bool:
    return any(isinstance(e, Product) for e in walk(expr))
