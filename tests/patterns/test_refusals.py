"""What must be left alone is left alone, with a stable code, a sentence, and the user's own source line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import matched, only_refusal, only_site

B, H, S, D = 2, 4, 6, 8


def qkv() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(B, H, S, D) for _ in range(3))


def scores(q: Any, k: Any) -> Any:
    return q @ k.transpose(-1, -2)


def over_rows(q: Any, k: Any, v: Any) -> Any:
    return scores(q, k).softmax(-2) @ v


def over_heads(q: Any, k: Any, v: Any) -> Any:
    return scores(q, k).softmax(1) @ v


def probabilities_returned(q: Any, k: Any, v: Any) -> Any:
    probs = scores(q, k).softmax(-1)
    return probs @ v, probs


def probabilities_summed(q: Any, k: Any, v: Any) -> Any:
    probs = scores(q, k).softmax(-1)
    return probs @ v + probs.sum(-1, keepdim=True)


def scores_returned(q: Any, k: Any, v: Any) -> Any:
    s = scores(q, k)
    return s.softmax(-1) @ v, s


def values_written_in_place(q: Any, k: Any, v: Any) -> Any:
    v = v + 1
    probs = scores(q, k.clone()).softmax(-1)
    k = k.mul_(2)
    return probs @ v + k.sum()


def mask_written_in_place(q: Any, k: Any, v: Any) -> Any:
    bias = k.sum(-1)
    biased = scores(q, k) + bias[:, :, None]
    bias.fill_(7.0)
    return biased.softmax(-1) @ v


def talking_heads_after(q: Any, k: Any, v: Any) -> Any:
    probs = scores(q, k).softmax(-1)
    mixed = torch.einsum("bhij,hg->bgij", probs, q.new_ones(H, H))
    return mixed @ v


def talking_heads_before(q: Any, k: Any, v: Any) -> Any:
    mixed = F.linear(scores(q, k).permute(0, 2, 3, 1), q.new_ones(H, H)).permute(0, 3, 1, 2)
    return mixed.softmax(-1) @ v


def top_k(q: Any, k: Any, v: Any) -> Any:
    s = scores(q, k)
    kept = s.topk(3, dim=-1).values[..., -1:]
    return s.masked_fill(s < kept, float("-inf")).softmax(-1) @ v


def top_k_scattered(q: Any, k: Any, v: Any) -> Any:
    s = scores(q, k)
    top = s.topk(3, dim=-1)
    return torch.full_like(s, float("-inf")).scatter(-1, top.indices, top.values).softmax(-1) @ v


def sorted_scores(q: Any, k: Any, v: Any) -> Any:
    return scores(q, k).sort(-1).values.softmax(-1) @ v


def permuted_keys(q: Any, k: Any, v: Any) -> Any:
    order = v[..., 0].argsort(-1)[:, :, None].expand(B, H, S, S)
    return torch.gather(scores(q, k), -1, order).softmax(-1) @ v


def multiplied_products(q: Any, k: Any, v: Any) -> Any:
    return (scores(q, k) * scores(k, v)).softmax(-1) @ v


def product_under_a_function(q: Any, k: Any, v: Any) -> Any:
    return (scores(q, k) + torch.sigmoid(scores(k, v))).softmax(-1) @ v


def convolved_heads_before(q: Any, k: Any, v: Any) -> Any:
    return F.conv2d(scores(q, k), q.new_ones(H, H, 1, 1)).softmax(-1) @ v


def convolved_heads_after(q: Any, k: Any, v: Any) -> Any:
    return F.conv2d(scores(q, k).softmax(-1), q.new_ones(H, H, 1, 1)) @ v


def cumulative_product(q: Any, k: Any, v: Any) -> Any:
    return scores(q, k).cumprod(-1).softmax(-1) @ v


def cumulative(q: Any, k: Any, v: Any) -> Any:
    return scores(q, k).cumsum(-1).softmax(-1) @ v


def twice_normalised(q: Any, k: Any, v: Any) -> Any:
    return scores(q, k).softmax(-1).softmax(-1) @ v


def drops_at_random(q: Any, k: Any, v: Any) -> Any:
    return F.dropout1d(scores(q, k).softmax(-1)[0], 0.5, training=True) @ v


def maximum_over_rows(q: Any, k: Any, v: Any) -> Any:
    s = scores(q, k)
    e = (s - s.amax(-2, keepdim=True)).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def unknown_beside_the_product(q: Any, k: Any, v: Any) -> Any:
    """It was said that `erfc` needs the scores as a whole."""
    s = scores(q, k)
    return (s + torch.erfc(s)).softmax(-1) @ v


def values_averaged_by_head(q: Any, k: Any, v: Any) -> Any:
    return scores(q, k).softmax(-1).mean(1)


def distances(q: Any, k: Any, v: Any) -> Any:
    return (-torch.cdist(q, k)).softmax(-1) @ v


def squared_differences(q: Any, k: Any, v: Any) -> Any:
    return (-(q[..., None, :] - k[..., None, :, :]).pow(2).sum(-1)).softmax(-1) @ v


def cosines(q: Any, k: Any, v: Any) -> Any:
    return F.cosine_similarity(q[..., None, :], k[..., None, :, :], dim=-1).softmax(-1) @ v


def three_factors(q: Any, k: Any, v: Any) -> Any:
    return (q[..., None, :] * k[..., None, :, :] * v[0, 0, 0]).sum(-1).softmax(-1) @ v


def added_features(q: Any, k: Any, v: Any) -> Any:
    """Additive attention: a product would have to store features of every pair, which the sum does not."""
    return (torch.tanh(q[..., None, :] + k[..., None, :, :]) * v[0, 0, 0]).sum(-1).softmax(-1) @ v


def noisy(q: Any, k: Any, v: Any) -> Any:
    return F.gumbel_softmax(scores(q, k), dim=-1) @ v


def masked_values(q: Any, k: Any, v: Any) -> Any:
    return (scores(q, k).softmax(-1)[..., None] * v[..., None, :, :] * k[..., None, :, :]).sum(-2)


def output_projection(q: Any, k: Any, v: Any) -> Any:
    return torch.einsum("bhst,bhtd,hde->bse", scores(q, k).softmax(-1), v, q.new_ones(H, D, D))


def chain_of_products(q: Any, k: Any, v: Any) -> Any:
    return torch.linalg.multi_dot([scores(q[0, 0], k[0, 0]).softmax(-1), v[0, 0], q.new_ones(D, 50)])


def single_key(q: Any, k: Any, v: Any) -> Any:
    return scores(q, k[:, :, :1]).softmax(-1) @ v[:, :, :1]


def single_key_written_out(q: Any, k: Any, v: Any) -> Any:
    e = scores(q, k[:, :, :1]).exp()
    return (e / e.sum(-1, keepdim=True)) @ v[:, :, :1]


def contextual_positions(q: Any, k: Any, v: Any) -> Any:
    """https://arxiv.org/abs/2405.18719: their rounding was blamed, not the sum."""
    s = scores(q, k)
    at = s.sigmoid().cumsum(-1).clamp(max=S - 1)
    return (s + scores(q, k[:1, :1]).gather(-1, at.ceil().long())).softmax(-1) @ v


