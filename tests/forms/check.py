"""Compiling a spelling and holding it to the accuracy rule, on any device."""

from __future__ import annotations

import torch
from numerics import assert_close_to_exact

import flashfuse

from .form import Form, Sizes, Spelling, eager, exact, module
from .same_dropout import SEED

OPTIONS = {"flashfuse.inner": "eager", "flashfuse.strict": True}


def check(
    form: Form,
    spelling: Spelling,
    *lengths: Sizes,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    dynamic: bool | None = None,
) -> None:
    """Compile once; at each of the lengths every attention is fused and as near to float64 as eager code is."""
    torch._dynamo.reset()
    flashfuse.reset()
    built = module(spelling, form.sizes(lengths[0])).to(device)
    compiled = torch.compile(built, backend="flashfuse", options=OPTIONS, dynamic=dynamic, fullgraph=True)
    for sizes in lengths:
        inputs = form.make(sizes, dtype, device)
        torch.manual_seed(SEED)
        fused = compiled(*(x.clone() for x in inputs))
        precise = exact(built, inputs)
        assert_close_to_exact(fused, eager(built, inputs), precise)
        if dtype == torch.float32:
            assert_empty_rows(form, precise, inputs)
    reports = flashfuse.reports()
    assert len(reports) == (1 if dynamic else len(lengths)), "one compilation is enough"
    for report in reports:
        report.assert_fused(form.expect.sites)


def assert_empty_rows(form: Form, precise: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
    """The form has the rows without a key that it says it has."""
    rows = precise.flatten(0, -2)
    assert rows.isnan().any().item() == (form.empty == "nan")
    if form.empty == "zero":
        assert (rows == 0).all(-1).any()
    if form.empty == "mean":
        average = inputs[2].double().mean(-2).flatten(0, -2)
        assert torch.isclose(rows[:, None], average).all(-1).any()
