"""Who computes a decode step: PyTorch's kernels, eager code as models write it under two compilers, the operator."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

import flashfuse.kernels.ops  # noqa: F401  (registers the operator)
from benchmarks.decode_cases import Operands, Point, Tensors
from benchmarks.dense import Case, spec_of
from flashfuse.kernels.call import AttentionCall
from flashfuse.kernels.ranges import mask_ranges, ranges_program
from flashfuse.kernels.spec import AttentionSpec, parse, to_text

# (q [B, Hq, 1, D], k and v [B, Hkv, KV, D], ..) to [B, Hq, 1, D].
Code = Callable[..., torch.Tensor]
CAP = 50.0
BASELINE = "sdpa gqa"

# --------------------------------------------------------------------------------------------------------------------
# The code, as models write it


def repeat_kv(x: torch.Tensor, groups: int) -> torch.Tensor:
    if groups == 1:
        return x
    batch, heads, length, dim = x.shape
    return x[:, :, None].expand(batch, heads, groups, length, dim).reshape(batch, heads * groups, length, dim)


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.matmul(q, repeat_kv(k, q.shape[1] // k.shape[1]).transpose(2, 3)) * q.shape[-1] ** -0.5


def attend(s: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    probs = F.softmax(s, dim=-1, dtype=torch.float32).to(v.dtype)
    return torch.matmul(probs, repeat_kv(v, s.shape[1] // v.shape[1]))


def positions(q: torch.Tensor, k: torch.Tensor) -> Tensors:
    """Of the queries, which are the last, and of the keys."""
    keys = torch.arange(k.shape[2], device=q.device)
    return keys[-q.shape[2] :, None], keys


def seen(s: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return s.masked_fill(~keep, float("-inf"))


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attend(scores(q, k), v)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    i, j = positions(q, k)
    return attend(seen(scores(q, k), j <= i), v)


def softcap(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    i, j = positions(q, k)
    return attend(seen(torch.tanh(scores(q, k) / CAP) * CAP, j <= i), v)


def window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Of half the keys."""
    i, j = positions(q, k)
    return attend(seen(scores(q, k), (j <= i) & (i - j < k.shape[2] // 2)), v)


def cache_position(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """With the query's number, which only the device knows, as a static cache is masked; each call makes the mask."""
    keys = torch.arange(k.shape[2], device=q.device)
    return attend(seen(scores(q, k), keys <= position[:, None]), v)


def quantised(x: torch.Tensor, stored: torch.dtype) -> Tensors:
    """x [.., KV, D] as a cache of int8 or float8 stores it, and a scale [.., KV, 1] of each token in x's type.

    The same of a float64 copy.
    """
    most = torch.iinfo(stored).max if stored == torch.int8 else torch.finfo(stored).max
    scale = (x.abs().amax(-1, keepdim=True).float() / most).bfloat16().to(x.dtype)
    inner = x.float() / scale.float()
    return (inner.round() if stored == torch.int8 else inner).clamp(-most, most).to(stored), scale


def stored_cache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ks: torch.Tensor, vs: torch.Tensor) -> torch.Tensor:
    """A quantised cache as models read it: expanded to the type of the queries first."""
    return plain(q, k.to(q.dtype) * ks, v.to(q.dtype) * vs)


def int8_cache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    (k, ks), (v, vs) = (quantised(x, torch.int8) for x in (k, v))
    return stored_cache(q, k, v, ks, vs)


def fp8_cache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    (k, ks), (v, vs) = (quantised(x, torch.float8_e4m3fn) for x in (k, v))
    return stored_cache(q, k, v, ks, vs)


# --------------------------------------------------------------------------------------------------------------------
# Who computes it


@dataclass(frozen=True)
class Peer:
    """make: given the operands, the function of (q, k, v). code: what it computes, given these and `extras`.

    read: the share of the keys that it has to read. everywhere: also where not everything is measured. own: one of
    flashfuse's.
    """

    make: Callable[[Operands], Code]
    code: Code = plain
    extras: Callable[[Operands], Tensors] = lambda x: ()
    read: float = 1.0
    everywhere: bool = False
    own: bool = False


def spec_at(point: Point, dtype: torch.dtype) -> AttentionSpec:
    """What the backend recovers from `plain`."""
    spec = spec_of(Case(point.batch, point.heads, point.kv_heads, point.kv_len, point.dim, causal=False))
    # Of one query, which torch therefore puts first.
    order = (spec.batch_axes, *range(spec.batch_axes), spec.batch_axes + 1)
    return dataclasses.replace(spec, product_dtype=dtype, probs_dtype=dtype, out_dtype=dtype, out_order=order)


def grouped(point: Point, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
    """q [B, Hkv, G, 1, D], k and v [B, Hkv, 1, KV, D]; as they are where no heads are shared."""
    if point.groups == 1:
        return q, k, v
    return q.unflatten(1, (point.kv_heads, -1)), k.unsqueeze(2), v.unsqueeze(2)


def call_at(point: Point, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> AttentionCall:
    """The operator's."""
    q, k, v = grouped(point, q, k, v)
    return AttentionCall(spec_at(point, q.dtype), q, k, v, [], list(q.shape[:-2]))


def masked_call(call: AttentionCall) -> AttentionCall:
    """With a mask that keeps every key, and the ranges of keys that it leaves."""
    score = f"where(t0[0, kv_idx], -inf, {to_text(call.spec.score)})"
    captured = (torch.bool,)
    spec = dataclasses.replace(call.spec, score=parse(score, captured), captured=captured)
    mask = torch.zeros(1, call.kv_len, dtype=torch.bool, device=call.device)
    program = ranges_program(spec, call.batch, call.kv_len)
    ranges = None
    if program is not None:
        axes, predicates = spec.batch_axes, (program.needed, program.idle)
        ranges = mask_ranges([mask], [1] * axes, axes, call.q_len, call.kv_len, *predicates)
    return dataclasses.replace(call, spec=spec, captured=[mask], kv_ranges=ranges)


def operator(x: Operands, change: Callable[[AttentionCall], AttentionCall] = lambda call: call) -> Code:
    """The operator called alone, for changed calls; what is captured is made beforehand."""
    changed = change(call_at(x.point, *x.sets[0]))
    text, captured, ranges = changed.spec.to_text(), changed.captured, changed.kv_ranges

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, _ = torch.ops.flashfuse.attention(*grouped(x.point, q, k, v), captured, changed.sizes, text, ranges)
        return out.view(q.shape)

    return run


def operator_masked(x: Operands) -> Code:
    return operator(x, masked_call)


def sdpa_gqa(x: Operands) -> Code:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=x.point.groups > 1)


def sdpa_masked(x: Operands) -> Code:
    """As Hugging Face calls it with a mask."""
    groups = x.point.groups
    mask = torch.ones(x.point.batch, 1, 1, x.point.kv_len, dtype=torch.bool, device=x.device)
    return lambda q, k, v: F.scaled_dot_product_attention(q, repeat_kv(k, groups), repeat_kv(v, groups), attn_mask=mask)


def flex(x: Operands) -> Code:
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, enable_gqa=x.point.groups > 1)


def inductor(x: Operands) -> Code:
    return by_inductor(plain)


def compiled(code: Code, extras: Callable[[Operands], Tensors] = lambda x: (), read: float = 1.0) -> Peer:
    """Eager code as a user of flashfuse compiles it: sizes that change are found to change."""

    def make(x: Operands) -> Code:
        run, further = by_flashfuse(code), extras(x)
        return lambda q, k, v: run(q, k, v, *further)

    return Peer(make, code, extras, read, everywhere=code is plain, own=True)


@functools.cache
def by_flashfuse(code: Code) -> Code:
    return torch.compile(code, backend="flashfuse", fullgraph=True)


def quantises(code: Code, stored: torch.dtype, own: bool) -> Peer:
    """A cache that is stored quantised, which no call counts: `code` quantises, what is compiled reads."""

    def make(x: Operands) -> Code:
        run = by_flashfuse(stored_cache) if own else by_inductor(stored_cache)
        caches = {k: _stored(stored, k, v) for _, k, v in x.sets}
        return lambda q, k, v: run(q, *caches[k])

    return Peer(make, code, read=0.5, own=own)


def _stored(stored: torch.dtype, k: torch.Tensor, v: torch.Tensor) -> Tensors:
    """Stored keys and values and their scales, made position by position for the memory that this takes."""
    (k, ks), (v, vs) = (map(torch.stack, zip(*(quantised(y, stored) for y in x), strict=True)) for x in (k, v))
    return k, v, ks, vs


def by_inductor(code: Code) -> Code:
    return torch.compile(code, backend="inductor", fullgraph=True, dynamic=False)


def last_position(x: Operands) -> Tensors:
    return (torch.tensor([x.point.kv_len - 1], device=x.device),)


PEERS: Mapping[str, Peer] = {
    BASELINE: Peer(sdpa_gqa, everywhere=True),
    "sdpa repeat_kv, mask": Peer(sdpa_masked),
    "flex": Peer(flex),
    "inductor": Peer(inductor),
    "operator": Peer(operator, everywhere=True, own=True),
    "operator, mask": Peer(operator_masked, own=True),
    "flashfuse": compiled(plain),
    "flashfuse causal": compiled(causal),
    "flashfuse soft cap": compiled(softcap),
    "flashfuse window": compiled(window, read=0.5),
    "flashfuse static cache": compiled(cache_position, last_position),
    "flashfuse int8 cache": quantises(int8_cache, torch.int8, own=True),
    "inductor int8 cache": quantises(int8_cache, torch.int8, own=False),
    "flashfuse fp8 cache": quantises(fp8_cache, torch.float8_e4m3fn, own=True),
}
QUICK_PEERS = (BASELINE, "operator", "flashfuse")
