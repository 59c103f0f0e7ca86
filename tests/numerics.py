"""The one rule by which a result counts as accurate: measured against float64, hardly worse than eager code."""

from __future__ import annotations

import torch

FLOOR_ULPS = 4
# A number of this size has no room for a logarithm of a sum beside it.
ABSORBS = 1e6


def assert_close_to_exact(
    fused: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype | None = None
) -> None:
    """Hold `fused` to eager's own errors.

    fused, eager: the same computation in the test's element type; exact: the same values computed in float64.
    dtype: the element type whose ulp the floor is counted in, by default eager's.

    max|fused - exact| <= 2 max|eager - exact| + floor, rms(fused - exact) <= 1.1 rms(eager - exact) + floor, with a
    floor of a few ulps at max|exact|; NaN where `exact` is NaN, infinite where it is infinite, finite elsewhere.
    """
    dtype = dtype or eager.dtype
    assert fused.shape == exact.shape, f"shape {tuple(fused.shape)}, expected {tuple(exact.shape)}"
    fused, eager, exact = (x.detach().to("cpu", torch.float64) for x in (fused, eager, exact))
    finite = exact.isfinite()
    torch.testing.assert_close(fused[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True)
    if not finite.any():
        return
    assert fused[finite].isfinite().all(), "not finite where the exact result is"
    largest = exact[finite].abs().max().item()
    floor = FLOOR_ULPS * torch.finfo(dtype).eps * largest
    error, eager_error = (fused - exact)[finite], (eager - exact)[finite].nan_to_num(0.0, 0.0, 0.0)
    found, allowed = error.abs().max().item(), 2.0 * eager_error.abs().max().item() + floor
    assert found <= allowed, f"largest error {found:.3g}, allowed {allowed:.3g} (floor {floor:.3g})"
    found, allowed = _rms(error), 1.1 * _rms(eager_error) + floor
    assert found <= allowed, f"rms error {found:.3g}, allowed {allowed:.3g} (floor {floor:.3g})"


def assert_lse_close_to_exact(
    fused: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype | None = None
) -> None:
    """The same for log-sum-exps stored as pairs (m, l) [.., 2]: of m + log(l), and of each where m is huge."""
    fused, eager, exact = (x.detach().to("cpu", torch.float64) for x in (fused, eager, exact))
    dtype = dtype or torch.float32
    assert_close_to_exact(*map(log_sum_exp, (fused, eager, exact)), dtype=dtype)
    huge = exact[..., 0].abs() > ABSORBS
    if huge.any():
        for part in range(2):
            assert_close_to_exact(fused[huge][:, part], eager[huge][:, part], exact[huge][:, part], dtype=dtype)


def log_sum_exp(pair: torch.Tensor) -> torch.Tensor:
    """m + log(l) [..] of the operator's pairs (m, l) [.., 2]."""
    return pair[..., 0] + pair[..., 1].log()


def _rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()
