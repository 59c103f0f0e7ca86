"""`Draft`: a program while it is written, line by line, and the choices that are left to hypothesis.

Tensors carry the names of their axes, as "b kg s d": batch, heads (as many as key-value heads k times groups g),
queries and head dim. An axis of several letters is those axes in one.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st

from .program import Axes, Input, Sizes

T = TypeVar("T")

# How fills are written that are large.
LARGE_FILLS = ("finfo", "-1e4", "-10000.0", "-30000.0", "-1e9", "-1e30")


@dataclass(frozen=True)
class Var:
    """A tensor of the program: an expression without operators, and its axes."""

    name: str
    axes: Axes

    @property
    def text(self) -> str:
        return " ".join(self.axes)

    def dim(self, axis: str) -> int:
        return self.axes.index(axis)


@dataclass(frozen=True)
class Shape:
    """batch: the axes before the heads. head: "h", "kg" (groups of query heads that share keys), or "" for one head.

    own: keys and values have as many positions and dims as the queries, and are made of the same tensor.
    """

    batch: Axes
    head: str
    own: bool = False

    @property
    def outer(self) -> Axes:
        """The axes of a query head."""
        return (*self.batch, self.head) if self.head else self.batch

    @property
    def kv_outer(self) -> Axes:
        return tuple("k" if axis == "kg" else axis for axis in self.outer)


def axes(text: str) -> Axes:
    return tuple(text.split())


@functools.cache
def _among(options: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    return st.sampled_from(options)


@functools.cache
def _between(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low, high)


@dataclass
class Draft:
    """symbolic: whether the program asks its inputs for batch size and lengths, as it must where they change.

    dtypes: the element types that a program may have.
    made: what several attentions may share, by kind.
    refused: codes of the refusals that are right for what has been written.
    certain: whether an attention has to be found.
    left_open: whether the contract leaves rows open that are not finite in float64.
    curved: whether scores are under a function.
    """

    draw: Callable[[st.SearchStrategy[Any]], Any]
    sizes: Sizes
    symbolic: bool
    dtypes: tuple[torch.dtype, ...]
    shape: Shape = Shape(("b",), "h")
    inputs: list[Input] = field(default_factory=list)
    made: dict[str, list[Var]] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    certain: bool = True
    left_open: bool = False
    curved: bool = False
    lines: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    asked: dict[str, str] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)

    # ---- choices

    def one(self, options: Sequence[T]) -> T:
        """One of several; the first is what a failure is shrunk to."""
        return self.draw(_among(tuple(options)))  # type: ignore[no-any-return]

    def chance(self, one_in: int) -> bool:
        """True once in so many times."""
        return bool(self.draw(_between(0, one_in - 1)) == one_in - 1)

    def row(self, table: dict[str, T]) -> T:
        """One row of a table, whose name becomes one of the program's labels."""
        name = self.one(tuple(table))
        self.labels.append(name)
        return table[name]

    def again(self, kind: str, make: Callable[[Draft], Var]) -> Var:
        """One that was made before, such as the mask of another attention, or a new one."""
        known = self.made.setdefault(kind, [])
        if known and self.chance(2):
            self.labels.append(f"shared-{kind}")
            return self.one(known)
        known.append(make(self))
        return known[-1]

    # ---- writing

    @property
    def has_fill(self) -> bool:
        """Whether a number has been written, or is in an input, of which types of 16 bits lack whole periods."""
        written = (fill in line for line in self.lines for fill in LARGE_FILLS)
        return any(written) or any(x.kind == "minimal" for x in self.inputs)

    def say(self, line: str) -> None:
        self.lines.append(line)

    def fresh(self, stem: str) -> str:
        """A name that is not taken yet: the stem with a number."""
        stem = stem.rstrip("0123456789")
        self.names[stem] = count = self.names.get(stem, 0) + 1
        return stem if count == 1 else f"{stem}{count}"

    def let(self, stem: str, expression: str, of: Axes) -> Var:
        """A new variable."""
        name = self.fresh(stem)
        self.say(f"{name} = {expression}")
        return Var(name, of)

    def given(self, stem: str, of: Axes, kind: str) -> Var:
        """A new input."""
        name = self.fresh(stem)
        self.inputs.append(Input(name, of, kind))
        return Var(name, of)

    def size(self, axis: str) -> str:
        """The length of an axis in Python: a number, or what an input says."""
        if not self.symbolic:
            return str(self.number(axis))
        return " * ".join(self._size(letter) for letter in axis)

    def number(self, axis: str) -> int:
        return math.prod(int(x) if x.isdigit() else self.sizes[x] for x in axis)

    def _size(self, letter: str) -> str:
        if letter not in self.asked:
            if letter not in "bst":
                return str(self.number(letter))
            places = ((axis, f"{i.name}.shape[{n}]") for i in self.inputs for n, axis in enumerate(i.axes))
            found = [(len(axis), axis, text) for axis, text in places if letter in axis]
            if not found:
                return self._size("s") if letter == "t" else str(self.number(letter))
            _, axis, text = min(found)
            beside = self.number(axis.replace(letter, ""))
            self.asked[letter] = text if axis == letter else f"{text} // {beside}"
        return letter.upper()

    @property
    def body(self) -> tuple[str, ...]:
        """All lines, the sizes that are asked for first."""
        header = [f"{letter.upper()} = {text}" for letter, text in self.asked.items()]
        return (*header, *self.lines)

    # ---- layouts

    def split(self, x: Var, wanted: Axes) -> Var:
        """Axes in one taken apart until each is one of the wanted, or has none of their letters in it."""
        for at, axis in enumerate(x.axes):
            if axis in wanted or len(axis) == 1:
                continue
            parts = _parts(axis, wanted)
            if len(parts) == 1:
                continue
            apart = (*x.axes[:at], *parts, *x.axes[at + 1 :])
            sizes = [self.size(p) for p in parts]
            spelling = self.one((
                f"{x.name}.view({', '.join(map(self.size, apart))})",
                f"{x.name}.unflatten({at}, ({', '.join(sizes)}))",
                f"{x.name}.reshape({', '.join((*map(self.size, apart[:-1]), '-1'))})",
            ))  # fmt: skip
            return self.split(self.let(x.name, spelling, apart), wanted)
        return x

    def permuted(self, x: Var, order: Axes) -> Var:
        """The same axes in another order."""
        if x.axes == order:
            return x
        dims = [x.axes.index(axis) for axis in order]
        spellings = [f"{x.name}.permute({', '.join(map(str, dims))})"]
        moved = [n for n, d in enumerate(dims) if n != d]
        if len(moved) == 2:
            a, b = moved
            from_the_end = f"{x.name}.transpose({a - len(dims)}, {b - len(dims)})"
            spellings = [f"{x.name}.transpose({a}, {b})", from_the_end, *spellings]
            spellings += [f"{x.name}.swapaxes({a}, {b})", f"{x.name}.movedim({a}, {b})"] if b == a + 1 else []
        return self.let(x.name, self.one(spellings), order)

    def merged(self, x: Var, wanted: Axes) -> Var:
        """Adjacent axes put into one where `wanted` has them so."""
        for axis in wanted:
            if axis in x.axes or axis.isdigit():
                continue
            at = next(n for n in range(len(x.axes)) if axis.startswith(x.axes[n]))
            count, text = 0, ""
            while text != axis:
                text += x.axes[at + count]
                count += 1
            new = (*x.axes[:at], axis, *x.axes[at + count :])
            shape = ", ".join(map(self.size, new))
            spelling = self.one((
                f"{x.name}.reshape({shape})", f"{x.name}.flatten({at}, {at + count - 1})",
                f"{x.name}.contiguous().view({shape})",
            ))  # fmt: skip
            x = self.let(x.name, spelling, new)
        return x

    def arranged(self, x: Var, wanted: Axes) -> Var:
        """The tensor with these axes, by views of it."""
        x = self.split(x, wanted)
        order = [part for axis in wanted for part in _parts_in(axis, x.axes)]
        return self.merged(self.permuted(x, tuple(order)), wanted)


def _parts(axis: str, wanted: Axes) -> list[str]:
    """An axis cut where the wanted axes begin and end: "kgd" is "k", "g", "d" for "b k g d", "kg", "d" for "kg d"."""
    cuts = {0, len(axis)}
    for other in wanted:
        overlap = "".join(letter for letter in axis if letter in other)
        if overlap and overlap in axis:
            start = axis.index(overlap)
            cuts |= {start, start + len(overlap)}
    places = sorted(cuts)
    return [axis[a:b] for a, b in itertools.pairwise(places)]


def _parts_in(axis: str, present: Axes) -> list[str]:
    """The present axes that make up a wanted one, in its order."""
    if axis in present:
        return [axis]
    return sorted((p for p in present if p in axis), key=axis.index)
