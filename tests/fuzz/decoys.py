"""Programs that look like attention and may not be: whatever becomes of them, their numbers have to be right."""

from __future__ import annotations

from .biases import bias, curve
from .draft import Draft, Var
from .masks import mask
from .operands import frames, operands
from .scores import product, scale_scores
from .values import finish, weigh
from .weights import normalise

# Lines over scores {s}, the axis {d} of keys, of queries {x} and another {o}, and the keys' number {t}; {k} and {v} are
# keys and values as the products see them, {q} queries.
BEFORE = {
    "softmax-of-rows": "{s} = {s}.softmax({x})",
    "twice-normalised": "{s} = {s}.softmax({d})",
    "first-axis": "{s} = {s}.softmax(0)",
    "maximum-of-columns": "{s} = {s} - {s}.amax({x}, keepdim=True)",
    "mean-of-rows": "{s} = {s} - {s}.mean({d}, keepdim=True)",
    "norm": "{s} = F.normalize({s}, dim={d})",
    "over-maximum": "{s} = {s} / (1 + {s}.abs().amax({d}, keepdim=True))",
    "cumulative": "{s} = {s}.cumsum({d})",
    "sorted": "{s} = {s}.sort({d}).values",
    "largest": "{s} = {s}.masked_fill({s} < {s}.topk(1, {d}).values, -1e4)",
    "above-mean": "{s} = torch.where({s} > {s}.mean({d}, keepdim=True), {s}, -math.inf)",
    "flipped": "{s} = {s}.flip({d})",
    "rolled": "{s} = {s}.roll(1, {d})",
    "rolled-rows": "{s} = {s}.roll(1, {x})",
    "flipped-rows": "{s} = {s}.flip({x})",
    "product-of-two": "{s} = {s} * {s}.flip({d})",
    "mixed-heads": "{s} = {s} + {s}.flip(0)",
    "mean-of-batch": "{s} = {s} + {s}.mean(0, keepdim=True)",
    "written-column": "{s}.select({d}, 0).fill_(0.5)",
    "written-row": "{s}.select({x}, 0).zero_()",
    "written-diagonal": "{s}.diagonal(0, {x}, {d}).fill_(-3.0)",
    "written-alias": "alias = {s}.transpose({x}, {d})\nalias.mul_(0.5)",
    "written-twice": "alias = {s}\n{s} = {s} * 1\nalias.zero_()",
    "saved-before": "kept = {s}\n{s} = {s} * 0.5\nextra = kept.sum()",
    "saved-then-written": "kept = {s}.clone()\n{s}.mul_(0.5)\nextra = kept.amax()",
    "scores-returned": "kept = {s}",
    "keys-written": "{k}.mul_(0.5)",
    "queries-written": "{q}.zero_()",
    "values-written": "{v}.add_(1.0)",
    "detached-scores": "{s} = {s}.detach()",
    "partly-detached": "{s} = {s} + ({s} * 0.5).detach()",
    "rounded": "{s} = {s}.round()",
    "mask-written": "{mask}.logical_not_()",
    "bias-written": "{bias}.add_(1)",
    "straight-through": "{s} = {s} + ({s}.round() - {s}).detach()",
    "first-kept": "{s} = torch.cat([{s}.narrow({d}, 0, 1), {s}.narrow({d}, 1, {t} - 1) * 2], {d})",
    "transposed": "{s} = {s}.transpose({x}, {d}).reshape({s}.shape)",
    "logits-noise": "{s} = {s} + {s}.detach().std()",
    "conditional": "{s} = torch.where({s}.amax({d}, keepdim=True) > 1, {s}, -{s})",
}
# Lines over weights {p}.
AFTER = {
    "returned": "kept = {p}",
    "summed": "extra = {p}.sum()",
    "used-twice": "extra = ({p} * 2).amax()",
    "written": "{p}.mul_(0.5)",
    "column-written": "{p}.select({d}, 0).zero_()",
    "row-written": "{p}.select({x}, 0).fill_(0.25)",
    "returned-then-written": "kept = {p}.clone()\n{p}.mul_(2)",
    "kept-alias-written": "kept = {p}\n{p} = {p} * 1\nkept.add_(1)",
    "normalised-again": "{p} = {p}.softmax({d})",
    "divided-again": "{p} = {p} / {p}.sum({d}, keepdim=True)",
    "divided-by-columns": "{p} = {p} / (1e-3 + {p}.sum({x}, keepdim=True))",
    "squared": "{p} = {p} ** 2",
    "rooted": "{p} = {p}.sqrt()",
    "plus": "{p} = {p} + 0.1",
    "plus-identity": "{p} = {p} + {p}.mean({d}, keepdim=True)",
    "cumulative-weights": "{p} = {p}.cumsum({d})",
    "rolled-weights": "{p} = {p}.roll(1, {d})",
    "flipped-weights": "{p} = {p}.flip({d})",
    "flipped-rows-of-weights": "{p} = {p}.flip({x})",
    "transposed-weights": "{p} = {p}.transpose({x}, {d}).reshape({p}.shape)",
    "rounded-weights": "{p} = {p}.round()",
    "limited-weights": "{p} = {p}.clamp(0.01, 0.3)",
    "thresholded": "{p} = {p}.masked_fill({p} < 0.05, 0.0)",
    "hard": "{p} = F.one_hot({p}.argmax({d}), {t}).movedim(-1, {d}).to({p}.dtype)",
    "heads-mixed": "{p} = {p} + 0.5 * {p}.flip(0)",
    "mean-of-heads": "{p} = {p} - 0.1 * {p}.mean(0, keepdim=True)",
    "entropy": "extra = -({p} * ({p} + 1e-6).log()).sum()",
    "values-written-after": "{v}.add_(1.0)",
    "keys-written-after": "{k}.zero_()",
    "queries-written-after": "{q}.mul_(2.0)",
    "scores-written-after": "{s}.zero_()",
    "scores-used-after": "extra = {s}.amax()",
    "detached-weights": "{p} = {p}.detach()",
    "detached-half": "{p} = {p} * 0.5 + ({p} * 0.5).detach()",
    "mask-written-after": "{mask}.logical_not_()",
    "bias-written-after": "{bias}.mul_(2)",
    "half": "{p} = {p}.to(torch.float16).to({p}.dtype)",
    "product-of-weights": "{p} = {p} * {p}.flip({d})",
    "difference": "{p} = {p} - {p}.flip({x})",
    "first-dropped": "{p} = torch.cat([{p}.narrow({d}, 0, 1) * 0, {p}.narrow({d}, 1, {t} - 1)], {d})",
}
# The softmax itself, over other axes than the keys'.
NORMALISERS = {
    "over-queries": "{p} = {s}.softmax({x})",
    "over-first": "{p} = {s}.softmax(0)",
    "wrong-maximum": "e = ({s} - {s}.amax({x}, keepdim=True)).exp()\n{p} = e / e.sum({d}, keepdim=True)",
    "wrong-sum": "e = ({s} - {s}.amax({d}, keepdim=True)).exp()\n{p} = e / e.sum({x}, keepdim=True)",
    "whole-sum": "e = ({s} - {s}.amax({d}, keepdim=True)).exp()\n{p} = e / e.sum()",
    "other-maximum": "e = ({s} - {s}.amin({d}, keepdim=True).clamp(min=-3)).exp()\n{p} = e / e.sum({d}, keepdim=True)",
    "shifted-numerator": "e = ({s} - {s}.amax({d}, keepdim=True)).exp()\n{p} = e / {s}.exp().sum({d}, keepdim=True)",
    "shifted-by-one": "e = {s}.exp()\n{p} = e / (e.sum({d}, keepdim=True) + 2)",
    "sum-of-other": "e = {s}.exp()\n{p} = e / ({s} * 0.5).exp().sum({d}, keepdim=True)",
    "sum-of-part": "e = {s}.exp()\n{p} = e / e.narrow({d}, 0, 1).sum({d}, keepdim=True)",
    "sum-of-flipped": "e = {s}.exp()\n{p} = e / e.flip({x}).sum({d}, keepdim=True)",
    "part-of-more": "{p} = torch.cat([{s}, {s}], {d}).softmax({d}).narrow({d}, 0, {t})",
    "second-part": "{p} = torch.cat([{s} * 2, {s}], {d}).softmax({d}).narrow({d}, {t}, {t})",
    "minus-maximum-of-half": "e = ({s} - ({s} / 2).amax({d}, True)).exp()\n{p} = e / e.sum({d}, keepdim=True)",
    "softmin": "{p} = F.softmin({s}, dim={d})",
    "base-two": "e = torch.exp2({s})\n{p} = e / e.sum({d}, keepdim=True)",
    "absolute-sum": "{p} = {s} / (1 + {s}.abs().sum({d}, keepdim=True))",
    "gumbel-free": "{p} = ({s}.log_softmax({d}) * 2).exp()",
    "log-weights": "{p} = {s}.log_softmax({d})",
    "wrong-logarithm": "{p} = ({s} - {s}.logsumexp({x}, keepdim=True)).exp()",
    "linear": "{p} = {s}",
    "written-sum": "e = {s}.exp()\nn = e.sum({d}, keepdim=True)\ne.mul_(2)\n{p} = e / n",
    "written-maximum": "m = {s}.amax({d}, keepdim=True)\n{s}.mul_(0.5)\n{p} = ({s} - m).softmax({d})",
    "written-exponent": "e = {s}.exp()\n{s}.zero_()\n{p} = e / {s}.exp().sum({d}, keepdim=True)",
}


