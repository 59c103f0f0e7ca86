"""Every form of exact attention that real model code takes, and what only looks like one."""

from __future__ import annotations

from . import (
    additive,
    data_masks,
    dropping,
    normalisers,
    padding,
    positional,
    products,
    relative,
    shaping,
    stored,
    tables,
)
from .decoys import DECOYS, Decoy
from .form import Form, Sizes, Spelling, exact, module

FORMS: tuple[Form, ...] = (
    *positional.FORMS,
    *padding.FORMS,
    *data_masks.FORMS,
    *additive.FORMS,
    *tables.FORMS,
    *relative.FORMS,
    *shaping.FORMS,
    *products.FORMS,
    *normalisers.FORMS,
    *dropping.FORMS,
    *stored.FORMS,
)


def spelled(forms: tuple[Form, ...] = FORMS) -> list[tuple[Form, Spelling, str]]:
    """Every form with each of its spellings, and a name for the two."""
    return [(form, s, f"{form.name}-{number}") for form in forms for number, s in enumerate(form.spellings)]


__all__ = ["DECOYS", "FORMS", "Decoy", "Form", "Sizes", "Spelling", "exact", "module", "spelled"]
