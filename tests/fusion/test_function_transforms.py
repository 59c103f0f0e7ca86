"""`torch.func` around attention in a compiled function: fused where the operator can follow, else refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from numerics import assert_close_to_exact
from torch.func import grad, grad_and_value, jacrev, jvp, vjp, vmap
from training import attention, compiled, leaves, qkvb

import flashfuse
from flashfuse.report import Report

Function = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("gradients")


def assert_same(fn: Function, inner: str = "aot_eager", inputs: Sequence[torch.Tensor] | None = None) -> Report:
    """What the compiled function gives, by the accuracy rule; the report of its only graph."""
    given = [x.detach() for x in qkvb()] if inputs is None else inputs
    results = (compiled(fn, inner)(*leaves(given)), fn(*leaves(given)), fn(*leaves(given, torch.float64)))
    for fused, eager, exact in zip(*map(torch.utils._pytree.tree_leaves, results), strict=True):
        assert_close_to_exact(fused, eager, exact)
    (report,) = flashfuse.reports()
    return report


def energy(*inputs: Any) -> Any:
    return attention(*inputs).square().sum()


def of_queries(*inputs: Any) -> Any:
    return grad(energy)(*inputs)


def of_a_bias_with_the_value(*inputs: Any) -> Any:
    return grad_and_value(energy, argnums=(0, 3))(*inputs)


def vector_product(*inputs: Any) -> Any:
    out, pull = vjp(attention, *inputs)
    return out, pull(out.cos())


def mapped_examples(*inputs: Any) -> Any:
    return vmap(attention, in_dims=(0, 0, 0, None))(*inputs)


def mapped_heads(*inputs: Any) -> Any:
    """Of which only the bias and the queries are mapped: keys and values are shared, and the output's axis moves."""
    q, k, v, bias = inputs
    return vmap(attention, in_dims=(1, None, None, 0), out_dims=2)(q, k[:, 0], v[:, 0], bias)


def gradients_of_each_example(*inputs: Any) -> Any:
    return vmap(grad(energy, argnums=(0, 2, 3)), in_dims=(0, 0, 0, None))(*inputs)


def gradient_of_mapped_examples(*inputs: Any) -> Any:
    return grad(lambda q, bias: mapped_examples(q, *inputs[1:3], bias).square().sum(), argnums=(0, 1))(
        inputs[0], inputs[3]
    )


def mapped_twice(*inputs: Any) -> Any:
    return vmap(vmap(attention))(*inputs[:3], inputs[3].expand(2, -1, -1, -1))


def jacobian_by_rows(*inputs: Any) -> Any:
    return jacrev(lambda q: attention(q, *inputs[1:]).sum((0, 2, 3)))(inputs[0])


def causal_by_row(*inputs: Any) -> Any:
    """With a sink, a factor and a mask that is looked up, each along a mapped axis."""

    def one(q: Any, k: Any, v: Any, bias: Any) -> Any:
        kept = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        scores = torch.where(kept, q @ k.mT * 0.3, float("-inf"))
        column = bias[..., :1].expand(len(q), -1, -1)
        joined = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
        return joined * bias[0].abs() @ v

    return vmap(grad(lambda *x: one(*x).square().sum(), argnums=(0, 1, 2, 3)), in_dims=(1, 1, 1, 0))(*inputs)


def written_inside(q: Any, k: Any, v: Any, bias: Any) -> Any:
    def one(q: Any, k: Any, v: Any) -> Any:
        return attention(q, (k * 1.0).mul_(2.0), v, bias)

    return vmap(one)(q, k, v)


FUSED = (
    of_queries,
    of_a_bias_with_the_value,
    vector_product,
    mapped_examples,
    mapped_heads,
    gradients_of_each_example,
    gradient_of_mapped_examples,
    mapped_twice,
    jacobian_by_rows,
    causal_by_row,
    written_inside,
)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("fn", FUSED, ids=lambda f: f.__name__)
def test_fused(fn: Function, inner: str) -> None:
    assert_same(fn, inner).assert_fused(sites=1)


def test_fused_by_inductor() -> None:
    assert_same(gradients_of_each_example, "inductor").assert_fused(sites=1)


