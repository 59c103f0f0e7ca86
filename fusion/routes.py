"""Which plain attentions torch's own kernels compute faster, as measured, and which sites they could compute at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flashfuse.kernels.bounds import slack_of
from flashfuse.kernels.expr import Const, Expr, Pointwise, Product
from flashfuse.kernels.mask import HUGE_FILL, mask_of
from flashfuse.kernels.normal import TRUE, substitute
from flashfuse.kernels.spec import KV_IDX, KV_LEN, Q_IDX, Q_LEN, AttentionSpec
from flashfuse.patterns.graph import raw_value, tensor, wants_gradient
from flashfuse.patterns.site import AttentionSite
from flashfuse.patterns.transforms import is_wrapped

aten = torch.ops.aten

# In the order in which "always" asks them.
OPERATORS: Mapping[str, torch._ops.OpOverload] = {
    "cudnn": aten._scaled_dot_product_cudnn_attention.default,
    "flash": aten._scaled_dot_product_flash_attention.default,
}


@dataclass(frozen=True)
class Row:
    """Where `kernel` was faster: for head dims, lengths of queries and keys, and rows of all heads from..to.

    trains: with a backward pass, without, or in both cases. rows: None for any number.
    """

    capability: tuple[int, int]
    kernel: str
    head_dims: tuple[int, int]
    lengths: tuple[int, int]
    causal: tuple[bool, ...] = (False, True)
    trains: tuple[bool, ...] = (False, True)
    rows: tuple[int, int] | None = None


# Rows that fill a device a few times: the search has 2^16, and 2^19, which are many.
_FEW = (2**15, 2**17)
# The recorded search, `python -m benchmarks.routes`: docs/performance.md, "Routes", has its figures.
FASTER: tuple[Row, ...] = (
    Row((9, 0), "cudnn", (129, 256), (128, 2048), trains=(True,)),
    Row((9, 0), "cudnn", (129, 256), (128, 512), trains=(False,)),
    Row((9, 0), "cudnn", (65, 128), (128, 197), trains=(True,)),
    Row((9, 0), "cudnn", (64, 128), (128, 160), trains=(False,), rows=_FEW),
    Row((9, 0), "cudnn", (64, 64), (128, 768), trains=(False,), rows=_FEW),
    Row((9, 0), "cudnn", (64, 64), (128, 1024), causal=(False,), trains=(True,), rows=_FEW),
)


@dataclass(frozen=True)
class Route:
    """A kernel of torch's own for a site, and why it is taken."""

    kernel: str
    scale: float
    causal: bool
    why: str

    @property
    def operator(self) -> torch._ops.OpOverload:
        return OPERATORS[self.kernel]


