"""The import rule of docs/design.md: data flows one way, and so do imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What a file in a folder may import of the project, as prefixes.
ALLOWED = {
    "kernels": ("flashfuse.kernels",),
    "patterns": (
        "flashfuse.patterns",
        "flashfuse.kernels.spec",
        "flashfuse.kernels.expr",
        "flashfuse.kernels.normal",
        "flashfuse.kernels.operators",
        "flashfuse.kernels.stored",
    ),
    "fusion": ("flashfuse",),
}

# `import flashfuse`, and all work on graphs, must do without Triton; these are the only files that may name it.
TRITON_FOLDERS = ("kernels",)


def _files() -> list[Path]:
    return sorted(path for folder in ALLOWED for path in (ROOT / folder).rglob("*.py"))


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide the folder they reach into"
            # `from package import module` imports package.module as much as it imports a name
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_table(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    for name in _imported(path):
        if name.split(".")[0] == "flashfuse":
            allowed = any(name == prefix or name.startswith(prefix + ".") for prefix in ALLOWED[folder])
            assert allowed, f"{folder}/ may not import {name}"
        if name.split(".")[0] == "triton":
            assert folder in TRITON_FOLDERS, f"{folder}/ may not import {name}"


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_light() -> None:
    code = "import sys, flashfuse; print([m for m in ('torch', 'sympy', 'rich', 'triton') if m in sys.modules])"
    assert _run(code) == "[]"


def test_graph_work_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch, flashfuse;"
        "f = lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v; x = torch.randn(1, 2, 8, 4);"
        "print(sum(s.status == 'fused' for s in flashfuse.explain(f)(x, x, x).sites))"
    )
    assert _run(code) == "1"
