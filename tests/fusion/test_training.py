"""Training: graphs that want gradients are fused, and outputs and gradients are as near to float64 as eager code's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from forms import Form, Sizes, Spelling, exact, module, spelled
from numerics import assert_close_to_exact
from torch import nn
from torch.nn import functional as F
from training import S, assert_trains, attention, compiled, qkvb

import flashfuse

pytestmark = pytest.mark.usefixtures("gradients")


@pytest.mark.parametrize(("form", "spelling"), [(f, s) for f, s, _ in spelled()], ids=[n for *_, n in spelled()])
def test_every_form_trains(form: Form, spelling: Spelling) -> None:
    sizes = form.sizes(Sizes())
    built = module(spelling, sizes)
    inputs = [x.requires_grad_(x.is_floating_point()) for x in form.make(sizes)]
    report = assert_trains(built, inputs, precise=lambda *xs: exact(built, xs))
    report.assert_fused(sites=form.expect.sites)


# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_inner_compilers(inner: str) -> None:
    assert_trains(attention, qkvb(), inner).assert_fused(sites=1)


def detached_bias_beside_itself(q: Any, k: Any, v: Any, bias: Any) -> Any:
    return ((q @ k.mT) * 0.3 + bias + bias.detach()).softmax(-1) @ v


def keys_of_detached_queries(q: Any, k: Any, v: Any, bias: Any) -> Any:
    return attention(q, q.detach(), v, bias)


def bias_without_grad(q: Any, k: Any, v: Any, bias: Any) -> Any:
    with torch.no_grad():
        doubled = (bias * 2).transpose(1, 2)
    return attention(q, k, v, doubled)


def views_without_grad(q: Any, k: Any, v: Any, bias: Any) -> Any:
    """Dynamo's values of such views say that they want gradients, and operands were read behind them."""
    with torch.no_grad():
        keys, values = k.transpose(-1, -2), v.view(v.shape)
    return ((q @ keys) * 0.3 + bias).softmax(-1) @ values


def written_without_grad(q: Any, k: Any, v: Any, bias: Any) -> Any:
    """Such a write changes values only, and its factor was given to the gradient too."""
    keys = k * 1.0
    with torch.no_grad():
        keys.mul_(2.0)
    return attention(q, keys, v, bias)


def view_with_grad_inside(q: Any, k: Any, v: Any, bias: Any) -> Any:
    with torch.no_grad():
        values = v.view(v.shape)
        with torch.enable_grad():
            keys = k.view(k.shape)
    return attention(q, keys, values, bias)


def attention_without_grad(q: Any, k: Any, v: Any, bias: Any) -> Any:
    with torch.no_grad():
        out = attention(q, k, v, bias)
    return out + q


def detached_maximum(q: Any, k: Any, v: Any, bias: Any) -> Any:
    scores = (q @ k.mT) * 0.3 + bias
    weights = torch.exp(scores - scores.amax(-1, keepdim=True).detach())
    return (weights / weights.sum(-1, keepdim=True)) @ v


def maximum_without_grad(q: Any, k: Any, v: Any, bias: Any) -> Any:
    scores = (q @ k.mT) * 0.3 + bias
    with torch.no_grad():
        shift = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - shift)
    return (weights / weights.sum(-1, keepdim=True)) @ v


def mask_from_bias(q: Any, k: Any, v: Any, bias: Any) -> Any:
    added = torch.where(bias > 0.9, torch.full_like(bias, -1e30), torch.zeros_like(bias))
    return attention(q, k, v, added)


def one_tensor(q: Any, k: Any, v: Any, bias: Any) -> Any:
    return attention(q, q, q, bias)


def written_before(q: Any, k: Any, v: Any, bias: Any) -> Any:
    return attention(q, (k * 1.0).mul_(2.0), v, bias)


def scores_as_integers(q: Any, k: Any, v: Any, bias: Any) -> Any:
    """Gradients do not pass integers; queries and keys had zeros for none."""
    return ((q @ k.mT).long() + bias).sigmoid() @ v


def mask_of_detached_scores(q: Any, k: Any, v: Any, bias: Any) -> Any:
    """A comparison passes no gradient, so nothing ends here."""
    s = (q @ k.mT) * 0.3 + bias
    return s.masked_fill(s.detach() > 1, 1.0).softmax(-1) @ v


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "fn",
    [
        scores_as_integers,
        mask_of_detached_scores,
        detached_bias_beside_itself,
        keys_of_detached_queries,
        bias_without_grad,
        views_without_grad,
        written_without_grad,
        view_with_grad_inside,
        attention_without_grad,
        detached_maximum,
        maximum_without_grad,
        mask_from_bias,
        one_tensor,
        written_before,
    ],
    ids=lambda fn: fn.__name__,
)
def test_gradients_go_where_the_source_sends_them(fn: Callable[..., Any], inner: str) -> None:
    assert_trains(fn, qkvb(), inner).assert_fused(sites=1)


def probabilities_without_grad(q: Any, k: Any, v: Any, bias: Any) -> Any:
    with torch.no_grad():
        probs = ((q @ k.mT) * 0.3 + bias).softmax(-1)
    return probs @ v


def detached_probabilities(q: Any, k: Any, v: Any, bias: Any) -> Any:
    return ((q @ k.mT) * 0.3 + bias).softmax(-1).detach() @ v


