"""Masks: what scores are replaced by outside a condition on positions or inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .draft import Draft, Var
from .program import Axes
from .scores import broadcast

# --------------------------------------------------------------------------------------------------------------------
# Which keys are kept: Python over positions i and j, each of which may be a column or a row

PREDICATES = {
    "causal": "j <= i",
    "causal-offset": "j <= i + ({t} - {s})",
    "window": "(j <= i) & (i - j < 5)",
    "both-sides": "(i - j).abs() <= 3",
    "prefix": "(j <= i) | (j < 4)",
    "chunks": "i // 4 == j // 4",
    "chunks-causal": "(i // 3 == j // 3) & (i >= j)",
    "dilated": "(j <= i) & ((i - j) % 2 == 0)",
    "strictly": "j < i",
    "after": "~(j < i)",
    "streaming": "(j <= i) & ((i - j < 3) | (j < 2))",
    "blocks": "j < (i // 4 + 1) * 4",
    "odd": "(i + j) % 2 == 0",
    "even-keys": "(j % 2 == 0) & (i >= 0)",
    "not-itself": "i != j",
    "first-queries": "(i > 1) | (j == 0)",
    "xor": "(j <= i) ^ (j < 2)",
    "far": "torch.logical_not((i - j).abs() > 6)",
    "reversed": "j >= {t} - 1 - i",
    "scaled": "j * 2 <= i * 3",
    "minimum": "torch.minimum(i, j) >= j",
}


def positions(draft: Draft) -> None:
    """Lines that make i and j, the positions of queries and keys."""
    i = draft.one(("torch.arange({s})[:, None]", "torch.arange({s}).unsqueeze(1)", "torch.arange({s}).view(-1, 1)"))
    j = draft.one(("torch.arange({t})[None, :]", "torch.arange({t})", "torch.arange({t}).unsqueeze(0)"))
    sizes = {"s": draft.size("s"), "t": draft.size("t")}
    draft.say(f"i, j = {i.format(**sizes)}, {j.format(**sizes)}")


def _of_positions(draft: Draft) -> Var:
    predicate = draft.row(PREDICATES)
    positions(draft)
    return draft.let("keep", predicate.format(s=draft.size("s"), t=draft.size("t")), ("s", "t"))


def _triangle(draft: Draft) -> Var:
    s, t = draft.size("s"), draft.size("t")
    spelling = draft.one((
        "torch.ones({s}, {t}, dtype=torch.bool).tril()", "torch.tril(torch.ones({s}, {t})).bool()",
        "torch.ones(({s}, {t}), dtype=torch.bool).triu(1).logical_not()", "torch.tril(torch.ones({s}, {t})) == 1",
        "torch.ones({s}, {t}, dtype=torch.bool).tril({t} - {s})", "~torch.ones({s}, {t}, dtype=torch.bool).triu(2)",
        "torch.ones({s}, {t}).tril(3).triu(-2) > 0", "torch.full(({s}, {t}), 1.0).tril() != 0",
    ))  # fmt: skip
    return draft.let("keep", spelling.format(s=s, t=t), ("s", "t"))


def given_axes(draft: Draft) -> Axes:
    """Some axes of the scores, the keys among them."""
    outer = draft.shape.outer
    batch = draft.shape.batch
    return draft.one((
        (*batch, "t"), ("s", "t"), (*batch, "s", "t"), (*outer, "s", "t"), (*outer[len(batch) :], "s", "t"), ("t",),
        (*outer, "t"),
    ))  # fmt: skip


def _given(draft: Draft) -> Var:
    return draft.given("keep", given_axes(draft), draft.one(("kept", "mostly", "rarely")))


def _compared(draft: Draft) -> Var:
    x = draft.given("level", given_axes(draft), "normal")
    spelling = draft.one(("{x} > 0", "{x} <= 0.5", "{x}.abs() < 1", "({x} > -1) & ({x} < 1)"))
    return draft.let("keep", spelling.format(x=x.name), x.axes)


def _given_bits(draft: Draft) -> Var:
    x = draft.given("mask", given_axes(draft), draft.one(("bits", "ones")))
    spelling = draft.one(("{x} == 1", "{x} != 0", "{x}.bool()", "~({x} == 0)", "{x} > 0", "{x}.to(torch.bool)"))
    return draft.let("keep", spelling.format(x=x.name), x.axes)


def _lengths(draft: Draft) -> Var:
    if not draft.shape.batch:
        return _given(draft)
    x = draft.given("lengths", draft.shape.batch, "lengths")
    at = ", ".join(":" for _ in x.axes)
    spelling = draft.one(("torch.arange({t}) < {x}[{at}, None]", "~(torch.arange({t}) >= {x}.unsqueeze(-1))"))
    return draft.let("keep", spelling.format(t=draft.size("t"), x=x.name, at=at), (*x.axes, "t"))


def _documents(draft: Draft) -> Var:
    """Sequences packed into one: each sees itself."""
    batch = draft.one((draft.shape.batch, ()))
    ids = draft.given("ids", (*batch, "t"), "documents")
    at = ", ".join((*(":" for _ in batch), ""))
    if draft.sizes["s"] == draft.sizes["t"] and draft.chance(2):
        spelling = "{x}[{at}:, None] == {x}[{at}None, :]"
        return draft.let("keep", spelling.format(x=ids.name, at=at), (*batch, "s", "t"))
    own = draft.given("own", (*batch, "s"), "documents")
    spelling = draft.one(("{y}[{at}:, None] == {x}[{at}None, :]", "{y}.unsqueeze(-1) >= {x}.unsqueeze(-2)"))
    return draft.let("keep", spelling.format(x=ids.name, y=own.name, at=at), (*batch, "s", "t"))


def _moved(draft: Draft) -> Var:
    """Positions that are given."""
    batch = draft.shape.batch[:1] or ("1",)
    i, j = draft.given("rows", (*batch, "s"), "positions"), draft.given("columns", (*batch, "t"), "positions")
    keep = draft.let("keep", f"{j.name}[:, None, :] <= {i.name}[:, :, None]", (*batch, "s", "t"))
    return keep if batch != ("1",) else draft.let("keep", f"{keep.name}[0]", ("s", "t"))


def _buffer(draft: Draft) -> Var:
    """A part of a square that is larger than any scores."""
    x = draft.given("buffer", ("m", "m"), "triangle")
    s, t = draft.size("s"), draft.size("t")
    spelling = draft.one(
        ("{x}[:{s}, :{t}]", "{x}[{m} - {s}:, {m} - {t}:]", "{x}[{t}:{t} + {s}, :{t}]", "{x}[5:][:{s}, 3:{t} + 3]")
    )
    return draft.let("keep", spelling.format(x=x.name, s=s, t=t, m=draft.size("m")), ("s", "t"))


def _counted(draft: Draft) -> Var:
    """Sequences that begin where a bit says so."""
    starts = draft.given("starts", (*draft.shape.batch, "t"), "rarely")
    ids = draft.let("ids", f"{starts.name}.cumsum(-1)", starts.axes)
    if draft.sizes["s"] != draft.sizes["t"]:
        return draft.let("keep", f"{ids.name} < 3", ids.axes)
    return draft.let("keep", f"{ids.name}.unsqueeze(-1) == {ids.name}.unsqueeze(-2)", (*draft.shape.batch, "s", "t"))


WRITTEN = (
    "{x}[:, :2] = True", "{x}[1:] = 1", "{x}[..., ::2] = True", "{x}.diagonal().fill_(True)", "{x}[-1] = True",
    "{x}[i >= j] = True", "{x}[:, 0] |= True", "{x}[: {s} // 2, {t} // 3 :] = False", "{x}.transpose(0, 1)[-1:] = 0",
    "{x}[2:4].logical_not_()", "{x}[i[:, 0], 0] = True", "{x}.view(-1)[:3] = True", "{x}[:, -1] ^= i[:, 0] > 2",
    "{x}.narrow(1, 0, 1).fill_(True)", "{x}.index_fill_(0, torch.arange(1), True)", "{x}[1:] = {x}[1:] & (j < 9)",
)  # fmt: skip


def written(draft: Draft, name: str, made: Sequence[str], writes: Sequence[str], first: Sequence[str] = ()) -> Var:
    """A tensor [s, t] `{x}` that is made in one of these ways and then written, by what is `first` in any case."""
    positions(draft)
    sizes = {"s": draft.size("s"), "t": draft.size("t")}
    x = draft.let(name, draft.one(made).format(**sizes), ("s", "t"))
    lines = [*first, *(draft.one(writes) for _ in range(draft.one((1, 2, 3))))]
    for line in lines:
        draft.say(line.format(x=x.name, **sizes))
    return x


def _written(draft: Draft) -> Var:
    """A mask that is made by assignments. Nothing would be left of scores that constants mask everywhere."""
    made = ("torch.zeros({s}, {t}, dtype=torch.bool)", "j <= i", "torch.ones({s}, {t}).tril() > 0")
    return written(draft, "keep", made, WRITTEN, first=("{x}[:, :1] = True",))


def _both(draft: Draft) -> Var:
    """Two conditions together."""
    left, right = draft.row(SIMPLE)(draft), draft.row(SIMPLE)(draft)
    axes = tuple(axis for axis in (*draft.shape.outer, "s", "t") if axis in (*left.axes, *right.axes))
    texts = [broadcast(draft, x, axes) for x in (left, right)]
    spelling = draft.one(("{0} & {1}", "torch.logical_and({0}, {1})", "{0} | {1}", "~(~{0} | ~{1})", "{0} * {1}"))
    return draft.let("keep", spelling.format(*texts), axes)


SIMPLE: dict[str, Callable[[Draft], Var]] = {
    "triangle": _triangle,
    "compared": _compared,
    "positions": _of_positions,
    "given-mask": _given,
    "given-bits": _given_bits,
    "lengths": _lengths,
    "documents": _documents,
    "moved-positions": _moved,
    "buffer": _buffer,
    "counted-documents": _counted,
    "written-mask": _written,
}
KEPT: dict[str, Callable[[Draft], Var]] = SIMPLE | {"two-masks": _both}

# --------------------------------------------------------------------------------------------------------------------
# How a condition becomes part of the score

FILLS = {
    "infinite": ('float("-inf")', "-math.inf", "-torch.inf"),
    "minimal": ("torch.finfo({s}.dtype).min", "-torch.finfo({s}.dtype).max"),
    "finite": ("-1e4", "-30000.0", "-20.0"),
}
APPLIED = {
    "filled": (
        "{s}.masked_fill(~{m}, {fill})", "{s}.masked_fill({m}.logical_not(), {fill})",
        "{s}.masked_fill({m} == 0, {fill})",
    ),
    "chosen": ("torch.where({m}, {s}, {fill})", "{s}.where({m}, {fill})", "torch.where(~{m}, {fill}, {s})"),
    "added": (
        "{s} + torch.zeros_like({m}, dtype={s}.dtype).masked_fill(~{m}, {fill})",
        "{s} + torch.where({m}, torch.zeros((), dtype={s}.dtype), {fill})",
        "torch.zeros({m}.shape, dtype={s}.dtype).masked_fill_(~{m}, {fill}) + {s}",
    ),
    "assigned": (
        "{s}[~{m}.expand_as({s})] = {fill}", "{s}[({m} == 0).expand_as({s})] = {fill}",
        "{s}.index_put_((~{m}.expand_as({s}),), torch.tensor({fill}, dtype={s}.dtype))",
        "{s}[..., :1].masked_fill_(~{m}[..., :1], {fill}); "
        "{s}[..., 1:][~{m}.expand_as({s})[..., 1:]] = {fill}",
    ),
    "filled-in-place": ("{s}.masked_fill_(~{m}, {fill})", "{s} = {s}.masked_fill_({m} == False, {fill})"),
}  # fmt: skip


def mask(draft: Draft, s: Var) -> Var:
    """A condition outside which scores are replaced, or a number is added to them."""
    m = draft.again("mask", lambda draft: draft.row(KEPT)(draft))
    fill = draft.one(draft.row(FILLS)).format(s=s.name)
    spelling = draft.one(draft.row(APPLIED))
    text = broadcast(draft, m, s.axes)
    if text != m.name:
        text = draft.let("m", text, s.axes).name
    line = spelling.format(s=s.name, m=text, fill=fill)
    if spelling in (*APPLIED["filled-in-place"], *APPLIED["assigned"]):
        draft.say(line)
        return s
    return draft.let("s", line, s.axes)
