"""Triton's interpreter with what the tests need of it: an fma and sums of products rounded once, and half the time.

The interpreter works out the types of every operation in Python, which takes longer than numpy takes for a small tile.
What else is put in place here gives the same values and makes the same checks, the one of integer overflow included.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

_patch_lang = interpreter._patch_lang
_element_type = interpreter._get_np_dtype
_dot_in_numpy = InterpreterBuilder.create_dot
_cast = TritonSemantic.cast
_match_operands = TritonSemantic.binary_op_type_checking_impl


def install() -> None:
    """Before the first kernel is launched."""
    InterpreterBuilder.create_fma = _fma
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.create_splat = _splat
    InterpreterBuilder.get_block_ty = lambda self, element, shape: _block_type(element, tuple(shape))
    InterpretedFunction.__call__ = _call
    interpreter._patch_lang = _patch_once
    interpreter._patch_attr = _patch_attribute
    interpreter._get_np_dtype = _cached_element_type
    core.block_type.with_element_ty = lambda self, element: _block_type(element, tuple(self.shape))
    core.dtype.extents = ()
    core.block_type.extents = property(_extents_of_block)
    core.tensor.__init__ = _make_tensor
    TritonSemantic.cast = _cast_to_another
    TritonSemantic.binary_op_sanitize_overflow_impl = _assert_no_overflow
    TritonSemantic.broadcast_impl_value = _stretch
    TritonSemantic.binary_op_type_checking_impl = _match_operands_of_one_type


def _fma(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """Rounded once, as on every GPU; the interpreter of Triton 3.6 rounds the product too."""
    exact = np.multiply(x.data, y.data, dtype=np.float64) + z.data
    return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)


def _dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *args: Any) -> TensorHandle:
    """Added up in float64: how numpy adds float32 depends on the processor, and on some its sums are twice as far off
    as those of torch, beside which a kernel is judged."""
    if not all(x.data.dtype in _SHORT for x in (a, b, d)):
        return _dot_in_numpy(self, a, b, d, *args)
    exact = np.matmul(a.data, b.data, dtype=np.float64) + d.data
    return TensorHandle(exact.astype(d.data.dtype), d.dtype.scalar)


_SHORT = (np.dtype(np.float16), np.dtype(np.float32))


def _patch_once(_: Any) -> Any:
    """Put the interpreter's operations into `triton.language`, for a kernel and all that it calls."""
    return _patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": core}))


def _call(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    """A device function, for which the interpreter would look for operations to replace again: half of its time."""
    return self.rewrite()(*args, **kwargs)


def _cached_element_type(dtype: Any) -> Any:
    element = dtype.scalar
    return np.dtype(np.uint64) if element.is_ptr() else _numpy_type(element)


_numpy_type = functools.cache(_element_type)


def _block_type(element: Any, shape: tuple[int, ...]) -> Any:
    """Made once for each shape; types of pointers have no hash."""
    return core.block_type(element, list(shape)) if element.is_ptr() else _known_block_type(element, shape)


@functools.lru_cache(4096)
def _known_block_type(element: Any, shape: tuple[int, ...]) -> Any:
    return core.block_type(element, list(shape))


def _extents_of_block(self: Any) -> tuple[int, ...]:
    """The shape in a tuple of Python's."""
    known = self.__dict__.get("_extents")
    if known is None:
        known = self.__dict__["_extents"] = tuple(self.shape)
    return known


@functools.lru_cache(4096)
def _extents(shape: tuple[int, ...]) -> tuple[Any, Any]:
    """A tile's shape and number of elements as compile-time values."""
    return core.tuple([core.constexpr(n) for n in shape]), core.constexpr(math.prod(shape))


def _make_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _extents(type.extents)


def _splat(self: InterpreterBuilder, block: Any, arg: TensorHandle) -> TensorHandle:
    """One number in all of a tile, stored once."""
    return TensorHandle(np.broadcast_to(arg.data.reshape(()), tuple(block.shape)), arg.dtype.scalar)


def _assert_no_overflow(self: TritonSemantic, lhs: Any, rhs: Any, binary_op: Any) -> None:
    """In one step of numpy, for which the interpreter takes eight operations of tiles."""
    element = lhs.type.scalar
    if element.int_bitwidth >= 64:
        return
    assert element == rhs.type.scalar
    assert element.is_int()
    operation = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[binary_op.__name__]
    result = operation(lhs.handle.data, rhs.handle.data, dtype=np.int64)
    assert result.min() >= element.get_int_min_value(), f"overflow in {binary_op.__name__} of {element}"
    assert result.max() <= element.get_int_max_value(), f"overflow in {binary_op.__name__} of {element}"


def _match_operands_of_one_type(self: TritonSemantic, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> Any:
    """Their elements are left as they are, and numpy stretches them in the operation itself."""
    one = _as_tensor(lhs, rhs) if isinstance(lhs, (int, float)) else lhs
    other = _as_tensor(rhs, lhs) if isinstance(rhs, (int, float)) else rhs
    if not (isinstance(one, core.tensor) and isinstance(other, core.tensor)):
        return _match_operands(self, lhs, rhs, *args, **kwargs)
    if one.dtype.name not in _AS_THEY_ARE or one.dtype is not other.dtype:
        return _match_operands(self, lhs, rhs, *args, **kwargs)
    shape = _common_shape(one.type.extents, other.type.extents)
    return _shown(one, shape), _shown(other, shape)


def _as_tensor(number: Any, beside: Any) -> Any:
    """A number in the type of the tensor beside it; itself where that takes a decision."""
    dtype = getattr(beside, "dtype", None)
    if dtype is tl.float32:
        return core.tensor(TensorHandle(np.array([number], np.float32), dtype), dtype)
    if dtype is tl.int32 and type(number) is int and -(2**31) <= number < 2**31:
        return core.tensor(TensorHandle(np.array([number], np.int32), dtype), dtype)
    return number


def _shown(x: Any, shape: tuple[int, ...]) -> Any:
    """As a tile of this shape, whose elements are not yet all there."""
    return x if x.type.extents == shape else core.tensor(x.handle, _block_type(x.dtype, shape))


def _cast_to_another(self: TritonSemantic, x: Any, dtype: Any, *args: Any, **kwargs: Any) -> Any:
    return x if x.dtype is dtype.scalar else _cast(self, x, dtype, *args, **kwargs)


# Neither pointers nor what a division makes wider.
_AS_THEY_ARE = frozenset(("int1", "int32", "int64", "uint32", "uint64", "fp32", "fp64"))


def _stretch(self: TritonSemantic, lhs: Any, rhs: Any) -> Any:
    """To the shape that both have in numpy, too."""
    shape = _common_shape(lhs.type.extents, rhs.type.extents)
    return _stretched(lhs, shape), _stretched(rhs, shape)


def _stretched(x: Any, shape: tuple[int, ...]) -> Any:
    own = x.type.extents
    if own == shape:
        return x
    elements = np.broadcast_to(x.handle.data if own else x.handle.data.reshape(()), shape)
    return core.tensor(TensorHandle(elements, x.dtype), _block_type(x.dtype, shape))


@functools.lru_cache(4096)
def _common_shape(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return np.broadcast_shapes(one, other)


def _patch_attribute(obj: Any, name: str, member: Any, _: Any, scope: Any) -> None:
    """As the interpreter does, without asking for what it has just given."""
    inner = getattr(member, "__wrapped__", member)

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return inner(*args, **kwargs)

    scope.set_attr(obj, name, call)
