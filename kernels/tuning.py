"""Search the kernel and tiles of a call on the device, and keep what was found on disk.

The tables are made for calls like those that were measured. Where a spec asks to be `tuned`, each of a few choices near
the table's own computes the call once, is held against what the table's gave, and is timed. That happens when the first
plan for calls like it is made; other calls like it, in other processes too, read the file that is left.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from flashfuse.kernels import launch_decode
from flashfuse.kernels.call import AttentionCall
from flashfuse.kernels.launch import (
    Device,
    Launch,
    Shape,
    choose_launch,
    device_index,
    device_of,
    precision_of,
    shape_of,
)
from flashfuse.kernels.launch import prepare as prepare_plain
from flashfuse.kernels.launch_hopper_forward import prepare_hopper
from flashfuse.kernels.modules import cache_folder
from flashfuse.kernels.prepared import Prepared, empty_on
from flashfuse.kernels.relaunch import ALIGNMENT, planned
from flashfuse.kernels.spec import AttentionSpec

log = logging.getLogger(__name__)

Times = dict["Choice", float]

# What is tried beside a launch of a table: its query tile, key tile and warps times these, and stages beside its own.
STEPS = (
    (0.5, 1, 1, 0),
    (0.5, 1, 0.5, 0),
    (2, 1, 1, 0),
    (2, 1, 2, 0),
    (1, 0.5, 1, 0),
    (1, 0.5, 1, 1),
    (1, 2, 1, 0),
    (1, 2, 1, -1),
    (1, 1, 0.5, 0),
    (1, 1, 2, 0),
    (1, 1, 1, -1),
    (1, 1, 1, 1),
)
# Splits of keys, of the number that is worked out for the table's own launch.
SHARES = (0.5, 2.0)
LEAST_BLOCK, MOST_BLOCK = 16, 128
LEAST_WARPS, MOST_WARPS = 2, 8
MOST_STAGES = {"cuda": 4, "hip": 2}
# 32-bit numbers of tiles that a thread holds at most, of its 255: as many as with any launch of the tables.
MOST_NUMBERS = 160
THREADS_OF_WARP = {"cuda": 32, "hip": 64}
# Capabilities whose products read the query tile from shared memory.
READ_FROM_SHARED = (90, 100, 103)
# Two right results differ by less, in units of the coarsest type and of the largest element. Float32 sums of thousands
# of numbers in another order differ by more than that type's own unit.
ALLOWED_UNITS, LEAST_UNIT = 8, 2.0**-17
# Milliseconds for which a choice runs before it is timed, and while it is.
WARM_UP, TIMED = 10, 50


@dataclass(frozen=True)
class Choice:
    """A kernel and its tiles: one of `KERNELS`.

    launch: None where the kernel has none to choose. share: of the number of splits that is worked out.
    """

    kernel: str
    launch: Launch | None = None
    share: float = 1.0

    def prepare(self, call: AttentionCall) -> Prepared | None:
        """What launches a validated call so; None where the kernel does not take it."""
        return KERNELS[self.kernel](call, self)


KERNELS: dict[str, Callable[[AttentionCall, Choice], Prepared | None]] = {
    "table": lambda call, _: launch_decode.prepare_any(call),
    "plain": lambda call, choice: prepare_plain(call, choice.launch),
    "decode": lambda call, choice: launch_decode.prepare_decode(call, choice.launch, share=choice.share),
    "hopper": lambda call, _: prepare_hopper(call, searched=True),
}
TABLE = Choice("table")


def prepare_tuned(call: AttentionCall) -> Prepared | None:
    """What launches a validated call by the choice that is fastest for calls like it; None where torch computes it.

    It is measured where it is not on disk, unless a CUDA graph is being captured.
    """
    known = launch_decode.prepare_any(call)
    if known is None or not is_searched(call):
        return known
    key = key_of(call)
    choice = recorded(key)
    if choice is None:
        choice = _search(call, key)
    return choice.prepare(call) or known


def is_searched(call: AttentionCall) -> bool:
    """Whether times mean something, and may decide in which order numbers are added."""
    return call.q.is_cuda and not torch.are_deterministic_algorithms_enabled()


def _search(call: AttentionCall, key: dict[str, Any]) -> Choice:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return TABLE
    times = measured(call, candidates(call, device_of(device_index(call))))
    if TABLE not in times:
        # There was no memory for timing, or the launch fails, which the call itself will say.
        return TABLE
    choice = min(times, key=lambda c: times[c])
    log.info("%s is the fastest of %d: %.4f ms, the table's %.4f ms", choice, len(times), times[choice], times[TABLE])
    record(key, choice, times)
    return choice


# --------------------------------------------------------------------------------------------------------------------
# What is tried


def candidates(call: AttentionCall, device: Device) -> list[Choice]:
    """The table's own choice, then those near it that fit the device."""
    spec, dims = call.spec, (call.head_dim, call.value_dim)
    shape = shape_of(spec, call.q_len, *dims)
    plain = choose_launch(device, shape)
    if not launch_decode.takes(call):
        near = () if plain is None else (plain, *neighbours(device, shape, plain))
        return [TABLE, Choice("hopper"), *(Choice("plain", launch) for launch in near)]
    shape = shape_of(spec, launch_decode.rows_of(call), *dims)
    launch = choose_launch(device, shape, launch_decode.TABLE)
    found = [TABLE] if plain is None else [TABLE, Choice("plain", plain)]
    if launch is not None:
        found += [Choice("decode", near) for near in neighbours(device, shape, launch)]
        found += [Choice("decode", launch, share) for share in SHARES]
    return found


