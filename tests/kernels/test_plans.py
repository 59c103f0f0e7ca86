"""Calls like earlier ones: on a GPU where there is one, otherwise in Triton's interpreter (see test_interpreter.py)."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Call, make_call

triton = pytest.importorskip("triton")

from flashfuse.kernels import ops, plans  # noqa: E402, F401
from flashfuse.kernels.forward import attention_forward_kernel  # noqa: E402
from flashfuse.kernels.launch import attention_forward  # noqa: E402
from flashfuse.kernels.ranges import mask_ranges, ranges_program  # noqa: E402
from flashfuse.kernels.relaunch import facts  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU or TRITON_INTERPRET=1; test_interpreter.py runs them",
)
attention = torch.ops.flashfuse.attention


@pytest.fixture(autouse=True)
def _no_plans_and_nan_filled_outputs() -> Iterator[None]:
    plans.attention.plans.clear()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def biased(seed: int = 0, **changes: Any) -> Call:
    bias = torch.randn(3, 40, 50, generator=torch.Generator().manual_seed(seed))
    return make_call("qk * 0.3 + t0[n1, q_idx, kv_idx]", (2, 3, 40, 16), 50, captured=[bias], **changes).to(DEVICE)


def same(call: Call) -> None:
    """What the operator gives is what the launcher gives, to the bit."""
    for mine, expected in zip(attention(*call.arguments), attention_forward(call), strict=True):
        assert torch.equal(mine, expected)
        assert (mine.stride(), mine.dtype) == (expected.stride(), expected.dtype)


def test_a_plan_serves_other_tensors() -> None:
    call = biased()
    same(call)
    other = call.on([torch.randn_like(x) for x in call.operands])
    same(other)
    assert len(plans.attention.plans) == 1
    assert not torch.equal(attention(*call.arguments)[0], attention(*other.arguments)[0])


def test_outputs_are_new_each_time() -> None:
    call = biased()
    first, second = attention(*call.arguments), attention(*call.arguments)
    assert not {x.data_ptr() for x in first} & {x.data_ptr() for x in second}


def _transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def _shifted(x: torch.Tensor) -> torch.Tensor:
    """At an address that is no multiple of what vector loads want."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("change", [_transposed, _shifted, lambda x: x[:1], lambda x: x.half()])
def test_a_plan_is_for_layouts(place: int, change: Any) -> None:
    """A tensor that differs in more than its elements has a plan of its own, or is refused as it always was."""
    call = biased()
    same(call)
    operands = list(call.operands)
    operands[place] = change(operands[place])
    other = call.on(operands)
    try:
        other.check()
        other.check_sizes()
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=str(error)[:30].replace("[", ".")):
            attention(*other.arguments)
        assert len(plans.attention.plans) == 1
        return
    if other.captured[0].shape[0] == 1:
        # Reads outside of a tensor take its nearest element.
        return
    same(other)
    assert len(plans.attention.plans) == 2


def test_sizes_and_specs_are_part_of_the_key() -> None:
    for scale in (0.3, 0.4):
        same(make_call(f"qk * {scale} + to_float(size0)", (2, 3, 40, 16), 50, sizes=[7]).to(DEVICE))
    same(make_call("qk * 0.3 + to_float(size0)", (2, 3, 40, 16), 50, sizes=[8]).to(DEVICE))
    assert len(plans.attention.plans) == 3


def test_a_plan_serves_other_seeds() -> None:
    first, second = (replace(biased(dropout=0.5), seed=torch.tensor(seed, device=DEVICE)) for seed in (1, 2))
    same(first)
    same(second)
    assert len(plans.attention.plans) == 1
    assert not torch.equal(attention(*first.arguments)[0], attention(*second.arguments)[0])


def test_ranges_are_no_captured_tensor() -> None:
    keep = torch.arange(200) < torch.tensor([[70], [200]])
    call = make_call("where(t0[n0, kv_idx], qk * 0.3, -inf)", (2, 3, 140, 16), 200, captured=[keep])
    program = ranges_program(call.spec, call.batch, call.kv_len)
    assert program is not None
    batch = [size if axis in program.batch else 1 for axis, size in enumerate(call.batch)]
    ranges = mask_ranges([keep], batch, 2, call.q_len, call.kv_len, program.needed, program.idle).to(DEVICE)
    q, k, v, captured, sizes, spec, *_ = call.to(DEVICE).arguments
    ranged = attention(q, k, v, captured, sizes, spec, ranges)[0]
    assert torch.equal(ranged, attention(q, k, v, captured, sizes, spec, ranges)[0])
    with pytest.raises(RuntimeError, match="captured tensors must be"):
        attention(q, k, v, [*captured, ranges], sizes, spec)
    with pytest.raises(RuntimeError, match="kv_ranges must be int32"):
        attention(q, k, v, captured, sizes, spec, ranges[..., :3])


