"""Dropout in compiled models: torch's generator decides what is dropped, in every pass and in every recomputation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forms.same_dropout import SameDropout
from numerics import assert_close_to_exact
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import flashfuse

B, S, EMBED, HEADS, P = 2, 24, 32, 4, 0.3
INNERS = ["eager", "aot_eager", "inductor"]
aten = torch.ops.aten

pytestmark = pytest.mark.usefixtures("gradients")


class Block(nn.Module):
    """An attention with dropout on its probabilities and on its output."""

    def __init__(self, functional: bool = False, p: float = P, residual: float = 0.0) -> None:
        super().__init__()
        self.functional, self.p = functional, p
        self.qkv, self.out = nn.Linear(EMBED, 3 * EMBED), nn.Linear(EMBED, EMBED)
        self.drop, self.residual = nn.Dropout(p), nn.Dropout(residual)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.functional:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0)
        else:
            y = self.drop((q @ k.transpose(-1, -2) * (EMBED // HEADS) ** -0.5).softmax(-1)) @ v
        return self.residual(self.out(y.transpose(1, 2).flatten(2)))


def block(**settings: Any) -> Block:
    torch.manual_seed(0)
    return Block(**settings)


def x(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(B, S, EMBED, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def compiled(fn: Callable[..., Any], inner: str = "eager", **more: Any) -> Callable[..., Any]:
    options = {"flashfuse.inner": inner, "flashfuse.strict": True, **more.pop("options", {})}
    return torch.compile(fn, backend="flashfuse", options=options, **more)


def step(fn: Callable[..., torch.Tensor], module: nn.Module, seed: int | None = 7) -> list[torch.Tensor]:
    """The output, and the gradients of the input and of the parameters."""
    if seed is not None:
        torch.manual_seed(seed)
    inputs = x(next(module.parameters()).dtype)
    out = fn(inputs)
    leaves = [inputs, *module.parameters()]
    for leaf in leaves:
        leaf.grad = None
    out.square().sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def differs(found: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(not torch.equal(a, b) for a, b in zip(found[:-1], other[:-1], strict=True))


# --------------------------------------------------------------------------------------------------------------------
# What is computed


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_step_is_eagers_with_the_same_mask(functional: bool, dtype: torch.dtype) -> None:
    module = block(functional=functional)
    exact_module = block(functional=functional).double()
    with SameDropout():
        exact = step(exact_module, exact_module)
        eager = step(module.to(dtype), module)
    found = step(compiled(module), module)
    flashfuse.reports()[0].assert_fused(sites=1)
    for mine, theirs, truth in zip(found, eager, exact, strict=True):
        assert_close_to_exact(mine, theirs, truth)


@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention(need_weights: bool) -> None:
    """Whose dropout is inside a function that Dynamo keeps whole; averaged weights are what was dropped from."""
    module = nn.MultiheadAttention(EMBED, HEADS, dropout=P, batch_first=True)
    run = compiled(lambda x: module(x, x, x, need_weights=need_weights)[0])
    first, again, other = step(run, module), step(run, module), step(run, module, seed=8)
    (report,) = flashfuse.reports()
    assert [site.spec.dropout for site in report.sites] == [P], report.refusals
    assert_equal(first, again)
    assert differs(first[:2], other[:2])


def test_without_gradients() -> None:
    """Dropout that stays active in inference, as for an estimate of uncertainty."""
    module = block()
    run = compiled(module)
    with torch.no_grad():
        draws = torch.cat([run(x().repeat(100, 1, 1)).view(100, B, S, EMBED) for _ in range(4)])
        expected = module.eval()(x())
    flashfuse.reports()[0].assert_fused(sites=1)
    deviation = draws.std(0) / 20
    assert ((draws.mean(0) - expected).abs() <= 5.5 * deviation + 1e-6).all()


def test_in_evaluation_nothing_is_dropped() -> None:
    module = block().eval()
    found, expected = compiled(module)(x()), module(x())
    torch.testing.assert_close(found, expected)
    assert "randint" not in flashfuse.reports()[0].after


def test_report_says_so() -> None:
    report = flashfuse.explain(block())(x())
    assert [site.spec.dropout for site in report.sites] == [P]
    assert "dropout 0.3 of softmax" in report.sites[0].math
    assert "dropout 0.3" in str(report)
    assert "dropout(" in report.before
    assert report.after.count("dropout(") == report.before.count("dropout(") - 1


# --------------------------------------------------------------------------------------------------------------------
# Torch's generator


@pytest.mark.parametrize(
    ("inner", "functional"), [("eager", False), ("eager", True), ("aot_eager", False), ("inductor", True)]
)
def test_seed_and_state_reproduce_a_step(inner: str, functional: bool) -> None:
    module = block(functional=functional, residual=0.1)
    run = compiled(module, inner)
    first, again = step(run, module), step(run, module)
    flashfuse.reports()[0].assert_fused(sites=1)
    assert_equal(first, again)
    state = torch.random.get_rng_state()
    second = step(run, module, seed=None)
    assert differs(first, second)
    torch.random.set_rng_state(state)
    assert_equal(step(run, module, seed=None), second)


def test_layers_and_calls_drop_apart() -> None:
    """Two layers with the same weights and the same input give different outputs; so do two calls."""
    module = block()
    run = compiled(lambda x: (module(x), module(x)))
    (a, b), (c, d) = run(x()), run(x())
    flashfuse.reports()[0].assert_fused(sites=2)
    assert len({t.sum().item() for t in (a, b, c, d)}) == 4


# --------------------------------------------------------------------------------------------------------------------
# Activations that are computed again


@pytest.mark.parametrize(
    ("inner", "reentrant"), [("eager", False), ("eager", True), ("aot_eager", False), ("inductor", True)]
)
def test_checkpoint_around_a_compiled_module(inner: str, reentrant: bool) -> None:
    module = block(residual=0.1)
    run = compiled(module, inner)
    expected = step(run, module)
    assert_equal(step(lambda x: checkpoint(run, x, use_reentrant=reentrant), module), expected)
    flashfuse.reports()[0].assert_fused(sites=1)


@pytest.mark.parametrize(("inner", "selective"), [("aot_eager", False), ("aot_eager", True), ("inductor", True)])
def test_checkpoint_inside(inner: str, selective: bool) -> None:
    """The gradients are those of the numbers that the forward drew, whatever is computed again."""
    module = block()
    kept = [aten.mm.default, aten.addmm.default] if selective else []
    more = {"context_fn": lambda: create_selective_checkpoint_contexts(kept)} if selective else {}
    run = compiled(lambda x: checkpoint(module, x, use_reentrant=False, **more), inner)
    found, expected = step(run, module), step(compiled(module, inner), module)
    for report in flashfuse.reports():
        report.assert_fused(sites=1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("inner", INNERS)
def test_backward_uses_the_forwards_mask(inner: str) -> None:
    """By the output's own linearity: it is linear in the values, so its gradient gives the output back."""

    def attend(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.dropout((q @ q.transpose(-1, -2)).softmax(-1), 0.5) @ v

    run = compiled(attend, inner)
    q, v = torch.randn(B, S, 8), torch.randn(B, S, 8, requires_grad=True)
    out = run(q, v)
    torch.rand(3)
    grad = torch.randn_like(out)
    (back,) = torch.autograd.grad(out, v, grad)
    torch.testing.assert_close((back * v).sum(), (grad * out).sum())


# --------------------------------------------------------------------------------------------------------------------
# Transforms of torch.func


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.dropout((q @ k.transpose(-1, -2)).softmax(-1), 0.5) @ v


def zeros_of(weights: torch.Tensor) -> torch.Tensor:
    return weights.detach() == 0


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_draws_as_it_is_told(randomness: str) -> None:
    """With values that are the identity an output is the weights themselves."""

    def each(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(attend, in_dims=(0, 0, None), randomness=randomness)(q, k, v)

    q, k = torch.randn(2, 3, B, S, 8)
    dropped = zeros_of(compiled(each)(q, k, torch.eye(S)))
    flashfuse.reports()[0].assert_fused(sites=1)
    assert 0.4 < dropped.float().mean() < 0.6
    assert not torch.equal(dropped[:, 0], dropped[:, 1])
    assert torch.equal(dropped[0], dropped[1]) == (randomness == "same")


def test_jacobian_is_of_what_was_drawn() -> None:
    """Gradients of all outputs at once are those of one forward: its own product with the values gives the output."""

    def jacobian(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def output(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            out = attend(q, k, v)
            return out, out

        return torch.func.jacrev(output, has_aux=True)(v)

    q, k, v = torch.randn(3, 6, 8)
    found, out = compiled(jacobian)(q, k, v)
    flashfuse.reports()[0].assert_fused(sites=1)
    torch.testing.assert_close(torch.einsum("idjc,jc->id", found, v), out)


# --------------------------------------------------------------------------------------------------------------------
# Verification


@pytest.mark.parametrize("functional", [False, True])
def test_verified_with_dropout_left_out(functional: bool) -> None:
    module = block(functional=functional, residual=0.2)
    run = compiled(module, options={"flashfuse.verify": True})
    torch.manual_seed(3)
    found = run(x())
    torch.manual_seed(3)
    torch.testing.assert_close(run(x()), found, rtol=0, atol=0)


def test_verification_sees_a_wrong_rewrite(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashfuse.kernels import tiled

    attend = tiled._attend
    monkeypatch.setattr(tiled, "_attend", lambda *args: tuple(t * 1.01 for t in attend(*args)))
    monkeypatch.setattr(tiled.flash_cpu, "additive_program", lambda _: None)
    with pytest.raises(flashfuse.VerificationError, match="differs by"):
        compiled(block(), options={"flashfuse.verify": True})(x())
