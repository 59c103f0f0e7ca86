"""Modules of derivatives: text, files and names, and that they compile for a GPU this machine does not have."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from score_programs import PROGRAMS

from flashfuse.kernels.spec import AttentionSpec, parse

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from flashfuse.kernels.codegen import generate  # noqa: E402
from flashfuse.kernels.codegen_derivative import generate_derivatives, load_derivatives  # noqa: E402

POINTERS = {torch.float32: "*fp32", torch.bool: "*i1", torch.int64: "*i64"}


def make_spec(score: str, *captured: torch.dtype, dtype: torch.dtype = torch.float32, **programs: str) -> AttentionSpec:
    further = {name: parse(text, captured) for name, text in programs.items()}
    return AttentionSpec(1, parse(score, captured), captured, 1, dtype, dtype, dtype, "nan", (0, 1, 2), **further)


def program_spec(name: str) -> AttentionSpec:
    text, captured = PROGRAMS[name]
    types = (torch.float32 if c.is_floating_point() else c.dtype for c in captured)
    return make_spec(text, *types)


def function(source: str, name: str) -> str:
    """The text of one generated function."""
    return source.split(f"def {name}_")[1].split("@triton.jit")[0]


def reads_of(source: str) -> list[str]:
    """The mask of every load of a module, empty where there is none."""
    return [line.partition("mask=")[2] for line in source.splitlines() if "tl.load" in line]


def test_value_and_derivative_share_what_they_share() -> None:
    _, source = generate_derivatives(make_spec("tanh((qk + t0[q_idx, kv_idx]) * 0.02) * 50.0", torch.float32))
    body = function(source, "score_and_grad_full").split('"""')[2]
    assert body.count("tanh(") == body.count("tl.load") == 1
    assert "s is score / 50.0" in source
    assert "ds/dt0[q_idx, kv_idx] = " in function(source, "score_grad0_masked")


@pytest.mark.parametrize(
    ("text", "slope"),
    [
        ("qk * 0.125", 0.125),
        ("where(kv_idx <= q_idx, qk * 0.25 + t0[kv_idx], -inf)", 0.25),
        ("where(kv_idx <= q_idx, qk * 0.25 + t0[kv_idx], qk * 0.5)", 1.0),
        ("where(kv_idx <= q_idx, qk * 0.25 + t0[kv_idx], qk * t0[kv_idx])", 1.0),
        ("tanh(qk + t0[kv_idx]) * 50.0", 50.0),
    ],
)
def test_a_slope_of_one_number_is_left_to_the_end_of_a_sum(text: str, slope: float) -> None:
    """An operation less for each score; where branches differ, a slope is a function of the pair."""
    derivatives = load_derivatives(make_spec(text, torch.float32))
    assert derivatives.slope == slope
    body = function(derivatives.path.read_text(), "score_and_grad_full")
    assert (f"/ {slope}" in body) == (slope != 1.0 and derivatives.scale == 1.0)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("where(kv_idx <= q_idx, qk, -inf)", "slope"),
        ("where(t1[kv_idx], qk * t0[kv_idx], -inf)", "product"),
        ("where(t1[kv_idx], qk, -10000.0)", "slope"),
        ("where(t1[kv_idx] & (kv_idx <= q_idx), tanh(qk * 0.1) + t0[kv_idx], -inf)", "slope"),
        ("where(t1[kv_idx], sqrt(qk), -inf)", "product"),
    ],
)
def test_what_tells_masked_scores(text: str, where: str) -> None:
    """A slope of 0 does, unless others may be infinite, and the product with it no number."""
    spec = make_spec(text, torch.float32, torch.bool)
    found = load_derivatives(spec)
    assert found.masked_where == where
    # Without ranges no tile is known to be free of a mask of data.
    assert found.full_where == (where if "t1" in text else None)
    assert load_derivatives(spec, ranged=True).full_where is None


def test_only_what_has_a_derivative_gets_a_function() -> None:
    captured = (torch.float32, torch.bool, torch.int64)
    spec = make_spec("where(t1[kv_idx], qk + t0[t2[q_idx]] * t0[kv_idx], -inf)", *captured)
    derivatives = load_derivatives(spec)
    assert len(derivatives.reads) == 2
    assert derivatives.sink == derivatives.factor == ()
    assert len({id(f) for of in derivatives.reads for f in (of.masked, of.full)}) == 4


