"""The benchmark of variants compares like with like: eager code computes what its FlexAttention twin computes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from numerics import assert_close_to_exact

pytest.importorskip("triton")

# Only while importing: the folders beside the benchmarks share names with other packages.
sys.path.insert(0, str(Path(__file__).parents[1]))
try:
    from benchmarks import variants
    from benchmarks.table import HEADER, Row, cells, shorter
finally:
    sys.path.pop(0)

SHAPE = variants.Shape(batch=2, heads=2, length=64, dim=16)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("variant", variants.VARIANTS, ids=lambda v: v.name)
def test_twins_agree(variant: variants.Variant) -> None:
    inputs = variant.make(SHAPE, torch.float32, "cpu")
    eager = variant.eager(SHAPE, *inputs)
    twin = variant.twin(SHAPE, inputs[3:])(*inputs[:3], variant.block_mask(SHAPE, inputs))
    exact = variants.exact(variants.twin_case(variant, SHAPE, torch.float32, "cpu").code, inputs)
    assert_close_to_exact(twin, eager, exact)


@pytest.mark.parametrize("variant", variants.VARIANTS, ids=lambda v: v.name)
def test_a_sample_is_part_of_the_output(variant: variants.Variant) -> None:
    """What errors are measured on is the last head of the last batch row, computed alone."""
    case = variants.twin_case(variant, SHAPE, torch.float32, "cpu")
    torch.testing.assert_close(case.code(*case.sampled), case.sample(case.code(*case.inputs)))


def test_variants_differ() -> None:
    """Random inputs tell every variant from every other."""
    outputs = [v.eager(SHAPE, *v.make(SHAPE, torch.float32, "cpu")) for v in variants.VARIANTS]
    for number, one in enumerate(outputs):
        assert not any(torch.allclose(one, other) for other in outputs[:number])


@pytest.mark.parametrize("name", variants.OTHERS)
def test_forms_without_a_twin_are_built(name: str) -> None:
    form = next(form for form in variants.FORMS if form.name == name)
    case = variants.form_case(form, variants.Sizes(), torch.float32, "cpu")
    assert case.flex is None
    assert case.code(*case.inputs).shape[0] > 0


def test_a_wrong_result_has_no_figures() -> None:
    row = Row("v", "s", errors={"flashfuse": 1.0}, bytes={"flashfuse": 1})
    shown = dict(zip(HEADER, cells(row), strict=True))
    assert shown["flashfuse"] == shown["error"] == shown["x flex"] == "-"


def test_numbers_are_shortened() -> None:
    assert shorter("(qk * 0.08838834764831845) + -3.3895313892515355e+38") == "(qk * 0.08839) + -3.39e+38"
