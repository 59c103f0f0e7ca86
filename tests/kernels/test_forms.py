"""Every form through the Triton kernels in their interpreter, in tiles so small that masks leave some of them out.

The interpreter is chosen when triton is imported, so these tests run in a process of their own, which
test_interpreter.py starts; test_forms_gpu.py is their counterpart on a GPU.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from forms import FORMS, Form, Sizes, exact, module
from forms.check import check
from training import assert_trains

pytest.importorskip("triton")

import flashfuse
from flashfuse.kernels import launch as launcher
from flashfuse.kernels import launch_decode, plans
from flashfuse.kernels.launch import Launch

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1; test_interpreter.py runs them"
)

TILES = Launch(block_q=16, block_kv=16, num_warps=4, num_stages=2)
LENGTHS = Sizes(batch=2, heads=2, q_len=40, kv_len=40)
# As many tiles of flash-decoding, which runs a program for each row besides.
FEW_ROWS = Launch(block_q=8, block_kv=8, num_warps=4, num_stages=2)
SHORT = Sizes(batch=2, heads=2, q_len=10, kv_len=10)


@pytest.fixture(autouse=True)
def _small_tiles_and_nan_filled_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An element that the kernel does not write stays NaN."""
    monkeypatch.setattr(launcher, "choose_launch", lambda *args: TILES)
    plans.attention.plans.clear()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_right(form: Form) -> None:
    with torch.no_grad():
        check(form, form.spellings[0], LENGTHS)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_right_by_flash_decoding(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries may be few in any form, so the kernels for that case take these lengths, in two shares of the keys."""
    monkeypatch.setattr(launch_decode, "choose_launch", lambda *args: FEW_ROWS)
    monkeypatch.setattr(launch_decode, "num_splits", lambda *args: 2)
    monkeypatch.setattr(launch_decode, "MAX_Q_LEN", 64)
    with torch.no_grad():
        check(form, form.spellings[0], SHORT)


# Those whose scores read elements that several pairs share, other than those equally far apart.
SHARED = ("decomposed-positions", "disentangled", "clipped-distances")


@pytest.mark.parametrize("form", [form for form in FORMS if form.name in SHARED], ids=lambda f: f.name)
def test_gradients_of_what_pairs_share(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were left to torch, and the gradients of queries, keys and values with them."""
    monkeypatch.setattr(plans, "attention_backward_tiled", None)
    torch._dynamo.reset()
    flashfuse.reset()
    sizes = form.sizes(Sizes())
    built = module(form.spellings[0], sizes)
    inputs = [x.requires_grad_(x.is_floating_point()) for x in form.make(sizes)]
    with torch.enable_grad():
        assert_trains(built, inputs, precise=lambda *xs: exact(built, xs)).assert_fused(sites=form.expect.sites)