def neighbours(device: Device, shape: Shape, launch: Launch) -> Iterator[Launch]:
    """The launches near one that fit the device."""
    for q, kv, warps, stages in STEPS:
        near = Launch(
            int(launch.block_q * q),
            int(launch.block_kv * kv),
            int(launch.num_warps * warps),
            launch.num_stages + stages,
        )
        if fits(device, shape, near):
            yield near


def fits(device: Device, shape: Shape, launch: Launch) -> bool:
    """Whether a launch has the shared memory and registers it needs, and no rows for which there are no queries."""
    rows = max(LEAST_BLOCK, triton.next_power_of_2(shape.q_len))
    return (
        LEAST_BLOCK <= launch.block_q <= min(MOST_BLOCK, rows)
        and LEAST_BLOCK <= launch.block_kv <= MOST_BLOCK
        and LEAST_WARPS <= launch.num_warps <= MOST_WARPS
        and 1 <= launch.num_stages <= MOST_STAGES[device.backend]
        and launch.shared_bytes(shape) <= device.shared_bytes
        and numbers_of_thread(device, shape, launch) <= MOST_NUMBERS
    )


def numbers_of_thread(device: Device, shape: Shape, launch: Launch) -> float:
    """The 32-bit numbers of a tile's output, scores and, where products read them from registers, queries."""
    queries = 0.0 if device.arch in READ_FROM_SHARED else shape.block_d * shape.element_bytes / 4
    threads = launch.num_warps * THREADS_OF_WARP[device.backend]
    return launch.block_q * (shape.block_dv + launch.block_kv + queries) / threads


# --------------------------------------------------------------------------------------------------------------------
# Measuring


def measured(call: AttentionCall, choices: Sequence[Choice]) -> Times:
    """Milliseconds of each choice that compiles and agrees with the first.

    A forward writes nothing but what it makes, so it runs on the call's own tensors: with their masks and lengths.
    """
    times: Times = {}
    expected: tuple[torch.Tensor, torch.Tensor] | None = None
    with torch.cuda.device_of(call.q):
        empty = empty_on(call.device)
        for choice in choices:
            try:
                prepared = choice.prepare(call)
                if prepared is None:
                    continue
                found, plan = planned(prepared, call.tensors)
                expected = found if expected is None else expected
                if agrees(call.spec, found, expected):
                    times[choice] = time_of(functools.partial(plan, empty, call.tensors))
            except Exception as error:
                log.info("%s is left out: %s", choice, error)
                if choice == TABLE:
                    break
    return times