def scores_written_without_grad(q: Any, k: Any, v: Any, bias: Any) -> Any:
    scores = q @ k.mT + bias
    with torch.no_grad():
        scores.mul_(0.3)
    return scores.softmax(-1) @ v


def straight_through(q: Any, k: Any, v: Any, bias: Any) -> Any:
    s = q @ k.mT + bias
    return (s + (s.round() - s).detach()).softmax(-1) @ v


@pytest.mark.parametrize(
    "fn",
    [probabilities_without_grad, detached_probabilities, scores_written_without_grad, straight_through],
    ids=lambda fn: fn.__name__,
)
def test_gradient_that_ends_inside_is_refused(fn: Callable[..., Any]) -> None:
    report = assert_trains(fn, qkvb())
    report.assert_fused(sites=0)
    (refusal,) = report.refusals
    assert (refusal.code, "ends a gradient" in refusal.reason) == ("unknown-operator", True)


@pytest.mark.parametrize("frozen", [(1, 2), (0, 1, 2), (3,)], ids=str)
def test_frozen_tensors(frozen: tuple[int, ...]) -> None:
    inputs = [x.detach() if at in frozen else x for at, x in enumerate(qkvb())]
    assert_trains(attention, inputs, "aot_eager").assert_fused(sites=1)


# --------------------------------------------------------------------------------------------------------------------


class Causal(nn.Module):
    """A block with one projection of queries, keys and values, and a mask kept as a buffer."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("mask", torch.tril(torch.ones(S, S, dtype=torch.bool)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / k.shape[-1] ** 0.5
        scores = torch.where(self.mask, scores, torch.finfo(scores.dtype).min)
        return x + self.out((F.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2))


class Relative(nn.Module):
    """An attention whose bias is looked up in a learned table of distances, and a learned temperature."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.table = nn.Embedding(8, heads)
        self.scale = nn.Parameter(torch.full((heads, 1, 1), 0.4))
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        at = torch.arange(x.shape[1])
        distance = (at[None, :] - at[:, None]).abs().clamp(max=7)
        bias = self.table(distance).permute(2, 0, 1).unsqueeze(0)
        return (F.softmax(q @ k.mT * self.scale + bias, dim=-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", [Causal, Relative])
def test_models(kind: type[nn.Module], inner: str) -> None:
    """Gradients of every parameter, by way of the module's own state."""
    torch.manual_seed(0)
    model = kind()
    names = [name for name, _ in model.named_parameters()]

    def fn(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(2, S, 24, requires_grad=True)
    assert_trains(fn, [x, *model.parameters()], inner).assert_fused(sites=1)


def test_a_loss_falls_as_it_does_in_eager_code() -> None:
    def losses(dtype: torch.dtype, fused: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(Causal(), Causal(), nn.Linear(24, 1)).to(dtype)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        x, y = torch.randn(4, S, 24).to(dtype), torch.randn(4, S, 1).to(dtype)
        run = compiled(model, "aot_eager") if fused else model
        seen = []
        for _ in range(20):
            loss = F.mse_loss(run(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.detach())
        return torch.stack(seen)

    mine = losses(torch.float32, True)
    assert_close_to_exact(mine, losses(torch.float32, False), losses(torch.float64, False))
    assert mine[-1] < 0.5 * mine[0]


def test_what_is_written_after_the_attention_stays_as_it_is() -> None:
    """A sum saves no addend for its gradient, the operator does: autograd raised where eager code worked."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        bias = torch.zeros(S, S)
        bias.fill_diagonal_(-5.0)
        turned = bias.t()
        out = (q @ k.mT + bias).softmax(-1) @ v
        turned.mul_(2.0)
        return out + turned.sum()

    report = assert_trains(fn, qkvb()[:3])
    assert [(refusal.code, refusal.location.code) for refusal in report.refusals] == [("mutation", "turned.mul_(2.0)")]
    with torch.no_grad():
        assert len(flashfuse.explain(fn)(*qkvb()[:3]).sites) == 1


def rounded_bias(q: Any, k: Any, v: Any, bias: Any) -> Any:
    return ((q @ k.mT) * 0.3 + bias.round()).softmax(-1) @ v


def rounded_scores(q: Any, k: Any, v: Any, bias: Any) -> Any:
    return ((q @ k.mT) * 0.3 + bias).round().softmax(-1) @ v


def bias_nowhere_chosen(q: Any, k: Any, v: Any, bias: Any) -> Any:
    return torch.where(torch.arange(S) < S, q @ k.mT, bias).softmax(-1) @ v


def bias_left_out(q: Any, k: Any, v: Any, bias: Any) -> Any:
    scores = torch.baddbmm(bias.sum(0).expand(6, S, S), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0)
    return scores.softmax(-1) @ v.flatten(0, 1)


def left_out_of_output(q: Any, k: Any, v: Any, bias: Any) -> Any:
    probs = (q.flatten(0, 1) @ k.flatten(0, 1).mT).softmax(-1)
    return torch.baddbmm(bias.sum(), probs, v.flatten(0, 1), beta=0)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "fn",
    [rounded_bias, rounded_scores, bias_nowhere_chosen, bias_left_out, left_out_of_output],
    ids=lambda fn: fn.__name__,
)
def test_gradients_are_zeros_where_a_derivative_is(fn: Callable[..., Any], inner: str) -> None:
    """What autograd follows without anything coming of it had no gradient (`None`)."""
    assert_trains(fn, qkvb(), inner).assert_fused(sites=1)
