"""Where a score may be infinite or NaN though all products are finite: what eager code's rows are NaN for.

+inf or NaN makes all of a row NaN, and -inf a row that has nothing else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch

from flashfuse.kernels.expr import Expr, Gather, Load, Pointwise, loads, walk
from flashfuse.kernels.normal import number
from flashfuse.kernels.operators import ROUNDINGS
from flashfuse.patterns.opener import Opener
from flashfuse.patterns.samples import ORDINARY, Samples, TooManyPaths, made


def may_spoil_rows(program: Expr, opener: Opener) -> bool:
    """Whether a score may be +inf or NaN: not where it can be shown that it is a number or -inf.

    Of given tensors this is assumed: one that differs between keys and is added may hold -inf as well; what scores are
    multiplied or divided by is positive.
    """
    program = opener.lifter.resolved(made(program, opener))
    samples = Samples(opener, _addends(program))
    try:
        paths = samples.of(program)
    except TooManyPaths:
        return True
    return any((_is_spoiled(x[:ORDINARY]) & samples.reached(known)).any() for known, x in paths.items())


def _is_spoiled(x: torch.Tensor) -> torch.Tensor:
    return x.isnan() | (x == math.inf)


def infinite_unless(program: Expr, kept: Expr, opener: Opener) -> tuple[bool | None, bool | None]:
    """Whether scores are -inf where a condition does not hold, and whether where it does: None where some are.

    Of given tensors that are added only those are taken to hold -inf that the condition asks of.
    """
    program, kept = (opener.lifter.resolved(made(e, opener)) for e in (program, kept))
    asked = loads(kept)
    samples = Samples(opener, (x for x in _addends(program) if x in asked))
    found: tuple[list[torch.Tensor], ...] = ([], [])
    try:
        for known, (holds, x) in samples.together((kept, program)):
            for truth, values in enumerate(found):
                there = samples.reached(known) & (holds[:ORDINARY] == bool(truth))
                values.append((x[:ORDINARY] == -math.inf)[there])
    except TooManyPaths:
        return None, None
    return _verdict(found[False]), _verdict(found[True])


def _verdict(found: Sequence[torch.Tensor]) -> bool | None:
    infinite = torch.cat([torch.zeros(0, dtype=torch.bool), *found])
    return bool(infinite.any()) if infinite.all() or not infinite.any() else None


def _addends(program: Expr) -> Iterator[Load | Gather]:
    """Tensors that are added to something, perhaps chosen, rounded or multiplied by a positive number before."""
    for e in walk(program):
        match e:
            case Pointwise(op="add", args=args):
                yield from itertools.chain.from_iterable(map(_chosen, args))
            case Pointwise(op="sub", args=(left, _)):
                yield from _chosen(left)


def _chosen(expr: Expr) -> Iterator[Load | Gather]:
    match expr:
        case Load() | Gather():
            yield expr
        case Pointwise(op="where", args=(_, *branches)):
            yield from itertools.chain.from_iterable(map(_chosen, branches))
        case Pointwise(op="mul", args=(rest, factor) | (factor, rest)) if (number(factor) or 0) > 0:
            yield from _chosen(rest)
        case Pointwise(op=op, args=(inner,)) if op in ROUNDINGS:
            yield from _chosen(inner)
