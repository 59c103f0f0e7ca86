"""From a site and a refusal, which hold graph nodes, to the plain values a report keeps."""

from __future__ import annotations

import functools

import sympy
import torch

from flashfuse.kernels.expr import Expr
from flashfuse.kernels.mask import mask_of
from flashfuse.kernels.spec import AttentionSpec, to_text
from flashfuse.patterns.graph import tensor
from flashfuse.patterns.site import AttentionSite, Operand, Refusal
from flashfuse.report import Refused, Site
from flashfuse.routes import Route


def describe_site(site: AttentionSite, route: Route | None = None) -> Site:
    """What a report says about a rewritten site."""
    spec = site.spec
    return Site(
        status="fused" if route is None else "routed",
        spec=spec,
        location=site.location,
        node=site.node.name,
        math=_math(site),
        mask=mask_of(spec).describe(),
        heads=_heads(site),
        shape=_shape(site),
        dtypes=", ".join(f"{part} {_short(dtype)}" for part, dtype in _dtypes(spec)),
        kernel=_kernel(site) if route is None else f"{route.operator.name()}, {route.why}",
        bytes_saved=_bytes_saved(site),
    )


def describe_refusal(refusal: Refusal) -> Refused:
    """What a report says about a refusal."""
    return Refused(refusal.code, refusal.reason, refusal.location, refusal.node.name)


def _math(site: AttentionSite) -> str:
    return "; plus ".join(map(_term, (site, *site.plus)))


def _term(site: AttentionSite) -> str:
    captured = "".join(f"; t{slot} = {node.name}" for slot, node in enumerate(site.captured))
    terms = ((site.q, site.k), *site.more)
    k, v = _stored(site.k, site.spec.key), _stored(site.v, site.spec.value)
    product = " + ".join(_product(q, k) for q, k in terms) if site.more else "q @ k.T"
    names = f"q = {_name(site.q)}; k = {k}; " if not site.more else ""
    return f"{_weights(site.spec)} @ v, qk = {product}; {names}v = {v}{captured}"


def _name(operand: Operand) -> str:
    """The tensor that is read, or those that are put together."""
    names = [node.name for node in operand.nodes]
    return names[0] if len(names) == 1 else f"[{'; '.join(names)}]"


def _stored(operand: Operand, program: Expr | None) -> str:
    """Keys or values: the tensor that is read, and the program of its elements x."""
    return _name(operand) if program is None else f"{to_text(program)} with x = {_name(operand)}"


def _product(q: Operand, k: Operand) -> str:
    """One of several products that add up to qk."""
    return f"{_name(q)} @ {_name(k)}.T" + (f" * {q.factor:.6g}" if q.factor != 1.0 else "")


def _weights(spec: AttentionSpec) -> str:
    """What multiplies the values; the columns of a softmax that have no value are cut off by the slice."""
    text = to_text(spec.score)
    if spec.normaliser == "softmax":
        text = f"softmax({text})" if spec.sink is None else f"softmax([{text}, {to_text(spec.sink)}])[:-1]"
    if spec.factor is not None:
        factor = to_text(spec.factor)
        text = f"where({factor}, {text}, 0)" if spec.factor.dtype == torch.bool else f"({text} * {factor})"
    return f"dropout {spec.dropout:.6g} of {text}" if spec.dropout else text


def _heads(site: AttentionSite) -> str:
    """Sizes of the batch axes, and which operands do not move along which of them."""
    sizes = ", ".join(f"n{axis} = {size}" for axis, size in enumerate(site.batch))
    shared: dict[str, list[str]] = {}
    for axis, size in enumerate(site.batch):
        still = [name for name in "qkv" if size != 1 and not getattr(site, name).moves_along(axis)]
        if still:
            shared.setdefault(" and ".join(still), []).append(f"n{axis}")
    sharing = "".join(f"; {names} shared over {', '.join(over)}" for names, over in shared.items())
    return (sizes or "no batch axes") + sharing


def _shape(site: AttentionSite) -> str:
    sizes = (*site.batch, site.q_len, site.kv_len, site.head_dim, site.value_dim)
    return f"[{', '.join(map(str, sizes))}]"


def _dtypes(spec: AttentionSpec) -> tuple[tuple[str, torch.dtype], ...]:
    return (("product", spec.product_dtype), ("probs", spec.probs_dtype), ("out", spec.out_dtype))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kernel(site: AttentionSite) -> str:
    output = tensor(site.node)
    on_gpu = output is not None and output.device.type == "cuda"
    return "flashfuse::attention, Triton" if on_gpu else "flashfuse::attention, tiled torch"


def _bytes_saved(site: AttentionSite) -> int | str:
    """Eager stores at least the scores and the probabilities."""
    elements = sympy.prod((*site.batch, site.q_len, site.kv_len))
    total = _simplified(elements * (site.spec.product_dtype.itemsize + site.spec.probs_dtype.itemsize))
    return int(total) if total.is_Integer else str(total)


@functools.lru_cache(maxsize=256)
def _simplified(size: sympy.Expr) -> sympy.Expr:
    """Kept, since layers have equal sizes, and simplifying one takes longer than finding its attention."""
    return sympy.simplify(size)
