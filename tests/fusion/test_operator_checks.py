"""torch's own checks of the operators, on the calls that matching makes of every form of attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import make_call
from forms import FORMS, Form, Sizes, module
from recorded import operator_calls, widened

import flashfuse.kernels.ops  # noqa: F401
from flashfuse.kernels.spec import AttentionSpec

attention = torch.ops.flashfuse.attention.default
attention_backward = torch.ops.flashfuse.attention_backward.default
mask_ranges = torch.ops.flashfuse.mask_ranges.default

TINY = Sizes(batch=2, heads=2, q_len=6, kv_len=6, dim=4, value_dim=3, window=3, chunk=3, buckets=4)
# A score this small is a mask's fill; float64 has no digits left there for a product that is added to it.
FILL = -1e6

pytestmark = pytest.mark.usefixtures("gradients")


def calls(form: Form, sizes: Sizes, learned: bool = False) -> dict[Any, list[tuple[Any, ...]]]:
    """learned: as where gradients of all inputs are wanted."""
    sizes = form.sizes(sizes)
    inputs = [x.requires_grad_(learned and x.is_floating_point()) for x in form.make(sizes)]
    with torch.set_grad_enabled(learned):
        return operator_calls(module(form.spellings[0], sizes), inputs)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_gradcheck(form: Form) -> None:
    """Gradients by finite differences, of everything a form reads, in rows that have a key."""
    # There are no gradients behind what a cache stores, so where they are wanted the graph makes keys and values.
    recorded = calls(form, TINY, learned=form.expect.key != "none")[attention]
    assert len(recorded) >= form.expect.sites
    for q, k, v, captured, sizes, text, *ranges in recorded:
        spec = widened(AttentionSpec.from_text(text), empty_row="zero").to_text()
        wide = [x.detach().double() if x.is_floating_point() else x for x in (q, k, v, *captured)]
        _, lse = attention(*wide[:3], wide[3:], sizes, spec, *ranges)
        empty = lse[..., :1] <= FILL

        def run(*x: torch.Tensor) -> torch.Tensor:
            out, _ = attention(*x[:3], x[3:], sizes, spec, *ranges)  # noqa: B023
            return out.masked_fill(empty, 0.0)  # noqa: B023

        assert not empty.all()
        inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in wide]
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


# Masks by data, with as many keys as it takes for ranges to pay.
RANGED = dict.fromkeys(("padding", "documents"), Sizes(batch=2, heads=1, q_len=288, kv_len=288, dim=4))
# And one of each other kind of program: tables, several products, a sink, a factor, no normaliser and dropout.
CHECKED = RANGED | dict.fromkeys(("shifted-windows", "latent-sum", "sink-last", "head-mask", "dropout-sigmoid"), TINY)


def checked(name: str) -> dict[Any, list[tuple[Any, ...]]]:
    return calls(next(form for form in FORMS if form.name == name), CHECKED[name])


def permuted(x: torch.Tensor) -> torch.Tensor:
    """The same values in another dense memory order."""
    return x.transpose(0, -2).contiguous().transpose(0, -2)


def wanting(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().requires_grad_(x.is_floating_point())


@pytest.mark.parametrize("name", CHECKED)
def test_opcheck(name: str) -> None:
    """All tests of `opcheck`, the compiled gradients among them, on operands as they are and in another dense order."""
    q, k, v, captured, *rest = checked(name)[attention][0]
    torch.library.opcheck(attention, (*map(wanting, (q, k, v)), [*map(wanting, captured)], *rest))
    operands = [permuted(x).requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(attention, (*operands, [*map(wanting, captured)], *rest))


@pytest.mark.parametrize("name", CHECKED)
def test_opcheck_of_the_backward(name: str) -> None:
    """It has no derivative to compile, so what is left is its schema, its fake and its dispatch."""
    *tensors, captured, sizes, text, kv_ranges, seed = (*checked(name)[attention][0], None, None)[:8]
    for operands in (tensors, [*map(permuted, tensors)]):
        out, lse = attention(*operands, captured, sizes, text, kv_ranges, seed)
        needs = [True] * (3 + sum(c.is_floating_point() for c in captured))
        arguments = (torch.ones_like(out), *operands, out, lse, captured, sizes, text, kv_ranges, seed, needs)
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(attention_backward, arguments, test_utils=tests)


@pytest.mark.parametrize("name", RANGED)
def test_opcheck_of_the_ranges(name: str) -> None:
    captured, *rest = checked(name)[mask_ranges][0]
    torch.library.opcheck(mask_ranges, (captured, *rest))
    torch.library.opcheck(mask_ranges, ([c.mT.contiguous().mT if c.dim() > 1 else c for c in captured], *rest))


def test_opcheck_of_a_look_up() -> None:
    """A table read at positions that depend on data."""
    captured = [torch.randint(7, (12, 10)), torch.randn(7, 3)]
    call = make_call("qk + t1[t0[q_idx, kv_idx], n1]", (2, 3, 12, 4), 10, captured=captured)
    operands = [wanting(permuted(x)) for x in (call.q, call.k, call.v)]
    torch.library.opcheck(attention, (*operands, [*map(wanting, captured)], call.sizes, call.spec.to_text()))