def base_three(q: Any, k: Any, v: Any) -> Any:
    e = 3.0 ** scores(q, k)
    return (e / e.sum(-1, keepdim=True)) @ v


def rolled_columns(q: Any, k: Any, v: Any) -> Any:
    return scores(q, k).softmax(-1).roll(1, -1) @ v


def flipped_columns(q: Any, k: Any, v: Any) -> Any:
    return scores(q, k).softmax(-1).flip(-1) @ v


def flipped_rows(q: Any, k: Any, v: Any) -> Any:
    return scores(q, k).softmax(-1).flip(-2) @ v


REFUSED = [
    (rolled_columns, "softmax-axis", "roll(1, -1)"),
    (flipped_columns, "softmax-axis", "flip(-1)"),
    (flipped_rows, "operand-layout", "flip(-2)"),
    (distances, "no-product", "cdist"),
    (squared_differences, "no-product", "pow(2).sum"),
    (cosines, "no-product", "cosine_similarity"),
    (three_factors, "no-product", "sum(-1)"),
    (added_features, "no-product", "sum(-1)"),
    (noisy, "unknown-operator", "gumbel_softmax"),
    (masked_values, "value-product", "sum(-2)"),
    (output_projection, "value-product", "einsum"),
    (chain_of_products, "value-product", "multi_dot"),
    (single_key, "single-key", "@ v"),
    (single_key_written_out, "single-key", "@ v"),
    (base_three, "base", "3.0 **"),
    (over_rows, "softmax-axis", "softmax(-2)"),
    (over_heads, "softmax-axis", "softmax(1)"),
    (probabilities_returned, "probabilities-used", "softmax(-1)"),
    (probabilities_summed, "probabilities-used", "probs.sum"),
    (scores_returned, "scores-used", "return q @ k.transpose"),
    (talking_heads_after, "head-mixing", "torch.einsum"),
    (talking_heads_before, "head-mixing", "@ v"),
    (top_k, "top-k", "topk"),
    (top_k_scattered, "top-k", "topk"),
    (sorted_scores, "sort", "sort"),
    (cumulative, "cumulative", "cumsum"),
    (cumulative_product, "cumulative", "cumprod"),
    (contextual_positions, "cumulative", "cumsum"),
    (permuted_keys, "look-up", "gather"),
    (multiplied_products, "square-intermediate", "k.transpose"),
    (product_under_a_function, "square-intermediate", "k.transpose"),
    (convolved_heads_before, "head-mixing", "F.conv2d"),
    (convolved_heads_after, "head-mixing", "F.conv2d"),
    (twice_normalised, "row-dependent", "softmax(-1).softmax(-1)"),
    (unknown_beside_the_product, "unknown-operator", "erfc"),
    (drops_at_random, "dropout", "F.dropout1d"),
    (mask_written_in_place, "mutation", "bias.fill_(7.0)"),
    (values_averaged_by_head, "no-value-product", "softmax(-1)"),
]


