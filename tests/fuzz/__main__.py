"""`python -m fuzz`: many programs, and those that fail.

With TRITON_INTERPRET=1 in the environment attentions run in the Triton kernels, in their interpreter.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys

import torch
from torch._dynamo import guards

from .generate import programs
from .runs import Tally

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def main() -> int:
    """Exit status 1 where a program failed."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="how many programs")
    parser.add_argument("--seed", type=int, default=0, help="of the first batch")
    parser.add_argument("--batch", type=int, default=100, help="how many programs hypothesis makes at a time")
    parser.add_argument("--shrink", action="store_true", help="make the first failure of each batch small")
    parser.add_argument("--inductor", type=int, default=200, help="one program in so many is compiled by Inductor")
    given = parser.parse_args()
    _hurry()
    strategy = programs()
    if INTERPRETED:
        from .interpreting import install

        install()
        # The interpreter of Triton 3.6 is wrong for bfloat16, and float64 has no kernel.
        strategy = programs(most_length=33, dtypes=(torch.float32, torch.float16))
    tally = Tally(strategy, 0 if INTERPRETED else given.inductor)
    seed = given.seed
    while tally.programs < given.count:
        tally.batch(seed, min(given.batch, given.count), given.shrink)
        print(tally, flush=True)
        seed += 1
    print(tally.rows())
    return min(1, tally.failures)


def _hurry() -> None:
    """Settings with which a program takes a third less time."""
    torch.set_num_threads(1)
    # Dynamo flushes the processor's caches to time the guards of each graph, for its log.
    guards.profile_guard_manager = lambda *_: 0.0
    # No two programs have much to remember of each other.
    torch._dynamo.config.fake_tensor_cache_enabled = False
    gc.freeze()
    gc.set_threshold(50_000)


if __name__ == "__main__":
    sys.exit(main())