def time_of(run: Callable[[], Any]) -> float:
    """Milliseconds."""
    return float(triton.testing.do_bench(run, warmup=WARM_UP, rep=TIMED, return_mode="median"))


def agrees(
    spec: AttentionSpec,
    found: tuple[torch.Tensor, torch.Tensor],
    expected: tuple[torch.Tensor, torch.Tensor],
) -> bool:
    """Whether two results, each (out, lse), are the same but for the order of sums and where they are rounded."""
    unit = max(LEAST_UNIT, *(torch.finfo(d).eps for d in (spec.product_dtype, spec.probs_dtype, spec.out_dtype)))
    if precision_of(spec) == "tf32":
        unit = max(unit, torch.finfo(torch.float16).eps)
    pairs = ((found[0], expected[0]), (_log_sum_exp(found[1]), _log_sum_exp(expected[1])))
    return all(_is_close(a.float(), b.float(), ALLOWED_UNITS * unit) for a, b in pairs)


def _log_sum_exp(lse: torch.Tensor) -> torch.Tensor:
    return lse[..., 0] + lse[..., 1].log()


def _is_close(a: torch.Tensor, b: torch.Tensor, allowed: float) -> bool:
    same = (a == b) | (a.isnan() & b.isnan())
    finite = a.isfinite() & b.isfinite()
    if not bool((same | finite).all()):
        return False
    difference, largest = (torch.where(finite, x, 0.0).abs().amax() for x in (a - b, b))
    return bool(difference <= allowed * largest)


# --------------------------------------------------------------------------------------------------------------------
# On disk


def key_of(call: AttentionCall) -> dict[str, Any]:
    """All that a choice is for: the device, the versions, the program, and sizes to the next power of two."""
    index = call.device.index if call.q.is_cuda else None
    return {
        "device": [torch.cuda.get_device_name(index) if call.q.is_cuda else "", *asdict(device_of(index)).values()],
        "versions": [torch.__version__, triton.__version__, sources()],
        "spec": call.spec.to_text(),
        "precision": precision_of(call.spec),
        "sizes": [_bucket(n) for n in (*call.sizes, call.q_len, call.kv_len)],
        "dims": [call.head_dim, call.value_dim],
        "ranged": call.kv_ranges is not None,
        "layouts": [_layout(x) for x in (call.q, call.k, call.v, *call.captured)],
    }


def _bucket(n: int) -> int:
    return triton.next_power_of_2(n) if n > 0 else n


def _layout(x: torch.Tensor) -> list[Any]:
    """Its type, the axes along which it is one, their order in memory, and how wide it may be read."""
    shared = [size == 1 or stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)]
    order = sorted(range(x.dim()), key=lambda d: (x.stride(d), d))
    aligned = [stride % ALIGNMENT == 0 or stride == 1 for stride in x.stride()]
    return [str(x.dtype), shared, order, aligned, x.data_ptr() % ALIGNMENT == 0]


@functools.cache
def sources() -> str:
    """A digest of the sources of all kernels and of what launches them."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def path_of(key: dict[str, Any]) -> Path:
    """The file of a choice."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / "tuned" / f"{digest}.json"


def recorded(key: dict[str, Any]) -> Choice | None:
    """The choice on disk; None where there is no file, or none that can be read."""
    try:
        found = json.loads(path_of(key).read_text())
        if found["key"] != key or found["kernel"] not in KERNELS:
            return None
        launch = found["launch"] and Launch(**found["launch"])
        return Choice(found["kernel"], launch, float(found["share"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def record(key: dict[str, Any], choice: Choice, times: Times) -> None:
    """Leave a choice on disk, with the times of all. Other processes never see half a file."""
    path = path_of(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"key": key, **asdict(choice), "times": [{**asdict(c), "ms": ms} for c, ms in times.items()]})
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
