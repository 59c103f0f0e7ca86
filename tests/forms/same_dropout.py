"""Eager code that drops what the operator drops, so that the two can be compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from flashfuse.kernels.dropout import SEEDS, kept

SEED = 5


class SameDropout(TorchFunctionMode):
    """`F.dropout` and its kin of probabilities [.., Tq, Tkv] with the mask of the operator, seeded as in a graph."""

    FUNCTIONS = (F.dropout, torch.dropout, torch.dropout_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip(("input", "p", "training"), args, strict=False)) | (kwargs or {})
        if func is F.scaled_dot_product_attention and given.get("dropout_p"):
            with self:
                return _written_out(*args, **(kwargs or {}))
        if func not in self.FUNCTIONS or not given.get("training", True):
            return func(*args, **(kwargs or {}))
        return dropped(given["input"], given["p"])


def same_dropout(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run in that mode."""

    def run(*args: Any) -> Any:
        with SameDropout():
            return fn(*args)

    return run


def dropped(x: torch.Tensor, p: float) -> torch.Tensor:
    """Probabilities [N.., Tq, Tkv] as the operator drops them."""
    seed = torch.randint(0, SEEDS, (), dtype=torch.int64, device=x.device)
    batch = torch.arange(math.prod(x.shape[:-2]), device=x.device).view(x.shape[:-2])
    return x * (kept(seed, p, batch, range(x.shape[-2]), range(x.shape[-1]), x.dtype) / (1 - p)).to(x.dtype)


def _written_out(q: Any, k: Any, v: Any, dropout_p: float = 0.0, is_causal: bool = False) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
    return F.dropout(scores.softmax(-1), dropout_p, True) @ v
