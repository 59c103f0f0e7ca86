"""How training code runs a model: mixed precision, frozen parts, several backward passes, hooks.

Each runs around or inside a compiled attention, which stays fused; the results are held to float64 as eager code's are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import assert_close_to_exact
from torch import nn
from training import (
    D,
    Inputs,
    Run,
    S,
    assert_same_use,
    assert_trains,
    attention,
    backward,
    compiled,
    kept_gradients,
    leaves,
    loss,
    qkvb,
)

import flashfuse

pytestmark = pytest.mark.usefixtures("gradients")


def cast(dtype: torch.dtype, x: torch.Tensor) -> torch.autocast:
    """An autocast region that leaves float64 alone."""
    return torch.autocast("cpu", dtype, enabled=x.dtype != torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_inside(dtype: torch.dtype) -> None:
    def fn(q: Any, k: Any, v: Any, bias: Any) -> Any:
        with cast(dtype, q):
            return attention(q, k, v, bias)

    report = assert_trains(fn, qkvb(), "aot_eager")
    report.assert_fused(sites=1)
    assert report.sites[0].spec.product_dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_around(dtype: torch.dtype) -> None:
    """The usual way round. Autocast had the casts of q, k and v cached from Dynamo's run, so nothing was fused."""

    def use(run: Run, inputs: Inputs) -> list[torch.Tensor | None]:
        with cast(dtype, inputs[0]):
            out = run(*inputs)
        loss(out).backward()
        return [out, *kept_gradients(inputs)]

    report = assert_same_use(use)
    report.assert_fused(sites=1)
    assert report.sites[0].spec.product_dtype == dtype


