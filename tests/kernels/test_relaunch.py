"""What Triton's launcher is given for a kernel that was launched before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from flashfuse.kernels import relaunch  # noqa: E402


def test_addresses_stand_for_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the call at hand; the driver is not asked for each whether it is one."""
    given: list[tuple[Any, ...]] = []

    class Compiled:
        function, packed_metadata = "function", "metadata"
        run = SimpleNamespace(
            launch=lambda *arguments: given.append(arguments), launch_cooperative_grid=False, launch_pdl=True,
            global_scratch_size=0, profile_scratch_size=0,
        )  # fmt: skip

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return None

    monkeypatch.setattr(triton, "__version__", relaunch.RELEASE + "0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 100 + device, raising=False)

    def arguments() -> tuple[Any, ...]:
        x, y, z = (torch.zeros(2) for _ in range(3))
        return x, None, 7, (1, 2), (y, z), ()

    first, second = arguments(), arguments()
    again = relaunch._again(5, Compiled(), (True,), first)  # type: ignore[arg-type]
    again(second)
    x, _, _, _, (y, z), _ = second
    (found,) = given
    assert found[:7] == (5, 1, 1, 103, "function", False, True)
    assert found[13:] == (x.data_ptr(), None, 7, (1, 2), (y.data_ptr(), z.data_ptr()), (), True)
