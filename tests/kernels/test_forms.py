"""Every form through the Triton kernel in its interpreter, in tiles so small that masks leave some of them out.

The interpreter is chosen when triton is imported, so these tests run in a process of their own, which
test_interpreter.py starts; test_forms_gpu.py is their counterpart on a GPU.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from forms import FORMS, Form, Sizes
from forms.check import check

pytest.importorskip("triton")

from flashfuse.kernels import launch as launcher
from flashfuse.kernels.launch import Launch

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1; test_interpreter.py runs them"
)

TILES = Launch(block_q=16, block_kv=16, num_warps=4, num_stages=2)
LENGTHS = Sizes(batch=2, heads=2, q_len=40, kv_len=40)


@pytest.fixture(autouse=True)
def _small_tiles_and_nan_filled_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An element that the kernel does not write stays NaN."""
    monkeypatch.setattr(launcher, "choose_launch", lambda *args: TILES)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_right(form: Form) -> None:
    with torch.no_grad():
        check(form, form.spellings[0], LENGTHS)
