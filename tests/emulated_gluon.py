"""Kernels in Gluon as Python on the CPU: indices, bounds, barriers and tensor maps are tried where no GPU is.

A kernel's functions are taken as they are written, with torch under the names of the two languages. Partitions of warps
are threads that meet at barriers; what is asynchronous happens at once, so a missing wait or fence is not found here.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from triton.language.core import constexpr, dtype
from triton.runtime.jit import JITFunction

from flashfuse.kernels.prepared import KernelLaunch

# Seconds after which a thread that waits is taken to wait for ever.
PATIENCE = 20.0
ELEMENTWISE = ("exp", "exp2", "log2", "abs", "floor")
# By Triton's names.
TYPES = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8, "int32": torch.int32,
    "int64": torch.int64,
}  # fmt: skip
LAYOUTS = ("SliceLayout", "BlockedLayout", "NVMMADistributedLayout", "DotOperandLayout", "SwizzledSharedLayout")


class Tile(torch.Tensor):
    """A tile of numbers, whose layout nobody asks for."""

    @property
    def type(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(layout=None)


def tile(x: Any) -> Any:
    return (x if isinstance(x, torch.Tensor) else torch.tensor(x)).as_subclass(Tile)


def number(x: Any) -> torch.Tensor:
    narrow = type(x) is int and abs(x) < 2**31
    return torch.tensor(x, dtype=torch.int32) if narrow else torch.as_tensor(x)


class Pointer:
    """Pointers to elements of a tensor's storage."""

    def __init__(self, storage: torch.Tensor, offset: Any) -> None:
        self.storage, self.offset = storage, offset
        self.dtype = SimpleNamespace(element_ty=storage.dtype)

    @property
    def shape(self) -> torch.Size:
        return torch.as_tensor(self.offset).shape

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.storage, self.offset + other)

    def add(self, x: int) -> torch.Tensor:
        """What was there before."""
        found: torch.Tensor = self.storage[self.offset].clone()
        self.storage[self.offset] += x
        return found

    def load(self, mask: Any = None, other: Any = 0) -> Any:
        at = torch.as_tensor(self.offset).long()
        if mask is None:
            return tile(self.storage[at])
        at, mask = torch.broadcast_tensors(at, torch.as_tensor(mask))
        found = torch.full(at.shape, other, dtype=self.storage.dtype)
        found[mask] = self.storage[at[mask]]
        return tile(found)

    def store(self, x: Any, mask: Any = None) -> None:
        at, x = torch.broadcast_tensors(torch.as_tensor(self.offset).long(), torch.as_tensor(x))
        mask = torch.ones_like(at, dtype=torch.bool) if mask is None else torch.as_tensor(mask).expand(at.shape)
        self.storage[at[mask]] = x[mask].to(self.storage.dtype)


class Shared:
    """Shared memory as swizzled layouts divide it: panels of 128 bytes of each row, one panel after the other."""

    def __init__(
        self, memory: torch.Tensor, dtype: torch.dtype, shape: Sequence[int], transposed: bool = False
    ) -> None:
        self.memory, self.dtype, self.shape, self.transposed = memory, dtype, tuple(shape), transposed
        # Those of a slice; `shape` is of all there are.
        self.columns = slice(None)

    def _elements(self) -> torch.Tensor:
        flat = self.memory.view(self.dtype)
        if len(self.shape) == 1:
            return flat
        *outer, rows, columns = self.shape
        width = min(columns, 128 // self.dtype.itemsize)
        return flat.view(*outer, columns // width, rows, width).transpose(-3, -2)

    def index(self, i: Any) -> Shared:
        size = self.memory.numel() // self.shape[0]
        return Shared(self.memory[int(i) * size : (int(i) + 1) * size], self.dtype, self.shape[1:])

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], _: Any) -> Shared:
        assert self.memory.numel() == torch.Size(shape).numel() * dtype.itemsize
        return Shared(self.memory, dtype, shape)

    def permute(self, order: Sequence[int]) -> Shared:
        assert order == (1, 0)
        found = Shared(self.memory, self.dtype, self.shape, True)
        found.columns = self.columns
        return found

    def slice(self, start: int, length: int, dim: int) -> Shared:
        assert dim == 1
        assert start + length <= self.shape[1]
        found = Shared(self.memory, self.dtype, self.shape)
        found.columns = slice(start, start + length)
        return found

    def load(self, _: Any = None) -> Any:
        found = self._elements().reshape(self.shape)[..., self.columns].clone()
        return tile(found.mT if self.transposed else found)

    def store(self, x: Any) -> None:
        elements = self._elements()
        assert tuple(x.shape) == self.shape
        assert x.dtype == self.dtype
        elements.copy_(torch.as_tensor(x).reshape(elements.shape))


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes are there."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.left = self.bytes = self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.left = count

    def arrive(self, count: int = 0, expected: int = 0, came: int = 0) -> None:
        with self.changed:
            self.left, self.bytes = self.left - count, self.bytes + expected - came
            assert self.left >= 0
            if self.left == self.bytes == 0:
                self.left, self.phase = self.count, self.phase + 1
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase % 2 != parity, PATIENCE):
                raise TimeoutError("nobody ends the phase")


