"""Decode steps to measure: their sizes, the tensors that take turns, the code that models write, and its peers."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

import flashfuse.kernels.ops  # noqa: F401  (registers the operator)
from benchmarks.dense import Case, spec_of
from flashfuse.kernels.call import AttentionCall
from flashfuse.kernels.spec import AttentionSpec

Tensors = tuple[torch.Tensor, ...]
# (q [B, Hq, 1, D], k and v [B, Hkv, KV, D], ..) to [B, Hq, 1, D].
Code = Callable[..., torch.Tensor]
CAP = 50.0
BASELINE = "sdpa gqa"


@dataclass(frozen=True)
class Point:
    """One decode step: a query for each of `heads` query heads, and `kv_len` keys and values of `kv_heads` heads."""

    batch: int
    heads: int
    kv_heads: int
    kv_len: int
    dim: int

    def __str__(self) -> str:
        length = f"{self.kv_len // 1024}k" if self.kv_len % 1024 == 0 else str(self.kv_len)
        return f"B{self.batch} H{self.heads}/{self.kv_heads} KV{length} D{self.dim}"

    @property
    def groups(self) -> int:
        return self.heads // self.kv_heads

    @property
    def family(self) -> tuple[int, int, int]:
        """What compiled code may depend on."""
        return self.heads, self.kv_heads, self.dim

    def kv_bytes(self, dtype: torch.dtype) -> int:
        return 2 * self.batch * self.kv_heads * self.kv_len * self.dim * dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """points: by what is measured at them: everything, or only what is without a rival's compilation.

    rotated_bytes: of keys and values that take turns, in at most `max_sets` sets; a set may be larger.
    read_bytes: read to find the device's bandwidth.
    """

    everything: tuple[Point, ...]
    some: tuple[Point, ...]
    dtype: torch.dtype
    rotated_bytes: int
    max_sets: int
    read_bytes: int

    @property
    def points(self) -> tuple[Point, ...]:
        """All, those that share compiled code one after the other."""
        return tuple(sorted((*self.everything, *self.some), key=lambda p: self.families.index(p.family)))

    @property
    def families(self) -> list[tuple[int, int, int]]:
        return list(dict.fromkeys(p.family for p in (*self.everything, *self.some)))

    def sets(self, point: Point) -> int:
        return min(max(1, -(-self.rotated_bytes // point.kv_bytes(self.dtype))), self.max_sets)


def _points(batches: tuple[int, ...], lengths: tuple[int, ...], *family: int) -> tuple[Point, ...]:
    heads, kv_heads, dim = family
    return tuple(Point(b, heads, kv_heads, n, dim) for b, n in itertools.product(batches, lengths))


K = 1024
MAIN = (32, 8, 128)
OTHERS = ((28, 4, 128), (16, 16, 128), (32, 8, 64), (32, 8, 256))
FULL = Plan(
    everything=_points((1, 8, 64), (1 * K, 8 * K, 32 * K, 128 * K), *MAIN),
    some=tuple(p for family in OTHERS for b, n in ((1, 1), (1, 8), (1, 32), (1, 128), (8, 8), (8, 32), (64, 8))
               for p in _points((b,), (n * K,), *family)),
    dtype=torch.bfloat16, rotated_bytes=2**30, max_sets=64, read_bytes=2**32,
)  # fmt: skip
QUICK = dataclasses.replace(FULL, everything=_points((1, 8, 64), (1 * K, 8 * K, 32 * K), *MAIN), some=())
# float16: the interpreter of Triton 3.6 multiplies bfloat16 wrongly.
TINY = Plan(
    everything=_points((1, 2), (48, 80), 4, 2, 16), some=_points((2,), (48,), 2, 2, 16),
    dtype=torch.float16, rotated_bytes=2**14, max_sets=3, read_bytes=2**16,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Operands:
    """A point's tensors: sets of (q [B, Hq, 1, D], k and v [B, Hkv, KV, D]), of which none but the next is read."""

    point: Point
    sets: tuple[Tensors, ...]

    @staticmethod
    def make(point: Point, plan: Plan, device: str) -> Operands:
        generator = torch.Generator(device).manual_seed(0)

        def randn(heads: int, length: int) -> torch.Tensor:
            x = torch.empty(point.batch, heads, length, point.dim, dtype=plan.dtype, device=device)
            return x.normal_(generator=generator)

        sizes = ((point.heads, 1), (point.kv_heads, point.kv_len), (point.kv_heads, point.kv_len))
        return Operands(point, tuple(tuple(randn(*size) for size in sizes) for _ in range(plan.sets(point))))

    @property
    def looked_at(self) -> tuple[int, int]:
        """The first set and the last."""
        return 0, len(self.sets) - 1

    def sample(self) -> Tensors:
        """Of the sets looked at, the operands of the first and of the last key head, as [4, heads, length, D]."""
        groups = self.point.groups
        sets = [self.sets[at] for at in self.looked_at]
        parts = [(q[:1, :groups], k[:1, :1], v[:1, :1]) for q, k, v in sets]
        parts += [(q[-1:, -groups:], k[-1:, -1:], v[-1:, -1:]) for q, k, v in sets]
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))

    def sampled(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """What of the sets' outputs belongs to `sample`."""
        groups = self.point.groups
        outs = [outputs[at] for at in self.looked_at]
        return torch.cat([*(out[:1, :groups] for out in outs), *(out[-1:, -groups:] for out in outs)])


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
    """With the number of the query, which only the device knows, as a static cache is masked."""
    keys = torch.arange(k.shape[2], device=q.device)
    return attend(seen(scores(q, k), keys <= position[:, None]), v)


# --------------------------------------------------------------------------------------------------------------------
# Who computes it


@dataclass(frozen=True)
class Peer:
    """make: given a point and a device, the function of (q, k, v). code: what it computes, given these and `extras`.

    read: the share of the keys that it has to read. everywhere: also where not everything is measured. own: one of
    flashfuse's.
    """

    make: Callable[[Point, str], Code]
    code: Code = plain
    extras: Callable[[Point, str], Tensors] = lambda point, device: ()
    read: float = 1.0
    everywhere: bool = False
    own: bool = False


def spec_at(point: Point, dtype: torch.dtype) -> AttentionSpec:
    """What the backend recovers from `plain`."""
    spec = spec_of(Case(point.batch, point.heads, point.kv_heads, point.kv_len, point.dim, causal=False))
    return dataclasses.replace(spec, product_dtype=dtype, probs_dtype=dtype, out_dtype=dtype)


def operator_arguments(point: Point, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
    """q [B, Hkv, G, 1, D], k and v [B, Hkv, 1, KV, D]; as they are where no heads are shared."""
    if point.groups == 1:
        return q, k, v
    return q.unflatten(1, (point.kv_heads, -1)), k.unsqueeze(2), v.unsqueeze(2)


def call_at(point: Point, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> AttentionCall:
    """The operator's call."""
    q, k, v = operator_arguments(point, q, k, v)
    return AttentionCall(spec_at(point, q.dtype), q, k, v, [], list(q.shape[:-2]))


def operator(point: Point, device: str) -> Code:
    texts = {dtype: spec_at(point, dtype).to_text() for dtype in (FULL.dtype, TINY.dtype)}

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        grouped, k, v = operator_arguments(point, q, k, v)
        out = torch.ops.flashfuse.attention(grouped, k, v, [], list(grouped.shape[:-2]), texts[q.dtype])[0]
        return out.view(q.shape)

    return run


def sdpa_gqa(point: Point, device: str) -> Code:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=point.groups > 1)


def sdpa_masked(point: Point, device: str) -> Code:
    """As Hugging Face calls it with a mask."""
    mask = torch.ones(point.batch, 1, 1, point.kv_len, dtype=torch.bool, device=device)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = repeat_kv(k, point.groups), repeat_kv(v, point.groups)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return run


def flex(point: Point, device: str) -> Code:
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, enable_gqa=point.groups > 1)


def inductor(point: Point, device: str) -> Code:
    return torch.compile(plain, backend="inductor", fullgraph=True, dynamic=False)


def fused(code: Code, extras: Callable[[Point, str], Tensors] = lambda point, device: (), read: float = 1.0) -> Peer:
    """Eager code as a user compiles it: sizes that change are found to change."""

    def make(point: Point, device: str) -> Code:
        compiled, further = by_flashfuse(code), extras(point, device)
        return lambda q, k, v: compiled(q, k, v, *further)

    return Peer(make, code, extras, read, everywhere=code is plain, own=True)


@functools.cache
def by_flashfuse(code: Code) -> Code:
    return torch.compile(code, backend="flashfuse", fullgraph=True)


def last_position(point: Point, device: str) -> Tensors:
    return (torch.tensor([point.kv_len - 1], device=device),)


PEERS: Mapping[str, Peer] = {
    BASELINE: Peer(sdpa_gqa, everywhere=True),
    "sdpa repeat_kv, mask": Peer(sdpa_masked),
    "flex": Peer(flex),
    "inductor": Peer(inductor),
    "operator": Peer(operator, everywhere=True, own=True),
    "flashfuse": fused(plain),
    "flashfuse causal": fused(causal),
    "flashfuse soft cap": fused(softcap),
    "flashfuse window": fused(window, read=0.5),
    "flashfuse static cache": fused(cache_position, last_position),
}
QUICK_PEERS = (BASELINE, "operator", "flashfuse")
