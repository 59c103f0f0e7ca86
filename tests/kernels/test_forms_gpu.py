"""Every form on a GPU, in bf16 and fp16, at lengths from 1024 to 16384, against the same code in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from forms import FORMS, Form, Sizes
from forms.check import check

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


# Eager code in float64 stores 8 bytes a score, several times over, so heads are few. One kernel serves all lengths.
SIZES = {
    "1024": Sizes(batch=2, heads=2, q_len=1024, kv_len=1024, dim=64, value_dim=48, window=131, chunk=64, buckets=32),
    "4032": Sizes(batch=2, heads=2, q_len=4032, kv_len=4032, dim=64, value_dim=48, window=131, chunk=64, buckets=32),
    "16384": Sizes(batch=1, heads=1, q_len=16384, kv_len=16384, dim=64, value_dim=48, window=131, chunk=64, buckets=32),
}


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for setting in ("allow_tf32", "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
        monkeypatch.setattr(torch.backends.cuda.matmul, setting, False)
    with torch.no_grad():
        yield
    torch.cuda.empty_cache()


TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Code with a constant that float16 cannot hold does not run in it.
RUNS = [(form, name) for form in FORMS for name in TYPES if form.fp16 or name != "fp16"]


@pytest.mark.parametrize("length", SIZES)
@pytest.mark.parametrize(("form", "dtype"), RUNS, ids=[f"{form.name}-{name}" for form, name in RUNS])
def test_right(form: Form, dtype: str, length: str) -> None:
    check(form, form.spellings[0], SIZES[length], dtype=TYPES[dtype], device="cuda")
