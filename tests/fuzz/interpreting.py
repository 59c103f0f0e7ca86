"""Triton's interpreter with tiles so small that small programs have several."""

from __future__ import annotations

import interpreted
import torch

from flashfuse.kernels import launch, launch_decode
from flashfuse.kernels.launch import Launch

TILES = Launch(block_q=16, block_kv=16, num_warps=4, num_stages=2)
FEW_ROWS = Launch(block_q=8, block_kv=8, num_warps=4, num_stages=2)


def install() -> None:
    """Before the first program: outputs start as NaN, and few queries share the keys out in two."""
    interpreted.install()
    torch.use_deterministic_algorithms(True)
    launch.choose_launch = lambda *_: TILES
    launch_decode.choose_launch = lambda *_: FEW_ROWS
    launch_decode.num_splits = lambda *_: 2