def decoy(draft: Draft) -> tuple[None, str]:
    """A program with one or two things that attention has not."""
    q, k, v = operands(draft)
    frame = draft.row(frames(draft.shape))
    s = product(draft, q, k, frame)
    if draft.chance(2):
        s = scale_scores(draft, s)
    where = draft.row({"before": BEFORE, "normaliser": NORMALISERS, "after": AFTER})
    for step in [draft.one((mask, bias, curve))] if draft.chance(2) else []:
        s = step(draft, s)
    names = {"q": q.name, "k": k.name, "v": v.name, "s": s.name, "p": "p"}
    names |= {"d": str(s.dim("t")), "x": str(s.dim("s")), "t": draft.size("t")}
    if where is BEFORE or draft.chance(6):
        _say(draft, draft.row(BEFORE), names)
    if where is NORMALISERS:
        # Their exponentials are of other differences than those from the row's own maximum.
        draft.left_open = True
        _say(draft, draft.row(NORMALISERS), names)
        p = Var("p", s.axes)
    else:
        s = Var(names["s"], s.axes)
        p = normalise(draft, s)
    if where is AFTER or draft.chance(6):
        _say(draft, draft.row(AFTER), {**names, "p": p.name, "s": s.name})
    out = finish(draft, weigh(draft, p, v))
    made = [name for name in ("kept", "extra") if any(line.startswith(f"{name} =") for line in draft.lines)]
    return None, ", ".join((out.name, *made))


def _say(draft: Draft, lines: str, names: dict[str, str]) -> None:
    for kind in ("mask", "bias"):
        made = draft.made.get(kind)
        if f"{{{kind}}}" in lines and not made:
            return
        names = {**names, kind: made[0].name} if made else names
    for line in lines.split("\n"):
        draft.say(line.format(**names))
