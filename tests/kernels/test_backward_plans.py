"""Backward calls like earlier ones: on a GPU where there is one, otherwise interpreted (see test_interpreter.py)."""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Call, make_call
from gradient_cases import differentiable

pytest.importorskip("triton")

from triton_backward import DEVICE, RUNS, noise

from flashfuse.kernels import ops, plans  # noqa: F401
from flashfuse.kernels.call import BackwardArguments
from flashfuse.kernels.launch import allows_tf32
from flashfuse.kernels.launch_backward import attention_backward
from flashfuse.kernels.ranges import mask_ranges, ranges_program
from flashfuse.kernels.tiled import attention_tiled

pytestmark = RUNS
PLANS = plans.attention_backward.plans
operator = torch.ops.flashfuse.attention_backward
BIASED = "qk * 0.3 + t0[n1, q_idx, kv_idx]"
Arguments = tuple[Any, ...]


@pytest.fixture(autouse=True)
def _no_plans_and_nan_filled_outputs() -> Iterator[None]:
    PLANS.clear()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def biased(seed: int = 0, **changes: Any) -> Call:
    bias = torch.randn(2, 20, 24, generator=torch.Generator().manual_seed(seed))
    return make_call(BIASED, (1, 2, 20, 16), 24, captured=[bias], **changes)


def arguments_of(call: Call, needs: Sequence[bool] | None = None) -> Arguments:
    """The operator's, with a gradient of the output."""
    out, lse = attention_tiled(call)
    grad_out = noise(*out.shape).to(out.dtype)
    call = call.to(DEVICE)
    q, k, v, *rest = call.arguments
    tensors = (grad_out.to(DEVICE), q, k, v, out.to(DEVICE), lse.to(DEVICE))
    return *tensors, *rest, [True] * len(differentiable(call)) if needs is None else list(needs)


def expected(arguments: Arguments) -> list[torch.Tensor]:
    """By the launcher, which keeps nothing."""
    given = BackwardArguments(*arguments)
    return attention_backward(given.call, given.grad_out, given.out, given.lse, given.needs)