@pytest.mark.parametrize(("fn", "code", "line"), REFUSED, ids=lambda x: getattr(x, "__name__", None))
def test_refused_with_reason_and_line(fn: Callable[..., Any], code: str, line: str) -> None:
    refusal = only_refusal(fn, *qkv())
    assert refusal.code == code, refusal
    assert line in refusal.location.code
    assert refusal.location.file == __file__
    assert refusal.reason
    assert refusal.reason[0].islower() or refusal.reason[0] == "`"


def test_the_line_is_the_users() -> None:
    """Where torch's own code uses probabilities again, its line was told, not the one that calls it."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        probs = scores(q, k).softmax(-1)
        return probs @ v, F.pad(probs, (0, 1))

    found = only_refusal(fn, *qkv()).location
    assert (found.file, found.code) == (__file__, "return probs @ v, F.pad(probs, (0, 1))")


def test_maximum_over_another_axis_is_not_a_softmax() -> None:
    """exp(s - max over rows) / sum over columns: the shift differs along the summed axis and does not cancel."""
    result = matched(maximum_over_rows, *qkv())
    assert not result.sites


def test_written_operand_is_read_where_it_still_holds() -> None:
    """The keys are copied before they are overwritten, so the copy is the operand."""
    site = only_site(values_written_in_place, *qkv())
    assert site.k.node.name == "clone"


def test_dead_probabilities_do_not_count() -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        probs = scores(q, k).softmax(-1)
        _unused = probs.sum()
        return probs @ v

    only_site(fn, *qkv())


def test_sizes_of_the_scores_do_not_count() -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        s = scores(q, k)
        return (s * s.shape[-1] ** -0.5).softmax(-1) @ v

    only_site(fn, *qkv(), dynamic=True)


def test_data_dependent_length() -> None:
    def fn(x: Any, keep: Any) -> Any:
        kept = x[keep]
        return (kept @ kept.T).softmax(-1) @ kept

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        refusal = only_refusal(fn, torch.randn(S, D), torch.tensor([True] * 3 + [False] * 3))
    assert refusal.code == "data-dependent-shape"


def test_no_softmax_over_products_is_no_attention_at_all() -> None:
    """A router's softmax over a layer is not refused: there is nothing to refuse."""

    class Router(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = torch.nn.Linear(D, H)

        def forward(self, x: Any, experts: Any) -> Any:
            return torch.einsum("be,ebd->bd", self.gate(x).softmax(-1), experts)

    with torch.no_grad():
        result = matched(Router(), torch.randn(B, D), torch.randn(H, B, D))
    assert not result.sites
    assert not result.refusals


def added_by_scatter(e: Any, rows: Any) -> Any:
    return e.new_zeros(S).scatter_add_(0, rows, e)


def added_by_index(e: Any, rows: Any) -> Any:
    return torch.zeros(S).index_add(0, rows, e)


@pytest.mark.parametrize("add", [added_by_scatter, added_by_index], ids=["scatter", "index"])
def test_softmax_over_the_edges_of_a_graph(add: Callable[..., Any]) -> None:
    """It was left alone without a word: its exponentials are not summed over an axis."""

    def fn(q: Any, k: Any, v: Any, source: Any, target: Any) -> Any:
        s = (q[target] * k[source]).sum(-1) / 2
        e = (s - s.max()).exp()
        weights = e / add(e, target)[target]
        return torch.zeros(S, D).index_add(0, target, weights[:, None] * v[source])

    rows = (torch.randn(S, D) for _ in range(3))
    refusal = only_refusal(fn, *rows, torch.randint(0, S, (12,)), torch.randint(0, S, (12,)))
    assert refusal.code == "scattered"


class Additive(torch.nn.Module):
    """Bahdanau's attention: each query and key is added before a function and a layer make a score of them."""

    def __init__(self, function: Any = torch.tanh, queries: int = S) -> None:
        super().__init__()
        self.score, self.function, self.queries = torch.nn.Linear(D, 1, bias=False), function, queries

    def forward(self, q: Any, k: Any, v: Any) -> Any:
        pairs = q[:, 0, : self.queries, None] + k[:, 0, None]
        s = self.score(self.function(pairs)).squeeze(-1)
        return s.masked_fill(k[:, 0, None, :, 0] > 2, -1e9).softmax(-1) @ v[:, 0]


@pytest.mark.parametrize("module", [Additive(), Additive(F.leaky_relu), Additive(queries=1)], ids=["all", "gat", "one"])
def test_additive_attention(module: Additive) -> None:
    """It was left alone without a word, as a layer is no product of activations."""
    refusal = only_refusal(module, *qkv())
    assert refusal.code == "no-product"
    assert "`linear` makes the scores of sums of queries and keys" in refusal.reason
    assert "self.score(" in refusal.location.code


def test_pooling_by_a_layer_is_not_additive_attention() -> None:
    """Positions that are added for a whole batch are no queries, and neither is a bias that a layer adds."""

    class Pooling(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = torch.nn.Linear(D, 1)

        def forward(self, x: Any, positions: Any, bias: Any) -> Any:
            s = self.score(torch.tanh(x + positions[None] + bias))
            return (s.softmax(1).mT @ x).squeeze(1)

    result = matched(Pooling(), torch.randn(B, S, D), torch.randn(S, D), torch.randn(D))
    assert not result.sites
    assert not result.refusals


def test_a_classifier_is_not_refused() -> None:
    """What a layer makes of a product of activations, as a graph convolution's, was said to be a softmax of scores."""

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(D, H)

        def forward(self, x: Any, adjacency: Any) -> Any:
            return self.head(adjacency @ x).log_softmax(-1)

    assert not matched(Classifier(), torch.randn(S, D), torch.rand(S, S)).refusals


def test_a_router_in_a_wider_type_is_not_refused() -> None:
    """Behind a product, its logits were taken for one of activations, since its weights are converted."""

    class Routed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = torch.nn.Parameter(torch.randn(4, D, dtype=torch.bfloat16))

        def forward(self, q: Any, k: Any, v: Any) -> Any:
            out = (q @ k.transpose(-1, -2)).softmax(-1) @ v
            return out, F.linear(out.float(), self.router.float()).softmax(-1).topk(2)

    result = matched(Routed(), *(x.bfloat16() for x in qkv()))
    assert len(result.sites) == 1
    assert not result.refusals


def test_layers_that_mix_heads_on_both_sides() -> None:
    """CaiT mixes scores by one layer and probabilities by another."""

    class Talking(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = torch.nn.Linear(H, H), torch.nn.Linear(H, H)

        def forward(self, q: Any, k: Any, v: Any) -> Any:
            mixed = self.before(scores(q, k).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return self.after(mixed.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v

    assert only_refusal(Talking(), *qkv()).code == "head-mixing"


def test_parameters_that_mix_heads_on_both_sides() -> None:
    """The same by einsum with matrices, which were taken for values: said to be a softmax over another axis."""

    class Talking(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = (torch.nn.Parameter(torch.randn(H, H)) for _ in range(2))

        def forward(self, q: Any, k: Any, v: Any) -> Any:
            probs = torch.einsum("bhij,hg->bgij", scores(q, k), self.before).softmax(-1)
            return torch.einsum("bhij,hg->bgij", probs, self.after) @ v

    refusal = only_refusal(Talking(), *qkv())
    assert refusal.code == "head-mixing"
    assert "self.after" in refusal.location.code


def test_learned_values_mix_no_heads() -> None:
    class Memory(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = torch.nn.Parameter(torch.randn(S, D))

        def forward(self, q: Any, k: Any) -> Any:
            return scores(q, k).softmax(-2) @ self.values

    assert only_refusal(Memory(), *qkv()[:2]).code == "softmax-axis"


def test_linear_attention_behind_a_product_is_not_refused() -> None:
    """The layer that makes features was said to mix scores across heads, behind another linear attention."""

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key = torch.nn.Linear(D, D)

        def forward(self, q: Any, k: Any, v: Any) -> Any:
            x = q @ (k.softmax(-2).transpose(-1, -2) @ v)
            return q @ (self.key(x).softmax(-2).transpose(-1, -2) @ v)

    with torch.no_grad():
        result = matched(Linear(), *qkv())
    assert not result.sites
    assert not result.refusals


def test_classes_of_an_average_are_not_refused() -> None:
    def fn(x: Any, gate: Any) -> Any:
        return (gate.softmax(1) * x).sum(1).softmax(-1)

    result = matched(fn, torch.randn(B, S, D), torch.randn(B, S, 1))
    assert not result.sites
    assert not result.refusals


@pytest.mark.parametrize("shape", [(0, H, S, D), (B, 0, S, D), (B, H, 0, D), (B, H, S, 0)], ids=str)
def test_nothing_to_compute(shape: tuple[int, ...]) -> None:
    refusal = only_refusal(lambda q, k, v: scores(q, k).softmax(-1) @ v, *(torch.randn(shape) for _ in range(3)))
    assert refusal.code == "empty"
