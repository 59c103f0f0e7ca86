"""Every test here starts with no compiled code, no reports, and Inductor's caches switched off."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import pytest
import torch

import flashfuse


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    flashfuse.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def gradients(fresh: None) -> Iterator[None]:
    """Gradients are recorded, for the tests of a module that says so."""
    with torch.enable_grad():
        yield
