"""What is trained in `benchmarks.training`: dense shapes and variants, as eager code, tensors and peers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.attention import SDPBackend

from benchmarks import dense
from benchmarks.dense import Operands
from benchmarks.measure import Run
from benchmarks.steps import Step, Tensors
from benchmarks.variant_cases import VARIANTS, Shape, Variant, causal, plain

Index = tuple[slice, ...]
Compile = Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]
# Backward against FlexAttention's, at least.
DENSE_TARGET = 1.1
TARGETS = {
    "softcap, causal": 1.2,
    "ALiBi, causal": 1.2,
    "window 1024, causal": 1.2,
    "documents of 1000, causal": 1.2,
    "dense bias (1, H, S, S)": 1.5,
}
TUNED = "max-autotune-no-cudagraphs"


@dataclass(frozen=True)
class Sizes:
    """The shapes measured: of dense attention, and of every variant."""

    dense: Sequence[dense.Case]
    variant: Shape


FULL = Sizes(dense.CASES, Shape())
# For a CPU, where only the logic runs.
TINY = Sizes(
    [
        dense.Case(2, heads, kv_heads, 64, 16, masked)
        for heads, kv_heads in ((2, 2), (4, 2))
        for masked in (False, True)
    ],
    Shape(batch=2, heads=2, length=64, dim=16),
)


@dataclass(frozen=True, eq=False)
class TrainingCase:
    """One attention with its tensors and a gradient of its output.

    code: eager code, given the inputs. inputs: q, k, v and others; those whose gradients are wanted require one.
    cuts, out_cut: a part of the output and the parts of the inputs that it alone depends on, and that it alone gives
        gradients to. Accuracy is measured there, since exact gradients of everything would take too long.
    makers: FlexAttention and others, each to be made into the forward pass.
    """

    name: str
    shape: str
    target: float
    code: Callable[..., torch.Tensor]
    inputs: Tensors
    grad_out: torch.Tensor
    cuts: tuple[Index, ...]
    out_cut: Index
    makers: Mapping[str, Callable[[], Run]]

    @property
    def wanted(self) -> list[int]:
        """Which inputs get a gradient."""
        return [at for at, x in enumerate(self.inputs) if x.requires_grad]

    def step(self, forward: Run) -> Step:
        return Step(forward, tuple(self.inputs[at] for at in self.wanted), self.grad_out)

    def part(self, results: Tensors) -> Tensors:
        """The part of (output, *gradients) that is looked at."""
        cuts = [self.out_cut, *(self.cuts[at] for at in self.wanted)]
        return tuple(x[cut] for x, cut in zip(results, cuts, strict=True))

    def compiled(self, compile: Compile) -> Run:
        """The eager code by a compiler."""
        run = compile(self.code)
        return lambda: run(*self.inputs)


def training_cases(
    only: Sequence[str], sizes: Sizes, device: str, tuned: bool = False
) -> dict[str, Callable[[], TrainingCase]]:
    """Name and maker of every case whose name holds one of the texts. tuned: FlexAttention's search for tiles too."""
    modes = {"flex": None, **({"flex tuned": TUNED} if tuned else {})}
    makers: dict[str, Callable[[], TrainingCase]] = {
        str(case): functools.partial(dense_case, case, device, modes) for case in sizes.dense
    }
    variants = [v for v in VARIANTS if v.name in TARGETS]
    makers |= {v.name: functools.partial(variant_case, v, sizes.variant, device, modes) for v in variants}
    return {name: make for name, make in makers.items() if any(text in name for text in only)}


# --------------------------------------------------------------------------------------------------------------------
# Dense shapes


def dense_case(case: dense.Case, device: str, modes: Mapping[str, str | None]) -> TrainingCase:
    """q, k, v in bf16; key and value heads repeated as models do. Looked at: the last key head and its queries."""
    made = Operands.make(case, device)
    x = replace(made, q=made.q.requires_grad_(), k=made.k.requires_grad_(), v=made.v.requires_grad_())
    makers: dict[str, Callable[[], Run]] = {
        "operator": functools.partial(dense.flashfuse_operator, x),
        "sdpa flash": functools.partial(dense.sdpa(SDPBackend.FLASH_ATTENTION), x),
        "sdpa cudnn": functools.partial(dense.sdpa(SDPBackend.CUDNN_ATTENTION), x),
    }
    makers |= {name: functools.partial(dense.flex, x, mode) for name, mode in modes.items()}
    groups = case.heads // case.kv_heads
    query, key = (slice(-1, None), slice(-groups, None)), (slice(-1, None), slice(-1, None))
    heads = f"H{case.heads}" if groups == 1 else f"H{case.heads}/{case.kv_heads}"
    return TrainingCase(
        name=str(case),
        shape=f"B{case.batch} {heads} S{case.length} D{case.dim}",
        target=DENSE_TARGET,
        code=causal_attention if case.causal else attention,
        inputs=(x.q, x.k, x.v),
        grad_out=_like(x.q),
        cuts=(query, key, key),
        out_cut=query,
        makers=makers,
    )


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q and result [B, H, T, D]; k and v may have fewer heads."""
    return plain(Shape(), q, *_repeated(q, k, v))


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return causal(Shape(), q, *_repeated(q, k, v))


def _repeated(q: torch.Tensor, *shared: torch.Tensor) -> Iterator[torch.Tensor]:
    """Each key or value head once for every query head that uses it, in the words of transformers' repeat_kv."""
    for x in shared:
        batch, heads, length, dim = x.shape
        groups = q.shape[1] // heads
        if groups == 1:
            yield x
            continue
        yield x[:, :, None].expand(batch, heads, groups, length, dim).reshape(batch, heads * groups, length, dim)


# --------------------------------------------------------------------------------------------------------------------
# Variants


def variant_case(variant: Variant, shape: Shape, device: str, modes: Mapping[str, str | None]) -> TrainingCase:
    """Gradients of q, k, v and a dense bias, whose gradient is summed over the batch. Looked at: the last head."""
    inputs = variant.make(shape, torch.bfloat16, device)
    with_gradients = [*inputs[:3], *(x for x in inputs[3:] if x.dim() == 4)]
    for x in with_gradients:
        x.requires_grad_()
    cuts = variant.cuts("H")

    def flex(mode: str | None) -> Run:
        mask = variant.block_mask(shape, inputs)
        run = torch.compile(variant.twin(shape, inputs[3:]), fullgraph=True, dynamic=False, mode=mode)
        return lambda: run(*inputs[:3], mask)

    return TrainingCase(
        name=variant.name,
        shape=f"B{shape.batch} H{shape.heads} S{shape.length} D{shape.dim}",
        target=TARGETS[variant.name],
        code=functools.partial(variant.eager, shape),
        inputs=inputs,
        grad_out=_like(inputs[0]),
        cuts=cuts,
        out_cut=cuts[0],
        makers={name: functools.partial(flex, mode) for name, mode in modes.items()},
    )


def _like(q: torch.Tensor) -> torch.Tensor:
    """A gradient of the output, which has the shape of the queries."""
    generator = torch.Generator(q.device).manual_seed(1)
    return torch.randn(q.shape, device=q.device, dtype=q.dtype, generator=generator)
