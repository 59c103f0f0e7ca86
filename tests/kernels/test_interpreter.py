"""Runs the kernels' tests in Triton's interpreter, which has to be chosen before triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
# What runs in one process, the longest first.
GROUPS = (
    ("backward_triton",),
    ("forms",),
    (
        "distances_triton",
        "shared_pairs_triton",
        "backward_plans",
        "backward_ranges",
        "dropout_triton",
        "derivative_tiles",
    ),
    ("forward", "decode", "plans", "normalisers", "ranged", "stored_triton", "extremes"),
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the GPU itself")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process is interpreted already")
@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_in_the_interpreter(names: tuple[str, ...]) -> None:
    pytest.importorskip("triton")
    files = [f"tests/kernels/test_{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", *files]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
