"""Biases, which are added to scores, and functions of scores."""

from __future__ import annotations

from collections.abc import Callable

from .draft import Draft, Var
from .masks import given_axes, positions, written
from .scores import broadcast


def _dense(draft: Draft) -> Var:
    return draft.given("bias", given_axes(draft), draft.one(("normal", "weights")))


def _given_minimal(draft: Draft) -> Var:
    """An additive mask that is made outside."""
    return draft.given("bias", given_axes(draft), draft.one(("minimal", "infinite")))


def _blended(draft: Draft) -> Var:
    """As BERT's mask."""
    x = draft.given("mask", given_axes(draft), draft.one(("bits", "ones", "kept")))
    spelling = draft.one(
        ("(1.0 - {x}.float()) * -10000.0", "(1 - {x}.to(torch.float32)) * torch.finfo(torch.float32).min")
    )
    return draft.let("bias", spelling.format(x=x.name), x.axes)


def _of_rows(draft: Draft) -> Var:
    return draft.given("bias", draft.one((("s",), (*draft.shape.outer, "s"))), "offsets")


def _slopes(draft: Draft) -> Var:
    """ALiBi, https://arxiv.org/abs/2108.12409"""
    positions(draft)
    spelling = draft.one(("j - i", "-(i - j).abs()", "(j - i) * 0.5", "(j - i).float().abs().neg()"))
    distance = draft.let("far", spelling, ("s", "t"))
    if not draft.shape.head:
        return draft.let("bias", f"{distance.name} * 0.25", ("s", "t"))
    slopes = draft.given("slopes", (draft.shape.head,), "positive")
    return draft.let("bias", f"{slopes.name}[:, None, None] * {distance.name}", (draft.shape.head, "s", "t"))


def _table(draft: Draft) -> Var:
    """A number for each clipped distance, by head."""
    head = (draft.shape.head,) if draft.shape.head else ()
    positions(draft)
    spelling = draft.one(("(j - i).clamp(-3, 3) + 3", "torch.clamp(i - j, -3, 3) + 3", "(i - j).abs().clamp(max=6)"))
    at = draft.let("at", spelling, ("s", "t"))
    if draft.chance(2):
        table = draft.given("table", ("7", *head), "normal")
        looked = draft.one(("{table}[{at}]", "F.embedding({at}, {table})")) if head else "{table}[{at}]"
        return draft.let("bias", looked.format(table=table.name, at=at.name), ("s", "t", *head))
    table = draft.given("table", (*head, "7"), "normal")
    return draft.let("bias", f"{table.name}[{', '.join((*(':' for _ in head), at.name))}]", (*head, "s", "t"))


def _bucketed(draft: Draft) -> Var:
    """A table at positions that are given."""
    own = draft.one(((), draft.shape.batch))
    at = draft.given("at", (*own, "s", "t"), "buckets")
    head = (draft.shape.head,) if draft.shape.head else ()
    table = draft.given("table", ("5", *head), "normal")
    return draft.let("bias", f"{table.name}[{at.name}]", (*at.axes, *head))


def _smooth(draft: Draft) -> Var:
    positions(draft)
    spelling = draft.one((
        "torch.log1p((i - j).abs().float())", "-((i - j) ** 2).float() / 9", "(i - j).float().tanh()",
        "torch.exp(-(i - j).abs() / 4.0)", "torch.cos((i - j) * 0.3)", "1.0 / (1 + (i - j).abs())",
        "torch.sqrt((i - j).abs().float() + 1)",
    ))  # fmt: skip
    return draft.let("bias", spelling, ("s", "t"))


WRITTEN = (
    "{x}[:, :2] = 0.5", "{x}[1:] -= 1.0", "{x}[..., ::2] += 0.25", "{x}.diagonal().fill_(1.5)", "{x}[:, 0] *= 3",
    "{x}[-1] = torch.arange({t}) * 0.125", "{x}[i > j] = -0.5", "{x}.transpose(0, 1)[0] = 2.0", "{x}[2:].zero_()",
    "{x}.view(-1)[:3] = 1", "{x}[:, : {t} // 2].neg_()", "{x}[i[:, 0], 0] = 0.75", "{x}[0] = {x}[-1] + 1",
    "{x}[:, {t} // 2 :] = (i + 1.0).expand({s}, {t} - {t} // 2)", "{x}[1:].tanh_()", "{x}.fill_(0.25)",
)  # fmt: skip


