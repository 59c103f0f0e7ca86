"""Attentions that the kernels for Hopper have to take, by name: on a GPU, and emulated."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from attention_cases import Call, make_call

from flashfuse.kernels.prepared import Empty
from flashfuse.kernels.ranges import mask_ranges, ranges_program

BF16, FP16 = torch.bfloat16, torch.float16
PLAIN = "qk * 0.125"
CAUSAL = "where(kv_idx <= q_idx, qk * 0.125, -inf)"
LAST = "where(kv_idx <= q_idx + (kv_len - q_len), qk * 0.125, -inf)"
SCORES = {"plain": PLAIN, "causal": CAUSAL, "last": LAST}
TYPES = {"bf16": BF16, "fp16": FP16}
# float16 where a small part of a sum might be missing: the rule is the stricter the narrower an ulp.


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


PROGRAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "window": ("where((kv_idx <= q_idx) & (kv_idx > q_idx - 100), qk * 0.125, -inf)", {}),
    "symmetric": ("where((kv_idx <= q_idx + 50) & (kv_idx >= q_idx - 50), qk * 0.125, -inf)", {}),
    "chunked": ("where((kv_idx <= q_idx) & (kv_idx // 64 == q_idx // 64), qk * 0.125, -inf)", {}),
    "fill": ("where(kv_idx <= q_idx - 200, qk * 0.125, -10000.0)", {}),
    "least-fill": (f"where(kv_idx <= q_idx - 200, qk * 0.125, {torch.finfo(torch.float32).min!r})", {}),
    "alibi": (
        "where(kv_idx <= q_idx, qk * 0.125 + to_float(kv_idx - q_idx) * t0[n1], -inf)",
        {"captured": [noise(4).exp() * 0.1]},
    ),
    "constant-slope": ("where(kv_idx <= q_idx, qk * 0.125 + to_float(kv_idx - q_idx) * 0.01, -inf)", {}),
    "cap": ("tanh(qk * 0.0025) * 50.0", {}),
    "causal-cap": ("where(kv_idx <= q_idx, tanh(qk * 0.0025) * 50.0, -inf)", {}),
    "keys": ("qk * 0.3 + t0[n1, kv_idx]", {"captured": [noise(4, 417)]}),
    # What is read behind the last key is 0, and the probability of that infinite.
    "low-keys": ("qk * 0.125 + t0[n1, kv_idx]", {"captured": [noise(4, 417) - 200.0]}),
    "rows": ("qk * 0.3 + t0[n1, q_idx] * to_float(kv_idx) * 0.01", {"captured": [noise(4, 301)]}),
    "padding": ("where(t0[n0, kv_idx], qk * 0.125, -inf)", {"captured": [torch.arange(417).expand(2, 417) % 3 > 0]}),
    "sink": (CAUSAL, {"sink": "t0[n1]", "captured": [noise(4)]}),
}
DIMS = [(64, 64), (128, 128), (40, 64), (80, 96), (64, 128), (128, 72)]
LENGTHS = [(577, 577), (70, 130), (300, 1000), (1000, 300), (1, 1000), (17, 3), (129, 127), (1025, 2049)]
BATCHES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((2, 2, 3), (2, 2, 1)), ((2, 5), (2, 1)), ((3, 2), (1, 1)), ((3,), (3,)), ((), ()),
]  # fmt: skip


def with_ranges(call: Call) -> Call:
    """With the ranges of keys that a compiled graph would compute."""
    program = ranges_program(call.spec, call.batch, call.kv_len)
    assert program is not None
    rank = call.spec.batch_axes
    batch = [size if axis in program.batch else 1 for axis, size in enumerate(call.sizes[:rank])]
    captured = [call.captured[slot] for slot in program.captured]
    ranges = mask_ranges(captured, batch, rank, call.q_len, call.kv_len, program.needed, program.idle)
    return call.on(call.operands, ranges)


def documents(head_dim: int, apart: int = 1, value_dim: int | None = None) -> Call:
    ids = apart * torch.bucketize(torch.arange(600), torch.tensor([70, 230, 130, 170]).cumsum(0), right=True)
    score = "where((t0[n0, q_idx] == t0[n0, kv_idx]) & (kv_idx <= q_idx), qk * 0.125, -inf)"
    captured = [ids.expand(2, 600).contiguous()]
    return with_ranges(make_call(score, (2, 2, 600, head_dim), value_dim=value_dim, captured=captured, dtype=FP16))


def far_apart(head_dim: int) -> Call:
    """Documents with numbers whose last 32 bits are the same."""
    return documents(head_dim, apart=-(2**32))


def padded(head_dim: int) -> Call:
    """With rows that see nothing but the fill."""
    kept = (torch.arange(600)[None] < torch.tensor([[600], [333]])) & (torch.arange(600)[None] >= 100)
    score = "where((kv_idx <= q_idx) & t0[n0, kv_idx], qk * 0.125, -3.4028234663852886e+38)"
    return with_ranges(make_call(score, (2, 2, 600, head_dim), captured=[kept], dtype=FP16))


def heads_inside(head_dim: int) -> Call:
    """Heads behind positions, as a projection gives them."""
    call = make_call(CAUSAL, (2, 3, 330, head_dim), dtype=BF16)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (call.q, call.k, call.v))
    return replace(call, q=q, k=k, v=v)


def rows_apart(head_dim: int) -> Call:
    call = make_call(CAUSAL, (2, 3, 330, head_dim), dtype=BF16)
    q, k, v = (spaced(x, 8) for x in (call.q, call.k, call.v))
    return replace(call, q=q, k=k, v=v)


def spaced(x: torch.Tensor, between: int) -> torch.Tensor:
    """The elements of a tensor, with some between its rows."""
    return torch.nn.functional.pad(x, (0, between))[..., : x.shape[-1]]


def call_of(score: str = CAUSAL, shape: tuple[int, ...] = (2, 2, 70, 64), **changes: Any) -> Call:
    return make_call(score, shape, **{"dtype": FP16, **changes})


def nan_filled_on(device: str) -> Empty:
    """An element that nobody writes fails."""

    def empty(size: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        nothing = torch.nan if dtype.is_floating_point else -1
        return torch.empty_strided(size, strides, dtype=dtype, device=device).fill_(nothing)

    return empty


def _calls(heads: int) -> dict[str, Callable[[], Call]]:
    """heads: at most so many where their number is not what is tried."""
    found: dict[str, Callable[[], Call]] = {}

    def add(name: str, score: str, *arguments: Any, **changes: Any) -> None:
        found[name] = lambda: make_call(score, *arguments, **changes)

    for (d, dv), name, dtype in itertools.product(DIMS, ("plain", "causal"), TYPES):
        size = (2, min(heads, 3), 330, d)
        add(f"dims-{d}-{dv}-{name}-{dtype}", SCORES[name], size, value_dim=dv, dtype=TYPES[dtype])
    for d in (64, 128):
        # Where queries see nothing their row is 0, and so is its gradient.
        for (q_len, kv_len), name in itertools.product(LENGTHS, SCORES):
            if (q_len, name) == (1, "causal"):
                # One key is all that is seen: gradients are 0, and what is computed rounding errors.
                continue
            add(f"{q_len}-{kv_len}-{name}-{d}", SCORES[name], (1, 2, q_len, d), kv_len, empty_row="zero", dtype=FP16)
        for name, (score, changes) in PROGRAMS.items():
            add(f"{name}-{d}", score, (2, heads, 301, d), 417, dtype=FP16, **changes)
        for (batch, k_batch), name in itertools.product(BATCHES, ("plain", "causal")):
            title = f"batch{'x'.join(map(str, batch))}-{'x'.join(map(str, k_batch))}-{name}-{d}"
            add(title, SCORES[name], (*batch, 330, d), 290, k_batch=k_batch, dtype=BF16)
        for make in (documents, far_apart, padded, heads_inside, rows_apart):
            found[f"{make.__name__}-{d}"] = lambda make=make, d=d: make(d)  # type: ignore[misc]
    return found


CALLS = _calls(4)
# For the emulation, where each head takes its time.
FEW_HEADS = _calls(2)


def _forward_calls() -> dict[str, Callable[[], Call]]:
    """What only the forward takes, or may get wrong."""
    odd = torch.arange(301) % 2 > 0
    fills = {f"fill{fill:.0e}": f"where(kv_idx <= q_idx - 200, qk * 0.125, {fill!r})" for fill in (-1e6, -1e9, -3e10)}
    programs: dict[str, tuple[str, dict[str, Any]]] = {
        **{name: (score, {}) for name, score in fills.items()},
        "added-fill": ("qk * 0.125 + where(kv_idx <= q_idx - 200, 0.0, -1000000.0)", {}),
        "behind-fill": ("where(kv_idx >= q_idx + 150, qk * 0.125, -10000.0)", {}),
        "row-factor": ("qk * 0.125", {"factor": "0.5 + t0[q_idx]", "captured": [noise(301)]}),
        "row-kept": (CAUSAL, {"factor": "t0[q_idx]", "captured": [odd]}),
        "no-sum-sink": (CAUSAL, {"sink": "0.0"}),
        "empty-rows": ("where(kv_idx <= q_idx - 200, qk * 0.125, -inf)", {}),
        "no-key": ("where(kv_idx <= q_idx - 200, qk * 0.125, -inf)", {"sink": "0.5", "empty_row": "zero"}),
        "large": ("qk * 4000.0", {}),
    }
    found: dict[str, Callable[[], Call]] = {}
    for name, (score, changes) in programs.items():
        for d in (64, 128):
            found[f"{name}-{d}"] = lambda score=score, d=d, changes=changes: make_call(
                score, (1, 2, 301, d), 417, **{"dtype": FP16, **changes}
            )
    # Tiles of 256 columns, of fewer keys, and outputs that are stored in parts.
    for d, dv in ((256, 256), (192, 128), (136, 200), (64, 256)):
        for name, score in (*SCORES.items(), ("fill", PROGRAMS["fill"][0])):
            found[f"dims-{d}-{dv}-{name}"] = lambda score=score, d=d, dv=dv: make_call(
                score, (2, 2, 330, d), value_dim=dv, dtype=FP16
            )
        found[f"dims-{d}-{dv}-documents"] = lambda d=d, dv=dv: documents(d, value_dim=dv)
    return found


FORWARD_CALLS = _forward_calls()


def bias(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Numbers of pairs in rows at multiples of 16 bytes, as TMA reads them."""
    *outer, columns = shape
    return noise(*outer, -(-columns // 8) * 8).to(dtype)[..., :columns]


def _bias_calls(kv_len: int) -> dict[str, Callable[[], Call]]:
    """Scores to which a tensor of pairs is added, by what that is shared over, and what else they are."""
    found: dict[str, Callable[[], Call]] = {}

    def add(name: str, score: str, batch: tuple[int, ...], of: Callable[[], torch.Tensor], **changes: Any) -> None:
        for d in (64, 128):
            found[f"bias-{name}-{d}"] = lambda d=d: make_call(  # type: ignore[misc]
                score, (*batch, 301, d), kv_len, captured=[of()], **{"dtype": BF16, **changes}
            )

    def pairs(dtype: torch.dtype, *batch: int) -> Callable[[], torch.Tensor]:
        return lambda: bias(dtype, *batch, 301, kv_len)

    heads, position = "t0[n1, q_idx, kv_idx]", "t0[n0, n1, q_idx, kv_idx]"
    causal, most = f"where(kv_idx <= q_idx, qk * 0.125 + {heads}, -inf)", (1, 2)
    add("bf16", f"qk * 0.125 + {heads}", (2, 4), pairs(BF16, 4))
    add("fp16", f"qk * 0.125 + {heads}", (2, 4), pairs(FP16, 4), dtype=FP16)
    add("causal", f"where(kv_idx <= q_idx, qk * 0.125 + {position}, -inf)", (2, 2), pairs(BF16, 2, 2))
    add("scaled", f"(qk + {position}) * 0.125", (2, 2), pairs(FP16, 2, 2), dtype=FP16)
    add("all", "qk * 0.125 + t0[q_idx, kv_idx]", (2, 3), pairs(FP16), dtype=FP16)
    add("batch", "qk * 0.125 + t0[n0, 0, q_idx, kv_idx]", (2, 3), pairs(BF16, 2, 1))
    expanded = lambda: bias(BF16, 1, 3, 301, kv_len).expand(2, -1, -1, -1)  # noqa: E731
    add("expanded", f"qk * 0.125 + {position}", (2, 3), expanded)
    grouped = "qk * 0.125 + t0[n1 * 2 + n2, q_idx, kv_idx]"
    add("grouped", grouped, (2, 2, 2), pairs(BF16, 4), k_batch=(2, 2, 1))
    last = "where(kv_idx <= q_idx + (kv_len - q_len), 0.0, -inf)"
    add("longer", f"qk * 0.125 + {heads} + {last}", most, lambda: longer(kv_len))
    add("twice", f"qk * {heads} + {heads} * to_float(kv_idx - q_idx) * 0.01", most, pairs(BF16, 2))
    filled = f"where(kv_idx <= q_idx - 200, qk * 0.125 + {heads}, -10000.0)"
    add("fill", filled, most, pairs(FP16, 2), dtype=FP16)
    add("sink", causal, most, pairs(FP16, 2), sink="0.5", dtype=FP16)
    add("mask", f"qk * 0.125 + {heads}", most, lambda: masking(kv_len))
    add("cap", f"tanh((qk + {heads}) * 0.0025) * 50.0", most, pairs(BF16, 2))
    # Beside reads at rows and at columns of tiles; shared by as many as there is room for among rows of pairs.
    ids = torch.bucketize(torch.arange(kv_len), torch.tensor([90, 220, 250]), right=True).expand(4, -1).contiguous()
    same = f"where((t1[n0, q_idx] == t1[n0, kv_idx]) & (kv_idx <= q_idx), qk * 0.125 + {heads}, -inf)"
    ends = f"qk * 0.125 + {heads} + t1[n0, q_idx] * t2[n0, kv_idx]"
    for d in (64, 128):
        found[f"bias-ranges-{d}"] = lambda d=d: with_ranges(  # type: ignore[misc]
            make_call("qk * 0.125 + t0[q_idx, kv_idx]", (4, 301, d), kv_len, captured=[masking(kv_len)[0]], dtype=BF16)
        )
        found[f"bias-documents-{d}"] = lambda d=d: with_ranges(  # type: ignore[misc]
            make_call(same, (256 // d, 2, 301, d), kv_len, captured=[pairs(FP16, 2)(), ids], dtype=FP16)
        )
        found[f"bias-ends-{d}"] = lambda d=d: make_call(  # type: ignore[misc]
            ends, (2, 2, 301, d), kv_len, captured=[pairs(FP16, 2)(), noise(2, 301), noise(2, kv_len)], dtype=FP16
        )
    return found


def longer(kv_len: int) -> torch.Tensor:
    """Behind the last query and key are elements of others, which may be anything."""
    return torch.nn.functional.pad(bias(BF16, 2, 301, kv_len), (0, 448 - kv_len, 0, 9), value=torch.nan)


def masking(kv_len: int) -> torch.Tensor:
    """A mask that is added: some pairs have the least number there is, and some queries no other."""
    found = bias(BF16, 2, 301, kv_len)
    found[..., noise(301, kv_len) < 0.5] = torch.finfo(BF16).min
    found[:, ::50] = torch.finfo(BF16).min
    return found


BIAS_CALLS = _bias_calls(417)
# Those that the one-pass backward takes: an element that multiplies the product may be infinite.
BACKWARD_BIAS_CALLS = {name: make for name, make in BIAS_CALLS.items() if "twice" not in name}
# Those whose gradient of pairs the kernel of rows of pairs takes: TMA writes it, and it is shared by few positions.
MANY = ("twice", "cap", "all", "batch-128", "ranges-128")
ROWS_OF_PAIRS_CALLS = {
    f"rows-of-{name}": make for name, make in _bias_calls(424).items() if not any(many in name for many in MANY)
}


def wanted(name: str) -> tuple[int, ...]:
    """The places of the operands whose gradients come from the one pass, or from kernels beside it."""
    return (0, 1, 2, 3) if name in {**BIAS_CALLS, **ROWS_OF_PAIRS_CALLS} and "cap" not in name else (0, 1, 2)