class Barriers(list):
    def index(self, i: Any) -> Barrier:  # type: ignore[override]
        return self[int(i)]


class Map:
    """A tensor map: reads give 0 outside of the tensor, and writes leave those elements out."""

    lock = threading.Lock()

    def __init__(self, descriptor: Any) -> None:
        base, size, strides = descriptor.base, descriptor.shape, descriptor.strides
        assert strides[-1] == 1
        assert all(stride > 0 and stride * base.itemsize % 16 == 0 for stride in strides[:-1])
        self.tensor = torch.as_strided(base, size, strides, base.storage_offset())
        shape = list(descriptor.block_shape)
        self.dtype, self.layout = base.dtype, descriptor.layout
        self.block_type = SimpleNamespace(shape=shape, nbytes=torch.Size(shape).numel() * base.itemsize)

    def _part(self, at: Sequence[Any]) -> tuple[torch.Tensor, tuple[slice, ...]]:
        box = zip(map(int, at), self.block_type.shape, self.tensor.shape, strict=True)
        inside = [(start, max(min(start + n, size), start)) for start, n, size in box]
        part = self.tensor[tuple(slice(start, stop) for start, stop in inside)]
        return part, tuple(slice(0, n) for n in part.shape)

    def load(self, at: Sequence[Any], barrier: Barrier, slot: Shared) -> None:
        part, inside = self._part(at)
        found = torch.zeros(self.block_type.shape, dtype=self.dtype)
        found[inside] = part
        slot.store(found)
        barrier.arrive(came=self.block_type.nbytes)

    def store(self, at: Sequence[Any], slot: Shared, add: bool = False) -> None:
        part, inside = self._part(at)
        found = torch.as_tensor(slot.load())[inside]
        with self.lock:
            part.copy_(part + found if add else found)


def _product(a: Any, b: Any, acc: Any, use_acc: bool = True, is_async: bool = False) -> Any:
    a, b = (x.load() if isinstance(x, Shared) else x for x in (a, b))
    found = torch.as_tensor(a).float() @ torch.as_tensor(b).float()
    return tile(found + torch.as_tensor(acc) if use_acc else found)


def _waited(num_outstanding: int, deps: tuple[Any, ...]) -> Any:
    return deps if len(deps) > 1 else deps[0]


def _where(condition: Any, left: Any, right: Any) -> Any:
    return tile(torch.where(torch.as_tensor(condition), number(left), number(right)))


def _run_all(partitions: Sequence[tuple[Any, tuple[Any, ...]]], *_: Any) -> None:
    """Each in a thread of its own; the first failure is raised."""
    failures: list[BaseException] = []

    def run(function: Any, arguments: tuple[Any, ...]) -> None:
        try:
            function(*arguments)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=partition) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise next(
            (f for f in failures if not isinstance(f, (TimeoutError, threading.BrokenBarrierError))), failures[0]
        )