def test_calls_without_a_launch_have_no_plan() -> None:
    for call in (biased(dtype=torch.float64), make_call("qk", (2, 0, 16), 5), make_call("qk", (2, 4, 16), 0)):
        attention(*call.to(DEVICE).arguments)
    assert not plans.attention.plans


def test_old_plans_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MAX_PLANS", 2)
    for q_len in (20, 21, 22):
        same(make_call("qk * 0.3", (2, q_len, 16), 30).to(DEVICE))
    assert len(plans.attention.plans) <= 2


def test_a_call_site_gives_what_the_operator_gives() -> None:
    """Whatever it was called with before: new elements, sizes, addresses that vectors cannot be loaded from, seeds."""
    site = plans.CallSite(plans.attention)
    first = biased(dropout=0.5)
    moved = first.on([_shifted(x) for x in first.operands])
    longer = make_call("qk * 0.3 + t0[n1, q_idx, kv_idx]", (2, 3, 44, 16), 50, captured=[torch.randn(3, 44, 50)])
    longer = replace(longer.to(DEVICE), spec=first.spec)
    seeds = (torch.tensor(seed, device=DEVICE) for seed in itertools.count())
    for call in (first, first, first.on([-x for x in first.operands]), moved, moved, first, longer, longer, first):
        seeded = replace(call, seed=next(seeds))
        for mine, expected in zip(site(*seeded.arguments), attention(*seeded.arguments), strict=True):
            assert torch.equal(mine, expected)
            assert (mine.stride(), mine.dtype) == (expected.stride(), expected.dtype)


def test_threads_share_a_call_site(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that looked up its plan while another called left it beside the other's layout, for all later calls."""
    site, (short, long) = (
        plans.CallSite(plans.attention),
        (make_call("qk * 0.3", (2, n, 16), 30).to(DEVICE) for n in (20, 24)),
    )
    for call in (short, long):
        attention(*call.arguments)
    key, others = plans.Operator.key, [long]

    def interrupted(*arguments: Any) -> Any:
        if others:
            site(*others.pop().arguments)
        return key(*arguments)

    monkeypatch.setattr(plans.Operator, "key", interrupted)
    for call in (short, long, short, long):
        assert torch.equal(site(*call.arguments)[0], attention(*call.arguments)[0])


def test_tf32_by_its_newer_name() -> None:
    """Once torch has been told by that, it does not tell by the older one, and every call failed."""
    code = """
import torch
from flashfuse.kernels.launch import allows_tf32
found = [allows_tf32()]
for name in ("tf32", "ieee"):
    torch.backends.cuda.matmul.fp32_precision = name
    found.append(allows_tf32())
print(found)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[False, True, False]", run.stderr


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="nothing is compiled when interpreted")
def test_a_plan_does_not_ask_triton_again(monkeypatch: pytest.MonkeyPatch) -> None:
    call = biased(dtype=torch.float16)
    expected = attention(*call.arguments)[0]
    monkeypatch.setattr(type(attention_forward_kernel), "run", lambda *_, **__: pytest.fail("worked out again"))
    assert torch.equal(attention(*call.arguments)[0], expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(*call.arguments)[0]
    captured.fill_(torch.nan)
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter launches nothing")
def test_hooks_are_told_of_a_launch() -> None:
    """A profiler's, whenever it comes: it was not while none was there."""
    call, launched = biased(), []
    for _ in range(2):
        attention(*call.arguments)
    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(hook := lambda metadata: launched.append(metadata.get()["name"]))
    try:
        same(call)
    finally:
        hooks.remove(hook)
    assert launched == 2 * ["attention_forward_kernel"]
    same(call)
    assert len(launched) == 2


def test_facts_of_numbers_are_what_triton_specialises_on() -> None:
    """A growing cache had an instance looked up by each of its lengths: only what these have in common may decide."""
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import native_specialize_impl

    numbers = (-16, -1, 0, 1, 2, 15, 16, 32, 1001, 1003, 2**31 - 1, 2**31, 2**31 + 15, 2**40 + 16, -(2**31) - 1)
    for one, other in itertools.product(numbers, numbers):
        known = [native_specialize_impl(CUDABackend, (n, 7), False, True, True) for n in (one, other)]
        assert (facts((one, 7)) == facts((other, 7))) == (known[0] == known[1])


def test_a_growing_cache_has_plans_of_its_own() -> None:
    """Each length is another call to the operator, right whatever the last one was."""
    for kv_len in (30, 31, 48, 49):
        same(make_call("qk * 0.3", (2, 20, 16), kv_len).to(DEVICE))
    assert len(plans.attention.plans) == 4