class Projected(nn.Module):
    """Attention over projections of one input."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(D, D, bias=False) for _ in range(3))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.q(x) @ self.k(x).mT * 0.3).softmax(-1) @ self.v(x)


def inputs_of_a_model() -> torch.Tensor:
    return torch.randn(2, S, D, generator=torch.Generator().manual_seed(1))


def test_gradient_scaler() -> None:
    """float16 with a scale that is too large at first: the same steps are skipped, the same weights come out."""

    def trained(dtype: torch.dtype, fused: bool) -> tuple[torch.Tensor, float]:
        model = Projected().to(dtype)
        run = compiled(model, "aot_eager") if fused else model
        mixed = dtype != torch.float64
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, enabled=mixed)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        done, before = 0, torch.zeros(())
        while done < 5:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16, enabled=mixed):
                out = run(inputs_of_a_model().to(dtype))
            scaler.scale(loss(out.to(torch.float32) if mixed else out)).backward()
            before = model.v.weight.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            done += not torch.equal(before, model.v.weight)
        return torch.cat([p.detach().flatten() for p in model.parameters()]), scaler.get_scale()

    (mine, my_scale), (theirs, their_scale), (exact, _) = (
        trained(torch.float32, True), trained(torch.float32, False), trained(torch.float64, False)
    )  # fmt: skip
    assert my_scale == their_scale < 2.0**22
    assert_close_to_exact(mine, theirs, exact)
    flashfuse.reports()[0].assert_fused(sites=1)


# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("through_a_view", [False, True])
def test_an_output_that_is_written_in_place(through_a_view: bool, inner: str) -> None:
    """A residual added in place changed the output that the backward reads: it raised, where eager code trains.

    A write through a view whose own value nobody takes was erased, with gradients or without.
    """

    def fn(q: Any, k: Any, v: Any, bias: Any) -> Any:
        out = attention(q, k, v, bias)
        if through_a_view:
            out.flatten(0, 1).mul_(2.0)
        else:
            out += v.mean()
        return out

    assert_trains(fn, qkvb(), inner).assert_fused(sites=1)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_gradients_accumulate(inner: str) -> None:
    def use(run: Run, inputs: Inputs) -> list[torch.Tensor | None]:
        for seed in range(3):
            loss(run(*inputs), seed).backward()
        return kept_gradients(inputs)

    assert_same_use(use, inner=inner).assert_fused(sites=1)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_graph_that_is_kept_goes_backward_twice(inner: str) -> None:
    def use(run: Run, inputs: Inputs) -> list[torch.Tensor | None]:
        out = run(*inputs)
        loss(out, 0).backward(retain_graph=True)
        loss(out, 1).backward()
        return kept_gradients(inputs)

    assert_same_use(use, inner=inner).assert_fused(sites=1)


@pytest.mark.parametrize("places", [(0, 0, 2, 3), (0, 0, 0, 3)], ids=["q-is-k", "q-is-k-is-v"])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_one_tensor_given_in_several_places(places: tuple[int, ...], inner: str) -> None:
    def use(run: Run, inputs: Inputs) -> list[torch.Tensor | None]:
        loss(run(*(inputs[at] for at in places))).backward()
        return kept_gradients(inputs)

    assert_same_use(use, inner=inner).assert_fused(sites=1)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_training_between_inferences(inner: str) -> None:
    """Each kind of call has a graph of its own, and none changes what another gives."""

    def use(run: Run, inputs: Inputs) -> list[torch.Tensor | None]:
        outs = []
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad, torch.inference_mode, torch.no_grad):
            with mode():
                outs.append(run(*inputs))
        assert [out.requires_grad for out in outs] == [False, False, True, False, False]
        assert [out.is_inference() for out in outs] == [False, True, False, True, False]
        loss(outs[2]).backward()
        return [*(out.clone() for out in outs), *kept_gradients(inputs)]

    assert_same_use(use, inner=inner)
    assert all(len(report.sites) == 1 for report in flashfuse.reports())


def test_inference_mode_in_a_training_graph() -> None:
    """Gradients went through what a region of it had made, and a tensor of it could not be saved for them."""

    def use(run: Run, inputs: Inputs) -> list[torch.Tensor | None]:
        out = run(*inputs)
        loss(out).backward()
        return [out, *kept_gradients(inputs)]

    def fn(q: Any, k: Any, v: Any, bias: Any) -> Any:
        with torch.inference_mode():
            keys, added, first = k.transpose(-1, -2), bias * 0.5, attention(q, k, v, bias)
        return (q @ keys * 0.3 + added).softmax(-1) @ v + first.clone()

    assert_same_use(use, fn, inner="eager").assert_fused(sites=2)


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (3,), (1, 2), ()], ids=str)
def test_only_some_tensors_are_trained(trained: tuple[int, ...]) -> None:
    inputs = [x.detach().requires_grad_(at in trained) for at, x in enumerate(qkvb())]

    def use(run: Run, inputs: Inputs) -> list[torch.Tensor | None]:
        out = run(*inputs)
        if out.requires_grad:
            loss(out).backward()
        return [out, *kept_gradients(inputs)]

    assert_same_use(use, inputs=inputs).assert_fused(sites=1)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_compiled_autograd_enabled(inner: str) -> None:
    def use(run: Run, inputs: Inputs) -> list[torch.Tensor | None]:
        if run is attention:
            return backward(run, inputs)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend=inner, fullgraph=True)):
            loss(run(*inputs)).backward()
        return kept_gradients(inputs)

    assert_same_use(use, inner=inner).assert_fused(sites=1)


def test_compiled_autograd_of_a_whole_step() -> None:
    def step(*inputs: torch.Tensor) -> None:
        loss(attention(*inputs)).backward()

    def use(run: Run, inputs: Inputs) -> list[torch.Tensor | None]:
        run(*inputs)
        return kept_gradients(inputs)

    with torch._dynamo.config.patch(compiled_autograd=True):
        assert_same_use(use, step).assert_fused(sites=1)


@pytest.mark.parametrize(
    ("inner", "message"),
    [("eager", "flashfuse::attention has no second derivative"), ("aot_eager", "does not currently support double")],
)
def test_second_derivative_raises(inner: str, message: str) -> None:
    """Where the graph is compiled, what its compiler itself raises."""
    q, *others = leaves(qkvb())
    (grad,) = torch.autograd.grad(loss(compiled(attention, inner)(q, *others)), q, create_graph=True)
    with pytest.raises(RuntimeError, match=message):
        grad.square().sum().backward()


def test_forward_mode_raises() -> None:
    """The operator dropped the tangents without a word, and the output had none."""
    tensors = [x.detach() for x in qkvb()]
    with torch.autograd.forward_ad.dual_level():
        q = torch.autograd.forward_ad.make_dual(tensors[0], tensors[1])
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            compiled(attention)(q, *tensors[1:])


# --------------------------------------------------------------------------------------------------------------------


def doubled_output(model: Projected) -> None:
    model.k.register_forward_hook(lambda module, args, out: out * 2)


def halved_input(model: Projected) -> None:
    model.v.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))


def hooked_gradient(model: Projected) -> None:
    def hook(module: Any, args: Any, out: torch.Tensor) -> None:
        out.register_hook(lambda grad: grad * 3)

    model.k.register_forward_hook(hook)


def backward_hook(model: Projected) -> None:
    model.register_full_backward_hook(lambda module, grads, outs: (grads[0] * 2,))


def hooked_parameter(model: Projected) -> None:
    model.q.weight.register_hook(lambda grad: grad * 5)


HOOKS = (doubled_output, halved_input, hooked_gradient, backward_hook, hooked_parameter)


@pytest.mark.parametrize("register", HOOKS, ids=lambda f: f.__name__)
def test_hooks(register: Callable[[Projected], None]) -> None:
    def trained(dtype: torch.dtype, fused: bool) -> list[torch.Tensor]:
        model = Projected().to(dtype)
        register(model)
        x = inputs_of_a_model().to(dtype).requires_grad_()
        out = (compiled(model, "aot_eager") if fused else model)(x)
        loss(out).backward()
        assert x.grad is not None
        return [out, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

    results = trained(torch.float32, True), trained(torch.float32, False), trained(torch.float64, False)
    for fused, eager, exact in zip(*results, strict=True):
        assert_close_to_exact(fused, eager, exact, dtype=torch.float32)
    assert sum(len(report.sites) for report in flashfuse.reports()) == 1


def batches() -> list[tuple[torch.Tensor, ...]]:
    """Of other lengths, then of other batch sizes too."""
    made = []
    for batch, length in ((2, 16), (2, 21), (2, 9), (3, 33), (4, 12)):
        made.append((*(torch.randn(batch, 3, length, D) for _ in range(3)), torch.randn(3, length, length)))
    return made


@pytest.mark.parametrize("dynamic", [None, True])
def test_batches_of_other_sizes(dynamic: bool | None) -> None:
    """As many graphs as torch's own backends compile: two more once it has seen what changes, or one from the start."""
    torch.manual_seed(0)
    given = batches()

    def use(run: Run, inputs: Inputs) -> list[torch.Tensor | None]:
        found: list[torch.Tensor | None] = []
        for batch in given:
            found += backward(run, leaves([x.requires_grad_() for x in batch], inputs[0].dtype))
        return found

    assert_same_use(use, dynamic=dynamic)
    assert len(flashfuse.reports()) == (1 if dynamic else 3)
    for report in flashfuse.reports():
        report.assert_fused(sites=1)
