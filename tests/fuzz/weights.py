"""From scores to weights."""

from __future__ import annotations

from collections.abc import Callable

from .biases import BIASES
from .draft import Draft, Var
from .masks import KEPT
from .scores import broadcast

# --------------------------------------------------------------------------------------------------------------------
# Normalisers: lines over scores {s} and the axis {d} of the keys, that make {p}

ONE_LINE = (
    "{s}.softmax({d})", "F.softmax({s}, dim={d})", "torch.softmax({s}, {d})", "torch.nn.Softmax(dim={d})({s})",
    "F.softmax({s}, dim={d}, dtype=torch.float32).to({s}.dtype)", "{s}.float().softmax({d}).type_as({s})",
    "torch.softmax({s}, dim={d}, dtype=torch.float32)", "F.softmax({s}.float(), {d}).to({s}.dtype)",
    "torch.special.softmax({s}, {d})", "F.softmin(-{s}, dim={d})",
)  # fmt: skip
WRITTEN_OUT = {
    "shifted": ("m = {s}.amax({d}, keepdim=True)", "e = ({s} - m).exp()", "{p} = e / e.sum({d}, keepdim=True)"),
    "shifted-max": (
        "e = torch.exp({s} - {s}.max(dim={d}, keepdim=True).values)", "{p} = e / torch.sum(e, dim={d}, keepdim=True)",
    ),
    "shifted-detached": (
        "e = torch.exp({s} - torch.max({s}, {d}, keepdim=True)[0].detach())", "{p} = e / e.sum({d}, keepdim=True)",
    ),
    "base-two": ("e = torch.exp2({s} - {s}.amax({d}, True))", "{p} = e / e.sum({d}, keepdim=True)"),
    "base-one-and-a-half": ("e = 1.5 ** ({s} - {s}.amax({d}, True))", "{p} = e / e.sum({d}, keepdim=True)"),
    "unshifted": ("e = {s}.exp()", "{p} = e / e.sum({d}, keepdim=True)"),
    "shifted-whole": ("e = ({s} - {s}.max()).exp()", "{p} = e / e.sum({d}, keepdim=True)"),
    "shifted-twice": (
        "{s} = {s} - {s}.amax({d}, keepdim=True)", "{p} = ({s} - {s}.amax({d}, keepdim=True)).softmax({d})",
    ),
    "shifted-before": ("{p} = ({s} - {s}.amax({d}, keepdim=True)).softmax({d})",),
    "reciprocal": (
        "e = ({s} - {s}.amax({d}, True)).exp()", "{p} = e * e.sum({d}, keepdim=True).reciprocal()",
    ),
    "power": ("e = ({s} - {s}.amax({d}, True)).exp()", "{p} = e * e.sum({d}, keepdim=True).pow(-1)"),
    "in-place": (
        "{s} -= {s}.amax({d}, keepdim=True)", "{p} = {s}.exp_()", "{p} /= {p}.sum({d}, keepdim=True)",
    ),
    "unsqueezed": (
        "e = ({s} - {s}.amax({d}).unsqueeze({d})).exp()", "{p} = e / e.sum({d}).unsqueeze({d})",
    ),
}  # fmt: skip
# Eager code divides by subtracting a logarithm, which large fills absorb.
BY_LOGARITHM = {
    "log-softmax": ("{p} = {s}.log_softmax({d}).exp()",),
    "log-softmax-function": ("{p} = torch.exp(F.log_softmax({s}, dim={d}))",),
    "logsumexp": ("{p} = ({s} - {s}.logsumexp({d}, keepdim=True)).exp()",),
    "logsumexp-function": ("{p} = torch.exp({s} - torch.logsumexp({s}, dim={d}, keepdim=True))",),
}
WITHOUT = {
    "sigmoid": ("{p} = {s}.sigmoid()",),
    "sigmoid-length": ("{p} = torch.sigmoid({s} - math.log({t}))",),
    "rectified": ("{p} = F.relu({s}) / {t}",),
    "rectified-squared": ("{p} = F.relu({s} / {t}) ** 2",),
    "exponential": ("{p} = {s}.clamp(max=3).exp()",),
    "bent": ("{p} = F.softplus({s}) / {t}",),
    "bent-sine": ("{p} = torch.sin({s}) / {t}",),
}
PLUS_ONE = {
    "plus-one": ("e = {s}.exp()", "{p} = e / (1 + e.sum({d}, keepdim=True))"),
    "plus-one-shifted": (
        "m = {s}.amax({d}, keepdim=True)", "e = ({s} - m).exp()",
        "{p} = e / (e.sum({d}, keepdim=True) + (-m).exp())",
    ),
    "plus-one-column": (
        "{s} = torch.cat([{s}, torch.zeros_like({s}.narrow({d}, 0, 1))], dim={d})",
        "{p} = {s}.softmax({d}).narrow({d}, 0, {t})",
    ),
}  # fmt: skip
# Those whose exponentials are not of differences from the row's own maximum.
UNSHIFTED = frozenset({"unshifted", "shifted-whole", "plus-one", "plus-one-shifted", "exponential"})
# Beside these a score as it is has an exponential of 0 that no mask makes: of a fill that scores are added to or
# multiplied by, of a small one, or of a tensor that is given.
VANISHING = frozenset({"added", "finite", "temperature", *BIASES})
# Functions of scores some of which make +inf or NaN of -inf.
TURNING = frozenset({
    "shifted", "absolute", "rectified", "squared", "periodic", "activation", "logarithmic", "interpolated",
})  # fmt: skip
# Of the lowest number they give any number, as rounding has it.
PERIODIC = frozenset({"bent-sine"})


