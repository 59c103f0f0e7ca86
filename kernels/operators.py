"""The pointwise operators a score program may use: one row each, for torch and for Triton."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Op:
    """One pointwise operator: how torch computes it, how Triton spells it, and what type it gives.

    `result` is "bool", "float", or "promote" (the promoted type of the arguments); `triton` is a format string over
    the argument texts.
    """

    arity: int
    result: str
    torch: Callable[..., Any]
    triton: str


def _cast(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x.to(dtype)


def _rounded(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x.to(dtype).to(x.dtype)


_MINIMUM = "tl.minimum({}, {}, propagate_nan=tl.PropagateNan.ALL)"
_MAXIMUM = "tl.maximum({}, {}, propagate_nan=tl.PropagateNan.ALL)"

OPS: Mapping[str, Op] = {
    "add": Op(2, "promote", torch.add, "({} + {})"),
    "sub": Op(2, "promote", torch.sub, "({} - {})"),
    "mul": Op(2, "promote", torch.mul, "({} * {})"),
    "div": Op(2, "float", torch.true_divide, "({} / {})"),
    "neg": Op(1, "promote", torch.neg, "(-{})"),
    "abs": Op(1, "promote", torch.abs, "tl.abs({})"),
    # Of equal arguments, all of the derivative is the first one's: clamp(x, low) is max(x, low), relu(x) is max(0, x).
    "min": Op(2, "promote", lambda a, b: torch.clamp(a, max=b), _MINIMUM),
    "max": Op(2, "promote", lambda a, b: torch.clamp(a, min=b), _MAXIMUM),
    # Of equal arguments, each has half of the derivative.
    "minimum": Op(2, "promote", torch.minimum, _MINIMUM),
    "maximum": Op(2, "promote", torch.maximum, _MAXIMUM),
    "pow": Op(2, "float", torch.pow, "libdevice.pow({}, {})"),
    "exp": Op(1, "float", torch.exp, "tl.exp({})"),
    "exp2": Op(1, "float", torch.exp2, "tl.exp2({})"),
    "expm1": Op(1, "float", torch.expm1, "expm1({})"),
    "log": Op(1, "float", torch.log, "tl.log({})"),
    "log2": Op(1, "float", torch.log2, "tl.log2({})"),
    "log1p": Op(1, "float", torch.log1p, "log1p({})"),
    "sqrt": Op(1, "float", torch.sqrt, "tl.sqrt({})"),
    "rsqrt": Op(1, "float", torch.rsqrt, "tl.rsqrt({})"),
    "tanh": Op(1, "float", torch.tanh, "tanh({})"),
    "sigmoid": Op(1, "float", torch.sigmoid, "tl.sigmoid({})"),
    "erf": Op(1, "float", torch.erf, "tl.erf({})"),
    "sin": Op(1, "float", torch.sin, "tl.sin({})"),
    "cos": Op(1, "float", torch.cos, "tl.cos({})"),
    "atan": Op(1, "float", torch.atan, "atan({})"),
    "asinh": Op(1, "float", torch.asinh, "asinh({})"),
    "floor": Op(1, "promote", torch.floor, "tl.floor({})"),
    "sign": Op(1, "float", torch.sign, "sign({})"),
    # The remainder of a division rounded towards zero.
    "fmod": Op(2, "float", torch.fmod, "({} % {})"),
    "lt": Op(2, "bool", torch.lt, "({} < {})"),
    "le": Op(2, "bool", torch.le, "({} <= {})"),
    "gt": Op(2, "bool", torch.gt, "({} > {})"),
    "ge": Op(2, "bool", torch.ge, "({} >= {})"),
    "eq": Op(2, "bool", torch.eq, "({} == {})"),
    "ne": Op(2, "bool", torch.ne, "({} != {})"),
    "and": Op(2, "bool", torch.logical_and, "({} & {})"),
    "or": Op(2, "bool", torch.logical_or, "({} | {})"),
    "not": Op(1, "bool", torch.logical_not, "(~{})"),
    "where": Op(3, "promote", torch.where, "tl.where({}, {}, {})"),
    "to_float": Op(1, "float", _cast(torch.float32), "{}.to(tl.float32)"),
    "to_int": Op(1, "int", _cast(torch.int64), "{}.to(tl.int64)"),
    "to_bool": Op(1, "bool", _cast(torch.bool), "({} != 0)"),
    "to_float16": Op(1, "float", _rounded(torch.float16), "{}.to(tl.float16).to(tl.float32)"),
    "to_bfloat16": Op(1, "float", _rounded(torch.bfloat16), "to_bfloat16({})"),
    "to_float32": Op(1, "float", _rounded(torch.float32), "{}.to(tl.float32)"),
}

# Rounding to a narrower type, where the source program asks for it in so many words.
ROUNDINGS = {"to_float16": torch.float16, "to_bfloat16": torch.bfloat16, "to_float32": torch.float32}
