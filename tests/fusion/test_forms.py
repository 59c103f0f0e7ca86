"""Every form, compiled: every attention is fused, the result is as near to float64 as eager's."""

from __future__ import annotations

import pytest
import torch
from forms import FORMS, Form, Sizes
from forms.check import check

# Forms of each kind whose lengths may change without another compilation.
GROWING = {
    "causal", "causal-offset", "window", "chunked", "prefix", "padding-int", "left-padding", "documents", "lengths",
    "dense", "bias-1HST", "bias-B11T", "alibi", "softcap", "temperature-heads", "latent-sum", "sink-last",
    "sigmoid-causal", "head-mask", "disentangled", "relative-shift", "bucketed-distances", "bucketed-offset",
    "dropout-causal",
}  # fmt: skip
LONGER = Sizes(q_len=20, kv_len=20)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_right_in_bfloat16(form: Form) -> None:
    """Float32 is met in kernels/test_forms.py, and in training in every spelling."""
    check(form, form.spellings[0], Sizes(), dtype=torch.bfloat16)


@pytest.mark.parametrize("form", [f for f in FORMS if f.name in GROWING], ids=lambda f: f.name)
def test_right_at_another_length(form: Form) -> None:
    check(form, form.spellings[0], Sizes(), LONGER, dynamic=True)


def test_growing_forms_exist() -> None:
    assert {f.name for f in FORMS} >= GROWING