def test_a_guarded_read_stays_guarded() -> None:
    """A condition that joins positions with data used to guard no read, and "and" did not guard its sides at all."""
    inside = "where((kv_idx < size0) & t0[kv_idx], qk * t1[kv_idx], qk)"
    behind = "where((kv_idx < 1) | t0[kv_idx - 1], qk, qk * t1[kv_idx])"
    for text, guard in ((inside, "(kv_idx < sizes[0])"), (behind, "(kv_idx >= 1)")):
        spec = make_spec(text, torch.bool, torch.float32)
        masks = reads_of(generate(spec)[1])
        assert len(masks) == 4
        assert all(guard in mask for mask in masks)
        assert all(reads_of(generate_derivatives(spec)[1]))


def test_equal_programs_share_a_module_and_others_never_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHFUSE_CACHE_DIR", str(tmp_path))
    load_derivatives.cache_clear()
    text = "where(kv_idx <= q_idx + {}, tanh(qk * 0.5), -inf)"
    first, again = (load_derivatives(make_spec(text.format(21))) for _ in range(2))
    assert first is again
    # The type of the output is no part of the text.
    other_type = load_derivatives(make_spec(text.format(21), dtype=torch.float32, factor="1.0"))
    assert other_type.path == first.path
    assert other_type.score_and_grad_full is first.score_and_grad_full
    different = load_derivatives(make_spec(text.format(22)))
    assert different.path != first.path
    assert different.score_and_grad_full.fn.__name__ != first.score_and_grad_full.fn.__name__
    assert sorted(tmp_path.iterdir()) == sorted({first.path, different.path})


def test_every_program_has_a_module_of_its_own() -> None:
    specs = [program_spec(name) for name in PROGRAMS]
    digests = [make(spec)[0] for spec in specs for make in (generate, generate_derivatives)]
    assert len(set(digests)) == len(digests)


PRINT_DIGESTS = """
import sys; sys.path.insert(0, "tests"); sys.path.insert(0, "tests/kernels")
from test_codegen_derivative import PROGRAMS, generate, generate_derivatives, program_spec
for name in PROGRAMS:
    print(name, generate(program_spec(name))[0], generate_derivatives(program_spec(name))[0])
"""


def test_texts_are_the_same_in_every_process() -> None:
    outputs = set()
    for seed in ("0", "1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", PRINT_DIGESTS]
        root = Path(__file__).parents[2]
        run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
        outputs.add(run.stdout)
    assert len(outputs) == 1
    assert len(outputs.pop().splitlines()) == len(PROGRAMS)


@triton.jit
def backward_tile_kernel(
    out_ptr, qk_ptr, q_len, kv_len, sizes, captured, strides,
    SCORE_AND_GRAD: tl.constexpr, READ_GRADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(s + ds / dqk + the sum of ds / d read) on one tile: everything a backward kernel calls."""
    n0 = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    rows, columns = tl.minimum(offsets, q_len - 1)[:, None], offsets[None, :]
    at = (n0 * BLOCK + offsets[:, None]) * BLOCK + columns
    qk = tl.load(qk_ptr + at)
    value, grad = SCORE_AND_GRAD(qk, n0, n0, n0, n0, rows, columns, q_len, kv_len, sizes, captured, strides)
    value += grad
    for i in tl.static_range(len(READ_GRADS)):
        value += READ_GRADS[i](qk, n0, n0, n0, n0, rows, columns, q_len, kv_len, sizes, captured, strides)
    tl.store(out_ptr + at, value)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled when interpreted")
@pytest.mark.parametrize("name", ["soft cap, bias", "look-up", "power of a tensor", "logarithm of a distance"])
@pytest.mark.parametrize("variant", ["masked", "full"])
def test_compiles(name: str, variant: str) -> None:
    spec, ranks = program_spec(name), [c.dim() for c in PROGRAMS[name][1]]
    derivatives = load_derivatives(spec)
    constants = {
        "SCORE_AND_GRAD": getattr(derivatives, f"score_and_grad_{variant}"),
        "READ_GRADS": tuple(getattr(of, variant) for of in derivatives.reads),
        "BLOCK": 64,
    }
    signature: dict[str, Any] = {name: "constexpr" for name in constants}
    signature |= {"out_ptr": "*fp32", "qk_ptr": "*fp32", "q_len": "i32", "kv_len": "i32", "sizes": ("i32",)}
    signature["captured"] = tuple(POINTERS[c] for c in spec.captured)
    signature["strides"] = tuple(("i32",) * rank for rank in ranks)
    ordered = {name: signature[name] for name in backward_tile_kernel.arg_names}
    at = {(backward_tile_kernel.arg_names.index(name),): value for name, value in constants.items()}
    kernel = triton.compile(ASTSource(backward_tile_kernel, ordered, at), target=GPUTarget("cuda", 90, 32))
    assert "st.global" in kernel.asm["ptx"]
