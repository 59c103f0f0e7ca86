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


def sizes(length: int, batch: int, heads: int = 2) -> Sizes:
    """A length, with masks and tables that grow with it; heads are few, because eager code stores every score."""
    return Sizes(
        batch=batch, heads=heads, q_len=length, kv_len=length, dim=64, value_dim=48,
        window=length // 8 + 3, chunk=length // 16, buckets=32,
    )  # fmt: skip


# The float64 of eager code takes 8 bytes a score, several times over.
LENGTHS = {"1024": sizes(1024, 2), "4032": sizes(4032, 2), "16384": sizes(16384, 1, heads=1)}


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for setting in ("allow_tf32", "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
        monkeypatch.setattr(torch.backends.cuda.matmul, setting, False)
    with torch.no_grad():
        yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_right(form: Form, dtype: torch.dtype, length: str) -> None:
    if dtype == torch.float16 and not form.fp16:
        pytest.skip("a constant of the code does not fit in float16")
    check(form, form.spellings[0], LENGTHS[length], dtype=dtype, device="cuda")