def _allocated(dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
    if layout == "barrier":
        return Barrier() if len(shape) == 1 else Barriers(Barrier() for _ in range(shape[0]))
    return Shared(torch.full((torch.Size(shape).numel() * dtype.itemsize,), 255, dtype=torch.uint8), dtype, shape)


def _elementwise(function: Any) -> Any:
    return lambda *values: tile(function(*map(number, values)))


def _chosen(with_nan: Any, without: Any) -> Any:
    """The smaller or larger number, NaN beside another one only where asked to."""
    return lambda x, y, propagate_nan=False: _elementwise(with_nan if propagate_nan else without)(x, y)


def _reduced(function: Any) -> Any:
    return lambda x, axis: tile(function(torch.as_tensor(x), axis))


def _holds(condition: Any) -> None:
    assert condition


def _language(program: int, programs: int) -> Any:
    """The names of both languages, for one program."""
    anything = lambda *_, **__: None  # noqa: E731
    dtypes = {
        str(d)[6:]: d for d in (torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.int32, torch.int64)
    }
    return SimpleNamespace(
        **dtypes,
        int1=torch.bool,
        constexpr=lambda x: x,
        program_id=lambda _: torch.tensor(program, dtype=torch.int32),
        num_programs=lambda _: programs,
        atomic_add=lambda at, x, sem: at.add(x),
        pointer_type=lambda dtype: dtype,
        num_warps=anything,
        arange=lambda start, stop, *_: tile(torch.arange(start, stop, dtype=torch.int32)),
        zeros=lambda shape, dtype, *_: tile(torch.zeros(tuple(shape), dtype=dtype)),
        full=lambda shape, value, dtype, *_: tile(torch.full(tuple(shape), value, dtype=dtype)),
        cdiv=lambda a, b: -(-a // b),
        range=lambda *ends, num_stages=None: range(*ends),
        static_range=range,
        static_assert=_holds,
        where=_where,
        load=lambda at, mask=None, other=0: at.load(mask, other),
        store=lambda at, x, mask=None: at.store(x, mask),
        cast=lambda x, dtype: torch.as_tensor(x).to(dtype),
        fma=_elementwise(lambda x, y, z: (x.double() * y + z).float()),
        fdiv=_elementwise(torch.div),
        div_rn=_elementwise(torch.div),
        minimum=_chosen(torch.minimum, torch.fmin),
        maximum=_chosen(torch.maximum, torch.fmax),
        PropagateNan=SimpleNamespace(ALL=True),
        **{name: _elementwise(getattr(torch, name)) for name in ELEMENTWISE},
        sum=_reduced(lambda x, axis: x.sum(axis)),
        max=_reduced(lambda x, axis: x.amax(axis)),
        min=_reduced(lambda x, axis: x.amin(axis)),
        convert_layout=lambda x, _: x,
        trans=lambda x: x.mT,
        expand_dims=lambda x, axis: x.unsqueeze(axis),
        dot=lambda a, b, **_: _product(a, b, None, use_acc=False),
        allocate_shared_memory=_allocated,
        thread_barrier=anything,
        warp_specialize=_run_all,
        NVMMASharedLayout=SimpleNamespace(get_default_for=anything),
        **dict.fromkeys(LAYOUTS, anything),
    )  # fmt: skip


def _instructions() -> dict[str, Any]:
    """What has another meaning than its text says, by name."""
    meeting = threading.Barrier(2, timeout=PATIENCE)
    return {
        "_meet": lambda: meeting.wait(),
        "opaque": torch.as_tensor,
        "in_words": lambda x, dtype: x.to(dtype),
        "out_of_words": lambda words, *_: words,
        "halves": lambda x: x.chunk(2, 1),
        "next_stage": lambda stage, phase, stages: ((stage + 1) % stages, phase ^ (stage == stages - 1)),
        "warp_sums": lambda x: tile(torch.as_tensor(x).view(4, -1, x.shape[-1]).sum(1)),
        "_add_to_global": lambda to, at, part: to.store(at, part, add=True),
        "fence_async_shared": lambda: None,
        "gdc_launch_dependents": lambda: None,
        "gdc_wait": lambda: None,
        "warpgroup_mma": _product,
        "warpgroup_mma_wait": _waited,
        "mbarrier": SimpleNamespace(
            MBarrierLayout=lambda: "barrier",
            init=lambda barrier, count: barrier.init(count),
            expect=lambda barrier, n: barrier.arrive(count=1, expected=n),
            arrive=lambda barrier, count: barrier.arrive(count=count),
            wait=lambda barrier, parity: barrier.wait(parity),
        ),
        "tma": SimpleNamespace(
            async_copy_global_to_shared=lambda of, at, barrier, slot: of.load(at, barrier, slot),
            async_copy_shared_to_global=lambda to, at, part: to.store(at, part),
            store_wait=lambda _: None,
        ),
    }


def _python(function: JITFunction, names: dict[str, Any], done: dict[int, Any]) -> Any:
    """A kernel's function with other meanings for `names`."""
    if id(function) in done:
        return done[id(function)]
    found = dict(function.fn.__globals__)
    copy = types.FunctionType(function.fn.__code__, found, function.fn.__name__, function.fn.__defaults__)
    done[id(function)] = copy
    for name in function.fn.__code__.co_names:
        value = found.get(name)
        if name in names:
            found[name] = names[name]
        elif isinstance(value, JITFunction):
            found[name] = _python(value, names, done)
        elif isinstance(value, constexpr):
            found[name] = value.value
    return copy


def _argument(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return Pointer(torch.as_strided(x, (x.untyped_storage().nbytes() // x.itemsize,), (1,), 0), x.storage_offset())
    if isinstance(x, tuple):
        return tuple(map(_argument, x))
    return number(x) if type(x) is int else Map(x) if hasattr(x, "block_shape") else x


def start(launch: KernelLaunch, arguments: tuple[Any, ...]) -> None:
    """Run a kernel, one program after the other."""
    given = [_argument(x) for x in arguments]
    names = launch.kernel.arg_names[len(arguments) :]
    for program in range(launch.programs):
        language = _language(program, launch.programs)
        meanings = {**_instructions(), "tl": language, "gl": language}
        done: dict[int, Any] = {}

        def constant(x: Any, meanings: Any = meanings, done: Any = done) -> Any:
            if isinstance(x, tuple):
                return tuple(map(constant, x))
            if isinstance(x, dtype):
                return TYPES[x.name]
            return _python(x, meanings, done) if isinstance(x, JITFunction) else x

        _python(launch.kernel, meanings, done)(*given, *(constant(launch.variant[name]) for name in names))