@dataclass(frozen=True)
class Plain:
    """A site that is softmax(scale * qk) @ v, all of it or its causal part, with its sizes.

    trains: whether a gradient of it is wanted.
    """

    scale: float
    causal: bool
    trains: bool
    shape: tuple[int, ...]
    q_len: int
    kv_len: int
    head_dim: int

    @property
    def num_heads(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def batch(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def rows(self) -> int:
        return math.prod(self.shape) * self.q_len


def route_of(site: AttentionSite, choice: str) -> Route | None:
    """The kernel of torch's that a site goes to under the option's value `choice`; None for flashfuse's own."""
    if choice == "never":
        return None
    output = tensor(site.node)
    if output is None or output.device.type != "cuda" or is_wrapped(raw_value(site.node)):
        return None
    # torch's backward sums in any order.
    if torch.are_deterministic_algorithms_enabled():
        return None
    plain = plain_attention(site)
    if plain is None:
        return None
    always = choice == "always"
    kernels = tuple(OPERATORS) if always else fastest(plain, torch.cuda.get_device_capability(output.device), site)
    why = "asked for by flashfuse.route" if always else "faster by the recorded search at these lengths"
    for kernel in kernels:
        if accepts(kernel, plain, output):
            return Route(kernel, plain.scale, plain.causal, why)
    return None


def fastest(plain: Plain, capability: tuple[int, int], site: AttentionSite) -> tuple[str, ...]:
    """Kernels that the recorded search found faster; none where heads are shared, which torch's would have copied."""
    shared = any(
        n != 1 and not o.moves_along(axis) for axis, n in enumerate(site.batch) for o in (site.q, site.k, site.v)
    )
    return () if shared else tuple(row.kernel for row in FASTER if _covers(row, plain, capability))


def _covers(row: Row, plain: Plain, capability: tuple[int, int]) -> bool:
    (narrowest, widest), (shortest, longest) = row.head_dims, row.lengths
    return (
        capability == row.capability
        and narrowest <= plain.head_dim <= widest
        and all(shortest <= n <= longest for n in (plain.q_len, plain.kv_len))
        and plain.causal in row.causal
        and plain.trains in row.trains
        and (row.rows is None or row.rows[0] <= plain.rows <= row.rows[1])
    )


def plain_attention(site: AttentionSite) -> Plain | None:
    """The site as a plain attention of static sizes in one 16-bit type; None where it is anything else."""
    spec = site.spec
    sizes = (*site.batch, site.q_len, site.kv_len, site.head_dim, site.value_dim)
    if site.more or site.plus or not all(size.is_Integer and size > 0 for size in sizes):
        return None
    if site.head_dim != site.value_dim or {spec.probs_dtype, spec.out_dtype} != {spec.product_dtype}:
        return None
    if spec.product_dtype not in (torch.float16, torch.bfloat16):
        return None
    score = plain_score(spec, int(site.q_len), int(site.kv_len))
    if score is None:
        return None
    trains = wants_gradient(site.node)
    return Plain(*score, trains, tuple(map(int, site.batch)), int(site.q_len), int(site.kv_len), int(site.head_dim))


def plain_score(spec: AttentionSpec, q_len: int, kv_len: int) -> tuple[float, bool] | None:
    """(scale, causal) of a softmax over scale * qk, or over its causal part at equal lengths; None for others."""
    if spec.normaliser != "softmax" or spec.captured or spec.num_sizes or spec.dropout:
        return None
    if any(part is not None for part in (spec.sink, spec.factor, spec.key, spec.value)):
        return None
    scale = _scale(spec.score)
    if scale is not None:
        return scale, False
    mask = mask_of(spec)
    scale = _scale(mask.unmasked)
    # A mask, and nothing but it: what is not ruled out has the plain score, and a fill leaves nothing of the others.
    if scale is None or mask.needed != mask.idle or mask.needed == TRUE or mask.fill is None or mask.fill > HUGE_FILL:
        return None
    slack = slack_of(substitute(mask.needed, {Q_LEN: q_len, KV_LEN: kv_len}))
    return (scale, True) if q_len == kv_len and slack is not None and slack - (Q_IDX - KV_IDX) == 0 else None


def _scale(score: Expr) -> float | None:
    match score:
        case Product(slot=0):
            return 1.0
        case Pointwise(op="mul", args=(Product(slot=0), Const(value=c)) | (Const(value=c), Product(slot=0))):
            return float(c) if 0 < c < float("inf") else None
    return None


def accepts(kernel: str, plain: Plain, like: torch.Tensor) -> bool:
    """Whether torch would run its kernel at these sizes on this device, by its own conditions and switches."""
    if plain.head_dim % 8 or plain.head_dim > 256:
        return False
    fake_mode = like.fake_mode  # type: ignore[attr-defined]
    with fake_mode:
        q, k = (
            torch.empty(
                plain.batch, plain.num_heads, n, plain.head_dim, dtype=like.dtype, device=like.device,
                requires_grad=plain.trains,
            )
            for n in (plain.q_len, plain.kv_len)
        )  # fmt: skip
        params = torch.backends.cuda.SDPAParams(q, k, k, None, 0.0, plain.causal, False)
    may_use = {
        "cudnn": (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.can_use_cudnn_attention),
        "flash": (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.can_use_flash_attention),
    }
    enabled, can_use = may_use[kernel]
    return enabled() and can_use(params)