def normalise(draft: Draft, s: Var) -> Var:
    """Weights of scores."""
    kinds = ("operator", "operator", "written-out", "written-out", "by-logarithm", "plus-one", "sink", "none", "masked")
    kind = draft.one(kinds)
    draft.labels.append(kind)
    at = s.dim("t")
    d = str(draft.one((at - len(s.axes), at)))
    if kind == "operator":
        return draft.let("p", draft.one(ONE_LINE).format(s=s.name, d=d), s.axes)
    if kind == "sink":
        return _sink(draft, s, d)
    if kind == "masked":
        return _masked(draft, s, d)
    tables = {"written-out": WRITTEN_OUT, "by-logarithm": BY_LOGARITHM, "plus-one": PLUS_ONE, "none": WITHOUT}
    table = tables[kind]
    name = draft.one(tuple(name for name in table if name not in PERIODIC or not draft.has_fill))
    draft.labels.append(name)
    draft.left_open |= name in UNSHIFTED
    draft.refused |= {"log-sum-exp"} if table is BY_LOGARITHM else set()
    draft.refused |= _lengths_unknown(draft) if name == "plus-one-column" else set()
    # Products without a normaliser that are no score program are no attention, and nothing is said of them.
    draft.certain &= table is not WITHOUT or not draft.refused & {"unknown-operator", "extra-columns"}
    for line in table[name]:
        draft.say(line.format(s=s.name, d=d, p="p", t=draft.size("t")))
    return Var("p", s.axes)


def _masked(draft: Draft, s: Var, d: str) -> Var:
    """Exponentials, or probabilities, that a mask sets to zero, and their quotients by what is left of the sum."""
    m = draft.row(KEPT)(draft)
    text = f"({broadcast(draft, m, s.axes)})"
    # A row that is left no key is NaN, and which of its gradients are, is open.
    draft.left_open = True
    terms = draft.one((
        f"{s.name}.exp()", f"({s.name} - {s.name}.amax({d}, keepdim=True)).exp()", f"{s.name}.softmax({d})",
    ))  # fmt: skip
    kept = draft.one((
        f"{terms} * {text}", f"({terms}).masked_fill(~{text}, 0.0)", f"torch.where({text}, {terms}, 0.0)",
        f"{terms} * {text}.to({s.name}.dtype)",
    ))  # fmt: skip
    draft.say(f"e = {kept}")
    return draft.let("p", f"e / e.sum({d}, keepdim=True)", s.axes)


def _sink(draft: Draft, s: Var, d: str) -> Var:
    """One more column without a value, for each head, or for each head and query."""
    head = (draft.shape.head,) if draft.shape.head else ()
    own = draft.one((head, (*head, "s"), ()))
    sinks = draft.given("sinks", own, "normal")
    one = tuple(axis for axis in s.axes if axis != "t")
    text = broadcast(draft, sinks, one) if own else sinks.name
    if text != sinks.name or own:
        text = draft.let("column", text, one).name
    shape = ", ".join(draft.size(axis) if axis != "t" else "1" for axis in s.axes)
    at = s.dim("t")
    column = f"{text}.expand({', '.join(map(draft.size, one))}).unsqueeze({at}).expand({shape})"
    if not own:
        column = f"{text}.expand({shape})"
    draft.refused |= _lengths_unknown(draft)
    last = draft.chance(2)
    both = f"{s.name}, {column}.to({s.name}.dtype)" if last else f"{column}.to({s.name}.dtype), {s.name}"
    draft.say(f"joined = torch.cat([{both}], dim={d})")
    if draft.chance(3):
        draft.say(f"joined = joined - joined.amax({d}, keepdim=True)")
    return draft.let("p", f"joined.softmax({d}).narrow({d}, {0 if last else 1}, {draft.size('t')})", s.axes)


