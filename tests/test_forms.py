"""The table of forms is what it says: all spellings of one form are one function."""

from __future__ import annotations

import pytest
import torch
from forms import FORMS, Form, Sizes, exact, module


def test_every_form_has_two_spellings_and_a_name_of_its_own() -> None:
    assert len({form.name for form in FORMS}) == len(FORMS)
    assert all(len(form.spellings) >= 2 for form in FORMS)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_spellings_agree(form: Form) -> None:
    """In float64 every spelling computes the same numbers, whatever order its output's axes come in."""
    sizes = form.sizes(Sizes())
    inputs = form.make(sizes)
    sums = [values(exact(module(s, sizes), inputs)) for s in form.spellings]
    for other in sums[1:]:
        torch.testing.assert_close(other, sums[0], equal_nan=True)


def values(out: torch.Tensor) -> torch.Tensor:
    return out.flatten().sort().values