def test_spec_is_that_of_the_function() -> None:
    """The operator itself adds the mapped axis, so the program is what stands in the function."""
    (site,) = assert_same(gradients_of_each_example).sites
    assert site.spec.batch_axes == 1
    assert site.spec.fields()["score"] == "((qk * 0.3) + t0[n0, q_idx, kv_idx])"


# --------------------------------------------------------------------------------------------------------------------


def forward_mode(*inputs: Any) -> Any:
    return jvp(lambda q: attention(q, *inputs[1:]), inputs[:1], inputs[1:2])


def gradient_of_a_gradient(*inputs: Any) -> Any:
    return grad(lambda q: grad(energy)(q, *inputs[1:]).square().sum())(inputs[0])


def written_after_the_scores(q: Any, k: Any, v: Any, bias: Any) -> Any:
    """The plain tensor behind the mapped keys is written when the scores are there already."""
    keys = k * 1.0

    def one(q: Any, k: Any, v: Any) -> Any:
        scores = (q @ k.mT) * 0.3 + bias
        keys.mul_(0.5)
        return scores.softmax(-1) @ v

    return vmap(one)(q, keys, v)


REFUSED = {
    forward_mode: "a forward-mode derivative is taken here",
    gradient_of_a_gradient: "a gradient of a gradient is wanted",
}


@pytest.mark.parametrize(("fn", "reason"), REFUSED.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_refused(fn: Function, reason: str) -> None:
    report = assert_same(fn)
    report.assert_fused(sites=0)
    (refusal,) = report.refusals
    assert (refusal.code, reason in refusal.reason) == ("transform", True)
    assert refusal.location.code == "return ((q @ k.mT) * 0.3 + bias).softmax(-1) @ v"


def test_writes_behind_a_wrapped_tensor_are_seen() -> None:
    report = assert_same(written_after_the_scores)
    report.assert_fused(sites=0)
    assert [refusal.code for refusal in report.refusals] == ["mutation"]


def test_refusal_names_the_users_line() -> None:
    """It named the line in torch that wraps the tensor."""

    def scaled(q: Any, k: Any, v: Any, bias: Any) -> Any:
        return ((q @ k.mT).softmax(-1) * bias @ v).sum()

    report = assert_same(lambda *inputs: grad(scaled)(*inputs))
    (refusal,) = report.refusals
    assert (refusal.code, refusal.location.file) == ("probability-factor", __file__)


def test_gradient_of_a_gradient_outside_is_refused() -> None:
    """A penalty on a gradient by `torch.func`, which training goes backward through."""

    def penalised(*inputs: Any) -> list[torch.Tensor]:
        xs = [x.requires_grad_() for x in inputs[1:]]
        run = compiled(of_queries, "aot_eager") if inputs[0] else of_queries
        run(*xs).square().sum().backward()
        return [x.grad for x in xs if x.grad is not None]

    results = [penalised(fused, *leaves(qkvb(), dtype)) for fused, dtype in
               ((True, None), (False, None), (False, torch.float64))]  # fmt: skip
    for mine, theirs, exact in zip(*results, strict=True):
        assert_close_to_exact(mine, theirs, exact)
    assert [refusal.code for refusal in flashfuse.reports()[0].refusals] == ["transform"]


def test_too_many_axes_are_refused() -> None:
    """Four batch axes are what the kernels have."""

    def deep(*inputs: Any) -> Any:
        q, k, v = (x.unflatten(-2, (2, 2, 4)).transpose(1, 2) for x in inputs[:3])
        return vmap(lambda q, k, v: attention(q, k, v, 0.0))(*(x.unsqueeze(1).expand(-1, 2, -1, -1, -1, -1, -1)
                                                                for x in (q, k, v)))  # fmt: skip

    report = assert_same(deep)
    report.assert_fused(sites=0)
    assert [refusal.code for refusal in report.refusals] == ["transform"]


@pytest.mark.parametrize("transform", [grad, vmap], ids=lambda f: f.__name__)
def test_around_a_compiled_function(transform: Function) -> None:
    """Which Dynamo does not compile then, whatever the backend: the numbers are eager code's."""
    inputs = [x.detach() for x in qkvb()]
    fn, given = (energy, inputs) if transform is grad else (attention, [*inputs[:3], inputs[3].expand(2, -1, -1, -1)])
    torch.testing.assert_close(transform(compiled(fn))(*given), transform(fn)(*given), rtol=0, atol=0)
    assert not flashfuse.reports()