def same(arguments: Arguments, run: Any = operator, by_launcher: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
    """What the operator gives is what the launcher gives, to the bit."""
    found = run(*arguments)
    for mine, other in zip(found, by_launcher or expected(arguments), strict=True):
        assert torch.equal(mine, other)
        assert (mine.stride(), mine.dtype) == (other.stride(), other.dtype)
    return found


def other_elements(arguments: Arguments) -> Arguments:
    """A call of other tensors in the same layouts."""

    def other(x: Any) -> Any:
        if isinstance(x, list):
            return [other(part) for part in x]
        return x * 0.5 if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return tuple(map(other, arguments))


def ranged() -> Arguments:
    """With ranges and rows that may see every key."""
    ids = torch.tensor([[0] * 50 + [1] * 90, [0] * 20 + [1] * 120])
    score = "where(t0[n0, q_idx] == t0[n0, kv_idx], qk * 0.3, -inf)"
    call = make_call(score, (2, 1, 70, 16), 140, captured=[ids])
    program = ranges_program(call.spec, call.batch, call.kv_len)
    assert program is not None
    ranges = mask_ranges(call.captured, [2, 1], 2, 70, 140, program.needed, program.idle)
    return arguments_of(replace(call, kv_ranges=ranges))


CALLS = {
    "plain": lambda: arguments_of(make_call("qk * 0.3", (1, 2, 20, 16), 24)),
    "shared-keys": lambda: arguments_of(make_call("qk * 0.3", (1, 2, 2, 20, 16), 24, k_batch=(1, 2, 1))),
    "bias": lambda: arguments_of(biased()),
    "added-twice": lambda: arguments_of(
        make_call(f"{BIASED} * t0[n1, 0, 0]", (1, 2, 20, 16), 24, captured=[noise(2, 20, 24)])
    ),
    "distances": lambda: arguments_of(
        make_call("qk * 0.3 + t0[n1, kv_idx - q_idx + 19]", (1, 2, 20, 16), 24, captured=[noise(2, 43)])
    ),
    "slope": lambda: arguments_of(make_call("qk * t0[n1]", (1, 2, 20, 16), 24, captured=[noise(2)])),
    "shared-slope": lambda: arguments_of(make_call("qk * t0[n1 // 2]", (1, 4, 20, 16), 24, captured=[noise(2)])),
    "shared-key-bias": lambda: arguments_of(
        make_call("qk + t0[n1, kv_idx // 2]", (1, 2, 20, 16), 24, captured=[noise(2, 12)])
    ),
    "look-up": lambda: arguments_of(
        make_call("qk + t0[t1[n0, kv_idx]]", (1, 2, 20, 16), 24, captured=[noise(5), torch.arange(24).view(1, 24) % 5])
    ),
    "shared-pairs": lambda: arguments_of(
        make_call("qk + t0[n1, q_idx, min(abs(kv_idx - q_idx), 5)]", (1, 2, 20, 16), 24, captured=[noise(2, 20, 6)])
    ),
    "sink-and-factor": lambda: arguments_of(
        make_call("qk * t0[n1]", (1, 2, 20, 16), 24, sink="t0[n1]", factor="t0[n1] * 2.0", captured=[noise(2)])
    ),
    "dropout": lambda: arguments_of(biased(dropout=0.5)),
    "no-softmax": lambda: arguments_of(make_call("sigmoid(qk)", (1, 2, 20, 16), 24, normaliser="none")),
    "half": lambda: arguments_of(biased(dtype=torch.float16)),
    "ranges": ranged,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_plan_serves_other_tensors(name: str) -> None:
    """Of every kind of backward pass, at the operator and at a call site; what it gives is new each time."""
    arguments, site = CALLS[name](), plans.CallSite(plans.attention_backward)
    calls = [(given, expected(given)) for given in (arguments, other_elements(arguments))]
    found = [same(given, run, right) for run in (operator, site) for given, right in (*calls, calls[0])]
    assert len(PLANS) == 1
    places = [x.data_ptr() for gradients in found for x in gradients]
    assert len(set(places)) == len(places)
    assert any(not torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))


def _transposed(x: torch.Tensor) -> torch.Tensor:
    return x.mT.contiguous().mT


def _shifted(x: torch.Tensor) -> torch.Tensor:
    """At an address that is no multiple of what vector loads want."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def with_tensor(arguments: Arguments, place: int, change: Any) -> Arguments:
    """The arguments with one tensor changed; the place 6 is that of a list."""
    changed = list(arguments)
    changed[place] = [change(x) for x in changed[place]] if place == 6 else change(changed[place])
    return tuple(changed)


@pytest.mark.parametrize("place", range(7))
@pytest.mark.parametrize("change", [_transposed, _shifted])
def test_a_plan_is_for_layouts(place: int, change: Any) -> None:
    """A tensor that lies otherwise has a plan of its own, whichever of the operator's it is."""
    arguments, site = CALLS["bias"](), plans.CallSite(plans.attention_backward)
    moved = with_tensor(arguments, place, change)
    first, second = ((given, expected(given)) for given in (arguments, moved))
    for number, (given, right) in ((1, first), (2, second), (2, first), (2, second)):
        same(given, operator, right)
        same(given, site, right)
        assert len(PLANS) == number


@pytest.mark.parametrize("change", [_transposed, _shifted])
def test_a_plan_is_for_layouts_of_ranges(change: Any) -> None:
    arguments = ranged()
    for given in (arguments, with_tensor(arguments, 9, change), arguments):
        same(given)
    assert len(PLANS) == 2


def test_needs_sizes_and_specs_are_part_of_the_key() -> None:
    site = plans.CallSite(plans.attention_backward)
    needs = [
        (True, True, True, True),
        (True, False, True, False),
        (False, False, False, True),
        (False, True, True, True),
    ]
    for flags in needs:
        arguments = arguments_of(biased(), flags)
        same(arguments)
        assert len(same(arguments, site)) == sum(flags)
    assert len(PLANS) == len(needs)
    for scale, size in ((0.3, 7), (0.4, 7), (0.3, 8)):
        arguments = arguments_of(make_call(f"qk * {scale} + to_float(size0)", (2, 20, 16), 24, sizes=[size]))
        same(arguments)
    assert len(PLANS) == len(needs) + 3


def test_products_of_float32_are_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = CALLS["plain"]()
    same(arguments)
    monkeypatch.setattr(plans, "allows_tf32", lambda: not allows_tf32())
    operator(*arguments)
    assert len(PLANS) == 2


def test_threads_share_a_call_site(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that calls while another looks its plan up leaves a layout with its own plan."""
    site = plans.CallSite(plans.attention_backward)
    short, long = (arguments_of(make_call("qk * 0.3", (2, n, 16), 30)) for n in (20, 24))
    for arguments in (short, long):
        operator(*arguments)
    key, others = plans.Operator.key, [long]

    def interrupted(*given: Any) -> Any:
        if others:
            site(*others.pop())
        return key(*given)

    monkeypatch.setattr(plans.Operator, "key", interrupted)
    for arguments in (short, long, short, long):
        same(arguments, site)


def test_what_torch_computes_has_no_plan() -> None:
    for call in (biased(dtype=torch.float64), make_call("qk", (2, 4, 16), 0)):
        operator(*arguments_of(call))
    assert not PLANS


def test_old_plans_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MAX_PLANS", 2)
    for q_len in (20, 21, 22):
        same(arguments_of(make_call("qk * 0.3", (2, q_len, 16), 30)))
    assert len(PLANS) <= 2


def test_rows_that_a_batch_axis_shares() -> None:
    """Under vmap of a gradient of the output alone log-sum-exps are expanded, and were read as if they were dense."""
    grad_out, q, k, v, out, lse, *rest = CALLS["plain"]()
    several = torch.stack([grad_out, grad_out * 2])
    found = torch.func.vmap(lambda g: operator(g, q, k, v, out, lse, *rest))(several)
    for at in range(2):
        for mine, other in zip(found, operator(several[at], q, k, v, out, lse, *rest), strict=True):
            assert torch.equal(mine[at], other)


@pytest.mark.parametrize("name", CALLS)
def test_a_plan_keeps_no_tensor(name: str) -> None:
    """Positions made for one call were kept for the next: in a CUDA graph's memory, if that was captured."""
    arguments = CALLS[name]()
    left = [weakref.ref(x) for x in (*arguments[:6], *arguments[6], *operator(*arguments))]
    del arguments
    gc.collect()
    assert PLANS
    assert not any(x() is not None for x in left)
    assert not [x for x in tensors_in(PLANS, set()) if x.device.type != "meta"]


def tensors_in(x: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """The tensors that can be reached from an object through containers, attributes and closures."""
    if id(x) in seen:
        return
    seen.add(id(x))
    inside: Iterable[Any] = ()
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, dict):
        inside = [*x.keys(), *x.values()]
    elif isinstance(x, (tuple, list, set, frozenset)):
        inside = x
    elif isinstance(x, types.FunctionType):
        inside = [cell.cell_contents for cell in x.__closure__ or ()]
    elif type(x).__module__.startswith("flashfuse."):
        inside = vars(x).values()
    for value in inside:
        yield from tensors_in(value, seen)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="nothing is compiled when interpreted")
@pytest.mark.parametrize("name", CALLS)
def test_a_plan_does_not_ask_triton_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    arguments = CALLS[name]()
    found = operator(*arguments)
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: pytest.fail("worked out again"))
    for mine, other in zip(operator(*arguments), found, strict=True):
        assert torch.equal(mine, other)