def _written(draft: Draft) -> Var:
    """A bias that is made by assignments."""
    made = ("torch.zeros({s}, {t})", "torch.full(({s}, {t}), 0.5)", "(i - j).float()")
    return written(draft, "bias", made, WRITTEN)


BIASES: dict[str, Callable[[Draft], Var]] = {
    "dense-bias": _dense,
    "additive-mask": _given_minimal,
    "blended": _blended,
    "row-bias": _of_rows,
    "alibi": _slopes,
    "table": _table,
    "looked-up": _bucketed,
    "smooth": _smooth,
    "written-bias": _written,
}


def bias(draft: Draft, s: Var) -> Var:
    """Something added to the scores."""
    b = draft.again("bias", lambda draft: draft.row(BIASES)(draft))
    text = broadcast(draft, b, s.axes)
    spelling = draft.one((
        "{s} + {b}", "{b} + {s}", "torch.add({s}, {b})", "{s} - (-({b}))", "{s} + ({b}).to({s}.dtype)",
        "{s} + 0.5 * {b}",
    ))  # fmt: skip
    if draft.chance(8):
        draft.say(draft.one(("{s} += {b}", "{s}.add_({b})")).format(s=s.name, b=text))
        return s
    return draft.let("s", spelling.format(s=s.name, b=text), s.axes)


# --------------------------------------------------------------------------------------------------------------------
# Functions of the score

CURVES = {
    "soft-cap": ("20.0 * torch.tanh({s} / 20.0)", "({s} / 5).tanh() * 5", "torch.tanh({s} * 0.1).mul(10)"),
    "clamped": ("{s}.clamp(-5, 5)", "torch.clamp({s}, max=3.0)", "{s}.clamp_min(-2)"),
    "absolute": ("{s}.abs()", "-{s}.abs()"),
    "rectified": ("F.relu({s})", "{s}.relu()", "F.leaky_relu({s}, 0.1)", "F.gelu({s})", "F.silu({s})"),
    "squared": ("-({s} ** 2)", "-{s}.square()", "-{s} * {s}", "{s} * {s}.sigmoid()"),
    "sigmoid-score": ("{s}.sigmoid()", "{s}.sigmoid().log()"),
    "periodic": ("{s}.sin()", "torch.cos({s})"),
    "shifted": ("{s} + 1.0", "1 - {s}", "-{s}", "{s} - 3"),
    "upcast": ("{s}.float()", "{s}.to(torch.float32)"),
    "limited-exponential": (
        "torch.exp({s}.clamp(max=2))",
        "{s}.clamp(max=1).exp()",
        "{s}.clamp(-4, 2).expm1()",
        "torch.exp2({s}.clamp(max=3))",
    ),
    "activation": (
        "F.elu({s})",
        "F.softplus({s})",
        "F.logsigmoid({s})",
        "F.hardtanh({s}, -3.0, 2.0)",
        "F.relu6({s})",
        "F.mish({s})",
        "F.hardsigmoid({s})",
        "F.hardswish({s})",
        "F.selu({s})",
        "F.softshrink({s})",
        "torch.logaddexp({s}, -{s})",
    ),
    "arcs": ("{s}.atan()", "{s}.asinh()"),
    "logarithmic": ("torch.log1p({s}.abs())", "torch.log2({s} ** 2 + 1)", "torch.log10({s}.abs() + 1)"),
    "interpolated": ("torch.lerp({s}, {s}.tanh(), 0.3)", "torch.addcmul({s}, {s}, {s}.tanh(), value=0.1)"),
}
# Functions without a row in the table of operators.
UNKNOWN = ("{s}.clamp(-4, 2).cosh()", "torch.erfc({s} * 0.1)", "torch.hypot({s}, {s} + 1)")


def curve(draft: Draft, s: Var) -> Var:
    """The score under a function."""
    draft.curved = True
    if draft.chance(20):
        draft.refused.add("unknown-operator")
        return draft.let("s", draft.one(UNKNOWN).format(s=s.name), s.axes)
    # Of a large number a sine is any number, as rounding has it.
    known = {name: spellings for name, spellings in CURVES.items() if name != "periodic" or not draft.has_fill}
    return draft.let("s", draft.one(draft.row(known)).format(s=s.name), s.axes)
