"""`python -m fuzz`: many programs, and those that fail, as small as hypothesis can make them."""

from __future__ import annotations

import argparse
import collections
import time
import traceback
from dataclasses import dataclass, field

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from .generate import programs
from .oracle import check
from .program import Program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--no-shrink", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tally = Tally()
    for number in range(-(-arguments.count // arguments.batch)):
        tally.batch(arguments.seed + number, arguments.batch, not arguments.no_shrink)
        print(f"{tally}", flush=True)
    for label, times in sorted(tally.labels.items(), key=lambda x: x[1]):
        print(f"{times:6d} {label}")


@dataclass
class Tally:
    programs: int = 0
    failures: int = 0
    seen: set[int] = field(default_factory=set)
    labels: collections.Counter[str] = field(default_factory=collections.Counter)

    def __str__(self) -> str:
        return f"{self.programs} programs, {self.programs / time.process_time():.1f} a second of CPU, {self.failures} failures"

    def batch(self, number: int, size: int, shrinks: bool) -> None:
        last: list[Program] = []

        @seed(number)
        @settings(
            max_examples=size, deadline=None, database=None, suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink] if shrinks else [Phase.generate], report_multiple_bugs=False,
        )
        @given(programs())
        def run(program: Program) -> None:
            known = hash(program)
            if known in self.seen and not shrinks:
                return
            self.seen.add(known)
            self.programs += 1
            last[:] = [program]
            self.labels.update(program.labels)
            try:
                check(program)
            except Exception as error:
                if shrinks:
                    raise
                self.show(program, error)

        try:
            run()
        except Exception as error:
            self.show(last[0], error)

    def show(self, program: Program, error: Exception) -> None:
        self.failures += 1
        print("-" * 100, flush=True)
        print(program)
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        print("".join(traceback.format_list(frames)), f"{type(error).__name__}: {error}"[:1500], sep="", flush=True)


if __name__ == "__main__":
    main()
