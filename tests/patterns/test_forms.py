"""Every form in every spelling is recovered, and its spec says what the code means; every decoy is left alone."""

from __future__ import annotations

import re

import pytest
import torch
from forms import DECOYS, FORMS, Decoy, Form, Sizes, Spelling, module, spelled
from graphs import matched, score_of

from flashfuse.describe import describe_site
from flashfuse.kernels.spec import to_text
from flashfuse.patterns.graph import tensor
from flashfuse.patterns.site import AttentionSite
from flashfuse.patterns.table import Table

SPELLED = spelled()


@pytest.mark.parametrize(("form", "spelling"), [s[:2] for s in SPELLED], ids=[s[2] for s in SPELLED])
def test_recovered(form: Form, spelling: Spelling) -> None:
    with torch.no_grad():
        sizes = form.sizes(Sizes())
        result = matched(module(spelling, sizes), *form.make(sizes))
    assert not result.refusals, [str(r) for r in result.refusals]
    assert len(result.sites) == form.expect.sites
    for site in result.sites:
        check(site, form)


@pytest.mark.parametrize("number", [0, 1])
def test_offset_of_symbolic_lengths(number: int) -> None:
    """The last query sees the last key, whatever the two lengths are."""
    form = next(form for form in FORMS if form.name == "causal-offset")
    sizes = form.sizes(Sizes())
    with torch.no_grad():
        result = matched(module(form.spellings[number], sizes), *form.make(sizes), dynamic=True)
    assert [describe_site(site).mask for site in result.sites] == ["causal (bottom-right)"]
    assert not result.refusals


def check(site: AttentionSite, form: Form) -> None:
    """The facts of the table."""
    spec, expect, mask = site.spec, form.expect, describe_site(site).mask
    for pattern in expect.score:
        assert re.search(pattern, score_of(spec)), f"{pattern!r} is not in the score {score_of(spec)}"
    assert re.match(expect.mask, mask), f"the mask is {mask!r}"
    for name in ("sink", "factor", "key", "value"):
        program, pattern = getattr(spec, name), getattr(expect, name)
        text = "none" if program is None else to_text(program)
        assert re.search(pattern, text), f"{text!r}, expected {pattern!r}"
    assert (spec.normaliser, spec.dropout) == (expect.normaliser, expect.dropout)
    assert expect.empty_row in (None, spec.empty_row)
    assert expect.squares in (None, squares(site)), f"{squares(site)} captured tensors of the scores' size"


def squares(site: AttentionSite) -> int:
    """How many captured tensors have both query and key positions."""
    length = min(int(site.q_len), int(site.kv_len))
    shapes = [
        captured.extents if isinstance(captured, Table) else t.shape
        for captured in site.captured
        if isinstance(captured, Table) or (t := tensor(captured)) is not None
    ]
    return sum(sum(int(n) >= length for n in shape) >= 2 for shape in shapes)


@pytest.mark.parametrize("decoy", DECOYS, ids=lambda d: d.name)
def test_left_alone(decoy: Decoy) -> None:
    with torch.no_grad():
        built, inputs = decoy.make(Sizes())
        result = matched(built, *inputs)
    assert not result.sites
    assert {r.code for r in result.refusals} == ({decoy.code} if decoy.code else set()), [
        str(r) for r in result.refusals
    ]
    for refusal in result.refusals:
        assert refusal.location.file.endswith("decoys.py")
