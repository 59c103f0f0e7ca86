"""Programs of stored keys and values: the spec's text, the CPU path tile by tile, and what is refused."""

from dataclasses import replace

import pytest
import torch
from attention_cases import make_call
from numerics import assert_close_to_exact, assert_lse_close_to_exact
from stored_cases import BF16, CACHES, FP16, INT8, scales
from torch.utils._python_dispatch import TorchDispatchMode

import flashfuse.kernels.ops  # noqa: F401
from flashfuse.kernels.spec import AttentionSpec, parse
from flashfuse.kernels.stored import STORED, holds
from flashfuse.kernels.tiled import attention_tiled

MASKED = "where(kv_idx <= q_idx + (kv_len - q_len), {}, -inf)"


@pytest.mark.parametrize("q_len", [1, 19])
@pytest.mark.parametrize("dtype", [FP16, BF16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CACHES)
def test_caches_on_the_cpu(name: str, dtype: torch.dtype, q_len: int) -> None:
    cache = CACHES[name]
    call = cache.call(dtype, q_len, MASKED.format(cache.score))
    assert AttentionSpec.from_text(call.spec.to_text()) == call.spec
    exact, eager = call.exact(), call.eager()
    out, lse = attention_tiled(call)
    assert_close_to_exact(out, eager[0], exact[0])
    assert_lse_close_to_exact(lse, eager[1], exact[1], dtype=call.spec.compute_dtype)


class Largest(TorchDispatchMode):
    """The elements of the largest floating-point tensor of at least two bytes that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.dtype.is_floating_point:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_a_tile_at_a_time_on_the_cpu() -> None:
    """The cache has 4096 keys for each head, a tile 1024."""
    heads, kv_len, dim = 2, 4096, 32
    call = make_call(
        "qk * 0.3", (heads, 3, 1, dim), kv_len, k_batch=(heads, 1), dtype=FP16, stored=INT8, key="x * t0[n0, kv_idx]",
        value="x * t0[n0, kv_idx]", captured=[scales(heads, kv_len).half()],
    )  # fmt: skip
    with Largest() as seen:
        attention_tiled(call)
    assert 0 < seen.elements < heads * kv_len * dim


def test_vmap_moves_the_programs_axes() -> None:
    """Each position has scales of its own, and all share the cache."""
    call = CACHES["int8-by-head"].call(FP16, 2)
    q = torch.stack([call.q, call.q * 0.5])
    each = [[c * factor for c in call.captured] for factor in (1.0, 0.25)]
    captured = [torch.stack(parts) for parts in zip(*each, strict=True)]
    text = call.spec.to_text()

    def run(q: torch.Tensor, captured: list[torch.Tensor]) -> torch.Tensor:
        return torch.ops.flashfuse.attention(q, call.k, call.v, captured, call.sizes, text)[0]

    expected = torch.stack([run(a, b) for a, b in zip(q, each, strict=True)])
    assert torch.equal(torch.vmap(run)(q, captured), expected)


def test_there_are_no_gradients() -> None:
    call = CACHES["int8-by-head"].call(torch.float32, 2)
    q = call.q.requires_grad_()
    out, _ = torch.ops.flashfuse.attention(q, *call.arguments[1:6])
    with pytest.raises(RuntimeError, match="no gradients behind programs of stored elements"):
        out.sum().backward()


def test_programs_of_elements_have_no_query() -> None:
    spec = CACHES["int8-by-head"].call(FP16, 2).spec
    with pytest.raises(ValueError, match="same for all queries"):
        replace(spec, key=parse("x * to_float(q_idx)"))


def test_element_types_are_checked() -> None:
    call = CACHES["int8-by-head"].call(FP16, 2)
    with pytest.raises(RuntimeError, match=r"k is torch\.float64, of which no program makes an operand"):
        torch.ops.flashfuse.attention(call.q, call.k.double(), *call.arguments[2:6])
    plain = replace(call, spec=replace(call.spec, key=None))
    with pytest.raises(RuntimeError, match=r"k is torch\.bfloat16, which torch\.float16 cannot hold exactly"):
        torch.ops.flashfuse.attention(call.q, call.k.to(BF16), *plain.arguments[2:6])


@pytest.mark.parametrize("narrow", STORED, ids=str)
@pytest.mark.parametrize("wide", [FP16, BF16, torch.float32, torch.float64], ids=str)
def test_which_types_hold_others(wide: torch.dtype, narrow: torch.dtype) -> None:
    """By every value of two bytes, or of one."""
    count, bits = (256, torch.uint8) if narrow.itemsize == 1 else (2**16, torch.uint16)
    values = torch.arange(count).to(bits).view(narrow).double()
    assert holds(wide, narrow) == torch.equal(values.nan_to_num(0.5), values.to(wide).double().nan_to_num(0.5))
