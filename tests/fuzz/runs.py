"""Batches of programs, counted, with what fails printed as a test."""

from __future__ import annotations

import collections
import time
import traceback
from dataclasses import dataclass, field

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from .oracle import check
from .program import Program


@dataclass
class Tally:
    """What has run: no program twice.

    inductor: one program in so many is compiled by Inductor, 0 for none.
    """

    strategy: SearchStrategy[Program]
    inductor: int = 0
    programs: int = 0
    attentions: int = 0
    trained: int = 0
    compiled: int = 0
    failures: int = 0
    seen: set[int] = field(default_factory=set)
    labels: collections.Counter[str] = field(default_factory=collections.Counter)
    began: float = field(default_factory=time.process_time)

    def __str__(self) -> str:
        rate = self.programs / (time.process_time() - self.began)
        kinds = f"{self.attentions} attentions, {self.trained} trained, {self.compiled} by Inductor"
        return f"{self.programs} programs ({kinds}), {rate:.1f} a second of CPU, {self.failures} failures"

    def rows(self) -> str:
        """How often each row of a table was in a program, the rarest first."""
        return "\n".join(f"{times:6d} {label}" for label, times in sorted(self.labels.items(), key=lambda x: x[1]))

    def batch(self, number: int, size: int, shrinks: bool = False) -> None:
        """So many programs of a seed; with `shrinks`, up to the first that fails, which is made small."""
        last: list[Program] = []

        @seed(number)
        @settings(
            max_examples=size, deadline=None, database=None, suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink) if shrinks else (Phase.generate,), report_multiple_bugs=False,
        )  # fmt: skip
        @given(self.strategy)
        def run(program: Program) -> None:
            last[:] = [program]
            if shrinks:
                self.run(program)
                return
            try:
                self.run(program)
            except Exception as error:
                self.show(program, error)

        try:
            run()
        except Exception as error:
            self.show(last[0], error)

    def run(self, program: Program) -> None:
        """Check a program that has not been seen."""
        known = hash(program)
        if known in self.seen:
            return
        self.programs += 1
        self.attentions += program.sites is not None
        self.trained += program.trains
        self.labels.update(program.labels)
        whole = self.inductor and self.programs % self.inductor == 0
        self.compiled += bool(whole)
        check(program, "inductor" if whole else "eager")
        self.seen.add(known)

    def show(self, program: Program, error: Exception) -> None:
        self.failures += 1
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        print("-" * 100, program, "".join(traceback.format_list(frames)), sep="\n")
        print(f"{type(error).__name__}: {error}"[:2000], flush=True)
