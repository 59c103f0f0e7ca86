"""A few of the programs that `make fuzz` runs many of, the same every time."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, given, settings

from fuzz.generate import programs
from fuzz.oracle import check
from fuzz.program import Program

# Nothing is made smaller here: `python -m fuzz --shrink` does that.
BOUNDED = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate,),
    report_multiple_bugs=False,
)


@BOUNDED
@given(programs())
def test_programs(program: Program) -> None:
    check(program)
