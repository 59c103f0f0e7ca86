"""flashfuse.verify: quiet when the graphs agree, loud when they do not; mutation and randomness are safe."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashfuse
from flashfuse.verify import _mismatch


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) * 0.5, dim=-1) @ v


def verified(fn: Any, inner: str = "eager") -> Any:
    return torch.compile(fn, backend="flashfuse", options={"flashfuse.inner": inner, "flashfuse.verify": True})


@pytest.fixture
def wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewrite whose result is off by one per cent."""
    from flashfuse.rewrite import rewrite

    def off(gm: torch.fx.GraphModule, *others: Any) -> torch.fx.GraphModule:
        result = rewrite(gm, *others)
        for node in list(result.graph.nodes):
            if node.target is torch.ops.flashfuse.attention.default:
                with result.graph.inserting_before(node):
                    node.args = (result.graph.call_function(torch.mul, (node.args[0], 1.01)), *node.args[1:])
        result.recompile()
        return result

    monkeypatch.setattr("flashfuse.rewrite.rewrite", off)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_agreement_is_silent(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 16, 8).to(dtype)
    run = verified(attention)
    for _ in range(2):
        assert run(x, x, x).dtype == dtype
    flashfuse.reports()[0].assert_fused(sites=1)


@pytest.mark.usefixtures("wrong_kernel")
def test_mismatch_raises_once_and_names_the_site() -> None:
    x = torch.randn(2, 3, 16, 8)
    with pytest.raises(flashfuse.VerificationError, match=r"differs by .* is allowed") as caught:
        verified(attention)(x, x, x)
    assert __file__ in str(caught.value)


def test_inputs_are_written_to_once() -> None:
    def model(cache: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        cache.add_(1)
        return attention(x + cache, x, x)

    cache, x = torch.zeros(2, 3, 16, 8), torch.randn(2, 3, 16, 8)
    verified(model)(cache, x)
    assert torch.equal(cache, torch.ones_like(cache))


def test_random_graphs_are_checked_with_the_generator_put_back() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(attention(x, x, x), 0.5)

    x = torch.randn(2, 3, 16, 8)
    torch.manual_seed(1)
    actual = verified(model)(x)
    torch.manual_seed(1)
    torch.testing.assert_close(actual, model(x))


def test_without_sites_nothing_is_run_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("flashfuse.verify.verify_first_call")
    torch.testing.assert_close(verified(torch.sin)(torch.ones(2)), torch.ones(2).sin())


def test_bound_follows_the_error_of_the_original() -> None:
    exact = torch.linspace(1, 2, 8, dtype=torch.float64)
    expected = (exact + 1e-4).float()
    assert _mismatch((exact - 1.9e-4).float(), expected, exact) is None
    assert "differs by" in (_mismatch((exact - 2.5e-4).float(), expected, exact) or "")


def test_nan_and_infinity_have_to_be_where_the_original_has_them() -> None:
    expected = torch.tensor([1.0, float("nan"), float("inf")])
    assert _mismatch(expected, expected, None) is None
    assert "not finite" in (_mismatch(torch.tensor([float("nan")] * 3), expected, None) or "")
    assert "NaN where" in (_mismatch(torch.tensor([1.0, float("nan"), float("nan")]), expected, None) or "")