def _lengths_unknown(draft: Draft) -> set[str]:
    """What is right of a further column where no guard says that other keys are as many as the first."""
    return {"extra-columns"} if draft.symbolic and "of-others" in draft.labels else set()


# --------------------------------------------------------------------------------------------------------------------
# What becomes of weights before they meet the values

ENDINGS = {
    "not-dropped": (
        "F.dropout({p}, 0.1, training=False)", "F.dropout({p}, p=0.0)", "torch.nn.Dropout(0.3).eval()({p})",
    ),
    "limited": ("{p}.clamp(0, 1)", "{p}.clamp(max=1.0)", "{p}.clamp_min(0)"),
    "cleared": ("torch.nan_to_num({p})", "{p}.nan_to_num(0.0)", "torch.where({p}.isnan(), 0.0, {p})"),
    "times-number": ("{p} * 2", "{p} / 0.9", "-{p}", "0.5 * {p}"),
    "contiguous": ("{p}.contiguous()", "{p}.clone()", "{p}.type_as({p})"),
}  # fmt: skip


def end(draft: Draft, p: Var) -> Var:
    """Weights, perhaps under one of the operators that real code puts here."""
    if draft.chance(3):
        return draft.row(_FACTORS)(draft, p)
    # NaN that is cleared is taken to be of rows without a key, and not of queries (numerics.md, 3).
    endings = {name: row for name, row in ENDINGS.items() if name != "cleared" or "in-a-row" not in draft.labels}
    spelling = draft.one(draft.row(endings))
    labels = {*draft.labels}
    # A mask under a function that turns it around, or has no value there, may give rows of NaN.
    turned = labels & TURNING
    vanishing = labels & {"shifted-whole", "masked"} or ("unshifted" in labels and labels & VANISHING)
    if spelling in ENDINGS["cleared"] and (turned or vanishing):
        # A row that eager code's exponentials leave 0 is cleared, and whether one is depends on the data.
        draft.refused.add("probability-mask")
    return draft.let("p", spelling.format(p=p.name), p.axes)


def _of_heads(draft: Draft, p: Var) -> Var:
    own = draft.one(((draft.shape.head,), draft.shape.outer)) if draft.shape.head else draft.shape.outer
    factor = draft.given("gate", own, "normal") if own else draft.given("gate", (), "normal")
    text = broadcast(draft, factor, p.axes) if own else factor.name
    return draft.let("p", draft.one(("{p} * {f}", "{f} * {p}")).format(p=p.name, f=text), p.axes)


def _of_rows(draft: Draft, p: Var) -> Var:
    factor = draft.given("gate", (*draft.shape.outer, "s"), "normal")
    text = broadcast(draft, factor, p.axes)
    return draft.let("p", draft.one(("{p} * {f}.sigmoid()", "{p} * {f}")).format(p=p.name, f=f"({text})"), p.axes)


def _zeroed(draft: Draft, p: Var) -> Var:
    m = draft.row(KEPT)(draft)
    text = broadcast(draft, m, p.axes)
    # Another mask than the scores' may meet rows of NaN, and one that the graph makes may be as large as they are.
    draft.refused |= {"probability-mask", "probability-factor"}
    # numerics.md, section 3: a tensor of floats is taken to leave each row a key.
    draft.left_open |= any(x.kind == "infinite" for x in draft.inputs)
    if draft.chance(4):
        draft.say(f"{p.name}[~({text}).expand_as({p.name})] = 0")
        return p
    spelling = draft.one((
        "{p}.masked_fill(~{m}, 0.0)", "torch.where({m}, {p}, 0.0)", "{p} * {m}", "{p} * {m}.to({p}.dtype)",
    ))  # fmt: skip
    return draft.let("p", spelling.format(p=p.name, m=f"({text})"), p.axes)


_FACTORS: dict[str, Callable[[Draft, Var], Var]] = {
    "head-factor": _of_heads,
    "row-factor": _of_rows,
    "zeroed": _zeroed,
}
